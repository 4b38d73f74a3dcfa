"""What the process that starts a run does: find or build the shards, check, launch, follow."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config, load_config
from ganscale.config.changes import changed_settings, settings_by_name
from ganscale.config.run import merged, validated
from ganscale.data.building import build_shards, source_digest
from ganscale.data.resolve_source import NAMED_SOURCES, resolve_source, source_variable
from ganscale.data.sources import SourceSpec, open_source
from ganscale.errors import CheckpointError, ConfigError, GanscaleError
from ganscale.launch.documents import Copy, restore_run_dir, store_copy
from ganscale.launch.held_run import HeldRun, hold
from ganscale.launch.supervisor import Supervisor
from ganscale.run_directory import RunDirectory
from ganscale.storage import RetryPolicy, is_url, retry
from ganscale.tracking.console import counting
from ganscale.tracking.live_view import RunFollower, describe_event
from ganscale.tracking.sinks import EventLog
from ganscale.training.build import check_against_shards, load_shards
from ganscale.training.callbacks import Callback
from ganscale.training.stopping import TrainResult
from ganscale.world import launched_rank

_RAY_PACKAGES = "/runtime_resources/working_dir_files/"
"""In the path of a job's working directory, which is a package that Ray has unpacked."""

_PATHS = (
    "storage",
    "checkpoint.location",
    "data.cache_dir",
    "evaluation.reference",
    "method.generator",
)


