"""Shapes of one family, by what is asked: parameters, depth, or the FLOPs of a run.

All shapes have the proxy's head size, its ratio of ffn_hidden_size and its heads a key/value group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megatron_completep.completep import table_of
from megatron_completep.config.bare import bare_config
from megatron_completep.config.derived import head_dim, num_query_groups
from megatron_completep.config.schema import Config, ModelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.instruments.trial import on_one_process, reshape
from megatron_completep.model.flops import training_flops_per_token
from megatron_completep.model.stages import whole_model
from megatron_completep.parallel.parameter import specs_of
from megatron_completep.roles import Role

CLOSE = 0.03  # of what was asked: shapes that are as near are told apart by their ratio N : L
SIZE_WEIGHT = 4.0 * CLOSE  # a miss as large as `close` counts as one of 12 % in the ratio
RATIO_RANGE = 1.5  # of N : L, round the one that is asked
MOST_LAYERS = 2**14  # of a shape that is looked at
OUTER = (Role.EMBEDDING, Role.UNEMBEDDING)


@dataclass(frozen=True)
class Shape:
    """A width and a depth, with what they come to."""

    hidden_size: int
    num_layers: int
    parameters: int  # with embedding and unembedding, without padding
    inner_parameters: int  # without them
    flops_per_token: float  # of training: forward and backward

    @property
    def ratio(self) -> float:
        """N / L."""
        return self.hidden_size / self.num_layers

    def tokens(self, per_parameter: float) -> int:
        """Tokens of a run, by all parameters."""
        return round(per_parameter * self.parameters)

    def run_flops(self, per_parameter: float) -> float:
        """FLOPs of a run of so many tokens per parameter."""
        return self.flops_per_token * self.tokens(per_parameter)

    def __str__(self) -> str:
        return f"{self.num_layers} layers x {self.hidden_size}"


@dataclass(frozen=True)
class Asked:
    """What a shape is chosen by; exactly one of the three is given.

    ratio: N / L. tokens_per_parameter: of the run, for `flops`. close: a shape whose size is as
    near as this, as a fraction, is near enough for the ratio to count.
    """

    ratio: float
    tokens_per_parameter: float
    parameters: float | None = None
    flops: float | None = None
    depth: int | None = None
    close: float = CLOSE

    def size(self, shape: Shape) -> float:
        """The figure of a shape that is asked for."""
        if self.parameters is not None:
            return shape.parameters
        if self.flops is not None:
            return shape.run_flops(self.tokens_per_parameter)
        return shape.num_layers

    @property
    def wanted(self) -> float:
        """That figure as it is asked."""
        return float(self.parameters or self.flops or self.depth or 0)

    def miss(self, shape: Shape) -> float:
        """How far the shape is from what was asked, as a fraction of it."""
        return self.size(shape) / self.wanted - 1


@dataclass(frozen=True)
class Choice:
    """The shape that was chosen, with the nearest smaller and larger one of the family."""

    shape: Shape
    smaller: Shape | None
    larger: Shape | None
    miss: float


class Family:
    """All shapes of a proxy. Parameters and FLOPs are linear in depth: two models tell them."""

    def __init__(self, proxy: Config) -> None:
        self.proxy = on_one_process(proxy)
        self._by_width: dict[int, tuple[Shape, Shape]] = {}

    def shape(self, width: int, depth: int) -> Shape:
        """The shape of a width and a depth."""
        if width not in self._by_width:
            shallow = measured(reshape(self.proxy, width, 1).model)
            deeper = measured(reshape(self.proxy, width, 2).model)
            self._by_width[width] = (shallow, deeper)
        shallow, deeper = self._by_width[width]
        further = depth - 1
        layer_parameters = deeper.inner_parameters - shallow.inner_parameters
        layer_flops = deeper.flops_per_token - shallow.flops_per_token
        return Shape(
            width,
            depth,
            shallow.parameters + further * layer_parameters,
            shallow.inner_parameters + further * layer_parameters,
            shallow.flops_per_token + further * layer_flops,
        )

    def widths(self) -> Iterator[int]:
        """All widths in ascending order, without end; the proxy's own is one of them.

        From 16 heads on they grow by an eighth at most, in numbers of heads that powers of two
        divide, so that tensor ranks can share them.
        """
        model = self.proxy.model
        size = head_dim(model)
        heads_per_group = model.num_attention_heads // num_query_groups(model)
        proxy_heads = model.hidden_size // size
        heads = 0
        while True:
            step = max(1, 2 ** int(math.log2(max(1, heads // 8))))
            following = heads + step
            if heads < proxy_heads < following and proxy_heads % heads_per_group == 0:
                yield proxy_heads * size
            heads = following
            if heads % heads_per_group == 0 or heads == proxy_heads:
                yield heads * size

    def choose(self, asked: Asked) -> Choice:
        """The shape of `nearest`.

        Raises ConfigError where no shape is between a fifth of what was asked and twice that.
        """
        choice = self.nearest(asked)
        if not -0.8 <= choice.miss <= 1:
            raise ConfigError(
                f"asked for {asked.wanted:.4g}, but the nearest shape of this proxy with N : L "
                f"within a factor of {RATIO_RANGE} of {asked.ratio:.4g} and up to "
                f"{MOST_LAYERS:,} layers has {asked.size(choice.shape):.4g} ({choice.shape}). "
                "Ask for about that, for another --shape, or take a proxy of another size."
            )
        return choice

    def nearest(self, asked: Asked) -> Choice:
        """The shape that is nearest to what was asked in size, and then in its ratio N : L."""
        candidates = self._candidates(asked)
        near = [shape for shape in candidates if abs(asked.miss(shape)) <= asked.close]
        # Where none is near, size alone decides.
        if near:
            closest = min(near, key=lambda shape: _distance(shape, asked))
        else:
            closest = min(candidates, key=lambda shape: _log_miss(shape, asked))
        # A layer more and a layer less are always there to choose from.
        layers = closest.num_layers
        deeper = self.shape(closest.hidden_size, layers + 1)
        shallower = self.shape(closest.hidden_size, max(1, layers - 1))
        others = [*candidates, shallower, deeper]
        smaller = [shape for shape in others if shape.parameters < closest.parameters]
        larger = [shape for shape in others if shape.parameters > closest.parameters]
        return Choice(
            closest,
            max(smaller, key=_parameters, default=None),
            min(larger, key=_parameters, default=None),
            asked.miss(closest),
        )

    def _candidates(self, asked: Asked) -> list[Shape]:
        """Shapes on both sides of what was asked, whose ratio is within a factor of 1.5 of it.

        Where heads are too wide for any, the last ones before that range.
        """
        shapes: list[Shape] = []
        highest = RATIO_RANGE * asked.ratio
        for width in self.widths():
            depths = [asked.depth or max(1, self._layers_below(width, asked))]
            if asked.depth is None:
                # The last one is that of the ratio, for where size matters little.
                of_ratio = min(MOST_LAYERS, max(1, round(width / asked.ratio)))
                depths += [min(MOST_LAYERS, depths[0] + 1), of_ratio]
            shapes += [self.shape(width, depth) for depth in dict.fromkeys(depths)]
            # Ratios grow with the width: once they are above the range, they stay there.
            if width / max(depths[:2]) > highest:
                break
        lowest = asked.ratio / RATIO_RANGE
        in_range = [shape for shape in shapes if lowest <= shape.ratio <= highest]
        return in_range or shapes[-4:]

    def _layers_below(self, width: int, asked: Asked) -> int:
        """The most layers at which the size is not above what was asked; 0: none."""
        low = 0
        high = 1
        while high < MOST_LAYERS and asked.size(self.shape(width, high)) <= asked.wanted:
            low = high
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            if asked.size(self.shape(width, middle)) <= asked.wanted:
                low = middle
            else:
                high = middle
        return low


def measured(model: ModelConfig) -> Shape:
    """A model's shape, read off its modules on the meta device."""
    specs = specs_of(whole_model(model, table_of(bare_config(model))))
    sizes = {name: prod(spec.shape) for name, spec in specs.items()}
    inner = sum(size for name, size in sizes.items() if specs[name].role not in OUTER)
    return Shape(
        model.hidden_size,
        model.num_layers,
        sum(sizes.values()),
        inner,
        training_flops_per_token(model),
    )


def _distance(shape: Shape, asked: Asked) -> float:
    ratio = abs(math.log(shape.ratio / asked.ratio))
    return ratio + SIZE_WEIGHT / asked.close * _log_miss(shape, asked)


def _log_miss(shape: Shape, asked: Asked) -> float:
    """The distance of a shape from what was asked, in natural logarithms of the size."""
    return abs(math.log(asked.size(shape) / asked.wanted))


def _parameters(shape: Shape) -> int:
    return shape.parameters
