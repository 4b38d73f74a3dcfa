"""A run that logs online to a W&B server on this machine, which is killed in mid-run.

    python -m venv /tmp/openwandb && /tmp/openwandb/bin/pip install openwandb==0.5.25
    python -m tests.soaks.wandb_server --shards data/cifar10-train --openwandb /tmp/openwandb

openwandb is not part of ganscale (CC-BY-NC-4.0) and has an environment of its own. Two runs train
without Ray. The first logs to the server from its begin to its end: the server must have its rows,
and pictures. In the second the server is killed with SIGKILL once it has rows: training
must go on to its end at once, say so, and end with the first one's weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ganscale.config import Config
from ganscale.run_directory import RunDirectory
from tests.soaks.runs import add_arguments, newest, small_run, write_config
from tests.support.ranks import free_port
from tests.support.runs import read_rows
from tests.support.wandb_server import KEY


def main() -> None:
    """Both runs; exit code 1 if one of them is not as it should be."""
    arguments = _arguments()
    undisturbed = _run_config(arguments, "wandb-online")
    with tempfile.TemporaryDirectory(prefix="gs") as folder:
        server = OpenWandb(arguments.openwandb, Path(folder))
        seconds = _train(undisturbed, server)
        found = server.contents()
        disturbed = _run_config(arguments, "wandb-killed")
        seconds_killed = _train(disturbed, server, kill=True)
    problems = [*_compare_rows(undisturbed, found), *_look_at(disturbed)]
    if newest(disturbed) != newest(undisturbed):
        problems.append("the weights differ")
    figures = {
        "rows on the server": len(found["rows"]),
        "pictures": found["num_pictures"],
        "seconds": round(seconds, 1),
        "seconds with the server killed": round(seconds_killed, 1),
        "told": [event["message"] for event in _told(disturbed)],
        "weights": newest(disturbed)[1],
        "problems": problems,
    }
    print(json.dumps(figures, indent=1))
    if problems:
        sys.exit(1)


class OpenWandb:
    """The server."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self.folder = folder / "data"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [str(environment / "bin" / "openwandb"), "serve", "--host", "127.0.0.1"]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "-p", str(port), "--data-dir", str(self.folder)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 600
        while not self._answers():
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)

    def num_rows(self) -> int:
        """Rows of metrics that it has of all runs."""
        histories = self.folder.rglob("wandb-history.jsonl")
        return sum(len(read_rows(path)) for path in histories)

    def contents(self) -> dict[str, Any]:
        """What it has of the run: rows and pictures."""
        (history,) = self.folder.rglob("wandb-history.jsonl")
        return {
            "rows": [row for row in read_rows(history) if "train/loss_D" in row],
            "num_pictures": len([*history.parent.rglob("media/images/samples_*.png")]),
        }

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False


def _run_config(arguments: argparse.Namespace, name: str) -> Config:
    return small_run(
        arguments,
        name,
        tracking__wandb="online",
        samples__every_kimg=1,
        checkpoint__snapshot_every_kimg=5,
        launch__backend="inprocess",
        launch__num_workers=1,
    )


def _train(config: Config, server: OpenWandb, *, kill: bool = False) -> float:
    """Seconds that the run took. The server is killed when it has some of its rows."""
    before = server.num_rows()
    began = time.monotonic()
    run = subprocess.Popen(
        [sys.executable, "-m", "ganscale", "train", "--config", str(write_config(config))],
        env={
            **os.environ,
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": KEY,
            "WANDB_MODE": "online",
            # A short run may end before wandb's pause of 15 s does.
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",
        },
        stdout=subprocess.DEVNULL,
    )
    while kill and server.num_rows() < before + 10:
        assert run.poll() is None, "the run ended before the server had rows of it"
        time.sleep(0.2)
    if kill:
        server.process.kill()
        server.process.wait()
    assert run.wait() == 0
    return time.monotonic() - began


def _compare_rows(config: Config, found: dict[str, Any]) -> list[str]:
    """What the server lacks of metrics.jsonl."""
    written = read_rows(RunDirectory(config.run_dir).metrics)
    problems = [] if len(written) == len(found["rows"]) else ["the server lacks rows"]
    for mine, theirs in zip(written, found["rows"], strict=False):
        wrong = {name for name, value in mine.items() if theirs.get(name) != value}
        if wrong:
            problems.append(f"step {mine['step']}: {sorted(wrong)} differ")
    pictures = len([*RunDirectory(config.run_dir).root.glob("samples/*.png")])
    if found["num_pictures"] != pictures:
        problems.append(f"{found['num_pictures']} of {pictures} pictures")
    return problems


def _look_at(config: Config) -> list[str]:
    """What is wrong with the run whose server was killed."""
    run_dir = RunDirectory(config.run_dir)
    steps = [row["step"] for row in read_rows(run_dir.metrics)]
    problems = [] if steps == sorted(set(steps)) else ["rows are missing"]
    if newest(config)[0] != config.total_nimg:
        problems.append("the run did not reach its end")
    if not any("wandb sync" in event["message"] for event in _told(config)):
        problems.append("nothing was said of what W&B did not take")
    return problems


def _told(config: Config) -> list[dict[str, Any]]:
    events = read_rows(RunDirectory(config.run_dir).events)
    return [event for event in events if event["event"] == "wandb"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument(
        "--openwandb", type=Path, required=True, help="The environment that has openwandb."
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
