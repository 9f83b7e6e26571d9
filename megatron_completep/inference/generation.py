"""Text from a trained model: one token after the other over a key/value cache, for one prompt or a batch of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_completep.checkpoint import StoredCheckpoint
from megatron_completep.checkpoint.manifest import committed_steps
from megatron_completep.completep import table_of
from megatron_completep.config import Config, config_from_mapping
from megatron_completep.config.schema import TokenizerConfig
from megatron_completep.data.run_tokenizer import at_hand
from megatron_completep.data.tokenizer import Tokenizer
from megatron_completep.errors import CheckpointError, ConfigError, DataError
from megatron_completep.model.gpt import GPT
from megatron_completep.parallel.context import ParallelContext

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an unfinished UTF-8 sequence decodes to


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the likeliest. top_p keeps the fewest tokens with at least that probability.

    top_k: only so many of the likeliest (0: all). repetition_penalty: logits of tokens that occurred are divided by it where
    positive, multiplied where negative (arXiv 1909.05858); 1: none.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 100
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not (self.temperature >= 0 and self.temperature < float("inf")):
            problems.append(
                f"temperature = {self.temperature}: give a number >= 0; 0 takes the likeliest token."
            )
        if not 0 < self.top_p <= 1:
            problems.append(f"top-p = {self.top_p}: give a number above 0 and up to 1.")
        if self.max_new_tokens < 1:
            problems.append(f"max new tokens = {self.max_new_tokens}: give at least 1.")
        if self.top_k < 0:
            problems.append(
                f"top-k = {self.top_k}: give the number of tokens to draw from, or 0 for all."
            )
        if not 0 < self.repetition_penalty < float("inf"):
            problems.append(
                f"repetition penalty = {self.repetition_penalty}: give a number above 0; 1 is none."
            )
        if problems:
            raise DataError("\n".join(problems))


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint's folder, or the newest one of a run's folder. CheckpointError when there is none."""
    path = Path(path)
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if path.name.startswith("step_"):
        return path
    steps = committed_steps(path) if path.is_dir() else {}
    if not steps:
        raise CheckpointError(
            f"{path}: no checkpoint. Give a run's folder (runs/NAME) or one of its checkpoints/step_NNNNNNNN."
        )
    return steps[max(steps)]


def run_tokenizer(path: str | Path, config: Config, model: str | None = None) -> TokenizerConfig:
    """The tokenizer of a checkpoint's run: of the file `model`, else the run's own copy, else where the run found it.

    Raises ConfigError for a run without one, DataError for a damaged copy.
    """
    settings = config.data.tokenizer
    if settings is None:
        raise ConfigError(
            "the run has no data.tokenizer, so text cannot be turned into its tokens, nor tokens into text."
        )
    if model is not None:
        return TokenizerConfig(type=settings.type, model=model)
    return at_hand(settings, find_checkpoint(path).absolute().parent.parent)


def run_config(path: str | Path) -> Config:
    """The configuration that a checkpoint was written with. Raises CheckpointError."""
    return _open_run(path)[1]


def _open_run(path: str | Path) -> tuple[StoredCheckpoint, Config]:
    stored = StoredCheckpoint.open(find_checkpoint(path))
    return stored, config_from_mapping(
        stored.manifest.config, name=f"{stored.folder}: its configuration"
    )


