"""The W&B workspace and report of a project: panels for what every run logs.

The panels are a table of the names of a row's columns, from which wandb-workspaces makes what W&B
stores. A test compares the table with what runs of all training methods log, in both directions: no
panel stays empty, and every column has a panel or stands in `WITHOUT_PANEL` with the reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ganscale.errors import ConfigError

_TIMEOUT_SECONDS = 30


_ADVERSARIAL = ("gan", "vae-gan", "encoder", "bigan", "semi-supervised")
_AUTOENCODING = ("vae", "vae-gan", "encoder")
_ALL = ("gan", "vae", "vae-gan", "encoder", "bigan", "semi-supervised")

WITHOUT_PANEL = {
    "step": "counts global batches, nimg their images",
    "nimg": "the horizontal axis of every panel",
    "attempt": "an attempt begins where faults/resume or faults/rollback steps up",
    "time/unix": "W&B stores the time of each row itself",
}
"""Columns that no panel shows, and why."""


@dataclass(frozen=True)
class Curve:
    """Lines over the position; names that a run does not log are left out by W&B.

    `regex` is for families of names whose members differ from run to run. `methods` are the
    training methods whose runs log at least one of the names, if what it shows is switched on.
    """

    title: str
    names: tuple[str, ...] = ()
    regex: str | None = None
    is_logarithmic: bool = False
    methods: tuple[str, ...] = _ALL
    needs_gpu: bool = False


@dataclass(frozen=True)
class Pictures:
    """The pictures of a name, step by step."""

    name: str


@dataclass(frozen=True)
class Section:
    """Panels that belong together."""

    name: str
    text: str
    panels: tuple[Curve | Pictures, ...]


_FAULTS = Curve("faults so far", regex=r"faults/.*")

SECTIONS = (
    Section(
        "Losses",
        "Where a fault's count steps up, look for what the curves do there.",
        (
            Curve("losses", ("train/loss_D", "train/loss_G", "train/loss_E")),
            Curve("logits", ("train/real_logits", "train/fake_logits"), methods=_ADVERSARIAL),
            Curve("penalties", regex=r"train/penalty_.*", methods=_ADVERSARIAL),
            Curve(
                "reconstruction and divergence",
                ("train/squared_error", "train/kl", "train/adversarial_loss"),
                is_logarithmic=True,
                methods=_AUTOENCODING,
            ),
            Curve(
                "classification of the labelled images",
                ("train/cross_entropy", "train/accuracy"),
                methods=("semi-supervised",),
            ),
            _FAULTS,
        ),
    ),
    Section(
        "Metrics",
        "Distances fall, shares rise; diversity that falls to nothing is a collapse.",
        (
            Curve("distances", regex=r"metrics/(fid|fd|kid|kd).*"),
            Curve("precision and recall", regex=r"metrics/(precision|recall|density|coverage).*"),
            Curve(
                "inception score, authenticity, two-sample tests",
                regex=r"metrics/(inception_score|authenticity|c2st).*",
            ),
            Curve("diversity", ("metrics/diversity",)),
        ),
    ),
    Section("Samples", "The same latents as they learn.", (Pictures("samples"),)),
    Section(
        "Gradients and scales",
        "A scale that falls again and again, or skips that do not stop, are divergence.",
        (
            Curve("gradient norms", regex=r"train/grad_norm_.", is_logarithmic=True),
            Curve("loss scales", regex=r"train/loss_scale_.", is_logarithmic=True),
            Curve("skipped steps", regex=r"train/skips_."),
            Curve("augmentation", ("train/augment_p",), methods=_ADVERSARIAL),
        ),
    ),
    Section(
        "Speed",
        "Seconds are those of a step, mean over workers; a wait for data is a reader too slow.",
        (
            Curve("images per second", ("time/images_per_second",)),
            Curve("parts of a step", regex=r"time/.*_seconds", is_logarithmic=True),
            Curve("wait for data, by worker", regex=r"workers/.*/data_wait_seconds"),
            Curve("memory, by worker", regex=r"workers/.*/memory_gib"),
            Curve("processor, by worker", regex=r"workers/.*/cpu_percent"),
            Curve("GPU memory, by worker", regex=r"workers/.*/gpu_memory_gib", needs_gpu=True),
            Curve("peak GPU memory of rank 0", ("gpu/peak_memory_gib",), needs_gpu=True),
            Curve("damaged samples left out", ("data/num_skipped",)),
        ),
    ),
    Section("Faults", "What went wrong, and what was done.", (_FAULTS,)),
)


def workspace(entity: str, project: str, group: str | None) -> Any:
    """The workspace as wandb-workspaces has it; `save` stores it."""
    workspaces = _library("workspaces")
    runs = workspaces.RunsetSettings(
        filters=_filter(group), groupby=[workspaces.Metric("Group")] if group else []
    )
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=_title(group),
        sections=[
            workspaces.Section(
                name=section.name,
                panels=[_panel(panel) for panel in section.panels],
                is_open=True,
                pinned=section.name == "Losses",
            )
            for section in SECTIONS
        ],
        settings=workspaces.WorkspaceSettings(x_axis="nimg"),
        runset_settings=runs,
    )


def report(entity: str, project: str, group: str | None) -> Any:
    """The report: a heading, a sentence and the panels of each section."""
    reports = _library("reports.v2")
    blocks: list[Any] = [reports.TableOfContents()]
    for section in SECTIONS:
        # Without a project it is the report's own, and nobody need be asked whether there is one.
        runs = reports.Runset(filters=_filter(group), groupby=["group"] if group else [])
        panels = [_panel(panel) for panel in section.panels]
        blocks += [
            reports.H1(section.name),
            reports.P(section.text),
            reports.PanelGrid(runsets=[runs], panels=panels),
        ]
    return reports.Report(
        entity=entity, project=project, title=_title(group), blocks=blocks, width="fluid"
    )


def definition(entity: str, project: str, group: str | None) -> dict[str, Any]:
    """Both as what W&B stores, for keeping or looking at."""
    return {
        name: json.loads(made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
        for name, made in (
            ("workspace", workspace(entity, project, group)),
            ("report", report(entity, project, group)),
        )
    }


def saved(entity: str | None, project: str, group: str | None) -> list[str]:
    """Store both at W&B; returns where they are. Raises what wandb raises."""
    if entity is None:
        import wandb

        entity = wandb.Api(timeout=_TIMEOUT_SECONDS).default_entity
        if entity is None:
            raise ConfigError("W&B names no default entity for this key: set --entity")
    made = [workspace(entity, project, group), report(entity, project, group)]
    return [one.save().url for one in made]


def _panel(panel: Curve | Pictures) -> Any:
    reports = _library("reports.v2")
    if isinstance(panel, Pictures):
        return reports.MediaBrowser(title=panel.name, media_keys=[panel.name], num_columns=2)
    return reports.LinePlot(
        title=panel.title,
        x="nimg",
        y=list(panel.names),
        metric_regex=panel.regex,
        log_y=panel.is_logarithmic or None,
    )


def _filter(group: str | None) -> str:
    return "" if group is None else f"Group = '{group}'"


def _title(group: str | None) -> str:
    return "ganscale" if group is None else f"ganscale {group}"


def _library(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"wandb_workspaces.{name}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "dashboards need wandb-workspaces: pip install '.[dashboards]'"
        ) from error
