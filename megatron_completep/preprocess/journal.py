"""Lines of JSON that end with their own hash: the record of a preprocessing run's finished work."""

from pathlib import Path
from typing import Any

import orjson
import xxhash

Record = dict[str, Any]  # the content of one line


def journal_line(record: Record) -> bytes:
    """JSON, a space, 16 hexadecimal digits of xxh3, and a newline."""
    body = orjson.dumps(record)
    return body + f" {xxhash.xxh3_64_hexdigest(body)}\n".encode()


def read_journal(path: Path) -> tuple[list[Record], list[str]]:
    """(records of the undamaged lines, places of the damaged ones as `FILE, line N`)."""
    records = []
    damaged = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            # The last line of a killed process may be torn off, which is no damage.
            if not line.endswith(b"\n"):
                continue
            body, _, digest = line[:-1].rpartition(b" ")
            if xxhash.xxh3_64_hexdigest(body).encode() == digest:
                records.append(orjson.loads(body))
            else:
                damaged.append(f"{path}, line {number}")
    return records, damaged
