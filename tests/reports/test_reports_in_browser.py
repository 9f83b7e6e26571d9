"""The project's HTML reports, opened in a real browser:
nothing complains, every picture shows, the choice of pictures works.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_completep.document import Report
from megatron_completep.instruments import lr_transfer_report
from megatron_completep.instruments.lr_curves import Curve
from megatron_completep.instruments.lr_transfer import Analysis, drifts, summarize
from megatron_completep.reports.run_comparison import compare
from megatron_completep.reports.run_files import Run
from megatron_completep.reports.run_report import run_report
from tests.support.browser import Browser, chromium
from tests.support.runs import proxy_config


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def rows(steps: int, offset: float = 0.0) -> list[dict[str, object]]:
    found = []
    for n in range(1, steps + 1):
        row = {
            "step": n,
            "loss": 4 + offset - n / steps,
            "lr": 1e-3,
            "grad_norm": 0.5,
            "skipped": False,
            "tokens": 100 * n,
            "mfu": 0.4,
        }
        found.append(
            {
                **row,
                "tokens_per_second": 1000.0,
                "step_seconds": 1.0,
                "validation_loss": None if n % 5 else 3.5,
            }
        )
    return found


def comparison() -> Report:
    return compare([Run("a", rows(20)), Run("b <i>", rows(500, 0.2))])


def of_one_run(tmp_path: Path) -> Report:
    return run_report(proxy_config(tmp_path), rows(20), "Quickstart")


def of_a_sweep() -> Report:
    grid = np.arange(-9.0, -4.0)
    curves = [
        Curve(
            rule,
            64,
            depth,
            100,
            0.0,
            0.02,
            grid,
            np.outer((grid + 7) ** 2, [0.1, 0.11]) + 2.5,
            flops=1.0,
        )
        for rule in ("completep", "mup")
        for depth in (2, 8)
    ]
    optima = [summarize(curve, curves[0]) for curve in curves]
    return lr_transfer_report.build(Analysis(curves, optima, drifts(curves), [], [], [], 20, 0))


@pytest.mark.parametrize(
    "make",
    [lambda folder: comparison(), of_one_run, lambda folder: of_a_sweep()],
    ids=["runs", "one run", "sweep"],
)
def test_a_report_opens_without_complaint_and_shows_its_pictures(
    browser: Browser, tmp_path: Path, make
) -> None:
    report = make(tmp_path)
    report.write_html(tmp_path / "report.html")
    browser.open((tmp_path / "report.html").as_uri())
    assert browser.problems == [] and browser.broken_pictures() == []
    assert browser.evaluate("document.title") == report.title
    assert browser.evaluate("document.images.length") > 0
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    browser.open((tmp_path / "report.html").as_uri(), width=380)  # a phone
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    browser.screenshot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_one_picture_of_a_choice_is_seen_at_a_time(browser: Browser, tmp_path: Path) -> None:
    comparison().write_html(tmp_path / "report.html")
    browser.open((tmp_path / "report.html").as_uri())
    seen = "[...document.querySelectorAll('.panes > figure')].map(f => f.offsetHeight > 0)"
    # By step, tokens, time; no FLOPs without a configuration.
    assert browser.evaluate(seen) == [True, False, False]
    browser.evaluate("document.querySelectorAll('.choice > label')[2].click()")
    assert browser.evaluate(seen) == [False, False, True]


def test_a_broken_page_is_seen_to_be_broken(browser: Browser, tmp_path: Path) -> None:
    page = (
        "<title>x</title><img src='none.png'><script>console.error('oh'); "
        "undefinedFunction()</script>"
    )
    (tmp_path / "page.html").write_text(page)
    browser.open((tmp_path / "page.html").as_uri())
    problems = "\n".join(browser.problems)
    assert "oh" in problems and "undefinedFunction" in problems and "ERR_FILE_NOT_FOUND" in problems
    assert len(browser.broken_pictures()) == 1