def start(
    config: Config,
    console: Console,
    *,
    take_over: bool = False,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train as configured, on from the newest checkpoint if the run exists; waits for the end.

    SIGTERM and Ctrl-C end it early, with a checkpoint. Raises `RunInUse` if another process that is
    alive trains the run, unless `take_over`: then that one ends. `callbacks` are run by workers in
    this process; with others, `ConfigError` is raised.
    """
    if callbacks and config.launch.backend != "inprocess":
        raise ConfigError(
            f"callbacks are run in this process, but launch.backend={config.launch.backend}: "
            "set launch.backend=inprocess"
        )
    if launched_rank():  # torchrun starts many, of which one speaks
        console = Console(quiet=True)
    config = resolve_config(config, console)
    run_dir = RunDirectory(config.run_dir)
    with (
        run_session(config, console, take_over=take_over) as held,
        RunFollower(run_dir, config.total_nimg, console),
    ):
        if held is None or config.launch.backend == "inprocess":
            from ganscale.launch.local import train_in_process

            session = None if held is None else held.session
            return train_in_process(config, session, callbacks)
        from ganscale.launch.ray_train import train_on_ray

        return train_on_ray(config, supervisor_of(config, held, console), held)


def resolve_config(config: Config, console: Console) -> Config:
    """The configuration with absolute paths, its shards built and checked."""
    config = prepare_shards(absolutize_paths(config, console), console)
    check_against_shards(config, load_shards(config))
    return config


@contextmanager
def run_session(
    config: Config, console: Console, *, take_over: bool = False
) -> Iterator[HeldRun | None]:
    """Let this process train a run while the block runs.

    Its folder and its checkpoints stay as they are until the first attempt begins. Yields None on
    ranks of torchrun other than 0, which write nothing. Raises `ConfigError` if the folder holds a
    run with other settings, `RunInUse` if another process that is alive trains the run, unless
    `take_over`.
    """
    if config.launch.backend == "inprocess" and launched_rank():
        _check_same_run(config, RunDirectory(config.run_dir))
        yield None
        return
    with hold(config, console, take_over=take_over) as held:
        restore_run_dir(config, CheckpointStore(config.checkpoints))
        _check_same_run(config, RunDirectory(config.run_dir))
        with _copied(config, console, held):
            yield held


@contextmanager
def _copied(config: Config, console: Console, held: HeldRun) -> Iterator[None]:
    """Keep a copy of the run's documents where its checkpoints are, if that is an object store."""
    target = store_copy(config)
    if target is None:
        yield
        return
    copy = Copy(
        config.run_dir, target, lines_seconds=60.0, files_seconds=60.0, is_allowed=held.is_current
    )
    with copy:
        yield
    if copy.problem:
        text = f"the copy of {config.run_dir} beside the checkpoints is not complete: "
        console.print(f"[yellow]{text}{copy.problem}[/yellow]", highlight=False, soft_wrap=True)


def absolutize_paths(config: Config, console: Console) -> Config:
    """With absolute paths, as workers may have another working directory.

    That of a job is deleted by Ray, so there relative paths lead to the home folder, on each host.
    """
    is_job = _RAY_PACKAGES in Path.cwd().as_posix()
    changes = {}
    for name, place in settings_by_name(config).items():
        if name not in _PATHS or place is None or is_url(place) or place.startswith(("/", "~")):
            continue
        changes[name] = f"~/{place}" if is_job else str(Path(place).absolute())
        if is_job:
            console.print(f"{name} is {changes[name]}, as Ray deletes the folder of a job")
    return config.with_changes(changes)


def supervisor_of(config: Config, held: HeldRun, console: Console) -> Supervisor:
    """What keeps the run going, and writes down what happens to its groups.

    Before the first attempt has begun it tells that on the console alone.
    """
    run_dir, store = RunDirectory(config.run_dir), CheckpointStore(config.checkpoints)

    policy, failure = RetryPolicy.of(config.data), f"{store.location} cannot be reached"
    seen: list[int] = []

    def newest_nimg() -> int:
        try:
            seen.append(retry(lambda: next((n.nimg for n in store.lineage()), -1), policy, failure))
        except GanscaleError:
            if not seen:
                raise
        return seen[-1]  # a store that is away for long shows no progress

    def note(event: str, **fields: Any) -> None:
        if not held.is_current():
            text = describe_event({"event": event, **fields})
            console.print(text, highlight=False, soft_wrap=True)
            return
        with suppress(OSError):  # a full disk is no reason to end a run
            log = EventLog(run_dir.events)
            log.write(event, **fields)
            log.close()

    return Supervisor(config, newest_nimg, note)


def prepare_shards(config: Config, console: Console) -> Config:
    """The configuration with `data.shards` set to an absolute path, built first if need be.

    A set is built once for each content of the source: when images were added, changed or removed,
    or GANSCALE_CIFAR10 names another set, a new one is built beside the old one. A run that has
    begun keeps the shards that it has, and a line says so where its source has changed; where they
    are gone they are made again, and the digest in its checkpoints tells if they are the same.
    """
    begun = previous_config(config)
    if config.data.shards is None and begun and begun.data.source == config.data.source:
        known = begun.data.shards
        if known and (is_url(known) or Path(known).exists()):
            _notice_changed_source(config, known, console)
            config = config.with_changes({"data.shards": known})
    if config.data.shards is not None:
        if is_url(config.data.shards):
            return config
        path = Path(config.data.shards).expanduser().absolute()
        return config.with_changes({"data.shards": str(path)})
    storage = Path(config.storage).expanduser().absolute()
    with _alone_in(storage / "shards", console):
        path = _shards_of(config.data.source, storage, console)
    return config.with_changes({"data.shards": str(path)})


def _shards_of(source: str, storage: Path, console: Console) -> Path:
    """The shard set of what the source holds today, built if it is not there."""
    notify = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    spec, notice = resolve_source(source, "train", download_dir=storage / "downloads")
    if notice:
        notify(notice, style="yellow")
    path = _shards_path(source, spec, storage)
    if not path.exists():
        older = sorted(path.parent.glob(f"{_shards_name(source, spec)}-????????-train"))
        if older:
            notify(
                f"{spec} is not what {', '.join(map(str, older))} was built from: building a new "
                "set. Runs that began with the old one keep it; remove it when none needs it"
            )
        with counting(f"building shards in {path}", len(open_source(spec)), console) as progress:
            build_shards(spec, path, progress=progress, notify=notify)
    return path


def _notice_changed_source(config: Config, known: str, console: Console) -> None:
    """Say so if a run keeps shards of a source that has changed since they were built."""
    source, storage = config.data.source, Path(config.storage).expanduser().absolute()
    if is_url(known) or Path(known).parent != storage / "shards":
        return  # not built from the source by this command
    if source in NAMED_SOURCES and source_variable(source) not in os.environ:
        return  # formulas, or a download: neither changes
    with suppress(GanscaleError):  # a source that is gone is not needed
        spec, _ = resolve_source(source, "train", download_dir=storage / "downloads")
        if _shards_path(source, spec, storage) != Path(known):
            console.print(
                f"{spec} has changed since {config.run_dir} began, which keeps its shards in "
                f"{known}; to train on what is there now, choose another name=...",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def _shards_path(source: str, spec: SourceSpec, storage: Path) -> Path:
    """Where the set of the source's present content lies, or will."""
    digest = source_digest(spec, open_source(spec))
    return storage / "shards" / f"{_shards_name(source, spec)}-{digest[:8]}-train"


@contextmanager
def _alone_in(folder: Path, console: Console) -> Iterator[None]:
    """For the time of the block nobody else is in one of the same folder: torchrun's ranks come
    all at once."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=1.0)
    except Timeout:
        console.print(f"waiting for another process that makes shards in {folder}", soft_wrap=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def resume_config(run: str, overrides: dict[str, object]) -> Config:
    """The configuration of the run whose folder, or whose checkpoints' URL, `run` is, with changes.

    The folder may have been moved, renamed or copied; the URL is that of a run that this host has
    not seen. Raises `CheckpointError` if it is no run, or has no checkpoint that verifies.
    """
    if is_url(run):
        location, _, name = run.rstrip("/").rpartition("/")
        store = CheckpointStore(run)
        values = {"name": name, **(_newest_config(store) or {})}
        place = {"checkpoint.location": location, "name": name}
    else:
        run_dir = RunDirectory(Path(run).expanduser().absolute())
        if not run_dir.config.is_file():
            raise CheckpointError(f"{run} is not a run: it has no {run_dir.config.name}")
        place = {"storage": str(run_dir.root.parent), "name": run_dir.name}
        values = load_config(run_dir.config).model_dump()
        values["data"]["shards"] = _moved_shards(values, run_dir)
    config = validated(merged(values, {**place, **overrides}))
    store = CheckpointStore(config.checkpoints)
    if all(store.verify(name) is not None for name in store.lineage()):
        if config.checkpoint.location is not None and values["name"] != config.name:
            raise CheckpointError(
                f"{run} was renamed from {values['name']}, but its checkpoints were not, and "
                f"{store.location} has none: rename one of the two, so that both have one name"
            )
        raise CheckpointError(
            f"{store.location} has no checkpoint that verifies. See: ganscale checkpoint "
            f"list {run}; to start anew, use ganscale train with another name"
        )
    return config


def _moved_shards(values: dict[str, Any], run_dir: RunDirectory) -> str | None:
    """Where a run's shards are, which may have been moved with the storage that they lie in."""
    shards: str | None = values["data"]["shards"]
    if shards is None or is_url(shards) or Path(shards).exists():
        return shards
    storage = Path(values["storage"])
    if not Path(shards).is_relative_to(storage):
        return shards
    moved = run_dir.root.parent / Path(shards).relative_to(storage)
    return str(moved) if moved.exists() else shards


def _newest_config(store: CheckpointStore) -> dict[str, Any] | None:
    """That of the newest checkpoint whose documents verify."""
    for name in store.lineage():
        with suppress(CheckpointError):
            config: dict[str, Any] = store.describe(name)[0]["config"]
            return config
    return None


def _shards_name(source: str, spec: SourceSpec) -> str:
    """One for each source: folders of the same last name are not the same images."""
    if not spec.path:
        return spec.kind
    if source in NAMED_SOURCES:
        return "cifar100" if source == "cifar100" else "cifar10"
    path = Path(source).expanduser().absolute()
    return f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def previous_config(config: Config) -> Config | None:
    """The configuration that the run had until now; None if it has no checkpoint yet."""
    run_dir = RunDirectory(config.run_dir)
    if not run_dir.config.is_file() or not CheckpointStore(config.checkpoints).names():
        return None
    return load_config(run_dir.config)


def _check_same_run(config: Config, run_dir: RunDirectory) -> None:
    begun = previous_config(config)
    if begun is None:
        return
    changed = changed_settings(begun, config)
    if changed:
        raise ConfigError(
            f"{run_dir.root} holds a run with other settings ({'; '.join(changed)}): "
            "choose another name=..., or go on with it by ganscale resume"
        )
