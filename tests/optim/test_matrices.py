"""Every element of every matrix travels once, to one owner, in batches of bounded size."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_completep.optim.layout import entry_of, lay_out
from megatron_completep.optim.matrices import Division, Holding, Matrix, divide
from megatron_completep.optim.matrix_exchange import MatrixExchange
from megatron_completep.parallel.axis import Axis, Share
from megatron_completep.parallel.parameter import Spec
from megatron_completep.roles import Role

LIMIT = 3000


def specs_on(tensor_ranks: int) -> dict[str, Spec]:
    """A fused matrix split by rows, one split by columns, one on every rank, and experts."""
    share = Share("tensor", 0, tensor_ranks)
    role = Role.HIDDEN_WEIGHT
    return {
        "qkv": Spec(
            role,
            (64, 20),
            parts={"q": 32, "k": 16, "v": 16},
            heads={"q": 4, "k": 2, "v": 2},
            split={0: share},
        ),
        "down": Spec(role, (20, 64), split={1: share}),
        "whole": Spec(role, (33, 7)),
        "experts": Spec(role, (3, 40, 20), parts={"gate": 20, "up": 20}, part_dim=1),
    }


def division(
    shards: int, tensor_ranks: int, per_head: bool = False, limit: int = LIMIT
) -> Division:
    specs = specs_on(tensor_ranks)
    layout = lay_out([entry_of(n, s) for n, s in specs.items()], {"gradient": shards}, 700)
    return divide(layout, specs, specs, shards, tensor_ranks, per_head, limit)


@pytest.mark.parametrize(("shards", "tensor_ranks"), [(1, 1), (3, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("per_head", [False, True])
def test_every_element_is_sent_once_and_comes_back_to_all_that_hold_it(
    shards: int, tensor_ranks: int, per_head: bool
) -> None:
    plan = division(shards, tensor_ranks, per_head)
    names = Counter((m.name, m.part) for m in plan.matrices)
    heads = (4, 2, 2) if per_head else (1, 1, 1)
    assert names == {
        **{("qkv", part): count for part, count in zip("qkv", heads, strict=True)},
        ("down", ""): 1,
        ("whole", ""): 1,
        ("experts", "gate"): 3,
        ("experts", "up"): 3,
    }
    for number, matrix in enumerate(plan.matrices):
        sent = torch.zeros(matrix.shape, dtype=torch.int64)
        held = torch.zeros(matrix.shape, dtype=torch.int64)
        for rank in range(plan.ranks):
            for holding in plan.holdings[rank].get(number, ()):
                (row, column), (rows, columns) = holding.offsets, holding.sizes
                held[row : row + rows, column : column + columns] += 1
                sent[row : row + rows, column : column + columns] += holding.sends
        copies = tensor_ranks if matrix.name in ("whole", "experts") else 1
        assert (sent == 1).all() and (held == copies).all(), matrix
    assert sorted(number for batch in plan.batches for number in batch) == list(
        range(len(plan.matrices))
    )


def test_owners_have_about_equal_work_and_a_batch_is_bounded_for_all() -> None:
    plan = division(4, 2)
    costs = plan.costs()
    assert max(costs) == max(matrix.cost for matrix in plan.matrices)
    assert sum(costs) == sum(matrix.cost for matrix in plan.matrices)
    small = division(2, 1, limit=1300)
    assert len(small.batches) > len(division(2, 1).batches)
    for batch in small.batches:
        for rank in range(small.ranks):
            received = sum(small.matrices[n].box.numel for n in batch if small.owners[n] == rank)
            sent = 0
            for number in batch:
                held = small.holdings[rank].get(number, ())
                sent += sum(holding.numel for holding in held if holding.sends)
            assert max(received, sent) <= 1300


def test_an_exchange_holds_a_few_batches_at_once_and_not_all_matrices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Measured on storages: all buffers that are alive when another one is made."""
    plan = division(1, 1, limit=1300)
    exchange = MatrixExchange(plan, Axis("stage"), [], torch.float64, torch.device("cpu"))
    buffers: list[tuple[StorageWeakRef, int]] = []
    alive = []
    original = torch.empty

    def watched(*size: int, **options: Any) -> torch.Tensor:
        tensor = original(*size, **options)
        buffers.append((StorageWeakRef(tensor.untyped_storage()), tensor.numel()))
        alive.append(sum(elements for ref, elements in buffers if not ref.expired()))
        return tensor

    monkeypatch.setattr(torch, "empty", watched)
    flat = torch.zeros(8192, dtype=torch.float64)

    def pack(_: Matrix, holding: Holding, out: torch.Tensor) -> None:
        out.copy_(torch.as_strided(flat, holding.sizes, holding.strides, holding.start))

    travelled = 0
    for _, holding, _ in exchange.factors(pack):
        travelled += holding.numel
    assert travelled == sum(matrix.box.numel for matrix in plan.matrices) > 5000
    # The stacks of a batch, the next on its way, the factors of two on theirs, and one in use.
    assert len(plan.batches) > 4 and max(alive) <= 5 * 1300
