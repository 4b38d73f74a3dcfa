"""The report of a run in whatever state: what it says, what it shows, and what it never does."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from ganscale.checkpoint import CheckpointStore, Holder, Session
from ganscale.cli import app
from ganscale.config import load_config, preset_names
from ganscale.errors import ConfigError
from ganscale.processes import machine_id, process_start
from ganscale.report import write_report
from ganscale.report.advice import advice_for
from ganscale.report.curves import averaged, groups_of, step_parts
from ganscale.report.pictures import album_of
from ganscale.report.runs import Run
from ganscale.report.settings import difference_from_preset
from ganscale.report.status import status_of
from ganscale.report.timeline import happenings, timeline_of
from tests.conftest import Verb
from tests.support.run_folders import (
    BEGAN,
    begin,
    checkpoint,
    end,
    noise_grid,
    row,
    write_run,
)

LIMIT_BYTES = 6_000_000
STEPS = 1500  # of the preset quickstart: 96 kimg of 64 images


class Page(HTMLParser):
    """The elements of a page, its text, and every address that it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._hidden = 0
        self.source = path.read_text()
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._hidden += tag in ("script", "style")
        names = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
        self.addresses += [value or "" for name, value in attrs if name in names]
        # `url(` of styles, in attributes and in elements.
        self.addresses += re.findall(r"url\(([^)]*)\)", " ".join(v or "" for _, v in attrs))

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if self._hidden:
            self.addresses += re.findall(r"url\(([^)]*)\)", data)
        else:
            self.words.append(data)


def report(*runs: Path, out: Path) -> Page:
    written = write_report([str(run) for run in runs], out)
    assert written.num_bytes == out.stat().st_size
    return Page(out)


def finished(root: Path, **more: Any) -> Path:
    steps = range(16, STEPS + 1, 16)
    events = [begin(), checkpoint(0), checkpoint(1000), checkpoint(STEPS), end(STEPS)]
    return write_run(root, [row(s) for s in steps], events, samples=(0, 750, STEPS), **more)


def killed(root: Path) -> Path:
    return write_run(root, [row(s) for s in range(16, 400, 16)], [begin(), checkpoint(256)])


def running(root: Path) -> Path:
    run = killed(root)
    hold(run, machine=machine_id(), pid=os.getpid())
    return run


def failed(root: Path) -> Path:
    fault = {"time": BEGAN + 400, "event": "fault", "message": "rank 1 is gone"}
    lost = {**fault, "time": BEGAN + 401, "event": "group_lost", "num_workers": 2}
    return write_run(root, [row(s) for s in range(16, 400, 16)], [begin(), fault, lost])


def empty(root: Path) -> Path:
    root.mkdir(parents=True)
    return root


def hold(run: Path, *, machine: str, pid: int, age: float = 0.0) -> None:
    """The claim of an attempt and the file of its holder, last renewed `age` seconds ago."""
    attempts = run / "checkpoints" / "attempts"
    attempts.mkdir(parents=True)
    holder = {
        "session": "0123456789abcdef",
        "machine": machine,
        "pid": pid,
        "process_start": process_start(pid),
    }
    (attempts / "a0001.json").write_text(json.dumps({"number": 1, "holder": holder}))
    beat = attempts / "session-0123456789abcdef.json"
    beat.write_text(json.dumps({"time": time.time() - age}))


def read(place: Path) -> Run:
    return Run.read(str(place))


def advice(place: Path) -> list[Any]:
    run = read(place)
    return advice_for(run, status_of(run), step_parts(run))


