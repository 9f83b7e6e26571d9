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
        overrides: words `section.key=value`, the value in YAML; elements of lists go by number, as
            in `data.train.0.weight=2`.

    Returns:
        The frozen configuration.

    Raises:
        ConfigError: the file is not readable YAML; or all problems of single fields; or all
            problems between fields.
    """
    settings, lines = parse_yaml(_read(path), str(path))
    _require_mapping(settings, str(path))
    origins = {key: f"line {line}" for key, line in lines.items()}
    return _validate(settings, overrides, origins, str(path))


def config_from_mapping(
    values: Mapping[str, Any], overrides: Sequence[str] = (), name: str = "configuration"
) -> Config:
    """Check a configuration that is already a mapping of plain values.

    The manifest of a checkpoint holds one. Raises ConfigError as `load_config` does.
    """
    _require_mapping(values, name)
    # A copy, because overrides are written into it.
    return _validate(copy.deepcopy(dict(values)), overrides, {}, name)


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write every setting, defaults included, as YAML that loads back equal.

    The file appears whole or not at all. Raises ConfigError where it cannot be written.
    """
    try:
        write_whole(path, dump_yaml(config.model_dump(mode="json")).encode())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Choose another folder or free some space."
        ) from None


def _read(path: str | os.PathLike[str]) -> str:
    try:
        # Of a path with a null character lexists says only that it is absent, read_bounded why.
        if "\0" not in str(path) and not os.path.lexists(path):
            raise ConfigError(
                f"{path} does not exist. "
                "Give the path of a configuration file, such as configs/quickstart.yaml."
            )
        return read_bounded(path, MAX_BYTES, ConfigError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: byte {error.object[error.start]:#04x} is not UTF-8. "
            "Save the file as UTF-8 text."
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{path!r} cannot be read: {error}. Give the path of a configuration file."
        ) from None


def _require_mapping(document: Any, name: str) -> None:
    if document is None:
        raise ConfigError(
            f"{name}, line 1: the file is empty. "
            "Start from a complete one, such as configs/quickstart.yaml."
        )
    if not isinstance(document, Mapping):
        raise ConfigError(
            f"{name}, line 1: {show(document)} is not a mapping of sections. "
            "Write `model:` and the keys below it, indented."
        )


def _validate(
    settings: dict[str, Any], overrides: Sequence[str], origins: dict[KeyPath, str], name: str
) -> Config:
    """The checked configuration; overrides are written into `settings` and `origins`.

    origins: where a key was written, such as 'line 3'. name: of the file, in messages.
    """
    # A section whose keys are all commented out reads as null; it means: the defaults.
    for key, section in settings.items():
        if section is None and key in Config.model_fields:
            settings[key] = {}

    problems: list[str] = []
    for word in overrides:
        problem = _override(settings, word, origins)
        if problem is not None:
            problems.append(problem)
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        problems += describe(error, origins, settings)
    if problems:
        raise ConfigError(_report(name, problems))

    # Rules between fields come last: they read fields that are valid each by itself.
    try:
        check_config(config)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return config


def _report(name: str, problems: Sequence[str]) -> str:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n  ".join([f"{name}: {count}", *problems])


def _override(settings: dict[str, Any], word: str, origins: dict[KeyPath, str]) -> str | None:
    """Put one `section.key=value` into `settings`; returns the problem, if any.

    Unknown keys are left to the schema.
    """
    name, equals, yaml_text = word.partition("=")
    names = name.split(".")
    if not equals or name.startswith("-") or not all(names):
        return f"{word}: not an override. Write section.key=value, such as optimizer.base_lr=1e-3."
    try:
        new_value, _ = parse_yaml(yaml_text, f"override {word}")
    except ConfigError as error:
        return str(error)

    # Down to the mapping or list that holds the last name; sections on the way are created.
    path: list[str | int] = []
    container: Any = settings
    for key_text, next_key_text in itertools.pairwise(names):
        key = _key(container, key_text)
        if key is None:
            return _no_such_element(word, path, container)
        path.append(key)
        if isinstance(container, dict) and container.get(key_text) is None:
            # Number 0 of a list that is not there could not be told from a mapping's key.
            if next_key_text.isdigit():
                return (
                    f"{word}: {dotted(path)} is not in the file. "
                    f"Give the whole list, such as {dotted(path)}=[...]."
                )
            container[key_text] = {}
            origins[tuple(path)] = COMMAND_LINE
        container = container[key]
    key = _key(container, names[-1])
    if key is None:
        return _no_such_element(word, path, container)
    container[key] = new_value

    # The lines of a value that was replaced, and of what it held, are not those of the new one.
    path.append(key)
    for origin in list(origins):
        if origin[: len(path)] == tuple(path):
            del origins[origin]
    origins[tuple(path)] = COMMAND_LINE
    return None


def _key(container: Any, key_text: str) -> str | int | None:
    """The key that a word means in a mapping or list; None when there is no such place."""
    if isinstance(container, dict):
        return key_text
    if isinstance(container, list) and key_text.isdigit() and int(key_text) < len(container):
        return int(key_text)
    return None


def _no_such_element(word: str, path: Sequence[str | int], container: Any) -> str:
    if isinstance(container, list):
        return (
            f"{word}: {dotted(path)} has {len(container)} elements, counted from 0. "
            "Give the whole list to add one."
        )
    return (
        f"{word}: {dotted(path)} = {show(container)} has no keys below it. "
        f"Override {dotted(path)} itself."
    )
