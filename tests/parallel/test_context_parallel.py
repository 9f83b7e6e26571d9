"""Ranks that share a sequence compute the loss and the gradients of one process."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_completep.completep import table_of
from megatron_completep.config import Config
from megatron_completep.data.loader import Batch, DocumentEnds, make_batch
from megatron_completep.model import flash
from megatron_completep.model.attention import Attention, AttentionInputs
from megatron_completep.model.gpt import GPT
from megatron_completep.parallel.collectives import Pending, all_reduce
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.gradients import main_grad_of
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.planning.scaling import stage_activations
from megatron_completep.planning.sizes import rank_stages
from megatron_completep.run import assemble as assembling
from megatron_completep.run.assemble import assemble
from megatron_completep.run.forward_backward import MicroBatch
from megatron_completep.run.step import Evaluation, TrainingStep
from tests.parallel.features import SEQ_LENGTH, Documents
from tests.parallel.packed import varlen
from tests.support.configs import merged, small_config
from tests.support.ranks import context_on

SAMPLES = 4
GROUPED = {"num_query_groups": 2, "qk_norm": True}
APART = {"data": {"reset_at_document_ends": True}}
SCALED = {"rope_type": "linear", "factor": 2.0}

# name -> settings
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "rope, documents, grouped heads": {"model": GROUPED, **APART},
    "rope, scaled": {"model": {"rope_scaling": SCALED, "tied_embeddings": True}},
    "alibi, documents": {"model": {"position": "alibi", "bias": True}, **APART},
    "learned, documents": {"model": {"position": "learned", "norm": "layernorm"}, **APART},
    "grouped heads, recomputed": {
        "model": {"num_query_groups": 2},
        "training": {"recompute": "selective"},
    },
    "dropout, recomputed": {
        "model": {"dropout": 0.3, "num_query_groups": 1},
        "training": {"recompute": "selective"},
        **APART,
    },
}

# Groups of keys and values that are gathered at once, if not all of a rank: 2, 4 and 2 groups.
AT_ONCE = {
    "rope, documents, grouped heads": 1,
    "alibi, documents": 2,
    "grouped heads, recomputed": 1,
}

# What the tests must catch.
DOCUMENTS_DROPPED = "documents are dropped"
LOCAL_POSITIONS = "positions are those among the rank's own tokens"
SHIFTED_AFTER_SLICING = "labels are shifted after slicing"
MEAN = "ranks take means of their own tokens"
HALF_UNCOUNTED = "no token of the sequences' ends counts"


@dataclass(frozen=True)
class Sums:
    """Over all ranks that share the batch."""

    loss: float
    tokens: int
    own_tokens: int  # of this rank
    master_elements: int  # that this rank keeps
    gradients: dict[str, Tensor]
    evaluation: Evaluation


def config_of(name: str, context_ranks: int, precision: str = "float64") -> Config:
    settings = {
        "model": {"seq_length": SEQ_LENGTH, "num_layers": 2},
        "optimizer": {"base_init_std": 0.3},
        "training": {
            "precision": precision,
            "global_batch_size": SAMPLES,
            "micro_batch_size": 2,
        },
        "parallel": {
            "context_parallel_size": context_ranks,
            "context_heads_at_once": AT_ONCE.get(name) if context_ranks > 1 else None,
        },
    }
    return small_config(**merged(settings, MODELS[name]))


def batches_of(config: Config, mutation: str) -> list[Batch]:
    """Two micro-batches of documents; labels that do not count lie unevenly."""
    documents = Documents(config.model.vocab_size)
    batches = []
    for first in (0, 2):
        numbers = [first, first + 1]
        samples = [documents[number] for number in numbers]
        batch = make_batch(samples, numbers, SEQ_LENGTH, DocumentEnds.of(config.data))
        mask = batch.loss_mask.clone()
        mask[0, :3] = 0
        if mutation == HALF_UNCOUNTED:
            mask[:, 4:12] = 0  # of two ranks, the second holds these
        batches.append(replace(batch, loss_mask=mask))
    return batches


def mutated(batch: MicroBatch, context: ParallelContext, mutation: str) -> MicroBatch:
    if mutation == DOCUMENTS_DROPPED:
        return replace(batch, document_ids=None)
    if mutation == LOCAL_POSITIONS:
        length = context.context_part.length(SEQ_LENGTH)
        return replace(batch, positions=torch.arange(length).expand_as(batch.tokens))
    if mutation == SHIFTED_AFTER_SLICING:
        shifted = batch.tokens.roll(-1, dims=1)
        return replace(batch, labels=torch.where(batch.labels < 0, batch.labels, shifted))
    return batch


def sums_of(
    rank: int,
    name: str,
    context_ranks: int,
    mutation: str = "",
    backend: str = "auto",
    precision: str = "float64",
) -> Sums:
    """Loss and gradients of a batch, in the process group at hand or alone."""
    config = config_of(name, context_ranks, precision)
    model = config.model.model_copy(update={"attention_backend": backend})
    config = config.model_copy(update={"model": model})
    context = context_on(rank, config.parallel)
    assembly = assemble(config, context, table_of(config))
    step = assembly.step
    assert isinstance(step, TrainingStep)
    batches = batches_of(config, mutation)
    micro_batches = []
    for batch in batches:
        micro_batch = step._micro_batch(batch, step.seeds_of(3, batch))
        micro_batches.append(mutated(micro_batch, context, mutation))
    assembly.optimizer.begin_step(len(batches))
    loss = step.forward_backward(micro_batches)
    own_tokens = step._counted_tokens(batches)
    tokens = int(all_reduce(torch.tensor(own_tokens), context.gradient))
    gradients = {}
    for parameter_name, parameter in assembly.optimizer.shards.parameters.items():
        gradient = main_grad_of(parameter).clone()
        if mutation == MEAN:
            gradient *= tokens / own_tokens / context_ranks
        gradients[parameter_name] = all_reduce(gradient, context.gradient)
    return Sums(
        float(all_reduce(loss.double(), context.gradient)),
        tokens,
        own_tokens,
        assembly.optimizer.shards.master.numel(),
        gradients,
        step.evaluate_in_parts(batches, lambda sample: sample % 2, 2, 4),
    )


def means_of(evaluation: Evaluation) -> list[float]:
    return [evaluation.loss, *evaluation.by_source, *evaluation.by_position]


def error(ranks: list[Sums], truth: Sums) -> float:
    """The largest relative error of loss, any gradient and the means by part."""
    whole = max(gradient.norm() for gradient in truth.gradients.values())
    errors = []
    for sums in ranks:
        assert sums.tokens == truth.tokens
        errors.append(abs(sums.loss / truth.loss - 1))
        pairs = zip(means_of(sums.evaluation), means_of(truth.evaluation), strict=True)
        # A part of the sequence without a token that counts has no mean.
        errors += [abs(own / true - 1) for own, true in pairs if not math.isnan(own + true)]
        for name, gradient in truth.gradients.items():
            # A gradient that is zero but for rounding is measured against the largest.
            size = max(float(gradient.norm()), 1e-3 * float(whole))
            errors.append(float((sums.gradients[name] - gradient).norm()) / size)
    return max(errors)


@pytest.mark.parametrize(
    ("name", "context_ranks"),
    [
        ("rope, documents, grouped heads", 4),
        ("rope, scaled", 2),
        ("alibi, documents", 2),
        ("grouped heads, recomputed", 2),
        ("learned, documents", 2),
        ("dropout, recomputed", 2),
    ],
)
def test_loss_and_gradients_are_those_of_one_process(
    pool: Any, name: str, context_ranks: int
) -> None:
    ranks = pool.run(context_ranks, sums_of, name, context_ranks)
    truth = sums_of(0, name, 1)
    assert error(ranks, truth) <= 1e-12
    # The optimizer is shared by context ranks as by data ranks; shards are padded.
    for sums in ranks:
        assert sums.master_elements <= 1.1 * truth.master_elements / context_ranks


def test_in_float32_they_are_those_of_float32(pool: Any) -> None:
    arguments = "rope, documents, grouped heads", 2, "", "auto", "float32"
    truth = sums_of(0, "rope, documents, grouped heads", 1, precision="float32")
    assert error(pool.run(2, sums_of, *arguments), truth) <= 1e-5


def sums_by_boundaries(rank: int, name: str, context_ranks: int) -> Sums:
    """The same under a backend that is told where documents begin, with a stand-in for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "varlen_attn", varlen)
        # The real one needs a GPU, and bf16.
        patch.setattr(assembling, "prepare_backend", lambda backend, device: None)
        return sums_of(rank, name, context_ranks, backend="varlen")


