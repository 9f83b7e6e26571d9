"""The parser that all programs share;
tests/tools/test_every_tool.py sends every program through it.
"""

import pytest

from megatron_completep.command_line import Parser, list_of, real, whole


def two_commands() -> Parser:
    parser = Parser("Do things.\n\nExample:\n\n    python do.py first x.yaml")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    first = commands.add_parser("first")
    first.add_argument("config", metavar="CONFIG")
    first.add_overrides()
    first.add_argument("--lr")
    first.add_argument("--title", default="")
    first.add_argument("--steps", type=whole(1, 9), default=1)
    first.add_argument("--sizes", type=list_of(real(above=0)), default=[])
    first.add_argument("--names", nargs="+", default=[])
    second = commands.add_parser("second")
    second.add_argument("words", nargs="*")
    return parser


@pytest.mark.parametrize(
    "words",
    [
        "x.yaml a.b=1 c.0.d=[2] --lr 3",
        "a.b=1 x.yaml --lr 3 c.0.d=[2]",
        "--lr 3 a.b=1 --steps 1 x.yaml c.0.d=[2]",
        "x.yaml --lr=3 a.b=1 --title= c.0.d=[2]",
        "x.yaml --lr 3 a.b=1 -- c.0.d=[2]",
    ],
)
def test_overrides_of_a_command_keep_their_order_wherever_they_stand(words: str) -> None:
    values = two_commands().parse_args(["first", *words.split()])
    assert (values.config, values.overrides, values.lr) == ("x.yaml", ["a.b=1", "c.0.d=[2]"], "3")


def test_the_value_of_an_option_is_no_override_and_a_path_is_none() -> None:
    values = two_commands().parse_args(
        ["first", "./a.b=c/x.yaml", "--title", "lr=1", "--lr", "a.b=2"]
    )
    assert (values.config, values.title, values.lr, values.overrides) == (
        "./a.b=c/x.yaml",
        "lr=1",
        "a.b=2",
        [],
    )


def test_a_command_without_overrides_takes_such_words_as_they_are() -> None:
    assert two_commands().parse_args(["second", "a.b=1", "-"]).words == ["a.b=1", "-"]


@pytest.mark.parametrize("value", ["-10:-5:2", "-8", "-.5,-1", "-1e-3"])
def test_a_value_may_begin_with_a_minus(value: str) -> None:
    assert two_commands().parse_args(["first", "x.yaml", "--lr", value]).lr == value
    assert two_commands().parse_args(["first", "x.yaml", f"--lr={value}"]).lr == value


def test_an_option_is_not_taken_for_the_value_of_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        two_commands().parse_args(["first", "x.yaml", "--lr", "--title", "a"])
    assert "--lr: expected one argument" in capsys.readouterr().err


def test_all_problems_of_a_command_line_are_said_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        two_commands().parse_args(
            ["first", "--steps", "10", "--sizes", "1,0,x", "--titel", "--step", "a.b"]
        )
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: 4 problems in this command line"
    assert lines[1:-1] == [
        "  --titel: no such option. Did you mean --title?",
        "  --step: no such option. Did you mean --steps?",
        "  --steps = 10: give a whole number from 1 to 9.",
        "  --sizes = 1,0,x: 0, x: give a finite number above 0.",
    ]
    assert lines[-1].endswith("first --help shows every option and an example.")


def test_an_abbreviation_is_an_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        two_commands().parse_args(["first", "x.yaml", "--tit", "a"])
    assert "--tit: no such option. Did you mean --title?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "missing: COMMAND"), (["thrid"], "not known. Use one of: first, second.")],
)
def test_a_command_that_is_missing_or_unknown_is_answered_with_the_commands(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        two_commands().parse_args(words)
    assert message in capsys.readouterr().err


def test_two_readings_with_one_parser_share_nothing() -> None:
    parser = two_commands()
    assert parser.parse_args(["first", "x.yaml", "a.b=1"]).overrides == ["a.b=1"]
    assert parser.parse_args(["first", "x.yaml"]).overrides == []
