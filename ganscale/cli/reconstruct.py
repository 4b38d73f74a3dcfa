"""The verb that brings back what images have lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from ganscale.cli.app import app, stderr_console, write_json
from ganscale.config import ExtractorName
from ganscale.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ganscale.evaluation.image_sets import ImageSet
    from ganscale.evaluation.reconstruction.reconstruct import Reconstructions, Reconstructor
    from ganscale.generation.degradations import Degradation
    from ganscale.metrics.extractors import FeatureExtractor
    from ganscale.world import World

__all__: list[str] = []

# Lists here, since reading the modules would load torch for `ganscale --help`.
_TASKS = Literal["identity", "inpaint", "superres", "denoise", "deblur", "colourise"]
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
        Path | None, typer.Option("--run", help="The same, as an option.", show_default=False)
    ] = None,
    split: Annotated[Literal["train", "test"], typer.Option(help="Of a set with both.")] = "test",
    task: Annotated[_TASKS, typer.Option(help="What the images have lost.")] = "identity",
    mask: Annotated[
        str, typer.Option(help="inpaint: half, centre, random, or a picture, white is missing.")
    ] = "half",
    scale: Annotated[int, typer.Option(min=2, help="superres: pixels a side of a block.")] = 4,
    blur: Annotated[float, typer.Option(help="deblur: standard deviation in pixels.")] = 1.5,
    noise: Annotated[
        float | None,
        typer.Option(min=0, help="Standard deviation, 0 to 255; denoise: 25, others: 0."),
    ] = None,
    num: Annotated[
        int | None, typer.Option(min=1, help="Only so many of the images, at random.")
    ] = None,
    by: Annotated[
        Literal["encoder", "inversion"] | None, typer.Option(help="Default: encoder if any.")
    ] = None,
    optimizer: Annotated[
        Literal["adam", "lbfgs"], typer.Option(help="Of the latents, for inversion.")
    ] = "lbfgs",
    steps: Annotated[int, typer.Option(min=1, help="Of every start.")] = 100,
    restarts: Annotated[
        int, typer.Option(min=1, max=512, help="Starts of an image; the best wins.")
    ] = 4,
    prior: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Weight of latents' improbability; identity, denoise: 0, others: 0.01.",
            show_default=False,
        ),
    ] = None,
    tuning_steps: Annotated[
        int, typer.Option(min=0, help="Then tune a copy of the generator to each image.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of images, noise and starts.")] = 0,
    extractor: Annotated[
        ExtractorName,
        typer.Option(help="Of the feature distance; auto: Inception if its weights are there."),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Reconstruct images, whole or degraded, from what a run has learnt."""
    from ganscale.evaluation.distributions.features import FeatureCache
    from ganscale.evaluation.image_sets import open_images
    from ganscale.evaluation.image_views import Subset
    from ganscale.evaluation.reconstruction.reconstruct import Reconstructor
    from ganscale.generation.degradations import degradation_named
    from ganscale.generation.inversion import InversionSettings
    from ganscale.world import World

    path = run or run_option
    if path is None or (run and run_option):
        raise ConfigError("which run? ganscale reconstruct RUN --images ... --out ...")
    world = World.detect(device)
    search = InversionSettings(
        optimizer=optimizer,
        steps=steps,
        restarts=restarts,
        prior=prior,
        tuning_steps=tuning_steps,
        seed=seed,
    )
    reconstructor = Reconstructor.load(path, by=by, search=search, device=world.device)
    subject: ImageSet = open_images(images, split=split, scratch=FeatureCache().folder.parent)
    if num is not None:
        subject = Subset.random(subject, num, seed=seed)
    degradation = degradation_named(
        task, subject.shape, mask=mask, scale=scale, blur=blur, noise=noise, seed=seed
    )
    compared = _restore_and_compare(
        reconstructor, subject, degradation, world, seed, extractor, out
    )
    if compared is None:
        return
    protocol: dict[str, Any] = {
        "task": degradation.name,
        "noise": degradation.noise * 127.5,
        "images": subject.description,
        "images_digest": subject.digest,
        "from": str(path),
        "nimg": reconstructor.generator.info["nimg"],
        "by": reconstructor.by,
        "extractor": compared.features.name,
        "extractor_digest": compared.features.digest,
        "seed": seed,
    }
    if reconstructor.by == "inversion":
        protocol["search"] = {**vars(search), "prior": search.prior_for(degradation)}
    _write_figures(compared, protocol, out)
    _print(compared.figures, protocol)
    num_images = len(compared.reconstructed.images)
    typer.echo(f"wrote {num_images} images, grid.png and figures.json to {out}")


class _Compared(NamedTuple):
    reconstructed: Reconstructions
    figures: dict[str, dict[str, Tensor]]
    """By kind of reconstruction and measure, (n,)."""
    features: FeatureExtractor


def _restore_and_compare(
    reconstructor: Reconstructor,
    images: ImageSet,
    degradation: Degradation,
    world: World,
    seed: int,
    extractor: ExtractorName,
    out: Path,
) -> _Compared | None:
    """On rank 0; None on others. The images are written before they are measured."""
    from ganscale.evaluation.reconstruction.reconstruct import reconstruct, similarity
    from ganscale.metrics.extractors import EfficientNetLite0, open_extractor
    from ganscale.tracking.console import progress_bars
    from ganscale.world import process_group

    console = stderr_console() if world.is_main else None
    with process_group(world), progress_bars(console) as start_task:
        total = reconstructor.num_steps(len(images))
        progress = start_task(f"{degradation.name} by {reconstructor.by}", total)
        reconstructed = reconstruct(
            reconstructor, images, degradation, world, seed=seed, progress=progress
        )
        if reconstructed is None:
            return None
        _write_pictures(reconstructed, out)
        network, features = EfficientNetLite0(), open_extractor(extractor)
        network.to(world.device)
        features.to(world.device)
        start_task("comparing", None)
        figures = {
            "trivial": similarity(reconstructed.trivial, reconstructed.truth, features, network),
            "reconstruction": similarity(
                reconstructed.images, reconstructed.truth, features, network
            ),
        }
    return _Compared(reconstructed, figures, features)


def _write_pictures(reconstructed: Reconstructions, out: Path) -> None:
    import torch

    from ganscale.generation.pictures import lay_out, write_picture

    for number, image in enumerate(reconstructed.images):
        write_picture(image, out / "images" / f"{number:06d}.png")
    shown = torch.stack([reconstructed.inputs, reconstructed.images, reconstructed.truth])[
        :, :_COLUMNS
    ]
    write_picture(lay_out(shown, scale=2), out / "grid.png")


def _write_figures(compared: _Compared, protocol: dict[str, Any], out: Path) -> None:
    from dataclasses import asdict

    from ganscale.metrics.intervals import of_repeats

    values = {
        kind: {
            name: {**asdict(of_repeats(each.tolist())), "of_each": each.tolist()}
            for name, each in of.items()
        }
        for kind, of in compared.figures.items()
    }
    write_json(out / "figures.json", {"protocol": protocol, "figures": values})


def _print(figures: dict[str, dict[str, Tensor]], protocol: dict[str, Any]) -> None:
    from ganscale.metrics.intervals import of_repeats

    for name in ("task", "images", "from", "by"):
        typer.echo(f"{name:8} {protocol[name]}")
    typer.echo(f"\n{'':32} {'trivial':>24}   reconstruction")
    for name, value in figures["reconstruction"].items():
        before, after = of_repeats(figures["trivial"][name].tolist()), of_repeats(value.tolist())
        typer.echo(f"{name:32} {before!s:>24}   {after}")
