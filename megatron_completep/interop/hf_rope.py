"""Rotary positions in a config.json, under the names of older and newer versions of transformers.

Older ones write `rope_theta` and `rope_scaling`, newer ones `rope_parameters`, which holds both. A
folder may have both, and versions differ in which one they read: values that contradict each other
are refused with both.
"""

from __future__ import annotations

from typing import Any

from megatron_completep.config.schema import RopeScalingConfig
from megatron_completep.interop.hf_reader import Reader, shown

_KEYS = ("rope_scaling", "rope_parameters")
_DEFAULT_BASE = 10000.0  # of an architecture that names no other
_NUMBERS = {
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
}
# Entries that stand beside the scaling and are read elsewhere, or mean nothing.
_OTHERS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


def rope_base(read: Reader) -> float:
    """The base of the frequencies. Notes two values that differ."""
    # Every place where some version writes it; null counts as absent.
    values: dict[str, Any] = {}
    if read.entries.get("rope_theta") is not None:
        values["rope_theta"] = read.entries["rope_theta"]
    for key in _KEYS:
        entry = read.entries.get(key)
        if isinstance(entry, dict) and entry.get("rope_theta") is not None:
            values[f"{key}.rope_theta"] = entry["rope_theta"]
    _refuse_contradiction(read, values)
    base = next(iter(values.values()), read.defaults.get("rope_theta", _DEFAULT_BASE))
    # The base may come from an inner object, so a reader of that one entry checks it.
    return float(Reader({"rope_theta": base}, read.problems).number("rope_theta", kind=float))


def rope_scaling(read: Reader) -> dict[str, Any] | None:
    """`model.rope_scaling`, None where frequencies are as they are. Notes what is not known."""
    shares = {"partial_rotary_factor": read.entries.get("partial_rotary_factor")}
    scalings: dict[str, dict[str, Any] | None] = {}
    for key in _KEYS:
        entry = read.entries.get(key)
        if not entry:
            continue
        if not isinstance(entry, dict):
            # What is no object is then refused below, as a type that is not known.
            entry = {"rope_type": entry}
        shares[f"{key}.partial_rotary_factor"] = entry.get("partial_rotary_factor")
        scalings[key] = _one_scaling(read, key, entry)
    for name, share in shares.items():
        if share not in (None, 1, 1.0):
            read.problems.append(f"{name} = {shown(share)}: ours turns whole heads")
    _refuse_contradiction(read, scalings)
    return next(iter(scalings.values()), None)


def _one_scaling(read: Reader, key: str, entry: dict[str, Any]) -> dict[str, Any] | None:
    """One of the two entries as our setting; None: no scaling, or one that was refused."""
    # Older versions call it `type`, newer ones `rope_type`.
    kinds = {f"{key}.{name}": entry[name] for name in ("rope_type", "type") if name in entry}
    _refuse_contradiction(read, kinds)
    kind = next(iter(kinds.values()), "default")
    if kind == "default":
        # Newer versions have an object for each kind of attention layer, under that kind's name.
        nested = [name for name, value in entry.items() if isinstance(value, dict)]
        if nested:
            read.problems.append(
                f"{key}: {', '.join(nested)} have rotary frequencies of their own, ours are those "
                "of every layer"
            )
        return None
    known_kinds = ("linear", "llama3", "yarn")
    if kind not in known_kinds:
        read.problems.append(
            f"{key} of type {shown(kind)}: only {', '.join(known_kinds)} are known"
        )
        return None
    unknown = sorted(entry.keys() - RopeScalingConfig.model_fields.keys() - _OTHERS)
    if unknown:
        read.problems.append(f"{key}: {', '.join(map(shown, unknown))}: not known for {kind}")
    return _entries(read, key, kind, entry)


def _entries(read: Reader, key: str, kind: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The entries of a scaling that this kind reads."""
    setting: dict[str, Any] = {"rope_type": kind}
    problems: list[str] = []
    inner = Reader(entry, problems)
    if kind != "linear":
        setting["original_max_position_embeddings"] = _original_length(read, key, entry)
    # What another kind would read is left out here; `_one_scaling` has refused what no kind knows.
    read_by = {"linear": {"factor"}, "llama3": {"factor", "low_freq_factor", "high_freq_factor"}}
    for name in sorted(read_by.get(kind, _NUMBERS - {"low_freq_factor", "high_freq_factor"})):
        if kind == "yarn" and name == "factor" and entry.get(name) is None:
            # As transformers has it: the ratio of the longest sequence now to the longest before.
            longest = read.number("max_position_embeddings")
            setting[name] = longest / setting["original_max_position_embeddings"]
        elif kind == "yarn" and name != "factor" and _is_left_out(name, entry):
            continue
        else:
            setting[name] = inner.number(name, kind=float)
    # Null is false here for transformers, and a missing entry is true.
    if kind == "yarn" and "truncate" in entry:
        setting["truncate"] = inner.flag("truncate", False)
    read.problems += [f"{key}.{problem}" for problem in problems]
    return setting


def _is_left_out(name: str, entry: dict[str, Any]) -> bool:
    """Whether an optional entry of yarn is missing, or the 0 that stands for none."""
    # A factor of 0 would take the rotated heads away: it is read, and refused.
    return entry.get(name) is None if name == "attention_factor" else not entry.get(name)


def _original_length(read: Reader, key: str, entry: dict[str, Any]) -> int:
    """The longest sequence before rescaling: in the entry, beside it, else the present longest."""
    name = "original_max_position_embeddings"
    values: dict[str, Any] = {}
    if entry.get(name) is not None:
        values[f"{key}.{name}"] = entry[name]
    if read.entries.get(name) is not None:
        values[name] = read.entries[name]
    _refuse_contradiction(read, values)
    if not values:
        return int(read.number("max_position_embeddings"))
    value = next(iter(values.values()))
    return int(Reader({name: value}, read.problems).number(name))


def _refuse_contradiction(read: Reader, values: dict[str, Any]) -> None:
    """Note values of one thing under several names that are not all the same."""
    # None is a value here: a scaling under one name and none under the other contradict each other.
    first = next(iter(values.values()), None)
    if any(value != first for value in values.values()):
        both = ", ".join(f"{name} = {shown(value)}" for name, value in values.items())
        read.problems.append(
            f"{both}: they contradict each other, and versions of transformers differ in which "
            "one they read. Keep in config.json the one that the model was trained with"
        )
