"""Where checkpoints lie: on the disk that all nodes share and, as snapshots, on each node's own."""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from megatron_completep.checkpoint.joint import Source
from megatron_completep.checkpoint.manifest import (
    Manifest,
    committed_steps,
    folder_name,
    not_counted,
    read_manifest,
    seal,
)
from megatron_completep.checkpoint.retention import Removal, prune
from megatron_completep.checkpoint.run_number import Run
from megatron_completep.checkpoint.save import check_space, clean_up
from megatron_completep.errors import CheckpointError
from megatron_completep.parallel.exchange import Exchange


@dataclass(frozen=True)
class Place:
    """A folder of checkpoints as this rank sees it, and its retention.

    Attributes:
        leader: the lowest of the ranks that see the same folder; it creates, commits and removes
            what lies there.
        bytes: what a checkpoint takes in it, of all ranks that see it.
        keep: number of checkpoints that are kept, the newest ones.
        keep_every: checkpoints of steps that are a multiple of it are kept as well.
    """

    folder: Path
    leader: int
    bytes: int
    keep: int
    keep_every: int | None = None

    def make_room(self) -> str | None:
        """Make the folder again where it was removed during the run, and return a warning then.

        Raises CheckpointError when there is no space for a checkpoint.
        """
        # Made again, as a save that fails would cost more than a folder that nobody wanted.
        missing = not self.folder.is_dir()
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
        check_space(self.folder, self.bytes)
        if missing:
            return f"warning: {self.folder} was removed under the run; it is made again"
        return None

    def retire(self, progress: Callable[[], None]) -> Removal:
        """Remove the checkpoints that retention does not keep."""
        return prune(self.folder, self.keep, self.keep_every, progress)


def shared_place(
    folder: Path, exchange: Exchange, own_bytes: int, keep: int, keep_every: int | None
) -> Place:
    """The run's own folder of checkpoints, which rank 0 makes.

    own_bytes: what this rank writes of a checkpoint. Collective. Raises CheckpointError when the
    folder cannot be made, or when a rank sees another one.
    """
    # A name that no other run and no earlier start can have left there.
    probe = folder / f".probe.{exchange.broadcast(secrets.token_hex(4))}"
    exchange.on_rank_0(lambda: _make(folder, probe, "Choose another training.output_dir."))

    def look() -> None:
        if not probe.exists():
            raise CheckpointError(
                f"{folder}: what rank 0 writes there is not seen. "
                "training.output_dir must be on a disk that all nodes share; "
                "for snapshots on each node's own disk there is checkpoint.local_dir."
            )

    # One rank that does not see the file is enough to refuse the folder on all.
    try:
        exchange.together(look)
    finally:
        if exchange.rank == 0:
            probe.unlink(missing_ok=True)
    return Place(folder, 0, sum(exchange.all_gather(own_bytes)), keep, keep_every)


def local_place(local_dir: Path, run: Run, exchange: Exchange, own_bytes: int, keep: int) -> Place:
    """The folder of this run's snapshots on this node.

    Which ranks share it is found out by trying, not from what a launcher says. The folder is named
    after the run and its number, and found by the number, as the run may have been renamed: what
    another run left in `local_dir` is never taken for this one's. Collective. Raises
    CheckpointError when the folder cannot be made.
    """
    new_folder = local_dir / f"{Path(run.folder).name}.{run.number}"
    folder = min(local_dir.glob(f"*.{run.number}"), default=new_folder)
    nonce = exchange.broadcast(secrets.token_hex(4))

    def probe_of(rank: int) -> Path:
        return folder / f".probe.{nonce}.{rank}"

    def find_leader() -> int:
        return next(rank for rank in range(exchange.size) if probe_of(rank).exists())

    # Every rank leaves a file, and the first one that a rank sees is its leader's.
    own_probe = probe_of(exchange.rank)
    remedy = "Choose another checkpoint.local_dir, or null."
    try:
        exchange.together(lambda: _make(folder, own_probe, remedy))
        leader = exchange.together(find_leader)
        reports = exchange.all_gather((leader, own_bytes))
    finally:
        with suppress(OSError):
            own_probe.unlink()
    # The disk of a node takes what all ranks that see this folder write.
    place_bytes = sum(size for rank_leader, size in reports if rank_leader == leader)
    return Place(folder, leader, place_bytes, keep)