MAKERS: dict[str, Callable[[Path], Path]] = {
    "finished": finished,
    "interrupted": killed,
    "running": running,
    "failed": failed,
    "empty": empty,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_run_in_any_state_has_a_page_that_requests_nothing(kind: str, tmp_path: Path) -> None:
    run = MAKERS[kind](tmp_path / "run")
    assert status_of(read(run)).kind == kind
    page = report(run, out=tmp_path / "report.html")
    assert kind in page.text
    inline = ("#", "data:image/", "data:,", "var(--")
    assert [a[:80] for a in page.addresses if not a.startswith(inline)] == []
    assert not {"iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.tags.count("h1") == 1
    assert len(page.source) < LIMIT_BYTES
    assert {"#next", "#samples", "#curves"} <= set(page.addresses) or kind == "empty"
    # Of any two elements with an id, the ids differ: also of those in drawings.
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_several_runs_stand_side_by_side_with_what_differs(tmp_path: Path) -> None:
    other = load_config("quickstart", ["optimizer.lr=0.00123", "storage=/elsewhere"])
    runs = [finished(tmp_path / "a"), finished(tmp_path / "b", config=other), empty(tmp_path / "c")]
    page = report(*runs, out=tmp_path / "report.html")
    for words in ("a: loss D", "b: loss D", "optimizer.lr", "0.00123"):
        assert words in page.text
    settings = page.text.partition("What differs between the runs")[2].partition("config.yaml")[0]
    assert "optimizer.lr" in settings
    assert "storage" not in settings
    assert page.tags.count("img") == 2  # the newest samples of those that have some


def test_names_and_messages_are_text_and_never_elements(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>\"'&amp;</script><script>alert(2)</script>"
    events = [begin(machine={"host": evil}), {"time": BEGAN, "event": "fault", "message": evil}]
    rows = [{**row(step), f"train/{evil}": 1.0 * step} for step in (16, 32, 48)]
    name = evil.replace("/", "|")
    runs = [write_run(tmp_path / name, rows, events, samples=(16,)), finished(tmp_path / "plain")]
    page = report(*runs, out=tmp_path / "report.html")
    assert page.text.count(evil) >= 2
    assert name in page.text
    assert page.tags.count("script") == 2
    assert page.tags.count("img") == 2
    assert not [key for key, _ in page.attributes if key.startswith("on")]


def test_hundreds_of_pictures_and_thousands_of_rows_fit(tmp_path: Path) -> None:
    rows = [row(step) for step in range(1, 6000)]
    for index in range(0, len(rows), 7):
        rows[index]["train/loss_D"] = None
    run = write_run(tmp_path / "day", rows, [begin()])
    noise_grid(run / "samples" / "first.png")
    for number in range(300):
        (run / "samples" / f"kimg-{number:09.3f}.png").hardlink_to(run / "samples" / "first.png")
    noise_grid(run / "grid.png")
    page = report(run, out=tmp_path / "report.html")
    assert len(page.source) < LIMIT_BYTES
    assert re.search(r"\d+ of 300 pictures", page.text)
    frames = json.loads(page.source.partition('id="frames">')[2].partition("</script>")[0])
    assert len(frames["positions"]) == 12
    assert [frames["positions"][0], frames["positions"][-1]] == [0, 299_000]
    assert "857 not finite" in page.text


def test_pictures_of_commands_are_shown_by_what_they_are(tmp_path: Path) -> None:
    config = load_config("quickstart", ["model.name=sngan", "model.num_classes=3"])
    run = write_run(tmp_path / "run", config=config)
    (run / "snapshots").mkdir()
    (run / "snapshots" / "nimg-000000000064.safetensors").write_bytes(b"no header")
    noise_grid(run / "grid.png", count=50)
    noise_grid(run / "real.png")
    noise_grid(run / "strip.png", side=30)
    noise_grid(run / "reconstructed" / "grid.png", side=31)
    (run / "nearest.png").write_bytes((run / "grid.png").read_bytes()[:500])
    album = album_of(read(run), 2_000_000)
    by_kind = {still.kind: still for still in album.stills}
    for kind, name in (("fresh", "grid.png"), ("real", "real.png"), ("interpolation", "strip.png")):
        assert (picture := by_kind[kind].picture) is not None
        assert picture.data == (run / name).read_bytes()
    assert by_kind["other"].name == "grid.png"
    assert (by_kind["nearest"].name, by_kind["nearest"].picture) == ("nearest.png", None)
    assert by_kind["classes"].picture is None
    assert "--labels 0,1,2" in by_kind["classes"].command
    assert "nearest.png cannot be read" in report(run, out=tmp_path / "report.html").text


def test_a_picture_that_is_too_large_is_made_smaller(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    height, width = np.mgrid[:1500, :2000]
    smooth = np.stack([height * 255 / 1500, width * 255 / 2000, 0 * height], 2).astype(np.uint8)
    noise_grid(run / "samples" / "kimg-00001.000.png", side=150)
    Image.fromarray(smooth).save(run / "grid.png")
    limit = (run / "grid.png").stat().st_size - 1
    album = album_of(read(run), limit)
    (frame,) = album.frames
    assert (frame.picture.width, frame.picture.height) == (8 * 151 + 1,) * 2
    assert len(frame.picture.data) < (run / "samples" / "kimg-00001.000.png").stat().st_size / 2
    shown = next(still.picture for still in album.stills if still.kind == "fresh")
    assert shown is not None
    assert len(shown.data) <= limit
    with Image.open(io.BytesIO(shown.data)) as image:
        assert image.size == (1024, 768)
        half = np.asarray(image.convert("RGB"), dtype=float)[384, 512]
    np.testing.assert_allclose(half, smooth[750, 1000], atol=6)


def test_a_picture_that_pillow_refuses_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of more than twice as many pixels as Pillow warns of."""
    run = finished(tmp_path / "run")  # with frames of 265 by 265
    noise_grid(run / "grid.png", side=150)  # 1209 by 1209
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    page = report(run, out=tmp_path / "report.html")
    assert "grid.png cannot be read" in page.text
    assert len(album_of(read(run), 2_000_000).frames) == 3


def test_a_frame_of_the_newest_samples_is_the_file_itself(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    album = album_of(read(run), 2_000_000)
    files = sorted((run / "samples").glob("*.png"))
    assert [frame.picture.data for frame in album.frames] == [f.read_bytes() for f in files]
    assert [frame.nimg for frame in album.frames] == [0, 48_000, 96_000]


def test_a_report_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    code = (
        "import sys; from ganscale.report import write_report;"
        f"write_report([{str(run)!r}]); assert not {{'torch', 'ray'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
    assert (run / "report.html").is_file()


def test_damaged_files_cost_what_is_damaged_and_nothing_else(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('12\n["a"]\n{"nimg": "many", "attempt": 1}\nnot json\n{"step": 1501, "ni')
    with (run / "events.jsonl").open("a") as events:
        events.write('{"event": 5}\n{"event": "start", "time": 1}\n{"time": 18000')
    (run / "config.yaml").write_text("training: {batch_size: -1}\n")
    (run / "samples" / "kimg-00097.000.png").write_bytes(b"\x89PNG and no more")
    (run / "samples" / ".kimg-00098.000.png.1234.tmp").write_bytes(b"")
    page = report(run, out=tmp_path / "report.html")
    assert "finished" in page.text
    assert "training.batch_size" in page.text
    assert "96 kimg" in page.text


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "events.jsonl", "samples"])
def test_missing_files_are_no_error(missing: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    (run / missing).rename(tmp_path / "moved")
    page = report(run, out=tmp_path / "report.html")
    assert "What to do next" in page.text


def test_runs_without_a_discriminator_show_what_they_log(tmp_path: Path) -> None:
    config = load_config("vae-cifar10")
    rows = [
        {
            "step": step,
            "nimg": 128 * step,
            "attempt": 1,
            "train/loss_G": 1.0 / step,
            "train/squared_error": 0.5,
            "train/kl": 1.0 + step,
            "train/own_statistic": 3.0 * step,
            "time/autoencoder_seconds": 0.1,
        }
        for step in range(1, 5)
    ]
    run = read(write_run(tmp_path / "vae", rows, [begin()], config=config))
    groups = groups_of([run], num_buckets=100)
    labels = {line.label for g in groups for p in g.panels for line in p.lines}
    assert {"loss G", "squared error", "kl", "own statistic"} <= labels
    assert list(step_parts(run)) == ["autoencoder"]
    assert any("reconstruct" in item.command for item in advice_of_finished(tmp_path / "vae"))


def advice_of_finished(place: Path) -> list[Any]:
    with (place / "events.jsonl").open("a") as events:
        events.write(json.dumps(end(4)) + "\n")
    return advice(place)


def test_curves_that_never_change_are_values(tmp_path: Path) -> None:
    groups = groups_of([read(finished(tmp_path / "run"))], num_buckets=100)
    constants = {line.label: line.last for group in groups for line in group.constants}
    assert constants["loss scale D"] == 1.0
    assert constants["skips G"] == 0.0
    drawn = {line.label for g in groups for p in g.panels for line in p.lines}
    assert not drawn & set(constants)


def test_metrics_have_their_intervals(tmp_path: Path) -> None:
    estimates = [(500, 90.5, 88.25, 92.75), (1000, 60.5, 58.25, 62.75)]
    events = [begin()]
    rows = [row(step) for step in range(16, STEPS + 1, 16)]
    for step, value, low, high in estimates:
        rows.append({"nimg": 64 * step, "metrics/fid": value, "attempt": 1})
        events.append(
            {
                "time": BEGAN + 2000,
                "event": "evaluation",
                "attempt": 1,
                "nimg": 64 * step,
                "protocol": {"num_samples": 2000, "extractor": "inception-v3", "reference": "x"},
                "metrics": {"fid": {"value": value, "low": low, "high": high}},
            }
        )
    run = write_run(tmp_path / "run", rows, events)
    groups = groups_of([read(run)], num_buckets=100)
    (fid,) = [line for g in groups for p in g.panels for line in p.lines if line.label == "fid"]
    assert fid.points == [(32.0, 90.5), (64.0, 60.5)]
    assert [(bar.kimg, bar.low, bar.high) for bar in fid.bars] == [
        (32.0, 88.25, 92.75),
        (64.0, 58.25, 62.75),
    ]
    page = report(run, out=tmp_path / "report.html")
    assert "60.5 (58.25 to 62.75) at 64 kimg" in page.text
    # The evaluation came long after the run, and is no part of its time.
    assert read(run).seconds == STEPS - STEPS % 16


def test_means_and_ranges_of_buckets_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=1000)
    values[137] = 50.0
    means, ranges = averaged([(float(i), float(y)) for i, y in enumerate(values)], 40)
    buckets = values.reshape(40, 25)
    np.testing.assert_allclose([y for _, y in means], buckets.mean(1), rtol=1e-12)
    assert [bar.low for bar in ranges] == buckets.min(1).tolist()
    assert [bar.high for bar in ranges] == buckets.max(1).tolist()
    assert max(bar.high for bar in ranges) == 50.0
    assert [x for x, _ in means] == [25 * i + 12.0 for i in range(40)]


def test_buckets_without_a_finite_value_are_gaps() -> None:
    points = [(float(i), float("nan") if i < 10 else 1.0) for i in range(40)]
    means, ranges = averaged(points, 4)
    assert [np.isnan(y) for _, y in means] == [True, False, False, False]
    assert len(ranges) == 3


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_differs_from_no_preset(name: str) -> None:
    config = load_config(name, ["storage=/elsewhere", "name=other", "data.shards=/shards"])
    difference = difference_from_preset(config)
    assert (difference.preset, difference.settings) == (name, [])


def test_what_differs_from_the_preset_has_both_values_and_a_sentence() -> None:
    config = load_config("sngan-cifar10", ["training.batch_size=32", "model.z_dim=64"])
    difference = difference_from_preset(config)
    assert difference.preset == "sngan-cifar10"
    settings = {s.name: s for s in difference.settings}
    assert set(settings) == {"training.batch_size", "model.z_dim"}
    assert settings["training.batch_size"].values == ("32", "64")
    assert "Global batch" in settings["training.batch_size"].sentence


def test_a_run_is_alive_as_its_holder_is(tmp_path: Path) -> None:
    """On this machine the process decides, from another the age of its file."""
    process = subprocess.Popen(["sleep", "60"])
    run = killed(tmp_path / "here")
    hold(run, machine=machine_id(), pid=process.pid)
    assert status_of(read(run)).kind == "running"
    process.kill()
    process.wait()
    assert status_of(read(run)).kind == "interrupted"
    for age, kind in ((5.0, "running"), (300.0, "interrupted")):
        run = killed(tmp_path / kind)
        hold(run, machine="another", pid=1, age=age)
        assert status_of(read(run)).kind == kind


def test_a_run_whose_checkpoints_lie_elsewhere_is_alive_as_its_holder_is(
    store: CheckpointStore, tmp_path: Path
) -> None:
    """Long after a fault, as when Ray waits for a node that replaces the lost one."""
    location, _, name = store.location.rpartition("/")
    config = load_config("quickstart", [f"checkpoint.location={location}", f"name={name}"])
    fault = {"time": BEGAN + 400, "event": "fault", "message": "rank 1 is gone"}
    run = write_run(tmp_path / "folder", [row(16)], [begin(), fault], config=config)
    holder = Holder.here(run)
    store.claim(store.newest, session=Session(holder, 0))
    assert status_of(read(run)).kind == "running"
    store.backend.remove(holder.beat_file)
    assert status_of(read(run)).kind == "failed"


@pytest.mark.parametrize("exists", [False, True])
def test_where_the_checkpoints_cannot_be_read_a_silent_run_may_train_or_not(
    tmp_path: Path, exists: bool
) -> None:
    if exists:
        (tmp_path / "run").write_text("no folder, which is an error of the disk like any other")
    config = load_config("quickstart", [f"checkpoint.location={tmp_path}", "name=run"])
    for ago, kind in ((10.0, "running"), (1e4, "unknown")):
        events = [begin(), {"event": "waiting", "time": time.time() - ago}]
        run = write_run(tmp_path / kind, [row(16)], events, config=config)
        assert status_of(read(run)).kind == kind
        assert f"{tmp_path}/run" in status_of(read(run)).reason or kind == "running"


def test_without_a_holder_the_age_of_the_rows_decides(tmp_path: Path) -> None:
    for ago, kind in ((10.0, "running"), (1e4, "interrupted")):
        times = {"time": time.time() - ago}
        rows = [{**row(s), "time/unix": times["time"] + s / 100} for s in range(16, 320, 16)]
        run = write_run(tmp_path / kind, rows, [{**begin(), **times}])
        assert status_of(read(run)).kind == kind


def test_a_run_that_the_guard_ended_has_failed_with_its_message(tmp_path: Path) -> None:
    alarm = {
        "time": BEGAN + 20,
        "event": "alarm",
        "attempt": 1,
        "nimg": 1024,
        "kind": "non_finite",
        "message": "the loss of G is nan",
        "action": "stop",
    }
    run = write_run(tmp_path / "run", [row(16)], [begin(), checkpoint(0), alarm])
    status = status_of(read(run))
    assert (status.kind, status.reason) == ("failed", "The loss of G is nan.")
    commands = [item.command for item in advice(run)]
    assert f"ganscale resume {run} guard.policy=rollback" in commands
    assert any("docs/explanation/faults.md" in item.text for item in advice(run))


@pytest.mark.parametrize(
    ("kind", "preset", "settings"),
    [
        ("collapse", "dcgan-cifar10", "augment.name=diffaugment augment.p=1"),
        ("collapse", "r3gan-small", "seed=1"),
        ("stuck", "dcgan-cifar10", "penalty.r1=0.1"),
        ("stuck", "r3gan-small", ""),
        ("exploding", "sngan-cifar10", "optimizer.clip_norm=1"),
    ],
)
def test_a_remedy_is_a_run_that_can_be_trained_and_differs(
    kind: str, preset: str, settings: str, tmp_path: Path
) -> None:
    alarm = {"time": BEGAN + 20, "event": "alarm", "attempt": 1, "nimg": 64, "kind": kind}
    config = load_config(preset)
    run = write_run(tmp_path / "run", [row(1)], [begin(), alarm, end(2)], config=config)
    expected = f"ganscale train --config {run}/config.yaml name=run-2 {settings}"
    commands = [item.command for item in advice(run)]
    assert (expected in commands) == bool(settings)
    assert not any(c.startswith("ganscale train") for c in commands) or settings
    load_config(run / "config.yaml", ["name=run-2", *settings.split()])


@pytest.mark.parametrize(
    ("preset", "is_advised"),
    [
        ("quickstart", True),
        ("r3gan-small", True),
        ("sngan-cifar10", False),
        ("speedrun-cifar10", False),
    ],
)
def test_a_run_whose_learning_rate_has_come_to_its_end_is_not_made_longer(
    preset: str, is_advised: bool, tmp_path: Path
) -> None:
    config = load_config(preset)
    run = write_run(tmp_path / "run", [row(1)], [begin(), end(2)], config=config)
    command = f"ganscale resume {run} training.total_kimg={2 * config.training.total_kimg:g}"
    assert (command in [item.command for item in advice(run)]) == is_advised


def test_a_resumed_run_is_no_longer_stopped(tmp_path: Path) -> None:
    stop = {**end(400), "event": "stop", "reason": "interrupted"}
    rows = [row(s) for s in range(16, 400, 16)]
    run = write_run(tmp_path / "run", rows, [begin(), checkpoint(400), stop])
    assert status_of(read(run)).kind == "stopped"
    assert advice(run)[0].command == f"ganscale resume {run}"
    rows += [row(s, attempt=2) for s in range(400, STEPS + 1, 16)]
    events = [
        begin(),
        stop,
        begin(2, step=400, seconds=500, reason="resume"),
        end(STEPS, attempt=2),
    ]
    run = write_run(tmp_path / "run", rows, events)
    assert status_of(read(run)).kind == "finished"
    assert read(run).nimg == 96_000


TROUBLED = [
    begin(),
    checkpoint(0),
    {"time": BEGAN + 1, "event": "wandb", "attempt": 1, "message": "W&B is away"},
    {
        "time": BEGAN + 2,
        "event": "stall",
        "attempt": 1,
        "step": 5,
        "seconds": 130.0,
        "ranks": [1],
        "where": {},
        "stacks": "/runs/x/stacks",
    },
    {
        "time": BEGAN + 3,
        "event": "skip",
        "attempt": 1,
        "nimg": 64,
        "num_skipped": 2,
        "samples": ["shard-00003.tar: sample 24"],
    },
    {
        "time": BEGAN + 4,
        "event": "alarm",
        "attempt": 1,
        "nimg": 64,
        "kind": "collapse",
        "message": "images have become alike",
        "action": "warn",
    },
    {
        "time": BEGAN + 5,
        "event": "checkpoint_failed",
        "attempt": 1,
        "nimg": 64,
        "message": "no space",
        "stall_seconds": 0.1,
        "write_seconds": 0.1,
    },
    {"time": BEGAN + 6, "event": "evaluation_failed", "attempt": 1, "nimg": 64, "message": "alike"},
    {"time": BEGAN + 7, "event": "unknown_to_this_version", "message": "something new"},
    {"time": BEGAN + 8, "event": "regroup", "num_workers": 1, "room": 1},
    {"time": BEGAN + 9, "event": "waiting", "room": 0, "min_workers": 2, "message": "2 CPU"},
]


def test_every_command_that_is_advised_is_one_of_ganscale(tmp_path: Path) -> None:
    """They are parsed by the command line itself, with options and arguments."""
    config = load_config("vae-gan-cifar10", ["data.shards=/data/set"])
    rows = [{**row(s), "time/data_wait_seconds": 1.0} for s in (16, 32)]
    runs = [
        write_run(tmp_path / "troubled run", rows, TROUBLED, config=config),
        write_run(tmp_path / "finished", rows, [begin(), end(32)], config=config),
        running(tmp_path / "running"),
        write_run(tmp_path / "no-checkpoint", rows, [begin()]),
        empty(tmp_path / "empty"),
    ]
    snapshots = tmp_path / "finished" / "snapshots"
    snapshots.mkdir()
    (snapshots / "nimg-000000002048.safetensors").write_bytes(b"")
    commands = {item.command for run in runs for item in advice(run) if item.command}
    for run in runs:
        commands |= {
            still.command for still in album_of(read(run), 1_000_000).stills if still.command
        }
    verbs = set()
    group = typer.main.get_command(app)
    for line in commands:
        program, *arguments = shlex.split(line)
        assert program == "ganscale"
        command: Any = group
        context = group.make_context("ganscale", ["doctor"], resilient_parsing=True)
        while hasattr(command, "get_command"):
            command = command.get_command(context, verb := arguments.pop(0))
            assert command is not None, line
        verbs.add(verb)
        command.make_context(verb, arguments, parent=context)
    assert verbs >= {"resume", "train", "report", "evaluate", "sample", "nearest", "interpolate"}
    assert verbs >= {"show", "verify", "list", "reconstruct"}


def test_what_happened_is_listed_without_checkpoints(tmp_path: Path) -> None:
    skip = TROUBLED[4]
    run = read(write_run(tmp_path / "run", [row(16)], [*TROUBLED[:4], skip, skip, *TROUBLED[5:]]))
    lines, left_out = happenings(run)
    assert left_out == 0
    by_kind = {line.kind: line for line in lines}
    assert "checkpoint" not in by_kind
    assert "4 damaged samples" in by_kind["skip"].text
    assert "rank 1" in by_kind["stall"].text
    assert by_kind["alarm"].is_bad
    assert by_kind["unknown to this version"].text == "something new"
    many = [{**TROUBLED[2], "time": BEGAN + i} for i in range(1000)]
    lines, left_out = happenings(read(write_run(tmp_path / "run", [], [begin(), *many])))
    assert len(lines) + left_out == 1001
    assert len(lines) == 200


def test_the_timeline_tells_lost_work_from_the_run(tmp_path: Path) -> None:
    first = [row(s) for s in range(10, 101, 10)]
    second = [row(s, attempt=2) for s in range(70, 201, 10)]
    for line in second:
        line["time/unix"] += 300
    events = [
        begin(),
        checkpoint(60),
        begin(2, step=60, seconds=350, reason="resume", world_size=1),
        end(200, attempt=2),
    ]
    timeline = timeline_of(read(write_run(tmp_path / "run", first + second, events)))
    assert timeline is not None
    spans = [(s.is_lost, s.points[0][1], s.points[-1][1]) for s in timeline.segments]
    assert spans == [(False, 0.0, 3.84), (True, 3.84, 6.4), (False, 3.84, 12.8)]
    lanes = {lane.name: lane for lane in timeline.lanes}
    assert [label for _, _, label in lanes["workers"].bars] == ["2", "1"]
    assert len(lanes["starts"].marks) == 2


def test_the_command_writes_the_page_and_names_it(tmp_path: Path, verb: Verb) -> None:
    run = finished(tmp_path / "run")
    code, out, _ = verb("report", run)
    assert code == 0
    assert out.startswith(f"wrote {run / 'report.html'} (")
    code, out, _ = verb("report", run, empty(tmp_path / "other"), "--out", tmp_path / "both.html")
    assert (code, (tmp_path / "both.html").is_file()) == (0, True)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (["nowhere"], "no such folder: .*nowhere"),
        (["."], "holds runs and is none: name some of them, as in .*/a"),
        (["a", "a"], "named twice"),
    ],
)
def test_a_place_that_is_no_run_is_refused(places: list[str], words: str, tmp_path: Path) -> None:
    finished(tmp_path / "a")
    with pytest.raises(ConfigError, match=words):
        write_report([str(tmp_path / place) for place in places], tmp_path / "x.html")
    with pytest.raises(ConfigError, match="copy the run's folder"):
        write_report(["s3://bucket/run"], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_real_images_are_drawn_as_they_are(
    procedural_shards: Path, tmp_path: Path, verb: Verb
) -> None:
    out = tmp_path / "real.png"
    code, printed, _ = verb("shards", "show", procedural_shards, "--num", 9, "--out", out)
    assert (code, printed.startswith("wrote 9 images")) == (0, True)
    known = set()
    for path in procedural_shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            files = [tar.extractfile(member) for member in tar if member.name.endswith(".png")]
            known |= {Image.open(file).convert("RGB").tobytes() for file in files if file}
    with Image.open(out) as grid:
        assert grid.size == (3 * 33 + 1, 3 * 33 + 1)
        drawn = [
            grid.crop((x, y, x + 32, y + 32)).tobytes() for y in (1, 34, 67) for x in (1, 34, 67)
        ]
    assert len(set(drawn)) == 9
    assert set(drawn) <= known
    large = tmp_path / "large.png"
    verb("shards", "show", procedural_shards, "--num", 9, "--scale", 3, "--out", large)
    with Image.open(out) as grid, Image.open(large) as magnified:
        expected = grid.resize((3 * grid.width, 3 * grid.height), Image.Resampling.NEAREST)
        assert magnified.tobytes() == expected.tobytes()
