"""The fastest layout that fits, by the plan's own model of memory and time.

Candidates are taken in the order of a bound that their step cannot beat, so that the search ends as
soon as the bound is above the layouts that were found: its answer is that of trying all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import Any, NamedTuple

from megatron_completep.config.check import check_world
from megatron_completep.config.derived import (
    gradient_parallel_size,
    head_dim,
    micro_batches_per_step,
    num_query_groups,
    tokens_per_step,
)
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError
from megatron_completep.model.flops import forward_flops_per_token
from megatron_completep.model.stages import split_stages
from megatron_completep.planning.memory_bound import micro_batch_bytes, optimizer_bytes
from megatron_completep.planning.scaling import (
    MATRIX_EFFICIENCY,
    MEMORY_EFFICIENCY,
    NETWORK_EFFICIENCY,
    Gpu,
    ScalingPlan,
    bubble_share,
    in_flight,
    rank_memory,
    scaling_plan,
)
from megatron_completep.planning.sizes import (
    backward_specs,
    micro_batch_sizes,
    rank_layout,
    rank_models,
    shard_count,
    wide_bytes,
)

SAFE = 0.97  # of a bound on memory: buckets are padded, and layers round
LEAST_STATES = 2  # numbers in the optimizer a parameter: the master and one state
USABLE = 0.94  # of a GPU's memory, as the plan's warning has it
MOST_GPUS = 2**16  # of the answer to "how many would do?"
MOST_TRIED = 8  # layouts a number of GPUs, for that answer
Say = Callable[[str], None]


@dataclass(frozen=True)
class Axes:
    """The sizes that are tried along every axis; what does not divide is left out.

    shards: ranks that share the optimizer; None: all that can.
    """

    tensor: tuple[int, ...] = (1, 2, 4, 8)
    pipeline: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    virtual: tuple[int, ...] = (1, 2, 4)
    context: tuple[int, ...] = (1, 2, 4, 8)
    micro_batch: tuple[int, ...] = (1, 2, 4, 8, 16)
    recompute: tuple[str, ...] = ("none", "selective", "full")
    shards: tuple[int | None, ...] = (None, 8)


@dataclass(frozen=True)
class Layout:
    """A configuration whose layout runs on the GPUs, and its plan."""

    config: Config
    plan: ScalingPlan

    @property
    def memory(self) -> int:
        """Bytes on the fullest GPU."""
        return max(rank.total for rank in self.plan.memory)

    def fits(self, gpu: Gpu) -> bool:
        """Whether the fullest GPU holds it."""
        return self.memory <= USABLE * gpu.memory

    def __str__(self) -> str:
        parallel = self.config.parallel
        axes = [
            f"tensor {parallel.tensor_parallel_size}",
            f"pipeline {parallel.pipeline_parallel_size}",
            f"data {self.plan.data_parallel_size}",
            f"micro-batch {self.config.training.micro_batch_size}",
            f"recompute {self.config.training.recompute}",
        ]
        if parallel.virtual_pipeline_size > 1:
            axes.insert(2, f"virtual {parallel.virtual_pipeline_size}")
        if parallel.context_parallel_size > 1:
            axes.insert(2, f"context {parallel.context_parallel_size}")
        if parallel.optimizer_shard_size is not None:
            axes.append(f"shards {parallel.optimizer_shard_size}")
        return (
            f"{', '.join(axes)}: {self.plan.step_seconds:.3f} s a step, "
            f"{self.memory / 1e9:.1f} GB, {self.plan.model_flops_utilisation:.1%} of the peak"
        )


def candidates(config: Config, gpus: int, axes: Axes) -> Iterator[Config]:
    """All layouts of the axes, before the rules between settings are asked."""
    batch = config.training.global_batch_size
    for tensor, pipeline, context in product(axes.tensor, axes.pipeline, axes.context):
        model_ranks = tensor * pipeline * context
        # Most of the product fails these three divisions, which cost nothing.
        if gpus % model_ranks or pipeline > config.model.num_layers:
            continue
        replicas = gpus // model_ranks
        for virtual, micro_batch, recompute, shards in product(
            axes.virtual, axes.micro_batch, axes.recompute, axes.shards
        ):
            shared = replicas * context
            if batch % (replicas * micro_batch) or (virtual > 1 and pipeline == 1):
                continue
            if shards is not None and (shards >= shared or shared % shards):
                continue
            parallel: dict[str, Any] = {
                "tensor_parallel_size": tensor,
                "pipeline_parallel_size": pipeline,
                "virtual_pipeline_size": virtual,
                "context_parallel_size": context,
                "schedule": "interleaved_1f1b" if virtual > 1 else "1f1b",
                "pipeline_split": None,
                # Costs nothing and saves activations.
                "sequence_parallel": tensor > 1,
                "optimizer_shard_size": shards,
            }
            training = {"micro_batch_size": micro_batch, "recompute": recompute}
            yield config.model_copy(
                update={
                    "parallel": config.parallel.model_copy(update=parallel),
                    "training": config.training.model_copy(update=training),
                }
            )


def search(
    config: Config,
    gpus: int,
    gpu: Gpu,
    count: int = 4,
    axes: Axes | None = None,
    say: Say = lambda text: None,
) -> list[Layout]:
    """The `count` fastest layouts that fit, fastest first. `say` gets lines on what takes longer.

    Raises ConfigError where none fits, with the smallest number of GPUs that would do, from twice
    as many on in powers of two.
    """
    axes = axes or Axes()
    layouts = _fastest(config, gpus, gpu, count, axes)
    if layouts:
        return layouts
    raise ConfigError(
        f"--gpus {gpus}: no layout of this model fits into {gpu.memory / 1e9:.3g} GB a GPU with a "
        f"global batch of {config.training.global_batch_size} sequences. "
        f"{_enough(config, gpus, gpu, axes, say)}"
    )


def _fastest(config: Config, gpus: int, gpu: Gpu, count: int, axes: Axes) -> list[Layout]:
    bounds = Bounds(config, gpus, gpu)
    bounded = []
    for number, candidate in enumerate(candidates(config, gpus, axes)):
        if bounds.least_memory(candidate) <= USABLE * gpu.memory:
            bounded.append((bounds.least_seconds(candidate), number, candidate))
    layouts: list[Layout] = []
    for bound, _, candidate in sorted(bounded, key=lambda entry: entry[:2]):
        # What comes now is slower than all that were found.
        if len(layouts) == count and bound > layouts[-1].plan.step_seconds:
            break
        if _is_allowed(candidate, gpus) and memory_fits(candidate, gpus, gpu):
            layout = Layout(candidate, scaling_plan(candidate, gpus, gpu))
            layouts = sorted([*layouts, layout], key=order)[:count]
    return layouts


def order(layout: Layout) -> tuple[float, int, int]:
    """Faster first; of equally fast ones the leaner, then the one of fewer model-parallel ranks."""
    return layout.plan.step_seconds, layout.memory, -layout.plan.data_parallel_size


def _is_allowed(candidate: Config, gpus: int) -> bool:
    """Whether no rule between settings refuses a layout."""
    try:
        check_world(candidate, gpus)
    except ConfigError:
        return False
    return True


class Layer(NamedTuple):
    """Parameters on a rank, and bytes of activations per micro-batch."""

    parameters: int
    activations: int


class Bounds:
    """What a layout needs at least, by the plan's own model, without building its stages."""

    def __init__(self, config: Config, gpus: int, gpu: Gpu) -> None:
        self.gpus = gpus
        self.gpu = gpu
        self._forward_flops = forward_flops_per_token(config.model)
        self._layers: dict[tuple[Any, ...], Layer] = {}

    def least_seconds(self, config: Config) -> float:
        """Seconds that no step is below.

        That is compute, kernels of little compute, the update of the layers' parameters, and what
        ranks exchange in a layer; the rest of the plan only adds.
        """
        gpu = self.gpu
        parallel = config.parallel
        micro_batches = micro_batches_per_step(config, self.gpus)
        passes = 4 if config.training.recompute == "full" else 3
        flops = passes * self._forward_flops * tokens_per_step(config) / self.gpus
        bandwidth = gpu.memory_bandwidth * MEMORY_EFFICIENCY
        busy = flops / (gpu.peak_flops * MATRIX_EFFICIENCY)
        busy += micro_batches * micro_batch_bytes(config) / bandwidth
        # The ends may have fewer layers than others, but the busiest rank counts.
        layers = ceil(config.model.num_layers / parallel.pipeline_parallel_size)
        busy += micro_batches * layers * self._exposed_seconds(config)
        shards = shard_count(config, gradient_parallel_size(config, self.gpus))
        elements = layers * self._layer(config).parameters // shards
        update = optimizer_bytes(config, elements, LEAST_STATES * elements) / bandwidth
        return busy / (1 - bubble_share(parallel, micro_batches)) + update

    def _exposed_seconds(self, config: Config) -> float:
        """Seconds that a micro-batch waits for other ranks in one layer, at least."""
        gpu = self.gpu
        model = config.model
        sizes = micro_batch_sizes(config)
        tensor = config.parallel.tensor_parallel_size
        context = config.parallel.context_parallel_size
        # Two sums forward and two backward, however they are divided.
        stream = sizes.tokens * model.hidden_size * sizes.element_bytes
        sent = 4 * 2 * (tensor - 1) / tensor * stream
        link = gpu.node_bandwidth if tensor <= gpu.per_node else gpu.network_bandwidth
        seconds = 0.75 * sent / link
        # Keys and values, and their gradients.
        heads = 2 * num_query_groups(model) * head_dim(model) / tensor
        calls = 2 if config.training.recompute == "none" else 3
        keys = sizes.whole_tokens * heads * sizes.element_bytes
        link = gpu.node_bandwidth if tensor * context <= gpu.per_node else gpu.network_bandwidth
        seconds += calls * (context - 1) / context * keys / link
        return float(seconds / NETWORK_EFFICIENCY)

    def least_memory(self, config: Config) -> float:
        """Bytes that the fullest GPU needs at least: layers' parameters, state and activations."""
        parallel = config.parallel
        layer = self._layer(config)
        shards = shard_count(config, gradient_parallel_size(config, self.gpus))
        narrow = 2 if config.training.precision in ("bf16", "auto") else 0
        wide_size = wide_bytes(config)
        of_parameter = narrow + wide_size + LEAST_STATES * wide_size / shards
        # Without a narrow type a master may be the parameter itself.
        if not narrow:
            of_parameter = wide_size + wide_size / shards
        micro_batches = micro_batches_per_step(config, self.gpus)
        stages = split_stages(config.model, parallel)
        most = 0.0
        for rank in range(parallel.pipeline_parallel_size):
            rank_stages = stages[rank :: parallel.pipeline_parallel_size]
            layers = sum(stage.stop - stage.start for stage in rank_stages)
            chunks = in_flight(parallel, rank, micro_batches)
            activations = chunks * layers * layer.activations / len(rank_stages)
            most = max(most, layers * layer.parameters * of_parameter + activations)
        return SAFE * most

    def _layer(self, config: Config) -> Layer:
        """One layer of the layout, as the difference of models of two layers and one."""
        parallel = config.parallel
        training = config.training
        key = (
            parallel.tensor_parallel_size,
            parallel.context_parallel_size,
            training.micro_batch_size,
            training.recompute,
        )
        if key not in self._layers:
            shallow = _single_rank(config, 1)
            deeper = _single_rank(config, 2)
            self._layers[key] = Layer(
                deeper.parameters - shallow.parameters, deeper.activations - shallow.activations
            )
        return self._layers[key]


