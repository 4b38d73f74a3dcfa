"""Whatever goes wrong, the command line says it in one line and exits with the right code."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ganscale import cli
from ganscale.cli import main
from ganscale.cli.training import _print_results
from ganscale.config import load_config
from ganscale.errors import ConfigError, describe_os_error
from ganscale.generation.snapshot import load_generator, save_snapshot
from ganscale.models import build_generator
from ganscale.training.stopping import TrainResult
from ganscale.world import check_cuda
from tests.conftest import MakeConfig, Verb

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
    ("averages",),
    ("export",),
    ("tournament",),
    ("stability",),
    ("rate",),
)

SPEC = {
    "name": "dcgan",
    "resolution": 16,
    "img_channels": 3,
    "num_classes": 0,
    "z_dim": 4,
    "base_channels": 4,
}

Refusal = Callable[..., tuple[int, str]]


def test_the_command_that_goes_on_with_a_stopped_run_is_one_for_a_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("quickstart", [f"storage={tmp_path / 'my runs'}"])
    _print_results(config, TrainResult(1000, "terminated"))
    command = capsys.readouterr().out.rpartition("to go on: ")[2]
    assert shlex.split(command) == ["ganscale", "resume", f"{tmp_path}/my runs/quickstart"]


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


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the files that the commands of `MISTAKES` name; nothing changes it."""
    root = tmp_path_factory.mktemp("workshop")
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1"))
    (root / "empty").mkdir()
    (root / "folder.yaml").mkdir()
    for name, channels in (("rgb", 3), ("rgba", 4)):
        spec = SPEC | {"img_channels": channels}
        save_snapshot(root / f"{name}.safetensors", build_generator(spec), spec=spec, nimg=1)
    return root


FILES = {
    "text": "just a file",
    "config.txt": "seed: 1\n",
    "list.yaml": "- a\n- b\n",
    "tab.yaml": "training:\n\tbatch_size: 64\n",
    "twice.yaml": "seed: 1\ntraining: {batch_size: 64}\nseed: 2\n",
    "inner.yaml": "training:\n  batch_size: 64\n  batch_size: 32\n",
    "dotted.yaml": "training.batch_size: 64\n",
    "binary.yaml": "\xff\xfe\x00",
    "typo.yaml": "traning: {batch_size: 64}\n",
    "sweep.yaml": "name: s\nconfig: quickstart\nparameters: {optimizer.lr: [1]}\n",
    "twice-sweep.yaml": "name: s\nname: t\n",
    "broken.safetensors": "not a snapshot",
    "image.png": "not an image",
    "full/kept": "",
    "begun/config.yaml": "seed: 0\n",
    "old/config.yaml": "sed: 0\n",
}

INPROCESS = "train launch.backend=inprocess tracking.wandb=disabled data.source=procedural"

