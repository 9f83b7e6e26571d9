"""Values that follow from several settings."""

from megatron_completep.config import derived
from tests.config.broken_rules import config_with


def test_derived_values_follow_from_the_configuration():
    config = config_with("parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2")
    assert derived.head_dim(config.model) == 16
    assert derived.num_query_groups(config.model) == 16
    assert derived.padded_vocab_size(config.model, 1) == 4096
    assert derived.padded_vocab_size(config.model, 32) == 4096
    assert derived.padded_vocab_size(config.model, 64) == 8192
    assert derived.warmup_steps(config.optimizer, 100) == 10
    assert derived.decay_steps(config.optimizer, 100) == 20
    assert derived.tokens_per_step(config) == 64 * 256
    assert derived.data_parallel_size(config, 8) == 2
    assert derived.micro_batches_per_step(config, 8) == 8


def test_the_batch_grows_in_equal_parts_of_the_ramp():
    training = config_with("training.batch_ramp={start: 16, increment: 16, steps: 10}").training
    sizes = [derived.batch_size(training, step) for step in range(1, 101)]
    assert sizes == [16] * 4 + [32] * 3 + [48] * 3 + [64] * 90  # three sizes share ten steps
    assert derived.batch_sizes(training) == [16, 32, 48, 64]
    assert [derived.samples_before(training, step) for step in range(1, 101)] == [
        sum(sizes[: step - 1]) for step in range(1, 101)
    ]
    assert derived.total_samples(training) == sum(sizes)
    assert derived.total_samples(config_with().training) == 6400


def test_ranges_of_steps_to_skip_hold_both_their_ends():
    training = config_with("training.skip_steps=[{first: 3}, {first: 7, last: 9}]").training
    assert [step for step in range(1, 101) if derived.is_passed_over(training, step)] == [
        3,
        7,
        8,
        9,
    ]
