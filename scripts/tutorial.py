"""Runs the tutorial: all commands of the shell blocks in docs/tutorial/, page after page.

    python scripts/tutorial.py            in the folder runs/whole-tutorial
    python scripts/tutorial.py FOLDER     in another one, which must be new or empty

The pages are the only place where the commands are written. A line is a command, and a line that
ends with a backslash continues on the next one. The first command that fails ends the script with
its exit code. Each command's time is printed after it, and all times at the end; CPU seconds are
those of all its processes that have ended by then. Last, it is checked that every picture that the
pages show was made. To renew the pictures of the pages:

    cp FOLDER/runs/tutorial/pictures/*.png docs/images/tutorial/

It needs the interpreter of the environment in which ganscale is installed; in a clone that
scripts/quickstart.sh has set up, this is .venv/bin/python. The variables that the commands read,
such as GANSCALE_CIFAR10, are passed on.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "tutorial").glob("[0-9]-*.md"))
PICTURES = Path("runs/tutorial/pictures")
"""Where the commands put the pictures that the pages show, in the folder in which they are run."""

_BLOCK = re.compile(r"^```shell\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PICTURE = re.compile(r"images/tutorial/([\w-]+\.png)")


@dataclass(frozen=True)
class Timing:
    """What a command took."""

    page: Path
    command: str
    seconds: float
    cpu_seconds: float

    def __str__(self) -> str:
        shown = self.command if len(self.command) <= 60 else f"{self.command[:57]}..."
        return f"{self.seconds:8.1f} s {self.cpu_seconds:8.1f} s CPU  {self.page.stem:20} {shown}"


def commands(page: Path) -> list[str]:
    """The commands in the shell blocks of a page, in order, each on one line."""
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    lines = [re.sub(r"\\\n\s*", "", block).splitlines() for block in blocks]
    return [line.strip() for block in lines for line in block if line.strip()]


def pictures(page: Path) -> list[str]:
    """The names of the pictures that a page shows."""
    return _PICTURE.findall(page.read_text(encoding="utf-8"))


def run_all(folder: Path) -> Iterator[Timing]:
    """Run the commands of all pages in `folder`. Exits at the first one that fails."""
    binaries = Path(sys.executable).parent
    environment = {
        # Without this, a machine where a W&B key is known would upload the runs.
        "WANDB_MODE": "offline",
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
    }
    for page in PAGES:
        for command in commands(page):
            print(f"\n$ {command}", flush=True)
            started, cpu_started = time.monotonic(), _cpu_seconds()
            shell = ["bash", "-euo", "pipefail", "-c", command]
            code = subprocess.run(shell, cwd=folder, env=environment).returncode
            if code:
                name = page.relative_to(ROOT)
                print(f"\n{name}: exit code {code} of this command:\n{command}", file=sys.stderr)
                raise SystemExit(code)
            cpu_seconds = _cpu_seconds() - cpu_started
            timing = Timing(page, command, time.monotonic() - started, cpu_seconds)
            print(f"({timing.seconds:.1f} s)", flush=True)
            yield timing


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Run everything in the folder of the command line."""
    folder = Path(sys.argv[1] if sys.argv[1:] else "runs/whole-tutorial")
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty: remove it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    # The commands are written for the root of a clone, from where they read these pages' files.
    (folder / "docs").symlink_to(ROOT / "docs")
    timings = list(run_all(folder))
    print("\n" + "\n".join(map(str, timings)))
    seconds = sum(timing.seconds for timing in timings)
    cpu_seconds = sum(timing.cpu_seconds for timing in timings)
    print(f"{seconds:8.1f} s {cpu_seconds:8.1f} s CPU  {len(timings)} commands")
    shown = sorted({name for page in PAGES for name in pictures(page)})
    missing = [name for name in shown if not (folder / PICTURES / name).is_file()]
    if missing:
        raise SystemExit(f"no command has made {', '.join(missing)} in {folder / PICTURES}")
    print(f"{len(shown)} pictures are in {folder / PICTURES}")


if __name__ == "__main__":
    main()