# What a new user may type, the exit code, and what the one line must say.
MISTAKES = [
    # The command line itself.
    ("nonsense", 2, "No such command 'nonsense'"),
    ("trian", 2, "Did you mean 'train'"),
    ("shards bild", 2, "Did you mean 'build'"),
    ("train --nonsense", 2, "No such option: --nonsense"),
    ("train --config", 2, "'--config' requires an argument"),
    ("resume", 2, "Missing argument 'run'. See --help."),
    ("sample", 2, "Missing argument 'path'"),
    ("shards build", 2, "Missing option '--out'"),
    ("tournament begun", 2, "Missing option '--reference'"),
    ("evaluate", 2, "expected one of --run, --snapshot and --images"),
    ("train seed", 2, "expected section.field=value, got 'seed'"),
    ("train training.batch_size: 64", 2, "expected section.field=value"),
    ("train 'method={name: vae' beta=1", 2, "method.name='{name: vae': expected 'gan', 'vae'"),
    # Names of fields and choices.
    ("train training.batchsize=64", 2, "did you mean 'training.batch_size'?"),
    ("train trainning.batch_size=64", 2, "did you mean 'training.batch_size'?"),
    ("train model.name=dcgam", 2, "model.name='dcgam': expected 'dcgan', 'sngan'"),
    ("train method.name=gann", 2, "method.name='gann': expected 'gan', 'vae'"),
    ("train objective.name=hing", 2, "objective.name='hing': input should be"),
    ("train evaluation.metrics=[fud]", 2, "evaluation.metrics='fud': input should be"),
    ("train launch.backend=slurm", 2, "launch.backend='slurm': input should be 'ray' or"),
    ("train training.precision=fp8", 2, "training.precision='fp8': input should be 'auto'"),
    ("train 'method={name: encoder}'", 2, "method.generator is required"),
    # Values.
    ("train seed=-1", 2, "seed=-1: input should be greater than or equal to 0"),
    ("train seed=abc", 2, "seed='abc': input should be a valid integer"),
    ("train seed=1.5", 2, "seed=1.5: input should be a valid integer"),
    ("train seed=2026-99-99", 2, "seed='2026-99-99': input should be a valid integer"),
    ("train training.batch_size=0", 2, "training.batch_size=0: input should be greater"),
    ("train training.total_kimg=.nan", 2, "training.total_kimg=nan: input should be a finite"),
    ("train optimizer.lr=fast", 2, "optimizer.lr='fast': input should be a valid number"),
    ("train optimizer.lr=-1", 2, "optimizer.lr=-1: expected values above 0"),
    ("train augment.p=2", 2, "augment.p=2: expected values at least 0 and at most 1"),
    ("train model.resolution=48", 2, "must be a power of two, got 48"),
    ("train launch.num_workers=0", 2, "launch.num_workers=0: input should be greater than or"),
    ("train launch.num_workers=[4,2]", 2, "launch.num_workers=[4, 2] must be [min, max]"),
    ("train launch.use_gpu=maybe", 2, "launch.use_gpu='maybe': input should be a valid bool"),
    ("train name=a/b", 2, "name='a/b': expected at most 128 letters, digits"),
    (f"train name={'x' * 300}", 2, "expected at most 128 letters, digits"),
    ("train name=", 2, "name=None: input should be a valid string"),
    # What does not go together.
    ("train launch.num_workers=100", 2, "give each worker at least 2 images"),
    ("train data.cache_limit_gb=3", 2, "data.cache_limit_gb=3 limits data.cache_dir"),
    ("train guard.rollback_lr_factor=0.5", 2, "is for guard.policy=rollback, not warn: set it to"),
    (
        "train checkpoint.keep_best=2 samples.num_images=1",
        2,
        "checkpoint.keep_best=2 with checkpoint.best_metric=metrics/diversity needs two images",
    ),
    ("train training.total_kimg=0.01", 2, "is less than one batch of 64 images"),
    ("train model.num_classes=10", 2, "set model.num_classes=0, or model.name=sngan"),
    ("train objective.name=wasserstein", 2, "set penalty.wgan_gp=10"),
    ("train augment.name=ada", 2, "does nothing while augment.p=0"),
    # Configuration files.
    ("train --config quikstart", 2, "did you mean 'quickstart'?"),
    ("train --config absent.yaml", 2, "no such config file: absent.yaml"),
    ("train --config config.txt", 2, "or give a path that ends in .yaml"),
    ("train --config folder.yaml", 2, "no such config file: folder.yaml"),
    ("train --config list.yaml", 2, "list.yaml: expected sections of fields, got list"),
    ("train --config tab.yaml", 2, "tab.yaml: not valid YAML"),
    ("train --config binary.yaml", 2, "binary.yaml is not a text file"),
    ("train --config typo.yaml", 2, "did you mean 'training"),
    ("train --config twice.yaml", 2, "twice.yaml: 'seed' stands twice, in lines 1 and 3"),
    ("train --config inner.yaml", 2, "'batch_size' stands twice, in lines 2 and 3"),
    ("train --config dotted.yaml", 2, "inside its section: training: {batch_size: ...}"),
    ("train 'model={z_dim: 4, z_dim: 8}'", 2, "'z_dim' stands twice"),
    ("sweep absent.yaml", 2, "no such sweep file: absent.yaml"),
    ("sweep sweep.yaml", 2, "sweep.yaml: search is required"),
    ("sweep twice-sweep.yaml", 2, "'name' stands twice, in lines 1 and 2"),
    ("sweep folder.yaml", 1, "folder.yaml: is a directory: a folder is where a file should be"),
    # Settings of W&B.
    ("train tracking.project=a/b", 2, "tracking.project='a/b': a W&B project has 1 to 128"),
    ("train tracking.wandb=on", 2, "tracking.wandb=True: input should be 'auto', 'online'"),
    ("WANDB_MODE=ofline train", 2, "WANDB_MODE='ofline': expected online, offline or"),
    ("WANDB_FINISH_TIMEOUT=soon train", 2, "WANDB_FINISH_TIMEOUT='soon': expected a number of"),
    ("dashboard --project a/b", 2, "--project a/b: a W&B project has 1 to 128"),
    # Data.
    ("train data.shards=absent", 1, "Build it: ganscale shards build"),
    (
        "train data.shards=foo://x launch.backend=inprocess",
        2,
        "foo://x cannot be opened: expected a path, s3://",
    ),
    ("train data.source=absent", 1, "no such image source"),
    ("shards build --source absent --out new", 1, "no such image source"),
    ("shards build --source text --out new", 2, "text: expected a folder or archive"),
    ("shards build --source empty --out new", 1, "empty: no images found"),
    ("shards build --source procedural --out full", 2, "full exists and is not empty"),
    ("shards build --split valid --out new", 2, "'valid' is not one of 'train', 'test'"),
    ("shards build --num-shards 0 --out new", 2, "'--num-shards'"),
    ("shards build --source procedural --layout flat --out new", 2, "--layout flat is for images"),
    (
        "shards build --source procedural --background black --out new",
        2,
        "give --fit pad or --img-channels 1 or 3, or leave it",
    ),
    ("shards info absent", 1, "absent. Build it: ganscale shards build"),
    ("shards verify empty", 1, "empty is empty: not a finished shard set"),
    ("shards index empty", 1, "empty: no .tar files to index"),
    # Runs and snapshots.
    ("resume absent", 1, "absent is not a run: it has no config.yaml"),
    ("resume text", 1, "text is not a run"),
    ("resume begun", 1, "has no checkpoint that verifies"),
    ("resume begun training.batchsize=3", 2, "did you mean 'training.batch_size'?"),
    ("resume old", 2, "unknown field 'sed'; did you mean 'seed'?"),
    ("checkpoint list absent", 1, "no checkpoints in"),
    ("sample absent", 1, "no snapshot at absent"),
    ("sample empty", 1, "no snapshot at empty"),
    ("sample broken.safetensors", 1, "broken.safetensors is not a readable snapshot"),
    ("recognise probe absent --test empty", 1, "absent is not a run"),
    # What is measured.
    ("evaluate --run rgb.safetensors", 2, "--run rgb.safetensors: expected the folder of a run"),
    ("evaluate --run empty", 2, "--run empty: expected the folder of a run, with its config.yaml"),
    ("evaluate --snapshot rgb.safetensors --test empty", 2, "--test is for cas: add it to --metr"),
    ("evaluate --images empty --num 9", 2, "--num and --seed are for generated images"),
    ("evaluate --images empty --seed 0", 2, "--num and --seed are for generated images"),
    ("stability --report-only begun --seeds 5", 2, "--report-only trains nothing: leave --seeds"),
    ("stability --report-only begun --storage a", 2, "trains nothing: leave --storage"),
    ("stability --report-only begun --config quickstart", 2, "trains nothing: leave --config"),
    # What is drawn, and where to.
    ("sample rgb.safetensors --out s.tiff", 2, "unknown suffix '.tiff'; expected .png, .jpg"),
    ("sample rgba.safetensors --out s.jpg", 2, "JPEG has no transparency"),
    ("sample rgb.safetensors --num 0", 2, "'--num'"),
    ("sample rgb.safetensors --num ten", 2, "'--num': Input should be a valid integer"),
    ("sample rgb.safetensors --seed -1", 2, "'--seed'"),
    ("sample rgb.safetensors --label 3", 2, "takes no labels: omit --label"),
    ("sample rgb.safetensors --device tpu", 2, "--device tpu: expected cpu, cuda or cuda:N"),
    ("interpolate rgb.safetensors --out a.mp4", 2, "--out a.mp4: expected .png, .gif"),
    ("interpolate rgb.safetensors --seeds 1,x", 2, "--seeds 1,x: expected numbers"),
    ("interpolate rgb.safetensors --mode class --label 1", 2, "--label is for --mode slerp and"),
    ("interpolate rgb.safetensors --labels 0,1", 2, "--labels is for --mode class"),
    ("mix rgb.safetensors", 2, "expected a stylegan2 generator"),
    ("mix absent --out m.jpg", 2, "--out m.jpg: expected a name that ends in .png"),
    ("directions absent --out d.jpg", 2, "--out d.jpg: expected a name that ends in .png"),
    ("nearest absent --reference empty --out n.jpg", 2, "n.jpg: expected a name that ends in .png"),
    # What the system refuses.
    ("sample rgb.safetensors --out text/s.png", 1, "text: file exists: a file is where a folder"),
    ("sample rgb.safetensors --out text", 1, "text: file exists: a file is where a folder"),
    (f"sample rgb.safetensors --out {'x' * 255}.png", 1, "file name too long: choose a shorter"),
    ("sample rgb.safetensors --out /proc/s.png", 1, "/proc/s.png: no such file or directory"),
    ("dashboard --out /dev/full", 1, "/dev/full: no space left on device: free some space"),
    (f"{INPROCESS} storage=text", 1, "text/shards: not a directory: a file is where a folder"),
    # Addresses.
    ("submit --address http://127.0.0.1:9", 1, "no Ray dashboard answers at http://127.0.0.1:9"),
    ("job list --address ray://127.0.0.1", 2, "--address ray://127.0.0.1: expected http://HOST"),
]


