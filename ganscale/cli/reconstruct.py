"""The command that reconstructs degraded images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from ganscale.cli.app import app, stderr_console, write_json
from ganscale.cli.options import AutoDevice, DegradationTask, Extractor, Split
from ganscale.config import ExtractorName
from ganscale.errors import ConfigError
from ganscale.world import World, process_group

if TYPE_CHECKING:
    from torch import Tensor

    from ganscale.evaluation.image_sets import ImageSet
    from ganscale.evaluation.reconstruction.reconstruct import Reconstructions, Reconstructor
    from ganscale.generation.degradations import Degradation
    from ganscale.metrics.extractors import FeatureExtractor


_COLUMNS = 16
"""Images that the grid shows."""


@app.command(
    epilog="Example: ganscale reconstruct runs/vae-cifar10 --images data/cifar10-test --num 64 "
    "--task inpaint --mask half --out inpainted    "
    "By latents: ganscale reconstruct runs/quickstart --images photos/ --by inversion --out found"
)
def reconstruct(
    images: Annotated[str, typer.Option(help="Folder, archive, shard set or cifar10.")],
    out: Annotated[Path, typer.Option(help="Folder for images, grid.png and figures.json.")],
    run: Annotated[
        Path | None,
        typer.Argument(help="Snapshot (.safetensors) or folder of a run.", show_default=False),
    ] = None,
    run_option: Annotated[
        Path | None, typer.Option("--run", help="The run, as an option.", show_default=False)
    ] = None,
    split: Annotated[Split, typer.Option(help="Which part of a set that has both.")] = "test",
    task: Annotated[
        DegradationTask, typer.Option(help="How the images are degraded.")
    ] = "identity",
    mask: Annotated[
        str | None,
        typer.Option(
            help="inpaint: half, centre, random, or a picture, where white is missing; default: "
            "half.",
            show_default=False,
        ),
    ] = None,
    scale: Annotated[
        int | None,
        typer.Option(
            min=2, help="superres: side of a block in pixels; default: 4.", show_default=False
        ),
    ] = None,
    blur: Annotated[
        float | None,
        typer.Option(
            help="deblur: standard deviation in pixels; default: 1.5.", show_default=False
        ),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            min=0, help="Standard deviation of noise, 0 to 255; default: 25 for denoise, else 0."
        ),
    ] = None,
    num: Annotated[
        int | None, typer.Option(min=1, help="Use only so many of the images, drawn at random.")
    ] = None,
    by: Annotated[
        Literal["encoder", "inversion"] | None,
        typer.Option(help="Default: the encoder if there is one."),
    ] = None,
    optimizer: Annotated[
        Literal["adam", "lbfgs"] | None,
        typer.Option(help="Optimizer of an inversion; default: lbfgs.", show_default=False),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Inversion: steps of the optimizer from every start; default: 100.",
            show_default=False,
        ),
    ] = None,
    restarts: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=512,
            help="Inversion: starts for each image, of which the best is taken; default: 4.",
            show_default=False,
        ),
    ] = None,
    prior: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Inversion: weight of mean(z^2) in the loss; identity, denoise: 0, others: 0.01.",
            show_default=False,
        ),
    ] = None,
    tuning_steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Inversion: steps of tuning a copy of the generator to each image afterwards; "
            "default: 0.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of images, noise and starts.")] = 0,
    extractor: Extractor = "auto",
    device: AutoDevice = "auto",
) -> None:
    """Reconstruct images, as they are or degraded, by a trained generator."""
    from ganscale.evaluation.image_sets import open_images
    from ganscale.evaluation.image_views import Subset
    from ganscale.evaluation.reconstruction.reconstruct import Reconstructor
    from ganscale.generation.degradations import build_degradation
    from ganscale.generation.inversion import InversionSettings

    # `evaluate` takes --run and other commands an argument, so both are accepted.
    path = run or run_option
    if path is None or (run and run_option):
        raise ConfigError("expected one run: ganscale reconstruct RUN --images ... --out ...")
    world = World.detect(device)
    choices = {
        "optimizer": optimizer,
        "steps": steps,
        "restarts": restarts,
        "prior": prior,
        "tuning_steps": tuning_steps,
    }
    given: dict[str, Any] = {name: value for name, value in choices.items() if value is not None}
    search = InversionSettings(seed=seed, **given)
    reconstructor = Reconstructor.load(path, by=by, search=search, device=world.device)
    if given and reconstructor.by == "encoder":
        raise ConfigError(
            f"--{next(iter(given)).replace('_', '-')} is for inversion, and {path} reconstructs by "
            "its encoder: leave it, or choose --by inversion"
        )
    subject: ImageSet = open_images(images, split=split)
    if num is not None:
        subject = Subset.random(subject, num, seed=seed)
    degradation = build_degradation(
        task, subject.shape, mask=mask, scale=scale, blur=blur, noise=noise, seed=seed
    )
    compared = _restore_and_compare(
        reconstructor, subject, degradation, world, seed, extractor, out
    )
    # Ranks other than 0 have done their share.
    if compared is None:
        return
    protocol = _protocol(path, reconstructor, degradation, subject, compared, seed)
    # Printed first, so that a file that cannot be written loses no results.
    _print(compared.metrics, protocol)
    _write_metrics(compared, protocol, out)
    num_images = len(compared.reconstructions.images)
    typer.echo(f"wrote {num_images} images, grid.png and figures.json to {out}")


def _protocol(
    path: Path,
    reconstructor: Reconstructor,
    degradation: Degradation,
    images: ImageSet,
    compared: _Compared,
    seed: int,
) -> dict[str, Any]:
    protocol: dict[str, Any] = {
        "task": degradation.name,
        "noise": degradation.noise * 127.5,
        "images": images.description,
        "images_digest": images.digest,
        "from": str(path),
        "nimg": reconstructor.generator.info["nimg"],
        "by": reconstructor.by,
        "extractor": compared.extractor.name,
        "extractor_digest": compared.extractor.digest,
        "seed": seed,
    }
    if reconstructor.by == "inversion":
        search = reconstructor.search
        protocol["search"] = {**vars(search), "prior": search.prior_for(degradation)}
    return protocol


class _Compared(NamedTuple):
    reconstructions: Reconstructions
    metrics: dict[str, dict[str, Tensor]]
    """By kind of reconstruction and measure, (n,)."""
    extractor: FeatureExtractor


def _restore_and_compare(
    reconstructor: Reconstructor,
    images: ImageSet,
    degradation: Degradation,
    world: World,
    seed: int,
    extractor: ExtractorName,
    out: Path,
) -> _Compared | None:
    """The reconstructions and their metrics on rank 0, None on others; writes the pictures."""
    from ganscale.evaluation.reconstruction.reconstruct import reconstruct, similarity
    from ganscale.metrics.extractors import EfficientNetLite0, open_extractor
    from ganscale.tracking.console import progress_bars

    console = stderr_console() if world.is_main else None
    with process_group(world), progress_bars(console) as start_task:
        total = reconstructor.num_steps(len(images))
        progress = start_task(f"{degradation.name} by {reconstructor.by}", total)
        made = reconstruct(reconstructor, images, degradation, world, seed=seed, progress=progress)
        if made is None:
            return None
        # Before they are measured, so that weights that cannot be downloaded cost no
        # reconstruction.
        _write_pictures(made, out)
        network, features = EfficientNetLite0(), open_extractor(extractor)
        network.to(world.device)
        features.to(world.device)
        start_task("comparing", None)
        metrics = {
            "trivial": similarity(made.trivial, made.truth, features, network),
            "reconstruction": similarity(made.images, made.truth, features, network),
        }
    return _Compared(made, metrics, features)


def _write_pictures(reconstructed: Reconstructions, out: Path) -> None:
    import torch

    from ganscale.generation.pictures import label_sheet, lay_out, write_picture

    for number, image in enumerate(reconstructed.images):
        write_picture(image, out / "images" / f"{number:06d}.png")
    # Those of an earlier call with more images, which would be taken for some of these.
    for path in (out / "images").glob("[0-9]" * 6 + ".png"):
        if int(path.stem) >= len(reconstructed.images):
            path.unlink()
    # What was observed, what was made of it, and the original, one below the other.
    shown = torch.stack([reconstructed.inputs, reconstructed.images, reconstructed.truth])[
        :, :_COLUMNS
    ]
    sheet = label_sheet(lay_out(shown, scale=2), ["input", "reconstruction", "truth"])
    write_picture(sheet, out / "grid.png")


def _write_metrics(compared: _Compared, protocol: dict[str, Any], out: Path) -> None:

    from ganscale.metrics.intervals import t_interval

    values = {
        kind: {
            name: {**asdict(t_interval(each.tolist())), "of_each": each.tolist()}
            for name, each in of.items()
        }
        for kind, of in compared.metrics.items()
    }
    write_json(out / "figures.json", {"protocol": protocol, "figures": values})


def _print(metrics: dict[str, dict[str, Tensor]], protocol: dict[str, Any]) -> None:
    from ganscale.metrics.intervals import t_interval

    for name in ("task", "images", "from", "by"):
        typer.echo(f"{name:8} {protocol[name]}")
    typer.echo(f"\n{'':32} {'trivial':>24}   reconstruction")
    for name, value in metrics["reconstruction"].items():
        before, after = t_interval(metrics["trivial"][name].tolist()), t_interval(value.tolist())
        typer.echo(f"{name:32} {before!s:>24}   {after}")
