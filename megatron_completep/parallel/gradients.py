"""Where gradients of parameters go: a queue of accumulations into `parameter.main_grad`.

No gradient of a parameter travels through autograd, because pipeline schedules split the backward
pass into input gradients and weight gradients, and some run autograd's hooks several times. The
backward pass of a module pushes a closure into the queue of its chunk instead. The queue runs every
closure exactly once, at once or when the schedule says so, in fp32 (fp64 for float64 parameters).
It counts the contributions and reports a parameter when the last one of the step has arrived.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_completep.kernels.ops.partial_sums import AccumulateAll
from megatron_completep.parallel.parameter import spec_of

# Called with (main_grad, first). first: what main_grad holds is stale, overwrite it.
Accumulate = Callable[[Tensor, bool], None]


@dataclass(slots=True)
class _Expected:
    """What the step under way still expects of a parameter.

    parameter: held, so that nothing else takes its id.
    stale: nothing has arrived yet, so that its gradient buffer holds that of the step before.
    """

    parameter: Parameter
    contributions: int
    stale: bool = True


class GradientQueue:
    """The gradient contributions of one model chunk.

    Attributes:
        deferred: whether contributions wait until `take()` hands them to the pipeline schedule.
        on_complete: called with a parameter when its last contribution of the step has arrived.
        allocate: called with a parameter before its first contribution, where `main_grad` does not
            exist all the time; None: it does.
        runs: contributions that were accumulated since the queue was made.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.on_complete: Callable[[Parameter], None] | None = None
        self.allocate: Callable[[Parameter], None] | None = None
        self.runs = 0
        self._pending: list[Callable[[], None]] = []
        # By the id of the parameter, because hashing a Parameter is a Python call. An entry exists
        # until its parameter's last contribution has arrived.
        self._expected: dict[int, _Expected] = {}

    def begin_step(self, parameters: Iterable[Parameter], micro_batches: int) -> None:
        """Expect `micro_batches` contributions of every parameter, times its uses.

        The first contribution overwrites the gradient of the step before.
        """
        self._expected = {
            id(parameter): _Expected(parameter, micro_batches * spec_of(parameter).uses)
            for parameter in parameters
        }

    def push(self, parameter: Parameter, accumulate: Accumulate) -> None:
        """Add one contribution, now or when the schedule asks for it."""
        assert isinstance(parameter, Parameter), (
            "push() needs the Parameter itself: a tensor of ctx.saved_tensors is another object"
        )
        if not parameter.requires_grad:
            return
        if self.deferred:
            self._pending.append(partial(self._run, parameter, accumulate))
        else:
            self._run(parameter, accumulate)

    def push_together(self, parameters: Sequence[Parameter], accumulate: AccumulateAll) -> None:
        """Add one contribution to each of several parameters by one call of `accumulate`.

        `accumulate` gets None in place of the main gradient of a parameter that is not trained.
        """
        if self.deferred:
            self._pending.append(partial(self._run_together, tuple(parameters), accumulate))
        else:
            self._run_together(parameters, accumulate)

    def main_grad_for_forward(self, parameter: Parameter) -> tuple[Tensor, bool] | None:
        """(main_grad, stale), for a contribution that the forward pass makes already.

        stale: main_grad still holds the gradient of the step before and must be overwritten. The
        backward pass must then push `added_already`, so that this contribution is counted like all
        others. Returns None if no contribution to the parameter is expected: outside of a training
        step a forward pass must change nothing.
        """
        expected = self._expected.get(id(parameter))
        if not parameter.requires_grad or expected is None:
            return None
        stale = expected.stale
        expected.stale = False
        return self._main_grad(parameter, stale), stale

    def take(self) -> Callable[[], None]:
        """Hand over the pending contributions as one function: `dw_builder` of a pipeline stage."""
        contributions = self._pending
        self._pending = []

        def run() -> None:
            for contribution in contributions:
                contribution()

        return run

    def finish_step(self) -> None:
        """Complete the parameters that received fewer contributions than expected.

        A parameter without any contribution gets a zero gradient.
        """
        for expected in list(self._expected.values()):
            if expected.stale:
                self._main_grad(expected.parameter, first=True).zero_()
            self._complete(expected.parameter)

    def _run(self, parameter: Parameter, accumulate: Accumulate) -> None:
        # Autograd runs backward with grad mode off, so entering no_grad would only cost host time
        # there. A pipeline schedule calls the function from `take` with grad mode on.
        if torch.is_grad_enabled():
            with torch.no_grad():
                self._run(parameter, accumulate)
            return
        expected = self._expected.get(id(parameter))
        first = expected is not None and expected.stale
        if expected is not None:
            expected.stale = False
        # Not by `_main_grad`: a call for each gradient costs the host more than what it does.
        if first and self.allocate is not None:
            self.allocate(parameter)
        accumulate(main_grad_of(parameter), first)
        self._count(parameter, expected)

    def _run_together(self, parameters: Sequence[Parameter], accumulate: AccumulateAll) -> None:
        if torch.is_grad_enabled():
            with torch.no_grad():
                self._run_together(parameters, accumulate)
            return
        main_grads: list[Tensor | None] = []
        first: list[bool] = []
        contributions: list[tuple[Parameter, _Expected | None]] = []
        for parameter in parameters:
            if not parameter.requires_grad:
                main_grads.append(None)
                first.append(False)
                continue
            expected = self._expected.get(id(parameter))
            first.append(expected is not None and expected.stale)
            if first[-1] and self.allocate is not None:
                self.allocate(parameter)
            main_grads.append(main_grad_of(parameter))
            if expected is not None:
                expected.stale = False
            contributions.append((parameter, expected))
        if contributions:
            accumulate(main_grads, first)
        for parameter, expected in contributions:
            self._count(parameter, expected)

    def _main_grad(self, parameter: Parameter, first: bool) -> Tensor:
        # Only the first contribution may make a buffer: one too many would add to stale memory.
        if first and self.allocate is not None:
            self.allocate(parameter)
        return main_grad_of(parameter)

    def _count(self, parameter: Parameter, expected: _Expected | None) -> None:
        self.runs += 1
        # Outside of a step (tests, instruments) nothing is expected or counted.
        if expected is not None:
            expected.contributions -= 1
            if expected.contributions == 0:
                self._complete(parameter)

    def _complete(self, parameter: Parameter) -> None:
        self._expected.pop(id(parameter))
        if self.on_complete is not None:
            self.on_complete(parameter)


