"""Every command of the documentation is understood by its program,
and those that a CPU can run are run (slow).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_completep.config import check_world, load_config
from tests.docs.commands import FENCE, ROOT, Command, commands, parse, program_of

COMMANDS = commands()
OURS = [command for command in COMMANDS if program_of(command.words)]


def name(command: Command) -> str:
    return f"{command.page}: {command.text[:90]}"


@pytest.mark.parametrize("command", OURS, ids=name)
def test_the_program_understands_the_command(command: Command) -> None:
    module, arguments = program_of(command.words) or ("", [])
    values = parse(module, arguments)
    config = str(getattr(values, "config", ""))
    if (ROOT / config).is_file() and config:
        overrides = [
            word for word in getattr(values, "overrides", []) if word != "section.key=value"
        ]
        loaded = load_config(ROOT / config, overrides)
        if getattr(values, "world_size", None):
            check_world(loaded, values.world_size)


def test_a_command_that_a_program_does_not_understand_is_refused() -> None:
    assert len(OURS) > 40
    with pytest.raises(SystemExit):
        parse("megatron_completep.tools.report", ["RUN", "--no-such-option"])
    assert parse("megatron_completep.tools.report", ["RUN"]).runs == [Path("RUN")]


def test_commands_of_other_programs_name_files_and_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in COMMANDS:
        words = command.words
        if words[0] == "make":
            assert set(words[1:2]) <= targets, command
        if words[0] in ("sbatch", "kubectl"):
            assert all((ROOT / word).is_file() for word in words if word.startswith("configs/")), (
                command
            )


# Commands that no test runs as they stand, and why; the first pattern that is found in `page:
# command` counts.
NOT_RUN = [
    (
        r": (sbatch|kubectl) ",
        "cluster; tests/tools/test_launch_templates.py runs the script with stand-ins",
    ),
    (r": torchrun .*completep_1b", "GPUs"),
    (r": make gpu-report|gpu_report", "GPUs"),
    (
        r": (make|pip) ",
        (
            "builds environments; make lint and make test are what runs this, "
            "tests/reports/test_quickstart.py the quickstart"
        ),
    ),
    (
        r"runs/(ladder|horizon)|tools/new_run.py",
        "an hour; tests/instruments has test_ladder.py, test_lr_horizon.py and test_new_run.py",
    ),
    (r"docs/results/", "hours; the same programs are run from docs/instruments.md"),
    (
        r"tools/benchmark_(training|parallel|checkpoint|kernels|telemetry)",
        "measures; tests/benchmarks runs the library on tiny shapes",
    ),
    (
        r"config_reference.py --write",
        "writes into the checkout; tests/config/test_config_reference.py compares",
    ),
    (r"pretrain configs/quickstart.yaml", "minutes; tests/reports/test_quickstart.py"),
    (r"draw_step.py", "writes into the checkout; tests/planning/test_step_picture.py"),
    (r"tests.faults.effective_time", "minutes; the end of make faults runs it"),
    (r"http.server", "serves until it is ended; tests/docs/test_site.py"),
    (r"wandb |trackio ", "needs an account or a browser"),
    (r"--engine ray|--shard", "tests/preprocess/test_preprocess.py"),
    (r"export_hf|import_hf|evaluate_model|vllm|runs/granite", "tests/interop"),
]
SHORT = (
    "training.train_steps=2 training.micro_batch_size=4 training.validation_samples=8 "
    "training.output_dir=runs/launched"
)
# What is put in the place of a reader's own names and of long settings, in this order.
SUBSTITUTES = [
    (r"\[(-[^\]]*)\]", r"\1"),
    (r" \.\.\.(?= |$)", ""),
    (
        r"torchrun --nproc-per-node 8",
        f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2",
    ),
    (
        r"configs/NAME.yaml",
        f"docs/tutorial/proxy.yaml {SHORT}",
    ),
    (r"(train_tokenizer.py .*)", r"\1 --overwrite"),  # several pages make the same file
    (r"vocab(-|_)size([ =])32000", r"vocab\1size\g<2>400"),
    (r"--documents 100000000", "--documents 2000"),
    (
        r"configs/(quickstart|completep_1b)_proxy.yaml|docs/tutorial/proxy.yaml(?= --depths)",
        "docs/tutorial/proxy.yaml",
    ),
    (
        r"(coordinate_check.py \S+) .*",
        r"\1 --depths 2,4 --widths 64,128 --steps 2 --seeds 1 --out runs/check",
    ),
    (r"(laziness.py \S+) .*", r"\1 --depths 2,4 --seeds 1 --out runs/laziness"),
    (
        r"(lr_transfer.py sweep \S+) .*",
        r"\1 training.train_steps=3 --depths 2,4 --lr=-8:-7:1 --seeds 1 --out runs/transfer",
    ),
    (
        r"plan runs/transfer configs/quickstart.yaml --to configs/tuned.yaml",
        "plan runs/transfer docs/tutorial/target.yaml --to runs/tuned.yaml --overwrite",
    ),
    (
        r"\b(inspect|verify|reshard|adapt) CHECKPOINT",
        r"\1 runs/tutorial/target/checkpoints/step_00000150",
    ),
    (
        r"diff A B",
        (
            "diff runs/tutorial/target/checkpoints/step_00000075 "
            "runs/tutorial/target/checkpoints/step_00000150"
        ),
    ),
    (r"--output FOLDER", "--output runs/resharded"),
    (r"NEW.yaml.*", "docs/tutorial/target.yaml training.output_dir=runs/adapted"),
    (r"--files N", "--files 2"),
    (r"--world-size N", "--world-size 1"),
    (r"--max-new-tokens 200", "--max-new-tokens 5"),
    (r"--keep K", "--keep 2"),
    (r"--keep-every M", "--keep-every 75"),
    (r"dataset.py (verify|inspect) PREFIX", r"dataset.py \1 runs/tutorial/corpus_text_document"),
    (r"\bRUN\b", "runs/tutorial/target"),
    (r"\bCONFIG\b", "docs/tutorial/target.yaml"),
    (r"runs/(quickstart|own)\b", "runs/tutorial/target"),
    (r"\bMY_TEXT\b", "corpus"),
]
RIGHT_CODES = {"coordinate_check": {0, 1, 3}, "laziness": {0, 1, 3}, "checkpoint.py diff": {0, 1}}


def reason_not_to_run(command: Command) -> str | None:
    return next(
        (
            reason
            for pattern, reason in NOT_RUN
            if re.search(pattern, f"{command.page}: {command.text}")
        ),
        None,
    )


def test_every_reason_not_to_run_a_command_is_needed() -> None:
    texts = [f"{command.page}: {command.text}" for command in COMMANDS]
    optional = {
        r"--engine ray|--shard",
        r"wandb |trackio ",
        r"export_hf|import_hf|evaluate_model|vllm|runs/granite",
    }
    assert [
        p for p, _ in NOT_RUN if p not in optional and not any(re.search(p, text) for text in texts)
    ] == []


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout, in which the whole tutorial was carried out."""
    folder = tmp_path_factory.mktemp("workplace")
    for part in ("tools", "docs", "configs", "tests", "megatron_completep"):
        (folder / part).symlink_to(ROOT / part)
    blocks = [
        block
        for language, block in FENCE.findall(
            (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
        )
        if language == "bash"
    ]
    assert len(blocks) > 5
    finished = shell("set -e\n" + "\n".join(blocks), folder)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    (folder / "corpus").mkdir()
    for path in Path(os.__file__).parent.glob("*.py"):
        (folder / "corpus" / path.with_suffix(".txt").name).write_bytes(path.read_bytes())
    (folder / "prompts.txt").write_text("def\nimport\n")
    return folder


def shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script with this Python first on the path."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    if not (programs / "python").exists():
        (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (programs / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tutorial_does_what_it_says(workplace: Path) -> None:
    tutorial = workplace / "runs/tutorial"
    made = (
        "tokenizer.model",
        "corpus_text_document.bin",
        "sweep/report.html",
        "target.yaml",
        "report.html",
        "target/metrics.jsonl",
    )
    assert [name for name in made if not (tutorial / name).exists()] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_other_command_that_a_cpu_can_run_runs(workplace: Path) -> None:
    failed, ran = [], 0
    for command in COMMANDS:
        if command.page == "docs/tutorial.md" or reason_not_to_run(command):
            continue
        text = command.text
        for pattern, replacement in SUBSTITUTES:
            text = re.sub(pattern, replacement, text)
        finished = shell(text, workplace)
        codes = next((codes for words, codes in RIGHT_CODES.items() if words in text), {0})
        ran += 1
        if finished.returncode not in codes or "Traceback" in finished.stderr:
            failed.append(
                f"{command.page}: {text}\n  {finished.returncode}: {finished.stderr[-400:]}"
            )
    assert not failed, "\n".join(failed)
    assert ran > 20
