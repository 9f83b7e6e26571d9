"""What the figures of a day with a GPU should be: a model of the training step, written before it.

Everything here is arithmetic on assumed rates; nothing was measured. A figure that is far from it
says that a kernel, or an assumption, is not what it was taken for.

Times are milliseconds on one device. T tokens, H hidden, N heads of size D, G groups, F inner
width, V vocabulary, n = T H elements of one activation, P parameters, b bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What a device is assumed to reach: bytes/s and FLOP/s.

    copy: reads and writes of a large copy. products: bf16 products of a step's shapes.
    attention_forward and attention_backward: of the causal half. peak: of the data sheet, bf16.
    """

    copy: float
    products: float
    attention_forward: float
    attention_backward: float
    peak: float


# By words of the device's name. H200: an H100 whose memory is faster as its data sheet says.
RATES = {
    "H100 80GB HBM3": Rates(3.0e12, 680e12, 510e12, 430e12, 989.4e12),
    "H200": Rates(4.3e12, 680e12, 510e12, 430e12, 989.4e12),
}
# Shares of a copy's rate that kernels reach: elementwise ones, those that reduce over rows, AdamW.
ELEMENTWISE = 0.90
REDUCING = 0.85
ADAMW = 0.93
HIDDEN_SHARE = 0.55  # of AdamW: it and the forward pass share the memory's bandwidth
# Milliseconds that a weight gradient takes longer because it is written in float32.
FLOAT32_OUT = 0.01
LAUNCH = 0.006
PROGRAMS = 528  # of the norm's backward, each with partial sums of the vector gradients


def rates_of(device_name: str) -> Rates | None:
    """The assumed rates of a device; None for one of which nothing is assumed."""
    matching = [rates for words, rates in RATES.items() if words in device_name]
    return matching[0] if matching else None


