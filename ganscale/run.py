"""A run as an object, from the files in its folder: configuration, tables, pictures, generators.

Files are read when a property is asked for, so an object follows a run that is still training, and
looking at one changes nothing. Neither torch nor ray is loaded before a generator is.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ganscale.config import Config, load_config
from ganscale.errors import CheckpointError, ConfigError
from ganscale.json_lines import read_lines
from ganscale.report import text, write_report
from ganscale.report.runs import Run as RunFiles
from ganscale.report.status import status_of
from ganscale.run_directory import RunDirectory
from ganscale.tracking.history import History, Row

if TYPE_CHECKING:
    import pandas as pd

    from ganscale.generation.generator import Generator

_SHOWN = ("train/loss_G", "train/loss_D", "metrics/diversity", "time/images_per_second")
"""Columns whose newest values stand in the short form of a run, if it has them."""
_FRECHET = ("metrics/fid", "metrics/fd_")


class Run:
    """A run of `ganscale train`, given its folder, in whatever state it is.

    Raises `ConfigError` if there is no such folder, or the folder is not a run, such as one that
    holds several runs.

    Example:
        >>> import ganscale
        >>>
        >>> run = ganscale.Run("runs/quickstart")
        >>> run.metrics.plot(x="nimg", y=["train/loss_D", "train/loss_G"])
        >>> run.generator()(16).grid().save("grid.png")
    """

    def __init__(self, path: str | Path) -> None:
        files = RunFiles.read(str(path))
        if files.is_empty:
            raise ConfigError(f"{path} holds nothing of a run")
        self._dir = RunDirectory(files.root)

    @property
    def path(self) -> Path:
        """The folder, absolute."""
        return self._dir.root

    @property
    def name(self) -> str:
        """The run's name, which is the folder's."""
        return self._dir.name

    @property
    def config(self) -> Config:
        """The configuration that it trains with, every setting resolved.

        Raises `ConfigError` if the file is missing or is refused by this version.
        """
        return load_config(self._dir.config)

    @property
    def state(self) -> str:
        """`finished`, `running`, `stopped`, `failed`, `interrupted` or `empty`; `unknown` where a
        run is silent whose checkpoints cannot be read from here."""
        return status_of(self._files()).kind

    @property
    def nimg(self) -> int:
        """How many real images it has been trained on."""
        return self._files().nimg

    @property
    def total_nimg(self) -> int:
        """How many real images it is trained on when it is finished."""
        return self.config.total_nimg

    @property
    def metrics(self) -> pd.DataFrame:
        """The rows of `metrics.jsonl` that are part of the run, by position.

        A line of the file is a row of the table. Rows that a rollback or a resume from an earlier
        checkpoint has replaced are left out. What a row does not have, and what was not finite, is
        NaN. The columns are those of the reference of log keys.
        """
        return _table(History.read(self._dir).rows)

    @property
    def events(self) -> pd.DataFrame:
        """All lines of `events.jsonl` in the order of the file: starts, checkpoints, faults.

        Every event has `time`, in seconds since 1970, and its name in `event`.
        """
        return _table(read_lines(self._dir.events))

    @property
    def samples(self) -> list[Path]:
        """The grids of samples that were drawn as it learned, oldest first."""
        return [*self._dir.sample_grids().values()]

    @property
    def snapshots(self) -> list[Path]:
        """The snapshots of the main average, oldest first, for `Generator.from_pretrained`."""
        return self._files().snapshots

    @property
    def averages(self) -> list[str]:
        """The names of what `generator` takes beside the main average: `best`, `ema-100`, ..."""
        folders = self._dir.snapshots.glob("*/")
        return sorted(folder.name for folder in folders if any(folder.glob("*.safetensors")))

    def generator(self, average: str = "", *, device: str = "cpu") -> Generator:
        """The newest generator.

        Args:
            average: one of `averages`, such as `best`, the main average where its FID was lowest;
                by default the main one as it is now.
            device: where images are drawn: `cpu`, `cuda` or `cuda:N`.

        Raises `CheckpointError` if there is none.
        """
        from ganscale.generation.generator import Generator

        if average and average not in self.averages:
            known = ", ".join(self.averages) or "only the main one"
            raise CheckpointError(f"{self.path} has no average {average!r}: it has {known}")
        place = self._dir.snapshots / average if average else self.path
        return Generator.from_pretrained(place, device=device)

    def report(self, path: str | Path | None = None) -> Path:
        """Write the page of `ganscale report`, and return where it is.

        `path` is by default `report.html` in the run's folder.
        """
        return write_report([str(self.path)], None if path is None else Path(path)).path

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        shown = f"<pre>{html.escape(repr(self))}</pre>"
        if samples := self.samples:
            data = base64.b64encode(samples[-1].read_bytes()).decode()
            shown += f'<img src="data:image/png;base64,{data}" alt="{samples[-1].name}">'
        return shown

    def _lines(self) -> Iterator[str]:
        files = self._files()
        total = "" if files.total_nimg is None else f" of {text.kimg(files.total_nimg)}"
        status = status_of(files)
        yield f"Run {self.name}: {status.kind} at {text.kimg(files.nimg)}{total}"
        yield f"  {status.reason}"
        columns = [name for name in files.columns if name.startswith(_FRECHET)] + list(_SHOWN)
        for name in columns:
            if (value := files.latest(name)) is not None:
                yield f"  {name} {text.number(value)}"

    def _files(self) -> RunFiles:
        return RunFiles.read(str(self.path))


def _table(lines: Sequence[Row]) -> pd.DataFrame:
    # Only here, since it takes half a second.
    import pandas as pd

    return pd.DataFrame([dict(line) for line in lines])
