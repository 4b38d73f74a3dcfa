"""Copies of a run's documents: what grows, what is whole, what is left out, and what comes back."""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError
from rich.console import Console

from ganscale.checkpoint import CheckpointName, CheckpointStore
from ganscale.checkpoint.files import saved_state
from ganscale.config import Config, load_config
from ganscale.errors import CheckpointError, ConfigError, DataError
from ganscale.json_lines import add_missing_lines
from ganscale.launch import documents, driver_actor, held_run, resolve_run, start
from ganscale.launch.documents import Copy, StoreCopy, restore_run_dir, store_copy
from ganscale.launch.driver_actor import DriverActor, Messages, copied_to_driver, marked
from ganscale.run_directory import RunDirectory
from ganscale.storage import StoreError, open_store
from ganscale.world import World

SETTLED = time.time() - 60


class FakeTarget:
    """Keeps the copy in memory; fails as often as it is told to."""

    def __init__(self, *known: str) -> None:
        self.files: dict[str, bytes] = {}
        self.failures = 0
        self.grown: list[str] = []
        self._known = set(known)

    def known(self) -> set[str]:
        return self._known

    def grow(self, name: str, path: Path, start: int, end: int) -> None:
        self._fail()
        self.grown.append(name)
        self.files[name] = self.files.get(name, b"") + path.read_bytes()[start:end]

    def put(self, name: str, pieces: Iterable[bytes]) -> None:
        self._fail()
        self.files[name] = b"".join(pieces)

    def _fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("the store\nis away")


def write(path: Path, data: bytes, *, at: float = SETTLED) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (at, at))


def until(what: Any) -> None:
    deadline = time.monotonic() + 600
    while not what():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def copying(root: Path, target: FakeTarget, **options: Any) -> Copy:
    return Copy(root, target, lines_seconds=0.01, files_seconds=0.02, **options)


def test_lines_are_copied_as_they_come_and_half_a_line_is_not(tmp_path: Path) -> None:
    target = FakeTarget()
    metrics = tmp_path / "metrics.jsonl"
    with copying(tmp_path, target):
        write(metrics, b'{"nimg": 1}\n{"nim')
        until(lambda: target.files.get("metrics.jsonl") == b'{"nimg": 1}\n')
        with metrics.open("ab") as file:
            file.write(b'g": 2}\n{"half')
    assert target.files["metrics.jsonl"] == b'{"nimg": 1}\n{"nimg": 2}\n'


def test_files_are_copied_when_they_have_settled_and_all_of_them_at_the_end(tmp_path: Path) -> None:
    target = FakeTarget()
    write(tmp_path / "samples/kimg-1.png", b"one")
    write(tmp_path / "wandb/offline-run/run.wandb", b"grows", at=time.time() + 3600)
    with copying(tmp_path, target):
        until(lambda: "samples/kimg-1.png" in target.files)
        write(tmp_path / "samples/kimg-1.png", b"another", at=SETTLED + 1)
        until(lambda: target.files["samples/kimg-1.png"] == b"another")
        assert "wandb/offline-run/run.wandb" not in target.files
    assert target.files["wandb/offline-run/run.wandb"] == b"grows"


def test_checkpoints_hidden_files_links_and_what_is_known_are_left_out(tmp_path: Path) -> None:
    target = FakeTarget("snapshots/old.safetensors")
    for name in (
        "checkpoints/nimg-000000000000-a0001/state.safetensors",
        "ray/token/x.json",
        ".driver-1234",
        "samples/.kimg-2.png.tmp",
        "snapshots/old.safetensors",
        "snapshots/new.safetensors",
    ):
        write(tmp_path / name, b"x")
    (tmp_path / "latest").symlink_to("snapshots/new.safetensors")
    with copying(tmp_path, target):
        pass
    assert list(target.files) == ["snapshots/new.safetensors"]


