"""Text from a trained model, token by token over a key/value cache, for one or several prompts."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_completep.checkpoint import StoredCheckpoint
from megatron_completep.checkpoint.manifest import Manifest, committed_steps
from megatron_completep.completep import table_of
from megatron_completep.config import Config, config_from_mapping
from megatron_completep.config.schema import TokenizerConfig
from megatron_completep.data.beginning import FIELD, trained_beginning
from megatron_completep.data.run_tokenizer import available_tokenizer
from megatron_completep.data.tokenizer import Tokenizer
from megatron_completep.errors import CheckpointError, ConfigError, DataError
from megatron_completep.model.gpt import GPT
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.onednn import read_processor
from megatron_completep.parallel.products import choose_inference_products

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an unfinished UTF-8 sequence decodes to


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the most likely one.

    top_p: nucleus sampling, draw from the smallest set of most likely tokens whose probabilities
    sum to at least this. top_k: draw from the k most likely tokens (0: all). repetition_penalty:
    logits of tokens that occurred are divided by it if positive, multiplied if negative
    (arXiv 1909.05858); 1: none. Raises DataError naming every number that is out of range.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 100
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        # Comparisons with NaN are false, so `not 0 <= x` also rejects NaN.
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(
                f"temperature = {self.temperature}: give a number >= 0; 0 takes the likeliest "
                "token."
            )
        if not 0 < self.top_p <= 1:
            problems.append(f"top-p = {self.top_p}: give a number above 0 and up to 1.")
        if self.max_new_tokens < 1:
            problems.append(f"max new tokens = {self.max_new_tokens}: give at least 1.")
        if self.top_k < 0:
            problems.append(
                f"top-k = {self.top_k}: give the number of tokens to draw from, or 0 for all."
            )
        if not 0 < self.repetition_penalty < math.inf:
            problems.append(
                f"repetition penalty = {self.repetition_penalty}: give a number above 0; 1 is none."
            )
        if problems:
            raise DataError("\n".join(problems))


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint's folder, or the newest one of a run's folder.

    Raises CheckpointError if there is none.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if path.name.startswith("step_"):
        return path
    steps = committed_steps(path) if path.is_dir() else {}
    if not steps:
        raise CheckpointError(
            f"{path}: no checkpoint. Give a run's folder (runs/NAME) or one of its "
            "checkpoints/step_NNNNNNNN."
        )
    return steps[max(steps)]


def tokenizer_of_run(
    path: str | Path, config: Config, tokenizer_model: str | None = None
) -> TokenizerConfig:
    """The tokenizer of a checkpoint's run, which begins texts as those of its training began.

    Taken from the file `tokenizer_model` if given, else from the run's copy, else from its
    configuration. Raises ConfigError for a run without one, DataError for a damaged copy.
    """
    settings = config.data.tokenizer
    if settings is None:
        raise ConfigError(
            "the run has no data.tokenizer, so text can be neither tokenized nor decoded."
        )
    folder = find_checkpoint(path)
    if settings.prepend_bos is None:
        manifest = StoredCheckpoint.open(folder).manifest
        settings = settings.model_copy(update={"prepend_bos": _prepended(manifest)})
    if tokenizer_model is not None:
        return settings.model_copy(update={"model": tokenizer_model})
    # RUN/checkpoints/step_NNNNNNNN: the copy lies in RUN.
    return available_tokenizer(settings, folder.absolute().parent.parent)


def _prepended(manifest: Manifest) -> bool | None:
    """Whether the texts of a checkpoint's training began with a token of their own.

    None where nothing says so, and the tokenizer decides.
    """
    trained_on = trained_beginning(manifest.fingerprints)
    if trained_on is not None:
        return bool(trained_on)
    # Versions that did not compare beginnings put none in front of a text, neither in corpora
    # nor in prompts.
    sources = manifest.fingerprints.get("data") or []
    is_of_before = bool(sources) and not any(FIELD in source for source in sources)
    return False if is_of_before else None


def run_config(path: str | Path) -> Config:
    """The configuration that a checkpoint was written with. Raises CheckpointError."""
    return _open_run(path)[1]


def _open_run(path: str | Path) -> tuple[StoredCheckpoint, Config]:
    stored = StoredCheckpoint.open(find_checkpoint(path))
    name = f"{stored.folder}: its configuration"
    return stored, config_from_mapping(stored.manifest.config, name=name)


def load_model(path: str | Path, device: torch.device, dtype: torch.dtype) -> tuple[Config, GPT]:
    """Load a checkpoint, saved under any parallel layout, as a full model on one device.

    Its parameters have `dtype`.
    """
    stored, config = _open_run(path)
    products = choose_inference_products(
        config.training.matrix_products, device, dtype, read_processor()
    )
    context = ParallelContext.single(device)
    model = GPT(config.model, table_of(config), context, products=products).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            logical_tensor = stored.tensor(name)
            parameter.zero_()  # rows that pad the vocabulary are not stored
            parameter[: logical_tensor.shape[0]].copy_(logical_tensor)
    return config, model.eval()


class Generation:
    """Continuations of several prompts at once, over one key/value cache.

    Iteration gives, for each step, a list of (prompt number, new token).

    All rows always have the same number of cached tokens, so no padding or masking is needed:
    longer prompts are still fed their own tokens while shorter ones already sample. After the
    prompts, each step feeds one token of each unfinished row. A row ends after max_new_tokens, at
    one of the end tokens (which is not returned), or when `stop` is called.

    generators: one per prompt, so that sampling does not depend on the rest of the batch. Logits
    still may: matrix products with a different batch size round differently, by about 1e-6 in
    float32 (which changes about one draw in a million) and 1e-2 in bf16, where a text is
    reproducible only in the same batch.

    Raises DataError for a prompt that `check_prompt` refuses.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        end_tokens: Collection[int] = (),
        generators: Sequence[torch.Generator | None] | None = None,
    ):
        for prompt in prompts:
            check_prompt(model, prompt, sampling.max_new_tokens)
        self.model = model
        self.sampling = sampling
        self.end_tokens = frozenset(end_tokens)
        self.device = next(model.parameters()).device
        self.generators = list(generators or [None] * len(prompts))
        self.sequences = [list(prompt) for prompt in prompts]
        self.limits = [len(prompt) + sampling.max_new_tokens for prompt in prompts]
        # Prompt number of each row of the batch; rows leave it when they end.
        self.prompt_of_row = list(range(len(prompts)))
        self.caches = model.new_caches(len(prompts), max(self.limits, default=0))
        self.cached_length = 0  # tokens of every row that the caches hold
        self._stopped: set[int] = set()

    def stop(self, number: int) -> None:
        """End the continuation of prompt `number`."""
        self._stopped.add(number)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        while self.prompt_of_row:
            logits = self._feed()
            # Rows still inside their prompt use the next prompt token; their logits are ignored.
            drawn_rows = []
            for row, number in enumerate(self.prompt_of_row):
                if len(self.sequences[number]) == self.cached_length:
                    drawn_rows.append(row)
            numbers = [self.prompt_of_row[row] for row in drawn_rows]
            tokens = self._draw(logits[drawn_rows], numbers)

            new_tokens = []
            for number, token in zip(numbers, tokens, strict=True):
                if token in self.end_tokens:
                    self._stopped.add(number)
                if number not in self._stopped:
                    self.sequences[number].append(token)
                    new_tokens.append((number, token))
            if new_tokens:
                yield new_tokens
            self._drop_finished()

    @torch.no_grad()
    def _feed(self) -> Tensor:
        """Feed the tokens up to the shortest sequence; logits [rows, V] at the last one."""
        length = min(len(self.sequences[number]) for number in self.prompt_of_row)
        unfed = [
            self.sequences[number][self.cached_length : length] for number in self.prompt_of_row
        ]
        self.cached_length = length
        tokens = torch.tensor(unfed, device=self.device)
        logits: Tensor = self.model(tokens, caches=self.caches)
        return logits[:, -1]

    def _draw(self, logits: Tensor, numbers: list[int]) -> list[int]:
        """One token for each prompt of `numbers`, from logits [len(numbers), V]."""
        if self.sampling.repetition_penalty != 1.0:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, number in enumerate(numbers):
                seen[row, self.sequences[number]] = True
            logits = penalize(logits, seen, self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            tokens = logits.argmax(dim=-1)
        else:
            generators = [self.generators[number] for number in numbers]
            tokens = next_tokens(logits, self.sampling, generators)
        return [int(token) for token in tokens.tolist()]

    def _drop_finished(self) -> None:
        """Remove rows that have ended from the batch and from the caches."""
        kept_rows = []
        for row, number in enumerate(self.prompt_of_row):
            is_full = len(self.sequences[number]) >= self.limits[number]
            if number not in self._stopped and not is_full:
                kept_rows.append(row)
        # Indexing copies the caches, so do it only if a row has ended.
        if len(kept_rows) == len(self.prompt_of_row):
            return
        self.prompt_of_row = [self.prompt_of_row[row] for row in kept_rows]
        for cache in self.caches:
            cache.keys = cache.keys[kept_rows]
            cache.values = cache.values[kept_rows]


def check_prompt(model: GPT, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Raise DataError for a prompt that cannot be continued.

    Such a prompt is empty, has ids outside the vocabulary, or exceeds the learned positions.
    """
    vocab_size = model.config.vocab_size
    seq_length = model.config.seq_length
    if not prompt:
        raise DataError(
            "the prompt is empty, and the tokenizer has no end-of-document token that could start "
            "the text. Give some text."
        )
    for token in prompt:
        if not 0 <= token < vocab_size:
            raise DataError(
                f"the prompt contains token id {token}, but the vocabulary has ids 0 to "
                f"{vocab_size - 1}. Use the model's own tokenizer."
            )
    # Rotary and ALiBi positions extend beyond the training length; learned ones do not.
    if model.config.position == "learned" and len(prompt) + max_new_tokens > seq_length:
        raise DataError(
            f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones are more than the "
            f"model's {seq_length} learned positions. Shorten the prompt or ask for fewer."
        )


def generate(
    model: GPT,
    prompt: Sequence[int],
    sampling: Sampling,
    end_tokens: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield the continuation of one prompt, token by token (see `Generation`)."""
    for new_tokens in Generation(model, [prompt], sampling, end_tokens, [generator]):
        yield new_tokens[0][1]


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [rows, V] with those of the tokens that occurred made less likely.

    seen: bool [rows, V], the tokens that occurred.
    """
    # Dividing a negative logit would make its token likelier.
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def next_token(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None
) -> Tensor:
    """One id drawn from logits [V]."""
    if sampling.temperature == 0:
        return logits.argmax()
    return next_tokens(logits[None], sampling, [generator])[0]


def next_tokens(
    logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator | None]
) -> Tensor:
    """One id drawn from each row of logits [rows, V], each with its own generator.

    The temperature must be above 0.
    """
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    ordered, order = probabilities.sort(dim=-1, descending=True)
    mass_before = ordered.cumsum(-1) - ordered  # probability of all more likely tokens
    dropped = mass_before >= sampling.top_p  # never the most likely one, which has 0 before it
    if sampling.top_k:
        dropped[:, sampling.top_k :] = True

    # Inverse-CDF sampling with one uniform number per row.
    cumulative = ordered.masked_fill(dropped, 0.0).cumsum(-1)
    draws = [
        torch.rand(1, dtype=torch.float64, device=logits.device, generator=generator)
        for generator in generators
    ]
    thresholds = torch.cat(draws) * cumulative[:, -1]
    places = torch.searchsorted(cumulative, thresholds[:, None], right=True)
    # Rounding must not draw a dropped token.
    last_places = (~dropped).sum(-1, keepdim=True) - 1
    return order.gather(1, torch.minimum(places, last_places))[:, 0]


class TextStream:
    """Incremental detokenizer: returns text once its UTF-8 sequences are complete."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self.tokenizer = tokenizer
        self.ids = list(prompt)
        self._shown = len(prompt)  # ids whose text was returned
        # Some tokenizers decode a token differently at the beginning, so one token of context
        # stays.
        self._start = max(0, len(prompt) - 1)

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        self.ids.append(token)
        new_text = self.pending()
        # A character of several bytes may be spread over several tokens.
        if new_text.endswith(REPLACEMENT):
            return ""
        self._start = self._shown
        self._shown = len(self.ids)
        return new_text

    def pending(self) -> str:
        """Text of the tokens not yet returned, even if its last character is incomplete.

        It is ids[shown:], decoded in the context of ids[start:shown].
        """
        context = self.tokenizer.decode(self.ids[self._start : self._shown])
        return self.tokenizer.decode(self.ids[self._start :])[len(context) :]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, begun as the documents of training are.

    An empty prompt becomes the end-of-document token, if nothing begins a document and the
    tokenizer has one: after it the model starts a new document.
    """
    ids = [*tokenizer.beginning, *tokenizer.encode(prompt)]
    if not ids and tokenizer.eod_id is not None:
        ids = [tokenizer.eod_id]
    return ids


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """Text after the prompt, as soon as its characters are complete.

    An empty prompt stands for the start of a document.
    """
    for _, new_text in generate_texts(model, tokenizer, [prompt], sampling, [generator]):
        yield new_text


def generate_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    generators: Sequence[torch.Generator | None] | None = None,
    until: Sequence[Sequence[str]] | None = None,
    end_tokens: Collection[int] = (),
) -> Iterator[tuple[int, str]]:
    """(prompt number, new text) of several prompts, as they are generated in one batch.

    An empty prompt stands for the start of a document. For generators, until and end_tokens see
    `stream_texts`.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return stream_texts(model, tokenizer, encoded, sampling, generators, until, end_tokens)


def stream_texts(
    model: GPT,
    tokenizer: Tokenizer,
    encoded: Sequence[Sequence[int]],
    sampling: Sampling,
    generators: Sequence[torch.Generator | None] | None = None,
    until: Sequence[Sequence[str]] | None = None,
    end_tokens: Collection[int] = (),
) -> Iterator[tuple[int, str]]:
    """(prompt number, new text) of several encoded prompts, as they are generated in one batch.

    Args:
        encoded: token ids of each prompt.
        generators: one per prompt, see `Generation`.
        until: stop strings for each prompt; its continuation ends with the first that occurs.
        end_tokens: ids that end a continuation beside the tokenizer's end of document.
    """
    ends = set(end_tokens)
    if tokenizer.eod_id is not None:
        ends.add(tokenizer.eod_id)
    generation = Generation(model, encoded, sampling, ends, generators)
    streams = [TextStream(tokenizer, ids) for ids in encoded]
    texts = [""] * len(encoded)
    stopped = set[int]()
    for new_tokens in generation:
        for number, token in new_tokens:
            new_text = streams[number].push(token)
            # A stop string may span several tokens, so search the whole continuation.
            continuation = texts[number] + new_text
            stops = until[number] if until else ()
            end = _end_of_stop(continuation, stops)
            if end is not None:
                generation.stop(number)
                stopped.add(number)
                new_text = continuation[len(texts[number]) : end]
            texts[number] += new_text
            yield number, new_text

    # Flush texts that did not end at a stop string; their last character may be incomplete.
    for number, stream in enumerate(streams):
        if number not in stopped:
            yield number, stream.pending()


def _end_of_stop(text: str, stops: Sequence[str]) -> int | None:
    """End index of the stop string that ends earliest in `text`; None if there is none."""
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return min(ends, default=None)
