"""The command that chooses between the averages of a run's generator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ganscale.cli.app import app, stderr_console, write_json
from ganscale.cli.options import AutoDevice, Extractor, JsonFile, Reference, Seed
from ganscale.config import load_config
from ganscale.errors import CheckpointError, ConfigError, DataError
from ganscale.run_directory import RunDirectory
from ganscale.world import World, process_group

if TYPE_CHECKING:
    from ganscale.evaluation.distributions.evaluation import Evaluation
    from ganscale.evaluation.image_sets import ImageSet
    from ganscale.metrics.extractors import FeatureExtractor

_MAIN = "main"


@app.command(
    epilog="Example: ganscale averages runs/r3gan-small --num 5000    "
    "At an earlier position: ganscale averages runs/r3gan-small@2000"
)
def averages(
    run: Annotated[
        str, typer.Argument(help="Folder of a run, or RUN@KIMG for an earlier position.")
    ],
    num: Annotated[
        int, typer.Option(min=1, help="Images of each average, of the same seeds.")
    ] = 5000,
    seed: Seed = 0,
    reference: Reference = None,
    extractor: Extractor = "auto",
    device: AutoDevice = "auto",
    json_file: JsonFile = None,
) -> None:
    """Compare the averages of a run's generator (training.extra_ema_halflives_kimg) by FID."""
    from ganscale.evaluation.distributions.evaluate import column_of
    from ganscale.evaluation.distributions.evaluation import Evaluation
    from ganscale.evaluation.image_sets import open_images
    from ganscale.evaluation.run_references import default_reference
    from ganscale.metrics.extractors import open_extractor

    snapshots, nimg = _snapshots(run)
    world = World.detect(device)
    network = open_extractor(extractor)
    network.to(world.device)
    real = open_images(reference or default_reference(run))
    # Before any features are extracted, which may take long.
    if len(real) <= network.num_features:
        raise DataError(
            f"{real.description}: too few for the {network.num_features} features of "
            f"{network.name}, as a Frechet distance needs more images than features: measure the "
            "snapshots of the averages one by one, ganscale evaluate --snapshot FILE --metrics kid "
            "from 1,000 images on, prdc with fewer"
        )
    column = column_of("fid", network)
    evaluations, problems = _evaluations(snapshots, real, network, world, num=num, seed=seed)
    if not world.is_main:
        return
    if not evaluations:
        raise DataError("; ".join(problems.values()))
    distances = {name: one.metrics[column] for name, one in evaluations.items()}
    best = min(distances, key=lambda name: distances[name].value)
    protocol = evaluations[best].protocol
    # What follows the name of the one average: its seeds and how labels were drawn.
    drawn = protocol.samples.rpartition(", seeds from ")[2]
    each = f"{protocol.num_samples:,} of each average at {nimg / 1000:g} kimg"
    protocol = replace(protocol, samples=f"{each}, seeds from {drawn}")
    table = Evaluation(
        protocol,
        {f"{column} of {name or _MAIN}": value for name, value in distances.items()},
        {f"{column} of {name or _MAIN}": problem for name, problem in problems.items()},
        seconds={name: sum(one.seconds.values()) for name, one in evaluations.items()},
    )
    typer.echo(
        f"{table}\n\nbest: {best or _MAIN}, {snapshots[best]}\n"
        "It was chosen by these seeds, so its figure is a little too good: for one to publish, "
        f"measure the file with others, as in ganscale evaluate --snapshot FILE --seed {seed + num}"
    )
    rows = [
        {
            "name": name,
            "snapshot": str(path),
            "distance": asdict(distances[name]) if name in distances else None,
            "problem": problems.get(name, ""),
        }
        for name, path in snapshots.items()
    ]
    values = {"nimg": nimg, "metric": column, "best": best or _MAIN, "averages": rows}
    write_json(json_file, {**values, "protocol": {**asdict(protocol), "seed": seed}})


def _evaluations(
    snapshots: Mapping[str, Path],
    real: ImageSet,
    network: FeatureExtractor,
    world: World,
    *,
    num: int,
    seed: int,
) -> tuple[dict[str, Evaluation], dict[str, str]]:
    """The FID of each average, and why others have none; on ranks other than 0 no FID."""
    from ganscale.evaluation.distributions.evaluate import evaluate
    from ganscale.evaluation.distributions.features import FeatureCache
    from ganscale.evaluation.image_sets import GeneratedImages
    from ganscale.tracking.console import progress_bars

    evaluations: dict[str, Evaluation] = {}
    problems: dict[str, str] = {}
    cache = FeatureCache()
    console = stderr_console() if world.is_main else None
    with process_group(world), progress_bars(console) as start_task:
        for name, path in snapshots.items():
            samples = GeneratedImages.of_snapshot(path, num, seed=seed, device=world.device)
            # An average that reaches back to the initial weights may draw one image only; that says
            # nothing about the others.
            try:
                evaluation = evaluate(
                    samples,
                    real,
                    network,
                    world,
                    metrics=["fid"],
                    required=True,
                    cache=cache,
                    start_task=start_task,
                )
            except DataError as error:
                problems[name] = str(error)
            else:
                if evaluation is not None:
                    evaluations[name] = evaluation
    return evaluations, problems


def _snapshots(run: str) -> tuple[dict[str, Path], int]:
    """The snapshots of all averages at the position that `run` names, and that position."""
    from ganscale.evaluation.run_references import RunReference, due_by

    reference = RunReference.parse(run)
    run_dir = RunDirectory(reference.path)
    if not run_dir.config.is_file():
        raise CheckpointError(f"{run} is not a run: it has no {run_dir.config.name}")
    positions = run_dir.snapshot_positions()
    there = ", ".join(f"{nimg / 1000:g}" for nimg in positions)
    if reference.kimg is not None:
        last = due_by(reference.kimg, load_config(run_dir.config))
        positions = [nimg for nimg in positions if nimg <= last]
    if not positions:
        raise CheckpointError(
            f"no snapshot of {run}; the run has " + (f"some at {there} kimg" if there else "none")
        )
    snapshots = run_dir.averages_at(positions[-1])
    if len(snapshots) < 2:
        raise ConfigError(
            f"{run_dir.root} has one average at {positions[-1] / 1000:g} kimg, and nothing to "
            "choose from: train with further ones, training.extra_ema_halflives_kimg=[100, 1000]"
        )
    return snapshots, positions[-1]
