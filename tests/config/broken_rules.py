"""Settings that do not fit each other, and the beginning of what is said of them."""

import re

from megatron_completep.config import Config, config_from_mapping
from tests.config.broken_expert_rules import EXPERT_RULES

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


def config_with(*overrides: str) -> Config:
    return config_from_mapping(BASE, overrides)


# (what breaks a rule, part of the message).
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
        ["model.rope_scaling={rope_type: linear, factor: 2}", "model.position=learned"],
        "model.rope_scaling rescales rotary frequencies, which model.position = learned",
    ),
    (
        ["model.rope_scaling={rope_type: llama3, factor: 8, high_freq_factor: 4}"],
        "rope_type = llama3 needs original_max_position_embeddings, low_freq_factor. Set them.",
    ),
    (
        ["model.rope_scaling={rope_type: linear, factor: 2, beta_fast: 8}"],
        "rope_type = linear does not read beta_fast. Remove them.",
    ),
    (
        [
            "model.rope_scaling={rope_type: llama3, factor: 8, low_freq_factor: 4, "
            "high_freq_factor: 4, original_max_position_embeddings: 64}"
        ],
        "low_freq_factor = 4 is not below high_freq_factor = 4",
    ),
    (
        [
            "model.rope_base=1",
            "model.rope_scaling={rope_type: yarn, factor: 2, original_max_position_embeddings: 64}",
        ],
        "model.rope_base above 1",
    ),
    (
        [
            "model.rope_scaling={rope_type: yarn, factor: 2, beta_slow: 33, "
            "original_max_position_embeddings: 64}"
        ],
        "beta_fast = 32 is below beta_slow = 33",
    ),
    (["model.bias=true", "model.qkv_bias=false"], "Leave model.qkv_bias null"),
    (
        ["model.tied_embeddings=true", "completep.factors.unembedding.lr=2"],
        "Move the factors to completep.factors.embedding, or untie.",
    ),
    (
        ["model.fp32_residual=true", "training.precision=float32"],
        "no meaning under training.precision = float32",
    ),
    (
        ["training.validation_at_start=true", "data.split='100,0,0'"],
        "training.validation_at_start = true has nothing to validate on. Give data.validation, ",
    ),
    (
        ["model.attention_backend=flash_attention", "model.position=alibi"],
        "which model.position = alibi needs. Use model.attention_backend = auto.",
    ),
    (
        ["model.attention_backend=varlen", "model.position=alibi"],
        "which model.position = alibi needs. Use model.attention_backend = auto.",
    ),
    (
        ["model.attention_backend=flash", "data.reset_at_document_ends=true"],
        "which data.reset_at_document_ends = true needs.",
    ),
    (
        ["model.attention_backend=efficient", "training.precision=float64"],
        "computes in bf16 or float32 only, but training.precision = float64.",
    ),
    (
        ["model.attention_backend=cudnn", "training.deterministic=true"],
        "adds in an order that is not fixed, but training.deterministic = true.",
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
        ["optimizer.type=muon"],
        "optimizer.type = muon has no base_lr for its matrices: optimizer.muon is null.",
    ),
    (
        ["optimizer.muon={base_lr: 0.02}"],
        "optimizer.muon is given, but optimizer.type = adamw does not read it.",
    ),
    (
        ["optimizer.type=muon", "optimizer.muon={base_lr: 0.02, momentum: 1.0}"],
        "optimizer.muon.momentum = 1.0 is not less than 1",
    ),
    (
        ["optimizer.type=muon", "optimizer.muon={base_lr: 0.02}", "training.cuda_graph=true"],
        "training.cuda_graph = true has not been tried with optimizer.type = muon.",
    ),
    (
        ["optimizer.type=muon", "optimizer.muon={base_lr: 0.02}", "training.overlap_update=true"],
        "training.overlap_update = true updates bucket by bucket, but optimizer.type = muon needs",
    ),
    (
        ["optimizer.weight_decay_rule=tau"],
        "optimizer.weight_decay_rule = tau has no target: optimizer.target_tau is null.",
    ),
    (
        ["optimizer.target_tau=0.5"],
        "optimizer.target_tau = 0.5 is not read under optimizer.weight_decay_rule = table.",
    ),
    (
        [
            "optimizer.weight_decay_rule=tau",
            "optimizer.target_tau=0.5",
            "optimizer.base_weight_decay=0",
        ],
        "optimizer.base_weight_decay = 0 asks for no decay",
    ),
    (
        ["optimizer.weight_decay_rule=inverse_width", "completep.base_total_tokens=1000000"],
        "optimizer.weight_decay_rule = inverse_width and completep.base_total_tokens = 1000000",
    ),
    (
        ["completep.duration_exponent=0.32"],
        "completep.duration_exponent = 0.32 has nothing to act on",
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
        ["training.validation_positions=10"],
        "training.validation_positions = 10 does not divide model.seq_length = 256. Use 1, 2, 4, 8",
    ),
    (
        ["parallel.context_parallel_size=3"],
        "cuts a sequence into 2 x 3 = 6 chunks, which model.seq_length = 256 is not a multiple of. "
        "Use 1, 2, 4, ",
    ),
    (
        [
            "parallel.context_parallel_size=2",
            "parallel.tensor_parallel_size=8",
            "parallel.sequence_parallel=true",
            "model.seq_length=24",
        ],
        "leaves 24 / 2 = 12 tokens of a sequence to a rank, which parallel.tensor_parallel_size = "
        "8 does not divide (parallel.sequence_parallel is on). Use 1 or 3.",
    ),
    (
        ["parallel.context_heads_at_once=1"],
        "has no meaning under parallel.context_parallel_size = 1: nothing is gathered",
    ),
    (
        [
            "parallel.context_parallel_size=2",
            "parallel.context_heads_at_once=3",
            "model.num_attention_heads=8",
            "model.num_query_groups=8",
            "parallel.tensor_parallel_size=2",
        ],
        "does not divide the 4 groups of keys and values of a rank (8 over "
        "parallel.tensor_parallel_size = 2). Use 1, 2 or 4, or null.",
    ),
    (
        ["parallel.context_parallel_size=2", "model.attention_backend=cudnn"],
        "model.attention_backend = cudnn takes as a mask in memory only",
    ),
    (
        [
            "parallel.context_parallel_size=2",
            "data.reset_at_document_ends=true",
            "model.seq_length=65536",
        ],
        "need a bias on the attention logits of 16.0 GiB on each rank, above 4 GiB. Use "
        "model.attention_backend = varlen or flash_attention, a larger context_parallel_size",
    ),
    (
        ["parallel.context_parallel_size=4", "model.position=alibi", "model.seq_length=32768"],
        "need a bias on the attention logits of 8.0 GiB on each rank, above 4 GiB. Use a larger",
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
        ["training.cuda_graph=true", "parallel.pipeline_parallel_size=2"],
        "parallel.tensor_parallel_size x pipeline_parallel_size = 1 x 2. Use 1 and 1, or",
    ),
    (
        ["training.float8_weight_gradient=float8"],
        "training.float8_weight_gradient = float8 has no effect under training.float8 = none.",
    ),
    (
        ["training.float8=tensorwise", "training.precision=float64"],
        "training.float8 = tensorwise rounds to 8 bits what training.precision = float64",
    ),
    (
        ["training.float8=tensorwise", "training.cuda_graph=true"],
        "but training.cuda_graph = true replays what it captured.",
    ),
    (
        ["training.float8=tensorwise", "training.overlap_update=true"],
        "under which training.overlap_update = true lets it run.",
    ),
    (
        [
            "training.float8=tensorwise",
            "training.float8_weight_gradient=float8",
            "training.micro_batch_size=1",
            "model.seq_length=250",
        ],
        "sums over the 250 tokens of a micro-batch on a rank, which are no multiple of 16.",
    ),
    (
        ["parallel.sharding=gradients", "parallel.pipeline_parallel_size=2"],
        "(parallel.pipeline_parallel_size = 2) has several under way.",
    ),
    (
        ["parallel.sharding=gradients", "parallel.optimizer_shard_size=1"],
        "but parallel.optimizer_shard_size = 1. Use parallel.sharding = optimizer, or",
    ),
    (
        ["parallel.sharding=gradients", "training.cuda_graph=true"],
        "training.cuda_graph = true replays gradients in fixed memory, but parallel.sharding =",
    ),
    (
        ["training.cuda_graph=true", "training.batch_ramp={start: 32, increment: 8, steps: 10}"],
        "training.batch_ramp changes the number of micro-batches.",
    ),
    (
        ["training.cuda_graph=true", "training.overlap_update=true"],
        "training.overlap_update = true lets that run under the next step.",
    ),
    (
        ["training.cuda_graph=true", "model.position=alibi"],
        "cannot copy from the host in a step, as model.position = alibi does",
    ),
    (
        [
            "training.cuda_graph=true",
            "model.attention_backend=flash_attention",
            "data.reset_at_document_ends=true",
        ],
        "the number of documents, a shape, changes with every micro-batch.",
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
    *EXPERT_RULES,
]


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
