"""A step whose inputs stay in the same memory, so that a GPU can replay it as one CUDA graph.

Launching a step costs the host about as many calls as the model has operations. The kernels of a
small model take less time than these calls, so the GPU waits. A captured graph holds all launches
of a step with their addresses and numbers, and one call replays them.

So nothing that changes from step to step may be a number of the host: tokens, labels, seeds of
dropout, the count of tokens and the learning rate are copied into tensors that stay where they are,
and the step reads them there. On a CPU the same step runs over the same tensors without being
captured; its results are those of the usual step, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_completep.run.forward_backward import MicroBatch

# Steps that run without a graph before one is captured. In these, libraries choose their kernels,
# tables reach the device and the allocator finds its sizes. They train like any other step.
LAUNCHED_STEPS = 3


@dataclass(frozen=True)
class StepInputs:
    """What differs from one step to the next, on the device."""

    micro_batches: Sequence[MicroBatch]
    tokens: Tensor  # int64 [], tokens whose loss this rank computes
    stop: Tensor  # float32 [], 1 if this rank was asked to stop
    learning_rate: float | Tensor  # a static step takes a float64 []

    def tensors(self) -> list[Tensor]:
        """All tensors of the inputs, in an order that is the same at every step."""
        assert isinstance(self.learning_rate, Tensor), "a number would be captured as a constant"
        tensors = [self.tokens, self.stop, self.learning_rate]
        for micro_batch in self.micro_batches:
            for field in fields(micro_batch):
                tensor = getattr(micro_batch, field.name)
                if tensor is not None:
                    tensors.append(tensor)
        return tensors


class CudaGraph:
    """Launches the step on a stream of its own, captures these launches, and replays them."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._graph = torch.cuda.CUDAGraph()
        self._figures: Tensor | None = None  # overwritten by every replay

    def launch(self, compute: Callable[[], Tensor]) -> Tensor:
        """Run a step on the stream of the capture, because autograd remembers streams."""
        current = torch.cuda.current_stream(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            figures = compute()
        current.wait_stream(self._stream)
        # The figures were allocated on one stream and are read on another.
        figures.record_stream(current)
        return figures

    def capture(self, compute: Callable[[], Tensor]) -> None:
        """Record the launches of a step; nothing runs."""
        # Other threads go on meanwhile. That of the loader pins memory, and a capture of the whole
        # process would fail by it.
        mode = "thread_local"
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode=mode):
            self._figures = compute()

    def replay(self) -> Tensor:
        """Run what was captured; its figures are overwritten by the next replay."""
        assert self._figures is not None, "nothing was captured"
        self._graph.replay()
        return self._figures


class StaticStep:
    """Runs `compute` over inputs that stay in the same memory; on a GPU as a graph.

    Communicates nothing: a graph of a step belongs to one process (config/graph_rules.py).
    """

    def __init__(self, compute: Callable[[StepInputs], Tensor], graph: CudaGraph | None):
        """compute: the whole step, from the forward pass to the update; returns its figures.

        It must not wait for the device, and must update in place what it keeps from one step to
        the next. graph: None on a CPU, where steps run without being captured.
        """
        self._compute = compute
        self._graph = graph
        self._inputs: StepInputs | None = None
        self._steps = 0

    def run(self, inputs: StepInputs) -> Tensor:
        """One step; its figures are overwritten by the next one.

        Every step must have as many micro-batches as the first, of the same shape.
        """
        static = self._place(inputs)
        self._steps += 1
        if self._graph is None:
            return self._compute(static)
        if self._steps <= LAUNCHED_STEPS:
            return self._graph.launch(lambda: self._compute(static))
        if self._steps == LAUNCHED_STEPS + 1:
            self._graph.capture(lambda: self._compute(static))
        return self._graph.replay()

    def _place(self, inputs: StepInputs) -> StepInputs:
        """Copy the inputs to where the step reads them."""
        if self._inputs is None:
            self._inputs = _copy_of(inputs)
            return self._inputs
        for static, tensor in zip(self._inputs.tensors(), inputs.tensors(), strict=True):
            # `copy_` would broadcast a smaller batch to a larger one without an error.
            assert static.shape == tensor.shape, (static.shape, tensor.shape)
            static.copy_(tensor, non_blocking=True)
        return self._inputs


def _copy_of(inputs: StepInputs) -> StepInputs:
    """The same values in memory of their own."""
    assert isinstance(inputs.learning_rate, Tensor), "a number would be captured as a constant"
    micro_batches = []
    for micro_batch in inputs.micro_batches:
        copies: dict[str, Tensor] = {}
        for field in fields(micro_batch):
            tensor = getattr(micro_batch, field.name)
            if tensor is not None:
                copies[field.name] = tensor.clone()
        micro_batches.append(MicroBatch(**copies))
    return StepInputs(
        micro_batches,
        tokens=inputs.tokens.clone(),
        stop=inputs.stop.clone(),
        learning_rate=inputs.learning_rate.clone(),
    )
