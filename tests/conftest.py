"""Small shard sets and configurations that the tests train on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from ganscale.cli import main
from ganscale.config import Config
from ganscale.data.building import build_shards
from ganscale.data.resolve_source import CIFAR10_ENV, resolve_source
from ganscale.data.shard_writer import BuiltShard
from ganscale.data.sources import SourceSpec
from ganscale.metrics import extractors
from tests.support import processes  # noqa: F401  (says what the server imports)

MakeConfig = Callable[..., Config]
Verb = Callable[..., tuple[int, str, str]]


# Tests of these files start Ray, which takes both cores of a small machine for some seconds. They
# share one process of pytest, so that no two of their clusters are up at the same time.
RAY_FILES = {
    f"test_{name}.py" for name in ("ray", "jobs", "user_trainer", "sweep", "grafana", "autoscaling")
}
# What these directories hold runs for minutes, so it comes first; the others fill what is left.
LONG_FIRST = ("integration", "faults", "distributed", "docs", "unit")


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """Gives the tests of a file to one process, so that their fixtures are made once."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "ray" if Path(file).name in RAY_FILES else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def key(item: pytest.Item) -> tuple[bool, int]:
        directory = item.path.relative_to(Path(__file__).parent).parts[0]
        return item.path.name not in RAY_FILES, LONG_FIRST.index(directory)

    items.sort(key=key)


@pytest.fixture(scope="session", autouse=True)
def warm_server() -> None:
    """Start what `tests.support.processes` forks from, before a pool starts one with less in it."""
    ensure_running()


@pytest.fixture
def builds_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are built in the test's own process: starting others takes seconds."""

    def run(
        function: Callable[..., BuiltShard],
        jobs: Sequence[tuple[Any, ...]],
        progress: Callable[[int], None],
    ) -> list[BuiltShard]:
        built = []
        for job in jobs:
            built.append(function(*job))
            progress(built[-1].shard.num_samples)
        return built

    monkeypatch.setattr("ganscale.data.building.run_in_processes", run)


@pytest.fixture(scope="session")
def procedural_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 procedural images in 12 shards of 41 or 42: divides by 2, 3 and 4 workers, unevenly."""
    root = tmp_path_factory.mktemp("shards") / "procedural"
    build_shards(SourceSpec("procedural"), root, num_shards=12, limit=500)
    return root


@pytest.fixture(scope="session")
def spectrogram_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """350 spectrograms, float32 of 32x32, in 7 shards."""
    root = tmp_path_factory.mktemp("shards") / "spectrograms"
    build_shards(SourceSpec("spectrograms"), root, num_shards=7, limit=350, resolution=32)
    return root


def real_source() -> str:
    """CIFAR-10 where GANSCALE_CIFAR10 names it, else the procedural set of the same shape."""
    return "cifar10" if os.environ.get(CIFAR10_ENV) else "procedural"


@pytest.fixture(scope="session")
def image_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 images of `real_source` in 16 shards."""
    root = tmp_path_factory.mktemp("shards") / "images"
    spec, _ = resolve_source(real_source(), "train", download_dir=root)
    build_shards(spec, root, num_shards=16, limit=2000)
    return root


@pytest.fixture(scope="session")
def cifar10_shards(image_shards: Path) -> Path:
    """Those, where they are real CIFAR-10 images, for what only these show."""
    if real_source() != "cifar10":
        pytest.skip(f"{CIFAR10_ENV} is not set")
    return image_shards


@pytest.fixture
def make_config(tmp_path: Path, procedural_shards: Path) -> MakeConfig:
    """A tiny run in `tmp_path`; keyword arguments are dotted names with __ for the dot."""

    def make(**changes: Any) -> Config:
        base = {
            "name": "tiny",
            "storage": str(tmp_path),
            "data.shards": str(procedural_shards),
            "model": {"base_channels": 8, "z_dim": 16},
            "training.batch_size": 16,
            "training.total_kimg": 0.16,
            "samples.num_images": 4,
            "tracking.wandb": "disabled",
            "tracking.log_every_kimg": 0.016,
            "launch.backend": "inprocess",
        }
        named = {name.replace("__", "."): value for name, value in changes.items()}
        return Config().with_changes({**base, **named})

    return make


@pytest.fixture
def verb(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Verb:
    """Runs the command, without Inception, which is slow; its exit code, output and errors."""
    for name in ("RANK", "GANSCALE_INCEPTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GANSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(extractors, "packaged_weights", lambda: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments)])
        streams = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, streams.out, streams.err

    return run