def _make(folder: Path, probe: Path, remedy: str) -> None:
    """Make the folder and a file in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}. {remedy}") from None


def snapshots_of_others(place: Place, run: Run, exchange: Exchange) -> list[str]:
    """One line, the same on every rank, for each snapshot here that another run wrote.

    Collective.
    """

    def own_lines() -> list[str]:
        if exchange.rank != place.leader:
            return []
        lines = []
        for folder in committed_steps(place.folder).values():
            # A damaged one is reported when snapshots are looked for.
            with suppress(CheckpointError):
                writer = read_manifest(folder).run
                if writer is not None and not run.wrote(writer):
                    lines.append(f"{folder} is a snapshot of the run in {writer.folder}")
        return lines

    return _all_lines(exchange, own_lines)


def prepare(place: Place, exchange: Exchange, report: Callable[[str], None]) -> None:
    """Remove what interrupted saves left, and warn where the disk is too small.

    The user learns of it at the start, and not at the first save. Collective.
    """

    def own_lines() -> list[str]:
        if exchange.rank != place.leader:
            return []
        lines = clean_up(place.folder)
        for reason in not_counted(place.folder).values():
            lines.append(f"warning: {reason}")
        try:
            place.make_room()
        except CheckpointError as error:
            lines.append(f"warning: {error}")
        return lines

    for line in _all_lines(exchange, own_lines):
        report(line)


def _all_lines(exchange: Exchange, own_lines: Callable[[], list[str]]) -> list[str]:
    """The lines of all ranks, by rank."""
    gathered = []
    for lines in exchange.all_gather(exchange.together(own_lines)):
        gathered += lines
    return gathered


@dataclass(frozen=True)
class Snapshot:
    """A step of which snapshots were found.

    Attributes:
        missing: files that no rank can read.
        holders: file -> the ranks that can read it.
        known_by: the ranks that can read its manifest.
    """

    step: int
    missing: tuple[str, ...]
    holders: dict[str, list[int]]
    known_by: list[int]


class _SeenSnapshot(NamedTuple):
    """A snapshot as one rank sees it, exchanged as JSON."""

    step: int
    identity: str  # digest of the manifest, which every node has in full
    files: list[str]
    readable_files: list[str]


def find_snapshots(
    place: Place, exchange: Exchange, report: Callable[[str], None]
) -> list[Snapshot]:
    """The snapshots that all nodes hold together, newest first. Collective.

    One whose every file some rank can read is as good as a checkpoint.

    report: told of those whose manifest cannot be read.
    """

    def look() -> tuple[list[_SeenSnapshot], list[str]]:
        return _own_snapshots(place, exchange.rank == place.leader)

    # Two attempts to save the same step have different manifests, and their files do not mix.
    seen_by: dict[tuple[int, str], dict[int, _SeenSnapshot]] = defaultdict(dict)
    for rank, (snapshots, lines) in enumerate(exchange.all_gather(exchange.together(look))):
        for line in lines:
            report(line)
        for fields in snapshots:
            seen = _SeenSnapshot(*fields)
            seen_by[seen.step, seen.identity][rank] = seen

    found_snapshots = [_joined(seen_by_rank) for seen_by_rank in seen_by.values()]
    return sorted(found_snapshots, key=lambda snapshot: (-snapshot.step, len(snapshot.missing)))


def _own_snapshots(place: Place, reports: bool) -> tuple[list[_SeenSnapshot], list[str]]:
    """The snapshots that this rank sees, and a line for each whose manifest cannot be read.

    reports: whether this rank is the one of its node that returns lines.
    """
    snapshots = []
    lines = []
    for step, folder in committed_steps(place.folder).items():
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            # It counts as one that is not there.
            if reports:
                lines.append(f"a snapshot is not used: {error}")
            continue
        files = [stored.name for stored in manifest.files]
        readable_files = []
        for stored in manifest.files:
            if _size(folder / stored.name) == stored.size:
                readable_files.append(stored.name)
        identity = xxhash.xxh3_128_hexdigest(seal(manifest))
        snapshots.append(_SeenSnapshot(step, identity, files, readable_files))
    return snapshots, lines


def _joined(seen_by_rank: dict[int, _SeenSnapshot]) -> Snapshot:
    """What ranks hold together of one snapshot."""
    any_seen = next(iter(seen_by_rank.values()))
    # A file counts where it has its full size; its bytes are checked when they are read.
    holders: dict[str, list[int]] = {}
    for file in any_seen.files:
        holders[file] = [rank for rank, seen in seen_by_rank.items() if file in seen.readable_files]
    missing = tuple(file for file, ranks in holders.items() if not ranks)
    return Snapshot(any_seen.step, missing, holders, sorted(seen_by_rank))


def _size(path: Path) -> int | None:
    try:
        return path.lstat().st_size
    except OSError:
        return None


def snapshot_source(place: Place, snapshot: Snapshot, exchange: Exchange) -> Source:
    """A snapshot for reading, with the manifest from a rank that has it. Collective."""
    folder = place.folder / folder_name(snapshot.step)
    # A node that replaced another one has no manifest; any rank that has one will do.
    sender = snapshot.known_by[0]

    def own_manifest() -> dict[str, Any] | None:
        return _manifest_json(folder) if exchange.rank == sender else None

    manifests = exchange.all_gather(exchange.together(own_manifest))
    return Source(folder, Manifest.model_validate(manifests[sender]), snapshot.holders)


def shared_source(place: Place, step: int, exchange: Exchange) -> Source:
    """A checkpoint that every rank can read, with the manifest that rank 0 reads. Collective."""
    folder = place.folder / folder_name(step)
    manifest = Manifest.model_validate(exchange.on_rank_0(lambda: _manifest_json(folder)))
    all_ranks = list(range(exchange.size))
    return Source(folder, manifest, {stored.name: all_ranks for stored in manifest.files})


def _manifest_json(folder: Path) -> dict[str, Any]:
    return read_manifest(folder).model_dump(mode="json")
