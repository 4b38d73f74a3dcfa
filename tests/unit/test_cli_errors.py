"""Whatever goes wrong, the command line says it in one line and exits with the right code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ganscale.cli import main
from ganscale.generation.sampling import save_snapshot
from ganscale.models import build_generator
from tests.conftest import MakeConfig

VERBS = (
    ("train",),
    ("resume",),
    ("sample",),
    ("doctor",),
    ("shards", "build"),
    ("shards", "verify"),
    ("shards", "info"),
    ("checkpoint", "list"),
    ("checkpoint", "verify"),
    ("evaluate",),
    ("tournament",),
    ("stability",),
    ("rate",),
)

Refusal = Callable[..., tuple[int, str]]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """Runs a command that must fail; gives its exit code and its one line."""
    monkeypatch.delenv("RANK", raising=False)

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        streams = capsys.readouterr()
        assert streams.out == ""
        assert "Traceback" not in streams.err
        (line,) = streams.err.splitlines()
        assert line.startswith("ganscale: ")
        assert isinstance(stop.value.code, int)
        return stop.value.code, line

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["training.batchsize=3"], "did you mean 'training.batch_size'"),
        (["training.batch_size=many"], "training.batch_size='many'"),
        (["--config", "quikstart"], "did you mean 'quickstart'"),
        (["--config", "absent.yaml"], "no such config file: absent.yaml"),
        (["seed"], "expected section.field=value"),
        (["training.batch_size=2", "launch.num_workers=2"], "at least 2 images"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_wrong_setting_exits_with_2(
    refusal: Refusal, arguments: list[str], words: str, options: list[str]
) -> None:
    code, line = refusal("train", *options, *arguments)
    assert code == 2
    assert words in line


def train_on(refusal: Refusal, tmp_path: Path, shards: Path) -> tuple[int, str]:
    return refusal(
        "train",
        f"data.shards={shards}",
        f"storage={tmp_path / 'runs'}",
        "launch.backend=inprocess",
        "launch.num_workers=1",
        "tracking.wandb=disabled",
    )


def test_training_on_a_missing_set_exits_with_1(refusal: Refusal, tmp_path: Path) -> None:
    code, line = train_on(refusal, tmp_path, Path("/nonexistent"))
    assert code == 1
    assert "/nonexistent" in line
    assert not (tmp_path / "runs").exists()


def test_training_on_an_empty_folder_exits_with_1(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, line = train_on(refusal, tmp_path, tmp_path / "empty")
    assert code == 1
    assert "is empty" in line


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}'])
def test_training_on_a_damaged_index_exits_with_1(
    refusal: Refusal, tmp_path: Path, content: str
) -> None:
    (tmp_path / "index.json").write_text(content)
    code, line = train_on(refusal, tmp_path, tmp_path)
    assert code == 1
    assert "index.json is damaged" in line


@pytest.mark.parametrize("verb", ["info", "verify"])
def test_looking_at_a_folder_that_is_no_shard_set_exits_with_1(
    refusal: Refusal, tmp_path: Path, verb: str
) -> None:
    code, line = refusal("shards", verb, str(tmp_path))
    assert code == 1
    assert str(tmp_path) in line


def test_building_over_something_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["shards", "build", "--source", "procedural", "--out", str(tmp_path)])
    assert stop.value.code == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith(f"ganscale: {tmp_path} exists")


def test_a_wrong_split_exits_with_2(refusal: Refusal, tmp_path: Path) -> None:
    code, line = refusal("shards", "build", "--split", "valid", "--out", str(tmp_path / "set"))
    assert code == 2
    assert "valid" in line


def test_resuming_what_is_no_run_exits_with_1(refusal: Refusal, tmp_path: Path) -> None:
    code, line = refusal("resume", str(tmp_path))
    assert code == 1
    assert "is not a run" in line


def test_resuming_a_run_without_checkpoints_exits_with_1(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    code, line = refusal("resume", str(tmp_path))
    assert code == 1
    assert "no checkpoint" in line


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_asking_for_checkpoints_where_there_are_none_exits_with_1(
    refusal: Refusal, tmp_path: Path, verb: str
) -> None:
    code, line = refusal("checkpoint", verb, str(tmp_path))
    assert code == 1
    assert "no checkpoints" in line


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a sound snapshot."""
    spec = {
        "name": "dcgan",
        "resolution": 16,
        "img_channels": 3,
        "num_classes": 0,
        "z_dim": 4,
        "base_channels": 4,
    }
    path = tmp_path_factory.mktemp("snapshot") / "sound.safetensors"
    torch.manual_seed(0)
    save_snapshot(path, build_generator(spec), spec=spec, nimg=1)
    return path.read_bytes()


