"""Whether the device computes what it should: one process, the golden traces, several ranks.

Example:

    python -m megatron_completep.benchmarks.gpu_day.layouts --out gpu_day

One process in float32 on the device is compared with float64 on the CPU; the golden traces of the
authors' code are replayed; then 2 and 4 ranks share the GPU, their collectives going through the
host (parallel/staged.py), and are compared with one process. It is about what is computed, not how
fast.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_completep.benchmarks.gpu_day import figures
from megatron_completep.benchmarks.gpu_day.figures import Figure, Setting
from megatron_completep.config.bare import bare_config
from megatron_completep.config.derived import micro_batches_per_step
from megatron_completep.config.schema import (
    CompletePConfig,
    Config,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_completep.data.loader import Batch
from megatron_completep.instruments.replay import TOLERANCES, Trace, replay
from megatron_completep.parallel.context import ParallelContext, data_parallel_size_for
from megatron_completep.parallel.staged import join_staged
from megatron_completep.run.assemble import assemble

GOLDEN = Path(__file__).resolve().parents[3] / "tests" / "golden"
TRACES = ("completep", "alpha_half", "mup", "completep_base")
GLOBAL_BATCH = 16
STEPS = 3
LOSS_AT_MOST = 1e-5  # relative, against one process of the same precision
WEIGHT_AT_MOST = 1e-3  # of the norm of a tensor's difference; AdamW enlarges rounding
SECONDS_A_LAYOUT = 60.0  # until a rank that does not answer is given up


@dataclass(frozen=True)
class Layout:
    """So many ranks, how they divide the model, and the experts of its layers."""

    ranks: int
    parallel: Mapping[str, Any]
    moe: MoeConfig | None = None


LAYOUTS = {
    "tensor 2, sequence": Layout(2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "data 2": Layout(2, {"bucket_megabytes": 0.03}),
    "pipeline 2, 1f1b": Layout(2, {"pipeline_parallel_size": 2, "schedule": "1f1b"}),
    "pipeline 2, zero bubble": Layout(2, {"pipeline_parallel_size": 2, "schedule": "zero_bubble"}),
    "data 4, shard 2": Layout(4, {"optimizer_shard_size": 2, "bucket_megabytes": 0.03}),
    "tensor 2": Layout(2, {"tensor_parallel_size": 2}),
    "context 2": Layout(2, {"context_parallel_size": 2, "context_heads_at_once": 2}),
    "data 2, experts 2": Layout(
        2, {"expert_parallel_size": 2}, MoeConfig(num_experts=4, top_k=2, ffn_hidden_size=32)
    ),
}
TRIED_LAYOUT = "tensor 2, sequence"


@dataclass(frozen=True)
class Outcome:
    """What a run came to; the weights are logical ones, float64, by name."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, np.ndarray]


def measure(setting: Setting) -> None:
    """One process, then the traces, then the layouts, as far as the time goes."""
    with setting.attempt("one process"):
        truth = _one_process(setting)
    for name in TRACES[:1] if setting.trial else TRACES:
        for precision in ("float32",) if setting.trial else TOLERANCES:
            with setting.attempt(f"trace {name}, {precision}"):
                _trace(setting, name, precision)
    for name in (TRIED_LAYOUT,) if setting.trial else LAYOUTS:
        if setting.seconds_left < 5:
            setting.say(Figure(name, failed="not started: the time is up"))
            continue
        with setting.attempt(name):
            _layout(setting, name, truth)


def _one_process(setting: Setting) -> Outcome:
    """Float32 on the device beside float64 on the CPU; returns the former."""
    exact = _train(_config({}, "float64", setting.trial), ParallelContext.single())
    outcome = _train(_config({}, "float32", setting.trial), ParallelContext.single(setting.device))
    _say(setting, "one process, float32 beside float64", *_distance(outcome, exact))
    return outcome


def _trace(setting: Setting, name: str, precision: str) -> None:
    """A golden trace on the device: the largest of its errors over its tolerance."""
    context = ParallelContext.single(setting.device)
    result = replay(Trace.load(str(GOLDEN / name)), precision, context)
    errors = (
        result.max_relative_loss_error,
        result.max_relative_grad_norm_error,
        result.max_relative_weight_norm_error,
    )
    shares = [error / bound for error, bound in zip(errors, TOLERANCES[precision], strict=True)]
    details = dict(zip(("loss", "grad_norm", "weight_norms"), errors, strict=True))
    figure = Figure(
        f"trace {name}, {precision}", max(shares), "of the tolerance", at_most=1, details=details
    )
    setting.say(figure)


def _layout(setting: Setting, name: str, truth: Outcome) -> None:
    """Several ranks on one device beside one process."""
    layout = LAYOUTS[name]
    if layout.moe is not None:
        alone = _config({}, "float32", setting.trial, moe=layout.moe)
        truth = _train(alone, ParallelContext.single(setting.device))
    start = multiprocessing.get_context("spawn")  # a fork would share the parent's CUDA
    timeout = min(SECONDS_A_LAYOUT, max(1.0, setting.seconds_left))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        answers = []
        for rank in range(layout.ranks):
            answer, far_end = start.Pipe(duplex=False)
            arguments = (rank, name, Path(folder) / "store", str(setting.device), setting.trial)
            process = start.Process(target=_serve, args=(far_end, *arguments), daemon=True)
            process.start()
            processes.callback(process.kill)
            far_end.close()
            answers.append(answer)
        outcomes = [_answer(answer, timeout) for answer in answers]
    # A rank of a pipeline holds the weights of its stage.
    distances = [_distance(outcome, truth) for outcome in outcomes]
    worst = [max(errors) for errors in zip(*distances, strict=True)]
    _say(setting, f"{name} beside one process", *worst)


