"""Scores of texts: ours against plain logits,
lm-eval's figures against ours, one process against two.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.tokenizer import BytesTokenizer
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.inference.generation import Sampling, generate_texts
from megatron_completep.inference.lm_eval_tasks import TaskSettings, continue_until, evaluate_tasks
from megatron_completep.inference.scoring import Scorer, score_token_file
from megatron_completep.parallel.axis import Axis
from tests.support.corpora import write_documents, write_texts
from tests.support.models import build_model, model_config
from tests.support.ranks import WorkerPool

TEXTS = [
    "Zwölf Boxkämpfer jagen Viktor.",
    "x",
    "敏捷的棕色狐狸",
    "the quick brown fox jumps over the lazy dog " * 3,
    "\n\n  tail",
]


def small_scorer(ranks: Axis | None = None, batch_size: int = 3, **changes: Any) -> Scorer:
    model = model_config(**{"vocab_size": 257, "seq_length": 32, "num_layers": 2, **changes})
    return Scorer(
        build_model(model).eval(),
        BytesTokenizer(),
        ranks,
        batch_size,
    )


def plain_score(scorer: Scorer, context: list[int], target: list[int]) -> float:
    """One sequence at a time, without batches or padding."""
    ids = [*context, *target][-scorer.max_length - 1 :]
    with torch.no_grad():
        log_probabilities = torch.log_softmax(scorer.model(torch.tensor([ids[:-1]]))[0], dim=-1)
    return sum(
        log_probabilities[len(ids) - 1 - len(target) + i, token].item()
        for i, token in enumerate(target)
    )


@pytest.mark.parametrize(
    "changes",
    [{"position": "rope"}, {"position": "alibi"}, {"moe": {"num_experts": 4, "top_k": 2}}],
    ids=["rope", "alibi", "experts"],
)
def test_batched_likelihoods_are_those_of_each_sequence_alone(changes: dict[str, Any]) -> None:
    scorer = small_scorer(**changes)
    generator = np.random.default_rng(0)
    # (50, 4): the context is cut to fit
    sizes = [(1, 1), (5, 3), (20, 2), (1, 32), (50, 4), (3, 0), (2, 9)]
    pairs = [
        (generator.integers(0, 257, a).tolist(), generator.integers(0, 257, b).tolist())
        for a, b in sizes
    ]
    with torch.no_grad():
        likeliest = scorer.model(torch.tensor([[7, 8]]))[0, -1].argmax().item()
    pairs.append(([7, 8], [int(likeliest)]))
    found = scorer.score(pairs)
    assert [f.log_likelihood for f in found] == pytest.approx(
        [plain_score(scorer, *pair) for pair in pairs], rel=1e-10
    )
    assert found[-1].is_greedy and found[5].is_greedy and not found[3].is_greedy
    with pytest.raises(DataError, match="a target of 33 tokens"):
        scorer.score([([1], [2] * 33)])


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 100])
def test_windows_are_lm_evals_own(length: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(length))
    expected = [
        utils.make_disjoint_window(pair)
        for pair in utils.get_rolling_token_windows(tokens, 256, 32, 1)
    ]
    assert [(list(a), list(b)) for a, b in small_scorer().windows(tokens)] == expected
    assert list(small_scorer().windows([])) == []


def write_tasks(folder: Path) -> str:
    """Tasks over a local file: the texts' likelihood, a choice, and a continuation."""
    rows = [{"text": text, "choices": [text[-1], "@@", " and"], "answer": 0} for text in TEXTS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    head = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
        "test_split: test\nmetadata:\n  version: 1\n"
    )
    (folder / "rolling.yaml").write_text(
        f"task: local_rolling\noutput_type: loglikelihood_rolling\n{head}"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n  - metric: byte_perplexity\n"
    )
    (folder / "choice.yaml").write_text(
        f"task: local_choice\noutput_type: multiple_choice\n{head}"
        'doc_to_text: "{{text[:-1]}}"\ndoc_to_choice: "{{choices}}"\n'
        'target_delimiter: ""\ndoc_to_target: "{{answer}}"\nmetric_list:\n  - metric: acc\n'
    )
    (folder / "continue.yaml").write_text(
        f"task: local_continue\noutput_type: generate_until\n{head}"
        'doc_to_text: "{{text}}"\ndoc_to_target: "nothing"\n'
        'generation_kwargs:\n  until: ["zz"]\n  max_gen_toks: 4\n'
        "metric_list:\n  - metric: exact_match\n"
    )
    return str(folder)


