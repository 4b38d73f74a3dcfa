"""The tutorial runs from its first command to its last, and makes every picture that it shows."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documentation import (
    DOCS,
    ROOT,
    ShellCommand,
    is_documented_column,
    shell_commands,
)

FOLDER = DOCS / "tutorial"
RUNNER = ROOT / "scripts" / "tutorial.py"
PAGES = sorted(FOLDER.glob("[0-9]-*.md"))
SHOWN = sorted(
    {name for page in PAGES for name in re.findall(r"tutorial/([\w-]+\.png)", page.read_text())}
)


@pytest.fixture
def small_tutorial(tmp_path: Path) -> Path:
    """A clone that has the runner and one page, with the commands of the test."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "docs" / "tutorial").mkdir(parents=True)
    (tmp_path / "scripts" / "tutorial.py").write_text(RUNNER.read_text())
    return tmp_path


def run(clone: Path, page: str) -> subprocess.CompletedProcess[str]:
    (clone / "docs" / "tutorial" / "1-page.md").write_text(page)
    command = [sys.executable, "scripts/tutorial.py", "folder"]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True)


def test_all_commands_are_run_in_order(small_tutorial: Path) -> None:
    page = (
        "`echo no`\n\n```shell\nmkdir -p runs/tutorial/pictures\necho first \\\n  > log\n"
        "```\n\n```text\necho no >> log\n```\n\n```shell\necho second >> log\n"
        "touch runs/tutorial/pictures/a.png\n```\n![a](../images/tutorial/a.png)\n"
    )
    ended = run(small_tutorial, page)
    assert ended.returncode == 0, ended.stderr
    assert (small_tutorial / "folder" / "log").read_text() == "first\nsecond\n"
    assert "4 commands" in ended.stdout


def test_it_stops_at_the_first_command_that_fails(small_tutorial: Path) -> None:
    ended = run(small_tutorial, "```shell\nfalse | true\ntouch after\n```\n")
    assert ended.returncode == 1
    assert "1-page.md: exit code 1 of this command:\nfalse | true" in ended.stderr
    assert not (small_tutorial / "folder" / "after").exists()


def test_a_picture_that_no_command_makes_is_an_error(small_tutorial: Path) -> None:
    ended = run(small_tutorial, "```shell\ntrue\n```\n![a](../images/tutorial/missing.png)\n")
    assert ended.returncode == 1
    assert "no command has made missing.png" in ended.stderr


def test_a_folder_with_files_is_refused(small_tutorial: Path) -> None:
    (small_tutorial / "folder").mkdir()
    (small_tutorial / "folder" / "notes").write_text("mine")
    ended = run(small_tutorial, "```shell\ntouch after\n```\n")
    assert ended.returncode == 1
    assert "folder is not empty" in ended.stderr
    assert not (small_tutorial / "folder" / "after").exists()


def test_pages_have_the_order_of_their_names() -> None:
    contents = (FOLDER / "index.md").read_text().split("```{toctree}")[1]
    assert re.findall(r"^\d-.*$", contents, re.MULTILINE) == [page.stem for page in PAGES]


def test_every_command_writes_where_the_tutorial_is_run() -> None:
    def outputs(command: ShellCommand) -> list[str]:
        return re.findall(r"--out (\S+)", command.line)

    commands = [command for page in PAGES for command in shell_commands(page)]
    assert len(commands) > 20
    for command in commands:
        for path in outputs(command):
            assert path.startswith(("runs/tutorial/", "data/tutorial/")), command


def test_every_call_of_the_script_for_curves_parses() -> None:
    parser = runpy.run_path(str(FOLDER / "curves.py"))["build_parser"]()
    runner = runpy.run_path(str(RUNNER))
    calls = [
        line.split()[2:]
        for page in PAGES
        for line in runner["commands"](page)
        if line.startswith("python docs/tutorial/curves.py ")
    ]
    assert len(calls) > 2
    for call in calls:
        assert all(map(is_documented_column, parser.parse_args(call).columns)), call


def test_pictures_are_in_the_documentation_and_small() -> None:
    assert len(SHOWN) > 10
    files = [path.name for path in (DOCS / "images" / "tutorial").iterdir()]
    assert sorted(files) == SHOWN
    for name in SHOWN:
        assert (DOCS / "images" / "tutorial" / name).stat().st_size < 150_000, name


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_tutorial_runs_and_makes_its_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "tutorial"
    ended = subprocess.run([sys.executable, str(RUNNER), str(folder)], cwd=ROOT)
    assert ended.returncode == 0
    for name in SHOWN:
        assert (folder / "runs" / "tutorial" / "pictures" / name).is_file(), name
