"""Which kernels a run launches, found without a GPU and without memory, and compiled beforehand.

The run's own model and optimizer take one step on torch's `meta` device, where tensors have shapes
and no data. Every fused operator is answered by its Triton launcher, whose launches are
intercepted. So what is compiled is what the run will launch: no list of shapes has to be kept in
step with the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_completep import kernels
from megatron_completep.completep import Table, table_of
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError
from megatron_completep.kernels.ahead_of_time import Launch, compile_launch, record
from megatron_completep.kernels.library import LAUNCHERS
from megatron_completep.model.block import BRANCHES
from megatron_completep.model.gpt import GPT, ChunkRange
from megatron_completep.model.stream import dropout_seeds
from megatron_completep.optim.float8_weights import WeightScales
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.cross_entropy import LossConfig
from megatron_completep.parallel.float8 import Float8Products, float8_settings
from megatron_completep.parallel.products import Products
from megatron_completep.run.precision import DTYPES


class _LaunchInstead(TorchDispatchMode):
    """Fused operators on `meta` tensors run their launcher, not their shape function."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "completep":  # torch's own operators only compute shapes on meta
            return func(*args, **(kwargs or {}))
        name = func.name().removeprefix("completep::")
        return LAUNCHERS[name](*args)


def launches_of_run(config: Config, architecture: str) -> list[Launch]:
    """Every distinct launch of one training step on a rank of `config`'s layout.

    architecture: the GPU's, such as sm_90. Raises ConfigError for float64 and for "auto" precision.
    """
    precision = config.training.precision
    if precision not in ("bf16", "float32"):
        raise ConfigError(
            f"training.precision = {precision}: only bf16 and float32 runs launch Triton kernels. "
            "Choose one."
        )
    if config.training.float8 != "none" and architecture in ("sm_80", "sm_86"):
        raise ConfigError(
            f"training.float8 = {config.training.float8} needs float8 units, which {architecture} "
            "has not. Use float8 = none, or sm_89 and later."
        )
    launches = record(lambda: _step_without_data(config), architecture)
    # Layers launch the same kernels again and again; Triton compiles each variant once.
    distinct = {_variant(launch): launch for launch in launches}
    return list(distinct.values())


def compile_run(config: Config, architecture: str, say: Callable[[str], None]) -> int:
    """Compile every kernel of a run into Triton's cache; returns how many.

    say: receives one line a kernel.
    """
    launches = launches_of_run(config, architecture)
    for launch in launches:
        compile_launch(launch, architecture)
        module = launch.kernel.fn.__module__.rpartition(".")[2]
        say(f"{module}.{launch.name}  grid {launch.grid}  {_describe(launch)}")
    return len(launches)


def _step_without_data(config: Config) -> None:
    """Forward, backward and update of a shallow copy of the run.

    All layers are alike, and so are all ranks of an axis: two layers and one rank launch what the
    whole run does.
    """
    device = torch.device("meta")
    tensor = Axis("tensor", 0, config.parallel.tensor_parallel_size)
    context = ParallelContext(device, tensor=tensor)
    table = table_of(config)
    loss = LossConfig.of(config.training)
    products: Products = Products()
    if config.training.float8 != "none":
        products = Float8Products(products, float8_settings(config.training))
    with device:
        chunks = [
            GPT(config.model, table, context, stage, loss, products=products)
            for stage in _shallow_stages(config)
        ]
    optimizers = [_optimizer(config, chunk, table, context) for chunk in chunks]
    for optimizer in optimizers:
        if isinstance(products, Float8Products):
            WeightScales(products, optimizer.shards)

    own_length = config.model.seq_length // config.parallel.context_parallel_size
    batch = config.training.micro_batch_size, own_length
    tokens = torch.zeros(batch, dtype=torch.int64, device=device)
    seeds = None
    if config.model.dropout:
        branches = config.model.num_layers * len(BRANCHES)
        seeds = dropout_seeds(kernels.dropout_seed(0, device=device), branches)[None]
    # One process steps through all stages: what a stage returns is what the next one receives.
    with _LaunchInstead():  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.begin_step(1)
        x = tokens
        for chunk in chunks[:-1]:
            x = chunk(x, dropout_seeds=seeds)
        total = chunks[-1](x, labels=tokens, dropout_seeds=seeds)
        total.backward()
        for optimizer in optimizers:
            optimizer.step(1.0, total, torch.ones((), device=device))


def _shallow_stages(config: Config) -> list[ChunkRange]:
    """One stage, or with pipeline parallelism two: a stage's end launches a kernel of its own."""
    parallel = config.parallel
    if parallel.pipeline_parallel_size * parallel.virtual_pipeline_size == 1:
        return [ChunkRange(0, min(2, config.model.num_layers))]
    return [ChunkRange(0, 1, has_unembedding=False), ChunkRange(1, 2, has_embedding=False)]


def _optimizer(
    config: Config, chunk: GPT, table: Table, context: ParallelContext
) -> DistributedOptimizer:
    precision = DTYPES[config.training.precision]
    return DistributedOptimizer(
        [chunk], table, config.optimizer, context, config.parallel, precision
    )


def _variant(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches that Triton compiles to one kernel.

    Triton specializes on types, alignment, the integer 1, integers beyond 32 bits, and constants.
    """

    def kind(argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            # Storage begins aligned; a view may not.
            offset = argument.storage_offset() * argument.element_size()
            return str(argument.dtype), offset % 16 == 0
        if isinstance(argument, bool) or not isinstance(argument, int):
            return type(argument)
        return argument == 1, argument % 16 == 0, abs(argument) >= 2**31

    constants = sorted((name, str(constant)) for name, constant in launch.parameters.items())
    return launch.kernel.fn, tuple(map(kind, launch.arguments)), tuple(constants)


def _describe(launch: Launch) -> str:
    """The constants that the kernel is compiled with."""
    shown = []
    for name, constant in launch.parameters.items():
        if name.isupper() or name == "num_warps":
            shown.append(f"{name}={constant}")
    return " ".join(shown)
