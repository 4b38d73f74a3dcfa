"""What a start does before training: one set of shards for all ranks, and for all of a run."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import ganscale
from ganscale.checkpoint import CheckpointStore, Holder, Session
from ganscale.config import Config
from ganscale.data.building import build_shards
from ganscale.data.reader import ShardImages
from ganscale.data.shards import ShardSet
from ganscale.data.sources import SourceSpec
from ganscale.errors import CheckpointError, ConfigError, GanscaleError
from ganscale.launch import resolve_run as module
from ganscale.launch.held_run import HeldRun
from ganscale.launch.resolve_run import prepare_shards
from ganscale.launch.start import resume_config, start, supervisor_of
from ganscale.run_directory import RunDirectory
from ganscale.training.loop import Trainer
from tests.conftest import MakeConfig
from tests.support.processes import FORKED


def shards_of_rank(rank: int, settings: dict[str, str], shards: Any) -> None:
    """Put what rank `rank` of three trains on into the queue `shards`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3"}
    config = Config().with_changes(settings)
    shards.put(prepare_shards(config, Console(stderr=True)).data.shards)


def folder_of_images(root: Path, num_images: int = 100) -> Path:
    root.mkdir()
    rng = np.random.default_rng(0)
    for number in range(num_images):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:03d}.png")
    return root


def test_ranks_that_come_all_at_once_build_one_set(tmp_path: Path) -> None:
    source = folder_of_images(tmp_path / "images")
    settings = {"storage": str(tmp_path / "runs"), "data.source": str(source)}
    shards = FORKED.Queue()
    ranks = [
        FORKED.Process(target=shards_of_rank, args=(rank, settings, shards)) for rank in range(3)
    ]
    for rank in ranks:
        rank.start()
    (place,) = {shards.get(timeout=600) for _ in ranks}
    for rank in ranks:
        rank.join()
    assert (Path(place) / "index.json").is_file()


def change_nothing(images: Path) -> None:
    pass


def add_one(images: Path) -> None:
    shutil.copy(images / "000.png", images / "100.png")


def change_one(images: Path) -> None:
    shutil.copy(images / "000.png", images / "050.png")


def remove_one(images: Path) -> None:
    (images / "099.png").unlink()


@pytest.mark.usefixtures("builds_here")
@pytest.mark.parametrize("by_environment", [False, True])
@pytest.mark.parametrize("change", [change_nothing, add_one, change_one, remove_one])
def test_shards_are_built_anew_when_the_images_changed(
    change: Callable[[Path], None],
    by_environment: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = folder_of_images(tmp_path / "images")
    source = "cifar10" if by_environment else str(images)
    monkeypatch.setenv("GANSCALE_CIFAR10", str(images))
    config = Config().with_changes({"storage": str(tmp_path / "runs"), "data.source": source})
    first = prepare_shards(config, Console(quiet=True)).data.shards
    assert first is not None
    change(images)
    output = io.StringIO()
    second = prepare_shards(config, Console(file=output)).data.shards
    assert second is not None
    now = sorted(path.name for path in images.iterdir())
    stored = ShardImages(ShardSet.load(second))
    found = {image.tobytes() for image in stored.read(np.arange(len(now))).pixels.numpy()}
    wanted = {np.asarray(Image.open(images / name)).transpose(2, 0, 1).tobytes() for name in now}
    assert found == wanted
    assert (second == first) == (change is change_nothing)
    assert ("building a new set" in output.getvalue()) == (second != first)
    assert ShardSet.load(first).num_samples == 100


def test_a_script_that_trains_at_its_top_level_builds_its_shards(tmp_path: Path) -> None:
    """Processes that build must not import the script, which would train in each of them."""
    images = folder_of_images(tmp_path / "images")
    changes = [
        "name=first",
        f"data.source={images}",
        "model.base_channels=8",
        "model.z_dim=16",
        "training.batch_size=16",
        "training.total_kimg=0.032",
        "tracking.wandb=disabled",
        "launch.backend=inprocess",
        "launch.num_workers=1",
    ]
    script = tmp_path / "first.py"
    script.write_text(f'import ganscale\n\nganscale.train("quickstart", {changes})\n')
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, timeout=600, check=True)
    assert ganscale.Run(tmp_path / "runs/first").nimg == 32


