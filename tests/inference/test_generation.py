"""Generation: the trained model, read from its checkpoint, over the cache, sampled as asked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_completep.data.loader import validation_batches
from megatron_completep.data.tokenizer import BytesTokenizer
from megatron_completep.errors import CheckpointError, DataError
from megatron_completep.inference.generation import (
    Generation,
    Sampling,
    find_checkpoint,
    generate,
    generate_text,
    generate_texts,
    load_model,
    next_token,
    penalize,
)
from megatron_completep.model.gpt import GPT
from megatron_completep.pretrain import pretrain
from tests.support.models import build_model, model_config
from tests.support.runs import rows_of, tiny_config

GREEDY = Sampling(temperature=0.0, max_new_tokens=8)


def small_model(**changes: object) -> GPT:
    model = model_config(**{"vocab_size": 257, "seq_length": 32, **changes})
    return build_model(model)


def test_greedy_generation_follows_the_training_paths_logits() -> None:
    gpt, tokens = small_model(), [5, 9, 200]
    made = list(generate(gpt, tokens, GREEDY))
    with torch.no_grad():
        for token in made:  # the whole sequence anew every time: no cache, no sampling code
            assert token == gpt(torch.tensor([tokens]))[0, -1].argmax()
            tokens = [*tokens, token]
    assert len(made) == 8 and len(set(made)) > 1


def test_a_checkpoints_model_has_the_validation_loss_that_the_run_reported(folder: Path) -> None:
    config = tiny_config(folder, "training.train_steps=6", output="generate")
    pretrain(config)
    loaded, gpt = load_model(config.training.output_dir, torch.device("cpu"), torch.float64)
    assert loaded == config
    batches = validation_batches(
        config.data,
        samples=10,
        seq_length=16,
        micro_batch_size=5,
        vocab_size=config.model.vocab_size,
        data_rank=0,
        data_size=1,
    )
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                gpt(b.tokens).flatten(0, 1), b.labels.flatten()
            ).item()
            for b in batches
        ]
    reported = rows_of(config)[-1]["validation_loss"]
    assert math.fsum(losses) / len(losses) == pytest.approx(reported, rel=1e-12)
    _, older = load_model(config.training.output_dir, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        older.layers["0"].mlp.down.weight.mul_(1.1)  # another model has another loss
        loss = sum(
            torch.nn.functional.cross_entropy(
                older(b.tokens).flatten(0, 1), b.labels.flatten()
            ).item()
            for b in batches
        ) / len(losses)
    assert abs(loss - reported) > 1e-6


def test_tokens_are_drawn_with_the_probabilities_of_the_temperature() -> None:
    logits, generator = torch.tensor([0.0, 1.0, 2.0, -1.0]), torch.Generator().manual_seed(1)
    drawn = [
        int(next_token(logits, Sampling(temperature=0.5, top_p=1.0), generator))
        for _ in range(20_000)
    ]
    frequencies = torch.bincount(torch.tensor(drawn), minlength=4).double() / len(drawn)
    torch.testing.assert_close(
        frequencies, torch.softmax(logits.double() / 0.5, 0), atol=0.01, rtol=0
    )
    assert (
        frequencies - torch.softmax(logits.double(), 0)
    ).abs().max() > 0.1  # a forgotten temperature would be seen


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(1.0, {0, 1, 2, 3}), (0.85, {0, 1, 2}), (0.8, {0, 1}), (0.5, {0}), (1e-9, {0})],
)
def test_top_p_keeps_the_fewest_tokens_with_that_probability(
    top_p: float, expected: set[int]
) -> None:
    logits, generator = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), torch.Generator().manual_seed(1)
    assert {
        int(next_token(logits, Sampling(1.0, top_p), generator)) for _ in range(500)
    } == expected


def test_generation_ends_at_the_end_of_a_document() -> None:
    gpt = small_model()
    made = list(generate(gpt, [5, 9, 200], GREEDY))
    ended = list(generate(gpt, [5, 9, 200], GREEDY, end_tokens=[made[3]]))
    assert ended == made[: made.index(made[3])]


def test_streamed_pieces_are_the_text_of_all_tokens_and_whole_characters() -> None:
    gpt, tokenizer = small_model(), BytesTokenizer()
    text = "äöü€ 字".encode()
    script = iter([*text, 256])

    def forward(tokens: torch.Tensor, caches: object) -> torch.Tensor:
        logits = torch.zeros(1, tokens.shape[1], 257)
        logits[0, -1, next(script)] = 1.0
        return logits

    gpt.forward = forward  # type: ignore[method-assign, assignment]
    pieces = list(
        generate_text(gpt, tokenizer, "prompt", Sampling(temperature=0.0, max_new_tokens=50))
    )
    assert "".join(pieces) == text.decode()
    assert [piece for piece in pieces if piece] == list(text.decode())


def test_equal_seeds_give_equal_texts_and_others_do_not() -> None:
    gpt, tokenizer = small_model(), BytesTokenizer()

    def text(seed: int) -> str:
        generator = torch.Generator().manual_seed(seed)
        return "".join(generate_text(gpt, tokenizer, "", Sampling(1.0, 1.0, 20), generator))

    assert text(1) == text(1) != text(2)


PROMPTS = [[5, 9, 200], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [40, 41, 42, 43, 44, 45]]


@pytest.mark.parametrize("kind", ["rope", "learned", "alibi", "experts"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_prompts_of_any_lengths_gives_what_each_gives_alone(
    kind: str, temperature: float
) -> None:
    experts: dict[str, Any] = {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24}}
    gpt = small_model(**(experts if kind == "experts" else {"position": kind}))
    sampling = Sampling(temperature, 1.0, 12)

    def seeded() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(100 + number) for number in range(len(PROMPTS))]

    alone = [
        list(generate(gpt, prompt, sampling, (), generator))
        for prompt, generator in zip(PROMPTS, seeded(), strict=True)
    ]
    end = alone[0][4]  # one row ends early, and others where they happen to draw it
    together: list[list[int]] = [[] for _ in PROMPTS]
    for made in Generation(gpt, PROMPTS, sampling, [end], seeded()):
        for number, token in made:
            together[number].append(token)
    expected = [made[: made.index(end)] if end in made else made for made in alone]
    assert together == expected
    assert len({len(made) for made in together}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_seeds_give_equal_texts_in_any_batch_in_float32_and_in_the_same_batch_in_bf16(
    dtype: torch.dtype,
) -> None:
    gpt, sampling = small_model().to(dtype), Sampling(1.0, 1.0, 12)

    def texts(prompts: list[list[int]], first: int = 0) -> list[list[int]]:
        seeded = [torch.Generator().manual_seed(first + number) for number in range(len(prompts))]
        made: list[list[int]] = [[] for _ in prompts]
        for step in Generation(gpt, prompts, sampling, (), seeded):
            for number, token in step:
                made[number].append(token)
        return made

    together = texts(PROMPTS)
    assert together == texts(PROMPTS)
    if dtype == torch.float32:
        assert together == texts(PROMPTS[:1]) + texts(PROMPTS[1:3], 1) + texts(PROMPTS[3:], 3)


def count_tokens(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and tokens a row of every pass through the model from now on."""
    shapes, right = [], gpt.forward

    def counted(tokens: torch.Tensor, **rest: object) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return right(tokens, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(gpt, "forward", counted)
    return shapes


def test_work_grows_linearly_in_new_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new token takes one token through the model, whatever came before it;
    the prompt goes through once.
    """
    gpt = small_model()
    shapes = count_tokens(gpt, monkeypatch)
    for length in (8, 16, 24):
        shapes.clear()
        list(generate(gpt, PROMPTS[2], Sampling(0.0, 1.0, length)))
        assert shapes == [(1, 9)] + [(1, 1)] * (length - 1)


def test_a_batch_feeds_what_all_rows_know_at_once_and_drops_rows_that_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpt = small_model()
    shapes = count_tokens(gpt, monkeypatch)
    generation = Generation(gpt, [[1, 2, 3], [1, 2, 3, 4, 5, 6, 7]], Sampling(0.0, 1.0, 3))
    for made in generation:
        if len(shapes) == 2:
            generation.stop(0)
            assert [number for number, _ in made] == [0]
    # Three tokens of both; one drawn beside one of the prompt; then the short row is gone, and
    # three of the prompt go at once.
    assert shapes == [(2, 3), (2, 1), (1, 3), (1, 1), (1, 1)]


def test_top_k_keeps_the_likeliest_tokens() -> None:
    logits, generator = torch.tensor([0.1, 3.0, 2.9, -1.0, 3.1]), torch.Generator().manual_seed(1)
    for top_k, expected in ((1, {4}), (2, {4, 1}), (3, {4, 1, 2}), (0, {0, 1, 2, 3, 4})):
        drawn = {
            int(next_token(logits, Sampling(2.0, 1.0, top_k=top_k), generator)) for _ in range(800)
        }
        assert drawn == expected


def test_the_repetition_penalty_is_transformers_own() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, ids, True)
    expected = processors.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits)
    torch.testing.assert_close(penalize(logits, seen, 1.7), expected, rtol=0, atol=0)
    gpt = small_model(tied_embeddings=True)  # which likes to repeat itself
    repeated, varied = (
        list(generate(gpt, [5, 9], Sampling(0.0, 1.0, 20, 0, penalty))) for penalty in (1.0, 5.0)
    )
    assert len(set(varied)) > len(set(repeated))


def test_texts_end_with_the_first_stop_in_them() -> None:
    gpt, tokenizer = small_model(), BytesTokenizer()
    texts = ["", ""]
    for number, piece in generate_texts(gpt, tokenizer, ["ab", "x"], Sampling(0.0, 1.0, 20)):
        texts[number] += piece
    stop = texts[0][5:7]
    stopped = ["", ""]
    for number, piece in generate_texts(
        gpt, tokenizer, ["ab", "x"], Sampling(0.0, 1.0, 20), until=[[stop, "never"], []]
    ):
        stopped[number] += piece
    assert stopped == [texts[0][: texts[0].index(stop) + len(stop)], texts[1]]


@pytest.mark.parametrize(
    ("prompt", "changes", "words"),
    [
        ([], {}, "prompt is empty"),
        ([1, 257], {}, "token id 257, but the vocabulary has ids 0 to 256"),
        ([1, -3, 256], {}, "token id -3, but the vocabulary has ids 0 to 256"),
        ([1] * 30, {"position": "learned"}, "learned positions"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(
    prompt: list[int], changes: dict[str, str], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        list(generate(small_model(**changes), prompt, GREEDY))


def test_settings_that_mean_nothing_are_all_named() -> None:
    with pytest.raises(DataError) as error:
        Sampling(temperature=-1, top_p=0, max_new_tokens=0, top_k=-1, repetition_penalty=0)
    assert len(str(error.value).splitlines()) == 5


def test_a_folder_without_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint(tmp_path)
