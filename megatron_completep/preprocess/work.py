"""The work folder `{output_prefix}.preprocess`, which holds what is finished so far.

It is deleted when the token files are in place. plan.json: which run it belongs to. *.journal,
*.meta, *.bin: shards, see encode.py. *.units: units of which all blocks were handed out, with the
number of their blocks (lines of journal.py, too). Every process that writes here has a name of its
own, so nothing is ever overwritten.
"""

import fcntl
import secrets
import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from megatron_completep.errors import DataError
from megatron_completep.preprocess.journal import Record, journal_line, read_journal
from megatron_completep.preprocess.settings import PreprocessSettings
from megatron_completep.preprocess.sources import Block, Unit, blocks_of

_RUN_TOKENS = 1 << 22  # tokens read at a time
PLAN = "plan.json"


def work_path(settings: PreprocessSettings) -> Path:
    """The work folder of a run."""
    return Path(settings.output_prefix + ".preprocess")


def recorded_fingerprint(settings: PreprocessSettings) -> str | None:
    """The fingerprint of the unfinished work in the work folder; None where there is none."""
    try:
        plan = orjson.loads((work_path(settings) / PLAN).read_bytes())
    except (OSError, ValueError):
        return None  # a damaged plan is named when the folder is opened
    return plan.get("fingerprint") if isinstance(plan, dict) else None


class Meta(NamedTuple):
    """Lengths and hashes of the documents of a block.

    Shapes: text_bytes [documents]; tokens [keys, documents]; hashes uint64 [documents, 2], or None
    without de-duplication.
    """

    text_bytes: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.uint32]
    hashes: npt.NDArray[np.uint64] | None


