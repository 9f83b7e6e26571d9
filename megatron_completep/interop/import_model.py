"""A Hugging Face folder as a checkpoint of ours, for continued training at any layout: what tools/import_hf.py does.

The parameterization is `sp`, under which nothing is scaled: every tensor is taken as it is, and its export is the original, bit for
bit. Granite's multipliers become the tunable base factors of `model`.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_completep.checkpoint import random_state
from megatron_completep.checkpoint.boxes import Box
from megatron_completep.checkpoint.files import BLOCK_SIZE, key_of, write_tensor_file
from megatron_completep.checkpoint.identity import describe_table, versions
from megatron_completep.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    Progress,
    StoredFile,
    StoredParameter,
    folder_name,
    named_like_checkpoints,
    seal,
)
from megatron_completep.checkpoint.save import check_space
from megatron_completep.checkpoint.shard import describe
from megatron_completep.completep import Table, table_of
from megatron_completep.config import Config, config_from_mapping, save_config
from megatron_completep.config.schema import ModelConfig, TokenizerConfig
from megatron_completep.data.tokenizer import build_tokenizer
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.files import new_folder, write_whole
from megatron_completep.interop.architectures import Folding, Piece, pieces
from megatron_completep.interop.hf_config import from_hf, shown
from megatron_completep.interop.hf_tokenizer import COMPANIONS
from megatron_completep.interop.model_folder import ModelFolder
from megatron_completep.interop.tensor_files import TensorFolder
from megatron_completep.model.gpt import GPT
from megatron_completep.optim.rule import MASTER
from megatron_completep.optim.rules import RULES
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.parameter import specs_of
from megatron_completep.run.state import RunState

FILE_BYTES = (
    1 << 28
)  # of weights held in memory and written as one file, with the optimizer's zeros beside them
PRECISIONS = {"F32": "float32", "BF16": "bf16", "F16": "bf16"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", *COMPANIONS)
# Buffers that older versions of transformers saved beside the weights.
_IGNORED = re.compile(r".*(rotary_emb\.inv_freq|attn\.(bias|masked_bias))")


@dataclass(frozen=True)
class ImportReport:
    """What was made, ready for JSON."""

    config: str  # the YAML file to train with
    checkpoint: str
    architecture: str
    dtype: str  # of the original tensors
    parameters: int
    tokenizer: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def import_model(
    folder: str | Path,
    output: str | Path,
    overrides: Sequence[str] = (),
    seq_length: int | None = None,
) -> ImportReport:
    """Write `output`/config.yaml and `output`/checkpoints/step_00000000 from a folder of safetensors.

    overrides: `section.key=value` words on the configuration. seq_length: tokens a training sample; None: the model's longest.
    Raises ConfigError: the model or a setting is not expressible; DataError: the folder is damaged or holds pickles.
    """
    folder, output = Path(folder), Path(output)
    files = ModelFolder(folder)
    architecture, model = from_hf(
        files.json_object("config.json"), str(folder / "config.json"), seq_length
    )
    source = TensorFolder(folder)
    if (output / "config.yaml").exists() or named_like_checkpoints(output / "checkpoints"):
        raise ConfigError(f"{output} holds a run already. Choose another folder.")
    wanted = _match(source, architecture, _model_config(model, folder / "config.json"))
    dtype = source.describe(wanted[0].name)[1]
    _check_tokenizer(files)
    copies = _tokenizer_copies(files, output)
    tokenizer = _tokenizer_setting(copies)
    config = _configuration(model, output, tokenizer, PRECISIONS[dtype], overrides)
    table = table_of(config)
    parameters = _parameters(config.model, table)
    count = sum(int(np.prod(p.shape)) for p in parameters.values())
    try:
        with _nothing_left_on_failure(output, copies):
            check_space(output, 4 * len(RULES[table.rule].all_powers()) * count)
            for origin, copy in copies.items():
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(origin, copy)
            checkpoint = _write_checkpoint(
                output / "checkpoints", source, wanted, parameters, config, table
            )
            save_config(config, output / "config.yaml")
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written: {error.strerror or error}. Choose another folder or free some space."
        ) from None
    kind = None if tokenizer is None else tokenizer["type"]
    return ImportReport(
        str(output / "config.yaml"), str(checkpoint), architecture, dtype, count, kind
    )


def _model_config(model: dict[str, Any], where: Path) -> ModelConfig:
    try:
        return ModelConfig.model_validate(model)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, finding['loc']))} = {shown(finding['input'])}: {finding['msg']}"
            for finding in error.errors()
        ]
        raise ConfigError(
            "\n  ".join([f"{where}: this model cannot be imported", *problems])
        ) from None


@contextmanager
def _nothing_left_on_failure(output: Path, copies: dict[Path, Path]) -> Iterator[None]:
    """A failed import takes away what it made in `output`, and `output` where that was not there before."""
    made = [path for path in (output, *output.parents) if not path.exists()]
    there = {path for path in (*copies.values(), output / "tokenizer") if path.exists()}
    try:
        output.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        shutil.rmtree(output / "checkpoints", ignore_errors=True)  # there was none
        for path in copies.values():
            if path not in there:
                path.unlink(missing_ok=True)
        for path in [*({output / "tokenizer"} - there), *made]:
            with suppress(OSError):  # what somebody else put there stays
                path.rmdir()
        raise


def _match(source: TensorFolder, architecture: str, model: ModelConfig) -> list[Piece]:
    """The pieces as the folder names them; DataError with everything that is missing, superfluous or of another shape or type."""
    prefix = (
        "" if architecture == "gpt2" and "wte.weight" in source.names else None
    )  # the base model's own names
    wanted = pieces(architecture, model, Folding(), prefix)
    names = set(source.names)
    problems = []
    for piece in wanted:
        if piece.name not in names:
            problems.append(f"{piece.name}: missing")
            continue
        shape, dtype = source.describe(piece.name)
        if shape != piece.shape:
            problems.append(
                f"{piece.name}: shape {list(shape)}, config.json says {list(piece.shape)}"
            )
        elif dtype not in PRECISIONS:
            problems.append(f"{piece.name}: type {dtype}, only {', '.join(PRECISIONS)} are read")
    spare = (
        names
        - {piece.name for piece in wanted}
        - ({"lm_head.weight"} if model.tied_embeddings else set())
    )
    problems += [
        f"{name}: our model has no such tensor"
        for name in sorted(spare)
        if not _IGNORED.fullmatch(name)
    ]
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise DataError(
            "\n  ".join(
                [
                    f"{source.folder}: its tensors are not those of its config.json",
                    *problems[:20],
                    *more,
                ]
            )
        )
    return wanted


def _check_tokenizer(files: ModelFolder) -> None:
    """Raises DataError for a tokenizer that cannot be read. Without its package installed nothing is said."""
    kinds = {"tokenizer.json": "huggingface", "tokenizer.model": "sentencepiece"}
    name = next((name for name in kinds if files.has(name)), None)
    if name is None:
        return
    try:
        build_tokenizer(
            TokenizerConfig.model_validate({"type": kinds[name], "model": str(files.path(name))})
        )
    except ImportError:
        return
    except DataError as error:
        raise DataError(
            f"{error} Repair it, or take it out of {files.folder} to import the weights alone."
        ) from None


def _tokenizer_copies(files: ModelFolder, output: Path) -> dict[Path, Path]:
    """The tokenizer's files, and where each goes beside the configuration; empty where there is none we read. Raises DataError."""
    if files.has("tokenizer.json"):
        return {
            files.path(name): output / "tokenizer" / name
            for name in TOKENIZER_FILES
            if files.has(name)
        }
    if files.has("tokenizer.model"):
        return {files.path("tokenizer.model"): output / "tokenizer.model"}
    return {}


