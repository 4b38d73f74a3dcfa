"""The board for Grafana asks for gauges that a run under Ray exports, by labels that they have."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ganscale.config import Config
from ganscale.launch import ray_metrics
from ganscale.launch.ray_metrics import prometheus_names
from tests.support.ranks import free_port

GRAFANA = Path(__file__).parents[2] / "cluster" / "grafana" / "ganscale.json"
NOT_ON_A_CPU = {"ray_ganscale_worker_gpu_memory_gib"}


def expressions() -> list[str]:
    dashboard = json.loads(GRAFANA.read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    queries += [note["expr"] for note in dashboard["annotations"]["list"]]
    queries += [v["definition"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    assert len(queries) > 20
    return queries


def asked() -> set[str]:
    """The gauges that the board asks for."""
    return {name for expr in expressions() for name in re.findall(r"\bray_ganscale_\w+", expr)}


def test_the_board_asks_for_all_gauges() -> None:
    assert asked() == prometheus_names()


def test_every_row_sets_all_gauges_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray forgets what was set before it had found the node's agent."""
    shown: set[str] = set()

    class Gauge:
        def __init__(self, name: str, text: str, tag_keys: tuple[str, ...]) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            shown.add(f"{self.name} {value:g} {tags}")

    monkeypatch.setattr(ray_metrics, "Gauge", Gauge)
    gauges = ray_metrics.RayMetrics("tiny", 64_000)
    gauges.begin([], [])
    gauges.event({"event": "start", "world_size": 2, "time": 1.0, "nimg": 0})
    shown.clear()
    gauges.log({"nimg": 1000, "step": 1})
    assert "ganscale_length_kimg 64 {'run': 'tiny'}" in shown
    assert "ganscale_workers 2 {'run': 'tiny'}" in shown
    assert "ganscale_position_kimg 1 {'run': 'tiny'}" in shown
    assert any(text.startswith("ganscale_faults 0") for text in shown)


@pytest.fixture(scope="module")
def exporting_node() -> Iterator[tuple[str, int]]:
    """A Ray cluster of one node: its address, and the port where Prometheus would ask."""
    port, metrics_port = free_port(), free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--port={port}", f"--metrics-export-port={metrics_port}", "--num-cpus=1"]
    with tempfile.TemporaryDirectory(prefix="gs", ignore_cleanup_errors=True) as folder:
        node = subprocess.Popen(
            [*command, "--include-dashboard=false", "--disable-usage-stats"],
            env={**os.environ, "RAY_TMPDIR": folder, "RAY_metrics_report_interval_ms": "1000"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert node.stdout is not None
        assert any("Ray runtime started" in line for line in node.stdout)
        # A process that finds no agent of the node's within half a minute never exports anything.
        deadline = time.time() + 180
        while not scraped(metrics_port):
            assert node.poll() is None
            assert time.time() < deadline, "the node's agent answers nobody"
            time.sleep(1)
        yield f"127.0.0.1:{port}", metrics_port
        for process in psutil.Process(node.pid).children(recursive=True):
            process.kill()
        node.kill()
        node.communicate()


def scraped(port: int) -> dict[str, list[dict[str, str]]]:
    """The labels of each series that the node exports, by the metric's name."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    found: dict[str, list[dict[str, str]]] = {}
    for name, labels in re.findall(r"^(\w+)\{(.*)\} \S+$", text, re.MULTILINE):
        found.setdefault(name, []).append(dict(re.findall(r'(\w+)="([^"]*)"', labels)))
    return found


@pytest.fixture(scope="module")
def run(
    exporting_node: tuple[str, int], procedural_shards: Path, tmp_path_factory: Any
) -> tuple[Config, dict[str, list[dict[str, str]]]]:
    """A run under Ray, and what its node exported while it trained."""
    address, port = exporting_node
    storage = tmp_path_factory.mktemp("runs")
    config = Config().with_changes(
        {
            "name": "tiny",
            "storage": str(storage),
            "data.shards": str(procedural_shards),
            "model": {"base_channels": 8, "z_dim": 16},
            "training.batch_size": 16,
            "training.total_kimg": 100,
            "augment": {"name": "ada", "p": 0.5},
            "samples.num_images": 4,
            "tracking.wandb": "disabled",
            "tracking.log_every_kimg": 0.064,
            "checkpoint.every_kimg": 0.64,
            "launch.ray_address": address,
        }
    )
    file = storage / "config.yaml"
    file.write_text(config.to_yaml())
    command = [sys.executable, "-m", "ganscale", "train", "--config", str(file)]
    wanted = prometheus_names() - NOT_ON_A_CPU
    # On a busy machine a worker may not find the node's agent in Ray's half a minute, and then
    # never exports anything; another worker does.
    for _ in range(4):
        driver = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        found, deadline = scraped(port), time.time() + 120
        while not wanted <= set(found) and time.time() < deadline:
            assert driver.poll() is None, driver.communicate()[1]
            time.sleep(0.5)
            found = scraped(port)
        driver.terminate()
        driver.communicate(timeout=600)
        if wanted <= set(found):
            return config, found
    raise AssertionError(f"not exported: {sorted(wanted - set(found))}")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # far less on a quiet machine
def test_a_run_exports_what_the_board_asks_for(run: Any) -> None:
    _, found = run
    assert asked() <= set(found) | NOT_ON_A_CPU
    assert asked() >= {name for name in found if name.startswith("ray_ganscale_")}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_grafana_groups_by_labels_that_the_series_have(run: Any) -> None:
    _, found = run
    for expression in expressions():
        for labels, name in re.findall(r"by \(([\w, ]+)\) \((ray_ganscale_\w+)", expression):
            for series in found.get(name, []):
                assert set(labels.split(", ")) <= set(series), expression
    assert all(series["run"] == "tiny" for series in found["ray_ganscale_step"])
