"""What is checked before a program writes;
tests/tools/test_every_tool.py asks it of every program.
"""

import os
from pathlib import Path

import pytest

from megatron_completep.document import Report, new_figure, png_of
from megatron_completep.errors import UserError
from megatron_completep.outputs import Output, check_outputs, is_ours
from megatron_completep.planning.step_picture import Span, draw


def test_what_can_be_written_passes_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    outputs = [
        Output("--out", tmp_path / name) for name in ("new", "there/new", "a/b/new", "dangling")
    ]
    check_outputs(
        [
            *outputs,
            Output("--folder", tmp_path / "there", folder=True),
            Output("--folder", tmp_path / "c/d", folder=True),
        ]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "there"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_is_recognised_through_links_and_detours(
    tmp_path: Path, link, overwrite: bool
) -> None:
    (tmp_path / "data").write_text("x")
    (tmp_path / "folder").mkdir()
    link(tmp_path / "data", tmp_path / "link")
    for path in (tmp_path / "link", tmp_path / "folder/../data"):
        with pytest.raises(UserError, match=r"--out = .*: is an input as well \(.*data\)"):
            check_outputs([Output("--out", path)], [tmp_path / "data"], overwrite)
    # The control: another input.
    check_outputs([Output("--out", tmp_path / "link")], [tmp_path / "folder"], True)


def test_the_same_output_under_two_names_is_refused_before_it_exists(tmp_path: Path) -> None:
    (tmp_path / "folder").symlink_to(".")
    outputs = [Output("--first", tmp_path / "new"), Output("--second", tmp_path / "folder/new")]
    with pytest.raises(UserError, match=r"--second = .*: is named twice"):
        check_outputs(outputs, overwrite=True)


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"(?s)2 problems\n  --a = .*exists.*\n  --b = .*is no folder"
    ):
        check_outputs([Output("--a", tmp_path / "file"), Output("--b", tmp_path / "file/below")])


def test_a_folder_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(
        UserError, match=f"--out = .*: cannot be written: you may not write into {tmp_path}"
    ):
        check_outputs([Output("--out", tmp_path / "a/b")])


@pytest.mark.skipif(
    not os.access("/proc", os.W_OK), reason="only root is told that /proc may be written into"
)
@pytest.mark.parametrize(
    "output",
    [Output("--out", Path("/proc/x.png")), Output("--out", Path("/proc/a/b"), folder=True)],
)
def test_a_file_system_that_takes_no_files_is_refused_though_permissions_allow_it(
    output: Output,
) -> None:
    with pytest.raises(
        UserError, match=r"--out = /proc/.*: cannot be written: /proc takes no file"
    ):
        check_outputs([output])


def test_reports_and_pictures_of_the_project_are_renewed_and_those_of_others_are_not(
    tmp_path: Path,
) -> None:
    Report("Title " + "x" * 300).write_html(tmp_path / "report.html")
    (tmp_path / "picture.png").write_bytes(png_of(new_figure()))
    panels = [("rank", [Span(0, 0.0, 1.0, "F", "0")], ["rank 0"])]
    for name in ("step.png", "step.svg"):
        draw(panels, tmp_path / name)
    made = ("report.html", "picture.png", "step.png", "step.svg")
    assert all(is_ours(tmp_path / name) for name in made)
    check_outputs([Output("--out", tmp_path / name, renewed=True) for name in made])
    figure = new_figure()
    figure.savefig(tmp_path / "other.png")
    (tmp_path / "other.html").write_text("<html><p>my own notes</p></html>")
    for name in ("other.png", "other.html"):
        with pytest.raises(
            UserError, match=r"exists\. Choose another name, or replace it with --overwrite"
        ):
            check_outputs([Output("--out", tmp_path / name, renewed=True)])
        check_outputs([Output("--out", tmp_path / name, renewed=True)], overwrite=True)
    with pytest.raises(UserError, match="exists"):  # a corpus that quotes the mark is no report
        check_outputs([Output("--out", tmp_path / "report.html")])
