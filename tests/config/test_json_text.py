"""JSON that anybody may have written is read within bounds,
and every mistake in it names the file.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from megatron_completep.config.json_text import (
    MAX_BYTES,
    MAX_DEPTH,
    parse_json,
    read_json,
    read_json_object,
)
from megatron_completep.errors import CheckpointError, DataError


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 1024, 200_000])
@pytest.mark.parametrize("text", ["{}", '{{"a": {}}}'], ids=["alone", "inside"])
def test_brackets_in_brackets_without_end_are_refused(depth: int, text: str):
    with pytest.raises(
        DataError, match=r"^file\.json: not usable JSON: brackets are nested more than 100 deep\.$"
    ):
        parse_json(text.format(nested(depth)), "file.json")
    objects = '{"a":' * depth + "1" + "}" * depth
    with pytest.raises(DataError, match="nested more than 100 deep"):
        parse_json(objects.encode(), "file.json")


def test_deep_wide_and_plain_values_are_read():
    assert parse_json(nested(MAX_DEPTH), "x") == json.loads(nested(MAX_DEPTH))
    wide = json.dumps([[number, {"a": []}] for number in range(1000)])
    assert parse_json(wide, "x") == json.loads(wide)
    assert parse_json('{"a": "[[[[", "b": 1e-3}', "x") == {"a": "[[[[", "b": 1e-3}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e400", "9" * 5000])
def test_numbers_that_are_not_finite_are_refused_unless_a_log_may_hold_them(number: str):
    with pytest.raises(DataError, match=r"^file\.json: not JSON"):
        parse_json(f'{{"a": {number}}}', "file.json")
    if not number.startswith("9"):
        assert not math.isfinite(parse_json(f'{{"a": {number}}}', "file.json", finite=False)["a"])


def test_files_that_are_no_files_or_too_large_or_no_objects_are_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a plain file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a plain file"):
        read_json(tmp_path)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match="more than the"):
        read_json(tmp_path / "large", CheckpointError)
    with pytest.raises(DataError, match="No such file"):
        read_json(tmp_path / "none")
    (tmp_path / "list").write_text("[1]")
    with pytest.raises(DataError, match="not a JSON object"):
        read_json_object(tmp_path / "list")
    (tmp_path / "bytes").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="not JSON"):
        read_json(tmp_path / "bytes")
