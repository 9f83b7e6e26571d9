"""What a message offers in place of a setting that does not fit is accepted."""

import random

import pytest

from megatron_completep.errors import ConfigError
from tests.config.broken_expert_rules import EXPERTS, PROXY
from tests.config.broken_rules import RULES, config_with, offered

# What the words of a remedy say, as overrides; remedies that are numbers are read from the message.
IN_WORDS = {
    "model.moe={num_experts: 4, top_k: 5}": [["model.moe={num_experts: 4, top_k: 4}"]],
    "model.moe={num_experts: 4, top_k: 1, first_dense_layers: 8}": [
        ["model.moe={num_experts: 4, top_k: 1, first_dense_layers: 7}"],
        ["model.moe=null"],
    ],
    "model.moe={num_experts: 4, top_k: 2, gate: softmax}": [
        ["model.moe={num_experts: 4, top_k: 2, gate: sigmoid}"],
        ["model.moe={num_experts: 4, top_k: 2, gate: softmax, balance: none}"],
        ["model.moe={num_experts: 4, top_k: 2, gate: softmax, balance: loss, balance_loss: 0.01}"],
    ],
    "model.moe={num_experts: 4, top_k: 1, gate: softmax, balance: none}": [
        ["model.moe={num_experts: 4, top_k: 1, gate: sigmoid, balance: none}"],
        ["model.moe={num_experts: 4, top_k: 2, gate: softmax, balance: none}"],
    ],
    "model.moe={num_experts: 4, top_k: 1, balance: loss}": [
        ["model.moe={num_experts: 4, top_k: 1, balance: none}"],
        ["model.moe={num_experts: 4, top_k: 1, balance: loss, balance_loss: 0.01}"],
    ],
    "model.moe={num_experts: 4, top_k: 1, balance: none, balance_loss: 0.01}": [
        ["model.moe={num_experts: 4, top_k: 1, balance: loss, balance_loss: 0.01}"],
        ["model.moe={num_experts: 4, top_k: 1, balance: none, balance_loss: 0}"],
    ],
    "model.moe={num_experts: 2, top_k: 2, balance_loss: 0.01}": [
        ["model.moe={num_experts: 2, top_k: 2, balance: none, balance_loss: 0}"],
    ],
    f"{EXPERTS} model.bias=true": [
        ["model.bias=false"],
        ["model.bias=false", "model.qkv_bias=true"],
    ],
    f"{EXPERTS} training.cuda_graph=true": [["training.cuda_graph=false"]],
    f"{EXPERTS} optimizer.type=muon optimizer.muon={{base_lr: 0.02}}": [
        ["optimizer.type=adamw", "optimizer.muon=null"],
        ["model.moe=null"],
    ],
    f"{EXPERTS} parallel.tensor_parallel_size=2": [
        ["parallel.sequence_parallel=true"],
        ["parallel.tensor_parallel_size=1"],
    ],
    f"{EXPERTS} {' '.join(PROXY)} completep.base_num_experts=4 completep.base_top_k=2": [
        ["completep.allow_sparsity_change=true"],
    ],
    f"{EXPERTS} completep.base_top_k=2": [PROXY],
    "completep.base_top_k=2": [["completep.base_top_k=null"]],
    "parallel.expert_parallel_size=2": [["parallel.expert_parallel_size=1"]],
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
        ["model.attention_backend=auto"]
    ],
    "model.attention_backend=varlen model.position=alibi": [["model.attention_backend=auto"]],
    "model.attention_backend=flash_attention training.precision=float32": [
        ["model.attention_backend=auto"],
        ["training.precision=bf16"],
    ],
    "model.attention_backend=flash_attention training.device=cpu": [
        ["model.attention_backend=auto"]
    ],
    "model.attention_backend=flash_attention model.head_dim=512": [
        ["model.attention_backend=auto"]
    ],
    "model.attention_backend=flash data.reset_at_document_ends=true": [
        ["model.attention_backend=auto"],
        ["model.attention_backend=varlen"],
        ["model.attention_backend=flash_attention"],
    ],
    "training.validation_at_start=true data.split='100,0,0'": [
        ["data.split=null", "data.validation=[{prefix: c}]"],
        ["data.split='98,2,0'"],
        ["training.validation_at_start=false"],
    ],
    "parallel.context_parallel_size=2 model.attention_backend=cudnn": [
        ["model.attention_backend=auto"]
    ],
    "parallel.context_parallel_size=2 data.reset_at_document_ends=true model.seq_length=65536": [
        ["model.attention_backend=varlen"],
        ["model.attention_backend=flash_attention"],
        ["parallel.context_parallel_size=8"],
        ["training.micro_batch_size=1"],
    ],
    "parallel.context_parallel_size=4 model.position=alibi model.seq_length=32768": [
        ["parallel.context_parallel_size=8"]
    ],
    "model.attention_backend=efficient training.precision=float64": [
        ["model.attention_backend=auto"],
        ["training.precision=bf16"],
    ],
    "model.attention_backend=cudnn training.deterministic=true": [
        ["model.attention_backend=auto"],
        ["training.deterministic=false"],
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
    "training.cuda_graph=true parallel.pipeline_parallel_size=2": [
        ["parallel.pipeline_parallel_size=1"],
        ["training.cuda_graph=false"],
    ],
    "training.float8_weight_gradient=float8": [
        ["training.float8_weight_gradient=high"],
        ["training.float8=tensorwise"],
    ],
    "training.float8=tensorwise training.precision=float64": [
        ["training.precision=bf16"],
        ["training.float8=none"],
    ],
    "training.float8=tensorwise training.cuda_graph=true": [
        ["training.cuda_graph=false"],
        ["training.float8=none"],
    ],
    "training.float8=tensorwise training.overlap_update=true": [
        ["training.overlap_update=false"],
        ["training.float8=none"],
    ],
    "training.float8=tensorwise training.float8_weight_gradient=float8 "
    "training.micro_batch_size=1 model.seq_length=250": [
        ["training.float8_weight_gradient=high"],
        ["training.micro_batch_size=8"],
    ],
    "parallel.sharding=gradients parallel.pipeline_parallel_size=2": [
        ["parallel.sharding=optimizer"],
        ["parallel.pipeline_parallel_size=1"],
    ],
    "parallel.sharding=gradients parallel.optimizer_shard_size=1": [
        ["parallel.sharding=optimizer"],
        ["parallel.optimizer_shard_size=null"],
    ],
    "parallel.sharding=gradients training.cuda_graph=true": [
        ["parallel.sharding=optimizer"],
        ["training.cuda_graph=false"],
    ],
    "training.cuda_graph=true training.batch_ramp={start: 32, increment: 8, steps: 10}": [
        ["training.batch_ramp=null"],
        ["training.cuda_graph=false"],
    ],
    "training.cuda_graph=true training.overlap_update=true": [
        ["training.overlap_update=false"],
        ["training.cuda_graph=false"],
    ],
    "training.cuda_graph=true model.position=alibi": [
        ["model.position=rope"],
        ["model.position=learned"],
        ["training.cuda_graph=false"],
    ],
    "training.cuda_graph=true model.attention_backend=flash_attention "
    "data.reset_at_document_ends=true": [
        ["model.attention_backend=sdpa"],
        ["data.reset_at_document_ends=false"],
        ["training.cuda_graph=false"],
    ],
    "model.rope_scaling={rope_type: linear, factor: 2} model.position=learned": [
        ["model.rope_scaling=null"]
    ],
    "model.rope_scaling={rope_type: llama3, factor: 8, high_freq_factor: 4}": [
        [
            "model.rope_scaling.original_max_position_embeddings=64",
            "model.rope_scaling.low_freq_factor=1",
        ]
    ],
    "model.rope_scaling={rope_type: linear, factor: 2, beta_fast: 8}": [
        ["model.rope_scaling.beta_fast=null"]
    ],
    "model.rope_scaling={rope_type: llama3, factor: 8, low_freq_factor: 4, "
    "high_freq_factor: 4, original_max_position_embeddings: 64}": [
        ["model.rope_scaling.low_freq_factor=1"]
    ],
    "model.rope_base=1 model.rope_scaling={rope_type: yarn, factor: 2, "
    "original_max_position_embeddings: 64}": [["model.rope_base=2"]],
    "model.rope_scaling={rope_type: yarn, factor: 2, beta_slow: 33, "
    "original_max_position_embeddings: 64}": [["model.rope_scaling.beta_fast=33"]],
    "model.bias=true model.qkv_bias=false": [["model.qkv_bias=null"], ["model.bias=false"]],
    "optimizer.type=muon": [["optimizer.muon={base_lr: 0.02}"]],
    "optimizer.muon={base_lr: 0.02}": [["optimizer.type=muon"], ["optimizer.muon=null"]],
    "optimizer.type=muon optimizer.muon={base_lr: 0.02, momentum: 1.0}": [
        ["optimizer.muon.momentum=0.95"]
    ],
    "optimizer.type=muon optimizer.muon={base_lr: 0.02} training.cuda_graph=true": [
        ["optimizer.type=adamw", "optimizer.muon=null"],
        ["training.cuda_graph=false"],
    ],
    "optimizer.type=muon optimizer.muon={base_lr: 0.02} training.overlap_update=true": [
        ["optimizer.type=adamw", "optimizer.muon=null"],
        ["training.overlap_update=false"],
    ],
    "optimizer.weight_decay_rule=tau": [["optimizer.target_tau=0.5"]],
    "optimizer.target_tau=0.5": [
        ["optimizer.weight_decay_rule=tau"],
        ["optimizer.target_tau=null"],
    ],
    "optimizer.weight_decay_rule=tau optimizer.target_tau=0.5 optimizer.base_weight_decay=0": [
        ["optimizer.weight_decay_rule=table", "optimizer.target_tau=null"],
        ["optimizer.base_weight_decay=0.1"],
    ],
    "optimizer.weight_decay_rule=inverse_width completep.base_total_tokens=1000000": [
        ["optimizer.weight_decay_rule=table"],
        ["completep.base_total_tokens=null"],
    ],
    "completep.duration_exponent=0.32": [
        ["completep.base_total_tokens=1000000"],
        ["completep.duration_exponent=null"],
    ],
    "parallel.context_heads_at_once=1": [
        ["parallel.context_heads_at_once=null"],
        ["parallel.context_parallel_size=2"],
    ],
    "guards.hang_timeout_minutes=30": [["parallel.timeout_minutes=30"]],
    "guards.rollback_threshold=2 data.order=megatron": [
        ["data.order=permutation"],
        ["guards.rollback_threshold=null"],
    ],
}


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
    # Two chunks want 16 layers.
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
