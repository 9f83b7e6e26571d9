"""A checkpoint of any layout as a folder that stock transformers and vLLM load: what tools/export_hf.py does.

One process, one tensor in memory at a time; the model is never built.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_completep.checkpoint import StoredCheckpoint
from megatron_completep.completep import table_of
from megatron_completep.config import Config, config_from_mapping
from megatron_completep.config.schema import TokenizerConfig
from megatron_completep.data.tokenizer import Tokenizer, build_tokenizer
from megatron_completep.errors import ConfigError, DataError, pairs_text
from megatron_completep.inference.generation import find_checkpoint, run_tokenizer
from megatron_completep.interop.architectures import Piece, choose_architecture, fold, pieces
from megatron_completep.interop.hf_config import to_hf
from megatron_completep.interop.hf_tokenizer import write_tokenizer
from megatron_completep.interop.model_card import model_card
from megatron_completep.interop.tensor_files import write_tensors

ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class ExportSettings:
    """dtype auto: bfloat16 where training.precision is bf16, else float32. tokenizer: None takes the run's, "none" leaves it out."""

    architecture: str = "auto"
    dtype: str = "auto"
    tokenizer: str | None = None
    shard_bytes: int = 5_000_000_000


@dataclass(frozen=True)
class ExportReport:
    """What was written, ready for JSON."""

    folder: str
    checkpoint: str
    step: int
    architecture: str
    dtype: str
    parameters: int
    files: list[str]
    kept: dict[str, float]  # multipliers in config.json
    folded: dict[str, float]  # factors that stored tensors were multiplied by
    tokenizer: str | None  # family, or None where the folder has none

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export_model(
    checkpoint: str | Path,
    output: str | Path,
    settings: ExportSettings | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Write the folder; it appears whole or not at all.

    Raises ConfigError: no architecture expresses the model, or the folder exists; DataError: the tokenizer has no equal in
    Hugging Face's format; CheckpointError: damaged checkpoint.
    """
    settings, output = settings or ExportSettings(), Path(output)
    stored = StoredCheckpoint.open(find_checkpoint(checkpoint))
    config = config_from_mapping(stored.manifest.config, name=f"{stored.folder}: its configuration")
    table = table_of(config)
    architecture = choose_architecture(config.model, table, settings.architecture)
    folding = fold(architecture, config.model, table)
    dtype = _dtype(settings.dtype, config, say)
    chosen = _tokenizer_settings(config, checkpoint, settings.tokenizer)
    tokenizer = _tokenizer(config, chosen)
    say(
        f"{stored.folder}: {architecture}, {dtype}"
        + (f", folded: {pairs_text(folding.changed)}" if folding.changed else "")
    )
    temporary = _fresh_folder(output)
    try:
        written = pieces(architecture, config.model, folding)
        files = write_tensors(
            temporary,
            [(p.name, p.shape) for p in written],
            dtype,
            Values(stored, written),
            settings.shard_bytes,
        )
        end = tokenizer.eod_id if tokenizer is not None else None
        values = to_hf(
            architecture, config.model, table, dtype, end, config.optimizer.base_init_std
        )
        _write_json(temporary / "config.json", values)
        generation = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        _write_json(temporary / "generation_config.json", generation)
        if tokenizer is not None and chosen is not None:
            write_tokenizer(tokenizer, temporary, config.model.seq_length, chosen)
        report = ExportReport(
            folder=str(output),
            checkpoint=str(stored.folder),
            step=stored.manifest.step,
            architecture=architecture,
            dtype=dtype,
            parameters=sum(math.prod(piece.shape) for piece in written),
            files=sorted(
                path.name for path in {*temporary.iterdir(), *files, temporary / "README.md"}
            ),
            kept={name: values[name] for name in _KEPT if name in values},
            folded=folding.changed,
            tokenizer=tokenizer.type if tokenizer is not None else None,
        )
        (temporary / "README.md").write_text(
            model_card(config, stored.manifest, report.to_json()), encoding="utf-8"
        )
        temporary.rename(output)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError(
                f"{output} cannot be written: {error.strerror or error}. Choose another folder or free some space."
            ) from None
        raise
    return report


_KEPT = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


class Values:
    """name -> tensor of the export, read from a checkpoint; keeps the parameter read last, of which several tensors are cut."""

    def __init__(self, stored: StoredCheckpoint, written: list[Piece]):
        self._stored = stored
        self._pieces = {piece.name: piece for piece in written}
        self._last: tuple[str, Tensor] | None = None

    def __call__(self, name: str) -> Tensor:
        piece = self._pieces[name]
        if piece.source is None:
            return torch.zeros(piece.shape)
        if self._last is None or self._last[0] != piece.source:
            self._last = None  # before the next one is read
            self._last = piece.source, self._stored.tensor(piece.source)
        return cut(piece, self._last[1])


def cut(piece: Piece, whole: Tensor) -> Tensor:
    """The tensor of a piece from our whole parameter."""
    parts = [
        whole[start:stop] if factor == 1.0 else _scaled(whole[start:stop], factor)
        for start, stop, factor in piece.rows
    ]
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rows.t() if piece.transposed else rows


def _scaled(rows: Tensor, factor: float) -> Tensor:
    """rows * factor, the factor in float64; a few rows at a time, so that no wide copy of a large table exists."""
    out = torch.empty_like(rows)
    for source, target in zip(rows.split(1024), out.split(1024), strict=True):
        target.copy_(source.double() * factor)
    return out


def _dtype(wanted: str, config: Config, say: Callable[[str], None]) -> str:
    """auto: the type of the run; float32 where that says auto itself, and for float64, which such folders do not have."""
    if wanted != "auto":
        return ALIASES.get(wanted, wanted)
    trained = config.training.precision
    if trained in ("auto", "float64"):
        say(
            f"the run's training.precision is {trained}: its weights are written in float32; --dtype chooses another type."
        )
    return "bfloat16" if trained == "bf16" else "float32"


def _tokenizer_settings(
    config: Config, checkpoint: str | Path, model: str | None
) -> TokenizerConfig | None:
    """The run's tokenizer, None: the export has none. `model` says where its file lies now."""
    if model == "none" or (config.data.tokenizer is None and model is None):
        return None
    if config.data.tokenizer is None:
        raise ConfigError(
            f"--tokenizer-model {model}: the run has no data.tokenizer, so its family is unknown. Leave the option away."
        )
    return run_tokenizer(checkpoint, config, model)


def _tokenizer(config: Config, chosen: TokenizerConfig | None) -> Tokenizer | None:
    if chosen is None:
        return None
    tokenizer = build_tokenizer(chosen)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size = {config.model.vocab_size} has fewer. "
            "Give the tokenizer that the model was trained with (--tokenizer-model)."
        )
    return tokenizer


def _fresh_folder(output: Path) -> Path:
    """A folder beside the wished one, which must not exist or be empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"{output} exists and is not an empty folder. Choose another one, or remove it."
        )
    temporary = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"{temporary} cannot be made: {error.strerror}. Choose another folder."
        ) from None
    return temporary


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def parse_size(text: str) -> int:
    """'5GB', '500MB' or a number of bytes. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB)?", text.strip(), re.IGNORECASE)
    size = (
        int(float(match[1]) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}[(match[2] or "B").upper()])
        if match
        else 0
    )
    if size < 1:
        raise ConfigError(f"size {text!r}: give a number with B, KB, MB or GB, such as 5GB.")
    return size
