"""What is installed is what stands here:
kernels and tools inside the package, nothing of this machine in any file.
"""

import contextlib
import email
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import megatron_completep

ROOT = Path(__file__).resolve().parents[1]


def committed_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_version_is_known_without_loading_anything():
    program = (
        "import sys, megatron_completep; print(megatron_completep.__version__, "
        "{'torch', 'pydantic', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split(maxsplit=1) == [megatron_completep.__version__, "set()\n"]


@pytest.mark.parametrize("name", ["kernels", "tools", "configs"])
def test_the_folders_at_the_top_are_subpackages_through_relative_links(name):
    link = ROOT / "megatron_completep" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert name == "configs" or (link / "__init__.py").is_file()


def test_no_tool_is_named_like_a_package_it_would_shadow():
    # `python tools/NAME.py` puts tools/ first on the path.
    names = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"__init__"}
    installed = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    assert names & installed == set()


INDEX = r"https?://[^\s\"')]*(?:pypi|pythonhosted|whl|simple/)|--(?:extra-)?index-url|--find-links"
MACHINE = rf"{re.escape(str(ROOT))}/|/root/|/home/\w+/|/Users/\w+/"
FOREIGN = re.compile(f"{INDEX}|{MACHINE}")


@pytest.mark.parametrize(
    "text",
    [
        "https://pypi.org/simple",
        "pip install --index-url x",
        "/root/x",
        "/home/me/x",
        f"see {ROOT}/x",
    ],
)
def test_a_machine_path_or_index_host_would_be_found(text):
    assert FOREIGN.search(text)


def test_no_committed_file_names_a_machine_path_or_a_package_index():
    found = []
    for path in committed_files():
        if path == Path(__file__).resolve() or path.stat().st_size > 1_000_000:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in FOREIGN.finditer(text)]
    assert found == []


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is committed, without git."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("packaging") / "source"
    for path in [
        *committed_files(),
        *(ROOT / "megatron_completep" / name for name in ("kernels", "tools", "configs")),
    ]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path.readlink()) if path.is_symlink() else target.write_bytes(
            path.read_bytes()
        )
    return folder


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a `wheel` or an `sdist` of a source tree as pip does, without the network; the file."""
    out.mkdir()
    program = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", program, str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return build("wheel", source, source.with_name("wheels"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """An empty folder into which pip put the wheel."""
    target = wheel.parent.with_name("installed")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
    ]
    subprocess.run([*pip, str(target), str(wheel)], check=True, capture_output=True)
    return target


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_kernels_and_tools_and_nothing_from_outside_the_package(
    wheel: Path,
) -> None:
    names = set(contents(wheel))
    for folder in ("kernels", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            if path in committed_files():
                assert f"megatron_completep/{path.relative_to(ROOT)}" in names
    assert {"megatron_completep/py.typed", "megatron_completep/config/schema.py"} <= names
    for path in (ROOT / "configs").rglob("*"):
        assert path.is_dir() or f"megatron_completep/{path.relative_to(ROOT)}" in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {
        "megatron_completep",
        f"megatron_completep-{megatron_completep.__version__}.dist-info",
    }
    assert any(name.endswith("LICENSE") for name in names)


def test_the_source_distribution_builds_the_same_wheel(
    source: Path, wheel: Path, tmp_path: Path
) -> None:
    archive = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(archive) as opened:
        # Python 3.11.3 and before have none
        opened.extraction_filter = getattr(tarfile, "data_filter", None)
        opened.extractall(tmp_path)
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    # It is a checkout without git: links are links, and the tests find what they look at.
    for name in ("kernels", "tools", "configs"):
        assert (unpacked / "megatron_completep" / name).readlink() == Path("..") / name
    checked_out = {path.relative_to(ROOT) for path in committed_files()}
    unpacked_files = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert checked_out - unpacked_files == set()
    again = build("wheel", unpacked, tmp_path / "wheel")
    ours, theirs = (
        {n: data for n, data in contents(built).items() if not n.endswith("RECORD")}
        for built in (wheel, again)
    )
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


def outside(installed: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program that can see the installed package,
    the libraries, and nothing of the source tree.
    """
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command,
        cwd=installed.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


