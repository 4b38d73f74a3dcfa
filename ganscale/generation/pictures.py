"""Images laid out and written: grids as PNG, frames as GIF, WebP or APNG."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ganscale.errors import ConfigError

__all__ = ["ANIMATED", "lay_out", "write_animation", "write_picture"]

ANIMATED = {".gif": "GIF", ".webp": "WEBP", ".apng": "PNG"}
_WHITE = 255


def lay_out(images: Tensor, *, scale: int = 1, padding: int = 2) -> Tensor:
    """Images (rows, columns, C, H, W) as one, magnified `scale` times, white between: (C, h, w)."""
    rows, columns, channels, height, width = images.shape
    big = images.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    high, wide = height * scale + padding, width * scale + padding
    sheet = images.new_full((channels, rows * high - padding, columns * wide - padding), _WHITE)
    for row in range(rows):
        for column in range(columns):
            top, left = row * high, column * wide
            place = sheet[:, top : top + height * scale, left : left + width * scale]
            place.copy_(big[row, column])
    return sheet


def write_picture(image: Tensor, path: Path) -> None:
    """Write uint8 (C, H, W) with 1, 3 or 4 channels as a PNG. Raises `ConfigError` for others."""
    if path.suffix != ".png":
        raise ConfigError(f"--out {path}: expected a name that ends in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    _pillow(image).save(path, format="PNG")


def write_animation(frames: Tensor, path: Path, *, frame_ms: int = 60) -> None:
    """Write uint8 (frames, C, H, W), repeated for ever; the ending decides the format."""
    pictures = [_pillow(frame) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"lossless": True} if path.suffix == ".webp" else {}
    pictures[0].save(
        path,
        format=ANIMATED.get(path.suffix, "PNG"),
        save_all=True,
        append_images=pictures[1:],
        duration=frame_ms,
        loop=0,
        **options,
    )


def _pillow(image: Tensor) -> Image.Image:
    channels_last = image.movedim(0, -1).contiguous()
    if image.shape[0] == 1:
        channels_last = channels_last[..., 0]
    return Image.fromarray(channels_last.to(torch.uint8).numpy())
