"""The project's reports: sections of text, tables and pictures.

A report is written as one self-contained HTML file or as Markdown:

report = Report("Learning-rate transfer")
section = report.section("Optima", "One row a depth.")
section.table(["depth", "best lr"], [[2, "2^-7"], [8, "2^-7"]])
section.picture("optima", figure, "Loss over the learning rate.")
report.write_html("report.html")
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_completep.files import write_whole
from megatron_completep.outputs import MARK

PALETTE = (  # of lines, in this order
    "#3b6fb6",
    "#d1495b",
    "#2e9c82",
    "#e0a030",
    "#7b5ea7",
    "#8a6d4f",
    "#4aa3c7",
    "#c774a8",
)
INK = "#3d4450"
FAINT = "#c9ced6"
MAX_PICTURES = 8  # of a choice by label; the style sheet has a rule for each place


class Block(Protocol):
    """A text, table or picture of a section."""

    def as_html(self) -> str: ...
    def as_markdown(self) -> str: ...


@dataclass(frozen=True)
class Text:
    """Paragraphs, separated by empty lines."""

    text: str

    def as_html(self) -> str:
        paragraphs = self.text.split("\n\n")
        return "\n".join(f"<p>{html.escape(paragraph.strip())}</p>" for paragraph in paragraphs)

    def as_markdown(self) -> str:
        return self.text


@dataclass(frozen=True)
class Code:
    """Text as it stands: output, a sample, a command."""

    text: str

    def as_html(self) -> str:
        return f"<pre>{html.escape(self.text)}</pre>"

    def as_markdown(self) -> str:
        # A fence ends at the first one of its length, so it must be longer than any in the text.
        fence = "```"
        while fence in self.text:
            fence += "`"
        return f"{fence}\n{self.text}\n{fence}"


@dataclass(frozen=True)
class Table:
    """Rows under headers.

    Numbers stand at the right, and floats are shown with 4 significant digits (format others
    beforehand).
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.headers)]
        assert not wrong, f"{len(self.headers)} headers, but a row of {len(wrong[0])}: {wrong[0]}"

    def as_html(self) -> str:
        headers = []
        for column, header in enumerate(self.headers):
            # A table without rows has no numbers: its headers stand at the left.
            right = bool(self.rows) and self._is_numeric(column)
            headers.append(f"<th{' class=n' if right else ''}>{html.escape(header)}</th>")
        rows = []
        for row in self.rows:
            rows.append(f"<tr>{''.join(map(_html_cell, row))}</tr>")
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        head = f"<thead><tr>{''.join(headers)}</tr></thead>"
        body = "<tbody>\n" + "\n".join(rows) + "\n</tbody>"
        return f'<div class="wide"><table>{caption}{head}{body}</table></div>'

    def as_markdown(self) -> str:
        columns = range(len(self.headers))
        rules = ["---:" if self._is_numeric(column) else "---" for column in columns]
        lines = [_markdown_row(self.headers), _markdown_row(rules)]
        for row in self.rows:
            lines.append(_markdown_row([show(cell) for cell in row]))
        table = "\n".join(lines)
        return f"{table}\n\n{self.caption}" if self.caption else table

    def _is_numeric(self, column: int) -> bool:
        return all(is_number(row[column]) for row in self.rows)


def _markdown_row(cells: Sequence[str]) -> str:
    # A bar or a line end inside a cell would end the cell.
    escaped = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(escaped)} |"


