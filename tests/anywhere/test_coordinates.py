"""The coordinate check of models of other trainers: a right one passes, planted mistakes do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_completep import Role, Table, check_coordinates, declare, initialize_, param_groups
from megatron_completep.errors import ConfigError
from megatron_completep.instruments.check_report import describe_check
from megatron_completep.instruments.coordinate_verdict import Verdict
from tests.anywhere.examples import all_names, plain_names

LR = 2**-8
STD = 0.02
Groups = list[dict[str, Any]]


def batches_of(count: int, size: int = 16, length: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of a random Markov chain over 64 words."""
    generator = torch.Generator().manual_seed(0)
    table = torch.softmax(3 * torch.randn(64, 64, generator=generator), -1)
    batches = []
    for _ in range(count):
        words = [torch.randint(64, (size,), generator=generator)]
        for _ in range(length):
            words.append(torch.multinomial(table[words[-1]], 1, generator=generator)[:, 0])
        text = torch.stack(words, 1)
        batches.append((text[:, :-1].contiguous(), text[:, 1:].contiguous()))
    return batches


def plain(width: int, depth: int, table: Table) -> nn.Module:
    model: nn.Module = plain_names()["Transformer"](width, depth, table)
    return model


def llama(width: int, depth: int, table: Table) -> nn.Module:
    model: nn.Module = all_names()["llama"](width, depth, table)
    return model


@dataclass(frozen=True)
class Mistake:
    """What a user may do wrong: with the table, the initial weights or the groups."""

    name: str
    axis: str
    forward: Callable[[Table], Table] = lambda table: table
    initial: Callable[[Table], Table] = lambda table: table
    groups: Callable[[Groups, float], Groups] = lambda groups, eps: groups


def without(table: Table, *, width: bool = False, depth: bool = False) -> Table:
    """The table of a model that has not grown."""
    m_N = 1.0 if width else table.width_multiplier
    m_L = 1.0 if depth else table.depth_multiplier
    return Table(width_multiplier=m_N, depth_multiplier=m_L, attention_scale=table.attention_scale)


def one_rate(groups: Groups, eps: float) -> Groups:
    return [{**group, "lr": LR} for group in groups]


def one_eps(groups: Groups, eps: float) -> Groups:
    return [{**group, "eps": eps} for group in groups]


MISTAKES = [
    Mistake("no residual multiplier", "depth", forward=lambda t: without(t, depth=True)),
    Mistake("no logit multiplier", "width", forward=lambda t: without(t, width=True)),
    Mistake("one learning rate", "width", groups=one_rate),
    Mistake("initial weights of the proxy", "width", initial=lambda t: without(t, width=True)),
    Mistake("one eps", "width", groups=one_eps),
]


def check(
    make: Callable[[int, int, Table], nn.Module],
    mistake: Mistake | None = None,
    widths: tuple[int, ...] = (32, 128),
    depths: tuple[int, ...] = (2, 8),
    steps: int = 4,
    **settings: Any,
) -> Any:
    """The check of a model in which a mistake is planted; by default with the two ends alone."""
    planted = mistake or Mistake("none", "")
    if mistake is not None:
        widths = widths if mistake.axis == "width" else widths[:1]
        depths = depths if mistake.axis == "depth" else depths[:1]

    def build(width: int, depth: int, table: Table) -> nn.Module:
        model = make(width, depth, planted.forward(table))
        declare(model)
        initialize_(model, planted.initial(table), std=STD)
        return model

    def optimizer(model: nn.Module, table: Table, eps: float) -> torch.optim.Optimizer:
        groups = param_groups(model, table, lr=LR, eps=eps)
        return torch.optim.AdamW(planted.groups(groups, eps))

    return check_coordinates(
        build,
        widths,
        depths,
        batches_of(steps + 1),
        lr=LR,
        make_optimizer=optimizer,
        **{"seeds": 2, "head_dim": 16, **settings},
    )


