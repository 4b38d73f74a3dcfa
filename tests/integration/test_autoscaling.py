"""Runs on a cluster whose nodes Ray's autoscaler starts, as processes of this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ganscale.run_directory import RunDirectory
from ganscale.tracking.history import History
from tests.conftest import MakeConfig

ROOT = Path(__file__).parents[2]
HEAD = "f" * 51 + "00000"
NODES = {
    "cluster_name": "own",
    "max_workers": 3,
    "provider": {"type": "fake_multinode", "head_node_id": HEAD, "disable_node_updaters": True},
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "small": {
            "resources": {"CPU": 1, "object_store_memory": 80_000_000},
            "node_config": {}, "min_workers": 0, "max_workers": 3,
        },
    },
    "head_node_type": "ray.head.default",
    "upscaling_speed": 10.0,
    "idle_timeout_minutes": 10,
    "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [],
    "file_mounts_sync_continuously": False, "initialization_commands": [], "setup_commands": [],
    "head_setup_commands": [], "worker_setup_commands": [],
    "head_start_ray_commands": [], "worker_start_ray_commands": [],
}  # fmt: skip
IN_THE_HEAD = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
    "RAY_CLOUD_INSTANCE_ID": HEAD,
    "RAY_worker_niceness": "0",
}


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="NOT CHECKED: a cluster that starts nodes of its own needs a container, thus root",
)
@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kimg"), [("2", 1.0), ("[1,2]", 6.0)])
def test_a_run_is_given_nodes_that_were_not_there(
    workers: str, kimg: float, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(training__total_kimg=kimg)
    file, nodes = tmp_path / "tiny.yaml", tmp_path / "nodes.json"
    file.write_text(config.to_yaml())
    nodes.write_text(json.dumps(NODES))
    ray = f"{sys.executable} -m ray.scripts.scripts"
    inside = f"""
        ip link set lo up
        {ray} start --head --port=6379 --num-cpus=0 --object-store-memory=100000000 \
            --autoscaling-config={nodes} --temp-dir=/tmp/ray > {tmp_path}/head.log 2>&1
        unset RAY_OVERRIDE_NODE_ID_FOR_TESTING
        {sys.executable} -m ganscale train --config {file} 'launch.num_workers={workers}' \
            launch.backend=ray launch.ray_address=127.0.0.1:6379
    """
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net"]
    done = subprocess.run(
        [*container, "bash", "-c", inside],
        env={**os.environ, **IN_THE_HEAD}, capture_output=True, text=True, timeout=600, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDirectory(config.run_dir)
    assert "waiting for" in done.stderr
    newest = History.read(run).rows[-1]
    assert newest["workers/1/memory_gib"] > 0.0
