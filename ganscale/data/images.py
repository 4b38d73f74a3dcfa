"""Encoded images to pixels and back, strictly: what is not the expected image is an error.

The header is looked at before anything is decoded, so a few bytes that claim to be a huge image
cost nothing. Pixels are uint8, (C, H, W), C = 1 (gray), 3 (RGB) or 4 (RGBA).
"""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode

from ganscale.errors import DataError

__all__ = ["CHANNELS", "decode", "normalised_png"]

CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
"""Channels of the image modes that can be trained on, by Pillow's name."""
_MODES = {channels: mode for mode, channels in CHANNELS.items()}
_MAX_PIXELS = 2**26
_UNCHANGED = ImageReadMode.UNCHANGED.value
_PNG_COLOURS = {1: 0, 3: 2, 4: 6}
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_LAST_FILTER = 4


def decode(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Pixels of a PNG, JPEG or WebP image, (C, H, W).

    Raises `DataError` if it has another shape than `shape`, or cannot be decoded; a message such as
    "is 20000x20000 in mode RGB, expected ..." that the caller puts the image's name before.
    """
    try:
        rows = _png_rows(data, shape)
        pixels = _decoded(data, shape) if rows is None else _from_rows(rows, shape)
    except (OSError, RuntimeError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot be decoded: {_first_line(error)}") from None
    if pixels.shape != shape:
        raise DataError(f"decodes to shape {pixels.shape}, expected {shape}")
    return pixels


def normalised_png(
    data: bytes, *, resolution: int | None = None, img_channels: int | None = None
) -> tuple[bytes, NDArray[np.uint8]]:
    """An image of any kind as a PNG to train on, and its pixels.

    Args:
        data: an image in any format that Pillow reads.
        resolution: side in pixels; the shorter side is resized to it with anti-aliasing and the
            centre is cut out. None leaves the size alone.
        img_channels: 1, 3 or 4; None keeps gray, RGB and RGBA and refuses other modes.

    Returns:
        (PNG, pixels (C, H, W)); a PNG that needs no change is passed on byte for byte.

    Raises:
        DataError: not readable, too large, or of a mode that is not told what to become; the caller
            puts the image's name before the message.
    """
    with _opened(data) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise DataError(
                f"claims {image.width}x{image.height} pixels; at most {_MAX_PIXELS} are read"
            )
        try:
            changed = _converted(image, resolution, img_channels)
            pixels = np.asarray(changed)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"cannot be decoded: {_first_line(error)}") from None
        if changed is not image or image.format != "PNG":
            data = _encoded(changed)
    return data, _chw(pixels)


def _png_rows(data: bytes, shape: tuple[int, int, int]) -> bytes | None:
    """The rows of a plain PNG of that shape, each after its filter byte; None if it is not one.

    Chunks' CRCs are not looked at: the inflated rows end in a checksum of their own.
    """
    channels, height, width = shape
    if not data.startswith(_png_head(shape)):
        return None
    at, compressed = len(_png_head(shape)), []
    while (kind := data[at + 4 : at + 8]) == b"IDAT":
        end = at + 8 + int.from_bytes(data[at : at + 4])
        compressed.append(data[at + 8 : end])
        at = end + 4
    row_bytes = 1 + width * channels
    stream = zlib.decompressobj()
    try:
        rows = stream.decompress(b"".join(compressed), height * row_bytes + 1)
    except zlib.error:
        return None
    whole = kind == b"IEND" and stream.eof and len(rows) == height * row_bytes
    return rows if whole and max(rows[::row_bytes]) <= _LAST_FILTER else None


def _from_rows(rows: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    # torchvision's operator undoes the filters much faster than Pillow, and other threads run
    # meanwhile. But it ends the process on an error in the pixel data, so it is given a PNG that
    # was made here, of the checked rows. Its Python wrapper warns at every call of torchcodec.
    png = _png_head(shape) + _chunk(b"IDAT", zlib.compress(rows, level=0)) + _PNG_END
    array: NDArray[np.uint8] = torch.ops.image.decode_png.default(
        torch.frombuffer(bytearray(png), dtype=torch.uint8), _UNCHANGED, False
    ).numpy()
    return array


@cache
def _png_head(shape: tuple[int, int, int]) -> bytes:
    """Everything before the pixels in an 8-bit PNG without interlacing."""
    channels, height, width = shape
    header = struct.pack(">IIBBBBB", width, height, 8, _PNG_COLOURS[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)


def _chunk(kind: bytes, content: bytes) -> bytes:
    crc32 = zlib.crc32(content, zlib.crc32(kind))
    return b"".join((len(content).to_bytes(4), kind, content, crc32.to_bytes(4)))


def _decoded(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    with _opened(data) as image:
        if (CHANNELS.get(image.mode), image.height, image.width) != shape:
            raise DataError(
                f"is {image.width}x{image.height} in mode {image.mode}, "
                f"expected {shape[2]}x{shape[1]} in mode {_MODES[shape[0]]}"
            )
        return _chw(np.asarray(image))


def _converted(image: Image.Image, resolution: int | None, img_channels: int | None) -> Image.Image:
    transparent = "transparency" in image.info
    if img_channels is None and (image.mode not in CHANNELS or transparent):
        raise DataError(
            f"has mode {image.mode}{' with transparency' if transparent else ''}; "
            "expected gray, RGB or RGBA: say with --img-channels 1, 3 or 4 what to make of it"
        )
    if image.mode.startswith(("I", "F")):
        raise DataError(f"has mode {image.mode}; expected 8 bits a channel: convert it first")
    if img_channels is not None and (image.mode != _MODES[img_channels] or transparent):
        image = image.convert(_MODES[img_channels])
        image.info.pop("transparency", None)
    if resolution is not None and image.size != (resolution, resolution):
        size = (resolution, resolution)
        image = ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)
    return image


def _chw(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"is too large: {_first_line(error)}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"is not an image: {_first_line(error)}") from None


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", icc_profile=None)
    return buffer.getvalue()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