def by_metric(row: dict[str, Any]) -> dict[str, Any]:
    return {name.split(",")[0]: value for name, value in row.items()}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No network, and caches in a folder of the test's."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_lm_evals_bits_per_byte_on_an_offline_task_are_ours(offline: None, tmp_path: Path) -> None:
    scorer = small_scorer()
    settings = TaskSettings(
        ("local_rolling", "local_choice", "local_continue"),
        write_tasks(tmp_path),
        bootstrap_iters=0,
    )
    theirs = evaluate_tasks(scorer, settings)
    ours = score_token_file(scorer, IndexedDataset(write_texts(tmp_path / "texts", TEXTS)))
    assert ours.bytes == sum(len(text.encode()) for text in TEXTS) and ours.documents == len(TEXTS)
    rolling = by_metric(theirs["local_rolling"])
    assert rolling["bits_per_byte"] == pytest.approx(ours.bits_per_byte, abs=1e-6)
    assert math.log2(rolling["byte_perplexity"]) == pytest.approx(ours.bits_per_byte, abs=1e-6)
    independent = -sum(
        plain_score(scorer, list(a), list(b))
        for text in TEXTS
        for a, b in scorer.windows(list(text.encode()))
    )
    assert ours.nats == pytest.approx(independent, rel=1e-10)
    right = 0
    for text in TEXTS:  # the choice whose likelihood after the text is highest
        context = list(text[:-1].rstrip().encode()) or [256]
        # lm-eval moves trailing space over to the choices
        moved = text[:-1][len(text[:-1].rstrip()) :]
        scores = [
            plain_score(scorer, context, list((moved + choice).encode()))
            for choice in (text[-1], "@@", " and")
        ]
        right += scores.index(max(scores)) == 0
    assert by_metric(theirs["local_choice"])["acc"] == pytest.approx(right / len(TEXTS))
    assert by_metric(theirs["local_continue"])["exact_match"] == 0.0
    other = small_scorer()
    other.max_length = 16  # negative control: another context is another figure
    assert (
        abs(
            score_token_file(other, IndexedDataset(str(tmp_path / "texts"))).bits_per_byte
            - ours.bits_per_byte
        )
        > 1e-4
    )


def score_in_parallel(rank: int, size: int, prefix: str) -> tuple[Any, Any, Any]:
    scorer = small_scorer(Axis("world", rank, size, torch.distributed.group.WORLD), batch_size=2)
    pairs = [([i + 1], list(range(i))) for i in range(9)]
    texts = continue_until(scorer, [(text, {"max_gen_toks": 6, "until": []}) for text in TEXTS])
    return (
        [found.log_likelihood for found in scorer.score(pairs)],
        score_token_file(scorer, IndexedDataset(prefix)).to_json(),
        texts,
    )


def test_processes_share_the_work_and_all_have_the_one_processes_results(
    tmp_path: Path, pool: WorkerPool
) -> None:
    prefix = write_texts(tmp_path / "texts", TEXTS)
    scorer = small_scorer(batch_size=2)
    pairs = [([i + 1], list(range(i))) for i in range(9)]
    likelihoods, score, texts = pool.run(2, score_in_parallel, 2, prefix)[0]
    assert pool.run(2, score_in_parallel, 2, prefix)[1] == (likelihoods, score, texts)
    assert likelihoods == pytest.approx(
        [found.log_likelihood for found in scorer.score(pairs)], rel=1e-12
    )
    expected = score_token_file(scorer, IndexedDataset(prefix)).to_json()
    assert score == pytest.approx(expected, rel=1e-12)
    assert texts == continue_until(
        scorer, [(text, {"max_gen_toks": 6, "until": []}) for text in TEXTS]
    )


def test_continuations_end_before_their_stop_and_keep_to_their_options() -> None:
    scorer = small_scorer()

    def greedy(text: str, tokens: int) -> str:
        return "".join(
            piece
            for _, piece in generate_texts(
                scorer.model, scorer.tokenizer, [text], Sampling(0.0, 1.0, tokens)
            )
        )

    whole = [greedy(text, 6) for text in ("ab", "xyz", "q")]
    requests = [
        ("ab", {"until": [], "max_gen_toks": 6}),
        ("xyz", {"until": [whole[1][2]], "max_gen_toks": 6}),
        ("q", {"max_gen_toks": 3}),
    ]
    assert continue_until(scorer, requests) == [
        whole[0],
        whole[1][: whole[1].index(whole[1][2])],
        greedy("q", 3),
    ]
    long = "a" * 100  # only what fits before the new tokens is read
    assert continue_until(scorer, [(long, {"max_gen_toks": 6})]) == [greedy("a" * 26, 6)]


def test_what_cannot_be_evaluated_is_one_clear_error(offline: None, tmp_path: Path) -> None:
    scorer = small_scorer()
    with pytest.raises(ConfigError, match="not a folder"):
        evaluate_tasks(scorer, TaskSettings(("local",), str(tmp_path / "nowhere")))
    (tmp_path / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {tmp_path / 'missing.jsonl'}\n"
        "output_type: loglikelihood_rolling\n"
        'test_split: train\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    with pytest.raises(DataError, match="cannot be had"):
        evaluate_tasks(scorer, TaskSettings(("broken",), str(tmp_path)))
    with pytest.raises(DataError, match="12 learned positions"):
        learned = small_scorer(position="learned", seq_length=12)
        Scorer(learned.model, learned.tokenizer, max_length=13)
    with pytest.raises(DataError, match="has fewer"):
        small_scorer(vocab_size=200)
    wrong = write_documents(tmp_path / "wrong", [[[5, 300]], [[256]]])
    with pytest.raises(DataError, match="document 0 holds id 300"):
        score_token_file(scorer, wrong)
