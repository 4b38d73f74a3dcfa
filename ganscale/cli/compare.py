"""Commands that compare runs: side by side, in a tournament, and the seeds of one recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ganscale.cli.app import app, stderr_console, write_json
from ganscale.cli.options import (
    AutoDevice,
    Device,
    Extractor,
    JsonFile,
    NumReference,
    Reference,
    parse_names,
)
from ganscale.config import Config, ExtractorName, load_config
from ganscale.config.changes import changed_settings
from ganscale.errors import ConfigError, TrainingFault
from ganscale.run_directory import RunDirectory
from ganscale.world import World, process_group

if TYPE_CHECKING:
    from torch import Tensor

    from ganscale.evaluation.reconstruction.comparison import (
        ComparedRun,
        EvaluationNetworks,
        TaskResult,
        TrainingCost,
    )
    from ganscale.metrics.intervals import Estimate


_COLUMNS = 12
"""Images that the picture of a task shows."""


@app.command(
    epilog="Example: ganscale tournament runs/a runs/b --reference test-shards. "
    "Snapshots of one run: ganscale tournament runs/a@10 runs/a@50 runs/a --reference test-shards"
)
def tournament(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs, or RUN@KIMG.")],
    reference: Annotated[
        str, typer.Option(help="Shard set of real images that no run was trained on.")
    ],
    num: Annotated[
        int, typer.Option(min=1, help="Number of images of each run, and of real ones.")
    ] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Decides samples and real images.")] = 0,
    json_file: JsonFile = None,
    device: Device = "cpu",
) -> None:
    """Rank runs: every discriminator scores every generator (generative adversarial metric)."""
    from ganscale.data.shards import ShardSet
    from ganscale.evaluation.gan_metrics.gan_pairs import load_gan_pairs
    from ganscale.evaluation.gan_metrics.tournament import num_scored, run_tournament
    from ganscale.evaluation.image_sets import ImagesOfShards
    from ganscale.tracking.console import counting

    images = ImagesOfShards(ShardSet.load(reference))
    pairs = load_gan_pairs(runs, device=device)
    total = num_scored(len(pairs), num, images)
    with counting("scoring images", total, stderr_console()) as progress:
        result = run_tournament(pairs, images, num_images=num, seed=seed, progress=progress)
    # Printed first, so that a file that cannot be written loses no results.
    if result.why_without:
        typer.echo(f"labels: not used, because {result.why_without}\n")
    typer.echo("\n".join(result.scores.lines()))
    write_json(json_file, result.to_json())


@app.command(
    epilog="Example: ganscale stability --config quickstart --seeds 3 --storage runs. "
    "Of runs that there are: ganscale stability --report-only runs/a runs/b"
)
def stability(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="section.field=value ...; with --report-only, folders of runs.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config", help="A preset or a .yaml file; default: quickstart.", show_default=False
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of seeds, counted from the configuration's seed; default: 5.",
            show_default=False,
        ),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Folder for the runs.", show_default=False)
    ] = None,
    metric: Annotated[
        str, typer.Option(help="The metric of the report: a name in metrics.jsonl.")
    ] = ("metrics/diversity"),
    report_only: Annotated[bool, typer.Option("--report-only", help="Train nothing.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Train a recipe with several seeds; report how many collapse and how far results spread.

    Seeds that are finished are not trained again; those that were interrupted go on.
    """
    from ganscale.evaluation.gan_metrics.stability import summarise, summarise_run

    if report_only:
        if given := [
            option
            for option, value in (("config", config), ("seeds", seeds), ("storage", storage))
            if value is not None
        ]:
            raise ConfigError(
                f"--report-only trains nothing: leave --{given[0]}, and give the folders of runs"
            )
        runs = [Path(argument) for argument in arguments or []]
    else:
        overrides = [*(arguments or []), *([f"storage={storage}"] if storage else [])]
        runs = _train_seeds(config or "quickstart", overrides, 5 if seeds is None else seeds)
    report = summarise([summarise_run(run, metric) for run in runs], metric)
    typer.echo("\n".join(report.lines()))
    write_json(json_file, report.to_json())


