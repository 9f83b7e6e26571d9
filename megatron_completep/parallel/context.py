"""The mesh of ranks. Whatever has to know where a rank stands is handed a `ParallelContext`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_completep.config.derived import model_parallel_size, model_parallel_sizes
from megatron_completep.config.schema import ParallelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.launch import Launch, set_defaults
from megatron_completep.parallel.axis import Axis, Reduction
from megatron_completep.parallel.context_part import ContextPart
from megatron_completep.parallel.rendezvous import rendezvous_store
from megatron_completep.parallel.sequence import SequencePart


@dataclass(frozen=True)
class ParallelContext:
    """Where this rank stands in the mesh.

    The mesh is pipeline x gradient x tensor, slowest first. The ranks of the gradient axis have the
    same parameters and see different tokens. The axis is divided in two ways: into data x context,
    which says what tokens a rank reads, and into replica x shard, which says what part of the
    optimizer's state it keeps.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    tensor: Axis = field(default_factory=lambda: Axis("tensor"))
    pipeline: Axis = field(default_factory=lambda: Axis("pipeline"))
    gradient: Axis = field(default_factory=lambda: Axis("gradient"))  # gradients are summed over it
    data: Axis = field(default_factory=lambda: Axis("data"))  # ranks that read other sequences
    context: Axis = field(default_factory=lambda: Axis("context"))  # ranks that share a sequence
    shard: Axis = field(default_factory=lambda: Axis("shard"))  # ranks that share optimizer state
    replica: Axis = field(default_factory=lambda: Axis("replica"))  # ranks with the same state
    world: Axis = field(default_factory=lambda: Axis("world"))
    expert_size: int = 1  # ranks of `stage` that share the experts of a layer
    sequence_parallel: bool = False
    heads_at_once: int | None = None  # see `ContextPart`
    launched: bool = False  # under a launcher, even with one process
    mesh: DeviceMesh | None = None  # that has the axes shard and tensor, where both have ranks

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
        """Join the process group of the ranks that the launcher started, and lay the mesh over it.

        The group uses NCCL on GPUs and gloo on CPUs.

        dumps: path to which NCCL's own watchdog appends a rank and writes the newest collectives
            after a time-out.
        store: where the ranks have met already (rendezvous.py); otherwise they meet now.

        Raises ConfigError, with the numbers, when the world size does not fit the layout, before
        any device is touched; and as `rendezvous_store` does.
        """
        launch = Launch.from_environment()
        data_parallel_size = data_parallel_size_for(parallel, launch.world_size)
        # Refused here, a wrong device is one message; later it would be a hang of the other ranks.
        chosen = choose_device(device, launch.local_rank)
        if launch.world_size == 1:
            return cls(device=chosen, sequence_parallel=False, launched=launch.launched)
        if chosen.type == "cuda":
            # NCCL binds a communicator to the device that is current when it is made.
            torch.cuda.set_device(chosen)
        if not dist.is_initialized():
            timeout = timedelta(minutes=parallel.timeout_minutes)
            set_defaults(flight_recorder(parallel, dumps))
            store = store or rendezvous_store(launch, timeout.total_seconds())
            dist.init_process_group(
                **backend_options(chosen),
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
        """Lay the mesh over an initialized process group.

        Raises ConfigError when the optimizer's shards do not divide the gradient axis.
        """
        context_size = parallel.context_parallel_size
        gradient_size = data_size * context_size
        shard_size = parallel.optimizer_shard_size or gradient_size
        if gradient_size % shard_size:
            raise ConfigError(
                f"parallel.optimizer_shard_size = {shard_size} does not divide the ranks of data x "
                f"context, {gradient_size}. Use a divisor of it, or null."
            )
        pipeline_size = parallel.pipeline_parallel_size
        tensor_size = parallel.tensor_parallel_size
        # The tensor axis is the fastest: its ranks communicate most, and neighbours share a node.
        # The pipeline is the slowest: its stages exchange one tensor a micro-batch.
        mesh = init_device_mesh(
            device.type,
            (pipeline_size, gradient_size, tensor_size),
            mesh_dim_names=("pipeline", "gradient", "tensor"),
        )
        gradient = _axis_of(mesh, "gradient")
        data, context = _divide(mesh, gradient, ("data", "context"), context_size)
        replica, shard = _divide(mesh, gradient, ("replica", "shard"), shard_size)
        return cls(
            mesh=mesh,
            device=device,
            rank=rank,
            world_size=world_size,
            tensor=_axis_of(mesh, "tensor"),
            pipeline=_axis_of(mesh, "pipeline"),
            gradient=gradient,
            data=data,
            context=context,
            shard=shard,
            replica=replica,
            world=Axis("world", rank, world_size, dist.group.WORLD if world_size > 1 else None),
            expert_size=parallel.expert_parallel_size,
            sequence_parallel=parallel.sequence_parallel and tensor_size > 1,
            heads_at_once=parallel.context_heads_at_once,
            launched=True,
        )

    def axis(self, name: str) -> Axis:
        """The axis of a name."""
        axis = getattr(self, name)
        assert isinstance(axis, Axis), name
        return axis

    def sharing(self, summed_over: str) -> tuple[Axis, ...]:
        """The axes whose ranks share the parameters whose gradients are summed over an axis.

        Together with the shards of that axis they are all ranks of `stage`.
        """
        return (self.expert,) if summed_over == self.expert_data.name else (self.tensor,)

    def reduction(self, summed_over: str) -> Reduction:
        """How gradients are summed over an axis that a `Spec.summed_over` names."""
        if summed_over == self.gradient.name:
            return Reduction(self.shard, self.replica)
        return Reduction(self.expert_data, self.replica)

    @cached_property
    def context_part(self) -> ContextPart:
        """Which tokens of a sequence this rank holds."""
        return ContextPart(self.context, self.heads_at_once)

    @cached_property  # every layer asks for it several times a step
    def sequence(self) -> SequencePart:
        """Which part of this rank's tokens it holds of the residual stream."""
        return SequencePart(self.tensor, self.sequence_parallel)

    @cached_property
    def stage(self) -> Axis:
        """The ranks that together hold one copy of a pipeline stage's optimizer state.

        They are those of shard x tensor, the tensor ranks of a shard side by side. The first call
        makes a process group where both axes have several ranks, so that it is collective.
        """
        if self.tensor.size == 1:
            return replace(self.shard, name="stage")
        if self.shard.size == 1:
            return replace(self.tensor, name="stage")
        assert self.mesh is not None
        return _flattened(self.mesh, self.shard, self.replica, self.gradient)

    @property
    def expert(self) -> Axis:
        """Ranks that share the experts of a layer: neighbours in `stage`.

        Their process groups are made by `make_expert_groups`.
        """
        return self._expert_axes[1]

    @property
    def expert_data(self) -> Axis:
        """Ranks of `stage` that hold the same experts, over which their gradients are summed."""
        return self._expert_axes[0]

    @cached_property
    def _expert_axes(self) -> tuple[Axis, Axis]:
        stage_size = self.shard.size * self.tensor.size
        place = self.shard.rank * self.tensor.size + self.tensor.rank
        data = Axis("expert_data", place // self.expert_size, stage_size // self.expert_size)
        return data, Axis("expert", place % self.expert_size, self.expert_size)

    def make_expert_groups(self) -> None:
        """Give the axes of experts their process groups, once. Collective over the whole mesh.

        Every rank calls it before a model with experts is built, also for a stage without any.
        """
        data, expert = self._expert_axes
        if self.mesh is None or data.group is not None or expert.group is not None:
            return
        groups = _expert_groups(self, data, expert)
        axes = replace(data, group=groups[0]), replace(expert, group=groups[1])
        # What the property keeps; the context itself is frozen.
        self.__dict__["_expert_axes"] = axes

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the job (prints, writes metrics)."""
        return self.rank == 0

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _axis_of(mesh: DeviceMesh, name: str) -> Axis:
    """One dimension of a mesh as this rank sees it."""
    line = mesh[name]
    group = line.get_group() if line.size() > 1 else None
    return Axis(name, line.get_local_rank(), line.size(), group)


def _divide(
    mesh: DeviceMesh, axis: Axis, names: tuple[str, str], inner_size: int
) -> tuple[Axis, Axis]:
    """Two axes (outer, inner) in place of one dimension of a mesh; inner ranks are neighbours."""
    outer_name, inner_name = names
    # Where one of the two has a single rank, the other one is the axis itself, with its group:
    # every process group costs connections.
    if inner_size == 1:
        return replace(axis, name=outer_name), Axis(inner_name)
    if inner_size == axis.size:
        return Axis(outer_name), replace(axis, name=inner_name)
    sizes = axis.size // inner_size, inner_size
    divided = mesh._unflatten(axis.name, sizes, names)
    return _axis_of(divided, outer_name), _axis_of(divided, inner_name)


def _flattened(mesh: DeviceMesh, shard: Axis, replica: Axis, gradient: Axis) -> Axis:
    """The axes shard and tensor of the mesh as one."""
    inner = gradient.name
    if replica.size > 1:
        sizes = (replica.size, shard.size)
        mesh = mesh._unflatten(gradient.name, sizes, (replica.name, shard.name))
        inner = shard.name
    flat = mesh[inner, "tensor"]._flatten("stage")
    return Axis("stage", flat.get_local_rank(), flat.size(), flat.get_group())


Group = dist.ProcessGroup | None


def _expert_groups(context: ParallelContext, data: Axis, expert: Axis) -> tuple[Group, Group]:
    """The groups of `expert_data` and `expert`. Groups that exist already are used again."""
    if data.size == 1:
        return None, context.stage.group
    if expert.size == 1:
        return context.stage.group, None
    # Every tensor rank of a shard has experts of its own.
    if expert.size == context.tensor.size:
        return context.shard.group, context.tensor.group
    # The ranks of a stage and replica lie side by side: shards, and in each of them tensor ranks.
    sharing: list[list[int]] = []
    alike: list[list[int]] = []
    stage_size = data.size * expert.size
    for first in range(0, context.world_size, stage_size):
        behind = first + stage_size
        sharing += (list(range(i, i + expert.size)) for i in range(first, behind, expert.size))
        alike += (list(range(first + i, behind, expert.size)) for i in range(expert.size))
    expert_group, _ = dist.new_subgroups_by_enumeration(sharing)
    data_group, _ = dist.new_subgroups_by_enumeration(alike)
    return data_group, expert_group


def backend_options(device: torch.device) -> dict[str, Any]:
    """The library of the process group on a device, and what it is told of the device.

    NCCL that knows the device makes its communicator at once, so that a fault shows where the ranks
    meet, and splits those of the axes off it. Otherwise each axis would connect all of its ranks at
    its first collective.
    """
    if device.type == "cuda":
        return {"backend": "nccl", "device_id": device}
    return {"backend": "gloo"}


def flight_recorder(parallel: ParallelConfig, dumps: str | None) -> dict[str, str]:
    """Environment variables that make process groups remember their newest collectives.

    They are read when a group is made. A variable that the user has set keeps its value.
    """
    if parallel.flight_recorder_entries == 0:
        return {}
    recorder = {
        "TORCH_FR_BUFFER_SIZE": str(parallel.flight_recorder_entries),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    return recorder if dumps is None else {**recorder, "TORCH_FR_DUMP_TEMP_FILE": dumps}


def data_parallel_size_for(parallel: ParallelConfig, world_size: int) -> int:
    """world_size / (tensor * pipeline * context); ConfigError where it does not divide."""
    model_size = model_parallel_size(parallel)
    if world_size % model_size:
        fitting_size = max(1, world_size // model_size) * model_size
        raise ConfigError(
            f"world size {world_size} is not a multiple of {model_parallel_sizes(parallel)}. "
            f"Launch {fitting_size} processes, or change the layout."
        )
    return world_size // model_size


def choose_device(device: str, local_rank: int) -> torch.device:
    """auto: this local rank's GPU where there is one, else the CPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    # Two processes on one GPU would be slow and run out of memory, without a word.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise ConfigError(
            f"training.device = {device}: local rank {local_rank} has no GPU, "
            f"this node shows {count}. "
            "Start at most as many processes a node as it has GPUs, or use cpu."
        )
    return torch.device("cuda", local_rank)