def test_workers_that_are_not_rank_0_send_stacks_only(tmp_path: Path) -> None:
    target = FakeTarget()
    write(tmp_path / "stacks/rank-1.txt", b"where it hangs")
    write(tmp_path / "metrics.jsonl", b"{}\n")
    write(tmp_path / "samples/kimg-1.png", b"of another run")
    with copying(tmp_path, target, only=("stacks",)):
        pass
    assert target.files == {"stacks/rank-1.txt": b"where it hangs"}


def test_what_fails_is_copied_later_and_each_line_once(tmp_path: Path) -> None:
    target = FakeTarget()
    target.failures = 3
    write(tmp_path / "events.jsonl", b"1\n2\n")
    with copying(tmp_path, target) as copy:
        until(lambda: target.files)
    assert target.files == {"events.jsonl": b"1\n2\n"}
    assert copy.problem == ""


def test_a_store_that_stays_away_ends_nothing_and_is_told_of(tmp_path: Path) -> None:
    target = FakeTarget()
    target.failures = 1_000_000
    write(tmp_path / "events.jsonl", b"1\n")
    with copying(tmp_path, target) as copy:
        pass
    assert copy.problem == "OSError: the store is away"


def test_folders_and_files_that_vanish_meanwhile_stop_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a trial's folder of W&B, or a snapshot that a better one replaces."""
    names = ("a/folder/x.png", "a/kept.png", "b.png", "known/c.png", "known/d.png")
    scan, stamp, removed = os.scandir, documents._stamp, set[str]()

    def scandir(path: Any) -> Any:
        if str(path).endswith("folder") and "folder" not in removed:
            removed.add("folder")
            (Path(path) / "x.png").unlink()
            Path(path).rmdir()
        return scan(path)

    def stamp_of(path: Path) -> tuple[int, int]:
        if path.name == "c.png":
            path.unlink()
            removed.add("c.png")
        return stamp(path)

    for name in names:
        write(tmp_path / name, b"x")
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(documents, "_stamp", stamp_of)
    target = FakeTarget("known/c.png", "known/d.png")
    with copying(tmp_path, target) as copy:
        assert removed == {"folder", "c.png"}
        write(tmp_path / "a/folder/y.png", b"y")
    assert copy.problem == ""
    assert sorted(target.files) == ["a/folder/y.png", "a/kept.png", "b.png"]


def test_missing_lines_are_added_once_and_in_place_of_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    add_missing_lines(path, b"1\n2\n")
    with path.open("ab") as file:
        file.write(b"hal")
    for _ in range(2):
        add_missing_lines(path, b"2\n3\n\n1\n")
    assert path.read_bytes() == b"1\n2\n3\n"


@pytest.fixture
def location(bucket: str) -> str:
    """A place of its own in a bucket."""
    return f"{bucket}/{uuid.uuid4().hex}"


def config_at(location: str | None, storage: Path, **changes: Any) -> Config:
    base = {"name": "mine", "storage": str(storage), "checkpoint.location": location}
    return Config().with_changes({**base, **changes})


def save(config: Config, nimg: int, history: bytes) -> None:
    store = CheckpointStore(config.checkpoints)
    attempt, _ = store.claim(lambda: store.newest())
    meta = {"config": config.model_dump(mode="json"), "wandb_run_id": "abcd"}
    state = {"weights": torch.arange(4.0)}
    store.write(attempt, saved_state(nimg, state, meta, history=history))