def test_sampling_from_a_sound_snapshot_exits_with_0(
    snapshot: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sound.safetensors"
    path.write_bytes(snapshot)
    with pytest.raises(SystemExit) as stop:
        main(["sample", str(path), "--num", "2", "--out", str(tmp_path / "grid.png")])
    assert stop.value.code == 0
    assert (tmp_path / "grid.png").is_file()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "header", "metadata", "tensor"])
def test_sampling_from_a_damaged_snapshot_exits_with_1(
    refusal: Refusal, snapshot: bytes, tmp_path: Path, damage: str
) -> None:
    damaged = {
        "empty": b"",
        "text": b"not a snapshot at all",
        "truncated": snapshot[:-100],
        "header": b"\xff" + snapshot[1:],
        "metadata": snapshot.replace(b"z_dim", b"y_dim", 1),
        "tensor": snapshot.replace(b".weight", b".wEight", 1),
    }
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged[damage])
    code, line = refusal("sample", str(path), "--out", str(tmp_path / "grid.png"))
    assert code == 1
    assert str(path) in line
    assert not (tmp_path / "grid.png").exists()


def test_sampling_from_nothing_exits_with_1(refusal: Refusal, tmp_path: Path) -> None:
    code, line = refusal("sample", str(tmp_path / "absent"))
    assert code == 1
    assert str(tmp_path / "absent") in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["train", "--nonsense"],
        ["sample"],
        ["sample", "runs/first", "--num", "none"],
        ["sample", "runs/first", "--num", "0"],
        ["shards", "build"],
    ],
)
def test_wrong_use_of_the_command_line_exits_with_2(refusal: Refusal, arguments: list[str]) -> None:
    code, _ = refusal(*arguments)
    assert code == 2


def test_debug_shows_the_traceback_before_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--debug", "shards", "info", str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("ganscale: ")


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_shows_an_example(verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*verb, "--help"])
    assert stop.value.code == 0
    assert f"Example: ganscale {' '.join(verb)}" in capsys.readouterr().out


def test_a_run_is_not_gone_on_with_under_other_settings(
    refusal: Refusal, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config()
    checkpoint = config.run_dir / "checkpoints" / "nimg-000000000016-a0001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    other = tmp_path / "other.yaml"
    sections = {"model": {"name": "r3gan", "base_channels": 16}, "optimizer.lr": 1e-3}
    other.write_text(config.with_changes(sections).to_yaml())
    code, line = refusal("train", "--config", str(other))
    assert code == 2
    for change in ("model.name: 'dcgan' -> 'r3gan'", "optimizer.lr: 0.0002 -> 0.001"):
        assert change in line
    assert "model.blocks_per_stage: None -> 2" in line


@pytest.mark.parametrize(
    ("asked", "count"),
    [({}, "3000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_waiting_threads_sleep_unless_the_user_says_how_they_wait(
    asked: dict[str, str], count: str | None
) -> None:
    unset = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    code = (
        "import atexit, os, sys; from ganscale.cli import main;"
        "atexit.register(lambda: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules));"
        "main(['--help'])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], env=unset | asked, capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines()[-1] == f"{count} False"
