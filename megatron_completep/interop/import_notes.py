"""What an import says of types, special tokens and the tokenizer, a sentence each."""

from __future__ import annotations

from pathlib import Path

from megatron_completep.config import Config
from megatron_completep.data.beginning import shown as shown_beginning
from megatron_completep.data.tokenizer import Tokenizer
from megatron_completep.interop.model_folder import ModelFolder

# Of other kinds of tokenizers, from which nothing is read.
_UNREAD_TOKENIZERS = ("vocab.json", "vocab.txt", "tekken.json", "spiece.model")


def dtype_notes(dtypes: list[str], precision: str) -> list[str]:
    """What becomes of types that an export would not give back by itself, a sentence each."""
    if dtypes in (["F32"], ["BF16"]):
        return []
    return [
        f"its tensors are {' and '.join(dtypes)}: the checkpoint holds each exactly, in float32; "
        f"training.precision is {precision}, and export_hf.py writes that unless --dtype says "
        "otherwise"
    ]


def token_id_notes(config: Config) -> list[str]:
    """Special tokens that the model cannot give, a sentence each; GPT-2's default is one."""
    vocab_size = config.model.vocab_size
    notes = []
    for name, ids in (config.export.token_ids or {}).items():
        listed = ids if isinstance(ids, list) else [ids]
        if any(index is not None and index >= vocab_size for index in listed):
            notes.append(
                f"its {name} is {ids}, and its vocabulary ends at {vocab_size - 1}: kept for an "
                "export, no use here"
            )
    return notes


def tokenizer_notes(
    files: ModelFolder, copies: dict[Path, Path], tokenizer: Tokenizer | None, vocab_size: int
) -> list[str]:
    """What became of the tokenizer, a sentence each."""
    if not copies:
        others = [name for name in _UNREAD_TOKENIZERS if files.has(name)]
        there = f"; {', '.join(others)} alone cannot be" if others else ""
        return [f"no tokenizer.json or tokenizer.model is read{there}: data.tokenizer is null"]
    paths = ", ".join(str(copy) for copy in copies.values())
    notes = [f"its tokenizer was copied: {paths}"]
    if files.has("tokenizer.json") and files.has("tokenizer.model"):
        notes.append("tokenizer.json is used, tokenizer.model beside it is not")
    if tokenizer is None:
        return [*notes, "it could not be opened here: its package is not installed"]
    notes.append(f"texts begin {shown_beginning(tokenizer.beginning)}")
    if tokenizer.own_ending:
        ending = ", ".join(map(str, tokenizer.own_ending))
        notes.append(
            f"its template also ends texts, with {ending}: here --append-eod ends documents, and "
            "an export's template ends none"
        )
    if tokenizer.eod_id is None:
        notes.append("it names no end of document: set data.tokenizer.eod_token")
    else:
        notes.append(f"documents end with the token {tokenizer.eod_id}")
    if tokenizer.vocab_size > vocab_size:
        notes.append(
            f"it has {tokenizer.vocab_size} ids, more than the model's {vocab_size}: texts with "
            "the ids beyond will be refused"
        )
    return notes
