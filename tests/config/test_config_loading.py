"""Configuration files are read as their users meant them,
and every mistake in them has one clear message.
"""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_completep.config import Config, config_from_mapping, load_config, save_config
from megatron_completep.config.yaml_text import MAX_BYTES, parse_yaml
from megatron_completep.errors import ConfigError, exit_on_user_error

ROOT = Path(__file__).resolve().parents[2]
TEXT = """\
model:
  hidden_size: 256
  num_layers: 8
  num_attention_heads: 4
  ffn_hidden_size: 1024
  vocab_size: 4096
  seq_length: 256
completep:
optimizer:
  base_lr: 1e-3
  betas: [0.9, 0.95]
data:
  train: [{prefix: a}, {prefix: b, weight: 2}]
training:
  micro_batch_size: 8
  global_batch_size: 16
  train_steps: 120
  output_dir: runs/test
"""


@pytest.fixture
def write(tmp_path):
    """Writes a configuration file and returns its path."""

    def write(text: str | bytes = TEXT) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def message_of(path, overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_every_committed_configuration_loads_and_comes_back_equal(path, tmp_path):
    config = load_config(path)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    # A reader's example says what it sets, not what it leaves.
    assert "null" not in path.read_text()


@pytest.mark.parametrize("name", ["quickstart", "completep_1b"])
def test_a_committed_target_differs_from_its_proxy_in_size_alone(name):
    target = load_config(ROOT / f"configs/{name}.yaml")
    proxy = load_config(ROOT / f"configs/{name}_proxy.yaml")
    assert target.optimizer == proxy.optimizer
    assert target.completep == proxy.completep
    base = proxy.completep
    shape = (proxy.model.hidden_size, proxy.model.num_layers, proxy.model.ffn_hidden_size)
    assert shape == (base.base_hidden_size, base.base_num_layers, base.base_ffn_hidden_size)
    sizes = {
        "hidden_size",
        "num_layers",
        "num_attention_heads",
        "num_query_groups",
        "ffn_hidden_size",
    }
    assert target.model.model_dump(exclude=sizes) == proxy.model.model_dump(exclude=sizes)


def test_numbers_in_scientific_notation_are_numbers(write):
    assert load_config(write()).optimizer.base_lr == 1e-3
    assert yaml.safe_load("1e-3") == "1e-3"  # what the library alone would have done


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-1.5e+2", -150.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("1_000", 1000),
        ("0x10", 16),
        ("010", 10),
        ("+3", 3),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("off", False),
        ("~", None),
        ("", None),
        ("1f1b", "1f1b"),
        ("1/head_dim", "1/head_dim"),
        ("969,30,1", "969,30,1"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("'1e-3'", "1e-3"),
        ("e5", "e5"),
        ("<<", "<<"),
    ],
)
def test_plain_words_read_as_expected(text, value):
    found, _ = parse_yaml(f"key: {text}", "text")
    assert found == {"key": value}
    assert type(found["key"]) is type(value)


FILE_MISTAKES = [
    ("", ["line 1", "empty", "configs/quickstart.yaml"]),
    ("# nothing\n", ["line 1", "empty"]),
    ("- a\n- b\n", ["line 1", "not a mapping"]),
    ("just words\n", ["line 1", "not a mapping"]),
    ("model:\n\thidden_size: 3\n", ["line 2", "indent with spaces"]),
    (
        TEXT + "optimizer:\n  base_lr: 1\n",
        ["line 19", "optimizer stands twice", "line 9", "Keep one"],
    ),
    (
        TEXT.replace("  num_layers: 8\n", "  num_layers: 8\n  num_layers: 9\n"),
        ["line 4", "num_layers stands twice", "line 3"],
    ),
    ("model: !!python/object/apply:os.system ['true']\n", ["line 1", "remove the tag"]),
    ("model: !Custom {}\n", ["line 1", "remove the tag"]),
    ("model: {a: 1\n", ["line 2", "Check the indentation, the brackets"]),
    ("model: *shape\n", ["line 1", "undefined alias", "in quotes"]),
    ("a: b: c\n", ["line 1", "quotes around a text"]),
    ("? [a]\n: b\n", ["line 1", "Keys are plain words"]),
    ("model: {}\n---\nmodel: {}\n", ["line 2", "remove what follows"]),
    ("model: \x07\n", ["line 1", "plain UTF-8"]),
    (b"model: {}\ndata: \xff\n", ["line 2", "0xff", "UTF-8"]),
    ("seed: " + "9" * 5000, ["line 1", "5000 digits"]),
    ("[" * 20000, ["nested too deeply"]),
]


