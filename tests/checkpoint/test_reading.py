"""A job reads each byte of a checkpoint once,
whatever the layouts, and holds few of them at a time.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from megatron_completep.checkpoint import files
from megatron_completep.checkpoint.files import StoredBox
from megatron_completep.checkpoint.joint import (
    LIMIT,
    RUN,
    JointReader,
    Read,
    as_ranges,
    choose_readers,
    in_rounds,
)
from megatron_completep.checkpoint.parts import Part
from megatron_completep.checkpoint.places import shared_place, shared_source
from megatron_completep.errors import CheckpointError
from megatron_completep.optim.boxes import Box, OwnedBox
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.exchange import Exchange
from tests.checkpoint.layouts import LAYOUTS, TP2_PP2_DP2, build, load, run, save
from tests.checkpoint.stored_files import SMALL_BLOCKS, use_small_blocks
from tests.support.checkpoints import TinyRun, checkpointed_config

TP2_PP2 = {"world": 4, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}


def save_in_small_blocks(rank: int, folder: str, model: str, layout: dict) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use_small_blocks(patch)
        save(rank, folder, model, layout)


def load_counting(
    rank: int, folder: str, model: str, layout: dict
) -> tuple[list[str], list[tuple[str, int]]]:
    """What did not arrive, and every block read by this rank (counted below all planning)."""
    read: list[tuple[str, int]] = []
    original = files.CheckedFile.read_block

    def counting(self, block, out):
        read.append((self.stored.name, block))
        return original(self, block, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.CheckedFile, "read_block", counting)
        wrong = load(rank, folder, model, layout)
    return wrong, read


@pytest.mark.parametrize(
    ("model", "saved", "loaded"),
    [
        # row-parallel matrices are cut anew, norms are every tensor rank's
        ("tied_gpt", TP2_PP2, "tp4"),
        ("tied_gpt", LAYOUTS["one"], "tp2_dp2"),
        ("llama", LAYOUTS["tp4"], "one"),
        pytest.param("llama", LAYOUTS["dp4"], "dp4_shard2", marks=pytest.mark.slow),
        pytest.param("tied_gpt", TP2_PP2_DP2, "tp4", marks=pytest.mark.slow),
        pytest.param("llama", TP2_PP2_DP2, "virtual", marks=pytest.mark.slow),
        pytest.param("tied_gpt", LAYOUTS["tp2_dp2"], "pp4_uneven", marks=pytest.mark.slow),
    ],
)
def test_each_block_is_read_by_one_rank_of_the_job(pool, tmp_path, model, saved, loaded):
    run(pool, save_in_small_blocks, tmp_path, model, saved)
    results = run(pool, load_counting, tmp_path, model, LAYOUTS[loaded])
    assert not [wrong for result in results for wrong in result[0]]
    sizes = {
        path.name: path.stat().st_size for path in tmp_path.glob("checkpoints/step_*/*.safetensors")
    }
    every = [
        (name, block) for name, size in sizes.items() for block in range(-(-size // SMALL_BLOCKS))
    ]
    assert Counter(block for result in results for block in result[1]) == Counter(every)
    if len(results) > 1:  # and the work is shared
        assert max(len(result[1]) for result in results) < 0.7 * len(every)


def read_one(rank: int, folder: str, model: str, layout: dict, damage: bool) -> int:
    """Bytes that this rank read when only rank 0 can reach the files."""
    optimizer, checkpointer = build(rank, folder, model, layout)
    exchange = checkpointer._exchange
    source = shared_source(checkpointer._shared, 6, exchange)
    # As if on rank 0's own disk.
    source = type(source)(source.folder, source.manifest, {name: [0] for name in source.holders})
    reader = JointReader(exchange, source)
    if damage and rank == 0:
        path = source.folder / source.manifest.files[0].name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    reader.fill(
        [
            (box, name, flat)
            for name, flat in optimizer.states.items()
            for box in checkpointer._shard.owned[name]
        ]
    )
    return reader.bytes_read


def test_what_only_one_rank_can_reach_is_sent_to_the_others(pool, tmp_path):
    run(pool, save_in_small_blocks, tmp_path, "tied_gpt", LAYOUTS["one"])
    read = run(pool, read_one, tmp_path, "tied_gpt", {"world": 2, "tensor_parallel_size": 2}, False)
    assert read[0] == sum(
        path.stat().st_size for path in tmp_path.glob("checkpoints/step_*/*.safetensors")
    )
    assert read[1] == 0


def test_a_block_damaged_where_one_rank_reads_it_fails_the_load_on_all(pool, tmp_path):
    run(pool, save_in_small_blocks, tmp_path, "tied_gpt", LAYOUTS["one"])
    with pytest.raises(
        AssertionError,
        match=(
            r"(?s)rank 0:.*damaged between bytes.*rank 1:.*CheckpointError.*rank 0: "
            r".*damaged between"
        ),
    ):
        run(pool, read_one, tmp_path, "tied_gpt", {"world": 2, "tensor_parallel_size": 2}, True)


# The plan.


def test_readers_hold_the_file_need_the_block_and_share_the_work():
    generator = random.Random(3)
    names = [f"file_{i}" for i in range(6)]
    holders = {name: sorted(generator.sample(range(8), 3)) for name in names}
    needs = {
        (name, block): sorted(generator.sample(range(8), generator.randint(1, 4)))
        for name in names
        for block in range(200)
    }
    reads = choose_readers(needs, holders, {("file_0", 0): 7})
    assert {(read.file, read.block) for read in reads} == needs.keys() and len(reads) == len(needs)
    assert reads[0].reader == 7  # it has the block already
    for read in reads[1:]:
        able = set(holders[read.file])
        assert read.reader in able
        assert read.reader in read.needed_by or not able & set(read.needed_by)
    load = Counter(
        read.reader
        for read in choose_readers(
            {("a", b): [0, 1, 2, 3] for b in range(400)}, {"a": [0, 1, 2, 3]}, {}
        )
    )
    assert max(load.values()) - min(load.values()) <= 2 * RUN


def test_no_rank_holds_more_than_the_limit_in_a_round_and_nothing_is_lost():
    generator = random.Random(4)
    reads = [
        Read("f", block, generator.randrange(8), tuple(generator.sample(range(8), 3)))
        for block in range(500)
    ]
    rounds = in_rounds(reads)
    assert sorted((read for part in rounds for read in part), key=lambda read: read.block) == reads
    for part in rounds:
        held = Counter(rank for read in part for rank in {read.reader, *read.needed_by})
        assert max(held.values()) <= LIMIT
    for rank in range(8):  # files are read from the front
        blocks = [read.block for part in rounds for read in part if read.reader == rank]
        assert blocks == sorted(blocks)


def test_runs_of_blocks_are_described_by_their_ends():
    assert as_ranges({("a", 0): 0, ("a", 1): 0, ("a", 3): 0, ("b", 4): 0}) == [
        ("a", 0, 1),
        ("a", 3, 3),
        ("b", 4, 4),
    ]


@pytest.mark.parametrize("seed", range(40))
def test_any_cut_of_a_file_puts_every_element_where_it_belongs(seed):
    """A stored box, a wanted box that covers part of it,
    blocks that cut rows anywhere: against plain slicing.
    """
    generator = random.Random(seed)
    rows, columns = generator.randint(1, 9), generator.randint(1, 40)
    whole = torch.arange(100 * 100, dtype=torch.float32).view(100, 100)
    top, left = generator.randint(0, 50), generator.randint(0, 50)
    values = whole[top : top + rows, left : left + columns].contiguous()
    stored = StoredBox(
        "f", "master", "w", Box((top, left), (rows, columns)), "F32", 128, 128 + values.nbytes
    )
    a, b = sorted(generator.sample(range(rows + 1), 2))
    c, d = sorted(generator.sample(range(columns + 1), 2)) if seed % 2 else (0, columns)
    wanted = Box((top + a, left + c), (b - a, d - c))
    flat, stride = torch.zeros(1000), d - c + seed % 3
    part = Part(stored, wanted, OwnedBox("w", wanted, 7, (stride, 1)), flat)
    data = torch.cat([torch.zeros(128, dtype=torch.uint8), values.view(torch.uint8).flatten()])
    cut = 4 * generator.randint(1, 60)
    for begin in range(0, len(data), cut):
        part.place(begin, data[begin : begin + cut])
    expected = torch.zeros(1000)
    for row in range(b - a):
        expected[7 + row * stride : 7 + row * stride + d - c] = whole[
            top + a + row, left + c : left + d
        ]
    assert torch.equal(flat, expected)


def test_a_run_goes_straight_from_the_disk_to_its_place(tmp_path, monkeypatch):
    """Most of a large file is never copied in memory; the plain way gives the same bits."""
    use_small_blocks(monkeypatch)
    tiny = TinyRun(checkpointed_config(tmp_path, model={"vocab_size": 600}))
    tiny.save()
    direct: list[bool] = []
    original = Part.direct

    def watched(self, begin, size):
        found = original(self, begin, size)
        direct.append(found is not None and size == SMALL_BLOCKS)
        return found

    monkeypatch.setattr(Part, "direct", watched)
    again = TinyRun(tiny.config)
    assert again.resume() and again.bits() == tiny.bits() and any(direct)
    monkeypatch.setattr(Part, "direct", lambda self, begin, size: None)
    again = TinyRun(tiny.config)
    assert again.resume() and again.bits() == tiny.bits()


def test_a_folder_that_not_all_ranks_see_is_refused(tmp_path, monkeypatch):
    exchange = Exchange(ParallelContext.single("cpu"), 1.0)
    monkeypatch.setattr(exchange, "on_rank_0", lambda action: None)  # rank 0 writes somewhere else
    with pytest.raises(CheckpointError, match="what rank 0 writes there is not seen"):
        shared_place(tmp_path / "checkpoints", exchange, 1, 1, None)
