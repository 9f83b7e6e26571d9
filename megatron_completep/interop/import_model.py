"""A Hugging Face folder as a checkpoint of ours, for training at any layout (tools/import_hf.py).

The parameterization is `sp`, under which nothing is scaled: every tensor is taken as it is, and its
export is the original, bit for bit. Granite's multipliers become the tunable base factors of
`model`.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_completep.checkpoint import random_state
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
from megatron_completep.data.tokenizer import Tokenizer, build_tokenizer
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.files import new_folder, write_whole
from megatron_completep.interop.hf_config import from_hf, longest_sequence
from megatron_completep.interop.hf_reader import shown
from megatron_completep.interop.hf_tokenizer import COMPANIONS
from megatron_completep.interop.import_notes import (
    dtype_notes,
    token_id_notes,
    tokenizer_notes,
)
from megatron_completep.interop.model_folder import ModelFolder
from megatron_completep.interop.pieces import Folding, Piece, pieces
from megatron_completep.interop.tensor_files import SINGLE, TensorFolder
from megatron_completep.interop.tensor_values import (
    HEAD,
    refuse_non_finite,
    refuse_other_head,
    refuse_other_values,
)
from megatron_completep.model.gpt import GPT
from megatron_completep.optim.boxes import Box
from megatron_completep.optim.rule import MASTER
from megatron_completep.optim.rules import RULES
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.parameter import specs_of
from megatron_completep.run.state import RunState

# Bytes of weights that are held in memory and written as one file, beside the optimizer's zeros.
FILE_BYTES = 1 << 28
PRECISIONS = {"F32": "float32", "BF16": "bf16", "F16": "bf16"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", *COMPANIONS)
# The original training's data are not known, so there is nothing to compare with.
ALLOWED = ("data.*", "fingerprints.*")  # in checkpoint.allow_changed
# Buffers that older versions of transformers saved beside the weights.
_IGNORED = re.compile(r".*(rotary_emb\.inv_freq|attn\.(bias|masked_bias))")
_MOST_PROBLEMS = 20  # that one message lists

# (key, shape, array) of a state's box, as `write_tensor_file` takes it.
_StoredArray = tuple[str, tuple[int, ...], np.ndarray]


@dataclass(frozen=True)
class ImportReport:
    """What was made, ready for JSON."""

    config: str  # the YAML file to train with
    checkpoint: str
    architecture: str
    dtype: str  # of the original tensors
    parameters: int
    tokenizer: str | None
    notes: list[str]  # what became of the types and of the tokenizer, a sentence each

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def import_model(
    folder: str | Path,
    output: str | Path,
    overrides: Sequence[str] = (),
    seq_length: int | None = None,
) -> ImportReport:
    """Write `output`/config.yaml and `output`/checkpoints/step_00000000 from a Hugging Face folder.

    overrides: `section.key=value` words on the configuration. seq_length: tokens a training sample;
    None: the model's longest. Raises ConfigError: the model or a setting is not expressible;
    DataError: the folder is damaged or holds pickles.
    """
    folder = Path(folder)
    output = Path(output)
    files = ModelFolder(folder)
    config_json = files.json_object("config.json")
    architecture, model = from_hf(config_json, str(folder / "config.json"), seq_length)
    source = TensorFolder(folder)
    if source.has_both:
        refuse_other_values(TensorFolder(folder, only=SINGLE), source)
    if (output / "config.yaml").exists() or named_like_checkpoints(output / "checkpoints"):
        raise ConfigError(f"{output} holds a run already. Choose another folder.")

    # Everything that can be refused is refused before the first byte is written.
    model_config = _model_config(model, folder / "config.json")
    tensors = _match(source, architecture, model_config)
    dtypes = sorted({source.describe(piece.name)[1] for piece in tensors})
    precision = PRECISIONS[source.describe(tensors[0].name)[1]]
    copies = _tokenizer_copies(files, output)
    tokenizer = _tokenizer_setting(copies)
    read_tokenizer = _read_tokenizer(files)
    if tokenizer is not None and read_tokenizer is not None:
        # Said outright, since the copies alone need not tell it.
        tokenizer["prepend_bos"] = bool(read_tokenizer.beginning)
    export = _export_section(files, architecture, config_json, model["seq_length"])
    config = _configuration(model_config, output, tokenizer, export, precision, overrides)
    table = table_of(config)
    parameters = _parameters(config.model, table)
    elements = _number_of_elements(parameters)

    try:
        with _nothing_left_on_failure(output, copies):
            check_space(output, _stored_bytes(parameters, table))
            for origin, copy in copies.items():
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(origin, copy)
            checkpoint = _write_checkpoint(
                output / "checkpoints", source, tensors, parameters, config, table
            )
            save_config(config, output / "config.yaml")
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written: {error.strerror or error}. Choose another folder or free "
            "some space."
        ) from None
    return ImportReport(
        config=str(output / "config.yaml"),
        checkpoint=str(checkpoint),
        architecture=architecture,
        dtype=" and ".join(dtypes),
        parameters=elements,
        tokenizer=None if tokenizer is None else tokenizer["type"],
        notes=[
            *dtype_notes(dtypes, config.training.precision),
            *token_id_notes(config),
            *tokenizer_notes(files, copies, read_tokenizer, config.model.vocab_size),
        ],
    )


def _model_config(model: dict[str, Any], where: Path) -> ModelConfig:
    """Our settings of the model, checked. `where` is their origin, for the message."""
    try:
        return ModelConfig.model_validate(model)
    except ValidationError as error:
        lines = [f"{where}: this model cannot be imported"]
        for problem in error.errors():
            setting = ".".join(map(str, problem["loc"]))
            lines.append(f"{setting} = {shown(problem['input'])}: {problem['msg']}")
        raise ConfigError("\n  ".join(lines)) from None


@contextmanager
def _nothing_left_on_failure(output: Path, copies: dict[Path, Path]) -> Iterator[None]:
    """Make `output` for an import, and take away what a failed one made in it.

    `output`, and folders above it, are taken away where they were not there before.
    """
    new_folders = [path for path in (output, *output.parents) if not path.exists()]
    tokenizer_folder = output / "tokenizer"
    existing = {path for path in (*copies.values(), tokenizer_folder) if path.exists()}
    try:
        output.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        shutil.rmtree(output / "checkpoints", ignore_errors=True)  # there was none
        for path in copies.values():
            if path not in existing:
                path.unlink(missing_ok=True)
        # The innermost folder goes first.
        if tokenizer_folder not in existing:
            new_folders.insert(0, tokenizer_folder)
        for path in new_folders:
            with suppress(OSError):  # what somebody else put there stays
                path.rmdir()
        raise


def _match(source: TensorFolder, architecture: str, model: ModelConfig) -> list[Piece]:
    """The pieces of the model, under the names that the folder has.

    Raises DataError with everything that is missing, superfluous or of another shape or type.
    """
    # GPT-2's base model, without the language model's head, has names without 'transformer.'.
    is_base_model = architecture == "gpt2" and "wte.weight" in source.names
    tensors = pieces(architecture, model, Folding(), "" if is_base_model else None)
    stored_names = set(source.names)
    problems = []
    for piece in tensors:
        if piece.name not in stored_names:
            problems.append(f"{piece.name}: missing")
            continue
        shape, dtype = source.describe(piece.name)
        if shape != piece.shape:
            problems.append(
                f"{piece.name}: shape {list(shape)}, config.json says {list(piece.shape)}"
            )
        elif dtype not in PRECISIONS:
            problems.append(f"{piece.name}: type {dtype}, only {', '.join(PRECISIONS)} are read")

    # Some programs store the tied table a second time, as the head.
    expected_names = {piece.name for piece in tensors}
    if model.tied_embeddings:
        expected_names.add(HEAD)
        if not problems and HEAD in stored_names:
            refuse_other_head(source, tensors[0].name)
    for name in sorted(stored_names - expected_names):
        if not _IGNORED.fullmatch(name):
            problems.append(f"{name}: our model has no such tensor")

    if problems:
        lines = [f"{source.folder}: its tensors are not those of its config.json"]
        lines += problems[:_MOST_PROBLEMS]
        if len(problems) > _MOST_PROBLEMS:
            lines.append(f"... and {len(problems) - _MOST_PROBLEMS} more")
        raise DataError("\n  ".join(lines))
    return tensors


def _export_section(
    files: ModelFolder, architecture: str, config_json: dict[str, Any], seq_length: int
) -> dict[str, Any]:
    """The section `export`: what the folder says beside its weights. Raises DataError."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    section: dict[str, Any] = {
        "architecture": architecture,
        "token_ids": {name: config_json[name] for name in names if config_json.get(name, -1) != -1},
    }
    longest = longest_sequence(config_json)
    if longest != seq_length:
        section["max_position_embeddings"] = longest
    if files.has("generation_config.json"):
        section["generation"] = files.json_object("generation_config.json")
    return section


