"""Verbs that compare runs: a tournament among them, and one recipe's seeds with each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ganscale.cli.app import app, stderr_console
from ganscale.errors import ConfigError, TrainingFault

if TYPE_CHECKING:
    from ganscale.config import Config

__all__: list[str] = []

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")]


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
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Rank runs: every discriminator judges every generator (generative adversarial metric)."""
    from ganscale.data.shards import ShardSet
    from ganscale.evaluation.contestants import load_contestants
    from ganscale.evaluation.images import ImagesOfShards
    from ganscale.evaluation.tournament import hold_tournament, num_judged
    from ganscale.tracking.console import counting

    images = ImagesOfShards(ShardSet.load(reference))
    contestants = load_contestants(runs, device=device)
    total = num_judged(len(contestants), num, images)
    with counting("judging images", total, stderr_console()) as progress:
        result = hold_tournament(contestants, images, num_images=num, seed=seed, progress=progress)
    _write_json(json_file, result.to_json())
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
    from ganscale.evaluation.stability import summarise, summarise_run

    if report_only:
        runs = [Path(argument) for argument in arguments or []]
    else:
        overrides = [*(arguments or []), *([f"storage={storage}"] if storage else [])]
        runs = _train_seeds(config, overrides, seeds)
    report = summarise([summarise_run(run, metric) for run in runs], metric)
    _write_json(json_file, report.to_json())
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
    from ganscale.run_directory import RunDirectory

    file = RunDirectory(config.run_dir).config
    if not file.is_file():
        return False
    if all(n.nimg < config.total_nimg for n in CheckpointStore(config.checkpoints).lineage()):
        return False
    before = load_config(file)
    parts = ("seed", "model", "objective", "penalty", "augment", "optimizer", "training")
    changed = [part for part in parts if getattr(before, part) != getattr(config, part)]
    if changed:
        raise ConfigError(
            f"{config.run_dir} holds a finished run with other settings of {', '.join(changed)}: "
            "choose another name=..."
        )
    return True


def _write_json(path: Path | None, values: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n")
