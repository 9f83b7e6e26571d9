"""The GPU report's driver, with parts that need no GPU:
what it writes, and what becomes of parts that fail, hang or print rubbish.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_completep.benchmarks import gpu_report
from megatron_completep.benchmarks.gpu_report import Part

ROOT = Path(__file__).parents[2]
DEVICE = {
    "name": "Test GPU 1 (none)",
    "processors": 1,
    "memory_bytes": 2**30,
    "torch": "0",
    "triton": "0",
    "cuda": "0",
    "python": "0",
    "date": "0",
}
ROWS = [
    {"precision": "bf16", "ours": {"median": 0.5}, "ratio": 0.75},
    {"precision": "float32", "ours": {"median": 1.5}, "ratio": 0.875},
]


def part(name, program, json_output=True, share=0.5):
    return Part(name, (sys.executable, "-c", program), share, json_output)


def make(tmp_path, *run):
    folder = gpu_report.make_report(tmp_path, os.environ, DEVICE, lambda line: None, run)
    return (
        folder,
        json.loads((folder / "report.json").read_text()),
        (folder / "report.md").read_text(),
    )


def test_a_report_holds_every_part_and_its_figures(tmp_path):
    page_of_kernels = "docs/benchmarks/test-gpu-1-none/kernels.md"
    benchmark = (
        f"import json, pathlib; pathlib.Path({page_of_kernels!r}).touch(); "
        "print(json.dumps(dict(measurements=[])))"
    )
    folder, report, page = make(
        tmp_path,
        part("kernel tests", "print('3 passed')", json_output=False),
        part("kernel benchmark", benchmark),
        part(
            "training benchmark",
            f"print('log line'); print({json.dumps(json.dumps({'comparisons': ROWS}))})",
        ),
    )
    assert folder == tmp_path / "docs" / "benchmarks" / "test-gpu-1-none"
    assert gpu_report.passed(folder), report
    assert report["parts"][0]["summary"] == "3 passed"
    assert report["parts"][2]["result"] == {"comparisons": ROWS}
    assert "| precision | ours median | ratio |" in page and "| float32 | 1.5 | 0.875 |" in page
    assert "[kernels.md](kernels.md)" in page


@pytest.mark.parametrize(
    ("program", "share", "summary"),
    [
        ("import sys; print('{}'); sys.exit('a reason')", 0.5, "a reason"),
        ("print('no object')", 0.5, "no object"),
        ("import time; time.sleep(600)", 0.002, "stopped after"),
    ],
)
def test_a_part_that_fails_is_reported_and_the_others_still_run(
    tmp_path, monkeypatch, program, share, summary
):
    monkeypatch.setattr(gpu_report, "LEAST_SECONDS", 0.1)
    folder, report, page = make(
        tmp_path,
        part("kernel benchmark", program, share=share),
        part("training benchmark", "print('{\"ratio\": 1.0}')"),
    )
    assert not gpu_report.passed(folder)
    assert [p["passed"] for p in report["parts"]] == [False, True]
    assert summary in report["parts"][0]["summary"] and summary in page
    assert "kernels.md" not in page


def test_the_parts_together_stay_below_nine_minutes():
    left = gpu_report.TOTAL_SECONDS
    for each in gpu_report.parts(ROOT):
        assert 0 < each.share <= 1
        left -= each.share * left
    assert left >= 0 and gpu_report.TOTAL_SECONDS < 9 * 60
    for each in gpu_report.parts(ROOT):
        script = next((word for word in each.command if word.startswith("tools/")), None)
        assert script is None or (ROOT / script).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("tool", ["gpu_report.py", "tune_kernels.py"])
def test_without_a_gpu_the_tools_say_so_in_one_line(tool):
    answer = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: no GPU is visible to torch")
    assert answer.stderr.count("\n") == 1
