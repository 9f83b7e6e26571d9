"""EleutherAI's lm-eval with our model as a native back end.

To lm-eval each process looks alone: all of them build the same requests, the scorer shares them out and gathers the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_completep.errors import ConfigError, DataError
from megatron_completep.inference.generation import Sampling, encode_prompt, stream_texts
from megatron_completep.inference.scoring import Scorer

DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class TaskSettings:
    """include_path: folder of own task files (.yaml). limit: documents a task. fewshot: None takes the task's own number."""

    tasks: tuple[str, ...]
    include_path: str | None = None
    fewshot: int | None = None
    limit: int | None = None
    bootstrap_iters: int = 1000


def evaluate_tasks(scorer: Scorer, settings: TaskSettings) -> dict[str, Any]:
    """Results by task, as lm-eval reports them: {task: {"metric,filter": value, ...}}; empty on all processes but each node's first.

    Raises ConfigError: lm-eval is not installed, or a task is unknown; DataError: a task's data cannot be had (offline, say).
    """
    try:
        import lm_eval
        from lm_eval.api.model import TemplateLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError(
            "lm-eval is not installed. pip install 'megatron-completep[eval]'."
        ) from None
    manager = _task_manager(TaskManager, settings)
    try:
        found = lm_eval.simple_evaluate(
            model=native_model(scorer, TemplateLM),
            tasks=list(settings.tasks),
            num_fewshot=settings.fewshot,
            limit=settings.limit,
            task_manager=manager,
            bootstrap_iters=settings.bootstrap_iters,
            log_samples=False,
        )
    except OSError as error:
        raise DataError(
            f"the data of {', '.join(settings.tasks)} cannot be had ({error}). Offline, use tasks over local files (--include-path)."
        ) from None
    if found is None:
        return {}
    return {
        task: {name: value for name, value in row.items() if name != "alias"}
        for task, row in found["results"].items()
    }


def _task_manager(kind: Any, settings: TaskSettings) -> Any:
    """Own tasks alone where they are all that is asked for: reading lm-eval's thousands takes a while."""
    if settings.include_path is not None:
        if not Path(settings.include_path).is_dir():
            raise ConfigError(
                f"--include-path {settings.include_path} is not a folder. Give the one that holds the task's .yaml file."
            )
        own = kind(include_path=settings.include_path, include_defaults=False)
        if set(settings.tasks) <= set(own.all_tasks):
            return own
    manager = kind(include_path=settings.include_path)
    unknown = [task for task in settings.tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"lm-eval knows no task {', '.join(unknown)}. `lm-eval ls tasks` lists them; --include-path adds a folder of yours."
        )
    return manager


def native_model(scorer: Scorer, base: Any) -> Any:
    """An lm-eval model over a scorer; `base` is its `TemplateLM`, which splits requests into token ids."""

    class NativeModel(base):
        backend = "causal"
        tokenizer_name = f"{scorer.tokenizer.type}:{scorer.tokenizer.hash}"

        @property
        def eot_token_id(self) -> int:
            return scorer.beginning

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **rest: Any
        ) -> list[int]:
            return scorer.tokenizer.encode(string)

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], **rest: Any
        ) -> list[tuple[float, bool]]:
            """Requests are ((context, continuation), context ids, continuation ids)."""
            pairs = [(context or [scorer.beginning], target) for _, context, target in requests]
            return [(found.log_likelihood, found.is_greedy) for found in scorer.score(pairs)]

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            texts = [scorer.tokenizer.encode(request.args[0]) for request in requests]
            pairs = [
                (number, pair) for number, ids in enumerate(texts) for pair in scorer.windows(ids)
            ]
            totals = [0.0] * len(texts)
            for (number, _), found in zip(
                pairs, scorer.score([pair for _, pair in pairs]), strict=True
            ):
                totals[number] += found.log_likelihood
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return continue_until(
                scorer, [(request.args[0], request.args[1]) for request in requests]
            )

    return NativeModel()


def continue_until(scorer: Scorer, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Continuations of (text, options as lm-eval's tasks give them), each cut before the first of its stops."""
    lengths = [len(text) for text, _ in requests]
    order = sorted(
        range(len(requests)),
        key=lambda i: (str(sorted(requests[i][1].items(), key=str)), -lengths[i]),
    )
    return scorer.shared(
        order, lambda mine: _continue(scorer, [requests[i] for i in mine], list(mine))
    )


def _continue(
    scorer: Scorer, requests: Sequence[tuple[str, dict[str, Any]]], numbers: Sequence[int]
) -> list[str]:
    made: list[str] = []
    while len(made) < len(requests):
        options = requests[len(made)][1]
        batch = []
        for request in requests[len(made) : len(made) + scorer.batch_size]:
            if request[1] != options:
                break
            batch.append(request[0])
        seeds = numbers[len(made) : len(made) + len(batch)]
        made += _continue_batch(scorer, batch, options, seeds)
    return made


def _continue_batch(
    scorer: Scorer, texts: Sequence[str], options: dict[str, Any], seeds: Sequence[int]
) -> list[str]:
    until = options.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    new_tokens = min(int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS)), scorer.max_length - 1)
    temperature = float(options.get("temperature", 0.0))
    if not options.get("do_sample", temperature > 0):
        temperature = 0.0
    sampling = Sampling(
        temperature, float(options.get("top_p", 1.0)), new_tokens, int(options.get("top_k") or 0)
    )
    cut = [
        encode_prompt(scorer.tokenizer, text)[new_tokens - scorer.max_length :] for text in texts
    ]
    generators = [torch.Generator(scorer.device).manual_seed(seed) for seed in seeds]
    made = [""] * len(texts)
    for number, piece in stream_texts(
        scorer.model, scorer.tokenizer, cut, sampling, generators, [stops] * len(texts)
    ):
        made[number] += piece
    return [_before_stop(text, stops) for text in made]


def _before_stop(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