@dataclass(frozen=True)
class Shape:
    """A model and its micro-batch, in the words of the model's configuration."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocabulary: int
    sequence: int
    sequences: int
    gated: bool = False
    rotary: bool = True

    @property
    def tokens(self) -> int:
        return self.sequence * self.sequences

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.groups) * self.head_dim

    @property
    def up_width(self) -> int:
        return 2 * self.ffn if self.gated else self.ffn

    @property
    def parameters(self) -> int:
        """Of the matrices; norms and biases are nothing beside them."""
        attention = self.hidden * (self.qkv_width + self.heads * self.head_dim)
        mlp = self.hidden * (self.up_width + self.ffn)
        return self.layers * (attention + mlp) + 2 * self.vocabulary * self.hidden


@dataclass(frozen=True)
class Kernel:
    """One line of the model: so many launches of so many milliseconds each."""

    name: str
    times: int
    each: float

    @property
    def milliseconds(self) -> float:
        return self.times * self.each


class StepModel:
    """The kernels of a step and what they take at the assumed rates."""

    def __init__(self, shape: Shape, rates: Rates, chunk_bytes: int = 1 << 30):
        """chunk_bytes: of the logits that are held at once."""
        self.shape = shape
        self.rates = rates
        row_bytes = 2 * shape.vocabulary
        largest_chunk = max(1, chunk_bytes // row_bytes)
        self.chunks = -(-shape.tokens // largest_chunk)

    def ours(self) -> list[Kernel]:
        """Our training step, one micro-batch."""
        return [*self._forward(), *self._backward(), *self._head(), *self._update()]

    def hidden_update(self) -> float:
        """Milliseconds of AdamW that hide under the next forward pass (training.overlap_update)."""
        return HIDDEN_SHARE * self._moved(30 * self.shape.parameters, ADAMW)

    def plain_differences(self, pure: bool = False) -> list[Kernel]:
        """What the compiled plain model takes more (less: below 0) than our step.

        It is compiled as a whole, under autocast, with AdamW fused and clip_grad_norm_. pure:
        everything in bf16 instead, AdamW's moments too: other arithmetic.
        """
        shape = self.shape
        elements = shape.tokens * shape.hidden
        parameters = shape.parameters
        own_adamw = self._moved(30 * parameters, ADAMW)
        own_head = self._gradient_of_head() - self._moved(2 * shape.tokens * shape.vocabulary)
        own_norms = self._norm_forward() + self._norm_backward()
        common = [
            Kernel("gaps", 1, -0.5),
        ]
        if pure:
            norms = self._moved(8 * elements) + self._moved(12 * elements, REDUCING)
            return [
                *common,
                Kernel("weight gradients in bf16", 1, -self._moved(2 * parameters)),
                Kernel("clip as a pass", 1, self._moved(6 * parameters)),
                Kernel("AdamW", 1, self._moved(14 * parameters) - own_adamw),
                Kernel("gradient norm", 1, -self._moved(2 * parameters, REDUCING)),
                Kernel("norms", 2 * shape.layers, norms - own_norms),
                Kernel("head", 1, -own_head),
            ]
        norms = self._moved(12 * elements) + self._moved(18 * elements, 0.8)
        head_cast = self._moved(6 * shape.vocabulary * shape.hidden)
        return [
            *common,
            Kernel("weights cast to bf16", 1, self._moved(6 * parameters)),
            Kernel("weight gradients cast to float32", 1, self._moved(6 * parameters)),
            Kernel("clip as a pass", 1, self._moved(8 * parameters)),
            Kernel("AdamW", 1, self._moved(28 * parameters) - own_adamw),
            Kernel("norms on a float32 stream", 2 * shape.layers, norms - own_norms),
            Kernel("head", 1, head_cast - own_head),
            Kernel("embedding", 1, -0.2),
        ]

    def _product(self, rows: int, inner: int, columns: int) -> float:
        return 1e3 * 2 * rows * inner * columns / self.rates.products

    def _moved(self, size: float, share: float = ELEMENTWISE) -> float:
        """Milliseconds for bytes that are read or written, at a share of the copy's rate."""
        return 1e3 * size / self.rates.copy / share

    def _norm_forward(self) -> float:
        return self._moved(8 * self.shape.tokens * self.shape.hidden)

    def _norm_backward(self) -> float:
        partial_sums = self._moved(2 * PROGRAMS * self.shape.hidden * 4)
        elements = self.shape.tokens * self.shape.hidden
        return self._moved(10 * elements, REDUCING) + partial_sums + LAUNCH

    def _rotation(self) -> float:
        shape = self.shape
        if not shape.rotary:
            return 0.0
        return self._moved(2 * shape.tokens * (shape.heads + shape.groups) * shape.head_dim * 2)

    def _joined_heads(self) -> float:
        """The gradients of q, k and v, rotated back and written beside one another."""
        return self._moved(2 * self.shape.tokens * self.shape.qkv_width * 2)

    def _attention_flops(self) -> float:
        shape = self.shape
        width = shape.heads * shape.head_dim
        return 4 * shape.sequences * width * shape.sequence * shape.sequence / 2

    def _forward(self) -> list[Kernel]:
        shape = self.shape
        tokens = shape.tokens
        layers = shape.layers
        attention = 1e3 * self._attention_flops() / self.rates.attention_forward
        activation = self._moved(tokens * (shape.up_width + shape.ffn) * 2)
        heads_width = shape.heads * shape.head_dim
        return [
            Kernel("forward: residual norm", 2 * layers, self._norm_forward()),
            Kernel(
                "forward: queries, keys, values",
                layers,
                self._product(tokens, shape.hidden, shape.qkv_width),
            ),
            Kernel("forward: rotary", layers, self._rotation()),
            Kernel("forward: attention", layers, attention),
            Kernel("forward: out", layers, self._product(tokens, heads_width, shape.hidden)),
            Kernel("forward: up", layers, self._product(tokens, shape.hidden, shape.up_width)),
            Kernel("forward: activation", layers, activation),
            Kernel("forward: down", layers, self._product(tokens, shape.ffn, shape.hidden)),
        ]

    def _backward(self) -> list[Kernel]:
        """Every product has an input gradient and a weight gradient of its own cost."""
        shape = self.shape
        tokens = shape.tokens
        layers = shape.layers
        # Backward computes the scores again: five products for the two of forward.
        attention = 1e3 * 2.5 * self._attention_flops() / self.rates.attention_backward
        activation = self._moved(tokens * (2 * shape.up_width + shape.ffn) * 2)
        both = {
            "down": self._product(tokens, shape.ffn, shape.hidden),
            "up": self._product(tokens, shape.hidden, shape.up_width),
            "out": self._product(tokens, shape.heads * shape.head_dim, shape.hidden),
            "queries, keys, values": self._product(tokens, shape.hidden, shape.qkv_width),
        }
        products = []
        for name, forward in both.items():
            products.append(Kernel(f"backward: {name}", layers, 2 * forward + FLOAT32_OUT))
        return [
            *products,
            Kernel("backward: activation", layers, activation),
            Kernel("backward: residual norm", 2 * layers, self._norm_backward()),
            Kernel("backward: attention", layers, attention),
            Kernel("backward: q, k and v joined, rotated", layers, self._joined_heads()),
        ]

    def _gradient_of_head(self) -> float:
        """The head's weight gradient, read and written again by every chunk behind the first."""
        size = self.shape.vocabulary * self.shape.hidden
        traffic = self._moved(4 * size) + (self.chunks - 1) * self._moved(8 * size)
        return 0.6 * traffic  # the rest hides behind the products

    def _head(self) -> list[Kernel]:
        shape = self.shape
        products = 3 * 1.03 * self._product(shape.tokens, shape.hidden, shape.vocabulary)
        rows = self._moved(14 * shape.tokens * shape.hidden)
        embedding = self._moved(4 * shape.vocabulary * shape.hidden) + rows + 0.25
        loss = self._moved(6 * shape.tokens * shape.vocabulary)
        return [
            Kernel("head: products", 1, products),
            Kernel(f"head: weight gradient in {self.chunks} chunks", 1, self._gradient_of_head()),
            Kernel("head: cross-entropy", 1, loss),
            Kernel("embedding", 1, embedding),
        ]

    def _update(self) -> list[Kernel]:
        parameters = self.shape.parameters
        return [
            Kernel("AdamW, 30 bytes a parameter", 1, self._moved(30 * parameters, ADAMW)),
            Kernel("gradient norm", 1, self._moved(4 * parameters, REDUCING)),
            Kernel("small kernels and gaps", 1, 0.6 + 0.02 * self.shape.layers),
        ]


def total(kernels: Sequence[Kernel]) -> float:
    """Milliseconds of all of them."""
    return sum(kernel.milliseconds for kernel in kernels)
