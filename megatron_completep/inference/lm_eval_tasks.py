"""EleutherAI's lm-eval with our model as a native back end.

To lm-eval each process looks alone: all of them build the same requests, and the scorer shares them
out and gathers the results.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_completep.errors import ConfigError, DataError
from megatron_completep.inference.generation import Sampling, encode_prompt, stream_texts
from megatron_completep.inference.scoring import Pair, Scorer

DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class TaskSettings:
    """What is evaluated.

    include_path: folder of the user's own task files (.yaml). limit: documents a task. fewshot:
    None takes the task's own number. bootstrap_iters: resamplings for standard errors.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    fewshot: int | None = None
    limit: int | None = None
    bootstrap_iters: int = 1000


def evaluate_tasks(scorer: Scorer, settings: TaskSettings) -> dict[str, Any]:
    """Results by task, as lm-eval reports them: {task: {"metric,filter": number, ...}}.

    Communicates over the scorer's ranks. lm-eval gives results on each node's first process; on the
    others the dictionary is empty. Raises ConfigError: lm-eval is not installed, or a task is
    unknown; DataError: a task's data cannot be had (offline, say).
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
        evaluation = lm_eval.simple_evaluate(
            model=native_model(scorer, TemplateLM),
            tasks=list(settings.tasks),
            num_fewshot=settings.fewshot,
            limit=settings.limit,
            task_manager=manager,
            bootstrap_iters=settings.bootstrap_iters,
            log_samples=False,
        )
    # What the package `datasets` raises without a network or a file.
    except OSError as error:
        raise DataError(
            f"the data of {', '.join(settings.tasks)} cannot be had ({error}). Offline, use tasks "
            "over local files (--include-path)."
        ) from None
    if evaluation is None:
        return {}

    # The alias repeats the task's name, with an indentation for lm-eval's own table.
    results = {}
    for task, metrics in evaluation["results"].items():
        results[task] = {name: number for name, number in metrics.items() if name != "alias"}
    return results


def _task_manager(manager_class: Any, settings: TaskSettings) -> Any:
    """lm-eval's manager of the tasks. Raises ConfigError for a task that it does not know."""
    if settings.include_path is not None:
        if not Path(settings.include_path).is_dir():
            raise ConfigError(
                f"--include-path {settings.include_path} is not a folder. Give the one that holds "
                "the task's .yaml file."
            )
        # Reading lm-eval's thousands of tasks takes a while: not done where the user's own suffice.
        user_manager = manager_class(include_path=settings.include_path, include_defaults=False)
        if set(settings.tasks) <= set(user_manager.all_tasks):
            return user_manager
    manager = manager_class(include_path=settings.include_path)
    unknown_tasks = [task for task in settings.tasks if task not in manager.all_tasks]
    if unknown_tasks:
        raise ConfigError(
            f"lm-eval knows no task {', '.join(unknown_tasks)}. `lm-eval ls tasks` lists them; "
            "--include-path adds a folder of yours."
        )
    return manager


class _NativeMethods:
    """What lm-eval's `TemplateLM` leaves to a back end."""

    backend = "causal"

    def __init__(self, scorer: Scorer):
        super().__init__()
        self._scorer = scorer

    @property
    def tokenizer_name(self) -> str:
        """Part of the key of lm-eval's cache of requests."""
        tokenizer = self._scorer.tokenizer
        return f"{tokenizer.type}:{tokenizer.hash}:{tokenizer.beginning}"

    @property
    def eot_token_id(self) -> int:
        end = self._scorer.tokenizer.eod_id
        return self.prefix_token_id if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text without context: as in lm-eval's back end `hf`."""
        tokenizer = self._scorer.tokenizer
        return tokenizer.context[-1] if tokenizer.bos_id is None else tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        tokenizer = self._scorer.tokenizer
        # lm-eval asks for none where it joins a text to what stands before it.
        beginning = () if add_special_tokens is False else tokenizer.beginning
        return [*beginning, *tokenizer.encode(string)]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], **options: Any
    ) -> list[tuple[float, bool]]:
        """Requests are ((context, continuation), context ids, continuation ids)."""
        # An empty context stands for the beginning of a document.
        prefix = [self.prefix_token_id]
        pairs = [(context or prefix, target) for _, context, target in requests]
        likelihoods = self._scorer.score(pairs)
        return [(scored.log_likelihood, scored.is_greedy) for scored in likelihoods]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Requests are (text,); the whole text is scored, window by window.

        As in the back end `hf`, a beginning that the tokenizer puts in front is a token of the text
        and is scored, too, after another one.
        """
        numbers = []
        pairs: list[Pair] = []
        prefix = [self.prefix_token_id]
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in self._scorer.windows(ids, prefix):
                numbers.append(number)
                pairs.append(pair)

        # All windows are scored together, so that batches are full.
        totals = [0.0] * len(requests)
        for number, scored in zip(numbers, self._scorer.score(pairs), strict=True):
            totals[number] += scored.log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Requests are (text, options)."""
        prompts = [(request.args[0], request.args[1]) for request in requests]
        return continue_until(self._scorer, prompts)