def _tokenizer_setting(copies: dict[Path, Path]) -> dict[str, str] | None:
    """`data.tokenizer` of the copied files."""
    for copy in copies.values():
        kinds = {
            "tokenizer.json": ("huggingface", copy.parent),
            "tokenizer.model": ("sentencepiece", copy),
        }
        if copy.name in kinds:
            kind, model = kinds[copy.name]
            return {"type": kind, "model": str(model)}
    return None


def _configuration(
    model: dict[str, Any],
    output: Path,
    tokenizer: dict[str, str] | None,
    precision: str,
    overrides: Sequence[str],
) -> Config:
    """A complete configuration; data, learning rate and lengths are the user's to set."""
    values = {
        "model": model,
        "completep": {"parameterization": "sp"},
        "optimizer": {
            "base_lr": 2e-5,
            "base_eps": 1e-8,
            "schedule": "cosine",
            "warmup_fraction": 0.01,
            "min_lr_fraction": 0.1,
        },
        "data": {"train": [{"prefix": "data/train_text_document"}], "tokenizer": tokenizer},
        "training": {
            "micro_batch_size": 1,
            "global_batch_size": 16,
            "train_steps": 1000,
            "precision": precision,
            "output_dir": str(output),
        },
        # The original training's data are not known, so there is nothing to compare with.
        "checkpoint": {"interval": 100, "allow_changed": ["data.*", "fingerprints.*"]},
    }
    config = config_from_mapping(values, overrides, name="configuration of the import")
    changed = {name: value for name, value in model.items() if getattr(config.model, name) != value}
    if changed:
        raise ConfigError(
            f"overrides of {', '.join(f'model.{name}' for name in changed)}: these are the imported model's own. Remove them."
        )
    sp = config.completep.model_copy(update={"parameterization": "sp", "alpha": 1.0})
    plain = table_of(config.model_copy(update={"completep": sp}))
    table = table_of(config)
    names = [
        n
        for n in ("residual_multiplier", "logit_multiplier", "attention_scale")
        if getattr(table, n) != getattr(plain, n)
    ]
    if names:
        raise ConfigError(
            f"completep.parameterization = {config.completep.parameterization} with this proxy gives another {' and '.join(names)}, so the "
            "imported weights would be another function. Use sp, or leave the base shape null."
        )
    return config