@dataclass(frozen=True)
class Picture:
    """A PNG, which HTML contains and to which Markdown points as NAME.png beside it."""

    name: str
    png: bytes
    caption: str = ""

    def as_html(self) -> str:
        data = base64.b64encode(self.png).decode()
        caption = html.escape(self.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"

    def as_markdown(self) -> str:
        return f"![{self.caption}]({self.name}.png)"


@dataclass(frozen=True)
class Pictures:
    """Several pictures: side by side where there is room, or, with `labels`, one at a time.

    The reader chooses a picture by its label.
    """

    pictures: Sequence[Picture]
    labels: Sequence[str] = ()

    def as_html(self) -> str:
        figures = "\n".join(picture.as_html() for picture in self.pictures)
        if not self.labels:
            return f'<div class="grid">{figures}</div>'

        # Radio buttons and sibling selectors choose the picture, so the page needs no script.
        name = html.escape(self.pictures[0].name)
        buttons = []
        for number, label in enumerate(self.labels):
            checked = " checked" if number == 0 else ""
            buttons.append(f'<input type="radio" name="{name}" id="{name}-{number}"{checked}>')
            buttons.append(f'<label for="{name}-{number}">{html.escape(label)}</label>')
        return f'<div class="choice">{"".join(buttons)}<div class="panes">{figures}</div></div>'

    def as_markdown(self) -> str:
        return "\n\n".join(picture.as_markdown() for picture in self.pictures)


@dataclass
class Section:
    """A heading and what stands under it, in the order in which it was added."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def text(self, text: str) -> None:
        self.blocks.append(Text(text))

    def code(self, text: str) -> None:
        self.blocks.append(Code(text))

    def table(
        self, headers: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = ""
    ) -> None:
        self.blocks.append(Table(headers, rows, caption))

    def picture(self, name: str, figure: Any, caption: str = "") -> None:
        """`figure`: a matplotlib Figure, or the bytes of a PNG."""
        png = figure if isinstance(figure, bytes) else png_of(figure)
        self.blocks.append(Picture(name, png, caption))

    def pictures(self, pictures: Sequence[Picture], labels: Sequence[str] = ()) -> None:
        """At most 8 pictures; with `labels` (one each) the reader chooses which is seen."""
        assert pictures and len(labels) in (0, len(pictures)) and len(pictures) <= MAX_PICTURES
        self.blocks.append(Pictures(pictures, labels))


class Report:
    """A title and sections."""

    def __init__(self, title: str, summary: str = ""):
        self.title = title
        self.summary = summary
        self.sections: list[Section] = []

    def section(self, title: str, text: str = "") -> Section:
        """A new section at the end; `text` is its first paragraph."""
        section = Section(title)
        self.sections.append(section)
        if text:
            section.text(text)
        return section

    def as_html(self) -> str:
        """One document that needs no other file and no network."""
        title = html.escape(self.title)
        links = []
        sections = []
        for number, section in enumerate(self.sections):
            heading = html.escape(section.title)
            links.append(f'<a href="#s{number}">{heading}</a>')
            blocks = [block.as_html() for block in section.blocks]
            content = "\n".join([f"<h2>{heading}</h2>", *blocks])
            sections.append(f'<section id="s{number}">{content}</section>')
        navigation = f"<nav>{' '.join(links)}</nav>" if len(links) > 1 else ""
        summary = Text(self.summary).as_html() if self.summary else ""
        return _PAGE.format(
            mark=MARK,
            title=title,
            style=_STYLE,
            summary=summary,
            navigation=navigation,
            body="\n".join(sections),
        )

    def as_markdown(self) -> str:
        """Markdown that points to its pictures as NAME.png."""
        # Markdown joins lines, unless each but the last ends with two spaces.
        paragraphs = [f"# {self.title}", self.summary.replace("\n", "  \n")]
        for section in self.sections:
            paragraphs.append(f"## {section.title}")
            paragraphs += [block.as_markdown() for block in section.blocks]
        return "\n\n".join(filter(None, paragraphs)) + "\n"

    def write_html(self, path: str | os.PathLike[str]) -> None:
        """Write `as_html`. Raises OSError."""
        write_whole(Path(path), self.as_html().encode())

    def write_markdown(self, path: str | os.PathLike[str]) -> None:
        """Write `as_markdown`, and the pictures beside it. Raises OSError."""
        # The text comes last: where it is, the pictures that it points to are as well.
        for section in self.sections:
            for block in section.blocks:
                for picture in _pictures_of(block):
                    target = Path(path).with_name(f"{picture.name}.png")
                    write_whole(target, picture.png)
        write_whole(Path(path), self.as_markdown().encode())


def _pictures_of(block: Block) -> Sequence[Picture]:
    if isinstance(block, Pictures):
        return block.pictures
    return [block] if isinstance(block, Picture) else []


def png_of(figure: Any, dots_per_inch: int = 150) -> bytes:
    """The PNG of a matplotlib Figure, with the look that all pictures of the project share."""
    for axes in figure.axes:
        _tidy(axes)
    buffer = io.BytesIO()
    # The mark lets a later run of the same program replace the picture unasked (outputs.py).
    figure.savefig(buffer, format="png", dpi=dots_per_inch, metadata={"Software": MARK})
    return buffer.getvalue()


def _tidy(axes: Any) -> None:
    """Take away what draws the eye from the data: no box, faint axes, small grey ticks."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom") and spine.get_visible())
        spine.set_color(FAINT)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0, which="both")
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(INK)
    legend = axes.get_legend()
    if legend is not None:
        legend.get_frame().set(edgecolor="none", alpha=0.85)