@pytest.mark.parametrize(("text", "words"), FILE_MISTAKES, ids=range(len(FILE_MISTAKES)))
def test_a_file_that_is_not_plain_yaml_is_refused_with_line_and_remedy(write, text, words):
    path = write(text)
    message = message_of(path)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_tags_never_run_code(write, tmp_path):
    message_of(write(f"model: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n"))
    assert not (tmp_path / "made").exists()


def test_a_self_referring_alias_is_refused_and_ends(write):
    assert "a value refers to itself" in message_of(
        write(TEXT.replace("model:", "model: &m\n  model: *m"))
    )


NESTED_ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in itertools.pairwise("abcdefghij")
)


def test_aliases_of_aliases_that_stand_for_billions_of_values_are_refused_and_plain_ones_are_read(
    write,
):
    message = message_of(write(NESTED_ALIASES))
    assert "it stands for 1" in message and "in place of aliases" in message
    values, _ = parse_yaml("a: &a [1, 2]\nb: [*a, *a]\n", "text")
    assert values == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


def test_an_override_of_nested_aliases_is_refused_too(write):
    wide = (
        "[&a [1,1,1,1,1,1,1,1,1,1]"
        + "".join(f",&{n} [{','.join(['*' + b] * 10)}]" for b, n in itertools.pairwise("abcdefgh"))
        + "]"
    )
    with pytest.raises(ConfigError, match="it stands for"):
        load_config(write(TEXT), [f"data.train={wide}"])


