"""Arrays of floats are what numpy.load says they are, or refused; mapped to [-1, 1] and back."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ganscale.data.arrays import decode_npy, encode_npy, normalised_npy
from ganscale.data.values import PIXELS, ValueRange
from ganscale.errors import DataError

SHAPE = (1, 16, 16)
Floats = NDArray[np.floating[Any]]


def saved(array: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def noise(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(-40, 15, shape)


def claiming(shape: tuple[int, ...]) -> bytes:
    """A header and no values."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(16, 16), (1, 16, 16), (3, 16, 16), (4, 16, 16)])
def test_any_array_of_floats_is_read_as_numpy_reads_it(
    dtype: str, order: Any, shape: tuple[int, ...]
) -> None:
    data = saved(np.asarray(noise(shape), dtype=dtype, order=order))
    expected = np.load(io.BytesIO(data)).astype(np.float32).reshape(-1, 16, 16)
    found, as_stored = decode_npy(data, expected.shape), normalised_npy(data)
    stored, normalised = as_stored.data, as_stored.values
    assert found.dtype == normalised.dtype == np.float32
    assert np.array_equal(found, expected)
    assert np.array_equal(normalised, expected)
    assert np.load(io.BytesIO(stored)).dtype == np.dtype("<f4")
    assert np.array_equal(np.load(io.BytesIO(stored)).reshape(expected.shape), expected)
    as_it_was = dtype == "<f4" and order == "C"
    assert (stored == data) == as_it_was


def test_what_is_written_is_what_numpy_writes() -> None:
    array = noise().astype(np.float32)
    assert encode_npy(array) == saved(array)


NAN, INFINITE, LARGE = (noise() for _ in range(3))
NAN[0, 3, 5], INFINITE[0, 0, 1], LARGE[0, 2, 2] = np.nan, -np.inf, 1e39
REFUSED = {
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not an npy file"),
    "empty": (b"", "is not an npy file"),
    "half a header": (saved(noise())[:40], "is not an npy file"),
    "a header of nonsense": (b"\x93NUMPY\x01\x00\x04\x00oops", "is not an npy file"),
    "format 3": (b"\x93NUMPY\x03\x00" + bytes(100), r"format 3\.0"),
    "pickle": (saved(np.array([[{}]]), allow_pickle=True), "has values of type object"),
    "integers": (saved(np.zeros((16, 16), np.int16)), "has values of type int16; expected floats"),
    "complex": (saved(noise().astype(complex)), "has values of type complex128"),
    "truncated": (saved(noise())[:-1], r"claims shape \(1, 16, 16\) of float64, 2048 .* 2047"),
    "more": (saved(noise()) + b"x", "2048 bytes, and has 2049"),
    "huge": (claiming((1, 2**40, 2**40)), r"claims shape .* bytes, and has 0"),
    "negative": (claiming((-16, -16)), r"has shape \(-16, -16\)"),
    "no rows": (claiming((0, 16)), r"has shape \(0, 16\)"),
    "a line": (saved(noise((256,))), r"has shape \(256,\)"),
    "two channels": (saved(noise((2, 16, 16))), "with 1, 3 or 4 channels"),
    "channels last": (saved(noise((16, 16, 1))), r"has shape \(16, 16, 1\)"),
    "four axes": (saved(noise((1, 1, 16, 16))), r"has shape \(1, 1, 16, 16\)"),
    "nan": (saved(NAN), r"1 values that are no finite float32, the first at \(0, 3, 5\): nan"),
    "infinite": (saved(INFINITE), r"at \(0, 0, 1\): -inf"),
    "beyond float32": (saved(LARGE), r"at \(0, 2, 2\): 1e\+39"),
}


@pytest.mark.parametrize(("data", "words"), REFUSED.values(), ids=[*REFUSED])
def test_what_cannot_be_trained_on_is_refused(data: bytes, words: str) -> None:
    for read in (lambda: decode_npy(data, SHAPE), lambda: normalised_npy(data, resolution=8)):
        with pytest.raises(DataError, match=words) as error:
            read()
        assert "\n" not in str(error.value)


def test_another_shape_than_the_expected_is_refused() -> None:
    with pytest.raises(DataError, match=r"has \(channels, height, width\) \(1, 16, 8\), expected"):
        decode_npy(saved(noise((16, 8))), SHAPE)
    with pytest.raises(DataError, match="--img-channels converts images, not arrays"):
        normalised_npy(saved(noise()), img_channels=3)


def test_resizing_cuts_out_the_centre_and_keeps_means() -> None:
    """Columns 16 to 48 of 64 are the centre; a slope is halved to its pairs' means inside."""
    rows, columns = np.mgrid[0:32, 0:64]
    smooth = (0.5 * columns - 3 * rows - 100).astype(np.float32)
    normalised = normalised_npy(saved(smooth), resolution=16)
    data, found = normalised.data, normalised.values
    expected = smooth[:, 16:48].reshape(16, 2, 16, 2).mean((1, 3))
    assert found.shape == (1, 16, 16)
    np.testing.assert_allclose(found[0, 3:-3, 3:-3], expected[3:-3, 3:-3], atol=1e-3)
    assert np.array_equal(np.load(io.BytesIO(data)), found)


def test_pixels_are_mapped_as_they_always_were() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    images = PIXELS.to_network(pixels)
    assert torch.equal(images, pixels.float() / 127.5 - 1)
    assert torch.equal(PIXELS.from_network(images), pixels)
    beyond = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert PIXELS.from_network(beyond).tolist() == [0, 0, 128, 255, 255]
    assert PIXELS.to_json() is None
    assert ValueRange.parse(None) == PIXELS


@pytest.mark.parametrize(
    ("low", "high"), [(-80.0, 0.0), (0.25, 0.5), (-3e37, 1e37), (1e-30, 2e-30)]
)
def test_a_range_is_mapped_to_one_and_back(low: float, high: float) -> None:
    values = ValueRange("float32", low, high)
    wide = np.linspace(low, high, 101)
    stored = torch.from_numpy(wide.astype(np.float32))
    images = values.to_network(stored)
    expected = 2 * (wide - low) / (high - low) - 1
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)
    assert images[0] == -1
    back = values.from_network(images)
    assert back.dtype == torch.float32
    np.testing.assert_allclose(back.numpy(), wide, atol=1e-6 * (high - low))
    assert ValueRange.parse(values.to_json()) == values


def test_outliers_are_clipped_both_ways() -> None:
    values = ValueRange("float32", -80, 0)
    stored = torch.tensor([-500.0, -80, -40, 0, 3])
    assert values.to_network(stored).tolist() == [-1, -1, 0, 1, 1]
    images = torch.tensor([-7.0, -1, 0, 1, 1.5], dtype=torch.float16)
    assert values.from_network(images).tolist() == [-80, -80, -40, 0, 0]


@pytest.mark.parametrize(
    ("low", "high"),
    [(1, 1), (2, 1), (float("nan"), 1), (0, float("inf")), (-3e38, 3e38), (0, 1e-44)],
)
def test_a_range_without_a_width_for_float32_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="a range from"):
        ValueRange("float32", low, high)
