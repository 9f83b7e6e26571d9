"""The mesh of ranks. Everything that has to know where a rank stands is handed a `ParallelContext`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_completep.config.schema import ParallelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.launch import Launch
from megatron_completep.parallel.axis import Axis, Reduction
from megatron_completep.parallel.rendezvous import meet
from megatron_completep.parallel.sequence import SequencePart


@dataclass(frozen=True)
class ParallelContext:
    """Where this rank stands. Axes, slowest first: pipeline, data (= replica x shard), context (size 1 for now), tensor."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    tensor: Axis = field(default_factory=lambda: Axis("tensor"))
    data: Axis = field(default_factory=lambda: Axis("data"))
    shard: Axis = field(
        default_factory=lambda: Axis("shard")
    )  # data ranks that share one copy of the optimizer state
    replica: Axis = field(
        default_factory=lambda: Axis("replica")
    )  # data ranks that hold the same part of it
    pipeline: Axis = field(default_factory=lambda: Axis("pipeline"))
    world: Axis = field(default_factory=lambda: Axis("world"))
    mesh: DeviceMesh | None = None
    sequence_parallel: bool = False
    launched: bool = False  # under a launcher, even with one process

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """One process, nothing to communicate."""
        return cls(device=torch.device(device))

    @classmethod
    def create(
        cls,
        parallel: ParallelConfig,
        device: str = "auto",
        dumps: str | None = None,
        store: dist.Store | None = None,
    ) -> ParallelContext:
        """Join the process group of the ranks that the launcher started (NCCL on GPU, gloo on CPU) and lay the mesh over it.

        dumps: path to which NCCL's own watchdog appends a rank and writes the newest collectives after a time-out. store: where the ranks
        have met already (rendezvous.py); otherwise they meet now.
        Raises ConfigError with the numbers when the world size does not fit the layout, before any device is touched, and as `meet` does.
        """
        launch = Launch.from_environment()
        data_parallel_size = data_parallel_size_for(parallel, launch.world_size)
        chosen = choose_device(device, launch.local_rank)
        if launch.world_size == 1:
            return cls(device=chosen, sequence_parallel=False, launched=launch.launched)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if not dist.is_initialized():
            timeout = timedelta(minutes=parallel.timeout_minutes)
            for name, value in flight_recorder(parallel, dumps).items():
                os.environ.setdefault(name, value)
            store = store or meet(launch, timeout.total_seconds())
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                store=store,
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=timeout,
            )
        return cls.over_world(parallel, chosen, launch.rank, launch.world_size, data_parallel_size)

    @classmethod
    def over_world(
        cls,
        parallel: ParallelConfig,
        device: torch.device,
        rank: int,
        world_size: int,
        data_size: int,
    ) -> ParallelContext:
        """Lay the mesh over an initialized process group."""
        shard = parallel.optimizer_shard_size or data_size
        if data_size % shard:
            raise ConfigError(
                f"parallel.optimizer_shard_size = {shard} does not divide the data-parallel size {data_size}. Use a divisor of it, or null."
            )
        shape = (
            parallel.pipeline_parallel_size,
            data_size // shard,
            shard,
            parallel.context_parallel_size,
            parallel.tensor_parallel_size,
        )
        mesh = init_device_mesh(
            device.type, shape, mesh_dim_names=("pipeline", "replica", "shard", "context", "tensor")
        )
        flattened = mesh["replica", "shard"]._flatten("data")

        def axis(name: str) -> Axis:
            along = flattened if name == "data" else mesh[name]
            return Axis(
                name,
                along.get_local_rank(),
                along.size(),
                along.get_group() if along.size() > 1 else None,
            )

        return cls(
            device=device,
            rank=rank,
            world_size=world_size,
            tensor=axis("tensor"),
            data=axis("data"),
            shard=axis("shard"),
            replica=axis("replica"),
            pipeline=axis("pipeline"),
            world=Axis("world", rank, world_size, dist.group.WORLD if world_size > 1 else None),
            mesh=mesh,
            sequence_parallel=parallel.sequence_parallel and parallel.tensor_parallel_size > 1,
            launched=True,
        )

    def axis(self, name: str) -> Axis:
        """The axis of a name."""
        axis = getattr(self, name)
        assert isinstance(axis, Axis), name
        return axis

    @property
    def model_axes(self) -> tuple[Axis, ...]:
        """The axes whose ranks share the parameters of a stage."""
        return (self.tensor,)

    @property
    def reductions(self) -> dict[str, Reduction]:
        """The axes over which gradients are summed, by the name that a parameter's spec gives in `summed_over`."""
        return {"data": Reduction(self.shard, self.replica)}

    @property
    def sequence(self) -> SequencePart:
        """Which part of the sequence this rank holds of the residual stream."""
        return SequencePart(self.tensor, self.sequence_parallel)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the job (prints, writes metrics)."""
        return self.rank == 0

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def flight_recorder(parallel: ParallelConfig, dumps: str | None) -> dict[str, str]:
    """Environment that makes process groups, when they are made, remember their newest collectives; a user's own values hold."""
    if parallel.flight_recorder_entries == 0:
        return {}
    recorder = {
        "TORCH_FR_BUFFER_SIZE": str(parallel.flight_recorder_entries),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    return recorder if dumps is None else {**recorder, "TORCH_FR_DUMP_TEMP_FILE": dumps}


def data_parallel_size_for(parallel: ParallelConfig, world_size: int) -> int:
    """world_size / (tensor * pipeline * context); ConfigError where it does not divide."""
    model_size = (
        parallel.tensor_parallel_size
        * parallel.pipeline_parallel_size
        * parallel.context_parallel_size
    )
    if world_size % model_size:
        raise ConfigError(
            f"world size {world_size} is not a multiple of parallel.tensor_parallel_size = {parallel.tensor_parallel_size} x "
            f"pipeline_parallel_size = {parallel.pipeline_parallel_size} = {model_size}. "
            f"Launch {max(1, world_size // model_size) * model_size} processes, or change the layout."
        )
    return world_size // model_size


def choose_device(device: str, local_rank: int) -> torch.device:
    """auto: this local rank's GPU where there is one, else the CPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise ConfigError(
            f"training.device = {device}: local rank {local_rank} has no GPU, this node shows {count}. "
            "Start at most as many processes a node as it has GPUs, or use cpu."
        )
    return torch.device("cuda", local_rank)