def test_a_right_model_passes_with_its_pictures_and_marked_activations(tmp_path: Path):
    lines: list[str] = []
    result = check(
        plain,
        steps=8,
        seeds=3,
        marks=["layers.0.attention", "layers.*.mlp"],
        out=tmp_path,
        say=lines.append,
    )
    assert result.verdict is Verdict.RIGHT, describe_check(result)
    assert len(lines) == 12
    # Blocks that only deeper models have are not compared.
    names = {"layers.0.attention", "layers.0.mlp", "layers.1.mlp"}
    assert set(result.marked["depth"]) == set(result.marked["width"]) == names
    assert abs(result.marked["width"]["layers.0.mlp"].value) < 0.5
    written = {path.name for path in tmp_path.iterdir()}
    assert {"coordinate_check.html", "coordinate_check_depth.png"} <= written
    content = json.loads((tmp_path / "coordinate_check.json").read_text())
    assert content["verdict"] == "right" and content["settings"]["depths"] == [2, 8]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_each_planted_mistake_is_found_in_the_plain_model(mistake: Mistake):
    result = check(plain, mistake)
    assert result.verdict is Verdict.WRONG, describe_check(result)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [None, *MISTAKES], ids=lambda m: m.name if m else "right")
def test_a_llama_of_transformers_is_judged_as_the_plain_model_is(mistake: Mistake | None):
    result = check(llama, mistake, widths=(32, 64, 128), depths=(2, 4, 8), steps=8, seeds=3)
    expected = Verdict.WRONG if mistake else Verdict.RIGHT
    assert result.verdict is expected, describe_check(result)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"widths": (32,), "depths": (2,)}, "nothing to compare"),
        ({"widths": (), "depths": (2, 4)}, "at least 1"),
        ({"steps": 0}, "one for the probe"),
        ({"seeds": 0}, "seeds = 0"),
        ({"widths": (16.0, 32.0)}, "whole numbers"),
        ({"base_width": 0}, "base_width = 0"),
        ({"marks": ["layrs.0"]}, "Did you mean layers.0"),
        ({"marks": "layers.0"}, "list of patterns"),
        # The model takes an attention scale that nobody gave: no number is no verdict.
        ({"head_dim": None}, "give head_dim"),
    ],
)
def test_a_check_that_cannot_tell_anything_does_not_begin(settings: Any, words: str):
    with pytest.raises(ConfigError, match=words):
        check(plain, **settings)


def test_batches_of_another_kind_need_functions_of_their_own():
    tokens = [batch[0] for batch in batches_of(3, 2, 4)]
    with pytest.raises(ConfigError, match="type Tensor"):
        check_coordinates(plain, [16, 32], [1], tokens, head_dim=16)
    with pytest.raises(ConfigError, match="build returned NoneType"):
        check_coordinates(lambda *sizes: None, [16, 32], [1], batches_of(3, 2, 4))


class NoFinalNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        self.head = nn.Linear(width, 64, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(tokens))
        return logits


def test_a_model_whose_stream_cannot_be_seen_is_refused():
    with pytest.raises(ConfigError, match="final_norm"):
        check(lambda width, depth, table: NoFinalNorm(width))


def test_another_loss_and_another_forward_pass_can_be_handed_in():
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)[:, -1]

    def loss(logits: Tensor, batch: Tensor) -> Tensor:
        return logits.square().mean()

    def build(width: int, depth: int, table: Table) -> nn.Module:
        model = plain(width, depth, table)
        assert Role.FINAL_NORM in declare(model).values()
        return model

    tokens = [batch[0] for batch in batches_of(3, 2, 4)]
    result = check_coordinates(
        build, [16, 32], [1], tokens, head_dim=16, seeds=1, forward=forward, loss=loss
    )
    assert result.verdict is Verdict.CANNOT_TELL or result.verdict is Verdict.WRONG
    assert all(len(sample.measured.losses) == 2 for sample in result.samples)