@pytest.mark.parametrize(
    ("command", "code", "words"), MISTAKES, ids=[command[:60] for command, _, _ in MISTAKES]
)
def test_a_mistake_is_one_line_that_names_the_thing_and_the_way_out(
    workshop: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(workshop)
    monkeypatch.delenv("RANK", raising=False)
    words_of_shell = shlex.split(command)
    while re.match(r"[A-Z_]+=", words_of_shell[0]):
        monkeypatch.setenv(*words_of_shell.pop(0).split("=", 1))
    with pytest.raises(SystemExit) as stop:
        main(words_of_shell)
    *before, line = capsys.readouterr().err.splitlines()
    assert line.startswith("ganscale: ")
    assert words in line
    assert stop.value.code == code
    # Nothing but the title of a task may come before it.
    assert not any("Traceback" in text or text.startswith("ganscale: ") for text in before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command", ["sample rgb.safetensors --device cuda:1", f"{INPROCESS} launch.use_gpu=true"]
)
def test_without_a_gpu_the_driver_is_blamed_and_not_the_snapshot(
    refusal: Refusal, workshop: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(workshop)
    code, line = refusal(*command.split())
    assert code == 2
    assert "cannot use this GPU" in line
    assert re.search("driver|CUDA", line.partition("GPU: ")[2])
    assert "--device cpu" in line
    assert "snapshot" not in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_loaded_generator_that_cannot_be_moved_does_not_blame_its_file(workshop: Path) -> None:
    with pytest.raises((RuntimeError, AssertionError), match="NVIDIA|CUDA"):
        load_generator(workshop / "rgb.safetensors", device="cuda")


def test_a_gpu_that_is_there_is_taken_and_one_more_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_cuda("--device cuda:1", index=1)
    with pytest.raises(ConfigError, match=r"--device cuda:2: .* has 2 CUDA device\(s\)"):
        check_cuda("--device cuda:2", index=2)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png"])
def test_a_grid_has_the_format_of_its_suffix(
    workshop: Path, tmp_path: Path, suffix: str, verb: Verb
) -> None:
    out = tmp_path / f"grid{suffix}"
    code, _, errors = verb(
        "sample", workshop / "rgb.safetensors", "--num", 4, "--scale", 1, "--out", out
    )
    assert (code, errors) == (0, "")
    reference = load_generator(workshop / "rgb.safetensors").sample(4, seed=0)
    with Image.open(out) as picture:
        assert picture.format == ("PNG" if suffix == ".png" else "JPEG")
        assert picture.size == (2 * 17 + 1, 2 * 17 + 1)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    first = reference[0].movedim(0, -1).numpy().astype(int)
    difference = np.abs(pixels[1:17, 1:17] - first).mean()
    assert difference == 0 if suffix == ".png" else difference < 8


@pytest.mark.parametrize("group", ["", "shards", "checkpoint", "job", "bench", "recognise"])
def test_a_group_alone_prints_its_help_and_exits_with_0(verb: Verb, group: str) -> None:
    code, out, errors = verb(*group.split())
    assert (code, errors) == (0, "")
    assert out == verb(*group.split(), "--help")[1]
    assert ("Commands:" if group else "Train:") in out


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


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a sound snapshot."""
    path = tmp_path_factory.mktemp("snapshot") / "sound.safetensors"
    torch.manual_seed(0)
    save_snapshot(path, build_generator(SPEC), spec=SPEC, nimg=1)
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


@pytest.mark.parametrize(
    ("code", "way_out"),
    [
        (errno.ENOSPC, "no space left on device: free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only file system: write to a folder on another file system"),
        (errno.EACCES, "permission denied: change its permissions"),
        (errno.ENAMETOOLONG, "file name too long: choose a shorter name"),
        (errno.EISDIR, "is a directory: a folder is where a file should be"),
        (errno.ENOTDIR, "not a directory: a file is where a folder should be"),
        (errno.EMFILE, "too many open files: raise the limit"),
    ],
)
def test_an_error_of_the_system_names_the_file_and_the_way_out(code: int, way_out: str) -> None:
    line = describe_os_error(OSError(code, os.strerror(code), "runs/a/config.yaml"))
    assert line.startswith("runs/a/config.yaml: ")
    assert way_out in line


def test_a_thread_that_fails_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/events.jsonl")

    monkeypatch.setattr(threading, "excepthook", cli._thread_excepthook(debug=False))
    thread = threading.Thread(target=fail, name="writer")
    thread.start()
    thread.join()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ganscale: thread 'writer' ended: runs/a/events.jsonl: no space left")


def test_warnings_of_ours_are_shown_whatever_their_class_and_those_of_others_are_not(
    tmp_path: Path,
) -> None:
    """In a process of its own, where Python's filters are those that users have."""
    (tmp_path / "other.py").write_text(
        "import warnings\ndef warn(c): warnings.warn('noise', c, stacklevel=2)\n"
    )
    (tmp_path / "script.py").write_text(
        """
import other, warnings
import ganscale.errors as ours
from ganscale import cli

cli._show_own_warnings()
source = (
    "def own(c): warnings.warn(c.__name__ + ' of ours', c, stacklevel=1)\\n"
    "def foreign(c): other.warn(c)\\n"
)
vars(ours).update(warnings=warnings, other=other)
exec(compile(source, ours.__file__, "exec"), vars(ours))
for category in (UserWarning, DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
    ours.own(category)
    ours.foreign(category)  # attributed to a line of ours
    other.warn(category)
"""
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    result = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr.splitlines() == [
        f"ganscale: warning: {name} of ours"
        for name in (
            "UserWarning",
            "DeprecationWarning",
            "PendingDeprecationWarning",
            "ResourceWarning",
        )
    ]
