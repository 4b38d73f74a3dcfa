"""Pixels are Pillow's, whatever decodes them; what is not the expected image is an error."""

from __future__ import annotations

import io
import os
import random
import struct
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ganscale.data.images import CHANNELS, decode, normalised_pixels
from ganscale.data.images import normalised_png as normalised_image
from ganscale.errors import DataError

Pixels = NDArray[np.uint8]
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def noise(channels: int, height: int = 16, width: int = 16, seed: int = 0) -> Pixels:
    rng = np.random.default_rng([channels, height, width, seed])
    return rng.integers(0, 256, (channels, height, width), dtype=np.uint8)


def image_of(pixels: Pixels) -> Image.Image:
    """An L, RGB or RGBA image of (C, H, W)."""
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0).squeeze()))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def by_pillow(data: bytes, mode: str | None = None) -> Pixels:
    """What Pillow makes of an image, (C, H, W)."""
    with Image.open(io.BytesIO(data)) as image:
        array = np.asarray(image.convert(mode or image.mode))
    return array.reshape(*array.shape[:2], -1).transpose(2, 0, 1)


def normalised_png(data: bytes, **options: Any) -> tuple[bytes, Pixels]:
    """The PNG and its pixels."""
    normalised = normalised_image(data, **options)
    return normalised.data, normalised.values


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, colour: int, stream: bytes, bits: int = 8) -> bytes:
    """A PNG put together by hand."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def zeros_deflated(count: int) -> bytes:
    """A valid zlib stream of many zeros, made in no time: one flushed block again and again."""
    block = 2**20
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = compressor.compress(bytes(block)) + compressor.flush(zlib.Z_FULL_FLUSH)
    last = zlib.compressobj(9, zlib.DEFLATED, -15)
    rest = last.compress(bytes(count % block)) + last.flush()
    adler = (count % 65521) << 16 | 1
    return b"\x78\xda" + first * (count // block) + rest + struct.pack(">I", adler)


def refusal(data: bytes, shape: tuple[int, int, int]) -> str:
    with pytest.raises(DataError) as error:
        decode(data, shape)
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_a_png_decodes_to_the_pixels_it_was_made_of(channels: int, seed: int) -> None:
    pixels = noise(channels, 16, 24, seed)
    data = encoded(image_of(pixels))
    found = decode(data, (channels, 16, 24))
    assert found.dtype == np.uint8
    assert np.array_equal(found, pixels)
    assert np.array_equal(found, by_pillow(data))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_decodes_as_in_pillow_and_close_to_the_picture(channels: int) -> None:
    ramp = np.linspace(20, 230, 32)
    picture = np.broadcast_to(ramp[None, :, None], (channels, 32, 32)) * 0.5 + ramp / 2
    pixels = picture.astype(np.uint8)
    data = encoded(image_of(pixels), "JPEG", quality=95)
    found = decode(data, (channels, 32, 32))
    assert np.array_equal(found, by_pillow(data))
    assert np.abs(found.astype(int) - pixels).max() <= 4


@pytest.mark.parametrize("kind", ["WEBP", "BMP"])
def test_lossless_webp_and_bmp_decode_exactly(kind: str) -> None:
    pixels = noise(3)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(encoded(image_of(pixels), kind, **options), (3, 16, 16)), pixels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("shape", [(3, 16, 32), (3, 32, 16), (3, 8, 8), (1, 16, 16), (4, 16, 16)])
def test_another_shape_than_the_expected_one_is_refused(
    kind: str, shape: tuple[int, int, int]
) -> None:
    message = refusal(encoded(image_of(noise(3)), kind), shape)
    assert "16x16" in message
    assert f"{shape[2]}x{shape[1]}" in message


@pytest.mark.parametrize(("mode", "channels"), [("P", 1), ("1", 3), ("LA", 4), ("I;16", 3)])
def test_a_mode_that_becomes_another_than_the_expected_one_is_refused(
    mode: str, channels: int
) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    else:
        image = image_of(noise(3)).convert(mode)
    assert image.mode == mode
    assert f"mode {mode}" in refusal(encoded(image), (channels, 16, 16))


@pytest.mark.parametrize("data", [b"", b"\x89PNG", b"GARBAGE" * 100, bytes(5000)])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    assert "not an image" in refusal(data, (3, 16, 16))


def outcome(work: Callable[[], Pixels]) -> Pixels | None:
    """The pixels, or None where a `DataError` of one line is raised; anything else is raised."""
    try:
        return work()
    except DataError as error:
        if "\n" in str(error):
            raise AssertionError("a message of several lines") from error
        return None


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_truncated_image_never_gives_other_pixels(kind: str) -> None:
    data = encoded(image_of(noise(3)), kind)
    whole = decode(data, (3, 16, 16))
    refused = 0
    for length in range(0, len(data), 7):
        found = outcome(lambda: decode(data[:length], (3, 16, 16)))  # noqa: B023
        assert found is None or np.array_equal(found, whole), f"cut at {length}"
        refused += found is None
    assert refused * 7 >= len(data) - 40, "only what follows the pixels may be missing"


def damaged_copies(data: bytes, count: int) -> Iterator[bytes]:
    rng = random.Random(len(data))
    for _ in range(count):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(rng.choice([40, len(damaged)]))] = rng.randrange(256)
        yield bytes(damaged)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_random_damage_is_a_data_error_or_an_image(kind: str) -> None:
    def png_and_pixels(data: bytes) -> Pixels:
        png, pixels = normalised_png(data, resolution=8, img_channels=3)
        assert np.array_equal(by_pillow(png), pixels)
        return pixels

    for damaged in damaged_copies(encoded(image_of(noise(3)), kind), 60):
        outcome(lambda: png_and_pixels(damaged))  # noqa: B023
        if kind != "PNG":  # in a process of its own below
            outcome(lambda: decode(damaged, (3, 16, 16)))  # noqa: B023


def exit_code_of(work: Callable[[], object]) -> int:
    """The exit code of a copy of this process that works: 0, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def repaired(png: bytes) -> bytes:
    """The chunks of a PNG with checksums that are right."""
    found, at = png[:8], 8
    while at < len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        found += chunk(png[at + 4 : at + 8], png[at + 8 : end])
        at = end + 4
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads
@pytest.mark.parametrize("with_right_checksums", [False, True])
def test_a_flipped_bit_in_a_pngs_pixels_is_an_error_and_no_crash(
    with_right_checksums: bool,
) -> None:
    """torchvision 0.29's decoder ends the process with a segmentation fault."""
    whole = encoded(image_of(noise(3)))
    for place in (2, 20, 100, 400):
        data = bytearray(whole)
        data[whole.index(b"IDAT") + 4 + place] ^= 4
        damaged = repaired(bytes(data)) if with_right_checksums else bytes(data)
        with pytest.raises(OSError, match=r"broken|truncated|damaged|error"):
            by_pillow(damaged)
        code = exit_code_of(lambda: refusal(damaged, (3, 16, 16)))  # noqa: B023
        assert code == 0, f"bit flipped in byte {place} of the pixels"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_random_damage_to_a_png_crashes_nothing() -> None:
    def decode_all() -> None:
        for damaged in damaged_copies(encoded(image_of(noise(3))), 100):
            outcome(lambda: decode(damaged, (3, 16, 16)))  # noqa: B023

    assert exit_code_of(decode_all) == 0