def test_a_host_that_has_not_seen_a_run_begins_with_its_documents(
    tmp_path: Path, location: str
) -> None:
    there = config_at(location, tmp_path / "there", seed=7)
    old = RunDirectory(there.run_dir)
    save(there, 100, b'{"nimg": 50}\n{"nimg": 100}\n')
    write(old.events, b'{"event": "start"}\n')
    target = store_copy(there)
    assert target is not None
    with Copy(there.run_dir, target, lines_seconds=9, files_seconds=9):
        write(old.snapshot(100), b"weights")
    assert open_store(f"{location}/documents").files() == [
        "mine/events.jsonl",
        "mine/snapshots/nimg-000000000100.safetensors",
    ]

    here = config_at(location, tmp_path / "here", seed=7)
    new = RunDirectory(here.run_dir)
    restore_run_dir(here, CheckpointStore(here.checkpoints))
    assert new.metrics.read_bytes() == b'{"nimg": 50}\n{"nimg": 100}\n'
    assert new.events.read_bytes() == b'{"event": "start"}\n'
    assert new.wandb_run_id.read_text() == "abcd"
    assert load_config(new.config).seed == 7
    with pytest.raises(ConfigError, match="seed: 7 -> 8"):
        held_run._check_same_run(config_at(location, tmp_path / "here", seed=8), new)


def test_a_new_run_takes_nothing_from_an_old_one_without_checkpoints(
    tmp_path: Path, location: str
) -> None:
    config = config_at(location, tmp_path)
    target = store_copy(config)
    assert target is not None
    target.put("events.jsonl", [b'{"event": "of an old run"}\n'])
    restore_run_dir(config, CheckpointStore(config.checkpoints))
    assert not config.run_dir.exists()
    assert store_copy(config_at(None, tmp_path)) is None


