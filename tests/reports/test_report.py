"""Reports: self-contained, escaped, and complete in both forms."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_completep.document import Report, new_figure, png_of, show
from megatron_completep.reports.run_report import loss_figure

HOSTILE = '<script>alert("x")</script> & | `code`'


def sample_report() -> Report:
    report = Report("Title & more", HOSTILE)
    section = report.section("First", "One.\n\nTwo.")
    section.table(
        ["name", "value"], [[HOSTILE, 1.23456789], ["b", 1234567], ["c", None]], "Caption."
    )
    section.picture(
        "curve",
        loss_figure(
            {"run": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "validation_loss": 1.5}]},
            3.0,
        ),
    )
    report.section("Second").code("```\nfenced\n``` <b>")
    return report


class Page(HTMLParser):
    """Collects tags, what they point to, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in ("meta", "img", "link", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_html_needs_no_other_file_and_runs_nothing() -> None:
    page = Page(sample_report().as_html())
    assert page.open == []  # every tag is closed
    assert "script" not in page.tags and HOSTILE in page.text
    assert [link.split(",")[0] for link in page.links] == [
        "data:",
        "#s0",
        "#s1",
        "data:image/png;base64",
    ]
    assert Page("<script></script>").tags == ["script"]  # an unescaped one would be seen


def test_a_picture_is_embedded_as_it_is_and_lies_beside_the_markdown(tmp_path: Path) -> None:
    figure = new_figure()
    figure.subplots().plot([1, 2, 3])
    report = Report("Pictures")
    report.section("One").picture("line", png_of(figure), "A line.")
    embedded = re.search(r"base64,([^\"]+)", report.as_html())
    assert embedded is not None and base64.b64decode(embedded[1]) == png_of(figure)
    report.write_markdown(tmp_path / "report.md")
    report.write_html(tmp_path / "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "line.png",
        "report.html",
        "report.md",
    ]
    assert (tmp_path / "line.png").read_bytes() == png_of(figure)
    assert "![A line.](line.png)" in (tmp_path / "report.md").read_text()


def test_markdown_tables_keep_their_columns_whatever_the_cells_hold() -> None:
    lines = [line for line in sample_report().as_markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 5
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {3}
    assert lines[2].endswith("| 1.235 |") and lines[3].endswith("| 1,234,567 |")


def test_a_fence_is_longer_than_any_inside() -> None:
    assert "````\n```\nfenced\n``` <b>\n````" in sample_report().as_markdown()


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(AssertionError, match="2 headers"):
        Report("x").section("y").table(["a", "b"], [[1, 2], [3]])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.000123456, "0.0001235"),
        (1e6, "1e+06"),
        (12345, "12,345"),
        (None, ""),
        (True, "True"),
        ("a", "a"),
    ],
)
def test_cells_are_shown_as_a_reader_wants_them(value: object, text: str) -> None:
    assert show(value) == text