def _read_tokenizer(files: ModelFolder) -> Tokenizer | None:
    """The folder's tokenizer; None where there is none, or its package is not installed.

    Raises DataError for a tokenizer that cannot be read.
    """
    kinds = {"tokenizer.json": "huggingface", "tokenizer.model": "sentencepiece"}
    name = next((name for name in kinds if files.has(name)), None)
    if name is None:
        return None
    mapping = {"type": kinds[name], "model": str(files.path(name))}
    try:
        return build_tokenizer(TokenizerConfig.model_validate(mapping))
    except ImportError:
        return None
    except DataError as error:
        raise DataError(
            f"{error} Repair it, or take it out of {files.folder} to import the weights alone."
        ) from None


def _tokenizer_copies(files: ModelFolder, output: Path) -> dict[Path, Path]:
    """The tokenizer's files, and where each goes beside the configuration.

    Empty where there is no tokenizer that we read. Raises DataError.
    """
    if files.has("tokenizer.json"):
        names = [name for name in TOKENIZER_FILES if files.has(name)]
        return {files.path(name): output / "tokenizer" / name for name in names}
    if files.has("tokenizer.model"):
        return {files.path("tokenizer.model"): output / "tokenizer.model"}
    return {}


def _tokenizer_setting(copies: dict[Path, Path]) -> dict[str, Any] | None:
    """`data.tokenizer` of the copied files."""
    for copy in copies.values():
        if copy.name == "tokenizer.json":
            return {"type": "huggingface", "model": str(copy.parent)}
        if copy.name == "tokenizer.model":
            return {"type": "sentencepiece", "model": str(copy)}
    return None


