"""The number of processes and the settings that depend on it fit each other."""

import pytest

from megatron_completep.config import check_world
from megatron_completep.errors import ConfigError
from tests.config.broken_expert_rules import EXPERTS
from tests.config.broken_rules import config_with, offered

WORLDS = [
    (8, ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"], None),
    (1, [], None),
    (
        6,
        ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"],
        (
            "2 x 2 = 4 does not divide the world size 6. Start a multiple of 4 processes, or use "
            "sizes whose product is 1, 2, 3 or 6."
        ),
    ),
    (
        3,
        [],
        (
            "64 is not a multiple of micro_batch_size x data-parallel size = 4 x 3 = 12. Use 60 "
            "or 72, or another micro_batch_size."
        ),
    ),
    (32, [], "4 x 32 = 128. Use 128, or another micro_batch_size."),
    (
        8,
        ["parallel.optimizer_shard_size=3"],
        (
            "parallel.optimizer_shard_size = 3 does not divide the data-parallel size 8 (world "
            "size 8 / 1). Use 1, 2, 4 or 8, or null."
        ),
    ),
    (8, ["parallel.optimizer_shard_size=4"], None),
    (8, ["parallel.context_parallel_size=4", "parallel.optimizer_shard_size=8"], None),
    (
        8,
        ["parallel.context_parallel_size=4", "parallel.optimizer_shard_size=3"],
        "does not divide data x context ranks = 2 x 4 = 8. Use 1, 2, 4 or 8, or null.",
    ),
    (
        6,
        ["parallel.context_parallel_size=4"],
        "pipeline_parallel_size x context_parallel_size = 1 x 1 x 4 = 4 does not divide the world",
    ),
    (
        4,
        ["parallel.pipeline_parallel_size=4", "training.global_batch_size=8"],
        (
            "makes 2 micro-batches, fewer than parallel.pipeline_parallel_size = 4, which the "
            "schedule 1f1b needs. Use training."
        ),
    ),
    (
        4,
        [
            "parallel.pipeline_parallel_size=4",
            "training.global_batch_size=8",
            "parallel.schedule=gpipe",
        ],
        None,
    ),
    (
        4,
        [
            "parallel.pipeline_parallel_size=4",
            "parallel.schedule=interleaved_1f1b",
            "parallel.virtual_pipeline_size=2",
            "training.global_batch_size=36",
        ],
        (
            "makes 9 micro-batches, which parallel.schedule = interleaved_1f1b cannot deal out in "
            "2 equal rounds over 4 stages. Use 32 or 48."
        ),
    ),
    (
        4,
        [
            "parallel.pipeline_parallel_size=4",
            "parallel.schedule=zero_bubble",
            "training.global_batch_size=40",
        ],
        None,
    ),
    (
        8,
        ["training.batch_ramp={start: 16, increment: 16, steps: 30}"],
        (
            "training.batch_ramp.start = 16 is not a multiple of micro_batch_size x data-parallel "
            "size = 4 x 8 = 32. Use 32, or another"
        ),
    ),
    (
        4,
        [
            "parallel.pipeline_parallel_size=4",
            "training.batch_ramp={start: 8, increment: 8, steps: 30}",
        ],
        (
            "training.batch_ramp: the batch size = 8 makes 2 micro-batches, fewer than "
            "parallel.pipeline_parallel_size = 4"
        ),
    ),
    (
        4,
        [
            "parallel.pipeline_parallel_size=4",
            "training.batch_ramp={start: 16, increment: 16, steps: 30}",
        ],
        None,
    ),
    (
        2,
        ["profiling.first_step=5", "profiling.ranks=[0, 2]"],
        "profiling.ranks names rank 2, but the ranks go from 0 to 1. Leave it out.",
    ),
    (2, ["profiling.first_step=5", "profiling.ranks=[0, 1]"], None),
    (2, ["training.cuda_graph=true"], "captures the step of one process, but there are 2."),
    (1, ["training.cuda_graph=true"], None),
    (
        4,
        [EXPERTS, "parallel.expert_parallel_size=4", "parallel.optimizer_shard_size=2"],
        (
            "parallel.expert_parallel_size = 4 does not divide the ranks that share a stage's "
            "state: optimizer shards x tensor ranks = 2 x 1 = 2. Use 1 or 2."
        ),
    ),
    (
        4,
        [
            EXPERTS,
            "parallel.expert_parallel_size=4",
            "parallel.tensor_parallel_size=2",
            "parallel.sequence_parallel=true",
        ],
        None,
    ),
]


@pytest.mark.parametrize(("world_size", "overrides", "expected"), WORLDS)
def test_the_number_of_processes_must_fit(world_size, overrides, expected):
    config = config_with(*overrides)
    if expected is None:
        check_world(config, world_size)
        return
    with pytest.raises(ConfigError) as caught:
        check_world(config, world_size)
    assert expected in str(caught.value)
    for word in offered(str(caught.value)):
        assert (
            count_of_problems(config_with(*overrides, word), world_size)
            == len(str(caught.value).splitlines()) - 2
        )


def test_a_batch_for_many_processes_is_offered_where_the_schedule_takes_it_too():
    """60 and 72 are multiples of 3 processes' micro-batches;
    the pipeline wants whole rounds of 4 as well.
    """
    overrides = [
        "parallel.pipeline_parallel_size=4",
        "parallel.schedule=zero_bubble",
        "training.global_batch_size=58",
    ]
    config = config_with(*overrides, "training.micro_batch_size=2")
    with pytest.raises(ConfigError) as caught:
        check_world(config, 12)
    words = offered(str(caught.value))
    assert len(words) == 2
    for word in words:
        check_world(config_with(*overrides, "training.micro_batch_size=2", word), 12)


def count_of_problems(config, world_size) -> int:
    try:
        check_world(config, world_size)
    except ConfigError as problem:
        return len(str(problem).splitlines()) - 1
    return 0


@pytest.mark.parametrize("count", range(1, 25))
def test_the_micro_batch_rule_is_the_schedules_own(count):
    """torch's interleaved schedules build exactly for the counts that we accept."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    ranks = 4
    overrides = [
        f"parallel.pipeline_parallel_size={ranks}",
        "parallel.schedule=interleaved_1f1b",
        "parallel.virtual_pipeline_size=2",
    ]
    config = config_with(
        *overrides, "training.micro_batch_size=1", f"training.global_batch_size={count}"
    )
    stage = type(
        "Stage",
        (),
        {
            "num_stages": 2 * ranks,
            "group_size": ranks,
            "group_rank": 0,
            "group": None,
            "has_backward": False,
        },
    )
    stages = [
        type("One", (stage,), {"stage_index": index, "stage_index_to_group_rank": None})()
        for index in (0, ranks)
    ]
    accepted_by_torch = True
    try:
        schedules.ScheduleInterleaved1F1B(stages, count)
    except ValueError:
        accepted_by_torch = False
    try:
        check_world(config, ranks)
        accepted_here = True
    except ConfigError:
        accepted_here = False
    assert accepted_here == accepted_by_torch