def test_attention_that_is_told_where_documents_begin_is_that_of_one_process(pool: Any) -> None:
    name = "rope, documents, grouped heads"
    assert error(pool.run(2, sums_by_boundaries, name, 2), sums_of(0, name, 1)) <= 1e-12


def test_a_rank_without_a_token_that_counts_adds_nothing(pool: Any) -> None:
    arguments = "rope, scaled", 2, HALF_UNCOUNTED
    ranks = pool.run(2, sums_of, *arguments)
    assert [sums.own_tokens for sums in ranks] == [ranks[0].tokens, 0]
    assert error(ranks, sums_of(0, "rope, scaled", 1, HALF_UNCOUNTED)) <= 1e-12


@pytest.mark.parametrize(
    ("mutation", "at_least"),
    [
        (DOCUMENTS_DROPPED, 0.05),
        (LOCAL_POSITIONS, 0.05),
        (SHIFTED_AFTER_SLICING, 1e-3),
        (MEAN, 1e-3),
    ],
)
def test_a_mistake_is_caught(pool: Any, mutation: str, at_least: float) -> None:
    """Negative controls."""
    name = "rope, documents, grouped heads"
    ranks = pool.run(2, sums_of, name, 2, mutation)
    assert error(ranks, sums_of(0, name, 1)) >= at_least


