"""Pictures from images: grids as PNG or JPEG, animations as GIF, WebP or APNG; arrays as .npy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ganscale.atomic_files import replacing
from ganscale.data.values import PIXELS, ValueRange
from ganscale.errors import ConfigError

GRID_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""Formats of grids by the suffix of the file name in lower case."""

ANIMATED = {".gif": "GIF", ".webp": "WEBP", ".apng": "PNG"}
_WHITE = 255
_SCREEN = 1024
"""Pixels of the longer side that a grid may have after it was magnified."""
_MAX_MAGNIFICATION = 8
_MARGIN = 6
_CUBEHELIX = ((-0.14861, 1.78277), (-0.29227, -0.90649), (1.97294, 0.0))
"""Weights of cosine and sine in red, green and blue: rotations about the gray diagonal that keep
the perceived brightness."""


def as_pictures(images: Tensor, values: ValueRange) -> Tensor:
    """Convert images (n, C, H, W) to uint8 pictures; uint8 images are returned unchanged.

    Arrays of floats with one channel get the colours of `cubehelix`; three channels are taken for
    RGB, four for RGBA. The lowest value of the range is black, the highest white.
    """
    if values.dtype == "uint8":
        return images
    shades = PIXELS.from_network(values.to_network(images))
    if shades.shape[1] != 1:
        return shades
    colours = cubehelix(torch.arange(256) / 255).to(shades.device)
    return colours[shades[:, 0].long()].movedim(-1, 1)


def cubehelix(shares: Tensor) -> Tensor:
    """Colours of (n,) numbers in [0, 1], uint8 (n, 3): black to white, evenly in perceived light.

    Green (2011, arXiv 1108.5083), with the published defaults.
    """
    angle = 2 * math.pi * (0.5 / 3 + 1 - 1.5 * shares)
    amplitude = shares * (1 - shares) / 2
    waves = torch.stack([angle.cos(), angle.sin()], 1) @ shares.new_tensor(_CUBEHELIX).T
    return PIXELS.from_network(2 * (shares[:, None] + amplitude[:, None] * waves) - 1)


def lay_out(images: Tensor, *, scale: int = 1, padding: int = 2) -> Tensor:
    """Images (rows, columns, C, H, W) as one, magnified `scale` times, white between: (C, h, w)."""
    rows, columns, channels, height, width = images.shape
    # Pixels are repeated and not interpolated, so that a picture shows what the generator made.
    big = images.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    high, wide = height * scale + padding, width * scale + padding
    sheet = images.new_full((channels, rows * high - padding, columns * wide - padding), _WHITE)
    for row in range(rows):
        for column in range(columns):
            top, left = row * high, column * wide
            place = sheet[:, top : top + height * scale, left : left + width * scale]
            place.copy_(big[row, column])
    return sheet


