"""What to do next with a run: rules from its state and its events, each with the exact command."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ganscale.config import Config
from ganscale.errors import ConfigError
from ganscale.report.curves import Point
from ganscale.report.runs import Run
from ganscale.report.status import Status, remaining
from ganscale.report.text import counted, kimg

_SLOW_DATA = 0.2
"""Part of a step's time beyond which waiting for data is worth a look."""

_ANNEALED = 0.1
"""Part of the first learning rate below which the last one trains hardly any more."""

_ALARMS = {
    "non_finite": (
        "A loss or a gradient was not finite",
        "Lower the learning rate, or clip gradients, in a run of another name.",
    ),
    "scale_collapse": (
        "The loss scale collapsed under fp16",
        "bf16 needs no scaling where the GPU has it.",
    ),
    "exploding": (
        "Gradients exploded",
        "Clip them, or lower the learning rate, in a run of another name.",
    ),
    "vanishing": (
        "Gradients vanished",
        "A penalty keeps the discriminator from being sure of everything.",
    ),
    "stuck": (
        "One network has won",
        "A penalty or augmentation weakens a discriminator that is too sure.",
    ),
    "collapse": (
        "The generated images became alike",
        "Augmentation or a penalty often prevents it; another seed sometimes does.",
    ),
}
"""By the guard's kind of alarm: what it says, and what helps."""


@dataclass(frozen=True)
class Advice:
    """A thing to do, why, and the command; some have none."""

    title: str
    text: str
    command: str = ""


def advice_for(run: Run, status: Status, parts: Mapping[str, Sequence[Point]]) -> list[Advice]:
    """The most urgent first; `parts` are those of a step (`curves.step_parts`)."""
    return [
        *_of_status(run, status),
        *_of_alarms(run),
        *_of_events(run),
        *_of_speed(run, parts),
        *(_of_result(run) if status.kind == "finished" else ()),
    ]


def _of_status(run: Run, status: Status) -> Iterator[Advice]:
    place = shlex.quote(run.place)
    if status.kind == "empty":
        storage, name = shlex.quote(str(run.root.parent)), shlex.quote(run.root.name)
        command = f"ganscale train --config quickstart storage={storage} name={name}"
        yield Advice("Train", "The folder is there, but no run has written to it.", command)
    if status.kind == "running":
        left = remaining(run)
        text = f"About {left} are left. " if left else ""
        yield Advice(
            "Look again later",
            f"{text}The report shows the files as they were when it was made.",
            f"ganscale report {place}",
        )
    if status.kind == "failed":
        yield Advice(
            "Read the reason first",
            f"{status.reason} docs/explanation/faults.md says what a run survives by itself and "
            "what it does not. A fault that would recur ends every attempt.",
        )
    if status.kind in ("stopped", "failed", "interrupted"):
        if run.has_checkpoint:
            yield Advice(
                "Resume",
                "It goes on from its newest checkpoint that verifies; what was computed since then "
                "is computed again.",
                f"ganscale resume {place}",
            )
        else:
            command = f"ganscale train --config {place}/config.yaml"
            yield Advice("Start again", "There is no checkpoint to go on from.", command)


def _of_alarms(run: Run) -> Iterator[Advice]:
    newest = {str(alarm.get("kind")): alarm for alarm in run.of_kind("alarm")}
    place = shlex.quote(run.place)
    for kind, alarm in newest.items():
        title, remedy = _ALARMS.get(kind, ("The guard raised an alarm", ""))
        at = kimg(alarm["nimg"]) if "nimg" in alarm else "an unknown position"
        text = f"At {at}: {alarm.get('message', '')}. {remedy} docs/troubleshooting.md says more."
        changes = {} if run.config is None else _remedy(kind, run.config)
        command = ""
        if changes:
            settings = " ".join(f"{name}={value}" for name, value in changes.items())
            name = shlex.quote(f"name={run.root.name}-2")
            command = f"ganscale train --config {place}/config.yaml {name} {settings}"
        yield Advice(title, text, command)
    if newest and run.config is not None and run.config.guard.policy != "rollback":
        yield Advice(
            "Let the guard go back by itself",
            "It then continues from the last healthy checkpoint with other latents "
            "(docs/explanation/faults.md, The guard).",
            f"ganscale resume {place} guard.policy=rollback",
        )


