"""What instruments read off a model in training.

These are the residual stream, the logits, and the gradients and updates of each role. Everything
here works in any layout, and counts every logical element once.

S sequence, B micro-batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_completep.model.gpt import GPT
from megatron_completep.model.stream import Stream
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.collectives import all_reduce
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.parameter import Spec
from megatron_completep.roles import Role

STREAM_ROLES = (Role.PRE_NORM, Role.FINAL_NORM)

StreamHook = Callable[[nn.Module, tuple[Tensor, ...], Tensor | tuple[Stream, Tensor]], None]


def role_of(module: nn.Module) -> Role | None:
    """The role of the parameters that a module itself holds; None for a module without any."""
    for parameter in module.parameters(recurse=False):
        spec = getattr(parameter, "spec", None)
        if isinstance(spec, Spec):
            return spec.role
    return None


def layer_entries(chunk: GPT) -> list[str]:
    """The names of the norms at which the layers of a chunk begin, in order.

    The stream between two layers can be read there.
    """
    first_norms = [block.branches[0][0] for _, block in chunk.blocks()]
    names = {module: name for name, module in chunk.named_modules()}
    return [names[norm] for norm in first_norms]


class StreamTaps:
    """Reads the residual stream [s, B, H] at every norm before a branch, and at the final norm.

    A norm of this project returns (stream, normed). Any other module with such a role is expected
    to return the normed stream alone, and its first input is the stream. Sites are named by module,
    and modules number layers globally.

    Attributes:
        streams: site -> the stream of each forward pass, in the order of the model.
        normed: the outputs of the final norm.
        final_site: the site of the final norm, on the rank that holds it.
    """

    def __init__(self, chunks: Sequence[nn.Module]):
        self.streams: dict[str, list[Tensor]] = {}
        self.normed: list[Tensor] = []
        self.final_site: str | None = None
        self._sites: list[tuple[str, nn.Module]] = []
        for chunk in chunks:
            for name, module in chunk.named_modules():
                role = role_of(module)
                if role not in STREAM_ROLES:
                    continue
                self._sites.append((name, module))
                if role == Role.FINAL_NORM:
                    self.final_site = name

    def _hook(self, name: str, is_final: bool) -> StreamHook:
        def record(
            _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Stream, Tensor]
        ) -> None:
            # Our norm first adds the branch that waits in the stream. Its input is not the whole
            # stream yet, so the stream is taken from its output.
            if isinstance(output, tuple):
                residual = output[0].residual
                normed = output[1]
            else:
                residual = inputs[0]
                normed = output
            # Detached, so that no graph outlives its forward pass.
            self.streams.setdefault(name, []).append(residual.detach())
            if is_final:
                self.normed.append(normed.detach())

        return record

    @contextmanager
    def recording(self) -> Iterator[StreamTaps]:
        """Record the forward passes inside the block, and nothing from before it."""
        self.streams = {}
        self.normed = []
        with ExitStack() as hooks:
            # They do not stay: layers with hooks are not compiled as a whole.
            for name, module in self._sites:
                hook = self._hook(name, name == self.final_site)
                hooks.enter_context(module.register_forward_hook(hook))
            yield self


@dataclass(frozen=True)
class SumOfSquares:
    """A root mean square before its sums over ranks are taken."""

    total: float
    count: float

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> SumOfSquares:
        """The sums over all elements of some tensors, in float64."""
        total = sum(tensor.double().square().sum().item() for tensor in tensors)
        count = sum(tensor.numel() for tensor in tensors)
        return cls(total, count)

    @property
    def rms(self) -> float:
        """The root mean square; 0 of no elements."""
        return float((self.total / self.count) ** 0.5) if self.count else 0.0


def reduce_stream_sums(sums: dict[str, SumOfSquares], context: ParallelContext) -> dict[str, float]:
    """RMS by name, the same on every rank.

    Communicates over data (each rank has other samples), over tensor ranks under sequence
    parallelism (each has its part of the sequence), and over the pipeline (each has its stages).
    """
    rows = [[partial.total, partial.count] for partial in sums.values()]
    # One table for all names is one collective over each axis. A rank without a site has no row,
    # which does not tell how many columns there are.
    table = torch.tensor(rows, dtype=torch.float64, device=context.device).view(-1, 2)
    # Without the split every tensor rank holds the same stream, and there is nothing to add.
    if context.sequence.split:
        table = all_reduce(table, context.tensor)
    table = all_reduce(table, context.gradient)
    of_stage: dict[str, float] = {}
    for name, (total, count) in zip(sums, table.tolist(), strict=True):
        of_stage[name] = SumOfSquares(total, count).rms
    if context.pipeline.group is None:
        return of_stage
    # Stages have sites of other names, so that no sum can be taken over the pipeline.
    of_stages: list[dict[str, float]] = [{} for _ in range(context.pipeline.size)]
    dist.all_gather_object(of_stages, of_stage, group=context.pipeline.group)
    # In the order of the pipeline ranks: callers take the last name for the final norm's.
    return {name: rms for stage in of_stages for name, rms in stage.items()}


def role_rms(
    optimizer: DistributedOptimizer, flat_shard: Tensor, by_learning_rate: bool = False
) -> dict[Role, float]:
    """RMS over the elements of each role, of something laid out like the optimizer's shard.

    That may be gradients, masters, or their changes. An element counts once in every layout. The
    device is waited for once. Communicates over the whole mesh.

    by_learning_rate: divide each parameter by its group's learning-rate factor first.
    """
    segments = optimizer.shards.counted_parts
    views = [flat_shard[segment.in_shard] for segment in segments]
    # All roles on every rank, whether or not it has them: the table that is summed needs one shape.
    # Row of a role: sum of squares, number of elements.
    sums = {role: [0.0, 0.0] for role in Role}
    for segment, norm in zip(segments, norms(views), strict=True):
        group = optimizer.groups[segment.group]
        scale = 1 / group.lr_factor if by_learning_rate else 1.0
        # A scaled tensor has the scaled norm, so the elements need not be divided one by one.
        sums[group.role][0] += (norm * scale) ** 2
        sums[group.role][1] += segment.size

    by_role: dict[Role, float] = {}
    for role, (total, count) in sum_by_role(sums, optimizer.context).items():
        # A role that the model does not have has no RMS.
        if count:
            by_role[role] = SumOfSquares(total, count).rms
    return by_role


def norms(tensors: Sequence[Tensor]) -> list[float]:
    """The L2 norm of each tensor, taken in float64, by one operator for all of them.

    Waits for the device once.
    """
    if not tensors:  # a rank on which nothing counts
        return []
    by_tensor = torch._foreach_norm(list(tensors), 2, dtype=torch.float64)
    return list(torch.stack(by_tensor).tolist())


def sum_by_role(
    sums: dict[Role, list[float]], context: ParallelContext
) -> dict[Role, tuple[float, float]]:
    """The two sums of each role, over all ranks. Communicates over the whole mesh."""
    table = torch.tensor(list(sums.values()), dtype=torch.float64, device=context.device)
    rows = all_reduce(table, context.world).tolist()
    return {role: (first, second) for role, (first, second) in zip(sums, rows, strict=True)}
