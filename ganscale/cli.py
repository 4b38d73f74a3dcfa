"""The `ganscale` command. Heavy imports wait inside the commands, so that --help is quick.

Exit codes: 0 success, 1 failure, 2 wrong use or configuration. Errors are one line on standard
error; `--debug` shows the traceback as well.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from ganscale.errors import CheckpointError, ConfigError, DataError, GanscaleError

if TYPE_CHECKING:
    from rich.console import Console

    from ganscale.checkpoint import CheckpointStore
    from ganscale.config import Config
    from ganscale.data.shards import ShardSet

__all__ = ["app", "main"]

app = typer.Typer(
    name="ganscale",
    help="Train GANs on images at cluster scale: exact resume, worker-independent order.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
shards_app = typer.Typer(help="Build and check shard sets.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)
checkpoint_app = typer.Typer(help="Look at a run's checkpoints.", no_args_is_help=True)
app.add_typer(shards_app, name="shards")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(bench_app, name="bench")

Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.field=value ...", show_default=False)
]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options before the verb; `main` reads --debug itself."""


# A list here, since reading the folder would load the configuration for `ganscale --help`.
_PRESETS = (
    "quickstart, dcgan-cifar10, sngan-cifar10, biggan-cifar10, stylegan2-ada-cifar10, "
    "r3gan-cifar10, r3gan-small"
)


@app.command(epilog="Example: ganscale train --config quickstart name=first seed=1")
def train(
    overrides: Overrides = None,
    config: Annotated[
        str, typer.Option(help=f"A .yaml file, or one of {_PRESETS}.")
    ] = "quickstart",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print config and plan.")] = False,
) -> None:
    """Train, or go on with the run of that name, from its newest checkpoint that verifies."""
    from ganscale.config import load_config

    settings = load_config(config, overrides or [])
    if dry_run:
        _print_plan(settings)
        return
    _run(settings)


@app.command(epilog="Example: ganscale resume runs/quickstart training.total_kimg=500")
def resume(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    overrides: Overrides = None,
) -> None:
    """Go on with a run from its newest checkpoint that verifies, at any number of workers."""
    from ganscale.config import parse_overrides
    from ganscale.launch.start import resume_config

    _run(resume_config(run, parse_overrides(overrides or [])))


