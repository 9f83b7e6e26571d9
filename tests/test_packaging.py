"""What is installed is what stands here: kernels and tools inside the package, nothing of this machine in any file."""

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import megatron_completep

ROOT = Path(__file__).resolve().parents[1]


def committed_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_version_is_known_without_loading_anything():
    program = "import sys, megatron_completep; print(megatron_completep.__version__, {'torch', 'pydantic', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split(maxsplit=1) == [megatron_completep.__version__, "set()\n"]


@pytest.mark.parametrize("name", ["kernels", "tools"])
def test_the_folders_at_the_top_are_subpackages_through_relative_links(name):
    link = ROOT / "megatron_completep" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (link / "__init__.py").is_file()


def test_no_tool_is_named_like_a_package_it_would_shadow():
    # `python tools/NAME.py` puts tools/ first on the path.
    names = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"__init__"}
    installed = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    assert names & installed == set()


INDEX = r"https?://[^\s\"')]*(?:pypi|pythonhosted|whl|simple/)|--(?:extra-)?index-url|--find-links"
MACHINE = rf"{re.escape(str(ROOT))}/|/root/|/home/\w+/|/Users/\w+/"
FOREIGN = re.compile(f"{INDEX}|{MACHINE}")


@pytest.mark.parametrize("text", ["https://pypi.org/simple", "pip install --index-url x", "/root/x", "/home/me/x", f"see {ROOT}/x"])
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


def test_the_wheel_holds_kernels_and_tools_and_nothing_from_outside_the_package(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    for path in [*committed_files(), *(ROOT / "megatron_completep" / name for name in ("kernels", "tools"))]:
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path.readlink()) if path.is_symlink() else target.write_bytes(path.read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("kernels", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            if path in committed_files():
                assert f"megatron_completep/{path.relative_to(ROOT)}" in names
    assert {"megatron_completep/py.typed", "megatron_completep/config/schema.py"} <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"megatron_completep", f"megatron_completep-{megatron_completep.__version__}.dist-info"}
    assert any(name.endswith("LICENSE") for name in names)
