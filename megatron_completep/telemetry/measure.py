"""What the instruments read off a model in training: the residual stream, the logits, and each role's gradients and updates.

Everything here works under any layout, and counts every logical element once. S sequence, B micro-batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


def role_of(module: nn.Module) -> Role | None:
    """The role that the parameters which a module itself owns declare; None for a module without any."""
    specs = (getattr(parameter, "spec", None) for parameter in module.parameters(recurse=False))
    return next((spec.role for spec in specs if isinstance(spec, Spec)), None)


def layer_entries(chunk: GPT) -> list[str]:
    """The names of the norms at which the layers of a chunk begin, in order: where the stream between layers can be read."""
    first_norms = [block.branches[0][0] for _, block in chunk.blocks()]
    names = {module: name for name, module in chunk.named_modules()}
    return [names[norm] for norm in first_norms]


class StreamTaps:
    """Reads the residual stream [s, B, H] at every norm that opens a branch, and at the final one.

    A norm of this project returns (stream, normed); any other module with such a role is taken to return the normed stream alone,
    and its first input is the stream. Sites carry module names, which number layers globally.
    """

    def __init__(self, chunks: Sequence[nn.Module]):
        self.streams: dict[str, list[Tensor]] = {}
        self.normed: list[Tensor] = []  # what the final norm gave
        self.final_site: str | None = None  # on the rank that holds the final norm
        self._recording = False
        for chunk in chunks:
            for name, module in chunk.named_modules():
                role = role_of(module)
                if role in STREAM_ROLES:
                    module.register_forward_hook(self._hook(name, role == Role.FINAL_NORM))
                    self.final_site = name if role == Role.FINAL_NORM else self.final_site

    def _hook(self, name: str, final: bool):
        def record(
            _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Stream, Tensor]
        ) -> None:
            if not self._recording:
                return
            if isinstance(output, tuple):
                stream, normed = output[0].residual, output[1]
            else:
                stream, normed = inputs[0], output
            self.streams.setdefault(name, []).append(stream.detach())
            if final:
                self.normed.append(normed.detach())

        return record

    @contextmanager
    def recording(self) -> Iterator[StreamTaps]:
        """Keep, from empty, what passes inside the block; one tensor a site and forward pass, in the order of the model."""
        self.streams, self.normed, self._recording = {}, [], True
        try:
            yield self
        finally:
            self._recording = False


@dataclass(frozen=True)
class SumOfSquares:
    """A root mean square that is not finished: sums over ranks are still to be taken."""

    total: float
    count: float

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> SumOfSquares:
        return cls(
            sum(t.double().square().sum().item() for t in tensors), sum(t.numel() for t in tensors)
        )

    @property
    def rms(self) -> float:
        return (self.total / self.count) ** 0.5 if self.count else 0.0


def reduce_stream_sums(sums: dict[str, SumOfSquares], context: ParallelContext) -> dict[str, float]:
    """RMS by name, the same on every rank. Sums over data (each rank has its own samples), over tensor ranks under sequence
    parallelism (each has its part of the sequence), and gathers the stages over pipeline ranks."""
    device = context.device
    values = torch.tensor(
        [[s.total, s.count] for s in sums.values()], dtype=torch.float64, device=device
    ).view(-1, 2)
    if context.sequence.split:
        values = all_reduce(values, context.tensor)
    values = all_reduce(values, context.data)
    mine = {name: SumOfSquares(*row).rms for name, row in zip(sums, values.tolist(), strict=True)}
    if context.pipeline.group is None:
        return mine
    stages: list[dict[str, float]] = [{} for _ in range(context.pipeline.size)]
    dist.all_gather_object(stages, mine, group=context.pipeline.group)
    return {name: value for stage in stages for name, value in stage.items()}


def role_rms(
    optimizer: DistributedOptimizer, flat_shard: Tensor, by_learning_rate: bool = False
) -> dict[Role, float]:
    """RMS over each role's elements of something laid out like the optimizer's shard (gradients, masters, their changes).

    by_learning_rate: each parameter divided by its own learning-rate factor first. Communicates over the whole mesh; a role's
    elements count once whatever the layout.
    """
    groups = list(optimizer.groups.values())
    roles = list(Role)
    sums = torch.zeros(len(roles), 2, dtype=torch.float64, device=flat_shard.device)
    for start, size, index in optimizer.shards.counted_table.tolist():
        group = groups[index]
        piece = flat_shard[start : start + size]
        scale = 1 / group.lr_factor if by_learning_rate else 1.0
        row = sums[roles.index(group.role)]
        row[0] += (torch.linalg.vector_norm(piece, dtype=torch.float64) * scale).square()
        row[1] += size
    sums = all_reduce(sums, optimizer.context.world)
    return {
        role: SumOfSquares(*row).rms
        for role, row in zip(roles, sums.tolist(), strict=True)
        if row[1]
    }