def _remedy(kind: str, config: Config) -> dict[str, Any]:
    """Settings of a new run that may do better; empty where the run has them, or cannot."""
    changes: dict[str, Any] = {}
    if kind in ("non_finite", "exploding") and config.optimizer.clip_norm is None:
        changes = {"optimizer.clip_norm": 1}
    if kind == "scale_collapse":
        changes = {"training.precision": "bf16"}
    if kind in ("vanishing", "stuck") and not config.penalty.twice_differentiated:
        changes = {"penalty.r1": 0.1}
    if kind == "collapse":
        changes = {"seed": config.seed + 1}
        if config.augment.name == "none":
            changes = {"augment.name": "diffaugment", "augment.p": 1}
    try:
        config.with_changes(changes)
    except ConfigError:  # a combination that cannot work, such as penalties under compile
        return {}
    return changes


def _of_events(run: Run) -> Iterator[Advice]:
    counts = Counter(event["event"] for event in run.events)
    place = shlex.quote(run.place)
    if counts["checkpoint_failed"]:
        yield Advice(
            "Look at the checkpoints",
            f"{counted(counts['checkpoint_failed'], 'checkpoint')} could not be written: "
            f"{run.of_kind('checkpoint_failed')[-1].get('message', '')}. "
            "docs/explanation/faults.md, Checkpoints that cannot be written.",
            f"ganscale checkpoint list {place}",
        )
    if counts["stall"]:
        stall = run.of_kind("stall")[-1]
        ranks = ", ".join(str(rank) for rank in stall.get("ranks", ()))
        yield Advice(
            "See what a step waited for",
            f"{counted(counts['stall'], 'step')} took too long; the last one waited for rank "
            f"{ranks}. The stacks of all threads are in {stall.get('stacks', 'stacks/')} "
            "(docs/explanation/faults.md, Hangs).",
        )
    if counts["skip"] and run.shards:
        yield Advice(
            "Check the shards",
            "Damaged samples were left out (docs/how-to/prepare-data.md).",
            f"ganscale shards verify {shlex.quote(run.shards)}",
        )
    if counts["evaluation_failed"]:
        message = run.of_kind("evaluation_failed")[-1].get("message", "")
        yield Advice("An evaluation failed", f"{message} (docs/how-to/evaluate.md).")
    if counts["wandb"]:
        message = run.of_kind("wandb")[-1].get("message", "")
        yield Advice("W&B", f"{message} (docs/how-to/track.md).")


def _of_speed(run: Run, parts: Mapping[str, Sequence[Point]]) -> Iterator[Advice]:
    means = {name: fmean(y for _, y in points) for name, points in parts.items()}
    waiting = means.get("data wait", 0.0)
    if not means or waiting < _SLOW_DATA * sum(means.values()):
        return
    yield Advice(
        "Read data faster",
        f"Workers wait for data in {waiting / sum(means.values()):.0%} of a step: cache decoded "
        "images, or read with more threads (docs/how-to/prepare-data.md).",
    )


def _of_result(run: Run) -> Iterator[Advice]:
    place = shlex.quote(run.place)
    if not any(event["nimg"] == run.nimg for event in run.evaluations) and run.snapshots:
        yield Advice(
            "Measure it",
            "FID, KID, precision and recall with intervals (docs/how-to/evaluate.md).",
            f"ganscale evaluate --run {place}",
        )
    if run.snapshots and not any(run.root.glob("grid.*")):
        yield Advice(
            "Draw fresh samples",
            "A seed is the same image every time (docs/how-to/explore.md); the next report shows "
            "them.",
            f"ganscale sample {place} --num 64 --seed 1000 --out {place}/grid.png",
        )
    if run.config is not None and run.config.method.name in ("vae", "vae-gan", "encoder", "bigan"):
        yield Advice(
            "Reconstruct images",
            "The run has an encoder (docs/how-to/reconstruct.md); the report shows the result.",
            f"ganscale reconstruct {place} --images TEST_IMAGES --out {place}/reconstructed",
        )
    # Schedules are over a fixed number of images. Where the learning rate has come to its end near
    # zero, more of them would change nothing: that takes a new run with a longer schedule.
    if run.config is not None and not _has_annealed(run.config):
        longer = f"{2 * run.config.training.total_kimg:g}"
        yield Advice(
            "Train it longer",
            "It goes on where it ended, as if it had been that long from the beginning.",
            f"ganscale resume {place} training.total_kimg={longer}",
        )


def _has_annealed(config: Config) -> bool:
    lr = config.optimizer.lr
    return lr.at(config.total_nimg) < _ANNEALED * lr.start