@app.command(epilog="Example: ganscale sample runs/quickstart --num 64 --seed 0 --out grid.png")
def sample(
    path: Annotated[Path, typer.Argument(help="Snapshot (.safetensors) or folder of a run.")],
    num: Annotated[int, typer.Option(min=1, help="How many images.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first; then +1.")] = 0,
    out: Annotated[Path, typer.Option(help="A .png grid, or a folder of PNGs.")] = Path(
        "samples.png"
    ),
    label: Annotated[
        int | None, typer.Option(min=0, help="Class of all images; else the seed decides it.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Draw images from a snapshot; a seed's image is always the same."""
    from ganscale.generation.sampling import load_generator, save_grid

    generator = load_generator(path, device=device)
    if label is not None and label >= generator.num_classes:
        known = f"0 to {generator.num_classes - 1}" if generator.num_classes else "no labels"
        raise ConfigError(f"--label {label}: this generator knows {known}")
    images = generator.sample(num, seed=seed, label=label)
    if out.suffix == ".png":
        save_grid(images, out)
    else:
        for offset, image in enumerate(images):
            save_grid(image[None], out / f"seed-{seed + offset:08d}.png", padding=0)
    typer.echo(f"wrote {num} images to {out}")


@app.command(epilog="Example: ganscale doctor --storage runs")
def doctor(
    storage: Annotated[Path, typer.Option(help="Where runs would be written.")] = Path("runs"),
) -> None:
    """Print machine, devices, versions, free space, and what would be used."""
    from ganscale.doctor import findings

    for name, value in findings(storage):
        typer.echo(f"{name:18} {value}")


@shards_app.command(
    "build",
    epilog="Example: ganscale shards build --source cifar10 --split train --out data/cifar10-train",
)
def shards_build(
    out: Annotated[Path, typer.Option(help="New folder for the set.")],
    source: Annotated[
        str, typer.Option(help="auto, cifar10, procedural, or a path to images or tars.")
    ] = "auto",
    split: Annotated[Literal["train", "test"], typer.Option(help="Which part.")] = "train",
    num_shards: Annotated[int, typer.Option(min=1, help="Tars.")] = 64,
    num_streams: Annotated[
        int | None, typer.Option(min=1, help="Bound on workers; default: shards, at most 64.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many images.")] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Resize the shorter side, cut out the centre.")
    ] = None,
    img_channels: Annotated[
        Literal["1", "3", "4"] | None, typer.Option(help="Convert to gray, RGB or RGBA.")
    ] = None,
) -> None:
    """Write images as WebDataset shards with an index; the same input gives the same bytes."""
    from ganscale.data.building import build_shards, check_free
    from ganscale.data.sources import open_source, resolve_source
    from ganscale.tracking.console import counting

    downloads = check_free(out).parent / "downloads"
    spec, notice = resolve_source(source, split, download_dir=downloads)
    console = _console()
    if notice:
        console.print(notice, highlight=False, soft_wrap=True)
    total = min(len(open_source(spec)), limit or sys.maxsize)
    with counting(f"building {out}", total, console) as progress:
        shard_set = build_shards(
            spec,
            out,
            num_shards=num_shards,
            num_streams=num_streams,
            limit=limit,
            resolution=resolution,
            img_channels=None if img_channels is None else int(img_channels),
            progress=progress,
        )
    _print_shards(shard_set)


@shards_app.command("index", epilog="Example: ganscale shards index data/my-webdataset")
def shards_index(
    root: Annotated[Path, typer.Argument(help="Folder of WebDataset tars.")],
    split: Annotated[Literal["train", "test"], typer.Option(help="Which part it is.")] = "train",
    num_streams: Annotated[
        int | None, typer.Option(min=1, help="Bound on workers; default: shards, at most 64.")
    ] = None,
) -> None:
    """Index WebDataset tars where they are, so that they can be trained on as they are."""
    from ganscale.data.building import index_shards
    from ganscale.tracking.console import counting

    with counting(f"indexing {root}", None, _console()) as progress:
        shard_set = index_shards(root, split=split, num_streams=num_streams, progress=progress)
    _print_shards(shard_set)


@shards_app.command("verify", epilog="Example: ganscale shards verify data/cifar10-train")
def shards_verify(root: Annotated[str, typer.Argument(help="Folder or URL of the set.")]) -> None:
    """Compare every shard with the index; exit code 1 if anything differs."""
    from ganscale.data.shards import ShardSet, verify_shards
    from ganscale.tracking.console import counting

    shard_set = ShardSet.load(root)
    with counting(f"verifying {root}", shard_set.num_samples, _console()) as progress:
        problems = verify_shards(shard_set, progress)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise DataError(f"{root}: {len(problems)} of {len(shard_set.shards)} shards are damaged")
    typer.echo(f"{root}: {len(shard_set.shards)} shards, {shard_set.num_samples} samples, all well")


@shards_app.command("info", epilog="Example: ganscale shards info data/cifar10-train")
def shards_info(root: Annotated[str, typer.Argument(help="Folder or URL of the set.")]) -> None:
    """Print what a set holds."""
    from ganscale.data.shards import ShardSet

    _print_shards(ShardSet.load(root))


Run = Annotated[Path, typer.Argument(help="Folder of the run.")]


@checkpoint_app.command("list", epilog="Example: ganscale checkpoint list runs/quickstart")
def checkpoint_list(run: Run) -> None:
    """List a run's checkpoints, whether each verifies, and which the run would go on from."""
    store = _checkpoints(run)
    line = store.lineage()
    usable = []
    for name in store.names():
        problem = store.verify(name)
        state = "verified" if problem is None else f"DAMAGED: {problem}"
        if name not in line:
            state += ", not part of the run: a newer attempt began before it"
        elif problem is None:
            usable.append(name)
        typer.echo(f"{name}  {name.nimg / 1000:10.1f} kimg  {state}")
    for folder in store.unfinished():
        typer.echo(f"{folder.path}  unfinished")
    typer.echo(f"goes on from {max(usable) if usable else 'nothing'}")


@checkpoint_app.command("verify", epilog="Example: ganscale checkpoint verify runs/quickstart")
def checkpoint_verify(run: Run) -> None:
    """Check sizes and hashes of all checkpoints; exit code 1 if one is damaged."""
    store = _checkpoints(run)
    names = store.names()
    problems = {name: problem for name in names if (problem := store.verify(name)) is not None}
    for name, problem in problems.items():
        typer.echo(f"{store.where(name)}: {problem}")
    if problems:
        raise CheckpointError(f"{len(problems)} of {len(names)} checkpoints are damaged")
    typer.echo(f"{len(names)} checkpoints verified")


@checkpoint_app.command("repair", epilog="Example: ganscale checkpoint repair runs/quickstart")
def checkpoint_repair(run: Run) -> None:
    """Put damaged checkpoints aside, remove what killed writers left; the sound ones stay."""
    for line in _checkpoints(run).repair() or ["nothing to repair"]:
        typer.echo(line)


@bench_app.callback()
def _bench() -> None:
    """Keeps `data` a verb of its own."""


@bench_app.command(
    "data", epilog="Example: ganscale bench data data/cifar10-train --json data.json"
)
def bench_data(
    root: Annotated[str, typer.Argument(help="Folder or URL of a shard set.")],
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each is measured.")] = 5.0,
    device: Annotated[str, typer.Option(help="For the device cache: cpu, cuda.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Images per second of each way to read a set, beside webdataset and torchvision."""
    import json
    from dataclasses import asdict

    import torch

    from ganscale.data.benchmark import bench_data
    from ganscale.data.shards import ShardSet

    torch.set_num_threads(1)
    console = _console()
    rows = bench_data(
        ShardSet.load(root),
        seconds=seconds,
        device=device,
        started=lambda name: console.print(f"measuring {name} ...", highlight=False),
    )
    typer.echo(f"{'':40} {'images/s':>12} {'MB/s':>9} {'ratio':>8}")
    for row in rows:
        megabytes = row.pixel_bytes_per_second / 1e6
        typer.echo(
            f"{row.name:40} {row.images_per_second:12,.0f} {megabytes:9,.1f} {row.ratio:8.1f}"
        )
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    warnings.showwarning = _show_warning
    # torch warns that DDP's find_unused_parameters finds nothing; distribute.py says why it is set.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        code = app(arguments, standalone_mode=False) or 0
    except typer.Exit as end:
        code = end.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = 130
        _report("interrupted", None, debug=False)
    except typer.TyperException as error:
        code = 2
        _report(f"{' '.join(error.format_message().split())} See --help.", None, debug=False)
    except GanscaleError as error:
        code = 2 if isinstance(error, ConfigError) else 1
        _report(str(error), error, debug=debug)
    except Exception as error:
        code = 1
        text = " ".join(str(error).split())
        _report(f"{type(error).__name__}: {text} (--debug shows where)", error, debug=debug)
    sys.exit(code)


def _report(message: str, error: BaseException | None, *, debug: bool) -> None:
    if debug and error is not None:
        import traceback

        traceback.print_exception(error)
    print(f"ganscale: {message}", file=sys.stderr)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if category.__module__.startswith("ganscale"):
        print(f"ganscale: warning: {message}", file=sys.stderr)


def _console() -> Console:
    from ganscale.tracking.console import stderr_console

    return stderr_console()


def _run(config: Config) -> None:
    from ganscale.launch.signals import EXIT_CODES
    from ganscale.launch.start import start
    from ganscale.run_directory import RunDirectory

    ending = start(config, _console())
    run_dir = RunDirectory(config.run_dir)
    typer.echo(f"run        {run_dir.root}")
    for name, folder in (
        ("samples", run_dir.sample_grid(0).parent),
        ("snapshots", run_dir.snapshots),
        ("checkpoint", Path(config.checkpoints)),
    ):
        newest = max((p for p in folder.glob("[!.]*-*")), default=None)
        typer.echo(f"{name:10} {newest}")
    if ending.reason:
        typer.echo(
            f"stopped at {ending.nimg / 1000:g} of {config.total_nimg / 1000:g} kimg; "
            f"to go on: ganscale resume {run_dir.root}"
        )
        raise typer.Exit(EXIT_CODES[ending.reason])


def _print_plan(config: Config) -> None:
    from ganscale.training.plan import describe_plan

    typer.echo(config.to_yaml())
    for line in describe_plan(config):
        typer.echo(f"# {line}")


def _print_shards(shard_set: ShardSet) -> None:
    channels, height, width = shard_set.image_shape
    typer.echo(f"location   {shard_set.location}")
    typer.echo(f"source     {shard_set.source}, {shard_set.split}")
    typer.echo(f"samples    {shard_set.num_samples}, {channels}x{height}x{width} uint8")
    typer.echo(f"shards     {len(shard_set.shards)}, {shard_set.num_bytes / 2**20:.1f} MiB")
    typer.echo(f"streams    {shard_set.num_streams}")
    typer.echo(f"classes    {len(shard_set.classes)}: {', '.join(shard_set.classes[:20])}")
    typer.echo(f"pixel mean {', '.join(f'{v:.3f}' for v in shard_set.pixel_mean)}")
    typer.echo(f"pixel std  {', '.join(f'{v:.3f}' for v in shard_set.pixel_std)}")


def _checkpoints(run: Path) -> CheckpointStore:
    from ganscale.checkpoint import CheckpointStore
    from ganscale.config import load_config
    from ganscale.run_directory import RunDirectory

    run_dir = RunDirectory(run.expanduser().absolute())
    location = str(run_dir.root / "checkpoints")
    if run_dir.config.is_file():
        place = {"storage": str(run_dir.root.parent), "name": run_dir.name}
        location = load_config(run_dir.config).with_changes(place).checkpoints
    store = CheckpointStore(location)
    if not store.names():
        raise CheckpointError(f"no checkpoints in {store.location}")
    return store
