"""The section of the configuration that says what a run watches for."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_completep.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class GuardsConfig(Section):
    """What a run watches for.
    docs/reliability.md says what happens then, and with which exit code.
    """

    max_skipped_steps: PositiveInt = Field(
        10,
        description="Steps in a row skipped for a gradient that is not finite, after which the run "
        "stops.",
    )
    spike_threshold: PositiveFloat | None = Field(
        1.0,
        description="Nats above the median of the last 50 losses that are reported as a spike; "
        "null: none.",
    )
    rollback_threshold: PositiveFloat | None = Field(
        None,
        description="Nats above that median at which the run goes back to the checkpoint before "
        "and leaves out the data since; null: never.",
    )
    rollback_skip_steps: NonNegativeInt = Field(
        0, description="Steps of data that a rollback leaves out beyond those up to the spike."
    )
    max_rollbacks: PositiveInt = Field(
        3, description="Rollbacks of a whole run; at the next one needed, the run stops."
    )
    replica_check_interval: PositiveInt | None = Field(
        500,
        description="Steps between comparisons of what several ranks must hold alike; null: never.",
    )
    hang_timeout_minutes: PositiveFloat | None = Field(
        15.0,
        description="Minutes without a finished step after which the watchdog dumps stacks and "
        "leaves; longer than a validation and the first step; null: never.",
    )
    straggler_interval: PositiveInt | None = Field(
        100, description="Steps between comparisons of the ranks' own times; null: never."
    )
    straggler_ratio: Annotated[float, Field(gt=1)] = Field(
        1.5, description="Times the median rank's time from which a rank is reported."
    )
    gc_interval: PositiveInt | None = Field(
        100,
        description="Steps between Python's garbage collections, on all ranks after the same step; "
        "null: whenever Python likes.",
    )
    lock_wait_seconds: NonNegativeFloat = Field(
        30.0, description="How long a start waits for another run in the same output_dir to end."
    )
    max_restarts_without_progress: PositiveInt = Field(
        3,
        description="Restarts by torchrun in a row that find the same step, after which the run "
        "stops.",
    )
