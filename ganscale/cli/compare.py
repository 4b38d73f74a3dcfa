"""Verbs that compare runs: side by side, in a tournament, and one recipe's seeds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ganscale.cli.app import app, stderr_console, write_json
from ganscale.cli.options import Device, JsonFile
from ganscale.config import ExtractorName
from ganscale.errors import ConfigError, TrainingFault

if TYPE_CHECKING:
    from torch import Tensor

    from ganscale.config import Config
    from ganscale.evaluation.reconstruction.comparison import ComparedRun, TaskResult, TrainingCost
    from ganscale.metrics.intervals import Estimate

__all__: list[str] = []

_COLUMNS = 16
"""Images that the picture of a task shows."""


@app.command(
    epilog="Example: ganscale tournament runs/a runs/b --reference test-shards. "
    "Snapshots of one run: ganscale tournament runs/a@10 runs/a@50 runs/a --reference test-shards"
)
def tournament(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs, or RUN@KIMG.")],
    reference: Annotated[str, typer.Option(help="Shard set of real images not trained on.")],
    num: Annotated[int, typer.Option(min=1, help="Images of each run, and real ones.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Decides samples and real images.")] = 0,
    json_file: JsonFile = None,
    device: Device = "cpu",
) -> None:
    """Rank runs: every discriminator judges every generator (generative adversarial metric)."""
    from ganscale.data.shards import ShardSet
    from ganscale.evaluation.gan_metrics.gan_pairs import load_gan_pairs
    from ganscale.evaluation.gan_metrics.tournament import num_scored, run_tournament
    from ganscale.evaluation.image_sets import ImagesOfShards
    from ganscale.tracking.console import counting

    images = ImagesOfShards(ShardSet.load(reference))
    pairs = load_gan_pairs(runs, device=device)
    total = num_scored(len(pairs), num, images)
    with counting("judging images", total, stderr_console()) as progress:
        result = run_tournament(pairs, images, num_images=num, seed=seed, progress=progress)
    write_json(json_file, result.to_json())
    typer.echo("\n".join(result.scores.lines()))


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
    config: Annotated[str, typer.Option(help="A preset or a .yaml file.")] = "quickstart",
    seeds: Annotated[int, typer.Option(min=1, help="How many, from the config's seed on.")] = 5,
    storage: Annotated[
        str | None, typer.Option(help="Folder for the runs.", show_default=False)
    ] = None,
    metric: Annotated[str, typer.Option(help="Whose spread: a name in metrics.jsonl.")] = (
        "metrics/diversity"
    ),
    report_only: Annotated[bool, typer.Option("--report-only", help="Train nothing.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Train a recipe with several seeds; tell how many collapse and how far results spread.

    Seeds that are finished are not trained again; those that were interrupted go on.
    """
    from ganscale.evaluation.gan_metrics.stability import summarise, summarise_run

    if report_only:
        runs = [Path(argument) for argument in arguments or []]
    else:
        overrides = [*(arguments or []), *([f"storage={storage}"] if storage else [])]
        runs = _train_seeds(config, overrides, seeds)
    report = summarise([summarise_run(run, metric) for run in runs], metric)
    write_json(json_file, report.to_json())
    typer.echo("\n".join(report.lines()))


def _train_seeds(source: str, overrides: list[str], num_seeds: int) -> list[Path]:
    """Train what is not finished; returns the runs' folders."""
    from ganscale.config import load_config

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
    """A run that the guard ends is a result; one that the user ends is the end of the command."""
    from ganscale.launch.signals import EXIT_CODES
    from ganscale.launch.start import start

    console = stderr_console()
    try:
        ending = start(config, console)
    except TrainingFault as fault:
        console.print(f"{config.name}: {fault}", highlight=False, soft_wrap=True)
        return
    if ending.reason:
        console.print("to go on: the same command again", highlight=False)
        raise typer.Exit(EXIT_CODES[ending.reason])


