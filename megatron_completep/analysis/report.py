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
        head = "".join(f"<th>{html.escape(header)}</th>" for header in self.headers)
        rows = "\n".join("<tr>" + "".join(map(_html_cell, row)) + "</tr>" for row in self.rows)
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'

    def as_markdown(self) -> str:
        right = [all(is_number(row[column]) for row in self.rows) for column in range(len(self.headers))]
        lines = [list(self.headers), ["---:" if column else "---" for column in right]]
        lines += [[show(cell) for cell in row] for row in self.rows]
        table = "\n".join("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)
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


@dataclass
class Section:
    """A heading and what stands under it, in the order in which it was added."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def text(self, text: str) -> None:
        self.blocks.append(Text(text))

    def code(self, text: str) -> None:
        self.blocks.append(Code(text))

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> None:
        self.blocks.append(Table(headers, rows, caption))

    def picture(self, name: str, figure: Any, caption: str = "") -> None:
        """`figure`: a matplotlib Figure, or the bytes of a PNG."""
        self.blocks.append(Picture(name, figure if isinstance(figure, bytes) else png_of(figure), caption))


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
            parts = [f'<h2 id="s{number}">{html.escape(section.title)}</h2>', *(block.as_html() for block in section.blocks)]
            body.append("<section>" + "\n".join(parts) + "</section>")
        navigation = f"<nav>{' '.join(links)}</nav>" if len(links) > 1 else ""
        summary = Text(self.summary).as_html() if self.summary else ""
        return _PAGE.format(title=title, style=_STYLE, summary=summary, navigation=navigation, body="\n".join(body))

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
        for picture in (block for section in self.sections for block in section.blocks if isinstance(block, Picture)):
            write_whole(Path(path).with_name(f"{picture.name}.png"), picture.png)
        write_whole(Path(path), self.as_markdown().encode())


def png_of(figure: Any, dots_per_inch: int = 120) -> bytes:
    """The PNG of a matplotlib Figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch)
    return buffer.getvalue()


def new_figure(width: float = 8.0, height: float = 5.0) -> Any:
    """An empty matplotlib Figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_whole(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


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
    opening = '<td class="n">' if is_number(value) else "<td>"
    return f"{opening}{html.escape(show(value))}</td>"


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
nav a { margin-right: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.93rem; }
caption { caption-side: bottom; text-align: left; padding-top: 0.4rem; opacity: 0.75; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid #8884; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #8882; padding: 0.8rem; overflow-x: auto; white-space: pre-wrap; }
figure { margin: 1rem 0; } img { max-width: 100%; background: #fff; } figcaption { opacity: 0.75; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>{style}</style></head>
<body>
<h1>{title}</h1>
{summary}
{navigation}
{body}
</body>
</html>
"""
