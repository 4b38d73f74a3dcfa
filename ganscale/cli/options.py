"""Options and arguments that several commands share, and the parsing of lists in options.

Choices are written out here although the library has them as well, since its modules import numpy
or torch, which `ganscale --help` must not load; `test_options.py` compares both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from ganscale.config import ExtractorName
from ganscale.errors import ConfigError

Split = Literal["train", "test"]
Layout = Literal["auto", "top-folders", "leaf-folders", "flat", "tars"]
Fit = Literal["crop", "pad"]
DegradationTask = Literal["identity", "inpaint", "superres", "denoise", "deblur", "colourise"]
RatingTask = Literal["realness", "preference"]


def _check_device(device: str) -> str:
    if device != "cpu":
        # Checked here, so that a device that cannot be used is reported before anything is read.
        from ganscale.world import check_cuda

        if not re.fullmatch(r"cuda(:\d+)?", device):
            raise ConfigError(f"--device {device}: expected cpu, cuda or cuda:N")
        check_cuda(f"--device {device}", index=int(device.partition(":")[2] or 0))
    return device


Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.field=value ...", show_default=False)
]
ConfigSource = Annotated[str, typer.Option("--config", help="A preset or a .yaml file.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the results to this file, as JSON.")
]
Device = Annotated[str, typer.Option(callback=_check_device, help="cpu, cuda or cuda:N.")]
AutoDevice = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
"""For commands that torchrun may start in several processes, each of which takes its own GPU."""
Snapshot = Annotated[Path, typer.Argument(help="Snapshot (.safetensors) or folder of a run.")]
TruncationPsi = Annotated[
    float | None,
    typer.Option(
        help="With styles w: 0 to 1, the part of w's distance to its mean that is kept; else the "
        "largest |z| element."
    ),
]
Label = Annotated[
    int | None,
    typer.Option(min=0, help="Class of all images; by default the seed decides it for each."),
]
Seed = Annotated[
    int, typer.Option(min=0, help="Seed of the first image; each next one is 1 higher.")
]
Reference = Annotated[
    str | None,
    typer.Option(help="Shard set, folder, cifar10; default: what the (first) run trains on."),
]
NumReference = Annotated[
    int | None, typer.Option(min=2, help="Use only so many reference images, drawn at random.")
]
Extractor = Annotated[
    ExtractorName,
    typer.Option(help="Network of the features; auto: Inception if its weights are installed."),
]
Scale = Annotated[int, typer.Option(min=1, help="Magnify the pixels by this factor.")]


def parse_integers(option: str, text: str) -> list[int]:
    """Parse numbers such as 0,1,2. Raises `ConfigError` that names the option for other text."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: expected numbers, as in 0,1,2") from None


def parse_names(text: str) -> list[str]:
    """Parse names with commas between them; empty ones are dropped."""
    return [name.strip() for name in text.split(",") if name.strip()]
