"""Where everything of a run lies: `storage/name/` and the names inside it.

Whatever shows results reads these files; nothing hooks into the training code. So a run can be
looked at while it trains, after it has died, and on another machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run; nothing is created until somebody writes."""

    root: Path

    @property
    def name(self) -> str:
        """The run's name, which is the folder's."""
        return self.root.name

    @property
    def config(self) -> Path:
        """The resolved configuration, as YAML."""
        return self.root / "config.yaml"

    @property
    def is_run(self) -> bool:
        """Whether a run has written here."""
        return self.config.is_file() and (self.events.is_file() or self.snapshots.is_dir())

    @property
    def metrics(self) -> Path:
        """One JSON object a line per logged step, with the attempt that logged it.

        Where an attempt starts from an earlier position, its rows replace those after that.
        """
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """One JSON object a line per start, resume, checkpoint, fault, rollback, skip and end."""
        return self.root / "events.jsonl"

    @property
    def stacks(self) -> Path:
        """Stacks of the workers' threads, written when a step hung."""
        return self.root / "stacks"

    @property
    def report(self) -> Path:
        """The page of `ganscale report`."""
        return self.root / "report.html"

    @property
    def wandb_run_id(self) -> Path:
        """The id of the run in W&B, the same for all its attempts."""
        return self.root / "wandb_run_id"

    @property
    def snapshots(self) -> Path:
        """Generators for inference, one safetensors file each; further averages in subfolders."""
        return self.root / "snapshots"

    def snapshot(self, nimg: int, average: str = "") -> Path:
        """A generator after `nimg` real images; `average` names one of several."""
        folder = self.snapshots / average if average else self.snapshots
        # Padded, so that the order of the names is the order of the positions.
        return folder / f"nimg-{nimg:012d}.safetensors"

    def moved(self, path: str, storage: str) -> str:
        """Where a path of the run's configuration is now; `path` itself where that is not known.

        A folder of runs is often moved as a whole, with the shards that were built in it.

        Args:
            path: as the configuration has it: a path or a URL.
            storage: the folder that the run lay in, as the same configuration has it.
        """
        before = Path(storage).expanduser()
        if Path(path).exists() or not Path(path).is_relative_to(before):
            return path
        now = self.root.parent / Path(path).relative_to(before)
        return str(now) if now.exists() else path

    def averages_at(self, nimg: int) -> dict[str, Path]:
        """The snapshots of all averages after `nimg` real images, by name; "" is the main one.

        `best`, which is a copy of the main one at an earlier position, is not among them.
        """
        names = ["", *sorted(path.name for path in self.snapshots.glob("ema-*"))]
        paths = {name: self.snapshot(nimg, name) for name in names}
        return {name: path for name, path in paths.items() if path.is_file()}

    def snapshot_positions(self) -> list[int]:
        """The positions of the main average's snapshots, in real images, ascending."""
        return sorted(
            int(path.stem.removeprefix("nimg-")) for path in self.snapshots.glob("nimg-*")
        )

    def sample_grid(self, nimg: int) -> Path:
        """The picture drawn after `nimg` real images."""
        return self.root / "samples" / f"kimg-{nimg / 1000:09.3f}.png"

    def sample_grids(self) -> dict[int, Path]:
        """The pictures that were drawn, by their position in real images, ascending."""
        # By number, since the names of positions from 100,000 kimg on are longer than the others.
        paths = (self.root / "samples").glob("kimg-*.png")
        names = [(re.fullmatch(r"kimg-(\d+\.\d+)", path.stem), path) for path in paths]
        return dict(sorted((round(1000 * float(name[1])), path) for name, path in names if name))


def containing_run(path: Path) -> RunDirectory | None:
    """The run whose folder `path` is, or in which it is a snapshot; None if there is no such run.

    A snapshot lies in RUN/snapshots/ or RUN/snapshots/AVERAGE/, or is copied to a place as deep.
    """
    path = path.expanduser().absolute()
    # Not by config.yaml alone and not further up, as many a project has a file of that name.
    folders = (RunDirectory(folder) for folder in (path, *path.parents[:3]))
    return next((run_dir for run_dir in folders if run_dir.is_run), None)
