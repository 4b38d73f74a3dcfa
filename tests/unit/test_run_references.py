"""Runs are named by a folder, RUN@KIMG, or a file within; what may change on resume is one list."""

from __future__ import annotations

from pathlib import Path

import pytest

from ganscale.config import Config
from ganscale.config.changes import changed_settings
from ganscale.errors import ConfigError
from ganscale.evaluation.run_references import RunReference, default_reference
from ganscale.run_directory import RunDirectory, containing_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run whose shards lie beside it, with a snapshot of a further average."""
    run_dir = RunDirectory(tmp_path / "runs" / "a")
    run_dir.snapshot(1000, "short").parent.mkdir(parents=True)
    run_dir.snapshot(1000, "short").touch()
    shards = tmp_path / "runs" / "shards" / "set-train"
    shards.mkdir(parents=True)
    changes = {"data.shards": str(shards), "storage": str(tmp_path / "runs")}
    run_dir.config.write_text(Config().with_changes(changes).to_yaml())
    return run_dir.root


@pytest.mark.parametrize(("suffix", "kimg"), [("", None), ("@12.5", 12.5), ("@0", 0.0)])
def test_a_position_follows_the_last_at(tmp_path: Path, suffix: str, kimg: float | None) -> None:
    for name in ("run", "team@home"):
        (tmp_path / name).mkdir()
        assert RunReference.parse(f"{tmp_path / name}{suffix}") == RunReference(
            tmp_path / name, kimg
        )


def test_a_path_that_exists_is_itself(tmp_path: Path) -> None:
    for name in ("run@5", "snapshot@5.safetensors"):
        (tmp_path / name).touch()
        assert RunReference.parse(str(tmp_path / name)) == RunReference(tmp_path / name, None)


def test_a_position_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run@half: expected RUN or RUN@KIMG"):
        RunReference.parse(f"{tmp_path}/run@half")


def test_the_reference_is_what_the_run_was_trained_on(run: Path, tmp_path: Path) -> None:
    snapshot = RunDirectory(run).snapshot(1000, "short")
    for subject in (f"{run}", f"{run}@1", f"{snapshot}"):
        assert default_reference(subject) == str(tmp_path / "runs" / "shards" / "set-train")
    assert containing_run(snapshot) == RunDirectory(run)
    assert containing_run(tmp_path) is None
    # Of something else: no run has written here, or it lies further up.
    (tmp_path / "config.yaml").touch()
    assert containing_run(tmp_path / "models" / "g.safetensors") is None
    assert containing_run(run / "exports" / "a" / "b" / "g.safetensors") is None
    with pytest.raises(ConfigError, match="give --reference"):
        default_reference(str(tmp_path))


def test_the_reference_moves_with_the_folder_of_runs(run: Path, tmp_path: Path) -> None:
    moved = run.parent.rename(tmp_path / "moved")
    assert default_reference(f"{moved / 'a'}") == str(moved / "shards" / "set-train")
    # Nobody knows where shards are that did not come along.
    alone = (moved / "a").rename(tmp_path / "alone")
    before = tmp_path / "runs" / "shards" / "set-train"
    for option in ("--reference", "--train"):
        with pytest.raises(ConfigError, match=f"{before}, which does not exist.*give {option}"):
            default_reference(str(alone), option)


def test_shards_at_a_url_stay_there(run: Path, tmp_path: Path) -> None:
    for storage in (".", str(tmp_path)):
        assert RunDirectory(run).moved("s3://bucket/set", storage) == "s3://bucket/set"


def test_a_run_may_be_moved_and_trained_longer_but_not_differently() -> None:
    before = Config()
    moved = {"name": "b", "storage": "/c", "training.total_kimg": 7.0, "launch.num_workers": 2}
    moved["data.on_error"] = "skip"
    assert changed_settings(before, before.with_changes(moved)) == []
    other = before.with_changes({**moved, "seed": before.seed + 1, "optimizer.beta1": 0.25})
    assert changed_settings(before, other) == [
        f"seed: {before.seed} -> {before.seed + 1}",
        f"optimizer.beta1: {before.optimizer.beta1} -> 0.25",
    ]