def fail_first(monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> list[str]:
    """Let a method raise an error of the network twice; returns the list of its calls."""
    method, calls = getattr(kind, name), list[str]()

    def away_at_first(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) <= 2:
            raise ConnectionResetError("the store is away")
        return method(self, *arguments, **named)

    monkeypatch.setattr(kind, name, away_at_first)
    return calls


@pytest.mark.parametrize(
    ("kind", "method"),
    [(CheckpointStore, "lineage"), (CheckpointStore, "describe"), (StoreCopy, "events")],
)
def test_a_start_waits_for_a_store_that_is_away_for_a_moment(
    tmp_path: Path, location: str, monkeypatch: pytest.MonkeyPatch, kind: type, method: str
) -> None:
    there = config_at(location, tmp_path / "there", seed=7)
    save(there, 100, b'{"nimg": 100}\n')
    target = store_copy(there)
    assert target is not None
    target.put("events.jsonl", [b'{"event": "start"}\n'])

    here = config_at(location, tmp_path / "here", seed=7)
    run_dir = RunDirectory(here.run_dir)
    calls = fail_first(monkeypatch, kind, method)
    restore_run_dir(here, CheckpointStore(here.checkpoints))
    assert len(calls) == 3
    assert run_dir.metrics.read_bytes() == b'{"nimg": 100}\n'
    assert run_dir.events.read_bytes() == b'{"event": "start"}\n'
    assert load_config(run_dir.config).seed == 7


def test_a_start_looks_for_earlier_settings_until_the_store_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_at(None, tmp_path, seed=7)
    save(config, 100, b"")
    restore_run_dir(config, CheckpointStore(config.checkpoints))
    with monkeypatch.context() as patch:
        calls = fail_first(patch, CheckpointStore, "names")
        assert resolve_run.previous_config(config) == config
        assert len(calls) == 3
    fail_first(monkeypatch, CheckpointStore, "lineage")
    assert start.resume_config(str(config.run_dir), {}) == config

    def away(self: object) -> list[CheckpointName]:
        raise ConnectionResetError("the store is away")

    monkeypatch.setattr(CheckpointStore, "names", away)
    hasty = config.with_changes({"data.store_deadline_seconds": 0.3})
    with pytest.raises(StoreError, match="cannot be reached within 0.3 s"):
        resolve_run.previous_config(hasty)


def test_a_resume_by_url_waits_for_a_store_that_is_away_for_a_moment(
    tmp_path: Path, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(config_at(location, tmp_path / "there", seed=7), 100, b"")
    fail_first(monkeypatch, CheckpointStore, "describe")
    assert start.resume_config(f"{location}/mine", {}).seed == 7


@pytest.mark.parametrize(
    ("name", "other"), [("wandb_run_id", "config"), ("config", "wandb_run_id")]
)
def test_a_restored_document_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, other: str
) -> None:
    """A disk that is full leaves no empty file, which the next start would take for the run's."""
    config = config_at(None, tmp_path)
    save(config, 100, b"")
    full = getattr(RunDirectory(config.run_dir), name)
    write(getattr(RunDirectory(config.run_dir), other), b"is there")

    def write_some(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text.encode()[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def fsync(file: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{file}")).name.strip(".").startswith(full.name):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_some)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        restore_run_dir(config, CheckpointStore(config.checkpoints))
    assert not full.exists()


def test_a_run_is_gone_on_with_by_the_url_of_its_checkpoints(tmp_path: Path, location: str) -> None:
    save(config_at(location, tmp_path / "there", seed=7), 100, b"")
    found = start.resume_config(
        f"{location}/mine/", {"storage": str(tmp_path / "here"), "training.total_kimg": 500}
    )
    assert (found.seed, found.name, found.training.total_kimg) == (7, "mine", 500)
    assert found.checkpoints == f"{location}/mine"
    assert found.run_dir == tmp_path / "here" / "mine"
    with pytest.raises(CheckpointError, match="other has no checkpoint that verifies"):
        start.resume_config(f"{location}/other", {})


def test_relative_paths_of_a_job_lead_to_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True)
    config = Config().with_changes({"checkpoint.location": "saved"})
    monkeypatch.chdir(tmp_path)
    kept = resolve_run.absolutize_paths(config, console)
    assert (kept.storage, kept.checkpoint.location) == (f"{tmp_path}/runs", f"{tmp_path}/saved")
    assert console.export_text() == ""

    package = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_12"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    kept = resolve_run.absolutize_paths(config, console)
    assert (kept.storage, kept.checkpoint.location) == ("~/runs", "~/saved")
    assert "storage is ~/runs, as Ray deletes the folder of a job" in console.export_text()
    absolute = Config().with_changes({"storage": "/runs", "checkpoint.location": "s3://b/runs"})
    assert resolve_run.absolutize_paths(absolute, console) == absolute


class Call:
    """A method of an actor, called at once; `ray.get` passes on what it gave."""

    def __init__(self, method: Any) -> None:
        self.remote = method


@pytest.fixture
def other_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The driver's folder, reached through its actor."""
    monkeypatch.setattr("ray.get", lambda value: value)
    (tmp_path / "driver").mkdir()
    real = DriverActor(str(tmp_path / "driver"))

    class Handle:
        def __getattr__(self, name: str) -> Call:
            return Call(getattr(real, name))

    return Handle()


def test_what_rank_0_writes_on_another_host_appears_in_the_driver_s_folder(
    tmp_path: Path, other_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_actor, "_LINES_SECONDS", 0.01)
    driver, worker = tmp_path / "driver", tmp_path / "worker"
    write(driver / "config.yaml", b"seed: 7\n")
    write(driver / "events.jsonl", b'{"event": "waiting"}\n')
    # Of another run that had the same name.
    for name in ("metrics.jsonl", "events.jsonl", "wandb_run_id", "snapshots/a.safetensors"):
        write(worker / name, b"stale\n")
    with copied_to_driver(Messages(other_host, "token"), worker, World(0, 0, 2)):
        assert (worker / "config.yaml").read_bytes() == b"seed: 7\n"
        assert not (worker / "metrics.jsonl").exists()
        assert not (worker / "wandb_run_id").exists()
        with (worker / "events.jsonl").open("ab") as file:
            file.write(b'{"event": "start"}\n')
        with (driver / "events.jsonl").open("ab") as file:
            file.write(b'{"event": "fault"}\n')
        add_missing_lines(worker / "metrics.jsonl", b"1\n2\n")
        until(lambda: (driver / "metrics.jsonl").is_file())
        write(worker / "snapshots/b.safetensors", b"w" * (3 * 2**24 + 5))
        write(worker / "samples/empty.png", b"")
    assert (driver / "metrics.jsonl").read_bytes() == b"1\n2\n"
    lines = (driver / "events.jsonl").read_text().splitlines()
    assert sorted(lines) == [f'{{"event": "{name}"}}' for name in ("fault", "start", "waiting")]
    assert (driver / "snapshots/b.safetensors").read_bytes() == b"w" * (3 * 2**24 + 5)
    assert (driver / "samples/empty.png").read_bytes() == b""
    assert not (driver / "snapshots/a.safetensors").exists()
    assert not list(driver.rglob(".*"))


@pytest.mark.parametrize("ends_well", [True, False])
def test_what_could_not_be_copied_to_the_driver_is_left_as_a_message(
    tmp_path: Path, other_host: Any, monkeypatch: pytest.MonkeyPatch, ends_well: bool
) -> None:
    """As with a full disk on the driver's host, of which Ray tells with a traceback."""

    def put(self: DriverActor, *_: Any, **__: Any) -> Any:
        full = OSError(errno.ENOSPC, "No space left on device")
        return RayTaskError("put", "Traceback of many lines " * 50, full).as_instanceof_cause()

    def get(value: Any) -> Any:
        if isinstance(value, RayTaskError):
            raise value
        return value

    monkeypatch.setattr(DriverActor, "put", put)
    monkeypatch.setattr("ray.get", get)
    messages, worker = Messages(other_host, "token"), tmp_path / "worker"

    @contextmanager
    def until_the_end() -> Iterator[None]:
        with copied_to_driver(messages, worker, World(0, 0, 2)):
            write(worker / "snapshots/b.safetensors", b"weights")
            assert messages.get("not_copied") is None
            yield

    if ends_well:
        with until_the_end():
            pass
    else:
        with pytest.raises(DataError, match="sample 7"), until_the_end():
            raise DataError("sample 7")
    told = messages.get("not_copied")
    assert f"rank 0 wrote into {worker} on " in told
    assert "was copied to this host: OSError: [Errno 28] No space left on device" in told


@pytest.mark.parametrize("ends_well", [True, False])
def test_an_incomplete_copy_in_a_store_is_told_of_however_a_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_well: bool
) -> None:
    target = FakeTarget()
    target.failures = 1_000_000
    monkeypatch.setattr(held_run, "store_copy", lambda config: target)
    config, console = config_at(None, tmp_path), Console(record=True)
    write(config.run_dir / "events.jsonl", b"1\n")
    held: Any = SimpleNamespace(is_current=lambda: True)
    if ends_well:
        with held_run._copied(config, console, held):
            pass
    else:
        with pytest.raises(DataError), held_run._copied(config, console, held):
            raise DataError("sample 7")
    assert "beside the checkpoints is not complete: OSError: the store" in console.export_text()


def test_nothing_is_copied_where_the_driver_sees_the_folder(
    tmp_path: Path, other_host: Any
) -> None:
    driver = tmp_path / "driver"
    with marked(driver, "token"):
        with copied_to_driver(Messages(other_host, "token"), driver, World(0, 0, 2)) as copy:
            assert copy is None
        with copied_to_driver(Messages(other_host, "another"), driver, World(1, 0, 2)) as copy:
            assert isinstance(copy, Copy)
    assert list(driver.iterdir()) == []


def test_lines_whose_answer_was_lost_are_not_taken_twice(tmp_path: Path) -> None:
    driver = DriverActor(str(tmp_path))
    driver.append("a", "metrics.jsonl", 10, b"1\n2\n")
    driver.append("a", "metrics.jsonl", 10, b"1\n2\n")
    driver.append("a", "metrics.jsonl", 10, b"1\n2\n3\n")
    driver.append("a", "metrics.jsonl", 16, b"4\n")
    driver.append("b", "metrics.jsonl", 0, b"5\n")
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"1\n2\n3\n4\n5\n"
