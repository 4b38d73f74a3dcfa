"""Is one batch of fakes for both networks (`training.shared_fakes`) worth its saving of time?

    python -m benchmarks.shared_fakes train --shards data/cifar10-train
    python -m benchmarks.shared_fakes speed --shards data/cifar10-train
    python -m benchmarks.shared_fakes report

With it a step saves one forward of the generator, so that more images are trained on in a second;
but the generator learns from fakes that the discriminator has just learned from. Which of the two
weighs more is decided by quality per second. `train` trains each configuration with and without it
from several seeds, to equal numbers of images, and measures the averaged generator on the way; what
has been trained already is not trained again. `speed` measures images a second of both in turns, on
an otherwise idle machine. `report` puts both together: the distance of the separate form after n
images beside that of the shared form after n times the ratio of the speeds, which is what it has
trained on in the same time, interpolated between the measured positions.

Training and measuring are apart because a machine that is busy with something else for a while
would give one form less time than the other; the number of images does not depend on that.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ganscale.json_lines import read_lines
from ganscale.run_directory import RunDirectory

CONFIGS = {"quickstart": 96.0, "dcgan-cifar10": 48.0}
"""Presets and the thousands of images that they are trained on."""
MEASUREMENTS = 6
"""Evaluations of a run, evenly apart."""
FORMS = {"separate": False, "shared": True}


def main() -> None:
    """Train, measure speed, or report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("action", choices=("train", "speed", "report"))
    parser.add_argument("--shards", help="a shard set of 32x32 images")
    parser.add_argument("--reference", help="images to compare with; default the training set")
    parser.add_argument("--storage", type=Path, default=Path("runs/shared-fakes"))
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--kimg", type=float, help="in place of the configuration's own")
    parser.add_argument("--num", type=int, default=2000, help="samples of an evaluation")
    parser.add_argument("--extractor", default="efficientnet-lite0")
    parser.add_argument("--rounds", type=int, default=5, help="of `speed`, each of both forms")
    parser.add_argument("--seconds", type=float, default=20, help="of each of these")
    arguments = parser.parse_args()
    if arguments.action == "report":
        print(report(arguments))
        return
    if not arguments.shards:
        parser.error("--shards")
    arguments.storage.mkdir(parents=True, exist_ok=True)
    if arguments.action == "speed":
        measure_speeds(arguments)
        return
    for config in arguments.configs:
        for seed in arguments.seeds:
            for form in FORMS:
                train_run(Run(config, seed, form), arguments)


@dataclass(frozen=True)
class Run:
    """One of the runs that are compared."""

    config: str
    seed: int
    form: str

    @property
    def name(self) -> str:
        return f"{self.config}-{self.form}-{self.seed}"


def train_run(run: Run, arguments: argparse.Namespace) -> None:
    """Train and evaluate a run to its end in a process of its own; go on where it was left."""
    kimg = arguments.kimg or CONFIGS[run.config]
    overrides = {
        "name": run.name,
        "storage": arguments.storage,
        "seed": run.seed,
        "data.shards": arguments.shards,
        "training.shared_fakes": str(FORMS[run.form]).lower(),
        "training.total_kimg": kimg,
        "evaluation.every_kimg": kimg / MEASUREMENTS,
        "evaluation.num_images": arguments.num,
        "evaluation.metrics": "[fid, kid]",
        "evaluation.extractor": arguments.extractor,
        "launch.backend": "inprocess",
        "launch.num_workers": 1,
        "tracking.wandb": "disabled",
        "tracking.log_every_kimg": kimg / MEASUREMENTS,
    }
    if arguments.reference:
        overrides["evaluation.reference"] = arguments.reference
    command = [sys.executable, "-m", "ganscale", "train", "--config", run.config]
    subprocess.run([*command, *(f"{k}={v}" for k, v in overrides.items())], check=True)


