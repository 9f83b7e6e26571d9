"""The section of the configuration on how a model is laid over ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_completep.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class ParallelConfig(Section):
    """How the model is laid over ranks; data_parallel_size follows from the world size."""

    tensor_parallel_size: PositiveInt = Field(1, description="Ranks that share each matrix.")
    pipeline_parallel_size: PositiveInt = Field(1, description="Ranks that share the depth.")
    virtual_pipeline_size: PositiveInt = Field(
        1, description="Model chunks a pipeline rank (interleaved schedules)."
    )
    context_parallel_size: PositiveInt = Field(1, description="Ranks that share a sequence.")
    context_heads_at_once: PositiveInt | None = Field(
        None,
        description="Groups of keys and values that a context rank gathers at once; the next are "
        "gathered while these are attended to. null: all in one call.",
    )
    expert_parallel_size: PositiveInt = Field(
        1,
        description="Ranks that share the experts of a layer; divides optimizer shards x tensor.",
    )
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"] = Field(
        "1f1b", description="Pipeline schedule."
    )
    pipeline_split: list[NonNegativeInt] | None = Field(
        None, description="Layers of each stage in order; null: balanced, ends counted."
    )
    sequence_parallel: bool = Field(
        False, description="Shard the residual stream along the sequence over tensor ranks."
    )
    sharding: Literal["optimizer", "gradients"] = Field(
        "optimizer",
        description="What data ranks share: optimizer state (ZeRO-1), or full gradients too, which "
        "are then reduced in every micro-batch (ZeRO-2).",
    )
    optimizer_shard_size: PositiveInt | None = Field(
        None, description="Data ranks that share the optimizer; null: all of them."
    )
    gradient_dtype: Literal["float32", "bf16"] = Field(
        "float32", description="Type in which gradients are communicated."
    )
    bucket_megabytes: PositiveFloat = Field(
        40.0,
        description="Size of a gradient bucket in MB, of up to 40 data ranks; with more it grows "
        "with their number.",
    )
    timeout_minutes: PositiveFloat = Field(
        20.0,
        description="Bound on one collective, in minutes; at least guards.hang_timeout_minutes, "
        "which can say who hangs.",
    )
    flight_recorder_entries: NonNegativeInt = Field(
        2000,
        description="Newest collectives that each rank remembers, for the watchdog to write down "
        "in a hang; 0: none.",
    )