class _Reduced:
    """Stands in the place of a gradient whose buffer exists only while its bucket is filled."""


REDUCED = _Reduced()


def main_grad_of(parameter: Parameter) -> Tensor:
    """The gradient buffer of a parameter, float32 (float64 for float64 parameters).

    The optimizer provides it; without one it is made here.
    """
    main_grad: Tensor | None = getattr(parameter, "main_grad", None)
    assert not isinstance(main_grad, _Reduced), (
        "the gradient of this micro-batch was reduced and freed (parallel.sharding = gradients): "
        "call next_micro_batch() between forward-backward passes, and read `grad_shard` after them"
    )
    if main_grad is None:
        main_grad = new_gradient(parameter).zero_()
        parameter.main_grad = main_grad  # type: ignore[attr-defined]
    return main_grad


def new_gradient(parameter: Tensor) -> Tensor:
    """Memory for a gradient, with anything in it: float32, or float64 for float64 parameters."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.empty(parameter.shape, dtype=dtype, device=parameter.device)


def added_already(main_grad: Tensor, first: bool) -> None:
    """A contribution that the forward pass has added, see `main_grad_for_forward`."""
    assert not first, "the main gradient that the forward pass added to is marked stale again"


def accumulate_tensor(gradient: Tensor, scale: Tensor | None = None) -> Accumulate:
    """main_grad (+)= gradient, times `scale` [] where one is given."""

    def accumulate(main_grad: Tensor, first: bool) -> None:
        scaled = gradient if scale is None else gradient * scale
        main_grad.copy_(scaled) if first else main_grad.add_(scaled)

    return accumulate


def accumulate_sum(d_out: Tensor) -> Accumulate:
    """main_grad (+)= column sums of d_out [T, out], summed in the type of main_grad."""

    def accumulate(main_grad: Tensor, first: bool) -> None:
        column_sums = d_out.sum(0, dtype=main_grad.dtype)
        main_grad.copy_(column_sums) if first else main_grad.add_(column_sums)

    return accumulate


def push_autograd_grad(owner: weakref.ref[GradientQueue], parameter: Parameter) -> None:
    """Move a gradient that autograd accumulated into `.grad` to the queue.

    Called for the parameters of modules that do not use the queue. `owner` is weak, as the garbage
    collector cannot see a cycle that runs through the hooks of a tensor.
    """
    gradient = parameter.grad
    parameter.grad = None
    queue = owner()
    if gradient is not None and queue is not None:
        queue.push(parameter, accumulate_tensor(gradient))