def native_model(scorer: Scorer, base: Any) -> Any:
    """An lm-eval model over a scorer.

    `base` is lm-eval's `TemplateLM`, which splits requests into token ids.
    """
    # Made here, since the base class is known only where lm-eval is installed.
    model_class: Any = types.new_class("NativeModel", (_NativeMethods, base))
    return model_class(scorer)


def continue_until(scorer: Scorer, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Continuations of (text, options as lm-eval's tasks give them).

    Each is cut before the first of its stops. Communicates over the scorer's ranks.
    """

    def batching_key(number: int) -> tuple[str, int]:
        # Requests with equal options share batches, the longest of them first.
        prompt, options = requests[number]
        return str(sorted(options.items(), key=str)), -len(prompt)

    def continue_share(numbers: Sequence[int]) -> list[str]:
        return _continue(scorer, [requests[number] for number in numbers], list(numbers))

    order = sorted(range(len(requests)), key=batching_key)
    return scorer.shared(order, continue_share)


def _continue(
    scorer: Scorer, requests: Sequence[tuple[str, dict[str, Any]]], numbers: Sequence[int]
) -> list[str]:
    """Continuations of this rank's requests, batch by batch; `numbers` seed their draws."""
    continuations: list[str] = []
    while len(continuations) < len(requests):
        start = len(continuations)
        options = requests[start][1]
        # A batch ends where the options change, since it has one way of sampling.
        batch = []
        for prompt, prompt_options in requests[start : start + scorer.batch_size]:
            if prompt_options != options:
                break
            batch.append(prompt)
        seeds = numbers[start : start + len(batch)]
        continuations += _continue_batch(scorer, batch, options, seeds)
    return continuations


def _continue_batch(
    scorer: Scorer, prompts: Sequence[str], options: dict[str, Any], seeds: Sequence[int]
) -> list[str]:
    """Continuations of one batch, under options of lm-eval."""
    until = options.get("until") or []
    if isinstance(until, str):
        until = [until]
    stops = [stop for stop in until if stop]
    new_tokens = min(int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS)), scorer.max_length - 1)
    temperature = float(options.get("temperature", 0.0))
    # As in Hugging Face's generate: without do_sample the likeliest token is taken.
    if not options.get("do_sample", temperature > 0):
        temperature = 0.0
    top_p = float(options.get("top_p", 1.0))
    sampling = Sampling(temperature, top_p, new_tokens, int(options.get("top_k") or 0))

    # A prompt is cut on its left, so that it and what follows fit the model.
    first_token = new_tokens - scorer.max_length
    encoded = [encode_prompt(scorer.tokenizer, prompt)[first_token:] for prompt in prompts]
    generators = [torch.Generator(scorer.device).manual_seed(seed) for seed in seeds]
    stops_of_each = [stops] * len(prompts)
    continuations = [""] * len(prompts)
    for number, new_text in stream_texts(
        scorer.model,
        scorer.tokenizer,
        encoded,
        sampling,
        generators,
        stops_of_each,
        scorer.end_tokens,
    ):
        continuations[number] += new_text
    return [_before_stop(continuation, stops) for continuation in continuations]


def _before_stop(text: str, stops: Sequence[str]) -> str:
    """A text up to the stop that begins first."""
    starts = [text.index(stop) for stop in stops if stop in text]
    return text[: min(starts, default=len(text))]
