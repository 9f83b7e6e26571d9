"""The documentation site: built strictly, no dead link,
no complaint in a browser, everything from this machine.
"""

from __future__ import annotations

import functools
import html
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from megatron_completep.config.schema import Config
from megatron_completep.tools import checkpoint, show_plan
from tests.support.browser import Browser, chromium
from tests.support.commands import Programs

ROOT = Path(__file__).resolve().parents[2]
# The build alone takes half a minute. `make docs` makes it as well, and dead links end it.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    target = tmp_path_factory.mktemp("site")
    build = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(target),
    ]
    run = subprocess.run(
        build,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return target


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Page(HTMLParser):
    """What a page points to, and what can be pointed to in it."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.links += [values[name] for name in ("href", "src") if name in values]


def dead_links(site: Path) -> list[str]:
    """Every link inside the site that leads nowhere, as `page -> link`."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if (
                parts.scheme or parts.netloc or path.name == "404.html"
            ):  # served from anywhere, so its links are absolute
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            known = pages[target].anchors if target in pages else set()
            if not target.is_file() or (
                anchor and anchor not in known and not anchor.startswith("__")
            ):
                found.append(f"{path.relative_to(site)} -> {link}")
    return found


def test_no_link_of_the_site_is_dead(site: Path) -> None:
    assert len(list(site.rglob("*.html"))) > 25
    assert dead_links(site) == []


def test_a_dead_link_and_a_dead_anchor_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="b.html#no">x</a> <a href="c.html">x</a> <a href="b.html#yes">x</a> <img '
        'src="p.png">'
    )
    (tmp_path / "b.html").write_text('<h1 id="yes">b</h1>')
    assert dead_links(tmp_path) == ["a.html -> b.html#no", "a.html -> c.html", "a.html -> p.png"]


def test_every_setting_and_every_public_room_of_the_code_has_its_place(site: Path) -> None:
    configuration = (site / "configuration.html").read_text(encoding="utf-8")
    settings = [
        key
        for section in Config.model_fields.values()
        for key in getattr(section.annotation, "model_fields", {})
    ]
    assert len(settings) > 80
    assert [key for key in settings if f"<code>{key}</code>" not in configuration] == []
    assert "load_config" in (site / "api/config.html").read_text(encoding="utf-8")
    rooms = {
        path.stem
        for path in (ROOT / "megatron_completep").iterdir()
        if (path.suffix == ".py" or path.is_dir())
    }
    missing = {
        room
        for room in rooms - {"__init__", "__pycache__", "tools", "configs"}
        if not (site / f"api/{room}.html").exists()
    }
    assert missing == set()


def test_the_page_of_tools_has_every_option(site: Path, programs: Programs) -> None:
    """Beside what the programs print: each option in the usage of one stands in its section."""
    page = (site / "tools.html").read_text(encoding="utf-8")
    sections = dict(re.findall(r'<h2 id="(\w+)">(.*?)(?=<h2 |</article>)', page, re.DOTALL))
    assert set(sections) == {path.stem for path in (ROOT / "tools").glob("[a-z]*.py")}
    for main, tool, words in (
        (show_plan.main, "show_plan", []),
        (checkpoint.main, "checkpoint", ["prune"]),
        (checkpoint.main, "checkpoint", ["reshard"]),
    ):
        printed = programs.run(main, *words, "--help").out
        options = set(re.findall(r"^  (--[\w-]+)", printed, re.MULTILINE))
        assert len(options) > 1
        missing = {option for option in options if f"<code>{option}" not in sections[tool]}
        assert missing == set()


def test_the_api_has_the_fields_of_classes_with_what_the_code_says_of_them(site: Path) -> None:
    run = text_of(site / "api/run.html")
    assert "counted_tokens: int Tokens whose loss is counted" in run  # the comment behind a field
    config = text_of(site / "api/config.html")
    assert "Width of the residual stream, N." in config  # a description
    roles = text_of(site / "api/roles.html")
    assert "UNEMBEDDING = 'unembedding'" in roles  # a member of an enum


def text_of(page: Path) -> str:
    """The words of a page, without its marks."""
    words = re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8")).split()
    return re.sub(r" (?=[:,)])", "", html.unescape(" ".join(words)))


# Blocks and tables that are wider than their place, so that a reader has to move them.
CUT = """[...document.querySelectorAll('article pre > code, article .md-typeset__scrollwrap')]
    .filter(block => block.clientWidth > 0 && block.scrollWidth > block.clientWidth + 1)
    .map(block => block.innerText.slice(0, 60))"""


@pytest.mark.slow
def test_every_page_opens_without_complaint_and_asks_nothing_of_other_machines(
    site: Path, address: str
) -> None:
    with chromium() as browser:
        for path in sorted(site.rglob("*.html")):
            browser.open(f"{address}/{path.relative_to(site)}", width=800)
            assert (path, browser.evaluate(CUT)) == (path, [])
            # Of a report as it was committed.
            problems = [problem for problem in browser.problems if "/favicon.ico" not in problem]
            assert (path, problems, browser.broken_pictures()) == (path, [], [])
            assert {
                urlsplit(url).netloc for url in browser.requests if not url.startswith("data:")
            } == {urlsplit(address).netloc}
        check_search(browser, address)
        for name in ("tools", "results/index", "results/lr_transfer/report", "index"):
            browser.open(f"{address}/{name}.html", width=1300)
            assert (name, browser.evaluate(CUT)) == (name, [])
        browser.evaluate("document.querySelector('article pre > code').style.whiteSpace = 'pre'")
        browser.evaluate("document.querySelector('article pre > code').append('x'.repeat(300))")
        assert browser.evaluate(CUT)  # a line that is cut would be found
        browser.open(f"{address}/index.html", width=380)  # a phone
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


def check_search(browser: Browser, address: str) -> None:
    """Words typed into the search box find their page."""
    browser.open(f"{address}/index.html")
    found = browser.evaluate("""new Promise(done => {
        const box = document.querySelector('[data-md-component="search-query"]')
        let tries = 0
        const look = () => {
            box.focus()
            box.value = 'straggler'
            box.dispatchEvent(new KeyboardEvent('keyup', {bubbles: true}))
            const found = [...document.querySelectorAll('.md-search-result__link')]
            const links = found.map(link => link.pathname)
            links.length || tries++ > 600 ? done(links) : setTimeout(look, 100)
        }
        look()
    })""")
    assert any(re.search(r"/reliability\.html$", link) for link in found), found
