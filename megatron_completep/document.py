"""The project's report: sections of text, tables and pictures, written as one self-contained HTML file or as Markdown.

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


class Block(Protocol):
    """A part of a section."""

    def as_html(self) -> str: ...
    def as_markdown(self) -> str: ...


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by empty lines."""

    text: str

    def as_html(self) -> str:
        return "\n".join(f"<p>{html.escape(part.strip())}</p>" for part in self.text.split("\n\n"))

    def as_markdown(self) -> str:
        return self.text


@dataclass(frozen=True)
class Code:
    """Text as it stands: output, a sample, a command."""

    text: str

    def as_html(self) -> str:
        return f"<pre>{html.escape(self.text)}</pre>"

    def as_markdown(self) -> str:
        fence = "```"
        while fence in self.text:
            fence += "`"
        return f"{fence}\n{self.text}\n{fence}"


@dataclass(frozen=True)
class Table:
    """Rows under headers; numbers stand right, and floats are shown with 4 significant digits (format others beforehand)."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.headers)]
        assert not wrong, f"{len(self.headers)} headers, but a row of {len(wrong[0])}: {wrong[0]}"

    def as_html(self) -> str:
        right = [
            bool(self.rows) and all(is_number(row[column]) for row in self.rows)
            for column in range(len(self.headers))
        ]
        head = "".join(
            f"<th{' class=n' * n}>{html.escape(header)}</th>"
            for header, n in zip(self.headers, right, strict=True)
        )
        rows = "\n".join("<tr>" + "".join(map(_html_cell, row)) + "</tr>" for row in self.rows)
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'

    def as_markdown(self) -> str:
        right = [
            all(is_number(row[column]) for row in self.rows) for column in range(len(self.headers))
        ]
        lines = [list(self.headers), ["---:" if column else "---" for column in right]]
        lines += [[show(cell) for cell in row] for row in self.rows]
        table = "\n".join(
            "| "
            + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line)
            + " |"
            for line in lines
        )
        return f"{table}\n\n{self.caption}" if self.caption else table


@dataclass(frozen=True)
class Picture:
    """A PNG; HTML holds it, Markdown points to NAME.png beside it."""

    name: str
    png: bytes
    caption: str = ""

    def as_html(self) -> str:
        data = base64.b64encode(self.png).decode()
        caption = html.escape(self.caption)
        return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'

    def as_markdown(self) -> str:
        return f"![{self.caption}]({self.name}.png)"


@dataclass(frozen=True)
class Pictures:
    """Several pictures: side by side where there is room, or, with `labels`, one at a time, chosen by its label."""

    pictures: Sequence[Picture]
    labels: Sequence[str] = ()

    def as_html(self) -> str:
        figures = "\n".join(picture.as_html() for picture in self.pictures)
        if not self.labels:
            return f'<div class="grid">{figures}</div>'
        name, buttons = html.escape(self.pictures[0].name), []
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
        self.blocks.append(
            Picture(name, figure if isinstance(figure, bytes) else png_of(figure), caption)
        )

    def pictures(self, pictures: Sequence[Picture], labels: Sequence[str] = ()) -> None:
        """At most 8; with `labels` (one each) the reader chooses which is seen."""
        assert pictures and len(labels) in (0, len(pictures)) and len(pictures) <= 8
        self.blocks.append(Pictures(pictures, labels))


class Report:
    """A title and sections."""

    def __init__(self, title: str, summary: str = ""):
        self.title, self.summary = title, summary
        self.sections: list[Section] = []

    def section(self, title: str, text: str = "") -> Section:
        """A new section at the end; `text` is its first paragraph."""
        self.sections.append(Section(title))
        if text:
            self.sections[-1].text(text)
        return self.sections[-1]

    def as_html(self) -> str:
        """One document that needs no other file and no network."""
        title, links, body = html.escape(self.title), [], []
        for number, section in enumerate(self.sections):
            links.append(f'<a href="#s{number}">{html.escape(section.title)}</a>')
            parts = [
                f"<h2>{html.escape(section.title)}</h2>",
                *(block.as_html() for block in section.blocks),
            ]
            body.append(f'<section id="s{number}">' + "\n".join(parts) + "</section>")
        navigation = f"<nav>{' '.join(links)}</nav>" if len(links) > 1 else ""
        summary = Text(self.summary).as_html() if self.summary else ""
        return _PAGE.format(
            mark=MARK,
            title=title,
            style=_STYLE,
            summary=summary,
            navigation=navigation,
            body="\n".join(body),
        )

    def as_markdown(self) -> str:
        """Markdown that points to its pictures as NAME.png."""
        parts = [f"# {self.title}", self.summary]
        for section in self.sections:
            parts += [f"## {section.title}", *(block.as_markdown() for block in section.blocks)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def write_html(self, path: str | os.PathLike[str]) -> None:
        write_whole(Path(path), self.as_html().encode())

    def write_markdown(self, path: str | os.PathLike[str]) -> None:
        """The pictures go beside it."""
        for block in (block for section in self.sections for block in section.blocks):
            for picture in block.pictures if isinstance(block, Pictures) else [block]:
                if isinstance(picture, Picture):
                    write_whole(Path(path).with_name(f"{picture.name}.png"), picture.png)
        write_whole(Path(path), self.as_markdown().encode())


PALETTE = (
    "#3b6fb6",
    "#d1495b",
    "#2e9c82",
    "#e0a030",
    "#7b5ea7",
    "#8a6d4f",
    "#4aa3c7",
    "#c774a8",
)  # of lines, in order
INK, FAINT = "#3d4450", "#c9ced6"


def png_of(figure: Any, dots_per_inch: int = 150) -> bytes:
    """The PNG of a matplotlib Figure, with the look that all pictures of the project share."""
    for axes in figure.axes:
        _tidy(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch, metadata={"Software": MARK})
    return buffer.getvalue()


def _tidy(axes: Any) -> None:
    """Nothing louder than the data: no box, a faint grid behind, small grey ticks."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom") and spine.get_visible())
        spine.set_color(FAINT)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0, which="both")
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(INK)
    legend = axes.get_legend()
    if legend is not None:
        legend.get_frame().set(edgecolor="none", alpha=0.85)


