"""From a YAML file and `section.key=value` words to a checked `Config`, and back to YAML."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from megatron_completep.config.check import check_config
from megatron_completep.config.field_errors import describe, dotted, show
from megatron_completep.config.json_text import read_bounded
from megatron_completep.config.schema import Config
from megatron_completep.config.yaml_text import MAX_BYTES, dump_yaml, parse_yaml
from megatron_completep.config.yaml_text import Path as KeyPath
from megatron_completep.errors import ConfigError
from megatron_completep.files import write_whole

COMMAND_LINE = "command line"


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read, override and check one run's configuration.

    Args:
        path: the YAML file.
        overrides: words `section.key=value`, the value in YAML; elements of lists go by number, as in `data.train.0.weight=2`.

    Returns:
        The frozen configuration.

    Raises:
        ConfigError: the file is not readable YAML; or all problems of single fields; or all problems between fields.
    """
    values, lines = parse_yaml(_read(path), str(path))
    _require_mapping(values, str(path))
    origins = {key: f"line {line}" for key, line in lines.items()}
    return _validate(values, overrides, origins, str(path))


def config_from_mapping(
    values: Mapping[str, Any], overrides: Sequence[str] = (), name: str = "configuration"
) -> Config:
    """Check a configuration that is already a mapping of plain values, such as the one inside a checkpoint's manifest.

    Raises:
        ConfigError: as `load_config`.
    """
    _require_mapping(values, name)
    return _validate(copy.deepcopy(dict(values)), overrides, {}, name)


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write every setting, defaults included, as YAML that loads back equal; the file appears whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        write_whole(path, dump_yaml(config.model_dump(mode="json")).encode())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Choose another folder or free some space."
        ) from None


def _read(path: str | os.PathLike[str]) -> str:
    try:
        if "\0" not in str(path) and not os.path.lexists(path):
            raise ConfigError(
                f"{path} does not exist. Give the path of a configuration file, such as configs/quickstart.yaml."
            )
        return read_bounded(path, MAX_BYTES, ConfigError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: byte {error.object[error.start]:#04x} is not UTF-8. Save the file as UTF-8 text."
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{path!r} cannot be read: {error}. Give the path of a configuration file."
        ) from None


def _require_mapping(values: Any, name: str) -> None:
    if values is None:
        raise ConfigError(
            f"{name}, line 1: the file is empty. Start from a complete one, such as configs/quickstart.yaml."
        )
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{name}, line 1: {show(values)} is not a mapping of sections. Write `model:` and the keys below it, indented."
        )


def _validate(
    values: dict[str, Any], overrides: Sequence[str], origins: dict[KeyPath, str], name: str
) -> Config:
    # A section whose keys are all commented out reads as null; it means: the defaults.
    values = {
        key: {} if value is None and key in Config.model_fields else value
        for key, value in values.items()
    }
    problems = [problem for word in overrides if (problem := _override(values, word, origins))]
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems += describe(error, origins, values)
    if problems:
        raise ConfigError(_report(name, problems))
    try:
        check_config(config)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return config


def _report(name: str, problems: Sequence[str]) -> str:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n  ".join([f"{name}: {count}", *problems])


def _override(values: dict[str, Any], word: str, origins: dict[KeyPath, str]) -> str | None:
    """Put one `section.key=value` into `values`; returns the problem, if any. Unknown keys are left to the schema."""
    name, equals, text = word.partition("=")
    if not equals or name.startswith("-") or not all(name.split(".")):
        return f"{word}: not an override. Write section.key=value, such as optimizer.base_lr=1e-3."
    try:
        value, _ = parse_yaml(text, f"override {word}")
    except ConfigError as error:
        return str(error)
    path: list[str | int] = []
    here: Any = values
    parts = name.split(".")
    for part, below in itertools.pairwise(parts):
        key = _key(here, part)
        if key is None:
            return _no_such_element(word, path, here)
        path.append(key)
        if isinstance(here, dict) and here.get(part) is None:
            if below.isdigit():
                return f"{word}: {dotted(path)} is not in the file. Give the whole list, such as {dotted(path)}=[...]."
            here[part] = {}
            origins[tuple(path)] = COMMAND_LINE
        here = here[key]
    key = _key(here, parts[-1])
    if key is None:
        return _no_such_element(word, path, here)
    here[key] = value
    for old in [old for old in origins if old[: len(path) + 1] == (*path, key)]:
        del origins[old]
    origins[*path, key] = COMMAND_LINE
    return None


def _key(container: Any, part: str) -> str | int | None:
    """The key that `part` means in a mapping or list; None when there is no such place."""
    if isinstance(container, dict):
        return part
    if isinstance(container, list) and part.isdigit() and int(part) < len(container):
        return int(part)
    return None


def _no_such_element(word: str, path: Sequence[str | int], here: Any) -> str:
    if isinstance(here, list):
        return f"{word}: {dotted(path)} has {len(here)} elements, counted from 0. Give the whole list to add one."
    return f"{word}: {dotted(path)} = {show(here)} has no keys below it. Override {dotted(path)} itself."