def new_figure(width: float = 8.0, height: float = 5.0) -> Any:
    """An empty matplotlib Figure that needs no display."""
    # Imported late: most programs draw nothing, and matplotlib takes a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def is_number(value: Any) -> bool:
    """Whether a cell is a number, for which True and False do not count."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def show(value: Any) -> str:
    """A cell as text: 4 significant digits, thousands separated, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if is_number(value) else str(value)


def _html_cell(value: Any) -> str:
    cell = show(value)
    css_class = ""
    if is_number(value):
        css_class = ' class="n"'
    elif len(cell) < 28:  # short enough to stay on one line beside others
        css_class = ' class="short"'
    return f"<td{css_class}>{html.escape(cell)}</td>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --soft: #667085; --line: #e4e7ec;
  --back: #f6f7f9; --card: #ffffff; --accent: #3b6fb6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --soft: #98a2b3; --line: #2c313b;
    --back: #14171c; --card: #1b1f26; --accent: #8ab4f0; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { font: 15px/1.6 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  color: var(--ink); background: var(--back); max-width: 72rem; margin: 0 auto;
  padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 0.5rem; }
h2 { font-size: 1.2rem; letter-spacing: -0.005em; margin: 0 0 0.8rem; }
p { max-width: 46rem; white-space: pre-line; } header p { color: var(--soft); margin-top: 0; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
nav { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem;
  padding: 0.7rem 0; margin: 0.6rem 0 1rem; background: var(--back);
  border-bottom: 1px solid var(--line); font-size: 0.9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.3rem 1.5rem; margin: 1.1rem 0; scroll-margin-top: 3.5rem; }
section > :last-child { margin-bottom: 0; }
.wide { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; }
caption { caption-side: bottom; text-align: left; padding-top: 0.6rem; color: var(--soft); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
th, td { padding: 0.36rem 1.1rem 0.36rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; }
tbody tr:last-child td { border-bottom: none; }
th.n, td.n { text-align: right; font-variant-numeric: tabular-nums; }
td.short { white-space: nowrap; }
pre { background: var(--back); border: 1px solid var(--line); border-radius: 8px;
  padding: 0.9rem 1rem; overflow-x: auto; white-space: pre-wrap;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
figure { margin: 0.6rem 0; min-width: 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff;
  border-radius: 8px; }
figcaption { color: var(--soft); font-size: 0.88rem; margin-top: 0.4rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: 0.8rem 1.4rem; }
.choice > input { position: absolute; opacity: 0; pointer-events: none; }
.choice > label { display: inline-block; padding: 0.25rem 0.9rem; margin: 0 0.35rem 0.5rem 0;
  border: 1px solid var(--line); border-radius: 999px; font-size: 0.88rem; color: var(--soft);
  cursor: pointer; }
.choice > input:checked + label { color: var(--card); background: var(--accent);
  border-color: var(--accent); }
.choice > input:focus-visible + label { outline: 2px solid var(--accent); outline-offset: 2px; }
.panes > * { display: none; }
""" + "".join(
    f".choice > input:nth-of-type({n}):checked ~ .panes > :nth-child({n}) {{ display: block; }}\n"
    for n in range(1, MAX_PICTURES + 1)
)

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<meta name="generator" content="{mark}">
<link rel="icon" href="data:,">
<style>{style}</style></head>
<body>
<header><h1>{title}</h1>
{summary}</header>
{navigation}
{body}
</body>
</html>
"""
