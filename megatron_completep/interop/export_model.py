"""A checkpoint of any layout as a folder for stock transformers and vLLM (tools/export_hf.py).

The export runs in one process and holds one tensor in memory at a time; the model is never built.
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
from megatron_completep.completep import Table, table_of
from megatron_completep.config import Config, config_from_mapping
from megatron_completep.config.schema import TokenizerConfig
from megatron_completep.data.tokenizer import Tokenizer, build_tokenizer
from megatron_completep.errors import ConfigError, DataError, pairs_text
from megatron_completep.inference.generation import find_checkpoint, tokenizer_of_run
from megatron_completep.interop.architectures import choose_architecture, fold
from megatron_completep.interop.hf_config import to_hf
from megatron_completep.interop.hf_tokenizer import write_tokenizer
from megatron_completep.interop.model_card import model_card
from megatron_completep.interop.pieces import Folding, Piece, pieces
from megatron_completep.interop.tensor_files import write_tensors

ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_MULTIPLIER_KEYS = (  # of config.json
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
)
_BYTES_OF_UNIT = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}
_ROWS_AT_ONCE = 1024  # rows of a tensor that are converted to float64 together


@dataclass(frozen=True)
class ExportSettings:
    """What a user may choose about an export.

    dtype auto: bfloat16 where training.precision is bf16, else float32. tokenizer: None takes the
    run's, "none" leaves it out, anything else is the path of the run's tokenizer.
    """

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
    beginning: list[int]  # ids that the tokenizer puts in front of a text

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def export_model(
    checkpoint: str | Path,
    output: str | Path,
    settings: ExportSettings | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Write the folder; it appears whole or not at all.

    Raises ConfigError: no architecture expresses the model, or the folder exists; DataError: the
    tokenizer has no equal in Hugging Face's format; CheckpointError: damaged checkpoint.
    """
    settings = settings or ExportSettings()
    output = Path(output)
    stored = StoredCheckpoint.open(find_checkpoint(checkpoint))
    config = config_from_mapping(stored.manifest.config, name=f"{stored.folder}: its configuration")
    table = table_of(config)
    # An imported model goes back to what it was, unless the user asks for something else.
    asked_for = settings.architecture != "auto"
    requested = settings.architecture if asked_for else config.export.architecture
    architecture = choose_architecture(config.model, table, requested)
    folding = fold(architecture, config.model, table)
    dtype = _dtype(settings.dtype, config, say)
    tokenizer_settings = _tokenizer_settings(config, checkpoint, settings.tokenizer)
    tokenizer = _tokenizer(config, tokenizer_settings)
    folded = f", folded: {pairs_text(folding.changed)}" if folding.changed else ""
    say(f"{stored.folder}: {architecture}, {dtype}{folded}")

    export = _Export(
        stored, config, table, architecture, folding, dtype, tokenizer, tokenizer_settings
    )
    # Everything is written beside the output, which one rename then makes visible.
    temporary = _fresh_folder(output)
    try:
        report = export.write(temporary, output, settings.shard_bytes)
        temporary.rename(output)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError(
                f"{output} cannot be written: {error.strerror or error}. Choose another folder or "
                "free some space."
            ) from None
        raise
    return report


@dataclass(frozen=True)
class _Export:
    """Everything that decides the content of the folder."""

    stored: StoredCheckpoint
    config: Config
    table: Table
    architecture: str
    folding: Folding
    dtype: str
    tokenizer: Tokenizer | None
    tokenizer_settings: TokenizerConfig | None  # None exactly where `tokenizer` is

    def write(self, folder: Path, output: Path, shard_bytes: int) -> ExportReport:
        """Write all files into `folder`, which will be renamed to `output`. Raises OSError."""
        model = self.config.model
        # Tensors come first: a damaged checkpoint or a full disk shows there.
        tensors = pieces(self.architecture, model, self.folding)
        self._refuse_what_no_tensor_takes(tensors)
        shapes = [(piece.name, piece.shape) for piece in tensors]
        tensor_files = write_tensors(
            folder, shapes, self.dtype, Values(self.stored, tensors), shard_bytes
        )
        config_json = self._write_configuration(folder)
        if self.tokenizer is not None and self.tokenizer_settings is not None:
            write_tokenizer(self.tokenizer, folder, model.seq_length, self.tokenizer_settings)

        # The card is written last, from the report that lists it.
        files = {*folder.iterdir(), *tensor_files, folder / "README.md"}
        kept_multipliers = {}
        for name in _MULTIPLIER_KEYS:
            if name in config_json:
                kept_multipliers[name] = config_json[name]
        report = ExportReport(
            folder=str(output),
            checkpoint=str(self.stored.folder),
            step=self.stored.manifest.step,
            architecture=self.architecture,
            dtype=self.dtype,
            parameters=sum(math.prod(shape) for _, shape in shapes),
            files=sorted(path.name for path in files),
            kept=kept_multipliers,
            folded=self.folding.changed,
            tokenizer=self.tokenizer.type if self.tokenizer is not None else None,
            beginning=list(self.tokenizer.beginning) if self.tokenizer is not None else [],
        )
        card = model_card(self.config, self.stored.manifest, report.to_json())
        (folder / "README.md").write_text(card, encoding="utf-8")
        return report

    def _refuse_what_no_tensor_takes(self, tensors: list[Piece]) -> None:
        """Raise ConfigError for parameters that the architecture has no place for.

        Without them the exported model would be another one.
        """
        taken = {piece.source for piece in tensors}
        missing = [name for name in self.stored.manifest.parameters if name not in taken]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ConfigError(
                f"{self.stored.folder}: {self.architecture} has no tensor for "
                f"{', '.join(missing[:3])}{more}. A model with further branches cannot be exported."
            )

    def _write_configuration(self, folder: Path) -> dict[str, Any]:
        """Write config.json and generation_config.json; returns the content of the first."""
        # Without a tokenizer there is no end of document to stop at.
        chosen = self.config.export
        token_ids = self._token_ids()
        config_json = to_hf(
            self.architecture,
            self.config.model,
            self.table,
            self.dtype,
            self.config.optimizer.base_init_std,
            chosen.max_position_embeddings,
        )
        config_json |= token_ids
        _write_json(folder / "config.json", config_json)
        generation = chosen.generation
        if generation is None:
            # Padding is a matter of generation; config.json has it only where it was imported.
            padding = {} if chosen.token_ids else {"pad_token_id": token_ids["eos_token_id"]}
            generation = token_ids | padding
        _write_json(folder / "generation_config.json", generation)
        return config_json

    def _token_ids(self) -> dict[str, Any]:
        """The entries of config.json on special tokens."""
        chosen = self.config.export.token_ids
        if chosen is not None:
            return dict(chosen.items())
        # Without a tokenizer there is no end of document to stop at.
        if self.tokenizer is None:
            return {"bos_token_id": None, "eos_token_id": None}
        end = self.tokenizer.eod_id
        begin = self.tokenizer.bos_id
        # A document without a beginning of its own follows the end of the one before.
        return {"bos_token_id": end if begin is None else begin, "eos_token_id": end}


