"""Where checkpoints lie: on the disk that all nodes share, and, as snapshots, on each node's own."""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_completep.checkpoint.joint import Source
from megatron_completep.checkpoint.manifest import (
    Manifest,
    committed_steps,
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

    `leader`: the lowest of the ranks that see the same folder; it creates, commits and removes what lies there. `bytes`: what a
    checkpoint takes in it.
    """

    folder: Path
    leader: int
    bytes: int
    keep: int
    keep_every: int | None = None

    def make_room(self) -> str | None:
        """Make the folder again where it was removed under the run, which is returned in words. CheckpointError: no space."""
        missing = not self.folder.is_dir()
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
        check_space(self.folder, self.bytes)
        return (
            f"warning: {self.folder} was removed under the run; it is made again"
            if missing
            else None
        )

    def retire(self, progress: Callable[[], None]) -> Removal:
        return prune(self.folder, self.keep, self.keep_every, progress)


def shared_place(
    folder: Path, exchange: Exchange, own_bytes: int, keep: int, keep_every: int | None
) -> Place:
    """The run's own folder, which rank 0 makes. Raises CheckpointError when it cannot, or when a rank sees another one."""
    probe = folder / f".probe.{exchange.broadcast(secrets.token_hex(4))}"
    exchange.on_first(lambda: _make(folder, probe, "Choose another training.output_dir."))

    def look() -> None:
        if not probe.exists():
            raise CheckpointError(
                f"{folder}: what rank 0 writes there is not seen. training.output_dir must be on a disk that all nodes share; "
                "for snapshots on each node's own disk there is checkpoint.local_dir."
            )

    try:
        exchange.together(look)
    finally:
        if exchange.rank == 0:
            probe.unlink(missing_ok=True)
    return Place(folder, 0, sum(exchange.all_gather(own_bytes)), keep, keep_every)


def local_place(local_dir: Path, run: Run, exchange: Exchange, own_bytes: int, keep: int) -> Place:
    """The folder of this run's snapshots on this node. Which ranks share it is found out by trying, not from what a launcher says.

    It is named after the run and its number, and found by the number, as the run may have been renamed since: what another run left
    there is never taken for this one's.
    """
    folder = min(
        local_dir.glob(f"*.{run.number}"),
        default=local_dir / f"{Path(run.folder).name}.{run.number}",
    )
    nonce = exchange.broadcast(secrets.token_hex(4))
    own = folder / f".probe.{nonce}.{exchange.rank}"
    try:
        exchange.together(
            lambda: _make(folder, own, "Choose another checkpoint.local_dir, or null.")
        )
        leader = exchange.together(
            lambda: next(
                r for r in range(exchange.size) if (folder / f".probe.{nonce}.{r}").exists()
            )
        )
        parts = exchange.all_gather((leader, own_bytes))
    finally:
        with suppress(OSError):
            own.unlink()
    return Place(folder, leader, sum(size for of, size in parts if of == leader), keep)


def _make(folder: Path, probe: Path, remedy: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}. {remedy}") from None


def snapshots_of_others(place: Place, run: Run, exchange: Exchange) -> list[str]:
    """What lies in this run's folder of snapshots and another run wrote, in words, the same on every rank."""

    def own() -> list[str]:
        found = []
        for folder in (
            committed_steps(place.folder).values() if exchange.rank == place.leader else ()
        ):
            with suppress(CheckpointError):  # a damaged one is said when snapshots are looked for
                writer = read_manifest(folder).run
                if writer is not None and not run.wrote(writer):
                    found.append(f"{folder} is a snapshot of the run in {writer.folder}")
        return found

    return [line for lines in exchange.all_gather(exchange.together(own)) for line in lines]


def prepare(place: Place, exchange: Exchange, report: Callable[[str], None]) -> None:
    """Remove what interrupted saves left, and warn at the start, not at the first save, that the disk is too small."""

    def own() -> list[str]:
        if exchange.rank != place.leader:
            return []
        said = clean_up(place.folder) + [
            f"warning: {text}" for text in not_counted(place.folder).values()
        ]
        try:
            place.make_room()
        except CheckpointError as error:
            said.append(f"warning: {error}")
        return said

    for lines in exchange.all_gather(exchange.together(own)):
        for line in lines:
            report(line)


@dataclass(frozen=True)
class Snapshot:
    """A step of which snapshots were found: who holds which file of it, and who knows its manifest."""

    step: int
    missing: tuple[str, ...]  # files that no rank can read
    holders: dict[str, list[int]]
    known_by: list[int]


def find_snapshots(
    place: Place, exchange: Exchange, report: Callable[[str], None]
) -> list[Snapshot]:
    """What all nodes hold together, newest first; one whose every file some rank can read is as good as a checkpoint.

    report: told of those that cannot be read.
    """

    def own() -> tuple[list[list[Any]], list[str]]:
        found, said = [], []
        for step, folder in committed_steps(place.folder).items():
            try:
                manifest = read_manifest(folder)
            except CheckpointError as error:  # as if it were not there
                if exchange.rank == place.leader:
                    said.append(f"a snapshot is not used: {error}")
                continue
            files = [
                stored.name
                for stored in manifest.files
                if _size(folder / stored.name) == stored.size
            ]
            names = [stored.name for stored in manifest.files]
            found.append([step, xxhash.xxh3_128_hexdigest(seal(manifest)), names, files])
        return found, said

    by_identity: dict[tuple[int, str], dict[int, tuple[list[str], list[str]]]] = defaultdict(dict)
    for rank, (found, said) in enumerate(exchange.all_gather(exchange.together(own))):
        for line in said:
            report(line)
        for step, identity, names, files in found:
            by_identity[step, identity][rank] = names, files
    snapshots = []
    for (step, _), found in by_identity.items():
        names = next(iter(found.values()))[0]
        holders = {
            name: [rank for rank, (_, files) in found.items() if name in files] for name in names
        }
        missing = tuple(name for name, ranks in holders.items() if not ranks)
        snapshots.append(Snapshot(step, missing, holders, sorted(found)))
    return sorted(snapshots, key=lambda snapshot: (-snapshot.step, len(snapshot.missing)))


def _size(path: Path) -> int | None:
    try:
        return path.lstat().st_size
    except OSError:
        return None


def snapshot_source(place: Place, snapshot: Snapshot, exchange: Exchange) -> Source:
    """The manifest, from a rank that has it, and this rank's folder."""
    folder = place.folder / f"step_{snapshot.step:08d}"
    teller = snapshot.known_by[0]
    told = exchange.all_gather(
        exchange.together(lambda: _manifest_json(folder) if exchange.rank == teller else None)
    )
    return Source(folder, Manifest.model_validate(told[teller]), snapshot.holders)


def shared_source(place: Place, step: int, exchange: Exchange) -> Source:
    """A checkpoint that every rank can read. Rank 0 reads its manifest."""
    folder = place.folder / f"step_{step:08d}"
    manifest = Manifest.model_validate(exchange.on_first(lambda: _manifest_json(folder)))
    everybody = list(range(exchange.size))
    return Source(folder, manifest, {stored.name: everybody for stored in manifest.files})


def _manifest_json(folder: Path) -> dict[str, Any]:
    return read_manifest(folder).model_dump(mode="json")