def _answer(connection: multiprocessing.connection.Connection, timeout: float) -> Outcome:
    """What a rank came to. Raises RuntimeError with its traceback, or where it is silent."""
    if not connection.poll(timeout):
        raise RuntimeError(f"a rank gave no answer in {timeout:.0f} s")
    outcome = connection.recv()
    if isinstance(outcome, Outcome):
        return outcome
    raise RuntimeError(str(outcome).strip().splitlines()[-1])


def _serve(
    far_end: multiprocessing.connection.Connection,
    rank: int,
    name: str,
    store: Path,
    device_name: str,
    trial: bool,
) -> None:
    """One rank: train, and send the outcome or the traceback."""
    layout = LAYOUTS[name]
    device = torch.device(device_name)
    torch.set_num_threads(1)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.cuda.init()  # else the mesh would choose a device by the rank
        join_staged(store, rank, layout.ranks, timedelta(seconds=SECONDS_A_LAYOUT))
        config = _config(layout.parallel, "float32", trial, layout.ranks, layout.moe)
        data_size = data_parallel_size_for(config.parallel, layout.ranks)
        context = ParallelContext.over_world(config.parallel, device, rank, layout.ranks, data_size)
        far_end.send(_train(config, context))
        dist.destroy_process_group()
    except BaseException:
        far_end.send(traceback.format_exc())
        raise


def _config(
    parallel: Mapping[str, Any],
    precision: str,
    trial: bool,
    ranks: int = 1,
    moe: MoeConfig | None = None,
) -> Config:
    """A small model that every layout can divide, with micro-batches for every schedule."""
    wide = 1 if trial else 8
    model = ModelConfig(
        hidden_size=32 * wide,
        num_layers=4,
        num_attention_heads=4,
        ffn_hidden_size=64 * wide,
        vocab_size=61,
        vocab_multiple=4,
        seq_length=8 * wide,
        bias=moe is None,
        moe=moe,
    )
    sizes = ParallelConfig(**parallel)
    replicas = data_parallel_size_for(sizes, ranks)
    # A large epsilon: where a true gradient is zero, Adam makes a step of rounding noise.
    optimizer = OptimizerConfig(base_lr=1e-2, base_init_std=0.2, base_eps=1e-3, schedule="constant")
    return bare_config(
        model,
        completep=CompletePConfig(base_hidden_size=16, base_num_layers=2),
        optimizer=optimizer,
        parallel=sizes,
        training={
            "micro_batch_size": GLOBAL_BATCH // replicas // 4,
            "global_batch_size": GLOBAL_BATCH,
            "train_steps": STEPS,
            "precision": precision,
            "seed": 7,
        },
    )


def _train(config: Config, context: ParallelContext) -> Outcome:
    """Train on this rank's share of every batch. Communicates over all axes."""
    assembly = assemble(config, context)
    count = micro_batches_per_step(config, context.world_size)
    losses = []
    grad_norms = []
    for step in range(1, STEPS + 1):
        batches = _batches_of(step, config.model, context, count)
        figures_of_step = assembly.step.run(batches, step).read()
        losses.append(figures_of_step.loss)
        grad_norms.append(figures_of_step.grad_norm)
    optimizer = assembly.optimizer
    optimizer.wait_for_parameters()
    weights = {}
    for name, spec in optimizer.shards.specs.items():
        whole = spec.gather_logical(optimizer.shards.parameters[name].detach(), context)
        # An array travels between processes by value, a tensor by a file that its process holds.
        weights[name] = whole.double().cpu().numpy()
    return Outcome(losses, grad_norms, weights)


def _batches_of(step: int, model: ModelConfig, context: ParallelContext, count: int) -> list[Batch]:
    """The micro-batches of this data rank; a fifth of the labels does not count."""
    generator = torch.Generator().manual_seed(step)
    shape = (GLOBAL_BATCH, model.seq_length)
    tokens = torch.randint(model.vocab_size, shape, generator=generator)
    labels = torch.randint(model.vocab_size, shape, generator=generator)
    mask = (torch.rand(shape, generator=generator) > 0.2).float()
    positions = torch.arange(model.seq_length).expand(shape)
    documents = torch.zeros(shape, dtype=torch.int32)
    numbers = torch.arange(GLOBAL_BATCH)
    whole = (tokens, labels, mask, positions, documents, numbers)
    own = [tensor.chunk(context.data.size)[context.data.rank] for tensor in whole]
    return [Batch(*parts) for parts in zip(*(tensor.chunk(count) for tensor in own), strict=True)]


def _say(setting: Setting, name: str, loss: float, norm: float, weight: float) -> None:
    details = {"grad_norm": norm}
    setting.say(Figure(f"{name}: loss", loss, "relative", 0, at_most=LOSS_AT_MOST, details=details))
    setting.say(Figure(f"{name}: weights", weight, "relative", 0, at_most=WEIGHT_AT_MOST))


def _distance(outcome: Outcome, truth: Outcome) -> tuple[float, float, float]:
    """The largest relative errors of losses, gradient norms and weights."""
    losses = [abs(a / b - 1) for a, b in zip(outcome.losses, truth.losses, strict=True)]
    norms = [abs(a / b - 1) for a, b in zip(outcome.grad_norms, truth.grad_norms, strict=True)]
    weights = []
    for name, weight in outcome.weights.items():
        expected = truth.weights[name]
        size = max(float(np.linalg.norm(expected)), 1e-30)
        weights.append(float(np.linalg.norm(weight - expected)) / size)
    return max(losses), max(norms), max(weights)


if __name__ == "__main__":
    figures.main(measure, __doc__)