@pytest.mark.usefixtures("builds_here")
def test_a_run_that_has_begun_keeps_its_shards_and_says_that_its_source_changed(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    images = folder_of_images(tmp_path / "images")
    config = make_config(data__shards=None, data__source=str(images))
    start(config, Console(quiet=True))
    kept = prepare_shards(config, Console(quiet=True)).data.shards
    add_one(images)
    output = io.StringIO()
    assert prepare_shards(config, Console(file=output)).data.shards == kept
    assert "has changed since" in output.getvalue()
    other = config.with_changes({"name": "other"})
    assert prepare_shards(other, Console(quiet=True)).data.shards != kept


def test_a_run_whose_whole_storage_was_moved_finds_its_shards(
    make_config: MakeConfig, procedural_shards: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    shards = storage / "shards" / "procedural-train"
    shutil.copytree(procedural_shards, shards)
    config = make_config(storage=str(storage), data__shards=str(shards))
    start(config, Console(quiet=True))
    moved = storage.rename(tmp_path / "moved")
    longer = resume_config(str(moved / config.name), {"training.total_kimg": 0.32})
    assert longer.data.shards == str(moved / "shards" / "procedural-train")
    assert start(longer, Console(quiet=True)).nimg == 320


def test_a_run_keeps_its_shards_whatever_its_source_would_be_today(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a download has failed on the first day and works on the second."""
    config = make_config(data__source="auto")
    start(config, Console(quiet=True))
    monkeypatch.setattr(module, "resolve_source", lambda *_, **__: pytest.fail("asked again"))
    again = config.with_changes({"data.shards": None})
    assert prepare_shards(again, Console(quiet=True)).data.shards == config.data.shards
    other = again.with_changes({"data.source": "cifar10"})
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        prepare_shards(other, Console(quiet=True))


def test_a_run_does_not_go_on_with_other_images(
    make_config: MakeConfig, procedural_shards: Path, tmp_path: Path
) -> None:
    config = make_config()
    start(config, Console(quiet=True))
    other = tmp_path / "other"
    build_shards(SourceSpec("procedural"), other, num_shards=12, limit=501)
    longer = config.with_changes({"training.total_kimg": 0.32, "data.shards": str(other)})
    file = RunDirectory(config.run_dir).config
    written = file.read_text()
    with pytest.raises(ConfigError, match="other is not the shard set that this run was trained"):
        start(longer, Console(quiet=True))
    # Or `ganscale resume` would be refused as well.
    assert file.read_text() == written
    moved = tmp_path / "moved"
    shutil.copytree(procedural_shards, moved)
    ending = start(longer.with_changes({"data.shards": str(moved)}), Console(quiet=True))
    assert ending.nimg == 320


def test_a_run_of_another_version_is_told_apart_from_a_damaged_one(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, state_dict = make_config(), Trainer._state_dict

    def without_digest(trainer: Trainer) -> dict[str, object]:
        return {name: value for name, value in state_dict(trainer).items() if name != "shards"}

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_state_dict", without_digest)
        start(config, Console(quiet=True))
    longer = config.with_changes({"training.total_kimg": 0.32})
    with pytest.raises(CheckpointError, match=r"tiny has no 'shards': it is of another version"):
        start(longer, Console(quiet=True))


def test_the_newest_position_outlasts_a_store_that_is_away(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(data__store_deadline_seconds=0.5)
    answers: list[object] = [OSError("reset"), [], OSError("reset"), OSError("refused")]

    def lineage(self: object) -> object:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr("ganscale.checkpoint.CheckpointStore.lineage", lineage)

    def newest_nimg_of_another_start() -> Callable[[], int]:
        store = CheckpointStore(config.checkpoints)
        held = HeldRun(store, Session(Holder.here(config.run_dir), 0))
        return supervisor_of(config, held, Console(quiet=True))._newest_nimg

    newest_nimg = newest_nimg_of_another_start()
    assert newest_nimg() == -1
    assert newest_nimg() == -1
    with pytest.raises(
        GanscaleError,
        match=r"checkpoints cannot be reached within 0\.5 s, .*; last: OSError: refused",
    ):
        newest_nimg_of_another_start()()
