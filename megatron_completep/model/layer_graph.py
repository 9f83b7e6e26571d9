"""Runs of layers as one compiled function each: training.compile for small models on a CPU.

A small model's step is mostly the host's work: hundreds of operators and of Python calls a layer.
Here a few layers are one call. `layers` is what `Block` computes, written down as a function of
tensors alone (`Block` is its plain twin), and torch.compile makes one graph forward and one
backward of it. The gradients of the parameters leave backward together, for the queue.

Where graphs serve is a rule: `idle_reason` says it of a model, `LayerGraphs.serves` of a forward
pass. Elsewhere the blocks run.

S sequence, B micro-batch, H hidden, N query heads, G query groups, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_completep import kernels
from megatron_completep.config.schema import ModelConfig
from megatron_completep.kernels import reference
from megatron_completep.model.attention import AttentionInputs
from megatron_completep.model.block import Block
from megatron_completep.model.mlp import ACTIVATIONS
from megatron_completep.model.stream import Branch, Stream
from megatron_completep.model.wide_attention import pays_in_float32
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.traced import TracedProducts

# More layers in a graph take less time a step, and longer to compile.
LAYERS_A_GRAPH = 4
BRANCHES_A_LAYER = 2
SERVED = (torch.float32, torch.bfloat16)
# As definitions; a block runs two of them as operators.
ACTIVATION_DEFINITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    "squared_relu": reference.squared_relu,
    "swiglu": reference.swiglu,
}


@dataclass(frozen=True)
class LayerShape:
    """What the layers of a model have in common, beside their tensors.

    head_norm: of queries and keys; None: without QK-norm. scale: of the attention logits.
    """

    join: kernels.Join
    norm: kernels.Norm
    head_norm: kernels.Norm | None
    num_heads: int
    num_groups: int
    head_dim: int
    scale: float
    activation: str
    products: TracedProducts


class LayerWeights(NamedTuple):
    """The parameters of one layer, in the order of their use; None: the model has none such.

    Beside matrices in bf16 a graph has vectors in float32 (`LayerRun.leaves`).
    """

    attention_norm: Tensor
    attention_norm_bias: Tensor | None
    qkv: Tensor
    qkv_bias: Tensor | None
    q_gain: Tensor | None
    k_gain: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    mlp_norm_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None  # of a run's last layer not used: it stays pending in the stream


def layers(
    shape: LayerShape,
    residual: Tensor,
    out: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    weights: Sequence[LayerWeights],
) -> tuple[Tensor, Tensor]:
    """(the stream [S, B, H] after some layers, their last branch's output, still to be added).

    residual, out, bias: the stream, and the branch that is pending in it. cos, sin: of the rotary
    angles, [S, 1 or B, D/2]. weights: of each layer.
    """
    product = shape.products.linear
    activation = ACTIVATION_DEFINITIONS[shape.activation]
    for layer in weights:
        if out is not None:
            residual = reference.scaled_add(residual, out, bias, shape.join)
        dtype = layer.qkv.dtype  # of the branches; the stream's may be wider
        norm = (layer.attention_norm, layer.attention_norm_bias, shape.norm)
        x = reference.norm(residual, *norm, dtype)
        mixed = attention(shape, product(x, layer.qkv, layer.qkv_bias), layer, cos, sin)
        out = product(mixed, layer.output)
        residual = reference.scaled_add(residual, out, layer.output_bias, shape.join)
        norm = (layer.mlp_norm, layer.mlp_norm_bias, shape.norm)
        x = reference.norm(residual, *norm, dtype)
        out = product(activation(product(x, layer.up, layer.up_bias)), layer.down)
        bias = layer.down_bias
    assert out is not None
    return residual, out


def attention(
    shape: LayerShape, qkv: Tensor, layer: LayerWeights, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    """Causal attention of [S, B, (N + 2G) D] -> [S, B, N D]."""
    groups = shape.num_groups
    heads = qkv.view(*qkv.shape[:-1], shape.num_heads + 2 * groups, shape.head_dim)
    q, k, v = heads.split((shape.num_heads, groups, groups), dim=2)
    if shape.head_norm is not None:
        assert layer.q_gain is not None and layer.k_gain is not None
        q = reference.norm(q, layer.q_gain, None, shape.head_norm)
        k = reference.norm(k, layer.k_gain, None, shape.head_norm)
    if cos is not None and sin is not None:
        q = reference.rotary(q, cos, sin)
        k = reference.rotary(k, cos, sin)
    q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
    if pays_in_float32(q, k):
        q, k, v = q.float(), k.float(), v.float()
    mixed = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=shape.scale, enable_gqa=shape.num_heads != groups
    )
    return mixed.to(qkv.dtype).permute(2, 0, 1, 3).flatten(2)


def idle_reason(
    model: ModelConfig, context: LayerContext, recompute: str, own_branches: bool
) -> str | None:
    """Why the layers of a model do not become graphs, so that their operations are compiled alone.

    None where they do. own_branches: whether layers have other branches than attention and MLP.
    """
    ranks = context.ranks
    axes = (ranks.tensor, ranks.context, ranks.pipeline)
    reasons = {
        # A pipeline takes the gradients of weights at times of its own.
        "the model is split over ranks": any(axis.size > 1 for axis in axes),
        "mixtures of experts": model.moe is not None,
        "dropout": model.dropout > 0.0,
        f"recompute: {recompute}": recompute != "none",
        "position: alibi": model.position == "alibi",
        f"attention_backend: {model.attention_backend}": model.attention_backend != "auto",
        f"products by {context.products.library}": context.products.traced() is None,
        "other branches than attention and MLP": own_branches,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class LayerGraphs:
    """The layers of a model, in graphs of `LAYERS_A_GRAPH` that are compiled when first called.

    Attributes:
        runs: in the order of the model. The first one takes what is left of the number of layers:
            nothing is pending before it, so that it is a graph of its own in any case.
    """

    def __init__(self, model: ModelConfig, blocks: Sequence[Block], context: LayerContext) -> None:
        assert context.compiled is not None
        graph = context.compiled.graph(layers)
        first = len(blocks) % LAYERS_A_GRAPH or LAYERS_A_GRAPH
        bounds = [0, *range(first, len(blocks) + 1, LAYERS_A_GRAPH)]
        self.runs: list[LayerRun] = []
        for start, stop in pairwise(bounds):
            self.runs.append(LayerRun(graph, blocks[start:stop], model, context))
        self._weight = blocks[0].attention.qkv.weight
        # Kept, because a walk over all modules would cost host time in every pass.
        self._hooks: list[Mapping[int, Any]] = []
        for block in blocks:
            for module in block.modules():
                self._hooks += hooks_of(module)

    def serves(self, stream: Stream, inputs: AttentionInputs) -> bool:
        """Whether the graphs take the place of the blocks in this forward pass.

        They do in training alone: without gradients (validation, generation) they would be other
        graphs, to be compiled as well.
        """
        if not torch.is_grad_enabled() or self.hooked:
            return False
        weight = self._weight
        if weight.dtype not in SERVED or weight.device.type != "cpu":
            return False
        causal = inputs.bias is None and inputs.document_starts is None and inputs.caches is None
        return causal and stream.residual.dtype in SERVED

    @property
    def hooked(self) -> bool:
        """Whether a module has a hook: something waits for its parameters, or watches it."""
        return any(self._hooks)


class LayerRun:
    """A few layers of a chunk in one compiled function."""

    def __init__(
        self,
        graph: Callable[..., tuple[Tensor, Tensor]],
        blocks: Sequence[Block],
        model: ModelConfig,
        context: LayerContext,
    ) -> None:
        self.graph = graph
        self.shape = shape_of(blocks[0], model, context)
        self.queue = context.queue
        self.last_bias = blocks[-1].mlp.down.bias
        weights = [weights_of(block) for block in blocks]
        weights[-1] = weights[-1]._replace(down_bias=None)
        self.weights = tuple(weights)
        self._parameters = [p for p in chain(*weights) if p is not None]

    def leaves(self) -> tuple[LayerWeights, ...]:
        """What the graph has of each layer: its parameters, with vectors in float32.

        The gradient of a vector is a sum over all tokens, which bf16 would round before the queue
        adds it up. That of a matrix leaves a product in bf16 wherever it is computed.
        """
        # Asked here, because a model is cast to its precision after it is built.
        if self.weights[0].qkv.dtype == torch.float32:
            return self.weights
        return tuple(LayerWeights._make(map(widened, layer)) for layer in self.weights)

    def __call__(self, stream: Stream, inputs: AttentionInputs) -> Stream:
        """The stream after these layers; the last branch's output is still pending."""
        out, bias = (None, None) if stream.pending is None else stream.pending
        # Parameters are arguments, so that outputs want gradients although the stream does not.
        residual, last_out = _Run.apply(  # type: ignore[no-untyped-call]
            self, stream.residual, out, inputs.cos, inputs.sin, bias, *self._parameters
        )
        index = stream.branch_index + BRANCHES_A_LAYER * len(self.weights)
        return Stream(residual, index, None, Branch(last_out, self.last_bias))


class _Run(torch.autograd.Function):
    """Runs the graph, and hands the gradients of its parameters to the queue.

    No gradient of a parameter may travel through the outer pass of autograd, so the graph has a
    pass of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: LayerRun,
        residual: Tensor,
        out: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inner_residual = residual.detach().requires_grad_(residual.requires_grad)
        inner_out = None if out is None else out.detach().requires_grad_(out.requires_grad)
        inner_bias = widened(bias)
        weights = run.leaves()
        with torch.enable_grad():
            outputs = run.graph(run.shape, inner_residual, inner_out, inner_bias, cos, sin, weights)
        ctx.outputs = outputs
        ctx.inputs = (inner_residual, inner_out)
        ctx.others = 3 + len(parameters)  # arguments whose gradients autograd does not take
        ctx.parameters = parameters if bias is None else (bias, *parameters)
        ctx.leaves = [leaf for leaf in chain((inner_bias,), *weights) if leaf is not None]
        ctx.queue = run.queue
        return outputs[0].detach(), outputs[1].detach()

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        streams = [x for x in ctx.inputs if wanted(x)]
        parameters = [p for p in ctx.parameters if p.requires_grad]
        leaves = [leaf for leaf in ctx.leaves if leaf.requires_grad]
        # Where parameters are frozen, the stream or the last branch may depend on none that is not.
        outputs = [out for out in ctx.outputs if out.requires_grad]
        d_of_outputs = [
            d_out for out, d_out in zip(ctx.outputs, d_outputs, strict=True) if out.requires_grad
        ]
        gradients = torch.autograd.grad(outputs, [*streams, *leaves], d_of_outputs)
        of_parameters = gradients[len(streams) :]
        # The graph's tensors are no longer needed, whoever keeps the outer pass.
        ctx.outputs = None
        ctx.leaves = None
        ctx.queue.push_together(parameters, partial(add_gradients, of_parameters))
        of_streams = iter(gradients)
        d_inputs = [next(of_streams) if wanted(x) else None for x in ctx.inputs]
        return (None, *d_inputs, *(None,) * ctx.others)


def widened(parameter: Tensor | None) -> Tensor | None:
    """A vector in float32, as a leaf of the graph's own; a matrix, and float32, as it is given."""
    if parameter is None or parameter.dim() > 1 or parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().float().requires_grad_(parameter.requires_grad)


def wanted(x: Tensor | None) -> TypeGuard[Tensor]:
    """Whether an input of a graph is there and takes a gradient."""
    return x is not None and x.requires_grad


def add_gradients(
    gradients: Sequence[Tensor], main_grads: Sequence[Tensor | None], first: Sequence[bool]
) -> None:
    """main_grad (+)= gradient of each parameter, overwritten if it is the first of a step."""
    written: tuple[list[Tensor], list[Tensor]] = ([], [])
    added: tuple[list[Tensor], list[Tensor]] = ([], [])
    for gradient, main_grad, stale in zip(gradients, main_grads, first, strict=True):
        assert main_grad is not None  # parameters that are not trained are not pushed
        into, from_ = written if stale else added
        into.append(main_grad)
        from_.append(gradient)
    if written[0]:
        torch._foreach_copy_(*written)
    if added[0]:
        torch._foreach_add_(*added)


def shape_of(block: Block, model: ModelConfig, context: LayerContext) -> LayerShape:
    """What a block has in common with the other layers of its model."""
    attention = block.attention
    products = context.products.traced()
    assert products is not None  # `idle_reason`
    return LayerShape(
        join=block.attention_norm.join,
        norm=block.attention_norm.norm,
        head_norm=None if attention.q_norm is None else attention.q_norm.norm,
        num_heads=attention.num_heads,
        num_groups=attention.num_groups,
        head_dim=attention.head_dim,
        scale=attention.scale,
        activation=model.activation,
        products=products,
    )


def weights_of(block: Block) -> LayerWeights:
    """The parameters of a block."""
    attention = block.attention
    return LayerWeights(
        attention_norm=block.attention_norm.weight,
        attention_norm_bias=block.attention_norm.bias,
        qkv=attention.qkv.weight,
        qkv_bias=attention.qkv.bias,
        q_gain=None if attention.q_norm is None else attention.q_norm.weight,
        k_gain=None if attention.k_norm is None else attention.k_norm.weight,
        output=attention.output.weight,
        output_bias=attention.output.bias,
        mlp_norm=block.mlp_norm.weight,
        mlp_norm_bias=block.mlp_norm.bias,
        up=block.mlp.up.weight,
        up_bias=block.mlp.up.bias,
        down=block.mlp.down.weight,
        down_bias=block.mlp.down.bias,
    )


def hooks_of(module: nn.Module) -> list[Mapping[int, Any]]:
    """Where a module keeps what others have it call, forward and backward."""
    return [
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    ]
