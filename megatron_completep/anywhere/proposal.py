"""Roles that are proposed for the parameters of a model, from module kinds, shapes and names.

Nothing is guessed where two answers are possible: such parameters are listed with the reason, and
the user decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from megatron_completep.anywhere.stacks import (
    Stack,
    embeddings_of,
    in_block,
    stacks_of,
    stream_width,
)
from megatron_completep.roles import Role

# The last part of a norm's name: a norm of queries or keys, whose gain all heads share.
QK_NAME = re.compile(
    r"(q|k|query|key|qk)_?(ln|norm|layer_?norm|rms_?norm)|(ln|norm|rms_?norm)_?(q|k|query|key|qk)"
)
FINAL_NAME = re.compile(r".*final.*|.*last.*|ln_?f|norm_?f|norm|out(put)?_?norm|norm_?out")
HEAD_NAME = re.compile(
    r"(lm_?)?head|unembed(ding)?|output(_layer)?|out|classifier|score|decoder|"
    r"(to_?)?logits|embed_?out"
)
ROUTER_NAME = re.compile(r".*router.*|gate")
POSITION_NAME = re.compile(r".*pos.*")


@dataclass
class Proposal:
    """What could be decided of a model's parameters, by name."""

    roles: dict[str, Role] = field(default_factory=dict)
    fan_ins: dict[str, int] = field(default_factory=dict)  # of matrices of hidden weights
    undecided: dict[str, str] = field(default_factory=dict)  # name -> why


@dataclass(frozen=True)
class _Model:
    """What the decision on one parameter needs to know of all others."""

    stacks: list[Stack]
    width: int | None
    vocabularies: set[int]
    outer_norms: int  # norms outside the blocks


@dataclass(frozen=True)
class _Place:
    """One parameter and where it stands."""

    name: str
    attribute: str
    parameter: nn.Parameter
    module: nn.Module
    module_name: str  # the last part
    parent: nn.Module | None


Decision = Role | str  # or why there is none


def propose_roles(model: nn.Module) -> Proposal:
    """A role for each parameter that trains, where there is one answer only."""
    stacks = stacks_of(model)
    outer_norms = 0
    for name, module in model.named_modules():
        outer_norms += is_norm(module) and not in_block(name, stacks)
    vocabularies = {embedding.num_embeddings for embedding in embeddings_of(model, stacks)}
    facts = _Model(stacks, stream_width(model, stacks), vocabularies, outer_norms)
    proposal = Proposal()
    for place in _places(model):
        decision = _decide(place, facts)
        if isinstance(decision, Role):
            proposal.roles[place.name] = decision
        else:
            proposal.undecided[place.name] = decision
        fan_in = fan_in_of(place.module, place.attribute, place.parameter)
        if fan_in is not None:
            proposal.fan_ins[place.name] = fan_in
    return proposal


def _places(model: nn.Module) -> Iterator[_Place]:
    """Every parameter that trains, once, under the name that the model gives it."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        path, _, attribute = name.rpartition(".")
        parent_path, _, module_name = path.rpartition(".")
        parent = modules.get(parent_path) if path else None
        yield _Place(name, attribute, parameter, modules[path], module_name, parent)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: of torch's, or called so and with vectors alone."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
        return True
    own = list(module.parameters(recurse=False))
    vectors_only = all(parameter.dim() == 1 for parameter in own)
    is_leaf = next(module.children(), None) is None
    return "norm" in type(module).__name__.lower() and is_leaf and bool(own) and vectors_only


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as [in, out], as those of transformers' GPT-2 do."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix `weight` and adds a vector `bias`."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def fan_in_of(module: nn.Module, attribute: str, parameter: nn.Parameter) -> int | None:
    """The fan-in of a matrix whose orientation the kind of its module tells; else None."""
    if parameter.dim() != 2:
        return None
    if is_transposed(module) and attribute == "weight":
        return parameter.shape[0]
    if is_linear(module) or isinstance(module, nn.MultiheadAttention):
        return parameter.shape[1]
    return None


def _decide(place: _Place, facts: _Model) -> Decision:
    inside = in_block(place.name, facts.stacks)
    if isinstance(place.module, nn.Embedding):
        return "an embedding inside a block" if inside else Role.EMBEDDING
    if is_norm(place.module):
        return _decide_norm(place, facts, inside)
    if is_linear(place.module):
        return _decide_linear(place, facts, inside)
    if isinstance(place.module, nn.MultiheadAttention) and inside:
        # bias_k and bias_v are further keys and values, of shape [1, 1, E].
        if place.attribute in ("bias_k", "bias_v"):
            return "a learned key or value"
        return Role.HIDDEN_BIAS if place.attribute.endswith("bias") else Role.HIDDEN_WEIGHT
    is_table = place.parameter.dim() >= 2 and place.parameter.shape[-1] == facts.width
    if not inside and is_table and POSITION_NAME.fullmatch(place.attribute.lower()):
        return Role.EMBEDDING
    return f"a parameter of {type(place.module).__name__}, a kind of module that is not known"


def _decide_norm(place: _Place, facts: _Model, inside: bool) -> Decision:
    name = place.module_name.lower()
    size = place.parameter.shape[-1]
    spans_stream = facts.width is None or size == facts.width
    if inside:
        # A gain as wide as the stream is not shared by the heads, which is what the row is for.
        if QK_NAME.fullmatch(name):
            is_shared = facts.width is None or not spans_stream
            return Role.QK_NORM if is_shared else "a norm of queries or keys over all heads"
        if spans_stream:
            return Role.PRE_NORM
        return f"a norm over {size} features inside a block, whose stream has {facts.width}"
    if not spans_stream:
        return f"a norm over {size} features outside the blocks"
    if facts.outer_norms == 1 or FINAL_NAME.fullmatch(name):
        return Role.FINAL_NORM
    return "one of several norms outside the blocks, and its name does not say that it is the last"


def _decide_linear(place: _Place, facts: _Model, inside: bool) -> Decision:
    if place.parameter.dim() > 2:
        return "a tensor of several matrices"
    if inside:
        is_router = ROUTER_NAME.fullmatch(place.module_name.lower())
        has_experts = place.parent is not None and hasattr(place.parent, "experts")
        if is_router and has_experts:
            return "the router of a mixture of experts, which the table has no row for"
        return Role.HIDDEN_BIAS if place.attribute == "bias" else Role.HIDDEN_WEIGHT
    if place.attribute == "bias":
        return (
            "a bias outside the blocks: the table has no row for it; that of final_norm (the "
            "base's learning rate, no decay) fits the bias of an unembedding"
        )
    rows = place.parameter.shape[1 if is_transposed(place.module) else 0]
    reads_stream = facts.width is None or place.parameter.numel() == rows * facts.width
    is_head = rows in facts.vocabularies or HEAD_NAME.fullmatch(place.module_name.lower())
    if reads_stream and is_head:
        return Role.UNEMBEDDING
    return "a matrix outside the blocks that does not look like an unembedding"