def _configuration(
    model: ModelConfig,
    output: Path,
    tokenizer: dict[str, Any] | None,
    export: dict[str, Any],
    precision: str,
    overrides: Sequence[str],
) -> Config:
    """A complete configuration; data, learning rate and lengths are the user's to set.

    Raises ConfigError where an override would make the model another function.
    """
    mapping = {
        "model": model.model_dump(exclude_none=True),
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
        "checkpoint": {"interval": 100, "allow_changed": list(ALLOWED)},
        "export": export,
    }
    config = config_from_mapping(mapping, overrides, name="configuration of the import")
    # The imported tensors fit the imported settings alone.
    changed = []
    for name in sorted(model.model_fields_set):
        if getattr(config.model, name) != getattr(model, name):
            changed.append(f"model.{name}")
    if changed:
        raise ConfigError(
            f"overrides of {', '.join(changed)}: these are the imported model's own. Remove them."
        )
    _check_forward_multipliers(config)
    return config


def _check_forward_multipliers(config: Config) -> None:
    """Raises ConfigError where the parameterization multiplies otherwise than `sp`.

    The imported weights belong to the multipliers of `sp`: with others they are another function.
    """
    sp = config.completep.model_copy(update={"parameterization": "sp", "alpha": 1.0})
    sp_table = table_of(config.model_copy(update={"completep": sp}))
    table = table_of(config)
    names = ("residual_multiplier", "logit_multiplier", "attention_scale")
    changed = [name for name in names if getattr(table, name) != getattr(sp_table, name)]
    if changed:
        raise ConfigError(
            f"completep.parameterization = {config.completep.parameterization} with this proxy "
            f"gives another {' and '.join(changed)}, so the imported weights would be another "
            "function. Use sp, or leave the base shape null."
        )


def _parameters(model: ModelConfig, table: Table) -> dict[str, StoredParameter]:
    """Role and shape of every parameter, from the model without memory."""
    specs = specs_of(GPT(model, table, ParallelContext.single("meta")))
    rule = RULES[table.rule]
    parameters = {}
    for name, spec in specs.items():
        parameters[name] = StoredParameter(**describe(spec, "F32", rule.stored_states(spec)))
    return parameters


def _stored_bytes(parameters: Mapping[str, StoredParameter], table: Table) -> int:
    """Bytes of all states of all parameters, in float32."""
    all_states = RULES[table.rule].all_powers()
    elements = 0
    for parameter in parameters.values():
        states = all_states if parameter.states is None else parameter.states
        elements += math.prod(parameter.shape) * len(states)
    return 4 * elements