def load_model(path: str | Path, device: torch.device, dtype: torch.dtype) -> tuple[Config, GPT]:
    """The whole model of a checkpoint, of any layout, on one device; parameters in `dtype`."""
    stored, config = _open_run(path)
    model = GPT(config.model, table_of(config), ParallelContext.single(device)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = stored.tensor(name)
            parameter.zero_()  # rows that pad the vocabulary are not stored
            parameter[: whole.shape[0]].copy_(whole)
    return config, model.eval()


class Generation:
    """Continuations of several prompts at once, over one key/value cache; iterate for lists of (prompt number, new token).

    Every row of the batch holds as many tokens in the cache as every other, so nothing is padded or masked: where a prompt is longer
    than the shortest, its own tokens are fed in place of drawn ones. After the prompts, each step takes one token of each
    unfinished row through the model. A row ends after max_new_tokens, at (and without) the end-of-document token, or by `stop`.

    generators: one a prompt, so that a text does not depend on the batch it is made in, as far as the logits do not. Matrix products
    of another number of rows round differently: by 1e-6 of a logit in float32, which turns about one draw in a million, but by
    1e-2 in bf16, where a text is the same only in the same batch.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        end_of_document: int | None = None,
        generators: Sequence[torch.Generator | None] | None = None,
    ):
        """DataError for an empty prompt, ids outside the vocabulary, and more positions than a model with learned ones has."""
        for prompt in prompts:
            check_prompt(model, prompt, sampling.max_new_tokens)
        self.model, self.sampling, self.end_of_document = model, sampling, end_of_document
        self.device = next(model.parameters()).device
        self.generators = list(generators or [None] * len(prompts))
        self.sequences = [list(prompt) for prompt in prompts]
        self.limits = [len(prompt) + sampling.max_new_tokens for prompt in prompts]
        self.rows = list(range(len(prompts)))  # prompt number of each row of the batch
        self.caches = model.new_caches(len(prompts), max(self.limits, default=0))
        self.fed = 0  # tokens of each row that the caches hold
        self._stopped: set[int] = set()

    def stop(self, number: int) -> None:
        """The continuation of this prompt is long enough."""
        self._stopped.add(number)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        while self.rows:
            logits = self._feed()
            due = [
                row
                for row, number in enumerate(self.rows)
                if len(self.sequences[number]) == self.fed
            ]
            drawn = self._draw(logits[due], [self.rows[row] for row in due])
            made = [(self.rows[row], token) for row, token in zip(due, drawn, strict=True)]
            self._stopped.update(number for number, token in made if token == self.end_of_document)
            made = [(number, token) for number, token in made if number not in self._stopped]
            for number, token in made:
                self.sequences[number].append(token)
            if made:
                yield made
            self._drop_finished()

    @torch.no_grad()
    def _feed(self) -> Tensor:
        """Take what is known of every row through the model; logits [rows, V] after it."""
        known = min(len(self.sequences[number]) for number in self.rows)
        tokens = torch.tensor(
            [self.sequences[number][self.fed : known] for number in self.rows], device=self.device
        )
        self.fed = known
        return self.model(tokens, caches=self.caches)[:, -1]

    def _draw(self, logits: Tensor, numbers: list[int]) -> list[int]:
        if self.sampling.repetition_penalty != 1.0:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, number in enumerate(numbers):
                seen[row, self.sequences[number]] = True
            logits = penalize(logits, seen, self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            return logits.argmax(dim=-1).tolist()
        return next_tokens(
            logits, self.sampling, [self.generators[number] for number in numbers]
        ).tolist()

    def _drop_finished(self) -> None:
        ended = {
            n for n in self.rows if n in self._stopped or len(self.sequences[n]) >= self.limits[n]
        }
        if not ended:
            return
        keep = [row for row, number in enumerate(self.rows) if number not in ended]
        self.rows = [self.rows[row] for row in keep]
        for cache in self.caches:
            cache.keys, cache.values = cache.keys[keep], cache.values[keep]


def check_prompt(model: GPT, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Raises DataError as `Generation` says."""
    vocabulary = model.config.vocab_size
    if not prompt:
        raise DataError(
            "the prompt is empty and the tokenizer has no end-of-document token to begin with. Give some text."
        )
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        raise DataError(
            f"the prompt holds token id {max(prompt)}, the model knows 0 to {vocabulary - 1}. Use the model's own tokenizer."
        )
    if (
        model.config.position == "learned"
        and len(prompt) + max_new_tokens > model.config.seq_length
    ):
        raise DataError(
            f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones are more than the model's {model.config.seq_length} "
            "learned positions. Shorten the prompt or ask for fewer."
        )


def generate(
    model: GPT,
    prompt: Sequence[int],
    sampling: Sampling,
    end_of_document: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Token ids after one prompt, one at a time; as `Generation`."""
    for made in Generation(model, [prompt], sampling, end_of_document, [generator]):
        yield made[0][1]


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [rows, V] with those of the tokens that occurred made less likely."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def next_token(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None
) -> Tensor:
    """One id drawn from logits [V]."""
    return (
        logits.argmax()
        if sampling.temperature == 0
        else next_tokens(logits[None], sampling, [generator])[0]
    )


def next_tokens(
    logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator | None]
) -> Tensor:
    """One id drawn from each row of logits [rows, V], each by its own generator; temperature above 0."""
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # the likeliest token always stays
    dropped = before >= sampling.top_p
    if sampling.top_k:
        dropped[:, sampling.top_k :] = True
    reached = ordered.masked_fill(dropped, 0.0).cumsum(-1)
    uniform = torch.cat(
        [torch.rand(1, dtype=torch.float64, device=logits.device, generator=g) for g in generators]
    )
    place = torch.searchsorted(reached, (uniform * reached[:, -1])[:, None], right=True)
    last = (~dropped).sum(-1, keepdim=True) - 1  # rounding must not draw a dropped token
    return order.gather(1, torch.minimum(place, last))[:, 0]


class TextStream:
    """Turns tokens into text as soon as whole characters are there."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self.tokenizer, self.ids = tokenizer, list(prompt)
        self._shown, self._start = (
            len(prompt),
            max(0, len(prompt) - 1),
        )  # some tokenizers decode a token differently at the beginning

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        self.ids.append(token)
        piece = self.rest()
        if piece.endswith(REPLACEMENT):
            return ""
        self._start, self._shown = self._shown, len(self.ids)
        return piece

    def rest(self) -> str:
        """What was pushed and not yet returned, whole or not: the text of ids[shown:], decoded behind ids[start:shown]."""
        behind = self.tokenizer.decode(self.ids[self._start : self._shown])
        return self.tokenizer.decode(self.ids[self._start :])[len(behind) :]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt; an empty one begins a document."""
    beginning = [tokenizer.eod_id] if tokenizer.eod_id is not None else []
    return list(tokenizer.encode(prompt) or beginning)


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """Pieces of text after the prompt as soon as they are whole characters; an empty prompt begins a document."""
    for _, piece in generate_texts(model, tokenizer, [prompt], sampling, [generator]):
        yield piece


def generate_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    generators: Sequence[torch.Generator | None] | None = None,
    until: Sequence[Sequence[str]] | None = None,
) -> Iterator[tuple[int, str]]:
    """(prompt number, piece of text) of several prompts as they are made in one batch; an empty prompt begins a document."""
    return stream_texts(
        model,
        tokenizer,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        sampling,
        generators,
        until,
    )


def stream_texts(
    model: GPT,
    tokenizer: Tokenizer,
    encoded: Sequence[Sequence[int]],
    sampling: Sampling,
    generators: Sequence[torch.Generator | None] | None = None,
    until: Sequence[Sequence[str]] | None = None,
) -> Iterator[tuple[int, str]]:
    """As `generate_texts`, of prompts that are token ids.

    until: for each prompt, texts with the first of which its continuation ends.
    """
    generation = Generation(model, encoded, sampling, tokenizer.eod_id, generators)
    streams = [TextStream(tokenizer, ids) for ids in encoded]
    texts, stopped = [""] * len(encoded), set[int]()
    for made in generation:
        for number, token in made:
            piece = streams[number].push(token)
            whole = texts[number] + piece
            ends = [
                whole.index(stop) + len(stop)
                for stop in (until[number] if until else ())
                if stop in whole
            ]
            if ends:
                generation.stop(number)
                stopped.add(number)
                piece = whole[len(texts[number]) : min(ends)]
            texts[number] += piece
            yield number, piece
    for number, stream in enumerate(streams):
        if number not in stopped:
            yield number, stream.rest()