def _parameters(model: ModelConfig, table: Table) -> dict[str, StoredParameter]:
    """Role and shape of every parameter, from the model without memory."""
    specs = specs_of(GPT(model, table, ParallelContext.single("meta")))
    return {name: StoredParameter(**describe(spec, "F32")) for name, spec in specs.items()}


def _write_checkpoint(
    checkpoints: Path,
    source: TensorFolder,
    wanted: list[Piece],
    parameters: dict[str, StoredParameter],
    config: Config,
    table: Table,
) -> Path:
    """Step 0 with these weights and an optimizer that has seen nothing; it appears by one rename."""
    attempt, target = secrets.token_hex(4), checkpoints / folder_name(0)
    states = RULES[table.rule].all_powers()
    with new_folder(target) as temporary:
        files = []
        for number, names in enumerate(_groups(parameters)):
            arrays = dict(_assemble(source, wanted, {name: parameters[name] for name in names}))
            tensors = []
            for state in states:
                for name, array in arrays.items():
                    values = array if state == MASTER else np.zeros(array.shape, np.float32)
                    tensors.append(
                        (
                            key_of(state, name, Box((0,) * array.ndim, array.shape)),
                            array.shape,
                            values,
                        )
                    )
            metadata = {"format": "pt", "step": "0", "attempt": attempt}
            files.append(
                write_tensor_file(
                    temporary / f"part_{number:05d}.safetensors", tensors, "F32", metadata
                )
            )
        write_whole(
            temporary / MANIFEST, seal(_manifest(files, parameters, config, table, attempt))
        )
    return target


def _manifest(
    files: list[StoredFile],
    parameters: dict[str, StoredParameter],
    config: Config,
    table: Table,
    attempt: str,
) -> Manifest:
    return Manifest(
        step=0,
        attempt=attempt,
        state=Progress(**vars(RunState())),
        updates=0.0,
        config=config.model_dump(mode="json"),
        table=json.loads(json.dumps(describe_table(table), default=str)),
        fingerprints={},
        layout={"tensor": 1, "pipeline": 1, "data": 1, "world": 1, "virtual": 1},
        rng=random_state.capture(),
        versions=versions(),
        states=RULES[table.rule].all_powers(),
        parameters=parameters,
        block_size=BLOCK_SIZE,
        files=files,
        elements=sum(int(np.prod(p.shape)) for p in parameters.values()),
    )


def _groups(parameters: dict[str, StoredParameter]) -> Iterator[list[str]]:
    """Names whose weights together fill a file."""
    group: list[str] = []
    size = 0
    for name, parameter in parameters.items():
        group.append(name)
        size += 4 * int(np.prod(parameter.shape))
        if size >= FILE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _assemble(
    source: TensorFolder, wanted: list[Piece], parameters: dict[str, StoredParameter]
) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters, in float32 (exact for every type that is read), from the pieces that they were cut into."""
    for name, parameter in parameters.items():
        whole = torch.empty(parameter.shape, dtype=torch.float32)
        for piece in (p for p in wanted if p.source == name):
            _put(piece, source.value(piece.name), whole)
        yield name, whole.numpy()


def _put(piece: Piece, value: Tensor, whole: Tensor) -> None:
    rows = value.t() if piece.transposed else value
    position = 0
    for start, stop, _ in piece.rows:
        whole[start:stop].copy_(rows[position : position + stop - start])
        position += stop - start