def png_with_pixels_in(*idats: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(idats) + chunk(b"IEND", b"")


def with_wrong_crc(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


STREAM = zlib.compress(b"".join(b"\0" + row.tobytes() for row in noise(3).transpose(1, 2, 0)))
LENIENT = {
    "as it should be": png_with_pixels_in(chunk(b"IDAT", STREAM)),
    "no checksum after the pixels": png_with_pixels_in(chunk(b"IDAT", STREAM[:-4])),
    "wrong CRC of the pixels": png_with_pixels_in(with_wrong_crc(chunk(b"IDAT", STREAM))),
    "wrong CRC of the first part": png_with_pixels_in(
        with_wrong_crc(chunk(b"IDAT", STREAM[:300])), chunk(b"IDAT", STREAM[300:])
    ),
    "bytes behind the pixels": png_with_pixels_in(chunk(b"IDAT", STREAM + b"more")),
    "unknown critical chunk": png_with_pixels_in(chunk(b"IDAT", STREAM), chunk(b"ABCD", b"")),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads
@pytest.mark.parametrize("data", LENIENT.values(), ids=LENIENT.keys())
def test_a_png_that_may_be_trained_on_decodes_to_the_same_pixels(data: bytes) -> None:
    """What Pillow reads leniently must not be passed into the shards to end the training."""
    try:
        png, pixels = normalised_png(data)
    except DataError:
        return
    assert np.array_equal(pixels, noise(3))

    def check() -> None:
        assert np.array_equal(decode(png, (3, 16, 16)), pixels)

    assert exit_code_of(check) == 0


HUGE = {
    "a few bytes that claim to be huge": png_of(20_000, 20_000, 2, zlib.compress(bytes(100))),
    "the largest size of a PNG": png_of(2**31 - 1, 2**31 - 1, 2, zlib.compress(bytes(100))),
    "truly huge, of one bit": png_of(
        20_000, 20_000, 0, zeros_deflated(20_000 * (1 + 20_000 // 8)), bits=1
    ),
    "truly huge, of one byte": png_of(20_000, 20_000, 0, zeros_deflated(20_000 * 20_001)),
}


@pytest.mark.parametrize("data", HUGE.values(), ids=HUGE.keys())
def test_a_huge_image_is_refused_before_it_costs_anything(data: bytes) -> None:
    assert len(data) < 500_000
    tracemalloc.start()
    start = time.process_time()
    refusal(data, (3, 16, 16))
    with pytest.raises(DataError, match=r"too large|claims"):
        normalised_png(data)
    with pytest.raises(DataError, match=r"too large|claims"):
        normalised_png(data, resolution=16, img_channels=3)
    seconds = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 2**23


def test_the_hand_made_png_is_one_that_pillow_reads() -> None:
    data = png_of(3000, 1000, 0, zeros_deflated(1000 * 3001))
    assert np.array_equal(by_pillow(data), np.zeros((1, 1000, 3000)))
    assert not normalised_png(data)[1].any()


@pytest.mark.parametrize("side", [8193, 9400, 9600])
def test_one_limit_holds_whatever_pillow_warns_of(side: int) -> None:
    """Pillow warns above 89 million pixels and refuses above 179 million; 2**26 is ours."""
    data = png_of(side, side, 0, b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=f"{side}x{side}|too large"):
            normalised_png(data, resolution=16)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("requested", [True, False])
def test_a_png_of_the_right_kind_passes_byte_for_byte(channels: int, requested: bool) -> None:
    data = encoded(image_of(noise(channels)), compress_level=1)
    png, pixels = normalised_png(
        data, resolution=16 if requested else None, img_channels=channels if requested else None
    )
    assert png == data
    assert np.array_equal(pixels, noise(channels))


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "WEBP"])
def test_other_formats_become_pngs_of_the_same_pixels(kind: str) -> None:
    data = encoded(image_of(noise(3)), kind)
    png, pixels = normalised_png(data)
    assert png.startswith(b"\x89PNG")
    assert np.array_equal(pixels, by_pillow(data))
    assert np.array_equal(by_pillow(png), pixels)
    assert np.array_equal(decode(png, (3, 16, 16)), pixels)


def test_pixels_alone_are_those_of_the_png_and_cost_no_png(monkeypatch: pytest.MonkeyPatch) -> None:
    images = {kind: encoded(image_of(noise(3)), kind) for kind in ("PNG", "JPEG", "WEBP")}
    images["palette"] = encoded(image_of(noise(3)).convert("P"))
    expected = {kind: normalised_image(data).values for kind, data in images.items()}

    def save(*_: Any, **__: Any) -> None:
        raise AssertionError("encoded what nobody asked for")

    monkeypatch.setattr(Image.Image, "save", save)
    for kind, data in images.items():
        assert np.array_equal(normalised_pixels(data), expected[kind])


def test_no_colour_profile_is_carried_into_every_png() -> None:
    data = encoded(image_of(noise(1)), "JPEG", icc_profile=random.Random(0).randbytes(3000))
    png, _ = normalised_png(data)
    assert b"iCCP" not in png
    assert len(png) < 1000


@pytest.mark.parametrize("size", [(40, 40), (61, 40), (40, 61), (17, 90), (16, 33), (10, 7)])
def test_the_shorter_side_is_resized_and_the_centre_cut_out(size: tuple[int, int]) -> None:
    width, height = size
    smooth = image_of(noise(3, height, width)).filter(ImageFilter.GaussianBlur(2))
    _, pixels = normalised_png(encoded(smooth), resolution=16)
    side = min(size)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    expected = smooth.resize((16, 16), Image.Resampling.LANCZOS, box=box)
    assert np.abs(pixels.transpose(1, 2, 0).astype(int) - np.asarray(expected)).max() <= 1
    # And in another order: all of it to the shorter side first, then the cut. Pillow's filters are
    # the same along both ways but for the roundings and half a pixel of the cut.
    scale = 16 / side
    whole = smooth.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    x, y = (whole.width - 16) // 2, (whole.height - 16) // 2
    cut = np.asarray(whole.crop((x, y, x + 16, y + 16))).astype(int)
    assert np.abs(pixels.transpose(1, 2, 0) - cut).mean() < 12


def test_the_centre_is_what_remains() -> None:
    pixels = np.zeros((3, 32, 96), dtype=np.uint8)
    pixels[0, :, :32], pixels[1, :, 32:64], pixels[2, :, 64:] = 255, 255, 255
    _, found = normalised_png(encoded(image_of(pixels)), resolution=32)
    assert np.array_equal(found, pixels[:, :, 32:64])


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(40, 20, (0, 4, 16, 12)), (20, 40, (4, 0, 12, 16)), (64, 16, (0, 6, 16, 10))],
)
@pytest.mark.parametrize("background", ["white", "#804020"])
def test_with_borders_nothing_is_cut_off(
    width: int, height: int, box: tuple[int, int, int, int], background: str
) -> None:
    image = image_of(noise(3, height, width))
    _, pixels = normalised_png(encoded(image), resolution=16, fit="pad", background=background)
    left, top, right, bottom = box
    inside = np.asarray(image.resize((right - left, bottom - top), Image.Resampling.LANCZOS))
    assert np.array_equal(pixels[:, top:bottom, left:right].transpose(1, 2, 0), inside)
    colour = np.array(Image.new("RGB", (1, 1), background))[0, 0]
    outside = np.ones((16, 16), dtype=bool)
    outside[top:bottom, left:right] = False
    assert outside.any()
    assert (colour == pixels[:, outside].T).all()


def test_square_images_have_no_borders() -> None:
    data = encoded(image_of(noise(3, 20, 20)))
    _, padded = normalised_png(data, resolution=16, fit="pad")
    assert np.array_equal(padded, normalised_png(data, resolution=16)[1])


def test_shrinking_is_anti_aliased() -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[None]
    _, found = normalised_png(encoded(image_of(board)), resolution=16)
    inside = found[0, 2:-2, 2:-2].astype(int)
    assert np.abs(inside - 127.5).max() <= 2


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_resizing_keeps_the_kind_of_image(channels: int) -> None:
    flat = np.broadcast_to(np.arange(40, 40 + channels)[:, None, None], (channels, 20, 30))
    png, pixels = normalised_png(encoded(image_of(flat.astype(np.uint8))), resolution=8)
    assert pixels.shape == (channels, 8, 8)
    assert np.array_equal(by_pillow(png), pixels)
    assert np.abs(pixels.mean((1, 2)) - flat.mean((1, 2))).max() <= 3


def with_transparency(mode: str) -> bytes:
    image = image_of(noise(3)).convert(mode)
    colour: Any = (1, 2, 3) if mode == "RGB" else 5
    return encoded(image, transparency=colour)


TRANSPARENT = {
    "palette with a transparent colour": with_transparency("P"),
    "gray with a transparent colour": with_transparency("L"),
    "RGB with a transparent colour": with_transparency("RGB"),
    "gray with alpha": encoded(image_of(noise(4)).convert("LA")),
}
CONVERTED = {
    "palette": ("RGB", encoded(image_of(noise(3)).convert("P"))),
    "black and white": ("L", encoded(image_of(noise(1)).convert("1"))),
    "CMYK": ("RGB", encoded(image_of(noise(4)).convert("RGB").convert("CMYK"), "JPEG")),
}
ODD = TRANSPARENT | {name: data for name, (_, data) in CONVERTED.items()}


@pytest.mark.parametrize("data", TRANSPARENT.values(), ids=TRANSPARENT.keys())
def test_transparency_is_refused_until_told_what_to_become(data: bytes) -> None:
    with pytest.raises(DataError, match="transparency: say with --img-channels"):
        normalised_png(data)
    _, pixels = normalised_png(data, img_channels=4)
    assert np.array_equal(pixels, by_pillow(data, "RGBA"))


@pytest.mark.parametrize(("mode", "data"), CONVERTED.values(), ids=CONVERTED.keys())
def test_modes_with_one_counterpart_become_it_and_that_is_said(mode: str, data: bytes) -> None:
    normalised = normalised_image(data)
    assert np.array_equal(normalised.values, by_pillow(data, mode))
    assert len(normalised.changes) == 1
    assert np.array_equal(decode(data, normalised.values.shape), normalised.values)
    for channels, wanted in MODES.items():
        png, pixels = normalised_png(data, img_channels=channels)
        assert np.array_equal(
            pixels, by_pillow(encoded(Image.open(io.BytesIO(data)).convert(mode)), wanted)
        )
        assert np.array_equal(decode(png, (channels, 16, 16)), pixels)


@pytest.mark.parametrize(
    ("background", "colour"), [("white", 255), ("black", 0), ("#405060", None)]
)
def test_what_is_transparent_has_the_colour_of_the_background(
    background: str, colour: int | None
) -> None:
    """Invisible pixels may hide any colour, and half visible ones are mixed."""
    pixels = np.full((4, 16, 16), 200, np.uint8)
    pixels[3, :8], pixels[3, 8:] = 0, 51  # a fifth
    normalised = normalised_image(encoded(image_of(pixels)), img_channels=3, background=background)
    expected = [0x40, 0x50, 0x60] if colour is None else [colour] * 3
    for channel, below in enumerate(expected):
        assert (normalised.values[channel, :8] == below).all()
        mixed = round(below + (200 - below) / 5)
        assert abs(int(normalised.values[channel, 12, 0]) - mixed) <= 1
    assert normalised.changes == (f"transparency was composited on {background}",)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_are_upright_as_exif_says(orientation: int, kind: str) -> None:
    """The definition of EXIF 2.3, table 6: where the stored first row and column are seen."""
    upright = np.zeros((3, 16, 16), np.uint8)
    upright[0, :4], upright[2, :, 12:] = (
        250,
        120,
    )  # a red row at the top, a blue column at the right
    seen = upright.transpose(1, 2, 0)
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: np.rot90(seen, 1),
        7: np.rot90(seen, 2).transpose(1, 0, 2),
        8: np.rot90(seen, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    for pixels in (normalised_png(data)[1], decode(data, (3, 16, 16))):
        assert np.abs(pixels.astype(int) - upright).max() <= (8 if kind == "JPEG" else 0)


def test_a_moving_image_gives_its_first_frame_and_says_so() -> None:
    frames = [image_of(noise(3, seed=seed)) for seed in range(3)]
    data = encoded(frames[0], save_all=True, append_images=frames[1:])
    normalised = normalised_image(data)
    assert np.array_equal(normalised.values, noise(3))
    assert "later frames" in normalised.changes[0]


@pytest.mark.parametrize("data", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("resolution", [None, 8])
def test_what_was_made_alike_needs_no_further_change(
    data: bytes, channels: int, resolution: int | None
) -> None:
    png, pixels = normalised_png(data, resolution=resolution, img_channels=channels)
    again, same_pixels = normalised_png(png)
    assert again == png
    assert np.array_equal(same_pixels, pixels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("target", [1, 3, 4])
def test_gray_and_rgb_convert_on_request(channels: int, target: int) -> None:
    data = encoded(image_of(noise(channels)))
    png, pixels = normalised_png(data, img_channels=target)
    assert np.array_equal(pixels, by_pillow(data, MODES[target]))
    assert np.array_equal(by_pillow(png), pixels)
    if target == 4:
        assert (pixels[3] == 255).all()
    assert CHANNELS[MODES[target]] == target


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(kind: str) -> None:
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    normalised = normalised_image(encoded(Image.fromarray(deep), kind))
    assert np.array_equal(normalised.values[0], np.rint(deep / 257).astype(np.uint8))
    assert normalised.changes == ("16 bits a pixel became 8",)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_transparent_one_of_65536_grays_alone_is_invisible(channels: int) -> None:
    """Its neighbours become the same 8 bits, and stay visible."""
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    deep[4, :2] = (8000, 8001)
    data = encoded(Image.fromarray(deep), transparency=8000)
    pixels = normalised_image(data, img_channels=channels, background="#ffffff").values
    gray = np.rint(deep / 257).astype(np.uint8)
    visible = deep != 8000
    assert visible.sum() == 255
    if channels == 4:
        assert np.array_equal(pixels[3], visible * 255)
    expected = gray if channels == 4 else np.where(visible, gray, 255)
    assert (pixels[:3] == expected).all()


DEEP_COLOURS = {
    "RGB": (2, 3, [0, 1, 2]),
    "RGBA": (6, 4, [0, 1, 2, 3]),
    "gray": (4, 2, [0, 0, 0, 1]),
}


@pytest.mark.parametrize(("colour", "planes", "seen"), DEEP_COLOURS.values(), ids=DEEP_COLOURS)
def test_sixteen_bits_a_channel_keep_their_upper_bytes_and_are_counted(
    colour: int, planes: int, seen: list[int]
) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (16, 16, planes)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    normalised = normalised_image(png_of(16, 16, colour, zlib.compress(rows), bits=16))
    assert normalised.changes == ("16 bits a channel became 8",)
    assert np.array_equal(normalised.values, (deep >> 8).transpose(2, 0, 1)[seen])
    # Stored with 8 bits, so that readers of the shards need not convert it each time.
    stored_bits = normalised.data[24]
    assert stored_bits == 8
    assert np.array_equal(decode(normalised.data, normalised.values.shape), normalised.values)


@pytest.mark.parametrize("greatest", [65535, 4095])
def test_a_pgm_of_more_than_eight_bits_is_scaled_by_its_greatest_value(greatest: int) -> None:
    deep = np.linspace(0, greatest, 256).astype(">u2")
    data = f"P5 16 16 {greatest}\n".encode() + deep.tobytes()
    normalised = normalised_image(data)
    expected = np.rint(deep.astype(np.float64) * 255 / greatest).reshape(16, 16)
    assert np.array_equal(normalised.values[0], expected)
    assert normalised.changes == ("16 bits a pixel became 8",)


def test_floats_of_an_unknown_range_are_refused_with_what_to_do() -> None:
    data = encoded(Image.fromarray(np.zeros((16, 16), np.float32)), "TIFF")
    with pytest.raises(DataError, match="8 or 16 bits a pixel, or as .npy"):
        normalised_image(data, img_channels=3)


@pytest.mark.parametrize("data", [b"", b"GARBAGE" * 100, encoded(image_of(noise(3)))[:300]])
def test_an_image_that_cannot_be_read_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="not an image|cannot be decoded") as error:
        normalised_png(data, resolution=8, img_channels=3)
    assert "\n" not in str(error.value)