# Argv: modules that are not there, a program, its arguments.
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))
before = set(sys.modules)
exec(sys.argv[2])
"""
EXTRAS = (
    "tokenizers",
    "tiktoken",
    "pyarrow",
    "zstandard",
    "transformers",
    "lm_eval",
    "ray",
    "wandb",
    "trackio",
    "submitit",
    "megatron",
)
OWN = (
    "pydantic",
    "yaml",
    "sentencepiece",
    "safetensors",
    "xxhash",
    "psutil",
    "rich",
    "matplotlib",
    "tensorboard",
)


HELP = """
import contextlib, io, json, runpy, sys
import megatron_completep
found = {}
for name in sys.argv[3:]:
    sys.argv = [name, "--help"]
    text, code = io.StringIO(), None
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            runpy.run_module(f"megatron_completep.{name}", run_name="__main__")
        except SystemExit as left:
            code = left.code
        except BaseException as error:
            code = repr(error)
    found[name] = [code, text.getvalue()]
own = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "megatron_completep"]
elsewhere = [file for file in own if "/installed/" not in file]
print(json.dumps([found, elsewhere]))
"""


def test_every_tool_of_the_installed_wheel_says_how_it_is_used(installed: Path) -> None:
    # One process for all, so that torch is loaded once; the modules run as `python -m` runs them.
    # What extras bring is not there.
    tools = [
        path.stem
        for path in sorted((ROOT / "tools").glob("*.py"))
        if path in committed_files() and path.stem != "__init__"
    ]
    assert len(tools) > 15
    run = outside(
        installed, WITHOUT, ",".join(EXTRAS), HELP, *(f"tools.{name}" for name in tools), "pretrain"
    )
    assert run.returncode == 0, run.stderr
    found, elsewhere = json.loads(run.stdout)
    assert elsewhere == []
    assert {
        name: f"{code} {text[-300:]}"
        for name, (code, text) in found.items()
        if code not in (0, None) or "usage: " not in text
    } == {}
    assert [
        name for name, (_, text) in found.items() if "xample" not in text and name != "pretrain"
    ] == []


def test_the_installed_program_runs_every_tool_by_its_command(installed: Path) -> None:
    program = "from megatron_completep.__main__ import main; main()"
    help_text = outside(installed, program, "--help").stdout
    tools = [path for path in committed_files() if path.parent == ROOT / "tools"]
    commands = re.findall(r"^  ([a-z-]+)  ", help_text, re.MULTILINE)
    assert len(commands) == len(set(commands)) == len(tools)  # and the trainer, for __init__
    assert {"pretrain", "plan", "preprocess", "export", "import", "evaluate"} <= set(commands)
    plan = outside(installed, program, "plan", "--help").stdout
    assert "usage: megatron-completep plan" in plan
    assert "\n    megatron-completep plan configs" in plan
    assert "python tools/" not in plan
    wrong = outside(installed, program, "plann")
    assert (wrong.returncode, wrong.stdout) == (2, "") and "Did you mean plan?" in wrong.stderr
    (entry,) = installed.glob("*.dist-info/entry_points.txt")
    assert "megatron-completep = megatron_completep.__main__:main" in entry.read_text()


def test_configurations_come_with_the_package_and_are_copied_once(
    installed: Path, tmp_path: Path
) -> None:
    program = "from megatron_completep.__main__ import main; main()"
    copied = outside(installed, program, "configs", "--copy", str(tmp_path / "mine"))
    assert copied.returncode == 0, copied.stderr
    for path in (ROOT / "configs").rglob("*"):
        copy = tmp_path / "mine" / path.relative_to(ROOT / "configs")
        assert path.is_dir() or copy.read_bytes() == path.read_bytes()
    again = outside(installed, program, "configs", "--copy", str(tmp_path / "mine"))
    assert again.returncode == 2 and "--overwrite" in again.stderr


def test_the_description_links_to_what_it_shows(wheel: Path) -> None:
    (text,) = (data.decode() for name, data in contents(wheel).items() if name.endswith("METADATA"))
    metadata = email.message_from_string(text)
    links = re.findall(r"\]\(([^)]+)\)", str(metadata.get_payload()))
    assert len(links) > 10
    assert [link for link in links if not link.startswith("https://")] == []
    home = metadata["Home-page"]
    inside = [link for link in links if link.startswith(home)]
    paths = [link.removeprefix(home).split("/", 3)[3].partition("#")[0] for link in inside]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert len(metadata.get_all("Classifier", [])) > 5
    assert home in (ROOT / "README.md").read_text()  # of which one clones


@pytest.mark.slow
def test_the_quickstart_runs_from_the_wheel_outside_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    program = f"import os; os.chdir({str(tmp_path)!r})\n"
    program += "from megatron_completep.__main__ import main; main()"
    words = ["model.num_layers=4", "model.hidden_size=64", "model.ffn_hidden_size=128"]
    words += ["model.seq_length=64", "training.train_steps=8", "checkpoint.interval=4"]
    words += ["training.device=cpu", "training.cpu_threads=1", "training.validation_interval=4"]
    run = outside(installed, program, "quickstart", "--goal", "-1", *words)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "runs/quickstart/report.html").exists()
    assert "width multiplier 0.5" in run.stdout  # what the table did


def test_the_bare_package_loads_no_other_library(installed: Path) -> None:
    program = (
        "import megatron_completep; print(*{name.split('.')[0] for name in "
        "set(sys.modules) - before})"
    )
    run = outside(installed, WITHOUT, ",".join((*OWN, "torch", "triton", "numpy")), program)
    assert run.stdout.split() == ["megatron_completep"], run.stderr


def test_the_kernels_need_torch_and_triton_only(installed: Path) -> None:
    program = """
