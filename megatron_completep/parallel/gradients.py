"""Where gradients of parameters go: a queue of accumulations into `parameter.main_grad`.

No gradient of a parameter travels through autograd, because pipeline schedules split the backward
pass into input gradients and weight gradients, and some run autograd's hooks several times. The
backward pass of a module pushes a closure into the queue of its chunk instead. The queue runs every
closure exactly once, at once or when the schedule says so, in fp32 (fp64 for float64 parameters).
It counts the contributions and reports a parameter when the last one of the step has arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_completep.parallel.parameter import spec_of

# Called with (main_grad, first). first: what main_grad holds is stale, overwrite it.
Accumulate = Callable[[Tensor, bool], None]


@dataclass(slots=True)
class _Expected:
    """What the step under way still expects of a parameter.

    stale: nothing has arrived yet, so that its gradient buffer holds that of the step before.
    """

    contributions: int
    stale: bool = True


class GradientQueue:
    """The gradient contributions of one model chunk.

    Attributes:
        deferred: whether contributions wait until `take()` hands them to the pipeline schedule.
        on_complete: called with a parameter when its last contribution of the step has arrived.
        runs: contributions that were accumulated since the queue was made.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.on_complete: Callable[[Parameter], None] | None = None
        self.runs = 0
        self._pending: list[tuple[Parameter, Accumulate]] = []
        # Until the last contribution has arrived. A parameter's hash costs a call, so one look-up
        # a contribution serves all questions.
        self._expected: dict[Parameter, _Expected] = {}

    def begin_step(self, parameters: Iterable[Parameter], micro_batches: int) -> None:
        """Expect `micro_batches` contributions of every parameter, times its uses.

        The first contribution overwrites the gradient of the step before.
        """
        self._expected = {
            parameter: _Expected(micro_batches * spec_of(parameter).uses)
            for parameter in parameters
        }

    def push(self, parameter: Parameter, accumulate: Accumulate) -> None:
        """Add one contribution, now or when the schedule asks for it."""
        assert isinstance(parameter, Parameter), (
            "gradients are kept by parameter, and a saved tensor is another object"
        )
        if not parameter.requires_grad:
            return
        if self.deferred:
            self._pending.append((parameter, accumulate))
        else:
            self._run(parameter, accumulate)

    def take(self) -> Callable[[], None]:
        """Hand over the pending contributions as one function: `dw_builder` of a pipeline stage."""
        contributions = self._pending
        self._pending = []

        def run() -> None:
            for parameter, accumulate in contributions:
                self._run(parameter, accumulate)

        return run

    def finish_step(self) -> None:
        """Complete the parameters that fewer contributions came to than were expected.

        The gradient of one that none came to is zero.
        """
        for parameter, expected in list(self._expected.items()):
            if expected.stale:
                main_grad_of(parameter).zero_()
            self._complete(parameter)

    def _run(self, parameter: Parameter, accumulate: Accumulate) -> None:
        self.runs += 1
        # Outside of a step (tests, instruments) nothing is expected or counted.
        expected = self._expected.get(parameter)
        first = expected is not None and expected.stale
        # Backward runs without gradients, where the context would only cost host time. A schedule
        # that calls what `take` handed it does not.
        if torch.is_grad_enabled():
            with torch.no_grad():
                accumulate(main_grad_of(parameter), first)
        else:
            accumulate(main_grad_of(parameter), first)
        if expected is not None:
            expected.stale = False
            expected.contributions -= 1
            if expected.contributions == 0:
                self._complete(parameter)

    def _complete(self, parameter: Parameter) -> None:
        self._expected.pop(parameter)
        if self.on_complete is not None:
            self.on_complete(parameter)


def main_grad_of(parameter: Parameter) -> Tensor:
    """The gradient buffer of a parameter, float32 (float64 for float64 parameters).

    The optimizer provides it; without one it is made here.
    """
    main_grad: Tensor | None = getattr(parameter, "main_grad", None)
    if main_grad is None:
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        main_grad = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        parameter.main_grad = main_grad  # type: ignore[attr-defined]
    return main_grad


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
