"""Runs that a mistake must not harm: what cannot train changes no file, a live run is not taken.

Also runs whose folders people move, rename and copy.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from ganscale.atomic_files import write_text
from ganscale.checkpoint import CheckpointStore, RunInUse
from ganscale.config import Config
from ganscale.errors import CheckpointError, ConfigError
from ganscale.launch import ray_cluster
from ganscale.launch.held_run import run_session
from ganscale.launch.local import train_in_process
from ganscale.launch.ray_cluster import cluster, require_capacity
from ganscale.launch.start import resume_config, start
from ganscale.run_directory import RunDirectory
from ganscale.tracking.wandb_sink import FOLLOWED, POSITIONS
from ganscale.training.loop import Trainer
from tests.conftest import MakeConfig, Verb
from tests.support.ranks import free_port
from tests.support.runs import final_digest, read_rows, start_ranks, wait_all, wait_for_rows

QUIET = Console(quiet=True)
LONGER = {"training.total_kimg": 0.32}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, but what a live one adds."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def written(config: Config) -> Path:
    """The configuration as a file beside the run."""
    file = config.run_dir.parent / f"{config.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(config.to_yaml())
    return file


class _NoRay(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def web_server() -> Iterator[str]:
    """The address of something that is no Ray cluster."""
    with HTTPServer(("127.0.0.1", 0), _NoRay) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_start_that_cannot_train_changes_no_file_and_the_run_can_be_resumed(
    make_config: MakeConfig, verb: Verb, web_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "_ANSWER_SECONDS", 0.0)
    nowhere = f"127.0.0.1:{free_port()}"
    mistakes = {
        "launch.num_workers=2": "runs 1 worker(s) here, but launch.num_workers=2",
        f"launch.ray_address={nowhere}": f"no Ray cluster answers at launch.ray_address={nowhere}",
        f"launch.ray_address={web_server}": "another server listens there",
        "launch.ray_address=http://head:8265": "expected host:port of the cluster's head",
        "optimizer.lr=0.5": "holds a run with other settings",
    }
    if not torch.cuda.is_available():
        mistakes["launch.use_gpu=true"] = "cannot use this GPU"
    config = make_config()
    start(config, QUIET)
    before = contents(config.run_dir)
    for mistake, message in mistakes.items():
        backend = "ray" if "ray_address" in mistake else "inprocess"
        code, output, errors = verb(
            "train", "--config", written(config), f"launch.backend={backend}", mistake
        )
        assert code in (1, 2), mistake
        assert (output, errors.count("\n")) == ("", 1), mistake
        assert message in errors
        assert contents(config.run_dir) == before, mistake
    code, _, errors = verb("resume", config.run_dir, "training.total_kimg=0.32")
    assert code == 0, errors
    assert final_digest(config)[0] == 320


def test_a_new_run_that_cannot_train_leaves_no_folder(make_config: MakeConfig) -> None:
    config = make_config(launch__num_workers=2)
    with pytest.raises(ConfigError, match="launch.num_workers=2"):
        start(config, QUIET)
    assert not config.run_dir.exists()


@pytest.mark.slow
def test_a_run_whose_last_start_failed_resumes(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_config(name="undisturbed", **{"training__total_kimg": 0.32})
    start(expected, QUIET)
    config = make_config()
    start(config, QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(config.with_changes(LONGER), QUIET)
    start(resume_config(str(config.run_dir), {}), QUIET)  # as long as the failed one was to be
    assert final_digest(config) == final_digest(expected)


def test_a_second_start_of_a_live_run_is_refused_and_changes_nothing(
    make_config: MakeConfig, verb: Verb
) -> None:
    config = make_config(training__total_kimg=1.6, checkpoint__every_kimg=1000)
    (first,) = start_ranks(config, 1)
    wait_for_rows(RunDirectory(config.run_dir).metrics, 3, first)
    settings = RunDirectory(config.run_dir).config.read_bytes()
    file = written(config)
    os.kill(first.pid, signal.SIGSTOP)  # so that every change would be the second one's
    before = contents(config.run_dir)
    code, _, errors = verb("train", "--config", file, "launch.grace_seconds=5")
    assert code == 1
    assert f"is in use by process {first.pid} on " in errors
    assert "--take-over" in errors
    code, _, errors = verb("resume", config.run_dir)
    assert (code, f"process {first.pid}" in errors) == (1, True)
    assert contents(config.run_dir) == before
    os.kill(first.pid, signal.SIGCONT)
    wait_all([first])
    assert len(CheckpointStore(config.checkpoints).attempts()) == 1
    assert RunDirectory(config.run_dir).config.read_bytes() == settings
    assert final_digest(config)[0] == 1600


def test_a_take_over_ends_the_first_start(make_config: MakeConfig, verb: Verb) -> None:
    config = make_config(training__total_kimg=64, checkpoint__every_kimg=0.16)
    (first,) = start_ranks(config, 1)
    wait_for_rows(RunDirectory(config.run_dir).metrics, 15, first)
    store = CheckpointStore(config.checkpoints)
    nimg = store.lineage()[0].nimg + 1000
    shorter = f"training.total_kimg={nimg / 1000:g}"
    code, _, errors = verb("resume", config.run_dir, "--take-over", shorter)
    assert code == 0, errors
    _, errors = first.communicate(timeout=600)
    assert first.returncode == 1
    assert "a newer one has begun" in errors
    assert len(store.attempts()) == 2


@pytest.fixture
def finished(make_config: MakeConfig) -> Config:
    """A run that knows its run in W&B."""
    config = make_config()
    write_text(config.run_dir / POSITIONS, json.dumps(dict.fromkeys(FOLLOWED, 100)))
    RunDirectory(config.run_dir).wandb_run_id.write_text("original")
    start(config, QUIET)
    return config


def resumed(folder: Path) -> tuple[tuple[int, str], str, str]:
    """Resume a run: position and digest of its weights, its W&B run, and what the console said."""
    said = io.StringIO()
    config = resume_config(str(folder), dict(LONGER))
    start(config, Console(file=said, width=1000))
    return final_digest(config), RunDirectory(folder).wandb_run_id.read_text(), said.getvalue()


@pytest.mark.parametrize("place", ["elsewhere/tiny", "renamed", "elsewhere/renamed"])
def test_a_run_that_was_moved_or_renamed_is_the_same_run(
    finished: Config, tmp_path: Path, place: str
) -> None:
    folder = tmp_path / place
    folder.parent.mkdir(exist_ok=True)
    finished.run_dir.rename(folder)
    for _ in range(2):  # and then it is where it was
        (nimg, _), wandb_run_id, said = resumed(folder)
        assert (nimg, wandb_run_id) == (320, "original")
        assert "copy" not in said
    assert not finished.run_dir.exists()


def test_a_copied_run_is_a_run_of_its_own_and_the_original_stays(
    finished: Config, tmp_path: Path
) -> None:
    copy = tmp_path / "copies" / "tiny"
    shutil.copytree(finished.run_dir, copy)
    before = contents(finished.run_dir)
    digest, wandb_run_id, said = resumed(copy)
    assert contents(finished.run_dir) == before
    assert wandb_run_id not in ("original", "")
    assert json.loads((copy / POSITIONS).read_text()) == dict.fromkeys(FOLLOWED, 0)  # of none of it
    assert f"{copy} is a copy of {finished.run_dir}" in said
    events = read_rows(RunDirectory(copy).events)
    assert [e.get("copied_from") for e in events if e["event"] in ("start", "resume")] == [
        None,
        str(finished.run_dir),
    ]
    again = resumed(copy)
    assert again[:2] == (digest, wandb_run_id)
    assert "is a copy of" not in again[2]
    original = resumed(finished.run_dir)
    assert original[:2] == (digest, "original")
    assert "is a copy of" not in original[2]


def test_a_link_to_a_run_is_no_copy(finished: Config, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(finished.run_dir)
    assert resumed(link)[1] == "original"


def test_the_copy_of_a_live_run_is_free(finished: Config, tmp_path: Path) -> None:
    longer = finished.with_changes(LONGER)
    with run_session(longer, QUIET) as held:
        assert held is not None
        train_in_process(longer, held.session)
        copy = tmp_path / "copy"
        shutil.copytree(finished.run_dir, copy)
        with pytest.raises(RunInUse):
            resumed(finished.run_dir)
        assert resumed(copy)[0] == final_digest(longer)
    resumed(finished.run_dir)


def test_a_renamed_run_whose_checkpoints_are_elsewhere_says_what_to_rename(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(checkpoint__location=str(tmp_path / "checkpoints"))
    start(config, QUIET)
    renamed = config.run_dir.rename(tmp_path / "renamed")
    with pytest.raises(CheckpointError, match="renamed from tiny, but its checkpoints were not"):
        resume_config(str(renamed), {})


def test_of_torchruns_ranks_only_the_first_speaks(make_config: MakeConfig) -> None:
    config = make_config(training__total_kimg=64, tracking__log_every_kimg=0.016)
    ranks = start_ranks(config, 2)
    wait_for_rows(RunDirectory(config.run_dir).metrics, 3, ranks[0])
    for rank in ranks:
        rank.terminate()
    first, second = [rank.communicate(timeout=600)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143]
    assert "start at 0 kimg: 2 workers" in first
    assert first.count("SIGTERM: finishing the step") == 1
    assert second == ""


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a cluster of one node with one CPU and no GPU."""
    with tempfile.TemporaryDirectory(prefix="gs", ignore_cleanup_errors=True) as folder:
        port = free_port()
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        options = [f"--port={port}", "--num-cpus=1", "--num-gpus=0", "--include-dashboard=false"]
        node = subprocess.Popen(
            [*command, *options],
            env={**os.environ, "RAY_TMPDIR": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert node.stdout is not None
        lines = []
        for line in node.stdout:
            lines.append(line)
            if "Ray runtime started" in line:
                break
        else:
            raise AssertionError("".join(lines))
        yield f"127.0.0.1:{port}"
        for process in psutil.Process(node.pid).children(recursive=True):
            process.kill()
        node.kill()
        node.communicate()


@pytest.mark.slow
def test_waiting_for_what_is_not_there_says_what_and_ends_at_once(
    make_config: MakeConfig, head: str
) -> None:
    config = make_config()
    start(config, QUIET)
    before = contents(config.run_dir)
    waiting = subprocess.Popen(
        [sys.executable, "-m", "ganscale", "train", "--config", str(written(config))]
        + ["launch.backend=ray", f"launch.ray_address={head}", "launch.use_gpu=true"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr is not None
    assert waiting.stderr.readline() == (
        "waiting for 1 worker(s): each takes 1 CPU and 1 GPU; the cluster has 1 CPU and 0 GPU on "
        "1 node(s), of which 1 CPU and 0 GPU free\n"
    )
    assert contents(config.run_dir) == before
    waiting.send_signal(signal.SIGINT)
    began = time.monotonic()
    output, errors = waiting.communicate(timeout=600)
    print(f"ended {time.monotonic() - began:.1f} s after SIGINT")
    assert waiting.returncode == 130
    assert errors == "\nganscale: SIGINT: no longer waiting for room\n"
    assert output == "interrupted before there was room to train: the run is as it was\n"
    assert contents(config.run_dir) == before
    start(resume_config(str(config.run_dir), dict(LONGER)), QUIET)
    assert final_digest(config)[0] == 320


@pytest.mark.slow
def test_what_cannot_fit_on_a_ray_of_our_own_is_refused_with_the_fix(
    make_config: MakeConfig, head: str
) -> None:
    refused: dict[str, dict[str, Any]] = {
        "needs 1 CPU and 1 GPU, .* has 1 CPU and 0 GPU: set launch.use_gpu=false": {
            "launch__use_gpu": True
        },
        "needs 2 CPU, .* has 1 CPU: set launch.num_workers=1": {"launch__num_workers": 2},
        "needs 3 CPU, .* set a smaller launch.cpus_per_worker": {"launch__cpus_per_worker": 3},
    }
    with cluster(head):
        for message, settings in refused.items():
            with pytest.raises(ConfigError, match=message):
                require_capacity(make_config(launch__backend="ray", **settings))
        require_capacity(make_config(launch__backend="ray", launch__num_workers=(1, 8)))