def magnification(height: int, width: int) -> int:
    """How many times a sheet of so many pixels can be magnified so that it still fits a screen."""
    return max(1, min(_MAX_MAGNIFICATION, _SCREEN // max(height, width)))


def label_sheet(sheet: Tensor, rows: Sequence[str], columns: Sequence[str] = ()) -> Tensor:
    """Write a label left of each row of a sheet, and above each column if there are labels.

    The sheet is uint8 (C, h, w) of rows of the same height; white margins are added for the text.
    """
    font = ImageFont.load_default(size=max(11, min(28, sheet.shape[1] // max(1, len(rows)) // 4)))
    picture = as_pillow(sheet)
    picture = picture.convert("RGBA" if sheet.shape[0] == 4 else "RGB")
    left = max((math.ceil(font.getlength(text)) for text in rows), default=0) + 2 * _MARGIN
    line = sum(font.getmetrics())  # type: ignore[union-attr]
    top = line + 2 * _MARGIN if columns else 0
    labelled = Image.new(picture.mode, (left + picture.width, top + picture.height), "white")
    labelled.paste(picture, (left, top))
    draw = ImageDraw.Draw(labelled)
    for number, text in enumerate(rows):
        middle = top + (number + 0.5) * picture.height / len(rows)
        draw.text((_MARGIN, middle), text, fill="black", font=font, anchor="lm")
    for number, text in enumerate(columns):
        middle = left + (number + 0.5) * picture.width / len(columns)
        draw.text((middle, top / 2), text, fill="black", font=font, anchor="mm")
    return torch.from_numpy(np.array(labelled)).movedim(-1, 0)


def write_picture(image: Tensor, path: Path, *, text: Mapping[str, str] = {}) -> None:
    """Write uint8 (C, H, W) with 1, 3 or 4 channels as a PNG. Raises `ConfigError` for others.

    `text` is stored in the file by keyword, beside the pixels.
    """
    check_picture_name(path)
    write_grid(image, path, text=text)


def check_picture_name(path: Path) -> None:
    """Raise `ConfigError` if `write_picture` would refuse the name; before long work is begun."""
    if path.suffix != ".png":
        raise ConfigError(f"--out {path}: expected a name that ends in .png")


def check_format(path: Path, channels: int) -> None:
    """Raise `ConfigError` if the format of `path` cannot hold images of so many channels."""
    if GRID_FORMATS.get(path.suffix.lower()) == "JPEG" and channels == 4:
        raise ConfigError(
            f"{path}: JPEG has no transparency, and these images are RGBA (4 channels): "
            "choose a name that ends in .png"
        )


def write_grid(image: Tensor, path: Path, *, text: Mapping[str, str] = {}) -> None:
    """Write uint8 (C, H, W) with 1, 3 or 4 channels, atomically.

    The suffix of `path` chooses the format (`GRID_FORMATS`, PNG for another one). A PNG also holds
    `text` by keyword; JPEG has no such fields. Raises `ConfigError` for RGBA as JPEG.
    """
    check_format(path, image.shape[0])
    image_format = GRID_FORMATS.get(path.suffix.lower(), "PNG")
    options: dict[str, Any] = {}
    if image_format == "JPEG":
        # Pillow's defaults halve the colour resolution, which blurs images this small.
        options = {"quality": 95, "subsampling": 0}
    elif text:
        options["pnginfo"] = information = PngInfo()
        for keyword, value in text.items():
            information.add_text(keyword, value)
    with replacing(path, fsync=False) as file:
        as_pillow(image).save(file, format=image_format, **options)


def grid_columns(num_images: int) -> int:
    """Images of a row of a grid that is nearly square."""
    return max(1, round(math.sqrt(num_images)))


def make_grid(images: Tensor, *, columns: int | None = None, padding: int = 1) -> Tensor:
    """Images (N, C, H, W) as one (C, h, w), row by row; black between them, and gray as RGB.

    The grid is nearly square unless `columns` says otherwise.
    """
    from torchvision import utils

    grid: Tensor = utils.make_grid(
        images, nrow=columns or grid_columns(len(images)), padding=padding
    )
    return grid


def save_grid(
    images: Tensor,
    path: Path,
    *,
    columns: int | None = None,
    padding: int = 1,
    scale: int | None = 1,
    rows: Sequence[str] = (),
    text: Mapping[str, str] = {},
) -> None:
    """Write uint8 images (N, C, H, W) as one picture, as `write_grid` does.

    The grid is nearly square unless `columns` says otherwise. It is magnified `scale` times, or
    with None so that it fills a screen; `rows` are labels for its rows.
    """
    sheet = make_grid(images, columns=columns, padding=padding)
    scale = scale or magnification(*sheet.shape[1:])
    # Pixels are repeated and not interpolated, so that a picture shows what the generator made.
    sheet = sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    write_grid(label_sheet(sheet, rows) if rows else sheet, path, text=text)


def write_array(values: Tensor, path: Path) -> None:
    """Write values of any shape as an .npy file, for `numpy.load`."""
    with replacing(path, fsync=False) as file:
        np.save(file, values.numpy(), allow_pickle=False)


def write_animation(frames: Tensor, path: Path, *, frame_ms: int = 60) -> None:
    """Write uint8 (frames, C, H, W) as an endless animation; the suffix chooses the format."""
    pictures = [as_pillow(frame) for frame in frames]
    # WebP is lossy by default, which would blur images this small.
    options = {"lossless": True} if path.suffix == ".webp" else {}
    with replacing(path, fsync=False) as file:
        pictures[0].save(
            file,
            format=ANIMATED.get(path.suffix, "PNG"),
            save_all=True,
            append_images=pictures[1:],
            duration=frame_ms,
            loop=0,
            **options,
        )


def as_pillow(image: Tensor) -> Image.Image:
    """An uint8 image (C, H, W) with 1, 3 or 4 channels as one of Pillow, of mode L, RGB or RGBA."""
    channels_last = image.movedim(0, -1).contiguous()
    # Pillow takes gray images without an axis of channels.
    if image.shape[0] == 1:
        channels_last = channels_last[..., 0]
    return Image.fromarray(channels_last.to(torch.uint8).numpy())