def test_a_pipe_and_a_file_without_end_are_refused_as_configurations(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "cannot be read: it is not a plain file" in message_of(tmp_path / "pipe.yaml")
    with open(tmp_path / "large.yaml", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert "more than the" in message_of(tmp_path / "large.yaml")


def test_paths_that_cannot_be_read_are_refused(tmp_path):
    assert "does not exist" in message_of(tmp_path / "none.yaml")
    assert "cannot be read" in message_of(tmp_path)
    assert "cannot be read" in message_of("a\0b")


@pytest.mark.parametrize(
    ("word", "offered"),
    [
        ("model.num_layers=8.0", "Write 8."),
        ("model.num_layers=0.0", None),  # 0 is refused next
        ("model.num_layers=-8.0", None),
        ("model.num_layers='8'", "Remove the quotes."),
        ("model.num_layers='-8'", None),
        ("optimizer.base_lr='1e-3'", "Remove the quotes."),
        ("optimizer.base_lr='-1e-3'", None),
        ("optimizer.base_lr='nan'", None),
        ("training.output_dir=5", "Put it in quotes."),
        ("data.split=969", None),  # it wants three parts
        (
            "model.hiden_size=5",
            "Did you mean hidden_size? hidden_size is set as well: keep one of the two.",
        ),
        ("model.drpout=0.5", "Did you mean dropout?"),
    ],
)
def test_a_remedy_is_offered_only_where_the_setting_takes_it(word, offered):
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(
            yaml.safe_load(TEXT.replace("completep:\n", "").replace("1e-3", "0.001")), [word]
        )
    message = str(caught.value)
    remedies = ("Write ", "Remove the quotes", "Put it in quotes", "Did you mean")
    assert (offered in message) if offered else not any(remedy in message for remedy in remedies)


FIELD_MISTAKES = [
    ("model.hiden_size=3", "model.hiden_size: unknown key. Did you mean hidden_size?"),
    ("train_steps=3", "train_steps: unknown key. Did you mean training or training.train_steps?"),
    (
        "completep.hidden_size=3",
        "completep.hidden_size: unknown key. Did you mean base_hidden_size or model.hidden_size?",
    ),
    ("zzz=1", "zzz: unknown key. Known here: model, completep,"),
    (
        "completep.factors.hiden_weight.lr=2",
        "completep.factors.hiden_weight: unknown key. Did you mean hidden_weight?",
    ),
    ("data.train.0.wait=2", "data.train.0.wait: unknown key. Did you mean weight?"),
    (
        "data.train=[{weight: 1}]",
        (
            "data.train.0.prefix is missing (Path of PREFIX.bin and PREFIX.idx, without the "
            "suffix). Add it."
        ),
    ),
    ("model.hidden_size=0", "model.hidden_size = 0: must be greater than 0."),
    ("model.hidden_size=-1", "model.hidden_size = -1: must be greater than 0."),
    ("model.hidden_size=2.5", "model.hidden_size = 2.5: must be a whole number."),
    (
        "training.train_steps=1e3",
        "training.train_steps = 1000.0: must be a whole number. Write 1000.",
    ),
    (
        "training.train_steps='12'",
        "training.train_steps = '12': must be a whole number. Remove the quotes.",
    ),
    ("training.train_steps=true", "training.train_steps = true: must be a whole number."),
    ("training.train_steps=", "training.train_steps = null: must be a whole number."),
    (
        "optimizer.base_lr='1e-3'",
        "optimizer.base_lr = '1e-3': must be a number. Remove the quotes.",
    ),
    ("optimizer.base_lr=.nan", "optimizer.base_lr = nan: must be a finite number."),
    ("optimizer.base_lr=1e999", "optimizer.base_lr = inf: must be a finite number."),
    ("optimizer.base_lr=fast", "optimizer.base_lr = 'fast': must be a number."),
    ("optimizer.warmup_fraction=1.5", "optimizer.warmup_fraction = 1.5: must be at most 1."),
    ("completep.alpha=0.4", "completep.alpha = 0.4: must be at least 0.5."),
    ("model.dropout=1", "model.dropout = 1: must be less than 1."),
    ("model.bias=1", "model.bias = 1: must be true or false."),
    ("model.norm=rms", "model.norm = 'rms': must be layernorm or rmsnorm."),
    ("training.precision=float16", "must be float32, bf16, float64 or auto."),
    ("parallel.context_parallel_size=0", "context_parallel_size = 0: must be greater than 0."),
    ("training.output_dir=2026", "training.output_dir = 2026: must be text. Put it in quotes."),
    (
        "logging=5",
        "logging = 5: must be a section of keys. Its keys: interval, tensorboard, trackers,",
    ),
    ("data.train=5", "data.train = 5: must be a list."),
    ("data.train=[]", "data.train = []: must have at least 1 element."),
    ("optimizer.betas=[0.9]", "optimizer.betas.1 is missing. Add it."),
    (
        "optimizer.betas=[0.9, 0.9, 0.9]",
        "optimizer.betas = [0.9, 0.9, 0.9]: must have at most 2 elements.",
    ),
    ("optimizer.betas=0.9", "optimizer.betas = 0.9: must be a list."),
    (
        "data.train.2.weight=3",
        "data.train has 2 elements, counted from 0. Give the whole list to add one.",
    ),
    ("data.train.x.weight=3", "data.train has 2 elements, counted from 0."),
    (
        "model.hidden_size.x=3",
        "model.hidden_size = 256 has no keys below it. Override model.hidden_size itself.",
    ),
    ("optimizer.overrides.0.lr=3", "optimizer.overrides is not in the file. Give the whole list"),
    ("model.hidden_size", "model.hidden_size: not an override. Write section.key=value"),
    ("--model.hidden_size=3", "--model.hidden_size=3: not an override."),
    ("model..x=3", "model..x=3: not an override."),
    ("data.tokenizer={type: bytes, type: bytes}", "type stands twice"),
    ("data.seed=!!python/name:os.system", "remove the tag"),
]


@pytest.mark.parametrize(
    ("override", "expected"), FIELD_MISTAKES, ids=[override for override, _ in FIELD_MISTAKES]
)
def test_a_wrong_value_is_refused_with_path_value_rule_and_remedy(write, override, expected):
    assert expected in message_of(write(), [override])


SETTINGS = [
    f"{name}.{key}"
    for name, field in Config.model_fields.items()
    for key in field.annotation.model_fields
]
STRANGE = [
    "null",
    "[]",
    "[1]",
    "[[[1]]]",
    "{}",
    "{a: {b: 1}}",
    "{1: 2}",
    "''",
    "x",
    "-1",
    "0",
    "0.5",
    "true",
    "1e999",
    "-.inf",
    ".nan",
    "9" * 99,
]


@pytest.mark.parametrize("setting", [*Config.model_fields, *SETTINGS])
def test_no_strange_value_is_answered_by_anything_but_a_message(write, setting):
    path = write()
    for value in STRANGE:
        try:
            config = load_config(path, [f"{setting}={value}"])
        except ConfigError as error:
            assert setting.split(".")[-1] in str(error)
        else:
            assert isinstance(config, Config)


def test_all_field_problems_are_reported_together_with_their_lines(write):
    text = (
        TEXT.replace("num_layers: 8", "num_layers: -8")
        .replace("  base_lr: 1e-3\n", "")
        .replace("seq_length", "seq_len")
    )
    message = message_of(write(text), ["data.seed=x"])
    assert message.splitlines()[0].endswith("run.yaml: 5 problems")
    assert "model.num_layers = -8: must be greater than 0. (line 3)" in message
    assert "model.seq_length is missing (Tokens a sample" in message
    assert "model.seq_len: unknown key. Did you mean seq_length? (line 7)" in message
    assert (
        "optimizer.base_lr is missing (eta: peak learning rate at the proxy). Add it. (line 9)"
        in message
    )
    assert "data.seed = 'x': must be a whole number. (command line)" in message


def test_a_key_that_is_a_number_is_an_unknown_key(write):
    message = message_of(write(TEXT + "1: 2\n"))
    assert "1" in message and "Traceback" not in message


def test_overrides_reach_sections_defaults_and_list_elements(write):
    overrides = [
        "data.train.0.weight=3",
        "logging.interval=7",
        "completep.factors.embedding.lr=2",
        "optimizer.betas.1=0.99",
        "data.split='8,1,1'",
    ]
    config = load_config(write(), overrides)
    assert [source.weight for source in config.data.train] == [3, 2]
    assert config.logging.interval == 7
    assert config.completep.factors["embedding"].lr == 2
    assert config.optimizer.betas == (0.9, 0.99)
    assert config.data.split == "8,1,1"


def test_a_later_override_wins(write):
    assert load_config(write(), ["data.seed=1", "data.seed=2"]).data.seed == 2


def test_a_value_may_hold_equal_signs(write):
    assert (
        load_config(write(), ["training.output_dir=runs/lr=3"]).training.output_dir == "runs/lr=3"
    )


def test_a_section_without_keys_means_its_defaults(write):
    assert load_config(write()).completep == Config.model_fields["completep"].get_default(
        call_default_factory=True
    )


def test_a_configuration_is_frozen(write):
    with pytest.raises(ValidationError, match="frozen"):
        load_config(write()).training.seed = 3  # type: ignore[misc]


def test_a_mapping_is_checked_like_a_file_and_left_alone(write):
    values = load_config(write()).model_dump(mode="json")
    assert config_from_mapping(values, ["training.seed=5"]).training.seed == 5
    assert values["training"]["seed"] == 1234
    with pytest.raises(ConfigError, match=r"manifest: 1 problem\n  x: unknown key"):
        config_from_mapping({**values, "x": 1}, name="manifest")


FINITE = st.floats(min_value=1e-300, max_value=1e300)
TEXTS = st.text(st.characters(codec="utf-8"), min_size=0, max_size=30)


@given(lr=FINITE, eps=FINITE, seed=st.integers(0, 2**63), text=TEXTS, prefix=TEXTS)
def test_any_numbers_and_texts_come_back_bit_equal(tmp_path_factory, lr, eps, seed, text, prefix):
    folder = tmp_path_factory.mktemp("roundtrip")
    (folder / "run.yaml").write_text(TEXT)
    base = load_config(folder / "run.yaml").model_dump(mode="json")
    base["optimizer"] |= {"base_lr": lr, "base_eps": eps}
    base["training"] |= {"seed": seed, "output_dir": text}
    base["data"]["train"][0]["prefix"] = prefix
    config = config_from_mapping(base)
    save_config(config, folder / "config.yaml")
    assert load_config(folder / "config.yaml") == config
    assert config.optimizer.base_lr.hex() == lr.hex()


@pytest.mark.parametrize(
    "text",
    [
        "1e5",
        "1:30",
        "null",
        "yes",
        "0x1",
        "~",
        "",
        "<<",
        "=",
        "2026-01-01",
        "- a",
        "a: b",
        "# a",
        "!x",
        "&a",
        "*a",
    ],
)
def test_texts_that_look_like_something_else_come_back_as_texts(write, text, tmp_path):
    config = config_from_mapping(
        load_config(write()).model_dump(mode="json") | {"logging": {"project": text}}
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").logging.project == text


@given(number=st.one_of(st.floats(allow_nan=False), st.integers(-(2**70), 2**70)))
def test_every_number_that_python_prints_reads_back_equal(number):
    text = repr(number).replace("inf", ".inf")
    assert parse_yaml(f"x: {text}", "text")[0] == {"x": number}


@given(st.text(max_size=60))
def test_no_text_makes_reading_fail_other_than_with_one_message(text):
    try:
        parse_yaml(text, "name")
    except ConfigError as error:
        assert str(error).startswith("name, line ")


def test_saving_replaces_the_file_whole_and_leaves_nothing_else(write, tmp_path):
    config = load_config(write())
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("old")
    save_config(config, folder / "config.yaml")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert load_config(folder / "config.yaml") == config


def test_an_unwritable_place_is_named(write, tmp_path):
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        save_config(load_config(write()), tmp_path / "none/config.yaml")


def test_a_mistake_exits_2_without_a_traceback(write, capsys):
    path = write("model:\n\t")
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(lambda: load_config(path) and None)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


def test_a_mistake_exits_2_in_a_process_of_its_own(write):
    program = (
        "import sys\n"
        "from megatron_completep.config import load_config\n"
        "from megatron_completep.errors import exit_on_user_error\n"
        "exit_on_user_error(lambda: print(load_config(sys.argv[1], sys.argv[2:])))"
    )
    run = [sys.executable, "-c", program, str(write())]
    good = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    bad = subprocess.run(
        [*run, "model.hidden_size=0"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert "must be greater than 0" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_the_saved_configuration_of_an_earlier_run_still_loads(write):
    former = load_config(write()).model_dump(mode="json")
    former["logging"]["wandb_project"] = None
    assert config_from_mapping(former) == load_config(write())
    former["logging"]["wandb_project"] = "mine"  # what it meant cannot be kept, so it is said
    with pytest.raises(ConfigError, match="wandb_project: unknown key"):
        config_from_mapping(former)
