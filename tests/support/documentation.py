"""What the pages of the documentation say: their commands and their tables of names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import ganscale

PACKAGE = Path(ganscale.__file__).parent
ROOT = PACKAGE.parent
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)

_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*ganscale .*|.*(?: -m ganscale | \S*/train\.sbatch ).*")
_FENCE = re.compile(r"^```(?P<info>.*)\n(?P<body>(?:.*\n)*?)```$", re.MULTILINE)


@dataclass(frozen=True)
class ShellCommand:
    """A line of a shell block that runs `ganscale`, and the page that it is on."""

    page: Path
    line: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.line}"


def shell_commands(page: Path) -> Iterator[ShellCommand]:
    """The commands in a page's shell blocks; a line that is continued is one."""
    for fence in _FENCE.finditer(page.read_text(encoding="utf-8")):
        # Blocks without a language are those of README.md, which also show output.
        if fence["info"] in ("", "shell"):
            body = re.sub(r"\\\n\s*", "", fence["body"])
            for line in body.splitlines():
                if _COMMAND.fullmatch(line.strip()):
                    yield ShellCommand(page, line.strip())


def table_names(page: Path, heading: str) -> list[str]:
    """The names in code font in the first column of the first table below a heading."""
    text = page.read_text(encoding="utf-8")
    _, found, section = text.partition(f"\n## {heading}\n")
    assert found, f"{page} has no heading {heading!r}"
    rows = re.findall(r"^\|(.*?)\|", section.split("\n## ")[0], re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) == len(set(names))
    return names


def column_pattern(name: str) -> re.Pattern[str]:
    """The columns that a name in the reference stands for: words in capitals are for others."""
    # A single capital is the letter of a network.
    return re.compile(re.sub(r"[A-Z]{2,}", r"[\\w.-]+", name))


@cache
def _column_patterns() -> tuple[re.Pattern[str], ...]:
    names = table_names(DOCS / "reference" / "log-keys.md", "Columns of metrics.jsonl")
    return tuple(map(column_pattern, names))


def is_documented_column(name: str) -> bool:
    """Whether the reference says what a column of metrics.jsonl means."""
    return any(pattern.fullmatch(name) for pattern in _column_patterns())


def string_pieces() -> Iterator[str]:
    """The texts in the package's code; an f-string has a piece before, between and after values."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
