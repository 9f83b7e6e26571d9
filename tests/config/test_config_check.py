"""Settings that do not fit each other are refused before any device is touched.

The message has numbers and a remedy.
"""

import pytest

from megatron_completep.config import check_config
from megatron_completep.errors import ConfigError
from tests.config.broken_expert_rules import EXPERTS, PROXY
from tests.config.broken_rules import RULES, config_with


@pytest.mark.parametrize(
    ("overrides", "expected"), RULES, ids=[" ".join(overrides) for overrides, _ in RULES]
)
def test_settings_that_do_not_fit_are_refused_with_numbers_and_remedy(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        config_with(*overrides)
    lines = str(caught.value).splitlines()
    assert lines[0] == "configuration: 1 setting does not fit the others"
    assert len(lines) == 2 and expected in lines[1]


FITTING = [
    [],
    ["model.num_attention_heads=3", "model.head_dim=64"],
    ["model.head_dim=15", "model.position=alibi"],
    [
        "model.rope_scaling={rope_type: yarn, factor: 2, beta_slow: 32, "
        "original_max_position_embeddings: 64}"
    ],
    [
        "model.rope_scaling={rope_type: llama3, factor: 8, low_freq_factor: 1, "
        "high_freq_factor: 4, original_max_position_embeddings: 64}"
    ],
    ["model.bias=true", "model.qkv_bias=true"],
    ["training.validation_positions=8"],
    ["model.moe={num_experts: 8, top_k: 8, gate: softmax, balance: none, first_dense_layers: 7}"],
    [EXPERTS, "model.qkv_bias=true", "parallel.expert_parallel_size=8"],
    ["model.moe={num_experts: 4, top_k: 2, gate: softmax, balance: loss, balance_loss: 0.01}"],
    ["model.moe={num_experts: 1, top_k: 1, gate: softmax, balance: none}"],
    ["model.moe={num_experts: 4, top_k: 1, balance_loss: 1e-4, router_z_loss: 1e-3}"],
    [EXPERTS, *PROXY, "completep.base_num_experts=4", "completep.base_top_k=1"],
    [EXPERTS, *PROXY, "completep.base_num_experts=4", "completep.allow_sparsity_change=true"],
    [
        EXPERTS,
        *PROXY,
        "completep.base_expert_ffn_hidden_size=128",
        "completep.allow_granularity_change=true",
    ],
    [
        "parallel.context_parallel_size=2",
        "parallel.tensor_parallel_size=4",
        "parallel.sequence_parallel=true",
        "model.seq_length=24",
    ],
    [
        "parallel.context_parallel_size=8",
        "data.reset_at_document_ends=true",
        "model.seq_length=65536",
    ],
    [
        "parallel.context_parallel_size=2",
        "data.reset_at_document_ends=true",
        "model.seq_length=65536",
        "model.attention_backend=flash_attention",
        "training.precision=bf16",
    ],
    ["model.qkv_bias=false"],
    ["model.num_query_groups=4", "parallel.tensor_parallel_size=4"],
    ["model.num_query_groups=8", "parallel.tensor_parallel_size=4"],
    [
        "training.compile=true",
        "model.attention_backend=flash_attention",
        "data.reset_at_document_ends=true",
    ],
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
    ["model.attention_backend=flash_attention", "data.reset_at_document_ends=true"],
    ["model.attention_backend=varlen", "data.reset_at_document_ends=true"],
    ["model.attention_backend=efficient", "training.precision=float32"],
    ["model.attention_backend=cudnn", "model.position=alibi"],
    ["model.attention_backend=flash", "training.deterministic=true"],
    ["optimizer.warmup_fraction=null", "optimizer.warmup_steps=100"],
    ["optimizer.schedule=warmup_stable_decay", "optimizer.decay_fraction=0.9"],
    ["optimizer.schedule=linear", "optimizer.decay_fraction=1.0"],
    ["optimizer.betas=[0.0,0.999]"],
    ["optimizer.type=muon", "optimizer.muon={base_lr: 0.02}"],
    ["optimizer.weight_decay_rule=tau", "optimizer.target_tau=0.5"],
    ["optimizer.weight_decay_rule=inverse_width"],
    ["completep.duration_exponent=0.32", "completep.base_total_tokens=1000000"],
    ["training.cuda_graph=true", "data.reset_at_document_ends=true"],
    ["training.cuda_graph=true", "model.attention_backend=flash_attention"],
    ["training.cuda_graph=true", "training.compile=true", "training.recompute=full"],
    ["training.overlap_update=true", "parallel.sharding=gradients"],
    ["training.float8=tensorwise", "training.float8_weight_gradient=float8"],
    ["training.overlap_update=true", "parallel.pipeline_parallel_size=2"],
    ["data.split='969,30,1'"],
    ["data.split='969,30,1'", "training.validation_at_start=true"],
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
