"""The work folder `{output_prefix}.preprocess`: what is finished so far. Deleted when the token files are in place.

plan.json: which run it belongs to. *.journal, *.meta, *.bin: shards, see encode.py. *.units: units of which all blocks were
handed out, with their number (lines of journal.py, too). Every process that writes here has a name of its own, so nothing is
ever overwritten.
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
from megatron_completep.preprocess.encode import Record
from megatron_completep.preprocess.journal import journal_line, read_journal
from megatron_completep.preprocess.settings import PreprocessSettings
from megatron_completep.preprocess.sources import Block, Unit, blocks_of

_RUN_TOKENS = 1 << 22  # tokens read at a time


class Meta(NamedTuple):
    """Per document of a block: text_bytes [documents]; tokens [keys, documents]; hashes uint64 [documents, 2] or None."""

    text_bytes: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.uint32]
    hashes: npt.NDArray[np.uint64] | None


class WorkFolder:
    """Opened by each process that takes part in a run. `exclusive`: no other one may be at work (merging needs that).

    damaged: lines of journals that are not what was written, as `FILE, line N`. Their blocks count as not done.
    """

    def __init__(self, settings: PreprocessSettings, fingerprint: str, exclusive: bool):
        self.settings = settings
        self.path = Path(settings.output_prefix + ".preprocess")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[bytes] = open(self.path / "lock", "ab")  # noqa: SIM115 (held while the object lives)
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be created ({error.strerror}). Choose another --output-prefix."
            ) from error
        try:
            fcntl.flock(self._lock, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"{self.path}: another process is at work on this output. Wait for it, or choose another --output-prefix."
            ) from error
        self._check_plan(fingerprint)
        self.shard = self.path / secrets.token_hex(6)
        self.records: dict[tuple[int, int], Record] = {}
        self.unit_parts: dict[int, int] = {}
        self.damaged: list[str] = []
        for record in self._lines("*.journal"):
            self.add(record)
        self.unit_parts.update((line["unit"], line["parts"]) for line in self._lines("*.units"))

    def _lines(self, pattern: str) -> Iterator[Record]:
        for name in sorted(self.path.glob(pattern)):
            records, damaged = read_journal(name)
            self.damaged += damaged
            yield from records

    def _check_plan(self, fingerprint: str) -> None:
        plan = self.path / "plan.json"
        if not plan.exists():
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
                f"{self.path}: holds the unfinished work of a run with other inputs, tokenizer or settings (an input counts as "
                "another one when its size or modification time changed). Repeat that run's command to finish it, "
                "or delete the folder to begin anew."
            )

    def add(self, record: Record) -> None:
        self.records.setdefault((record["unit"], record["part"]), record)

    def unfinished_blocks(self, units: list[Unit], block_bytes: int) -> Iterator[Block]:
        """Blocks without a result, in order. Notes each unit whose last block was handed out."""
        with open(f"{self.shard}.units", "xb") as notes:
            for unit in units:
                if self._is_finished(unit):
                    continue
                parts = 0
                for block in blocks_of(unit, block_bytes, self.settings.largest_document):
                    parts += 1
                    if (block.unit, block.part) not in self.records:
                        yield block
                self.unit_parts[unit.index] = parts
                notes.write(journal_line({"unit": unit.index, "parts": parts}))
                notes.flush()

    def _is_finished(self, unit: Unit) -> bool:
        parts = self.unit_parts.get(unit.index)
        return parts is not None and all(
            (unit.index, part) in self.records for part in range(parts)
        )

    def ordered(self) -> Iterator[Record]:
        """Records in document order."""
        for key in sorted(self.records):
            yield self.records[key]

    def read_meta(self, record: Record) -> Meta:
        raw = b"".join(self._read(f"{record['shard']}.meta", record["meta"]))
        n, keys = record["documents"], len(self.settings.json_keys)
        sizes = np.frombuffer(raw, "<u8", n)
        tokens = np.frombuffer(raw, "<u4", n * keys, 8 * n).reshape(keys, n)
        hashes = (
            np.frombuffer(raw, "<u8", 2 * n, (8 + 4 * keys) * n).reshape(n, 2)
            if self.settings.deduplicate
            else None
        )
        return Meta(sizes, tokens, hashes)

    def read_tokens(
        self, record: Record, key: int, counts: npt.NDArray[np.int64], dtype: np.dtype[Any]
    ) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
        """Tokens of a block's documents, which have `counts` each: some documents at a time, and which of the block's they are."""
        cuts = [
            0,
            *(np.flatnonzero(np.diff(np.cumsum(counts) // _RUN_TOKENS)) + 1).tolist(),
            len(counts),
        ]
        runs = [slice(first, last) for first, last in pairwise(cuts)]
        sizes = [int(counts[run].sum()) * dtype.itemsize for run in runs]
        for raw, run in zip(
            self._read(f"{record['shard']}.{key}.bin", record["bins"][key], sizes),
            runs,
            strict=True,
        ):
            yield run, np.frombuffer(raw, dtype)

    def _read(
        self, name: str, piece: tuple[int, int, str], sizes: Sequence[int] | None = None
    ) -> Iterator[bytes]:
        """A piece of a shard, cut into `sizes`; raises DataError at its end when it is not what was written."""
        offset, size, expected = piece
        digest = xxhash.xxh3_64()
        with (self.path / name).open("rb") as file:
            file.seek(offset)
            for length in [size] if sizes is None else sizes:
                raw = file.read(length)
                digest.update(raw)
                yield raw
        if digest.hexdigest() != expected:
            raise DataError(
                f"{self.path / name}: bytes {offset} to {offset + size} are not what was written. Delete {self.path} and run again."
            )

    def close(self) -> None:
        self._lock.close()

    def delete(self) -> None:
        """The plan goes last: a half-deleted folder is still recognized as this run's."""
        for name in self.path.iterdir():
            if name.name not in ("plan.json", "lock"):
                name.unlink()
        shutil.rmtree(self.path)