class Values:
    """Reads the tensors of an export from a checkpoint: name -> tensor.

    The parameter read last is remembered, since several tensors may be cut from one parameter.
    """

    def __init__(self, stored: StoredCheckpoint, tensors: list[Piece]):
        self._stored = stored
        self._pieces = {piece.name: piece for piece in tensors}
        self._recent: tuple[str, Tensor] | None = None  # name and tensor of a parameter

    def __call__(self, name: str) -> Tensor:
        piece = self._pieces[name]
        if piece.source is None:
            return torch.zeros(piece.shape)
        if self._recent is None or self._recent[0] != piece.source:
            # The old tensor is freed before the new one is read.
            self._recent = None
            self._recent = (piece.source, self._stored.tensor(piece.source))
        return cut(piece, self._recent[1])


def cut(piece: Piece, parameter: Tensor) -> Tensor:
    """The Hugging Face tensor of a piece, from our whole parameter."""
    matrix = parameter if piece.expert is None else parameter[piece.expert]
    ranges = []
    for start, stop, factor in piece.rows:
        rows = matrix[start:stop]
        ranges.append(rows if factor == 1.0 else _scaled(rows, factor))
    # One range is not copied.
    stacked = ranges[0] if len(ranges) == 1 else torch.cat(ranges)
    return stacked.t() if piece.transposed else stacked


def _scaled(rows: Tensor, factor: float) -> Tensor:
    """rows * factor, with the factor in float64.

    Few rows are converted at a time, so that no float64 copy of a large table exists.
    """
    scaled = torch.empty_like(rows)
    sources = torch.split(rows, _ROWS_AT_ONCE)
    targets = torch.split(scaled, _ROWS_AT_ONCE)
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source.double() * factor)
    return scaled


def _dtype(requested: str, config: Config, say: Callable[[str], None]) -> str:
    """The type of the written tensors.

    auto: the type of the run. It is float32 where the run says auto itself, and for float64, which
    such folders do not have.
    """
    if requested != "auto":
        return ALIASES.get(requested, requested)
    precision = config.training.precision
    if precision in ("auto", "float64"):
        say(
            f"the run's training.precision is {precision}: its weights are written in float32; "
            "--dtype chooses another type."
        )
    return "bfloat16" if precision == "bf16" else "float32"


def _tokenizer_settings(
    config: Config, checkpoint: str | Path, model: str | None
) -> TokenizerConfig | None:
    """The run's tokenizer, or None where the export has none.

    `model` says where the tokenizer's file lies now. Raises ConfigError.
    """
    if model == "none" or (config.data.tokenizer is None and model is None):
        return None
    if config.data.tokenizer is None:
        raise ConfigError(
            f"--tokenizer-model {model}: the run has no data.tokenizer, so its family is unknown. "
            "Leave the option away."
        )
    return tokenizer_of_run(checkpoint, config, model)


def _tokenizer(config: Config, settings: TokenizerConfig | None) -> Tokenizer | None:
    """The tokenizer of these settings. Raises DataError where it has more ids than the model."""
    if settings is None:
        return None
    tokenizer = build_tokenizer(settings)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size = "
            f"{config.model.vocab_size} has fewer. Give the tokenizer that the model was trained "
            "with (--tokenizer-model)."
        )
    return tokenizer


def _fresh_folder(output: Path) -> Path:
    """An empty folder beside `output`, which must not exist or be empty itself."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"{output} exists and is not an empty folder. Choose another one, or remove it."
        )
    temporary = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"{temporary} cannot be made: {error.strerror}. Choose another folder."
        ) from None
    return temporary


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def parse_size(text: str) -> int:
    """'5GB', '500MB' or a number of bytes. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB)?", text.strip(), re.IGNORECASE)
    size = 0
    if match:
        unit = (match[2] or "B").upper()
        size = int(float(match[1]) * _BYTES_OF_UNIT[unit])
    if size < 1:
        raise ConfigError(f"size {text!r}: give a number with B, KB, MB or GB, such as 5GB.")
    return size
