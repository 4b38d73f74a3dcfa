"""Ray that is started here while the command does something else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import ray

from ganscale.config import Config
from ganscale.errors import ConfigError
from ganscale.launch import ray_cluster
from ganscale.launch.ray_cluster import cluster, started_early


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run with shards, as Ray is started early for no other. No variable of Ray's is set."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setattr(ray_cluster, "_RAY_ENVIRONMENT", {})
    monkeypatch.setattr(ray_cluster, "_OWN_CLUSTER", {})
    (tmp_path / "index.json").touch()
    return Config().with_changes({"launch.backend": "ray", "data.shards": str(tmp_path)})


def test_an_error_of_the_block_is_not_replaced_by_one_of_ray_s_start(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting, ends = threading.Event(), threading.Event()

    def fail(**options: object) -> None:
        starting.set()
        raise OSError("no room in /tmp")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "shutdown", ends.set)
    with pytest.raises(ConfigError, match="no such preset"), started_early(config):
        raise ConfigError("no such preset")
    assert starting.is_set()
    assert ends.is_set()
    with pytest.raises(OSError, match="no room"), started_early(config), cluster(None):
        pytest.fail("there is no cluster")
