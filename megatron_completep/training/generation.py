"""Text from a trained model: one token after the other over a key/value cache, sampled by temperature and top-p."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_completep.completep import table_for
from megatron_completep.config import Config, config_from_mapping
from megatron_completep.config.derived import tokens_per_step, total_tokens
from megatron_completep.data.tokenizer import Tokenizer
from megatron_completep.errors import CheckpointError, DataError
from megatron_completep.model.gpt import GPT
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.training.checkpoint import StoredCheckpoint
from megatron_completep.training.checkpoint.manifest import committed_steps

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an unfinished UTF-8 sequence decodes to


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the likeliest. top_p keeps the fewest tokens with at least that probability."""

    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 100

    def __post_init__(self) -> None:
        problems = []
        if not (self.temperature >= 0 and self.temperature < float("inf")):
            problems.append(f"temperature = {self.temperature}: give a number >= 0; 0 takes the likeliest token.")
        if not 0 < self.top_p <= 1:
            problems.append(f"top-p = {self.top_p}: give a number above 0 and up to 1.")
        if self.max_new_tokens < 1:
            problems.append(f"max new tokens = {self.max_new_tokens}: give at least 1.")
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
        raise CheckpointError(f"{path}: no checkpoint. Give a run's folder (runs/NAME) or one of its checkpoints/step_NNNNNNNN.")
    return steps[max(steps)]


def load_model(path: str | Path, device: torch.device, dtype: torch.dtype) -> tuple[Config, GPT]:
    """The whole model of a checkpoint, of any layout, on one device; parameters in `dtype`."""
    stored = StoredCheckpoint.open(find_checkpoint(path))
    config = config_from_mapping(stored.manifest.config, name=f"{stored.folder}: its configuration")
    tokens = tokens_per_step(config)
    table = table_for(config.model, config.completep, tokens, total_tokens(config))
    model = GPT(config.model, table, ParallelContext.single(device)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = stored.tensor(name)
            parameter.zero_()  # rows that pad the vocabulary are not stored
            parameter[: whole.shape[0]].copy_(whole)
    return config, model.eval()


@torch.no_grad()
def generate(
    model: GPT, prompt: Sequence[int], sampling: Sampling, end_of_document: int | None = None, generator: torch.Generator | None = None
) -> Iterator[int]:
    """Token ids after the prompt, one at a time; ends after max_new_tokens, or at (and without) the end-of-document token.

    DataError for an empty prompt, ids outside the vocabulary, and more positions than a model with learned ones has.
    """
    vocabulary, capacity = model.config.vocab_size, len(prompt) + sampling.max_new_tokens
    if not prompt:
        raise DataError("the prompt is empty and the tokenizer has no end-of-document token to begin with. Give some text.")
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        raise DataError(f"the prompt holds token id {max(prompt)}, the model knows 0 to {vocabulary - 1}. Use the model's own tokenizer.")
    if model.config.position == "learned" and capacity > model.config.seq_length:
        raise DataError(
            f"{len(prompt)} tokens of prompt and {sampling.max_new_tokens} new ones are more than the model's {model.config.seq_length} "
            "learned positions. Shorten the prompt or ask for fewer."
        )
    device = next(model.parameters()).device
    caches = model.new_caches(1, capacity)
    tokens = torch.tensor([list(prompt)], device=device)
    for _ in range(sampling.max_new_tokens):
        logits = model(tokens, caches=caches)[0, -1]
        tokens = next_token(logits, sampling, generator).view(1, 1)
        token = int(tokens)
        if token == end_of_document:
            return
        yield token


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One id drawn from logits [V]."""
    if sampling.temperature == 0:
        return logits.argmax()
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    sorted_probabilities, order = probabilities.sort(descending=True)
    before = sorted_probabilities.cumsum(0) - sorted_probabilities  # the likeliest token always stays
    kept = sorted_probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return order[torch.multinomial(kept, 1, generator=generator)]


def generate_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, sampling: Sampling, generator: torch.Generator | None = None
) -> Iterator[str]:
    """Pieces of text after the prompt as soon as they are whole characters; an empty prompt begins a document."""
    beginning = [tokenizer.eod_id] if tokenizer.eod_id is not None else []
    ids = list(tokenizer.encode(prompt) or beginning)
    shown, start = len(ids), max(0, len(ids) - 1)  # some tokenizers decode a token differently at the beginning of a text
    for token in generate(model, tuple(ids), sampling, tokenizer.eod_id, generator):
        ids.append(token)
        piece = _new_text(tokenizer, ids, start, shown)
        if not piece.endswith(REPLACEMENT):
            yield piece
            start, shown = shown, len(ids)
    yield _new_text(tokenizer, ids, start, shown)


def _new_text(tokenizer: Tokenizer, ids: Sequence[int], start: int, shown: int) -> str:
    """The text of ids[shown:], decoded behind ids[start:shown]."""
    return tokenizer.decode(ids[start:])[len(tokenizer.decode(ids[start:shown])) :]