class WorkFolder:
    """The work folder as each process that takes part in a run opens it.

    exclusive: no other process may be at work (merging needs that). damaged: lines of journals that
    are not what was written, as `FILE, line N`; their blocks count as not done. Raises DataError.
    """

    def __init__(self, settings: PreprocessSettings, fingerprint: str, exclusive: bool):
        self.settings = settings
        self.path = work_path(settings)
        self._lock = self._open_lock()
        # The system releases the lock of a process that dies.
        mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        try:
            fcntl.flock(self._lock, mode | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"{self.path}: another process is at work on this output. Wait for it, or choose "
                "another --output-prefix."
            ) from error
        self._check_plan(fingerprint)

        self.shard = self.path / secrets.token_hex(6)
        self.records: dict[tuple[int, int], Record] = {}  # by (unit, part)
        self.unit_parts: dict[int, int] = {}  # number of blocks by unit
        self.damaged: list[str] = []
        for record in self._lines("*.journal"):
            self.add(record)
        for line in self._lines("*.units"):
            self.unit_parts[line["unit"]] = line["parts"]

    def _open_lock(self) -> IO[bytes]:
        """The lock file, open for as long as the object lives."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return open(self.path / "lock", "ab")
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be created ({error.strerror}). Choose another "
                "--output-prefix."
            ) from error

    def _lines(self, pattern: str) -> Iterator[Record]:
        """The records of all journals of a pattern; damaged lines are noted."""
        for path in sorted(self.path.glob(pattern)):
            records, damaged = read_journal(path)
            self.damaged += damaged
            yield from records

    def _check_plan(self, fingerprint: str) -> None:
        """Write the plan of a new folder, or compare that of an old one. Raises DataError."""
        plan = self.path / PLAN
        if not plan.exists():
            # By one rename, since several processes may begin together.
            temporary = self.path / f"plan.{secrets.token_hex(6)}"
            temporary.write_bytes(orjson.dumps({"fingerprint": fingerprint}))
            temporary.rename(plan)
            return
        try:
            recorded = orjson.loads(plan.read_bytes())["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{plan}: is not what was written ({error}). Delete {self.path} and run again."
            ) from None
        if recorded != fingerprint:
            raise DataError(
                f"{self.path}: holds the unfinished work of a run with other inputs, tokenizer or "
                "settings (an input counts as another one when its size or modification time "
                "changed). Repeat that run's command to finish it, or delete the folder to begin "
                "anew."
            )

    def add(self, record: Record) -> None:
        """Note a finished block; of two results of one block the first stays."""
        self.records.setdefault((record["unit"], record["part"]), record)

    def unfinished_blocks(self, units: list[Unit], block_bytes: int) -> Iterator[Block]:
        """Blocks without a result, in order. Notes each unit whose last block was handed out."""
        with open(f"{self.shard}.units", "xb") as notes:
            for unit in units:
                if self._is_finished(unit):
                    continue
                count = 0
                for block in blocks_of(unit, block_bytes, self.settings.largest_document):
                    count += 1
                    if (block.unit, block.part) not in self.records:
                        yield block
                # How many blocks a unit has is known when it was read to its end.
                self.unit_parts[unit.index] = count
                notes.write(journal_line({"unit": unit.index, "parts": count}))
                notes.flush()

    def _is_finished(self, unit: Unit) -> bool:
        """Whether every block of a unit has a result, as far as is known without reading it."""
        count = self.unit_parts.get(unit.index)
        if count is None:
            return False
        return all((unit.index, part) in self.records for part in range(count))

    def ordered(self) -> Iterator[Record]:
        """Records in document order."""
        for key in sorted(self.records):
            yield self.records[key]

    def read_meta(self, record: Record) -> Meta:
        """Lengths and hashes of a block's documents. Raises DataError for damaged bytes."""
        raw = b"".join(self._read(f"{record['shard']}.meta", record["meta"]))
        documents = record["documents"]
        keys = len(self.settings.json_keys)
        # As Encoder._finish writes them: 8 bytes a document, 4 bytes a key and document, hashes.
        tokens_offset = 8 * documents
        hashes_offset = tokens_offset + 4 * keys * documents
        text_bytes = np.frombuffer(raw, "<u8", documents)
        tokens = np.frombuffer(raw, "<u4", documents * keys, tokens_offset)
        hashes = None
        if self.settings.deduplicate:
            hashes = np.frombuffer(raw, "<u8", 2 * documents, hashes_offset).reshape(documents, 2)
        return Meta(text_bytes, tokens.reshape(keys, documents), hashes)

    def read_tokens(
        self, record: Record, key: int, counts: npt.NDArray[np.int64], dtype: np.dtype[Any]
    ) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
        """Tokens of a block's documents, which have `counts` each; some documents at a time.

        Yields (which of the block's documents, their tokens). Raises DataError for damaged bytes.
        """
        # A run ends with the document that completes a multiple of _RUN_TOKENS.
        completed = np.cumsum(counts) // _RUN_TOKENS
        cuts = np.flatnonzero(np.diff(completed)) + 1
        bounds = [0, *cuts.tolist(), len(counts)]
        runs = [slice(start, stop) for start, stop in pairwise(bounds)]
        sizes = [int(counts[run].sum()) * dtype.itemsize for run in runs]
        raw_runs = self._read(f"{record['shard']}.{key}.bin", record["bins"][key], sizes)
        for raw, run in zip(raw_runs, runs, strict=True):
            yield run, np.frombuffer(raw, dtype)

    def _read(
        self, name: str, extent: tuple[int, int, str], sizes: Sequence[int] | None = None
    ) -> Iterator[bytes]:
        """The bytes that a block appended to a file of a shard, cut into `sizes`.

        extent: (offset, size, xxh3). Raises DataError at the end where they are not what was
        written.
        """
        offset, size, expected = extent
        digest = xxhash.xxh3_64()
        with (self.path / name).open("rb") as file:
            file.seek(offset)
            for length in [size] if sizes is None else sizes:
                raw = file.read(length)
                digest.update(raw)
                yield raw
        if digest.hexdigest() != expected:
            raise DataError(
                f"{self.path / name}: bytes {offset} to {offset + size} are not what was written. "
                f"Delete {self.path} and run again."
            )

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def delete(self) -> None:
        """Delete the folder."""
        # The plan goes last: a half-deleted folder is still recognized as this run's.
        for path in self.path.iterdir():
            if path.name not in (PLAN, "lock"):
                path.unlink()
        shutil.rmtree(self.path)
