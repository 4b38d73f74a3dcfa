"""Each attempt notes the machine, the versions and the commit that it runs on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

import ganscale
from ganscale import provenance as module
from ganscale.json_lines import read_lines
from ganscale.launch.local import train_in_process
from ganscale.provenance import provenance
from ganscale.run_directory import RunDirectory
from tests.conftest import MakeConfig

ROOT = Path(ganscale.__file__).parents[1]


def test_machine_and_versions_are_those_of_this_process() -> None:
    noted = provenance("cpu")
    assert noted["machine"]["host"] == platform.node()
    assert noted["machine"]["device"] == "cpu"
    assert noted["versions"]["python"] == platform.python_version()
    # torch's own name for itself may have a build behind it, such as 2.11.0+cpu.
    assert torch.__version__.startswith(noted["versions"]["torch"].partition("+")[0])


def test_the_commit_is_gits_and_null_without_a_checkout() -> None:
    commit = module._commit()
    if not (ROOT / ".git").exists():
        assert commit is None
        return
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert commit is not None
    assert commit.removesuffix("+") == head


def test_every_attempt_begins_with_them(make_config: MakeConfig) -> None:
    config = make_config(training__total_kimg=0.016)
    train_in_process(config)
    (start,) = [e for e in read_lines(RunDirectory(config.run_dir).events) if e["event"] == "start"]
    assert {name: start[name] for name in ("machine", "versions", "commit")} == provenance("cpu")
