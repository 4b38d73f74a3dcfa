"""Runs as people name them: a folder, RUN@KIMG, or a file within a run's folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ganscale.config import Config, load_config
from ganscale.errors import ConfigError
from ganscale.run_directory import RunDirectory, containing_run
from ganscale.storage import is_url


@dataclass(frozen=True)
class RunReference:
    """A path, and the position in a run's training that is meant."""

    path: Path
    """Absolute; of a run's folder, or of whatever else was named."""
    kimg: float | None
    """In thousands of images; None for the newest position."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse PATH or PATH@KIMG; a path that exists as it is may have an @ in its name.

        Raises `ConfigError` if what follows the @ is not a number.
        """
        path = Path(text).expanduser().absolute()
        # The last @, since folders of runs may have others in their names.
        run, at, kimg = str(path).rpartition("@")
        if not at or path.exists():
            return cls(path, None)
        try:
            return cls(Path(run), float(kimg))
        except ValueError:
            raise ConfigError(f"{text}: expected RUN or RUN@KIMG") from None


def default_reference(subject: str, option: str = "--reference") -> str:
    """The location of the shards that a run trains on.

    Args:
        subject: the run's folder, RUN@KIMG, or a snapshot within the run's folder.
        option: the option that names other images, for messages.

    Raises:
        ConfigError: if `subject` is none of these, the run's configuration names no shards, or
            they are not there any more.
    """
    run_dir = containing_run(RunReference.parse(subject).path)
    shards = None if run_dir is None else shards_of_run(run_dir)
    if shards is None:
        raise ConfigError(f"{subject} is not part of a run that names its data: give {option}")
    if not is_url(shards) and not Path(shards).expanduser().exists():
        raise ConfigError(
            f"{subject} was trained on {shards}, which does not exist here: give {option}"
        )
    return shards


def shards_of_run(run_dir: RunDirectory) -> str | None:
    """Where the shards are that a run trains on, by its configuration; the run may be moved."""
    config = load_config(run_dir.config)
    shards = config.data.shards
    return None if shards is None else run_dir.moved(shards, config.storage)


def due_by(kimg: float, config: Config) -> int:
    """The position of the first step that reaches `kimg`, in images."""
    # Positions are multiples of the batch size, so what is due at `kimg` is written by the step
    # that passes it.
    batch_size = config.training.batch_size
    return math.ceil(1000 * kimg / batch_size) * batch_size
