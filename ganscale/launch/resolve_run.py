"""Before a run starts: its paths are made absolute, its shards found or built, and both checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config, load_config
from ganscale.config.changes import settings_by_name
from ganscale.data.building import build_shards, source_digest
from ganscale.data.resolve_source import NAMED_SOURCES, resolve_source, source_variable
from ganscale.data.sources import SourceSpec, open_source
from ganscale.errors import GanscaleError
from ganscale.run_directory import RunDirectory
from ganscale.storage import RetryPolicy, is_url, retry
from ganscale.tracking.console import counting
from ganscale.training.build import check_against_shards, load_shards

_RAY_PACKAGES = "/runtime_resources/working_dir_files/"
"""In the path of a job's working directory, which is a package that Ray has unpacked."""

_PATHS = (
    "storage",
    "checkpoint.location",
    "data.cache_dir",
    "evaluation.reference",
    "method.generator",
)


def resolve_config(config: Config, console: Console) -> Config:
    """The configuration with absolute paths, its shards built and checked."""
    config = prepare_shards(absolutize_paths(config, console), console)
    check_against_shards(config, load_shards(config))
    return config


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


def previous_config(config: Config) -> Config | None:
    """The configuration that the run had until now; None if it has no checkpoint yet."""
    run_dir = RunDirectory(config.run_dir)
    if not run_dir.config.is_file():
        return None
    store = CheckpointStore(config.checkpoints)
    failure = f"{store.location} cannot be reached"
    if not retry(store.names, RetryPolicy.of(config.data), failure):
        return None
    return load_config(run_dir.config)


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
        opened = open_source(spec)
        with counting(f"building shards in {path}", len(opened), console) as progress:
            build_shards(spec, path, source=opened, progress=progress, notify=notify)
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


def _shards_name(source: str, spec: SourceSpec) -> str:
    """One for each source: folders of the same last name are not the same images."""
    if not spec.path:
        return spec.kind
    if source in NAMED_SOURCES:
        return "cifar100" if source == "cifar100" else "cifar10"
    path = Path(source).expanduser().absolute()
    return f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


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
