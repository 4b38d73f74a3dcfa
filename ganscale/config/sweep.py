"""A sweep's file: a configuration, what varies in it, how trials are compared and ended.

Everything is checked before anything starts: each trial's configuration, and in a population also
the extreme values that its members may reach. A sweep that fails at its hundredth trial, days
later, is the alternative. Neither torch nor Ray is imported here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError

from ganscale.config.changes import MAY_CHANGE_IN_POPULATION
from ganscale.config.loading import load_config, read_yaml
from ganscale.config.messages import explain, unknown_field
from ganscale.config.run import Config, by_field, field_names
from ganscale.config.schedule import Schedule
from ganscale.config.search_space import Domain, drawn
from ganscale.config.section import Section, by_name
from ganscale.config.sections import refuse_old_metric
from ganscale.errors import ConfigError

_PLACES = ("name", "storage", "checkpoint.location", "launch.ray_address")
"""Fields that say where things are; the sweep gives each trial its own."""

_DATA = ("data.source", "data.shards")
"""Fields that say what is trained on: the shards are made once, from the base configuration."""


class Asha(Section):
    """Asynchronous successive halving: the worse are stopped early (arXiv 1810.05934)."""

    name: Literal["asha"] = "asha"
    grace_kimg: float = Field(gt=0)
    """No trial is stopped before; the first rung."""
    reduction: float = Field(3.0, gt=1)
    """The best 1/reduction go on at each rung; the next is at so many times the position."""


class Population(Section):
    """Population-based training: the worse copy the better and vary their values (1711.09846)."""

    name: Literal["pbt"] = "pbt"
    interval_kimg: float = Field(gt=0)
    """All trials are compared each time they have come this far."""
    quantile: float = Field(0.25, gt=0, le=0.5)
    """The worst part, which copies from the best part of the same size."""
    factors: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.8, 1.25)
    """A copied value is multiplied by one of them; with reciprocal ones it does not drift."""
    resample: float = Field(0.25, ge=0, le=1)
    """How often a value is drawn anew instead."""


class NoScheduler(Section):
    """Every trial runs to its end."""

    name: Literal["none"] = "none"


Scheduler = Annotated[Asha | Population | NoScheduler, Field(discriminator="name"), by_name("none")]


class SweepFile(Section):
    """The file as it is written."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the sweep, of its folder, and of the group of its runs in W&B."""
    config: str = "quickstart"
    """A preset, or a .yaml file."""
    overrides: dict[str, Any] = {}
    """Dotted fields that all trials have."""
    search: dict[str, Domain] = Field(min_length=1)
    """Dotted fields that vary."""
    metric: Annotated[str, BeforeValidator(refuse_old_metric)] = "metrics/diversity"
    """Column of metrics.jsonl, or `fid` for the Frechet distance of the evaluations."""
    mode: Literal["min", "max"]
    """Whether low or high is good."""
    scheduler: Scheduler = NoScheduler()
    """Which trials are ended early, or copy others."""
    trials: int | None = Field(None, ge=1)
    """How many; null is one for each point of the grid."""
    seed: int = Field(0, ge=0)
    """Decides what is drawn."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at once; null is as many as there is room for, which a population always takes."""

    @property
    def num_points(self) -> int:
        """Size of the grid; 1 without any."""
        points = 1
        for domain in self.search.values():
            points *= len(domain.grid or (None,))
        return points

    @property
    def num_trials(self) -> int:
        """How many trials there are."""
        return self.trials or self.num_points


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, as it begins."""

    number: int
    name: str
    values: dict[str, Any]
    """Of the fields that vary, as drawn."""


@dataclass(frozen=True)
class Sweep:
    """A sweep whose every trial has a valid configuration; `base` is what they have in common."""

    file: SweepFile
    base: Config
    source: str
    """Preset or path of the configuration that `base` is made of."""

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Read and check a file. Raises `ConfigError` with one line that says what is wrong."""
        path = Path(source).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"no such sweep file: {path}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not a text file; expected YAML in UTF-8") from None
        return cls.of(read_yaml(text, path), path)

    @classmethod
    def of(cls, values: Any, path: Path) -> Self:
        """From the file's values; `path` leads to a configuration beside it."""
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected fields of a sweep, got {type(values).__name__}")
        try:
            file = SweepFile.model_validate(values)
        except ValidationError as error:
            names = list(SweepFile.model_fields)
            raise ConfigError(f"{path}: {explain(error.errors(), names)}") from None
        source = (
            path.parent / file.config if file.config.endswith((".yaml", ".yml")) else file.config
        )
        sweep = cls(file, load_config(source).with_changes(file.overrides), str(source))
        for problem in sweep._problems():
            raise ConfigError(f"{path}: {problem}")
        return sweep

    @property
    def root(self) -> Path:
        """Absolute path of the sweep's folder."""
        return Path(self.base.storage).expanduser().absolute() / self.file.name

    @property
    def every_kimg(self) -> float:
        """Distance between values of the metric, in thousands of images."""
        # Values are read from rows, so they come no more often than rows do.
        base = self.base
        if self.file.metric == "metrics/diversity":
            return max(base.samples.every_kimg, base.tracking.log_every_kimg)
        if self.file.metric == "fid" or self.file.metric.startswith("metrics/"):
            return max(base.evaluation.every_kimg, base.tracking.log_every_kimg)
        return base.tracking.log_every_kimg

    def trials(self) -> list[Trial]:
        """All of them, first to last."""
        return [
            Trial(n, f"{self.file.name}-{n:03d}", drawn(self.file.search, self.file.seed, n))
            for n in range(self.file.num_trials)
        ]

    def settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted fields and what they are set to, for values of the fields that vary."""
        search = self.file.search
        return {
            name: _times(self._base_value(name), value) if search[name].relative else value
            for name, value in values.items()
        }

    def config(self, name: str, values: Mapping[str, Any]) -> Config:
        """The configuration of a trial: its folder is in the sweep's."""
        # Below the sweep's own folder and prefix, so that trials of two sweeps never meet.
        location = self.base.checkpoint.location
        places = {"name": name, "storage": str(self.root)}
        if location is not None:
            places["checkpoint.location"] = f"{location.rstrip('/')}/{self.file.name}"
        # The overrides once more: another architecture would drop those of the base's.
        overrides = by_field(self.file.overrides)
        return self.base.with_changes({**overrides, **self.settings(values), **places})

    def explored(self, values: Mapping[str, Any], generator: random.Random) -> dict[str, Any]:
        """What a trial of a population makes of values that it has copied."""
        population = self.file.scheduler
        assert isinstance(population, Population)
        factors, resample = population.factors, population.resample
        return {
            name: domain.explored(values[name], factors, resample, generator)
            for name, domain in self.file.search.items()
        }

    def _base_value(self, name: str) -> Any:
        value: Any = self.base
        for part in name.split("."):
            value = getattr(value, part, None)
        return value

    def _problems(self) -> Iterator[str]:
        """What is wrong, the most basic first. Making the configurations may raise as well."""
        yield from self._wrong_fields()
        yield from self._wrong_numbers()
        for trial in self.trials():
            self.config(trial.name, trial.values)
        if isinstance(self.file.scheduler, Population):
            # One field at a time at each of its bounds: all combinations would be too many, and
            # what a population reaches is checked again when it gets there.
            first = self.trials()[0]
            for name, domain in self.file.search.items():
                for value in domain.extremes:
                    self.config(first.name, {**first.values, name: value})

    def _wrong_fields(self) -> Iterator[str]:
        known = list(field_names())
        for name, domain in self.file.search.items():
            value = self._base_value(name)
            if name not in known:
                yield unknown_field(name, known)
            if name in _PLACES:
                yield f"{name} cannot vary: each trial has a folder in that of the sweep"
            if name in _DATA:
                yield f"{name} cannot vary: all trials of a sweep train on one set of images"
            if domain.relative and not isinstance(value, int | float | Schedule):
                yield f"{name}={value!r} is no number that a relative value could multiply"
            factors = domain.values if domain.relative else ()
            for factor in factors:
                if not isinstance(factor, int | float):
                    yield f"{name}: {factor!r} is no number, which a relative value has to be"
            if not isinstance(self.file.scheduler, Population):
                continue
            if name not in MAY_CHANGE_IN_POPULATION:
                yield (
                    f"{name} cannot change within a run, so a population cannot explore it; it may "
                    f"explore {', '.join(MAY_CHANGE_IN_POPULATION)}"
                )
            if name.startswith(("penalty.", "augment.p")) and 0 in domain.extremes:
                yield f"{name} may not become 0 in a population: what is off has no state to copy"

    def _wrong_numbers(self) -> Iterator[str]:
        file, base, every = self.file, self.base, self.every_kimg
        total, scheduler = base.training.total_kimg, file.scheduler
        is_gridded = any(domain.grid for domain in file.search.values())
        if file.trials is None and not is_gridded:
            yield "trials: say how many, as nothing in search is a grid"
        if file.num_trials % file.num_points:
            yield f"trials={file.trials}: expected a multiple of {file.num_points} points of grids"
        evaluated = base.evaluation.metrics if base.evaluation.every_kimg else ()
        needs = file.metric == "fid" or file.metric.startswith("metrics/")
        if (needs and not evaluated and file.metric != "metrics/diversity") or (
            file.metric == "fid" and "fid" not in evaluated
        ):
            yield (
                f"metric={file.metric} needs evaluations: set evaluation.every_kimg in overrides, "
                "with the metric among evaluation.metrics"
            )
        elif needs and not _is_column_of(file.metric, evaluated):
            yield (
                f"metric={file.metric} is not among the results of evaluation.metrics="
                f"{','.join(evaluated)}: expected metrics/diversity, fid, or metrics/... of these"
            )
        if base.launch.backend == "inprocess" and base.launch.max_workers > 1:
            yield "launch.backend=inprocess has one worker: set launch.backend=ray in overrides"
        if isinstance(scheduler, Asha) and not every <= scheduler.grace_kimg <= total:
            yield _between("scheduler.grace_kimg", scheduler.grace_kimg, every, total)
        if isinstance(scheduler, Population):
            if not every <= scheduler.interval_kimg < total:
                yield _between("scheduler.interval_kimg", scheduler.interval_kimg, every, total)
            if file.num_trials < 2:
                yield "a population needs two trials at least"
            if file.max_concurrent is not None:
                yield (
                    "max_concurrent: leave it out of a population, whose trials take turns where "
                    "there is no room for all; launch.cpus_per_worker says how much one takes"
                )


def _is_column_of(metric: str, evaluated: Sequence[str]) -> bool:
    """Whether a column, or `fid`, is of one of these evaluations, by whichever network.

    Which network there will be is known where the trial runs.
    """
    if metric in ("fid", "metrics/diversity"):
        return True
    results = {"prdc": ("precision", "recall", "density", "coverage")}
    for name in evaluated:
        other = name.replace("fid", "fd").replace("kid", "kd")
        for stem in results.get(name, (name, other)):
            if metric == f"metrics/{stem}" or metric.startswith(f"metrics/{stem}_"):
                return True
    return False


def _between(name: str, value: float, every: float, total: float) -> str:
    return (
        f"{name}={value:g} must be between {every:g}, the distance between values of the metric, "
        f"and training.total_kimg={total:g}"
    )


def _times(value: Any, factor: float) -> Any:
    """A number or a schedule, multiplied at every position."""
    if not isinstance(value, Schedule):
        return value * factor
    ends = {"start": value.start * factor, "end": value.end * factor}
    return value.model_copy(update=ends).model_dump()