def new_figure(width: float = 8.0, height: float = 5.0) -> Any:
    """An empty matplotlib Figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def show(value: Any) -> str:
    """A cell as text: 4 significant digits, thousands parted, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if is_number(value) else str(value)


def _html_cell(value: Any) -> str:
    text = show(value)
    kind = ' class="n"' if is_number(value) else ' class="short"' if len(text) < 28 else ""
    return f"<td{kind}>{html.escape(text)}</td>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --soft: #667085; --line: #e4e7ec; --back: #f6f7f9; --card: #ffffff; --accent: #3b6fb6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --soft: #98a2b3; --line: #2c313b; --back: #14171c; --card: #1b1f26; --accent: #8ab4f0; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { font: 15px/1.6 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; color: var(--ink);
  background: var(--back); max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 0.5rem; }
h2 { font-size: 1.2rem; letter-spacing: -0.005em; margin: 0 0 0.8rem; }
p { max-width: 46rem; white-space: pre-line; } header p { color: var(--soft); margin-top: 0; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
nav { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; padding: 0.7rem 0; margin: 0.6rem 0 1rem;
  background: var(--back); border-bottom: 1px solid var(--line); font-size: 0.9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.3rem 1.5rem; margin: 1.1rem 0;
  scroll-margin-top: 3.5rem; }
section > :last-child { margin-bottom: 0; }
.wide { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; }
caption { caption-side: bottom; text-align: left; padding-top: 0.6rem; color: var(--soft); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
th, td { padding: 0.36rem 1.1rem 0.36rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
tbody tr:last-child td { border-bottom: none; }
th.n, td.n { text-align: right; font-variant-numeric: tabular-nums; }
td.short { white-space: nowrap; }
pre { background: var(--back); border: 1px solid var(--line); border-radius: 8px; padding: 0.9rem 1rem; overflow-x: auto;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; white-space: pre-wrap; }
figure { margin: 0.6rem 0; min-width: 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff; border-radius: 8px; }
figcaption { color: var(--soft); font-size: 0.88rem; margin-top: 0.4rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 0.8rem 1.4rem; }
.choice > input { position: absolute; opacity: 0; pointer-events: none; }
.choice > label { display: inline-block; padding: 0.25rem 0.9rem; margin: 0 0.35rem 0.5rem 0; border: 1px solid var(--line);
  border-radius: 999px; font-size: 0.88rem; color: var(--soft); cursor: pointer; }
.choice > input:checked + label { color: var(--card); background: var(--accent); border-color: var(--accent); }
.choice > input:focus-visible + label { outline: 2px solid var(--accent); outline-offset: 2px; }
.panes > * { display: none; }
""" + "".join(
    f".choice > input:nth-of-type({n}):checked ~ .panes > :nth-child({n}) {{ display: block; }}\n"
    for n in range(1, 9)
)

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
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
