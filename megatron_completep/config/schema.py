"""The configuration: one frozen model a section, every field documented with its unit.

`load.py` reads a YAML file into `Config`, `check.py` holds the rules that concern several fields.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

# Written `X as X` where other rooms take the name from here.
from megatron_completep.config.data_section import DataConfig as DataConfig
from megatron_completep.config.data_section import SourceConfig as SourceConfig
from megatron_completep.config.data_section import TokenizerConfig as TokenizerConfig
from megatron_completep.config.export_section import ExportConfig as ExportConfig
from megatron_completep.config.guards_section import GuardsConfig as GuardsConfig
from megatron_completep.config.moe_section import MoeConfig as MoeConfig
from megatron_completep.config.muon_section import MuonConfig as MuonConfig
from megatron_completep.config.parallel_section import ParallelConfig as ParallelConfig
from megatron_completep.config.rope_section import RopeScalingConfig as RopeScalingConfig
from megatron_completep.config.section import Fraction, NonNegativeFloat, PositiveFloat, Probability
from megatron_completep.config.section import NonNegativeInt as NonNegativeInt
from megatron_completep.config.section import PositiveInt as PositiveInt
from megatron_completep.config.section import Section as Section
from megatron_completep.roles import Role


class ModelConfig(Section):
    """The shape of the decoder (global: before any parallel split)."""

    hidden_size: PositiveInt = Field(description="Width of the residual stream, N.")
    num_layers: PositiveInt = Field(
        description="Decoder layers, L; one layer is one attention and one MLP branch."
    )
    num_attention_heads: PositiveInt = Field(description="Query heads.")
    num_query_groups: PositiveInt | None = Field(
        None, description="Key/value heads (GQA); null: num_attention_heads."
    )
    head_dim: PositiveInt | None = Field(
        None, description="Size of a head; null: hidden_size / num_attention_heads."
    )
    ffn_hidden_size: PositiveInt = Field(
        description="Inner width of the MLP (of one of gate and up for swiglu)."
    )
    moe: MoeConfig | None = Field(
        None, description="Mixtures of experts in place of the MLP; null: none."
    )
    vocab_size: PositiveInt = Field(description="Token ids run from 0 to vocab_size - 1.")
    vocab_multiple: PositiveInt = Field(
        128, description="The embedding is padded to a multiple of this, per tensor rank."
    )
    seq_length: PositiveInt = Field(
        description="Tokens a sample; also the number of learned positions."
    )
    norm: Literal["layernorm", "rmsnorm"] = Field(
        "rmsnorm", description="Norm before each branch and at the end."
    )
    norm_eps: PositiveFloat = Field(
        1e-5, description="Added to the variance (or mean square) inside the norm."
    )
    activation: Literal["gelu", "gelu_tanh", "squared_relu", "swiglu"] = Field(
        "swiglu", description="MLP non-linearity (gelu: erf; gelu_tanh: GPT-2's approximation)."
    )
    position: Literal["rope", "learned", "alibi"] = Field(
        "rope", description="How positions enter."
    )
    rope_base: float = Field(10000.0, ge=1.0, description="Base of the rotary frequencies.")
    rope_scaling: RopeScalingConfig | None = Field(
        None, description="Rescaled rotary frequencies, for longer sequences; null: as they are."
    )
    bias: bool = Field(False, description="Biases on linear layers and layernorms.")
    qkv_bias: bool | None = Field(
        None, description="Biases on queries, keys and values (Qwen2's alone); null: as model.bias."
    )
    qk_norm: bool = Field(
        False,
        description="RMSNorm over head_dim on queries and keys, one gain shared by all heads.",
    )
    tied_embeddings: bool = Field(False, description="Unembedding shares the embedding's weight.")
    attention_scale: Literal["base_head_dim", "1/head_dim", "1/sqrt(head_dim)"] = Field(
        "base_head_dim",
        description="Scale of attention logits; base_head_dim: sqrt(base_head_dim) / head_dim. "
        "Under sp it is always 1/sqrt(head_dim).",
    )
    input_multiplier: PositiveFloat = Field(
        1.0, description="Tunable base factor on the embedding output."
    )
    residual_multiplier: PositiveFloat = Field(
        1.0, description="Tunable base factor on each branch's output, beside m_L^-alpha."
    )
    attention_multiplier: PositiveFloat = Field(
        1.0, description="Tunable base factor on the attention logits, beside attention_scale."
    )
    logit_multiplier: PositiveFloat = Field(
        1.0, description="Tunable base factor on the logits, beside 1/m_N."
    )
    dropout: Probability = Field(
        0.0, description="Probability of dropping a branch output element."
    )
    fp32_residual: bool = Field(
        False, description="Keep the residual stream in float32 under bf16."
    )
    attention_backend: Literal[
        "auto",
        "sdpa",
        "cudnn",
        "flash",
        "efficient",
        "flash_attention",
        "flash_attention_3",
        "varlen",
    ] = Field(
        "auto",
        description="auto: torch's choice without what is known to fail; sdpa: torch's own choice; "
        "cudnn, flash, efficient: that kernel of torch; flash_attention, flash_attention_3: these "
        "packages; varlen: torch's flash, told where documents begin. On a CPU the first five are "
        "the same.",
    )


class RoleFactors(Section):
    """A user's own factors for one role, on top of Table 1; found at the proxy,
    they hold at the target.
    """

    lr: PositiveFloat = Field(1.0, description="Multiplies the learning rate.")
    init_std: PositiveFloat = Field(1.0, description="Multiplies the initial standard deviation.")
    weight_decay: NonNegativeFloat = Field(1.0, description="Multiplies the weight decay.")
    eps: PositiveFloat = Field(1.0, description="Multiplies the AdamW epsilon.")


RoleName = Annotated[Role, Field(strict=False)]  # not strict: a file holds it as a string


class CompletePConfig(Section):
    """The parameterization and the base shape its hyperparameters were tuned at."""

    parameterization: Literal["completep", "mup", "sp"] = Field(
        "completep", description="completep: width and depth; mup: width only; sp: none."
    )
    alpha: Annotated[float, Field(ge=0.5, le=1)] = Field(
        1.0, description="Exponent of the residual multiplier m_L^-alpha; 1 is CompleteP."
    )
    base_hidden_size: PositiveInt | None = Field(
        None, description="hidden_size of the proxy; null: this model's own."
    )
    base_num_layers: PositiveInt | None = Field(
        None, description="num_layers of the proxy; null: this model's own."
    )
    base_ffn_hidden_size: PositiveInt | None = Field(
        None, description="ffn_hidden_size of the proxy; null: this model's FFN ratio."
    )
    base_head_dim: PositiveInt | None = Field(
        None, description="head_dim of the proxy; null: this model's own."
    )
    base_num_experts: PositiveInt | None = Field(
        None, description="moe.num_experts of the proxy; null: this model's own."
    )
    base_top_k: PositiveInt | None = Field(
        None, description="moe.top_k of the proxy; null: this model's own."
    )
    base_expert_ffn_hidden_size: PositiveInt | None = Field(
        None, description="moe.ffn_hidden_size of the proxy; null: this model's ratio to the width."
    )
    allow_sparsity_change: bool = Field(
        False,
        description="Allow another top_k / num_experts than the proxy's: learning rates are not "
        "known to transfer.",
    )
    allow_granularity_change: bool = Field(
        False,
        description="Allow another ratio of an expert's inner width to the width than the proxy's: "
        "learning rates are not known to transfer.",
    )
    base_batch_tokens: PositiveInt | None = Field(
        None, description="Tokens a step of the proxy run; null: no batch scaling."
    )
    base_total_tokens: PositiveInt | None = Field(
        None, description="Total tokens of the proxy run; null: no duration scaling."
    )
    batch_exponent: NonNegativeFloat = Field(
        0.5, description="S = (m_B / m_D)^exponent multiplies lr and weight decay, divides eps."
    )
    duration_exponent: NonNegativeFloat | None = Field(
        None,
        description="That of m_D alone: S = m_B^batch_exponent / m_D^duration_exponent; "
        "null: batch_exponent. Fits differ on it (docs/parameterization.md).",
    )
    factors: dict[RoleName, RoleFactors] = Field(
        default_factory=dict, description="Own factors by role, on top of the table."
    )


class OverrideConfig(Section):
    """Own factors for the parameters whose name matches a pattern."""

    pattern: str = Field(
        description="Shell-style pattern on the name of a parameter in the whole model, or of a "
        "logical part of one, such as layers.0.* or *.qkv.weight.k; must match something."
    )
    lr: PositiveFloat = Field(1.0, description="Multiplies the learning rate.")
    init_std: PositiveFloat = Field(1.0, description="Multiplies the initial standard deviation.")
    weight_decay: NonNegativeFloat = Field(1.0, description="Multiplies the weight decay.")
    eps: PositiveFloat = Field(1.0, description="Multiplies the AdamW epsilon.")


class OptimizerConfig(Section):
    """The update rule, and the proxy's base values; the table turns them into each parameter's own.

    What is not in a rule's own section is read by AdamW, which updates what the rule does not.
    """

    type: Literal["adamw", "muon"] = Field("adamw", description="The update rule.")
    muon: MuonConfig | None = Field(None, description="Settings of type muon; else null.")
    base_lr: PositiveFloat = Field(description="eta: peak learning rate at the proxy.")
    base_init_std: PositiveFloat = Field(
        0.02, description="sigma: initial standard deviation at the proxy."
    )
    base_weight_decay: NonNegativeFloat = Field(
        0.1, description="lambda: weight decay at the proxy, coupled to the learning rate."
    )
    weight_decay_rule: Literal["table", "inverse_width", "tau"] = Field(
        "table",
        description="table: lr x weight decay is the proxy's; inverse_width: that, divided by m_N "
        "for hidden weights; tau: solved from target_tau, and no base_weight_decay counts.",
    )
    target_tau: PositiveFloat | None = Field(
        None,
        description="1 / (peak lr x weight decay x train_steps) of all that decays, for "
        "weight_decay_rule tau; else null.",
    )
    base_eps: PositiveFloat = Field(1e-12, description="AdamW epsilon at the proxy.")
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.95), strict=False, description="AdamW moment decay rates."
    )
    grad_clip: NonNegativeFloat = Field(
        1.0, description="Bound on the global gradient norm; 0: no clipping."
    )
    schedule: Literal["linear", "cosine", "warmup_stable_decay", "constant"] = Field(
        "linear", description="Shape after the warm-up."
    )
    warmup_fraction: Fraction | None = Field(
        None, description="Linear warm-up as a fraction of train_steps."
    )
    warmup_steps: NonNegativeInt | None = Field(
        None, description="Linear warm-up in steps; give at most one of the two."
    )
    decay_fraction: Fraction = Field(
        0.2, description="warmup_stable_decay: last part of train_steps, in which lr falls."
    )
    min_lr_fraction: Fraction = Field(
        0.0, description="Final learning rate as a fraction of the peak."
    )
    overrides: list[OverrideConfig] = Field(
        default_factory=list, description="Own factors by parameter name."
    )


class BatchRampConfig(Section):
    """A smaller batch in the beginning: batch sizes start, start + increment, ...
    share the first steps equally.
    """

    start: PositiveInt = Field(description="Sequences of the first optimizer step, over all ranks.")
    increment: PositiveInt = Field(
        description="Sequences by which the batch grows, up to global_batch_size."
    )
    steps: PositiveInt = Field(
        description="Optimizer steps after which the batch is global_batch_size."
    )


class StepRangeConfig(Section):
    """Steps that follow one another."""

    first: PositiveInt = Field(description="Number of the first step, counted from 1.")
    last: PositiveInt | None = Field(
        None, description="Number of the last step; null: the first alone."
    )


class TrainingConfig(Section):
    """How long, how precise, and where to."""

    micro_batch_size: PositiveInt = Field(description="Sequences a rank processes at once.")
    global_batch_size: PositiveInt = Field(
        description="Sequences an optimizer step, over all ranks."
    )
    train_steps: PositiveInt = Field(description="Optimizer steps of the whole run.")
    batch_ramp: BatchRampConfig | None = Field(
        None,
        description="Batch sizes that grow to global_batch_size; "
        "the learning rate still goes by steps. null: none.",
    )
    skip_steps: list[StepRangeConfig] = Field(
        default_factory=list,
        description="Steps whose data are passed over: no update, while step count and learning "
        "rate go on.",
    )
    precision: Literal["float32", "bf16", "float64", "auto"] = Field(
        "bf16",
        description="Compute type; master weights are float32 under bf16. "
        "auto: bf16 where the hardware has units for it.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda where there is one."
    )
    seed: NonNegativeInt = Field(1234, description="Seed of the initial weights and of dropout.")
    output_dir: str = Field(
        description="Folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/."
    )
    z_loss: NonNegativeFloat = Field(
        0.0,
        description="Coefficient of logsumexp(logits)^2 added to the training loss (not to that of "
        "validation).",
    )
    label_smoothing: Probability = Field(
        0.0, description="Probability mass spread over all tokens, in training (not in validation)."
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="Activation recomputation: selective: attention proper and the MLP's "
        "activation; full: whole layers.",
    )
    cuda_graph: bool = Field(
        False, description="On a GPU, replay whole steps as one captured graph; one process only."
    )
    overlap_update: bool = Field(
        False,
        description="On a GPU, update each bucket of parameters on a second stream, under the next "
        "step's forward pass.",
    )
    cpu_threads: PositiveInt | None = Field(
        None,
        description="Threads a process computes on; "
        "null: the node's cores divided by its processes.",
    )
    stop_at_step: PositiveInt | None = Field(
        None,
        description="Save and leave after this step, before train_steps; "
        "the same run goes on when started again. null: never.",
    )
    exit_after_minutes: PositiveFloat | None = Field(
        None,
        description="Save and leave, with the exit code that asks for a requeue, "
        "this long after the start; null: never.",
    )
    weight_gradient: Literal["auto", "torch", "apex"] = Field(
        "auto",
        description="Accumulation of weight gradients: apex adds bf16 products straight into fp32; "
        "auto: apex where installed.",
    )
    matrix_products: Literal["auto", "torch", "onednn"] = Field(
        "auto",
        description="Float32 products on a CPU; auto: onednn on AMD with AVX-512, else torch.",
    )
    float8: Literal["none", "tensorwise"] = Field(
        "none",
        description="Products of hidden matrices in float8, with one scale an operand; faster on "
        "GPUs from Hopper on, emulated elsewhere.",
    )
    float8_weight_gradient: Literal["high", "float8"] = Field(
        "high", description="Operands of the weight gradient under float8: as they are, or rounded."
    )
    float8_least_size: PositiveInt = Field(
        2048,
        description="Matrices with a smaller dimension on a rank are left out of float8.",
    )
    compile: bool = Field(
        False,
        description="Compiled by torch.compile on a CPU: whole layers where nothing is split over "
        "ranks, else the operations between products.",
    )
    deterministic: bool = Field(
        False,
        description="Algorithms that repeat their bits only, which bit-equal resumes on a GPU need "
        "and a CPU has anyway; slower attention.",
    )
    validation_interval: PositiveInt | None = Field(
        None, description="Steps between validations; null: only at the end."
    )
    validation_samples: PositiveInt = Field(64, description="Sequences a validation.")
    validation_positions: NonNegativeInt = Field(
        0, description="Equal parts of the sequence whose losses a validation records; 0: none."
    )
    validation_at_start: bool = Field(
        False, description="Validate before the first step, too; metrics have it as step 0."
    )


class CheckpointConfig(Section):
    """When and how the state of a run is saved."""

    interval: PositiveInt | None = Field(
        1000, description="Steps between checkpoints; null: only at the end."
    )
    keep: PositiveInt = Field(3, description="Newest checkpoints that are kept.")
    keep_every: PositiveInt | None = Field(
        None, description="Checkpoints whose step is a multiple are kept for good."
    )
    async_save: bool = Field(True, description="Write while training goes on.")
    local_dir: str | None = Field(
        None,
        description="Folder on each node's own disk for snapshots between two checkpoints; "
        "needs local_interval. null: none.",
    )
    local_interval: PositiveInt | None = Field(
        None, description="Steps between snapshots in local_dir."
    )
    local_keep: PositiveInt = Field(
        2,
        description="Newest snapshots that are kept; a checkpoint on the shared disk removes those "
        "before it.",
    )
    resume: bool = Field(
        True, description="Continue from the newest checkpoint in output_dir when there is one."
    )
    allow_changed: list[str] = Field(
        default_factory=list,
        description="Paths or patterns (model.dropout, table.*, data.*, fingerprints.*) that may "
        "differ from the checkpoint's at resume; beginning: what documents begin with.",
    )
    on_failure: Literal["continue", "stop"] = Field(
        "continue",
        description="After a failed save: go on training (the older checkpoints are intact), "
        "or stop at the next save.",
    )
    timeout_minutes: PositiveFloat = Field(
        30.0,
        description="Longest wait of one rank for another to get on with its part of a checkpoint, "
        "in minutes.",
    )


class ProfilingConfig(Section):
    """A window of steps that chosen ranks record, written to output_dir/profile."""

    first_step: PositiveInt | None = Field(
        None, description="Number of the first step that is recorded; null: no profiling."
    )
    steps: PositiveInt = Field(3, description="Steps that are recorded.")
    ranks: list[NonNegativeInt] = Field(
        default_factory=lambda: [0], min_length=1, description="Ranks that record."
    )
    memory: bool = Field(
        False,
        description="Record every allocation, too: a memory snapshot of a GPU, "
        "sizes by operation elsewhere.",
    )


class LoggingConfig(Section):
    """What is reported, and how often."""

    interval: PositiveInt = Field(10, description="Steps between console lines.")
    tensorboard: bool = Field(
        True, description="Write TensorBoard events to output_dir/tensorboard."
    )
    trackers: list[Literal["wandb", "trackio"]] = Field(
        default_factory=list,
        description="Further trackers, from the extra `tracking`; one that fails is left out, "
        "and training goes on.",
    )
    project: str = Field("megatron-completep", description="The trackers' project.")
    run_name: str | None = Field(
        None, description="The trackers' name of this run; null: the last part of output_dir."
    )
    offline: bool = Field(
        False,
        description="wandb writes to output_dir/wandb alone, for `wandb sync`; "
        "trackio is always on this machine.",
    )
    parameterization_interval: PositiveInt | None = Field(
        100,
        description="Steps between rows with activation, update and attention-logit sizes; "
        "null: never.",
    )
    parameterization_reference: str | None = Field(
        None,
        description="output_dir of the proxy's run, whose sizes raise alarms; null: no comparison.",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_former_keys(cls, values: Any) -> Any:
        """Files of earlier runs hold `wandb_project: null`."""
        if isinstance(values, dict) and values.get("wandb_project", "") is None:
            return {key: setting for key, setting in values.items() if key != "wandb_project"}
        return values


class Config(Section):
    """One run, as one YAML file."""

    model: ModelConfig
    completep: CompletePConfig = Field(default_factory=CompletePConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig
    data: DataConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    guards: GuardsConfig = Field(default_factory=GuardsConfig)
    profiling: ProfilingConfig = Field(default_factory=ProfilingConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