def measure_speeds(arguments: argparse.Namespace) -> None:
    """Images a second of both forms in turns; a line of JSON for each configuration."""
    from ganscale.config import load_config
    from ganscale.training.benchmark import Variant, compare_variants
    from ganscale.world import World

    variants = [Variant(name, {"training.shared_fakes": on}) for name, on in FORMS.items()]
    for name in arguments.configs:
        overrides = [f"data.shards={arguments.shards}"]
        config = load_config(name, overrides).with_changes({"launch.num_workers": 1})
        results = compare_variants(
            config, World(), variants, seconds=arguments.seconds, rounds=arguments.rounds
        )
        row = {"config": name, "variants": [result.summary() for result in results]}
        print(json.dumps(row), flush=True)
        with (arguments.storage / "speeds.json").open("a") as file:
            file.write(json.dumps(row) + "\n")


def report(arguments: argparse.Namespace) -> str:
    """Markdown: distances at equal images, the ratio of speeds, and distances at equal time."""
    speeds = {}
    for row in read_lines(arguments.storage / "speeds.json"):
        speeds[row["config"]] = row["variants"]
    lines = []
    for config in arguments.configs:
        variants = speeds.get(config)
        ratio = None
        if variants:
            ratio = variants[1]["ratio"]
            rates = ", ".join(
                f"{variant['variant']} {variant['images_per_second']:.1f}" for variant in variants
            )
            each = [b / a for a, b in zip(*(v["rounds"] for v in variants), strict=True)]
            lines.append(
                f"{config}: images/s {rates}; shared is {ratio:.3f} times as fast "
                f"({min(each):.3f} to {max(each):.3f} in {len(each)} rounds)"
            )
        for metric in metric_names(config, arguments):
            lines += ["", *_table(config, metric, ratio, arguments), ""]
    return "\n".join(lines)


def metric_names(config: str, arguments: argparse.Namespace) -> list[str]:
    """The columns of distances that the runs of a configuration have."""
    rows = _rows(Run(config, arguments.seeds[0], "separate"), arguments)
    prefixes = tuple(f"metrics/{name}" for name in ("fid", "kid", "fd_", "kd_"))
    return sorted({name for row in rows for name in row if name.startswith(prefixes)})


def _rows(run: Run, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = read_lines(RunDirectory(arguments.storage / run.name).metrics)
    return [row for row in rows if any(name.startswith("metrics/f") for name in row)]


def _table(
    config: str, metric: str, ratio: float | None, arguments: argparse.Namespace
) -> list[str]:
    """A row a measured position; the mean over seeds of ln(shared / separate), both ways."""
    curves = {
        form: [curve(_rows(Run(config, seed, form), arguments), metric) for seed in arguments.seeds]
        for form in FORMS
    }
    shortest = min(len(c) for form in FORMS for c in curves[form])
    lines = [
        f"{config}, {metric.removeprefix('metrics/')}, {len(arguments.seeds)} seeds",
        "",
        "| images | separate | shared | shared / separate, equal images | equal time |",
        "|---|---|---|---|---|",
    ]
    for place in range(shortest):
        nimg = curves["separate"][0][place][0]
        values = {form: [c[place][1] for c in curves[form]] for form in FORMS}
        equal_images = _mean_ratio(values["shared"], values["separate"])
        cells = [", ".join(f"{value:.4g}" for value in values[form]) for form in FORMS]
        equal_time = ""
        if ratio is not None:
            later = [interpolated(c, nimg * ratio) for c in curves["shared"]]
            if all(value is not None for value in later):
                known = [value for value in later if value is not None]
                equal_time = f"{_mean_ratio(known, values['separate']):.3f}"
        lines.append(f"| {nimg:,} | {cells[0]} | {cells[1]} | {equal_images:.3f} | {equal_time} |")
    return lines


def curve(rows: list[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    """(images, distance) of a run's evaluations."""
    return [(row["nimg"], row[metric]) for row in rows if metric in row]


def interpolated(points: list[tuple[int, float]], nimg: float) -> float | None:
    """The distance after `nimg` images, along straight lines in logarithms; None outside.

    Distances fall about as a power of the number of images.
    """
    for (before, high), (after, low) in zip(points, points[1:], strict=False):
        if before <= nimg <= after:
            part = math.log(nimg / before) / math.log(after / before)
            return math.exp((1 - part) * math.log(high) + part * math.log(low))
    return None


def _mean_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The geometric mean of the seeds' ratios."""
    return statistics.geometric_mean(a / b for a, b in zip(numerators, denominators, strict=True))


if __name__ == "__main__":
    main()
