"""Where parameter gradients go: a queue of accumulations into `parameter.main_grad`, run at once or when a schedule says so.

Pipeline schedules split backward into input gradients and weight gradients, and some run autograd hooks several times; so no
parameter gradient travels through autograd. A module's backward pushes a closure here; the queue runs it exactly once, in
fp32 (fp64 for float64 parameters), counts it, and reports a parameter whose last contribution of the step has arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_completep.parallel.parameter import spec_of

Accumulate = Callable[
    [Tensor, bool], None
]  # (main_grad, first): first means "write, what is there is stale"


class GradientQueue:
    """One a model chunk. `deferred`: hold the work until `take()` hands it to the pipeline schedule."""

    def __init__(self) -> None:
        self.deferred = False
        self.on_complete: Callable[[Parameter], None] | None = None
        self.runs = 0
        self._pending: list[tuple[Parameter, Accumulate]] = []
        self._remaining: dict[Parameter, int] = {}
        self._stale: set[Parameter] = set()

    def begin_step(self, parameters: Iterable[Parameter], micro_batches: int) -> None:
        """Expect `micro_batches` contributions of every parameter (times its uses); the first one overwrites."""
        self._remaining = {p: micro_batches * spec_of(p).uses for p in parameters}
        self._stale = set(self._remaining)

    def push(self, parameter: Parameter, accumulate: Accumulate) -> None:
        """Add one contribution, now or later."""
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
        """Hand over what is held: the `dw_builder` of a pipeline stage."""
        held, self._pending = self._pending, []

        def run() -> None:
            for parameter, accumulate in held:
                self._run(parameter, accumulate)

        return run

    def finish_step(self) -> None:
        """Zero the gradients that nothing contributed to, and complete them."""
        for parameter in [p for p, count in self._remaining.items() if count > 0]:
            if parameter in self._stale:
                main_grad_of(parameter).zero_()
            self._complete(parameter)
        self._stale.clear()

    @torch.no_grad()
    def _run(self, parameter: Parameter, accumulate: Accumulate) -> None:
        self.runs += 1
        first = parameter in self._stale
        self._stale.discard(parameter)
        accumulate(main_grad_of(parameter), first)
        if parameter in self._remaining:
            self._remaining[parameter] -= 1
            if self._remaining[parameter] == 0:
                self._complete(parameter)

    def _complete(self, parameter: Parameter) -> None:
        self._remaining.pop(parameter)
        if self.on_complete is not None:
            self.on_complete(parameter)


def main_grad_of(parameter: Parameter) -> Tensor:
    """The fp32 (float64 for float64 parameters) gradient buffer; the optimizer provides it, otherwise it is made here."""
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is None:
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        main_grad = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        parameter.main_grad = main_grad  # type: ignore[attr-defined]
    return main_grad


def accumulate_tensor(gradient: Tensor, scale: Tensor | None = None) -> Accumulate:
    """main_grad (+)= gradient (times scale)."""

    def accumulate(main_grad: Tensor, first: bool) -> None:
        scaled = gradient if scale is None else gradient * scale
        main_grad.copy_(scaled) if first else main_grad.add_(scaled)

    return accumulate


def accumulate_sum(d_out: Tensor) -> Accumulate:
    """main_grad (+)= column sums of d_out [T, out], summed in main_grad's type."""

    def accumulate(main_grad: Tensor, first: bool) -> None:
        column_sums = d_out.sum(0, dtype=main_grad.dtype)
        main_grad.copy_(column_sums) if first else main_grad.add_(column_sums)

    return accumulate