def _is_finished(config: Config) -> bool:
    """Whether the run of that name has reached its length.

    Raises `ConfigError` if it was trained with other settings.
    """
    from ganscale.checkpoint import CheckpointStore
    from ganscale.config import load_config
    from ganscale.config.changes import changed_settings
    from ganscale.launch.start import absolutize_paths
    from ganscale.run_directory import RunDirectory

    file = RunDirectory(config.run_dir).config
    if not file.is_file():
        return False
    if all(n.nimg < config.total_nimg for n in CheckpointStore(config.checkpoints).lineage()):
        return False
    now = absolutize_paths(config, stderr_console())
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
    out: Annotated[Path, typer.Option(help="Folder for a picture of each task, figures.json.")],
    reference: Annotated[
        str | None, typer.Option(help="What samples are compared with; default: training data.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="As in reconstruct.")] = (
        "identity,inpaint,superres,denoise"
    ),
    num: Annotated[int, typer.Option(min=2, help="Images to reconstruct.")] = 100,
    num_samples: Annotated[int, typer.Option(min=2, help="Images to generate.")] = 10_000,
    num_reference: Annotated[
        int | None, typer.Option(min=2, help="Only so many of the reference, at random.")
    ] = None,
    metric: Annotated[
        Literal["fid", "kid", "prdc"], typer.Option(help="Of generated images.")
    ] = "fid",
    extractor: Annotated[
        ExtractorName,
        typer.Option(help="Of the metric; auto: Inception if its weights are installed."),
    ] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Of an inversion.")] = 100,
    restarts: Annotated[int, typer.Option(min=1, max=512, help="Starts of an inversion.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of images, noise and starts.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Put runs beside each other: what they cost, generate and bring back (VAE against GAN)."""
    from ganscale.cli.duration import announce
    from ganscale.evaluation.distributions.features import FeatureCache
    from ganscale.evaluation.image_sets import open_images
    from ganscale.evaluation.image_views import Subset
    from ganscale.evaluation.reconstruction import comparison as of
    from ganscale.evaluation.run_references import default_reference
    from ganscale.generation.degradations import degradation_named
    from ganscale.generation.inversion import InversionSettings
    from ganscale.metrics.extractors import EfficientNetLite0, open_extractor
    from ganscale.tracking.console import progress_bars
    from ganscale.world import World, process_group

    world = World.detect(device)
    if world.world_size > 1:
        raise ConfigError("compare measures time: one process does it, without torchrun")
    search = InversionSettings(steps=steps, restarts=restarts, seed=seed)
    entries = [of.load_run(str(run), search, device=world.device) for run in runs]
    scratch = FeatureCache().folder.parent
    real = open_images(reference or default_reference(str(runs[0])), scratch=scratch)
    if num_reference is not None:
        real = Subset.random(real, num_reference, seed=0)
    subject = Subset.random(open_images(images, split="test", scratch=scratch), num, seed=seed)
    wanted = [degradation_named(task, subject.shape, seed=seed) for task in _tasks(tasks)]
    networks = of.EvaluationNetworks(open_extractor("auto"), EfficientNetLite0(), world)
    networks.extractor.to(world.device)
    networks.network.to(world.device)
    with process_group(world), progress_bars(stderr_console()) as start_task:
        results = {}
        for degradation in wanted:  # pictures first: features of samples take far longer
            task = degradation.name
            results[task] = of.reconstruct_with_all(
                entries, subject, degradation, networks, seed=seed, start_task=start_task
            )
            _print_task(task, results[task][1])
            _draw(*results[task], out / f"{task.replace(' ', '-')}.png")
        costs = [of.training_cost(entry) for entry in entries]
        qualities = [
            of.sample_metrics(
                entry,
                real,
                networks,
                metric=metric,
                num_images=num_samples,
                planned=partial(
                    announce, network=networks.extractor, shape=real.shape, world=world
                ),
                start_task=start_task,
            )
            for entry in entries
        ]
    _print_costs(entries, costs, qualities)
    figures = {
        "runs": [
            of.ComparedRun.to_json(*each) for each in zip(entries, costs, qualities, strict=True)
        ],
        "samples": num_samples,
        "reference": real.description,
        "images": subject.description,
        "extractor_digest": networks.extractor.digest,
        "search": vars(search),
        "tasks": {task: [way.to_json() for way in ways] for task, (_, ways) in results.items()},
    }
    write_json(out / "figures.json", figures)
    typer.echo(f"wrote a picture of each task and figures.json to {out}")


def _tasks(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--tasks {text}: expected at least one")
    return names


def _print_costs(
    entries: list[ComparedRun], costs: list[TrainingCost], qualities: list[Mapping[str, Estimate]]
) -> None:
    head = (
        f"{'run':24} {'method':10} {'kimg':>7} {'hours':>6} {'img/s':>6} {'GiB':>5} {'M par.':>6}"
    )
    typer.echo(f"\n{head}   {', '.join(qualities[0])}")
    for entry, cost, sample_metrics in zip(entries, costs, qualities, strict=True):
        peak = "-" if cost.peak_memory_gib is None else f"{cost.peak_memory_gib:.1f}"
        typer.echo(
            f"{entry.name:24} {entry.method:10} {entry.nimg / 1000:7g} {cost.seconds / 3600:6.2f} "
            f"{cost.images_per_second:6.0f} {peak:>5} {entry.num_parameters / 1e6:6.2f}   "
            + ", ".join(map(str, sample_metrics.values()))
        )


def _print_task(task: str, ways: list[TaskResult]) -> None:
    names = list(ways[0].similarities)
    typer.echo(
        f"{task:34}" + "".join(f"{name.split('_')[0]:>12}" for name in names) + "     s/image"
    )
    for way in ways:
        values = "".join(f"{way.similarities[name].value:12.4g}" for name in names)
        seconds = "-" if way.seconds_per_image is None else f"{way.seconds_per_image:.3g}"
        typer.echo(f"{way.name:34}{values}{seconds:>12}")


def _draw(truth: Tensor, ways: list[TaskResult], path: Path) -> None:
    """A row for each way, in their order, and the truth below."""
    import torch

    from ganscale.generation.pictures import lay_out, write_picture

    rows = [*(way.images for way in ways), truth]
    write_picture(lay_out(torch.stack(rows)[:, :_COLUMNS], scale=2), path)