def _train_seeds(source: str, overrides: list[str], num_seeds: int) -> list[Path]:
    """Train the seeds that are not finished; returns the folders of all."""
    base = load_config(source, overrides)
    configs = [
        base.with_changes({"name": f"{base.name}-seed-{seed}", "seed": seed})
        for seed in range(base.seed, base.seed + num_seeds)
    ]
    console = stderr_console()
    for config in configs:
        if _is_finished(config):
            console.print(f"{config.name} is finished", highlight=False)
        else:
            where = f"training {config.name} in {config.run_dir}"
            console.print(where, highlight=False, soft_wrap=True)
            _train(config)
    return [config.run_dir for config in configs]


def _train(config: Config) -> None:
    """Train one seed. Exits if the user stops it; a run that the guard ends is a result like
    others."""
    from ganscale.launch.signals import EXIT_CODES
    from ganscale.launch.start import start

    console = stderr_console()
    try:
        result = start(config, console)
    # `summarise_run` counts it as a collapse, and the other seeds are still to be trained.
    except TrainingFault as fault:
        console.print(f"{config.name}: {fault}", highlight=False, soft_wrap=True)
        return
    if result.reason:
        console.print("to go on: the same command again", highlight=False)
        raise typer.Exit(EXIT_CODES[result.reason])


def _is_finished(config: Config) -> bool:
    """Whether the run of that name has reached its length.

    Raises `ConfigError` if it was trained with other settings.
    """
    from ganscale.checkpoint import CheckpointStore
    from ganscale.launch.resolve_run import absolutize_paths

    file = RunDirectory(config.run_dir).config
    if not file.is_file():
        return False
    # By its checkpoints and not by its events: what was deleted must be trained again.
    if all(n.nimg < config.total_nimg for n in CheckpointStore(config.checkpoints).lineage()):
        return False
    now = absolutize_paths(config, stderr_console())
    # A finished run of other settings would silently become one of the seeds.
    if changed := changed_settings(load_config(file), now):
        raise ConfigError(
            f"{config.run_dir} holds a finished run with other settings ({'; '.join(changed)}): "
            "choose another name=..."
        )
    return True


@app.command(
    epilog="Example: ganscale compare runs/vae-cifar10 runs/dcgan-cifar10 runs/encoder-cifar10 "
    "--images data/cifar10-test --out compared"
)
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or snapshots in them.")],
    images: Annotated[str, typer.Option(help="Images that no run was trained on.")],
    out: Annotated[Path, typer.Option(help="Folder for a picture of each task and figures.json.")],
    reference: Reference = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks of `ganscale reconstruct`, separated by commas.")
    ] = ("identity,inpaint,superres,denoise"),
    num: Annotated[int, typer.Option(min=2, help="Images to reconstruct.")] = 100,
    num_samples: Annotated[int, typer.Option(min=2, help="Images to generate.")] = 10_000,
    num_reference: NumReference = None,
    metric: Annotated[
        Literal["fid", "kid", "prdc"], typer.Option(help="Metric of generated images.")
    ] = "fid",
    extractor: Extractor = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each inversion.")] = 100,
    restarts: Annotated[int, typer.Option(min=1, max=512, help="Starts of each inversion.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of images, noise and starts.")] = 0,
    device: AutoDevice = "auto",
) -> None:
    """Compare runs by their cost, their samples and their reconstructions (VAE against GAN)."""
    from ganscale.evaluation.image_sets import open_images
    from ganscale.evaluation.image_views import Subset
    from ganscale.evaluation.reconstruction import comparison
    from ganscale.evaluation.run_references import default_reference
    from ganscale.generation.degradations import build_degradation
    from ganscale.generation.inversion import InversionSettings
    from ganscale.tracking.console import progress_bars

    world = World.detect(device)
    if world.world_size > 1:
        raise ConfigError("compare measures time, so it needs a single process: omit torchrun")
    search = InversionSettings(steps=steps, restarts=restarts, seed=seed)
    compared = [comparison.load_run(str(run), search, device=world.device) for run in runs]
    real = open_images(reference or default_reference(str(runs[0])))
    # Not drawn by --seed: comparisons of other seeds are to have the same reference.
    if num_reference is not None:
        real = Subset.random(real, num_reference, seed=0)
    originals = open_images(images, split="test")
    originals = Subset.random(originals, num, seed=seed)
    if not (names := parse_names(tasks)):
        raise ConfigError(f"--tasks {tasks}: expected at least one")
    degradations = [build_degradation(task, originals.shape, seed=seed) for task in names]
    networks = _networks(extractor, world)
    # Now, and not after the reconstructions, which may take hours.
    for run in compared:
        comparison.check_sample_metrics(
            run, real, networks.extractor, metric=metric, num_images=num_samples
        )
    with process_group(world), progress_bars(stderr_console()) as start_task:
        # Reconstructions before features of samples, which take far longer.
        results = {}
        for degradation in degradations:
            truth, results[degradation.name] = comparison.reconstruct_with_all(
                compared, originals, degradation, networks, seed=seed, start_task=start_task
            )
            _print_task(degradation.name, results[degradation.name])
            picture = f"{degradation.name.replace(' ', '-')}.png"
            _draw(truth, results[degradation.name], out / picture)
        costs = [comparison.training_cost(run) for run in compared]
        metrics = [
            comparison.sample_metrics(
                run, real, networks, metric=metric, num_images=num_samples, start_task=start_task
            )
            for run in compared
        ]
    _print_costs(compared, costs, metrics)
    report = {
        "runs": [
            run.to_json(cost, values)
            for run, cost, values in zip(compared, costs, metrics, strict=True)
        ],
        "samples": num_samples,
        "reference": real.description,
        "images": originals.description,
        "extractor_digest": networks.extractor.digest,
        "search": vars(search),
        "tasks": {task: [one.to_json() for one in result] for task, result in results.items()},
    }
    write_json(out / "figures.json", report)
    typer.echo(f"wrote a picture of each task and figures.json to {out}")


