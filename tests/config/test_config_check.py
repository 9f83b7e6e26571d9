"""Settings that do not fit each other are refused before any device is touched, with numbers and a
remedy.
"""

import random
import re

import pytest

from megatron_completep.config import check_config, check_world, config_from_mapping, derived
from megatron_completep.errors import ConfigError

BASE = {
    "model": {
        "hidden_size": 256,
        "num_layers": 8,
        "num_attention_heads": 16,
        "ffn_hidden_size": 1024,
        "vocab_size": 4000,
        "seq_length": 256,
    },
    "optimizer": {"base_lr": 1e-3, "warmup_fraction": 0.1},
    "data": {"train": [{"prefix": "a"}, {"prefix": "b"}]},
    "training": {
        "micro_batch_size": 4,
        "global_batch_size": 64,
        "train_steps": 100,
        "output_dir": "runs/test",
    },
}


def config_with(*overrides: str):
    return config_from_mapping(BASE, overrides)


RULES = [
    (
        ["model.num_attention_heads=3"],
        "model.num_attention_heads = 3 does not divide model.hidden_size = 256. Use 1, 2, 4, 8, ",
    ),
    (
        ["model.num_query_groups=3"],
        (
            "model.num_query_groups = 3 does not divide model.num_attention_heads = 16. Use 1, 2, "
            "4, 8 or 16."
        ),
    ),
    (
        ["model.head_dim=15"],
        (
            "model.position = rope turns pairs of elements, but a head has 15. Use an even "
            "model.head_dim."
        ),
    ),
    (
        ["model.tied_embeddings=true", "completep.factors.unembedding.lr=2"],
        "Move the factors to completep.factors.embedding, or untie.",
    ),
    (
        ["model.fp32_residual=true", "training.precision=float32"],
        "no meaning under training.precision = float32",
    ),
    (
        ["model.attention_backend=flash_attention", "model.position=alibi"],
        "which model.position = alibi needs. Use model.attention_backend = sdpa.",
    ),
    (
        ["model.attention_backend=flash_attention", "training.precision=float32"],
        "computes in bf16 only, but training.precision = float32.",
    ),
    (
        ["model.attention_backend=flash_attention", "training.device=cpu"],
        "runs on GPUs only, but training.device = cpu.",
    ),
    (
        ["model.attention_backend=flash_attention", "model.head_dim=512"],
        "at most 256 elements, but these have 512.",
    ),
    (
        ["completep.base_hidden_size=64"],
        (
            "completep.base_hidden_size = 64 is given and completep.base_num_layers is null. Give "
            "the proxy's whole shape "
        ),
    ),
    (["completep.base_num_layers=2"], "(this model's own hidden_size is 256), or neither."),
    (
        ["completep.base_head_dim=64"],
        "completep.base_head_dim = 64 is given without the proxy's shape.",
    ),
    (
        ["completep.parameterization=mup", "completep.alpha=0.5"],
        "completep.alpha = 0.5 has no effect under completep.parameterization = mup",
    ),
    (
        ["completep.parameterization=sp", "completep.alpha=0.5"],
        "completep.alpha = 0.5 has no effect under completep.parameterization = sp",
    ),
    (
        ["parallel.tensor_parallel_size=3", "model.ffn_hidden_size=1023"],
        "parallel.tensor_parallel_size = 3 does not divide model.num_attention_heads = 16. Use 1.",
    ),
    (
        ["parallel.tensor_parallel_size=16", "model.ffn_hidden_size=1000"],
        "does not divide model.ffn_hidden_size = 1000. Use 1, 2, 4 or 8.",
    ),
    (
        [
            "parallel.tensor_parallel_size=8",
            "parallel.sequence_parallel=true",
            "model.seq_length=100",
        ],
        (
            "parallel.tensor_parallel_size = 8 does not divide model.seq_length = 100 "
            "(parallel.sequence_parallel is on). Use 1, 2 or 4."
        ),
    ),
    (
        [
            "model.num_attention_heads=12",
            "model.num_query_groups=6",
            "model.head_dim=64",
            "parallel.tensor_parallel_size=4",
        ],
        "parallel.tensor_parallel_size = 4 does not divide model.num_query_groups = 6 (each "
        "rank holds whole groups of keys and values). "
        "Use 1 or 2.",
    ),
    (
        ["model.num_query_groups=2", "parallel.tensor_parallel_size=4"],
        "parallel.tensor_parallel_size = 4 does not divide model.num_query_groups = 2",
    ),
    (
        [
            "training.compile=true",
            "model.attention_backend=flash_attention",
            "data.reset_at_document_ends=true",
        ],
        (
            "training.compile = true does not go with model.attention_backend = flash_attention "
            "and data.reset_at_document_ends = true: "
        ),
    ),
    (
        ["parallel.pipeline_parallel_size=9"],
        (
            "parallel.pipeline_parallel_size x virtual_pipeline_size = 9 x 1 makes 9 stages of "
            "model.num_layers = 8"
        ),
    ),
    (
        ["parallel.virtual_pipeline_size=2"],
        (
            "virtual_pipeline_size = 2 has no meaning at parallel.pipeline_parallel_size = 1. Set "
            "it to 1."
        ),
    ),
    (
        ["parallel.virtual_pipeline_size=2", "parallel.pipeline_parallel_size=2"],
        "does not go with parallel.schedule = 1f1b.",
    ),
    (
        ["parallel.schedule=interleaved_1f1b", "parallel.pipeline_parallel_size=2"],
        "needs virtual_pipeline_size of at least 2, found 1.",
    ),
    (
        ["parallel.pipeline_split=[4,4]"],
        (
            "parallel.pipeline_split has 2 stages, but parallel.pipeline_parallel_size x "
            "virtual_pipeline_size = 1 x 1 makes 1."
        ),
    ),
    (
        ["parallel.pipeline_parallel_size=2", "parallel.pipeline_split=[4,5]"],
        "adds up to 9, but model.num_layers = 8.",
    ),
    (
        ["parallel.pipeline_parallel_size=3", "parallel.pipeline_split=[4,0,4]"],
        "leaves a stage in the middle empty.",
    ),
    (["optimizer.betas=[0.9,1.0]"], "optimizer.betas.1 = 1.0 is not less than 1"),
    (
        ["optimizer.warmup_steps=5"],
        (
            "optimizer.warmup_fraction = 0.1 and optimizer.warmup_steps = 5 are both given. Set "
            "one of the two to null."
        ),
    ),
    (
        ["optimizer.warmup_fraction=null", "optimizer.warmup_steps=101"],
        "optimizer.warmup_steps = 101 is more than training.train_steps = 100.",
    ),
    (
        ["optimizer.schedule=warmup_stable_decay", "optimizer.decay_fraction=0.95"],
        "10 steps of warm-up and 95 of decay (decay_fraction = 0.95) are more than "
        "training.train_steps = 100. "
        "Use a decay_fraction of at most 0.9.",
    ),
    (
        ["data.validation=[{prefix: c}]", "data.split='9,1,0'"],
        "data.split = '9,1,0' and data.validation are both given.",
    ),
    (["data.validation=[]"], "data.validation = [] names no source. Use null"),
    (["data.split='9,1'"], "data.split = '9,1' has 2 parts. Write the three parts"),
    (["data.split=most"], "data.split = 'most' is not a list of numbers."),
    (["data.split='0,1,0'"], "data.split = '0,1,0' leaves nothing for training."),
    (["data.split='9,-1,0'"], "has a part below zero"),
    (["data.split='9,nan,0'"], "has a part below zero or without bound"),
    (
        ["data.train.1.weight=2", "data.train.1.epochs=3"],
        "data.train.1: weight = 2.0 and epochs = 3.0 are both given for b.",
    ),
    (
        ["data.tokenizer={type: bytes, model: x}"],
        "data.tokenizer.model = 'x' is not used by data.tokenizer.type = bytes.",
    ),
    (
        ["data.tokenizer={type: sentencepiece}"],
        "data.tokenizer.model is null, but data.tokenizer.type = sentencepiece needs one.",
    ),
    (
        ["training.micro_batch_size=3"],
        (
            "training.micro_batch_size = 3 does not divide training.global_batch_size = 64. Use "
            "1, 2, 4, 8, 16, 32 or 64."
        ),
    ),
    (
        ["checkpoint.interval=300", "checkpoint.keep_every=1000"],
        "checkpoint.keep_every = 1000 is not a multiple of checkpoint.interval = 300",
    ),
    (
        ["training.batch_ramp={start: 64, increment: 8, steps: 10}"],
        "training.batch_ramp.start = 64 is not less than training.global_batch_size = 64.",
    ),
    (
        ["training.batch_ramp={start: 16, increment: 20, steps: 10}"],
        (
            "training.batch_ramp.increment = 20 does not lead from start = 16 to "
            "training.global_batch_size = 64. Use 4, 8, 12, 16, 24 or 48."
        ),
    ),
    (
        ["training.batch_ramp={start: 16, increment: 16, steps: 200}"],
        "training.batch_ramp.steps = 200 is more than training.train_steps = 100",
    ),
    (
        ["training.batch_ramp={start: 8, increment: 14, steps: 10}"],
        (
            "training.batch_ramp.increment = 14 is not a multiple of training.micro_batch_size = "
            "4. Use 8 or 28."
        ),
    ),
    (
        ["training.skip_steps=[{first: 9, last: 8}]"],
        "training.skip_steps.0: last = 8 is less than first = 9. Exchange them.",
    ),
    (
        ["training.skip_steps=[{first: 101}]"],
        "training.skip_steps.0: step 101 is after training.train_steps = 100. Use at most 100.",
    ),
    (
        ["profiling.first_step=99", "profiling.steps=3"],
        (
            "end after training.train_steps = 100. Begin at 98 or earlier, and record at most 100 "
            "steps."
        ),
    ),
    (
        ["guards.hang_timeout_minutes=30"],
        (
            "guards.hang_timeout_minutes = 30 is more than parallel.timeout_minutes = 20: the "
            "collective's time-out would end a hang first"
        ),
    ),
    (
        ["guards.rollback_threshold=2", "data.order=megatron"],
        "guards.rollback_threshold = 2 does not go with data.order = megatron",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "expected"), RULES, ids=[" ".join(overrides) for overrides, _ in RULES]
)
def test_settings_that_do_not_fit_are_refused_with_numbers_and_remedy(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        config_with(*overrides)
    lines = str(caught.value).splitlines()
    assert lines[0] == "configuration: 1 setting does not fit the others"
    assert len(lines) == 2 and expected in lines[1]


# What the words of a remedy say, as overrides; remedies that are numbers are read from the message.
IN_WORDS = {
    "model.num_attention_heads=3": [["model.head_dim=64"]],
    "model.head_dim=15": [["model.head_dim=16"]],
    "model.tied_embeddings=true completep.factors.unembedding.lr=2": [
        ["completep.factors={embedding: {lr: 2}}"],
        ["model.tied_embeddings=false"],
    ],
    "model.fp32_residual=true training.precision=float32": [
        ["model.fp32_residual=false"],
        ["training.precision=bf16"],
    ],
    "model.attention_backend=flash_attention model.position=alibi": [
        ["model.attention_backend=sdpa"]
    ],
    "model.attention_backend=flash_attention training.precision=float32": [
        ["model.attention_backend=sdpa"],
        ["training.precision=bf16"],
    ],
    "model.attention_backend=flash_attention training.device=cpu": [
        ["model.attention_backend=sdpa"]
    ],
    "model.attention_backend=flash_attention model.head_dim=512": [
        ["model.attention_backend=sdpa"]
    ],
    "completep.base_hidden_size=64": [
        ["completep.base_num_layers=8"],
        ["completep.base_hidden_size=null"],
    ],
    "completep.base_num_layers=2": [
        ["completep.base_hidden_size=256"],
        ["completep.base_num_layers=null"],
    ],
    "completep.base_head_dim=64": [
        ["completep.base_hidden_size=64", "completep.base_num_layers=2"]
    ],
    "completep.parameterization=mup completep.alpha=0.5": [
        ["completep.alpha=1"],
        ["completep.parameterization=completep"],
    ],
    "completep.parameterization=sp completep.alpha=0.5": [
        ["completep.alpha=1"],
        ["completep.parameterization=completep"],
    ],
    (
        "training.compile=true model.attention_backend=flash_attention "
        "data.reset_at_document_ends=true"
    ): [
        ["model.attention_backend=sdpa"],
        ["training.compile=false"],
    ],
    "parallel.pipeline_parallel_size=9": [["parallel.pipeline_parallel_size=8"]],
    "parallel.virtual_pipeline_size=2": [["parallel.virtual_pipeline_size=1"]],
    "parallel.virtual_pipeline_size=2 parallel.pipeline_parallel_size=2": [
        ["parallel.schedule=interleaved_1f1b"],
        ["parallel.schedule=zero_bubble"],
        ["parallel.virtual_pipeline_size=1"],
    ],
    "parallel.schedule=interleaved_1f1b parallel.pipeline_parallel_size=2": [
        ["parallel.virtual_pipeline_size=2"],
        ["parallel.schedule=1f1b"],
    ],
    "parallel.pipeline_split=[4,4]": [["parallel.pipeline_split=[8]"]],
    "parallel.pipeline_parallel_size=2 parallel.pipeline_split=[4,5]": [
        ["parallel.pipeline_split=[4,4]"],
        ["model.num_layers=9"],
    ],
    "parallel.pipeline_parallel_size=3 parallel.pipeline_split=[4,0,4]": [
        ["parallel.pipeline_split=[0,8,0]"]
    ],
    "optimizer.betas=[0.9,1.0]": [["optimizer.betas=[0.9,0.9]"], ["optimizer.betas=[0.9,0.95]"]],
    "optimizer.warmup_steps=5": [
        ["optimizer.warmup_steps=null"],
        ["optimizer.warmup_fraction=null"],
    ],
    "optimizer.warmup_fraction=null optimizer.warmup_steps=101": [["optimizer.warmup_steps=100"]],
    "optimizer.schedule=warmup_stable_decay optimizer.decay_fraction=0.95": [
        ["optimizer.decay_fraction=0.9"]
    ],
    "data.validation=[{prefix: c}] data.split='9,1,0'": [
        ["data.validation=null"],
        ["data.split=null"],
    ],
    "data.validation=[]": [["data.validation=null"]],
    "data.split='9,1'": [["data.split='969,30,1'"]],
    "data.split=most": [["data.split='969,30,1'"]],
    "data.split='0,1,0'": [["data.split='969,30,1'"]],
    "data.split='9,-1,0'": [["data.split='969,30,1'"]],
    "data.split='9,nan,0'": [["data.split='969,30,1'"]],
    "data.train.1.weight=2 data.train.1.epochs=3": [
        ["data.train.1.weight=null"],
        ["data.train.1.epochs=null"],
    ],
    "data.tokenizer={type: bytes, model: x}": [["data.tokenizer={type: bytes}"]],
    "data.tokenizer={type: sentencepiece}": [
        ["data.tokenizer.model=x"],
        ["data.tokenizer.type=bytes"],
    ],
    "training.batch_ramp={start: 64, increment: 8, steps: 10}": [["training.batch_ramp=null"]],
    "training.batch_ramp={start: 16, increment: 16, steps: 200}": [
        ["training.batch_ramp.steps=100"]
    ],
    "training.skip_steps=[{first: 9, last: 8}]": [["training.skip_steps=[{first: 8, last: 9}]"]],
    "training.skip_steps=[{first: 101}]": [["training.skip_steps=[{first: 100}]"]],
    "profiling.first_step=99 profiling.steps=3": [
        ["profiling.first_step=98"],
        ["profiling.first_step=1", "profiling.steps=100"],
    ],
    "guards.hang_timeout_minutes=30": [["parallel.timeout_minutes=30"]],
    "guards.rollback_threshold=2 data.order=megatron": [
        ["data.order=permutation"],
        ["guards.rollback_threshold=null"],
    ],
}


def offered(message: str) -> list[str]:
    """The values that a message offers for a setting of its own, as overrides."""
    words = []
    for line in message.splitlines():
        if found := re.search(
            r"Use (?:([a-z_.]+) = )?(\d+(?:, \d+)*(?: or \d+)?)(?=[.,]| or another)", line
        ):
            setting = found[1] or line.split(" = ")[0].rsplit(" ", 1)[-1]
            words += [f"{setting}={value}" for value in re.findall(r"\d+", found[2])]
    return words


@pytest.mark.parametrize(
    ("overrides", "expected"), RULES, ids=[" ".join(overrides) for overrides, _ in RULES]
)
def test_every_remedy_is_accepted(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        config_with(*overrides)
    in_words = IN_WORDS.get(" ".join(overrides), [])
    remedies = [[word] for word in offered(str(caught.value))] + in_words
    assert remedies, (
        "the message offers nothing that this test understands: say in IN_WORDS what it means"
    )
    for remedy in remedies:
        config_with(*overrides, *remedy)


TWO_RULES = [
    # 8 and 24 leave heads of odd size to rope
    (["model.hidden_size=24", "model.num_attention_heads=5"], "Use 1, 2, 3, 4, 6 or 12,"),
    (
        [
            "model.num_attention_heads=12",
            "model.head_dim=64",
            "model.num_query_groups=5",
            "parallel.tensor_parallel_size=4",
        ],
        "Use 4 or 12.",
    ),
    # 12 and 16 do not lead from 8 to 64
    (["training.batch_ramp={start: 8, increment: 14, steps: 10}"], "Use 8 or 28."),
    (
        [
            "training.batch_ramp={start: 10, increment: 12, steps: 10}",
            "training.micro_batch_size=2",
        ],
        "Use 2, 6, 18 or 54.",
    ),
    (
        [
            "optimizer.schedule=warmup_stable_decay",
            "optimizer.warmup_fraction=null",
            "optimizer.warmup_steps=101",
        ],
        "Use at most 80.",  # 20 steps of decay follow
    ),
    (
        [
            "training.train_steps=3000",
            "optimizer.schedule=warmup_stable_decay",
            "optimizer.warmup_fraction=null",
        ]
        + ["optimizer.warmup_steps=1000", "optimizer.decay_fraction=0.9"],
        "Use a decay_fraction of at most 0.666.",  # 0.667 would be 2001 steps
    ),
    (["guards.hang_timeout_minutes=30.1234567"], "Use a timeout_minutes of at least 30.1234567."),
    # two chunks want 16 layers
    (
        ["parallel.schedule=interleaved_1f1b", "parallel.pipeline_parallel_size=8"],
        "Use the schedule 1f1b.",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "remedy"), TWO_RULES, ids=[" ".join(overrides) for overrides, _ in TWO_RULES]
)
def test_a_value_with_two_rules_is_offered_only_where_both_accept_it(overrides, remedy):
    with pytest.raises(ConfigError) as caught:
        config_with(*overrides)
    assert remedy in str(caught.value)
    for word in offered(str(caught.value)):
        config_with(*overrides, word)


def test_whatever_is_wrong_alone_is_right_with_any_value_that_is_offered():
    draw = random.Random(5)
    tried = 0
    for _ in range(400):
        heads, micro, total = draw.randint(1, 24), draw.randint(1, 6), draw.randint(4, 96)
        overrides = [
            f"model.num_attention_heads={heads}",
            f"model.num_query_groups={draw.randint(1, heads)}",
        ]
        overrides += [
            f"parallel.tensor_parallel_size={draw.choice([1, 1, 2, 3, 4])}",
            f"model.hidden_size={draw.choice([256, 240, 72])}",
        ]
        overrides += [f"training.micro_batch_size={micro}", f"training.global_batch_size={total}"]
        if draw.random() < 0.5:
            ramp = (
                f"{{start: {draw.randint(1, total)}, increment: {draw.randint(1, 24)}, steps: 9}}"
            )
            overrides.append(f"training.batch_ramp={ramp}")
        try:
            config_with(*overrides)
        except ConfigError as problem:
            message = str(problem)
            if len(message.splitlines()) == 2:
                for word in offered(message):
                    config_with(*overrides, word)
                    tried += 1
    assert tried > 100


FITTING = [
    [],
    ["model.num_attention_heads=3", "model.head_dim=64"],
    ["model.head_dim=15", "model.position=alibi"],
    ["model.num_query_groups=4", "parallel.tensor_parallel_size=4"],
    ["model.num_query_groups=8", "parallel.tensor_parallel_size=4"],
    ["training.compile=true", "model.attention_backend=flash_attention"],
    ["training.compile=true", "data.reset_at_document_ends=true"],
    ["parallel.tensor_parallel_size=16"],
    ["parallel.tensor_parallel_size=8", "model.seq_length=100"],
    ["parallel.pipeline_parallel_size=3"],
    ["parallel.pipeline_parallel_size=3", "parallel.pipeline_split=[0,8,0]"],
    [
        "parallel.pipeline_parallel_size=2",
        "parallel.virtual_pipeline_size=4",
        "parallel.schedule=interleaved_1f1b",
    ],
    [
        "parallel.pipeline_parallel_size=2",
        "parallel.virtual_pipeline_size=2",
        "parallel.schedule=zero_bubble",
    ],
    ["completep.base_hidden_size=64", "completep.base_num_layers=2", "completep.base_head_dim=16"],
    ["completep.alpha=0.5"],
    [
        "completep.parameterization=mup",
        "completep.base_hidden_size=64",
        "completep.base_num_layers=2",
    ],
    ["completep.factors.unembedding.lr=2"],
    ["model.tied_embeddings=true", "completep.factors.embedding.lr=2"],
    ["model.fp32_residual=true"],
    ["model.attention_backend=flash_attention"],
    ["optimizer.warmup_fraction=null", "optimizer.warmup_steps=100"],
    ["optimizer.schedule=warmup_stable_decay", "optimizer.decay_fraction=0.9"],
    ["optimizer.schedule=linear", "optimizer.decay_fraction=1.0"],
    ["optimizer.betas=[0.0,0.999]"],
    ["data.split='969,30,1'"],
    ["data.train.1.weight=2", "data.train.0.epochs=3"],
    ["data.tokenizer={type: bytes}"],
    ["checkpoint.interval=100", "checkpoint.keep_every=1000"],
]


@pytest.mark.parametrize(
    "overrides", FITTING, ids=[" ".join(overrides) or "as it is" for overrides in FITTING]
)
def test_settings_that_fit_are_accepted(overrides):
    check_config(config_with(*overrides))


def test_the_remedy_meets_all_rules_at_once():
    with pytest.raises(ConfigError) as caught:
        config_with("parallel.tensor_parallel_size=3")
    for name, value in (("num_attention_heads", 16), ("ffn_hidden_size", 1024)):
        expected = (
            f"parallel.tensor_parallel_size = 3 does not divide model.{name} = "
            f"{value}. Use 1, 2, 4, 8 or 16."
        )
        assert expected in str(caught.value)


def test_all_problems_between_settings_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        config_with(
            "model.num_query_groups=3",
            "optimizer.betas=[1,1]",
            "data.split='1'",
            "training.micro_batch_size=3",
        )
    assert str(caught.value).splitlines()[0] == "configuration: 5 settings do not fit the others"


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
    """60 and 72 are multiples of 3 processes' micro-batches; the pipeline wants whole rounds of 4
    as well.
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
    assert [step for step in range(1, 101) if derived.is_skipped(training, step)] == [3, 7, 8, 9]
