"""Encoded images to pixels and back, strictly: what is not the expected image is an error.

The header is looked at before anything is decoded, so a few bytes that claim to be a huge image
cost nothing. Pixels are uint8, (C, H, W), C = 1 (gray), 3 (RGB) or 4 (RGBA).
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps

from ganscale.errors import DataError

if TYPE_CHECKING:
    import torch

CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
"""Channels of the image modes that can be trained on, by Pillow's name."""
_MODES = {channels: mode for mode, channels in CHANNELS.items()}
Fit = Literal["crop", "pad"]
"""What becomes of an image that is not square."""
_MAX_PIXELS = 2**26
# By the PNG specification: the colour type for a number of channels, the chunk at the end with its
# CRC, and the greatest number of a row's filter.
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


@dataclass(frozen=True)
class Normalised:
    """An image in the form to train on."""

    data: bytes
    """A PNG; for arrays of floats, an npy file."""
    values: NDArray[Any]
    """(C, H, W): uint8 pixels, or float32."""
    changes: tuple[str, ...] = ()
    """What was converted or dropped without having been asked for, in words."""


def normalised_png(
    data: bytes,
    *,
    resolution: int | None = None,
    img_channels: int | None = None,
    background: str = "white",
    fit: Fit = "crop",
) -> Normalised:
    """An image of any kind as a PNG to train on; one that needs no change stays byte for byte.

    EXIF's orientation is applied. Modes that have one counterpart become it: palettes, CMYK, YCbCr,
    Lab and HSV become RGB; one bit and 16 bits a pixel become 8-bit gray (65535 becomes 255, and
    values between are rounded). Of 16 bits a channel in colour images, and in gray ones with alpha,
    the upper 8 are kept. Of a moving image the first frame is taken.

    Args:
        data: an image in any format that Pillow reads.
        resolution: side in pixels, to which the image is resized with anti-aliasing. None leaves
            the size alone.
        img_channels: 1, 3 or 4; None keeps gray, RGB and RGBA. For 1 and 3, what is transparent is
            composited on the background.
        background: a colour as Pillow names it, such as "white" or "#808080".
        fit: what happens to an image that is not square: with "crop" its shorter side is resized
            and the centre is cut out; with "pad" its longer side is, and what is missing has the
            colour of the background.

    Raises:
        DataError: not readable, too large, or of a mode that is not told what to become; the caller
            puts the image's name before the message.
    """
    image, changes, is_unchanged = _normalised(
        data, resolution=resolution, img_channels=img_channels, background=background, fit=fit
    )
    # Else the bytes stay: encoding again would make them depend on the version of zlib.
    if not is_unchanged:
        # Without the colour profile: decoders differ in whether they apply it, and pixels must not.
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", icc_profile=None)
        data = buffer.getvalue()
    return Normalised(data, _chw(np.asarray(image)), tuple(changes))


def normalised_pixels(data: bytes) -> NDArray[np.uint8]:
    """The pixels of `normalised_png` without arguments, (C, H, W), without encoding a PNG."""
    image, _, _ = _normalised(data)
    return _chw(np.asarray(image))


def _normalised(
    data: bytes,
    *,
    resolution: int | None = None,
    img_channels: int | None = None,
    background: str = "white",
    fit: Fit = "crop",
) -> tuple[Image.Image, list[str], bool]:
    """The image to train on, what was converted, and whether `data` are a PNG of it already."""
    with _opened(data) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise DataError(
                f"claims {image.width}x{image.height} pixels; at most {_MAX_PIXELS} are read"
            )
        changes: list[str] = []
        # Pillow has no colour images of 16 bits a channel: it reads the upper bytes alone. A PNG of
        # them must be encoded again, or every reader of the shards would meet all 16 bits.
        if image.mode in CHANNELS and any(";16" in str(tile[3]) for tile in image.tile):
            changes.append("16 bits a channel became 8")
        try:
            changed = _upright(image, changes)
            if getattr(image, "is_animated", False):
                changes.append("later frames of moving images were left out")
            changed = _converted(changed, img_channels, background, changes)
            if resolution is not None and changed.size != (resolution, resolution):
                size = (resolution, resolution)
                method = Image.Resampling.LANCZOS
                if fit == "pad":
                    changed = ImageOps.pad(changed, size, method=method, color=background)
                else:
                    changed = ImageOps.fit(changed, size, method=method)
            changed.load()  # while the file is open
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"cannot be decoded: {_first_line(error)}") from None
        return changed, changes, changed is image and image.format == "PNG" and not changes


