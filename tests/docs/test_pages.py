"""What the pages show works: Python runs, commands parse, names and messages are those of code."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from ganscale_reference import commands, examples
from sybil import Example
from sybil.document import Document
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.myst import CodeBlockParser

from ganscale import world
from ganscale.cli import app
from ganscale.config import field_names, load_config, parse_overrides, preset_names
from ganscale.launch import ray_metrics
from ganscale.tracking.dashboard import SECTIONS, Curve
from ganscale.tracking.history import BEGINNINGS
from ganscale.tracking.sinks import FAULTS, WRONG
from tests.support.documentation import (
    DOCS,
    PACKAGE,
    PAGES,
    ROOT,
    ShellCommand,
    is_documented_column,
    shell_commands,
    string_pieces,
    table_names,
)

COMMAND: Any = typer.main.get_command(app)
TROUBLESHOOTING = DOCS / "troubleshooting.md"
LOG_KEYS = DOCS / "reference" / "log-keys.md"
ELSEWHERE = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("benchmarks/*.md"))
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]
NOT_RUN = re.compile(r"<!-- not run: .{10,} -->\n\Z")


class PythonBlocks:
    """Runs a block, or compiles it where a comment before it says why it cannot be run."""

    def __init__(self) -> None:
        self.num_run = 0

    def __call__(self, example: Example) -> None:
        if NOT_RUN.search(example.document.text[: example.start]):
            compile(str(example.parsed), example.path, "exec")
        else:
            PythonEvaluator()(example)
            self.num_run += 1


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_of_the_page_runs(page: Path) -> None:
    blocks = PythonBlocks()
    examples_of_page = list(Document.parse(str(page), CodeBlockParser("python", blocks)))
    assert len(examples_of_page) == page.read_text().count("```python")
    for example in examples_of_page:
        example.evaluate()


def test_a_block_that_fails_is_noticed(tmp_path: Path) -> None:
    page, reason = tmp_path / "page.md", "<!-- not run: there is no GPU here -->\n"
    page.write_text(f"{reason}```python\nraise ValueError\n```\n\n```python\nassert 1 == 2\n```\n")
    skipped, failing = Document.parse(str(page), CodeBlockParser("python", PythonBlocks()))
    skipped.evaluate()
    with pytest.raises(AssertionError):
        failing.evaluate()


def of_ganscale(line: str) -> list[list[str]]:
    """The arguments of each `ganscale` command in a line of a shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words = [*lexer, ";"]
    # The batch script passes what follows it on to `ganscale train`.
    script = "cluster/slurm/train.sbatch"
    if script in words:
        words[words.index(script) : words.index(script) + 1] = ["-m", "ganscale", "train"]
    found: list[list[str]] = []
    start = 0
    for end, word in enumerate(words):
        if set(word) <= set("|&;>") and word:
            part = words[start:end]
            while part and re.fullmatch(r"[A-Z_]+=.*", part[0]):
                part = part[1:]
            if part[:1] == ["ganscale"]:
                found.append(part[1:])
            elif "ganscale" in part and part[part.index("ganscale") - 1] == "-m":
                found.append(part[part.index("ganscale") + 1 :])
            start = end + 1
    return found


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The values of the options and arguments, as the verb would get them."""
    command = COMMAND
    if arguments[0] in {name for parameter in COMMAND.params for name in parameter.opts}:
        return {}  # an option of the command itself
    while commands_of := getattr(command, "commands", None):
        verb, *arguments = arguments
        command = commands_of[verb]
    if arguments == ["--help"]:
        return {}
    values: dict[str, Any] = command.make_context("", list(arguments)).params
    return values


def check_settings(values: dict[str, Any]) -> None:
    """Raise `ConfigError` for a setting that does not exist or cannot be."""
    overrides, config = values.get("overrides") or [], values.get("config")
    if config in preset_names():
        load_config(config, overrides)
    elif config and (ROOT / config).is_file():
        load_config(ROOT / config, overrides)
    else:
        assert not set(parse_overrides(overrides)) - set(field_names())


def all_commands() -> Iterator[ShellCommand]:
    for page in (*PAGES, *ELSEWHERE):
        yield from shell_commands(page)
    for path in sorted(PACKAGE.glob("presets/*.yaml")):
        comments = re.findall(r"^#\s+(ganscale .*)$", path.read_text(), re.MULTILINE)
        yield from (ShellCommand(path, line) for line in comments)
    for verb in commands():
        for _, line in examples(verb):
            yield ShellCommand(ROOT / "ganscale" / "cli", line)


COMMANDS = [command for command in all_commands() if of_ganscale(command.line)]


@pytest.fixture
def _any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of a machine with a GPU parse on one without."""
    monkeypatch.setattr(world, "check_cuda", lambda *_, **__: None)


@pytest.mark.usefixtures("_any_device")
def test_every_command_parses() -> None:
    assert len(COMMANDS) > 150
    for command in COMMANDS:
        for arguments in of_ganscale(command.line):
            try:
                check_settings(parsed(arguments))
            except Exception as error:
                pytest.fail(f"{command}: {error!r}")