class Order(TorchDispatchMode):
    """The order in which a rank starts collectives and attends, and awaits the former."""

    STARTS: ClassVar = {"_allgather_base_": "gather", "_reduce_scatter_base_": "sum"}

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.split("::")[1]
        if name.startswith("_scaled_dot_product"):
            name = "attend-backward" if name.endswith("backward") else "attend"
            self.events.append(name)
        if name in self.STARTS:
            self.events.append(self.STARTS[name])
        return function(*args, **(kwargs or {}))


def order_of_heads(rank: int, recompute: bool) -> list[str]:
    """What a rank does, one after the other, for attention of two lots of heads."""
    config = config_of("grouped heads, recomputed", 2)
    context = context_on(rank, config.parallel)
    attention = Attention(config.model, table_of(config), LayerContext(context), 0, recompute)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.ones(SEQ_LENGTH // 2, 1, config.model.hidden_size, requires_grad=True)
    wait = Pending.wait

    with Order() as order:

        def awaited(pending: Pending) -> Tensor:
            if pending.work is not None:
                order.events.append("wait")
            return wait(pending)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pending, "wait", awaited)
            out = attention(x, AttentionInputs()).out
            order.events.append("|")
            out.sum().backward()
    return order.events


@pytest.mark.parametrize("recompute", [False, True])
def test_heads_are_gathered_and_summed_while_others_attend(pool: Any, recompute: bool) -> None:
    """Each lot attends in two calls, one a chunk of the sequence."""
    forward = "gather gather wait attend attend wait attend attend"
    again = "gather wait attend attend " if recompute else ""
    late = f"{again}attend-backward attend-backward sum"
    # The sums of the second lot are awaited when the first has attended.
    backward = f"{late} {late} wait wait"
    for events in pool.run(2, order_of_heads, recompute):
        assert " ".join(events) == f"{forward} | {backward}"


def kept_bytes(rank: int, config: Config) -> tuple[int, int]:
    """(bytes that a forward pass keeps for backward, what the plan says of it).

    Without parameters, and without the masks of attention, which no kernel of a GPU has in memory.
    """
    context = context_on(rank, config.parallel)
    model = GPT(config.model, table_of(config), context, recompute=config.training.recompute)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    part = context.context_part
    length = part.length(config.model.seq_length)
    masks = {(length // 2, chunk.stop) for chunk in part.chunks(config.model.seq_length)}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        size = math.prod(tensor.shape[-2:]) * tensor.element_size()
        is_mask = tuple(tensor.shape[-2:]) in masks and storage.nbytes() == size
        if storage._cdata not in parameters and not is_mask:
            storages[storage._cdata] = storage
        return tensor

    tokens = torch.zeros(config.training.micro_batch_size, length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, labels=tokens.clone())
    assert loss.requires_grad
    (stage,) = rank_stages(config, 0)
    kept = sum(storage.nbytes() for storage in storages.values())
    return kept, stage_activations(config, stage)


@pytest.mark.parametrize(
    ("recompute", "at_once"), [("none", None), ("none", 1), ("selective", 1), ("full", None)]
)
def test_a_plan_knows_what_a_rank_keeps_for_backward(
    pool: Any, recompute: str, at_once: int | None
) -> None:
    settings = {
        "model": {"seq_length": 32, "num_query_groups": 2},
        "training": {"recompute": recompute},
        "parallel": {"context_parallel_size": 2, "context_heads_at_once": at_once},
    }
    for kept, planned in pool.run(2, kept_bytes, small_config(**settings)):
        assert kept == planned
