"""A run's curves: its rows, and its snapshots measured one after the other.

    python -m benchmarks.learning_curve runs/dcgan-cifar10 --reference data/cifar10-train \
        --num 10000 --out benchmarks/dcgan-cifar10

Writes snapshots.json (what is in it already is not measured again), rows.csv (the mean of the rows
of every 25 kimg) and, where matplotlib is installed, curves.png.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ganscale.config import ExtractorName, MetricName
from ganscale.evaluation.distributions.evaluate import evaluate
from ganscale.evaluation.distributions.features import FeatureCache
from ganscale.evaluation.image_sets import GeneratedImages, open_images
from ganscale.metrics.extractors import open_extractor
from ganscale.run_directory import RunDirectory
from ganscale.tracking.console import progress_bars, stderr_console
from ganscale.tracking.history import History
from ganscale.world import World, process_group

METRICS: tuple[MetricName, ...] = ("fid", "fid_infinity", "kid", "prdc")
BUCKET_KIMG = 25
COLUMNS = (
    "train/loss_D",
    "train/loss_G",
    "train/real_logits",
    "train/fake_logits",
    "train/grad_norm_D",
    "train/grad_norm_G",
    "metrics/diversity",
    "time/images_per_second",
)

Values = Mapping[str, float]


def measured(
    run_dir: RunDirectory, reference: str, num: int, extractor_name: ExtractorName, file: Path
) -> dict[int, Any]:
    """Every snapshot's figures, by position; written to `file` as they come."""
    known = json.loads(file.read_text())["snapshots"] if file.is_file() else []
    found: dict[int, Any] = {entry["nimg"]: entry for entry in known}
    world, extractor = World(), open_extractor(extractor_name)
    real, cache = open_images(reference, scratch=run_dir.root), FeatureCache()
    with process_group(world), progress_bars(stderr_console()) as start_task:
        for path in sorted(run_dir.snapshots.glob("*.safetensors")):
            samples = GeneratedImages.of_snapshot(path, num)
            nimg = int(samples.generator.info["nimg"])
            if nimg in found:
                continue
            result = evaluate(
                samples,
                real,
                extractor,
                world,
                metrics=METRICS,
                cache=cache,
                start_task=start_task,
            )
            assert result is not None
            found[nimg] = {"nimg": nimg, "metrics": result.to_json()["metrics"]}
            protocol = {
                "samples": num,
                "reference": real.description,
                "extractor": extractor.name,
                "extractor_digest": extractor.digest,
            }
            ordered = [found[key] for key in sorted(found)]
            file.write_text(json.dumps({"protocol": protocol, "snapshots": ordered}, indent=1))
    return found


def averaged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Means of the rows of every `BUCKET_KIMG`."""
    buckets: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        bucket = buckets[int(row["nimg"] / 1000 // BUCKET_KIMG)]
        for name in COLUMNS:
            if row.get(name) is not None:
                bucket[name].append(row[name])
    return [
        {"kimg": (number + 1) * BUCKET_KIMG}
        | {name: sum(values) / len(values) for name, values in sorted(bucket.items())}
        for number, bucket in sorted(buckets.items())
    ]


def write_rows(rows: Sequence[Values], file: Path) -> None:
    """As CSV; a figure that a stretch of the run has not is empty."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["kimg", *COLUMNS], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)


def draw(rows: Sequence[Values], snapshots: Mapping[int, Any], file: Path) -> None:
    """Losses, logits, distances, and precision and recall over thousands of images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for panel, names in zip(panels[0], (COLUMNS[:2], COLUMNS[2:4]), strict=True):
        for name in names:
            known = [(row["kimg"], row[name]) for row in rows if name in row]
            panel.plot(*zip(*known, strict=True), label=name.removeprefix("train/"))
    kimg = [nimg / 1000 for nimg in sorted(snapshots)]
    entries = [snapshots[nimg]["metrics"] for nimg in sorted(snapshots)]
    for name in entries[0]:
        values = [entry[name]["value"] for entry in entries]
        if name.startswith(("fd_", "fid")):
            panels[1][0].plot(kimg, values, marker="o", label=name)
        elif name.startswith(("precision", "recall", "coverage")) and "_k5" not in name:
            panels[1][1].plot(kimg, values, marker="o", label=name)
    for panel in panels.flat:
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel("thousands of real images")
    figure.savefig(file, dpi=90)


def main() -> None:
    """Measure what is not measured yet, and write everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--extractor", default="auto", help="auto may be Inception, which is slow")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run_dir = RunDirectory(options.run.absolute())
    file = options.out / "snapshots.json"
    snapshots = measured(run_dir, options.reference, options.num, options.extractor, file)
    rows = averaged(History.read(run_dir).rows)
    write_rows(rows, options.out / "rows.csv")
    draw(rows, snapshots, options.out / "curves.png")


if __name__ == "__main__":
    main()
