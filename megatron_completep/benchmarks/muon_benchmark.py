"""A training step with Muon beside the same step with a plain implementation of the update.

Both have the same model, gradients and precision. The plain update has every logical part as a
parameter of its own: a loop over matrices with Newton-Schulz for each, and torch's fused AdamW for
all else.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_completep.benchmarks.training_benchmark import (
    BenchmarkSettings,
    bootstrap_ratio,
    random_batch,
    time_once,
)
from megatron_completep.config.schema import Config, MuonConfig
from megatron_completep.data.loader import Batch
from megatron_completep.optim.matrices import Holding, Matrix
from megatron_completep.optim.muon import MATRIX, Muon, iteration_dtype, section_of
from megatron_completep.optim.newton_schulz import Polynomial, polynomials
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.assemble import assemble
from megatron_completep.run.forward_backward import MicroBatch
from megatron_completep.run.step import TrainingStep


@dataclass(frozen=True)
class MuonCost:
    """Median processor seconds of a step, and the ratio of ours to the plain one's.

    update_share: of our step, the share that the orthogonal factors take.
    """

    step_seconds: float
    plain_seconds: float
    ratio: float
    ratio_low: float  # 95 % interval
    ratio_high: float
    update_share: float
    rounds: int

    def __str__(self) -> str:
        return (
            f"processor time of a step: {1000 * self.step_seconds:.1f} ms, plain "
            f"{1000 * self.plain_seconds:.1f} ms, ratio {self.ratio:.3f} "
            f"(95 % of {self.rounds} rounds: {self.ratio_low:.3f} to {self.ratio_high:.3f}); "
            f"orthogonal factors are {self.update_share:.1%} of our step"
        )


class PlainUpdate:
    """Muon and AdamW over parameters of one part each, from gradients that are there already."""

    def __init__(self, optimizer: DistributedOptimizer, muon: MuonConfig, lr: float):
        self._sequence = polynomials(muon.coefficients, muon.iterations)
        self._muon = muon
        self.matrices: list[tuple[Tensor, Tensor, Tensor, float, float]] = []
        others: list[Tensor] = []
        self._gradients: list[tuple[Tensor, Tensor]] = []
        shards = optimizer.shards
        master = shards.master.dtype
        self._dtype = iteration_dtype(muon, master, shards.context.device)
        for piece in shards.layout.pieces:
            spec = shards.specs[piece.name]
            # One process has one shard, so a piece lies there where it lies in the whole buffer.
            whole = slice(piece.start, piece.start + piece.size)
            # Weights are copies, so that the two updates do not move each other's. Gradients are
            # views: every step's are there without being handed over.
            weight = shards.master[whole].clone().view(spec.local_shape)
            gradient = shards.grad[whole].view(spec.local_shape)
            if Muon.kind_of(spec) != MATRIX:
                others.append(weight.requires_grad_())
                self._gradients.append((weight, gradient))
                continue
            sizes = [size for _, size in spec.local_parts()]
            parts = zip(
                spec.logical_parts,
                weight.split(sizes),
                gradient.split(sizes),
                strict=True,
            )
            for part, part_weight, part_gradient in parts:
                name = f"{piece.name}.{part}" if part else piece.name
                group = optimizer.groups[name]
                own = part_weight.clone()
                # lr_factor holds sqrt(d_out / d_in) already, and the decay is coupled to the rate.
                rate = lr * group.lr_factor
                decay = rate * group.weight_decay
                momentum = torch.zeros_like(own)
                self.matrices.append((own, part_gradient, momentum, rate, decay))
        # One rate for all, as the time of an update does not depend on it.
        self._adamw = torch.optim.AdamW(others, lr=lr, fused=True)

    @torch.no_grad()
    def __call__(self, scale: float) -> None:
        """One update; scale: of the gradients, which are sums over tokens."""
        for weight, gradient in self._gradients:
            weight.grad = gradient * scale
        self._adamw.step()
        beta = self._muon.momentum
        for weight, gradient, momentum, rate, decay in self.matrices:
            # The clip coefficient enters the momentum, as in ours.
            momentum.mul_(beta).add_(gradient, alpha=scale * (1 - beta))
            update = momentum
            if self._muon.nesterov:
                # A new tensor, as the momentum itself has to stay for the next step.
                update = (momentum * beta).add_(gradient, alpha=scale * (1 - beta))
            factor = plain_factor(update.to(self._dtype), self._sequence)
            weight.mul_(1 - decay).add_(factor, alpha=-rate)


def plain_factor(x: Tensor, sequence: list[Polynomial]) -> Tensor:
    """The orthogonal factor of one matrix."""
    # The Frobenius norm bounds the largest singular value: all of them are then in [0, 1].
    x = x / x.norm()
    # The Gram matrix is that of the smaller side, which costs the least.
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for a, b, c in sequence:
        # G = X X^T, and a X + (b G + c G^2) X is the polynomial of newton_schulz.py.
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if tall else x


def measure(config: Config, device: torch.device, rounds: int = 20, warmup: int = 3) -> MuonCost:
    """Time our step and the plain one in turn, on random tokens, in one process.

    Raises ConfigError where the configuration has no Muon.
    """
    muon = section_of(config.optimizer)
    step = assemble(config, ParallelContext.single(device)).step
    training = config.training
    batch = random_batch(BenchmarkSettings(config.model, training.micro_batch_size))
    batches = [batch] * (training.global_batch_size // training.micro_batch_size)
    step.run(batches, 1)
    update = PlainUpdate(step.optimizer, muon, config.optimizer.base_lr)
    programs: list[tuple[str, Callable[[], object]]] = [
        ("ours", lambda: step.run(batches, 1)),
        ("plain", partial(_plain_step, step, batches, update)),
    ]
    seconds: dict[str, list[float]] = {name: [] for name, _ in programs}
    of_factors: list[float] = []
    for number in range(warmup + rounds):
        # A later program may find warmer caches, so they change places every round.
        for name, program in programs if number % 2 == 0 else reversed(programs):
            # Processor time, which other work on the machine disturbs little.
            _, processor = time_once(program, device)
            if number >= warmup:
                seconds[name].append(processor)
        # Inside of a step the factors cannot be told from the rest, so they are timed alone.
        _, processor = time_once(lambda: list(_factors(step.optimizer)), device)
        of_factors.append(processor)
    ours = statistics.median(seconds["ours"])
    plain = statistics.median(seconds["plain"])
    low, high = bootstrap_ratio(seconds["ours"], seconds["plain"])
    share = statistics.median(of_factors) / ours
    return MuonCost(ours, plain, ours / plain, low, high, share, rounds)


def _plain_step(step: TrainingStep, batches: list[Batch], update: PlainUpdate) -> None:
    """Forward and backward as in our step, the norm, and the plain update."""
    optimizer = step.optimizer
    optimizer.begin_step(len(batches))
    micro_batches = [MicroBatch(batch.tokens, batch.labels) for batch in batches]
    step.forward_backward(micro_batches)
    # As our step does. Untaken, the terms of all steps would be summed up.
    step.forward_backward.take_terms()
    optimizer.shards.finish_gradients()
    tokens = sum(batch.labels.numel() for batch in batches)
    # Gradients are sums over tokens, and the norm that is clipped, at 1, is that of their mean.
    norm = optimizer.shards.sum_of_squares().sqrt().item() / tokens
    update(min(1.0, 1.0 / (norm + 1e-6)) / tokens)


def _factors(optimizer: DistributedOptimizer) -> Iterator[Tensor]:
    """The orthogonal factors of matrices of ones: the time does not depend on the numbers."""
    rule = optimizer.rule
    assert isinstance(rule, Muon)
    for _, _, factor in rule.exchange.factors(_fill):
        yield factor


def _fill(_matrix: Matrix, _holding: Holding, out: Tensor) -> None:
    out.fill_(1.0)