def _png_rows(data: bytes, shape: tuple[int, int, int]) -> bytes | None:
    """The rows of a plain PNG of that shape, each after its filter byte; None if it is not one.

    Chunks' CRCs are not looked at: the inflated rows end in a checksum of their own.
    """
    channels, height, width = shape
    if not data.startswith(_png_head(shape)):
        return None
    # Only the plainest PNGs, which is what building writes: all others are left to Pillow.
    at, compressed = len(_png_head(shape)), []
    while (kind := data[at + 4 : at + 8]) == b"IDAT":
        end = at + 8 + int.from_bytes(data[at : at + 4])
        compressed.append(data[at + 8 : end])
        at = end + 4
    row_bytes = 1 + width * channels
    stream = zlib.decompressobj()
    try:
        # One byte more than there should be: that much shows that the data are too long, and a few
        # bytes that inflate to gigabytes cost nothing.
        rows = stream.decompress(b"".join(compressed), height * row_bytes + 1)
    except zlib.error:
        return None
    whole = kind == b"IEND" and stream.eof and len(rows) == height * row_bytes
    return rows if whole and max(rows[::row_bytes]) <= _LAST_FILTER else None


def _from_rows(rows: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    # torchvision's operator undoes the filters much faster than Pillow, and other threads run
    # meanwhile. But it ends the process on an error in the pixel data, so it gets a PNG that was
    # made here, of the checked rows (level 0 is no compression). The operator is called directly
    # because its Python wrapper warns at every call that torchcodec should be used.
    import torch

    png = _png_head(shape) + _chunk(b"IDAT", zlib.compress(rows, level=0)) + _PNG_END
    decode_png, unchanged = png_decoder()
    encoded = torch.frombuffer(bytearray(png), dtype=torch.uint8)
    array: NDArray[np.uint8] = decode_png(encoded, unchanged, False).numpy()
    return array


@cache
def png_decoder() -> tuple[Callable[..., torch.Tensor], int]:
    """The operator and its mode that keeps channels as they are.

    Imported when it is needed: both take seconds to load, and building decodes with Pillow.
    """
    import torch
    from torchvision.io import ImageReadMode

    return torch.ops.image.decode_png.default, ImageReadMode.UNCHANGED.value


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
    """What `normalised_png` makes of the image when it is told nothing."""
    with _opened(data) as image:
        problem = (
            f"is {image.width}x{image.height} in mode {image.mode}, "
            f"expected {shape[2]}x{shape[1]} in mode {_MODES[shape[0]]}"
        )
        if {image.height, image.width} != set(shape[1:]):  # EXIF's orientation may swap them
            raise DataError(problem)
        converted = _converted(_upright(image, []), None, "white", [])
        if CHANNELS[converted.mode] != shape[0]:
            raise DataError(problem)
        return _chw(np.asarray(converted))


def _upright(image: Image.Image, changes: list[str]) -> Image.Image:
    """The image as EXIF says that it is to be seen."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    changes.append("images were turned as EXIF says")
    return ImageOps.exif_transpose(image)


_RGB_COUNTERPARTS = ("P", "CMYK", "YCbCr", "LAB", "HSV")
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


def _converted(
    image: Image.Image, img_channels: int | None, background: str, changes: list[str]
) -> Image.Image:
    """The image in a mode to train on; what was not asked for is added to `changes`."""
    transparent = "transparency" in image.info or image.mode in _WITH_ALPHA
    if img_channels is None and transparent and image.mode != "RGBA":
        raise DataError(
            f"has mode {image.mode} with transparency: say with --img-channels 1, 3 or 4 what to "
            "make of it"
        )
    # A PGM of 16 bits has mode "I" in Pillow, its values always scaled to 0..65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        changes.append("16 bits a pixel became 8")
        image = _with_eight_bits(image)
    if image.mode in ("I", "F"):
        raise DataError(
            f"has mode {image.mode}, 32 bits a pixel whose range is not known: save it with 8 or "
            "16 bits a pixel, or as .npy to train on arrays of floats"
        )
    if transparent and img_channels in (1, 3):
        changes.append(f"transparency was composited on {background}")
        below = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")
    elif image.mode == "1":
        changes.append("one bit a pixel became 8-bit gray")
        image = image.convert("L")
    elif image.mode in _RGB_COUNTERPARTS and not transparent:
        changes.append(f"mode {image.mode} became RGB")
        image = image.convert("RGB")
    if img_channels is not None and image.mode != _MODES[img_channels]:
        image = image.convert(_MODES[img_channels])
        # Pillow keeps a palette's transparent colour in `info`, and would write it into the PNG.
        image.info.pop("transparency", None)
    if image.mode not in CHANNELS:
        raise DataError(
            f"has mode {image.mode}; expected gray, RGB or RGBA: say with --img-channels 1, 3 or 4 "
            "what to make of it"
        )
    return image


def _with_eight_bits(image: Image.Image) -> Image.Image:
    """A gray image of 16 bits a pixel with 8, rounded; with alpha if it has a transparent value."""
    # In 32 bits: Pillow's own conversions clip at 255 instead of scaling.
    wide = np.asarray(image).astype(np.uint32)
    gray = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    transparent: int | None = image.info.get("transparency")
    if transparent is None:
        return gray
    # Compared with all 16 bits: several values become the same one of 8, and only one is invisible.
    alpha = np.where(wide == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (gray, Image.fromarray(alpha)))


def _chw(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def _opened(data: bytes) -> ImageFile.ImageFile:
    try:
        return Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"is too large: {_first_line(error)}") from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = "it is empty" if not data else _first_line(error).partition(" <_io.")[0]
        raise DataError(f"is not an image: {reason}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