import torch
from megatron_completep.kernels import Join, Norm, scaled_residual_norm
from megatron_completep.kernels import swiglu, unembedding_cross_entropy
x = torch.randn(2, 3, 8)
y, out = scaled_residual_norm(x, x, None, torch.ones(8), None, Join(0.5), Norm("rmsnorm"))
print(float((y - 1.5 * x).abs().max()), "megatron_completep.config" in sys.modules)
"""
    assert outside(installed, WITHOUT, ",".join(OWN), program).stdout.split() == ["0.0", "False"]
    refused = outside(installed, WITHOUT, ",".join(OWN), "import megatron_completep.config")
    # The same block is felt where a library is needed.
    assert "None in sys.modules" in refused.stderr


def test_the_tools_that_need_no_torch_do_not_load_it(installed: Path) -> None:
    program = (
        "import megatron_completep.tools.config_reference, megatron_completep.config; "
        "print(sys.modules['torch'])"
    )
    assert outside(installed, WITHOUT, "torch,triton", program).stdout == "None\n"


def test_every_requirement_of_an_extra_has_both_bounds_and_what_is_installed_lies_within(
    wheel: Path,
) -> None:
    (text,) = (data.decode() for name, data in contents(wheel).items() if name.endswith("METADATA"))
    metadata = email.message_from_string(text)
    assert {"dev", "data", "eval", "tracking", "docs", "gpu", "hf", "old-triton", "ray"} <= set(
        metadata.get_all("Provides-Extra", [])
    )
    wrong = []
    for line in map(Requirement, metadata.get_all("Requires-Dist", [])):
        operators = {spec.operator for spec in line.specifier}
        if "extra ==" in str(line.marker) and not (
            {"==", "<"} & operators and {"==", ">="} & operators
        ):
            wrong.append(f"{line}: not bounded on both sides")
        if "old-triton" in str(line.marker):  # for another version of Triton than this one
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(line.name)
            if not line.specifier.contains(version, prereleases=True):
                wrong.append(f"{line}: {version} is installed")
    assert wrong == []