@pytest.mark.parametrize(
    "line",
    [
        "ganscale trian --config quickstart",
        "ganscale train --konfig quickstart",
        "ganscale train --config quickstart training.batch=3",
        "ganscale train --config quickstart objective.name=wasserstein",
        "ganscale train --config docs/tutorial/small.yaml objective.name=wasserstein",
        "WANDB_MODE=offline ganscale resume > log",
        "torchrun --nproc-per-node 2 -m ganscale evaluate --num many",
        "sbatch --nodes=4 cluster/slurm/train.sbatch --config r3gan-cifar10 launch.workers=3",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    (arguments,) = of_ganscale(line)
    with pytest.raises(Exception):  # noqa: B017, PT011 - of typer, of pydantic, or a KeyError
        check_settings(parsed(arguments))


def test_every_set_that_a_command_reads_is_made_by_another_one() -> None:
    sets = {
        (path.rstrip("/"), bool(out))
        for command in COMMANDS
        for out, path in re.findall(r"(--out )?(?<![\w/.-])(data/[\w/.-]+)", command.line)
    }
    made = {path for path, is_made in sets if is_made}
    assert len(made) > 5
    # What is called "my-" stands for something that the reader has.
    assert {path for path, _ in sets if not path.startswith("data/my-")} == made


def test_every_example_of_the_command_line_is_shown() -> None:
    for verb in commands():
        shown = [line for _, line in examples(verb)]
        assert len(shown) == len(re.findall(r"(?::|;|=\.\.\.)\s+ganscale ", verb.command.epilog))


def test_the_citation_is_that_of_the_file() -> None:
    stated = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    entry = (DOCS / "reference" / "versions.md").read_text().split("```bibtex\n")[1].split("```")[0]
    fields = dict(re.findall(r"^  (\w+) +?= \{+(.*?)\}+,?$", entry, re.MULTILINE))
    assert fields["title"] == stated["title"]
    assert fields["version"] == stated["version"]
    assert [fields["author"].lower()] == [one["name"].lower() for one in stated["authors"]]


def test_the_papers_of_every_preset_are_listed() -> None:
    names = table_names(DOCS / "reference" / "versions.md", "Cite what you trained")
    assert sorted(names) == sorted(preset_names())


def test_every_extra_is_described_and_all_has_those_for_users() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(table_names(DOCS / "how-to" / "install.md", "Extras")) >= set(extras)
    (whole,) = extras["all"]
    assert set(re.findall(r"\w+", whole.partition("[")[2])) == set(extras) - {"all", "docs", "dev"}


def test_links_of_other_pages_lead_to_files() -> None:
    # Those of the site are checked when it is built.
    for page in (*ELSEWHERE, *ROOT.glob("cluster/*.md")):
        for path in re.findall(r"\]\(([^)#:\s]+)[^)\s]*\)", page.read_text()):
            assert (page.parent / path).exists(), f"{page}: {path}"


def test_pages_that_code_names_exist() -> None:
    folders = ("ganscale", "k8s", "cluster", "scripts", "benchmarks", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in (*files, *ELSEWHERE):
        if path.suffix in (".py", ".yaml", ".md", ".sh", ".sbatch", ".env"):
            for name in re.findall(r"\bdocs/[\w/-]+\.(?:md|yaml)\b", path.read_text()):
                assert (ROOT / name).exists(), f"{path}: {name}"


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    text = TROUBLESHOOTING.read_text()
    blocks = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"^\| `([^`]* [^`]*)` \|", text, re.MULTILINE)
    assert len(lines) > 50
    pieces = list(string_pieces())
    for line in lines:
        for part in line.split("..."):
            # A value that a page shows as itself, such as a number, is part of no text.
            words = part.strip(" ()")
            if len(words) > 3:
                assert any(words in piece for piece in pieces), f"{words!r} of {line!r}"


def test_every_event_is_documented() -> None:
    documented = set(table_names(LOG_KEYS, "Events"))
    assert documented >= {*BEGINNINGS, *FAULTS, *WRONG, "end", "stop"}
    written = set(events_in_code())
    assert {"alarm", "regroup", "evaluation", "copy"} <= written
    assert written <= documented
    assert documented <= written | {*BEGINNINGS, "stall", "end", "stop"}


def events_in_code() -> Iterator[str]:
    """The names that are passed to whatever writes events."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                function = ast.unparse(node.func)
                is_event = re.search(
                    r"(\.event|note|_note|events\.write|log\.write|_write)$", function
                )
                if is_event and isinstance(node.args[0].value, str):
                    yield node.args[0].value


def test_columns_that_code_names_are_documented() -> None:
    # Those that runs log are compared in tests/integration/test_dashboards.py.
    pattern = re.compile(r"(train|time|metrics|workers|data|gpu)/[a-z_0-9]+[a-z](_[A-Z])?")
    named = {piece for piece in string_pieces() if pattern.fullmatch(piece)}
    named |= {
        name
        for section in SECTIONS
        for panel in section.panels
        if isinstance(panel, Curve)
        for name in panel.names
    }
    named.discard("train/loss_scale")  # the beginning of several names
    assert len(named) > 15
    assert [name for name in sorted(named) if not is_documented_column(name)] == []
    assert not is_documented_column("train/loss")
    assert is_documented_column("workers/12/cpu_percent")


def test_gauges_are_of_documented_columns() -> None:
    fixed = [pattern for pattern, _ in ray_metrics._FROM_ROW if re.fullmatch(r"[\w/]+", pattern)]
    assert fixed
    assert all(is_documented_column(name) for name in fixed)
