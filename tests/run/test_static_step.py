"""A step over inputs that lie still: equal to the bit, and the same launches whatever the step.

A graph is captured on a GPU only. That nothing of one step stays in it is seen here: the operations
of two steps, and every number that is handed to them, are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_completep.data.loader import Batch
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.assemble import Assembly, assemble
from megatron_completep.run.static_step import LAUNCHED_STEPS, CudaGraph, StaticStep
from megatron_completep.run.step import StepFigures
from tests.support.configs import GPT2, small_config

MODELS: dict[str, dict[str, Any]] = {
    "rmsnorm, swiglu, rope": {},
    "layernorm, gelu, learned, biases, tied": {**GPT2, "tied_embeddings": True},
}
STEPS = 4
# What would read the device from the host, or bring numbers of the host into a step.
HOST = ("_local_scalar_dense", "nonzero", "lift_fresh", "item")


def assembled(cuda_graph: bool, model: dict[str, Any], **training: Any) -> Assembly:
    """Two micro-batches a step, dropout, and a learning rate that is another at every step."""
    config = small_config(
        model={"dropout": 0.1, **model},
        optimizer={"schedule": "cosine", "warmup_fraction": 0.2},
        data={"reset_at_document_ends": True},
        training={"cuda_graph": cuda_graph, "global_batch_size": 4, "z_loss": 1e-3, **training},
    )
    return assemble(config, ParallelContext.single())


def batches_of(step: int, assembly: Assembly) -> list[Batch]:
    """Micro-batches whose masks and document ends differ from step to step."""
    model = assembly.step.config.model
    generator = torch.Generator().manual_seed(step)
    shape = (2, model.seq_length)
    batches = []
    for _ in range(2):
        tokens = torch.randint(model.vocab_size, shape, generator=generator)
        labels = torch.randint(model.vocab_size, shape, generator=generator)
        mask = (torch.rand(shape, generator=generator) > 0.1 * step).float()
        documents = (torch.arange(model.seq_length) >= step).int().expand(shape)
        positions = torch.arange(model.seq_length).expand(shape)
        batches.append(Batch(tokens, labels, mask, positions, documents, torch.arange(2)))
    return batches


def trained(assembly: Assembly) -> list[StepFigures]:
    figures = []
    for step in range(1, STEPS + 1):
        pending = assembly.step.run(batches_of(step, assembly), step, stop=step == STEPS)
        figures.append(pending.read())
    return figures


def without_times(figures: StepFigures) -> dict[str, Any]:
    return {name: value for name, value in vars(figures).items() if name != "own_seconds"}


class Recording(TorchDispatchMode):
    """The operators that are called, with every argument that is no value of a tensor.

    A single number that is no input and no result of a call was handed over by the host, which a
    capture would keep: its value is recorded.
    """

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self.calls: list[tuple[str, ...]] = []
        # Kept, so that no later number takes the place in memory of one of them.
        self._known = list(inputs)
        self._places = {place(tensor) for tensor in inputs}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        words = [str(function)]
        for leaf in tree_leaves((args, kwargs)):
            if not isinstance(leaf, torch.Tensor):
                words.append(repr(leaf))
                continue
            words.append(f"{leaf.dtype} {list(leaf.shape)}")
            if leaf.dim() == 0 and place(leaf) not in self._places:
                words.append(f"= {leaf.item()}")
        self.calls.append(tuple(words))
        result = function(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._known.append(leaf)
                self._places.add(place(leaf))
        return result


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def recorded(assembly: Assembly, step: int) -> list[tuple[str, ...]]:
    """The calls of the step itself, without those that bring its inputs to their place."""
    training_step = assembly.step
    inputs = training_step._inputs(batches_of(step, assembly), step, stop=step == STEPS)
    numbers = [inputs.tokens, inputs.stop]
    if isinstance(inputs.learning_rate, torch.Tensor):
        numbers.append(inputs.learning_rate)
    with Recording(numbers) as recording:
        training_step._compute(inputs)
    return recording.calls


@pytest.mark.parametrize("model", MODELS)
def test_a_static_step_is_equal_to_the_bit(model: str) -> None:
    static = assembled(True, MODELS[model])
    launched = assembled(False, MODELS[model])
    for found, expected in zip(trained(static), trained(launched), strict=True):
        assert without_times(found) == without_times(expected)
    for name, state in launched.optimizer.states.items():
        assert torch.equal(static.optimizer.states[name], state), name


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("model", MODELS)
def test_two_static_steps_make_the_same_calls_and_none_asks_the_host(
    model: str, recompute: str
) -> None:
    assembly = assembled(True, MODELS[model], recompute=recompute)
    recorded(assembly, 1)  # the first step makes the tables of segments
    second = recorded(assembly, 2)
    assert second == recorded(assembly, STEPS)
    assert [call for call in second if any(word in call[0] for word in HOST)] == []


def test_a_step_that_is_launched_holds_the_numbers_of_its_step() -> None:
    """The control: what is recorded shows a learning rate that would be captured."""
    assembly = assembled(False, {})
    recorded(assembly, 1)
    assert recorded(assembly, 2) != recorded(assembly, STEPS)


def test_a_step_asks_the_host_where_alibi_copies_its_slopes() -> None:
    """The control of the other half, and why the setting is refused beside ALiBi."""
    assembly = assembled(False, {"position": "alibi"})
    recorded(assembly, 1)
    assert any("lift_fresh" in call[0] for call in recorded(assembly, 2))


class Replays:
    """In the place of a CUDA graph: what is captured runs when it is replayed, and only then."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.captured: Callable[[], torch.Tensor] | None = None

    def launch(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.calls.append("launch")
        return compute()

    def capture(self, compute: Callable[[], torch.Tensor]) -> None:
        self.calls.append("capture")
        self.captured = compute

    def replay(self) -> torch.Tensor:
        self.calls.append("replay")
        assert self.captured is not None
        return self.captured()


def test_a_step_is_captured_once_after_some_that_are_launched_and_then_replayed() -> None:
    assembly = assembled(True, {})
    replays = Replays()
    assembly.step._static = StaticStep(assembly.step._compute, cast(CudaGraph, replays))
    figures = trained(assembly) + trained(assembly)
    expected = assembled(False, {})
    for found, launched in zip(figures, trained(expected) + trained(expected), strict=True):
        assert without_times(found) == without_times(launched)
    assert replays.calls == ["launch"] * LAUNCHED_STEPS + ["capture"] + ["replay"] * 5


def test_inputs_of_another_shape_are_refused() -> None:
    assembly = assembled(True, {})
    batches = batches_of(1, assembly)
    assembly.step.run(batches, 1)
    shorter = [Batch(*(tensor[:1] for tensor in vars(batch).values())) for batch in batches]
    with pytest.raises(AssertionError):
        assembly.step.run(shorter, 2)


def test_the_inputs_stay_where_they_are() -> None:
    assembly = assembled(True, {})
    assembly.step.run(batches_of(1, assembly), 1)
    static = assembly.step._static
    assert static is not None and static._inputs is not None
    places = [tensor.data_ptr() for tensor in static._inputs.tensors()]
    assembly.step.run(batches_of(2, assembly), 2)
    assert [tensor.data_ptr() for tensor in static._inputs.tensors()] == places