def _networks(extractor: ExtractorName, world: World) -> EvaluationNetworks:
    from ganscale.evaluation.reconstruction.comparison import EvaluationNetworks
    from ganscale.metrics.extractors import EfficientNetLite0, open_extractor

    networks = EvaluationNetworks(open_extractor(extractor), EfficientNetLite0(), world)
    networks.extractor.to(world.device)
    networks.network.to(world.device)
    return networks


def _print_costs(
    runs: list[ComparedRun], costs: list[TrainingCost], metrics: list[Mapping[str, Estimate]]
) -> None:
    head = (
        f"{'run':24} {'method':10} {'kimg':>7} {'hours':>6} {'img/s':>6} {'GiB':>5} {'M par.':>6}"
    )
    typer.echo(f"\n{head}   {', '.join(metrics[0])}")
    for run, cost, values in zip(runs, costs, metrics, strict=True):
        peak = "-" if cost.peak_memory_gib is None else f"{cost.peak_memory_gib:.1f}"
        typer.echo(
            f"{run.name:24} {run.method:10} {run.nimg / 1000:7g} {cost.seconds / 3600:6.2f} "
            f"{cost.images_per_second:6.0f} {peak:>5} {run.num_parameters / 1e6:6.2f}   "
            + ", ".join(map(str, values.values()))
        )


def _print_task(task: str, results: list[TaskResult]) -> None:
    names = list(results[0].similarities)
    typer.echo(
        f"{task:34}" + "".join(f"{name.split('_')[0]:>12}" for name in names) + "     s/image"
    )
    for result in results:
        values = "".join(f"{result.similarities[name].value:12.4g}" for name in names)
        seconds = "-" if result.seconds_per_image is None else f"{result.seconds_per_image:.3g}"
        typer.echo(f"{result.name:34}{values}{seconds:>12}")


def _draw(truth: Tensor, results: list[TaskResult], path: Path) -> None:
    """Write a row of images for each result, in their order, and the originals below."""
    import torch

    from ganscale.generation.pictures import label_sheet, lay_out, write_picture

    # The trivial reconstruction first, the originals last: each row should be between them.
    rows = [*(result.images for result in results), truth]
    sheet = lay_out(torch.stack(rows)[:, :_COLUMNS], scale=2)
    write_picture(label_sheet(sheet, [*(result.name for result in results), "truth"]), path)