def _single_rank(config: Config, layers: int) -> Layer:
    """What a rank holds that has a model of so many layers to itself, but for tensor ranks."""
    alone = {"pipeline_parallel_size": 1, "virtual_pipeline_size": 1, "schedule": "1f1b"}
    short = config.model_copy(
        update={
            "model": config.model.model_copy(update={"num_layers": layers}),
            "parallel": config.parallel.model_copy(update=alone),
        }
    )
    models = rank_models(short, 0)
    layout = rank_layout(short, backward_specs(models), 1)
    return Layer(layout.size, models[0].activation_bytes(micro_batch_sizes(short)))


def _enough(config: Config, gpus: int, gpu: Gpu, axes: Axes, say: Say) -> str:
    """How many GPUs would do, as a sentence."""
    more = 2 * gpus
    while more <= MOST_GPUS:
        say(f"no layout fits {more // 2} GPUs; trying {more}")
        if any_fits(config, more, gpu, axes):
            return f"Use at least {more} GPUs, or GPUs with more memory."
        more *= 2
    return (
        f"Not even {MOST_GPUS} GPUs would do: take GPUs with more memory, another batch, or a "
        "smaller model."
    )


def any_fits(config: Config, gpus: int, gpu: Gpu, axes: Axes) -> bool:
    """Whether some layout fits, by memory alone: of the leanest ones, MOST_TRIED by their bound."""
    bounds = Bounds(config, gpus, gpu)
    bounded = []
    for number, candidate in enumerate(candidates(config, gpus, lean(axes))):
        least = bounds.least_memory(candidate)
        if least <= USABLE * gpu.memory and _is_allowed(candidate, gpus):
            bounded.append((least, number, candidate))
    leanest = sorted(bounded, key=lambda entry: entry[:2])[:MOST_TRIED]
    return any(memory_fits(candidate, gpus, gpu) for _, _, candidate in leanest)


def lean(axes: Axes) -> Axes:
    """The part of the axes that has the layouts of the least memory.

    Smaller micro-batches keep fewer activations, and divide whatever larger ones divide; virtual
    stages keep more of them; an optimizer over all ranks is the smallest on each.
    """
    by_thirst = sorted(axes.recompute, key=("full", "selective", "none").index)
    shards = (None,) if None in axes.shards else axes.shards
    return replace(
        axes,
        virtual=(min(axes.virtual),),
        micro_batch=(min(axes.micro_batch),),
        recompute=(by_thirst[0],),
        shards=shards,
    )


def memory_fits(config: Config, gpus: int, gpu: Gpu) -> bool:
    """Whether every pipeline rank holds its part; the first, mostly the fullest, is asked first.

    It costs far less than a plan, whose traffic is that of the whole model on every rank.
    """
    shared = gradient_parallel_size(config, gpus)
    micro_batches = micro_batches_per_step(config, gpus)
    for rank in range(config.parallel.pipeline_parallel_size):
        if rank_memory(config, rank, shared, micro_batches).total > USABLE * gpu.memory:
            return False
    return True