def _number_of_elements(parameters: Mapping[str, StoredParameter]) -> int:
    """Elements of all parameters together."""
    return sum(math.prod(parameter.shape) for parameter in parameters.values())


def _write_checkpoint(
    checkpoints: Path,
    source: TensorFolder,
    tensors: list[Piece],
    parameters: dict[str, StoredParameter],
    config: Config,
    table: Table,
) -> Path:
    """Write step 0, with an optimizer that has seen no gradient; returns the checkpoint's folder.

    The folder appears by one rename. Memory holds the weights of one file, and zeros of the same
    size.
    """
    attempt = secrets.token_hex(4)
    target = checkpoints / folder_name(0)
    states = RULES[table.rule].all_powers()
    metadata = {"format": "pt", "step": "0", "attempt": attempt}
    with new_folder(target) as temporary:
        files = []
        for number, names in enumerate(_names_by_file(parameters)):
            weights = {name: _assemble(source, tensors, name, parameters[name]) for name in names}
            path = temporary / f"part_{number:05d}.safetensors"
            arrays = _stored_arrays(weights, states, parameters)
            files.append(write_tensor_file(path, arrays, "F32", metadata))
        # The manifest is written last: it names every file with its hashes.
        manifest = _manifest(files, parameters, config, table, attempt)
        write_whole(temporary / MANIFEST, seal(manifest))
    return target


def _stored_arrays(
    weights: Mapping[str, np.ndarray],
    states: Mapping[str, object],
    parameters: Mapping[str, StoredParameter],
) -> list[_StoredArray]:
    """Each state of each weight as one box that is the whole tensor."""
    arrays: list[_StoredArray] = []
    for state in states:
        for name, weight in weights.items():
            stored_states = parameters[name].states
            if stored_states is not None and state not in stored_states:
                continue
            # The moments of an optimizer that has seen no gradient are zero.
            array = weight if state == MASTER else np.zeros(weight.shape, np.float32)
            box = Box((0,) * array.ndim, array.shape)
            arrays.append((key_of(state, name, box), array.shape, array))
    return arrays


def _manifest(
    files: list[StoredFile],
    parameters: dict[str, StoredParameter],
    config: Config,
    table: Table,
    attempt: str,
) -> Manifest:
    """The manifest of a run that has not begun, written by one process."""
    # Through JSON, so that it equals the table that a resumed run reads from a manifest.
    described_table = json.loads(json.dumps(describe_table(table), default=str))
    return Manifest(
        step=0,
        attempt=attempt,
        state=Progress(**vars(RunState())),
        updates=0.0,
        config=config.model_dump(mode="json"),
        table=described_table,
        fingerprints={},
        layout={"tensor": 1, "pipeline": 1, "data": 1, "world": 1, "virtual": 1},
        rng=random_state.capture(),
        versions=versions(),
        states=RULES[table.rule].all_powers(),
        parameters=parameters,
        block_size=BLOCK_SIZE,
        files=files,
        elements=_number_of_elements(parameters),
    )


def _names_by_file(parameters: dict[str, StoredParameter]) -> Iterator[list[str]]:
    """Names of parameters whose weights together fill a file."""
    names: list[str] = []
    size = 0
    for name, parameter in parameters.items():
        names.append(name)
        size += 4 * math.prod(parameter.shape)  # bytes in float32
        if size >= FILE_BYTES:
            yield names
            names = []
            size = 0
    if names:
        yield names


def _assemble(
    source: TensorFolder, tensors: list[Piece], name: str, parameter: StoredParameter
) -> np.ndarray:
    """Our parameter `name` in float32, from the pieces that it was cut into.

    float32 is exact for every type that is read. Raises DataError for numbers that are none.
    """
    assembled = torch.empty(parameter.shape, dtype=torch.float32)
    for piece in tensors:
        if piece.source == name:
            value = source.value(piece.name)
            refuse_non_finite(source, piece.name, value)
            _put(piece, value, assembled)
    return assembled.numpy()


def _put(piece: Piece, tensor: Tensor, parameter: Tensor) -> None:
    """Copy a Hugging Face tensor into the rows of our parameter that it holds."""
    rows = tensor.t() if piece.transposed else tensor
    matrix = parameter if piece.expert is None else parameter[piece.expert]
    position = 0
    for start, stop, _ in piece.rows:
        count = stop - start
        matrix[start:stop].copy_(rows[position : position + count])
        position += count
