"""Arrays of floats in npy files and back, strictly: what is not the expected array is an error.

The header is looked at before anything else, so a few bytes that claim to be a huge array cost
nothing, and no pickle is ever loaded. Arrays are float32, (C, H, W), C = 1, 3 or 4 as in images.
"""

from __future__ import annotations

import io
from math import prod
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ganscale.data.images import CHANNELS, Fit, Normalised
from ganscale.errors import DataError

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def decode_npy(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """The array (C, H, W) of an npy file; (H, W) has one channel.

    Raises `DataError` if it is not readable, has another shape than `shape`, or values that are not
    finite; the caller puts the array's name before the message.
    """
    array = _as_float32(_opened(data))
    if array.shape != shape:
        raise DataError(f"has (channels, height, width) {array.shape}, expected {shape}")
    return array


def normalised_npy(
    data: bytes,
    *,
    resolution: int | None = None,
    img_channels: int | None = None,
    background: str = "white",
    fit: Fit = "crop",
) -> Normalised:
    """An array of floats as an npy file of float32 to train on, and its values.

    Args:
        data: an npy file of shape (H, W) or (C, H, W); passed on as it is if nothing is to change.
        resolution: side; the shorter side is resized to it with anti-aliasing and the centre is cut
            out. None leaves the size alone.
        img_channels: what the array must have; channels of arrays are not converted.
        background: of no use to arrays, which have no transparency.
        fit: "crop"; arrays have no value that stands for nothing, so they are not padded.

    Raises:
        DataError: not readable, of another type or shape, or with values that are not finite.
    """
    stored = _opened(data)
    array = _as_float32(stored)
    channels, height, width = array.shape
    if img_channels not in (None, channels):
        raise DataError(
            f"is an array of {channels} channels; --img-channels converts images, not arrays"
        )
    if fit == "pad":
        raise DataError("is an array of floats; --fit pad is for images")
    if resolution is not None and (height, width) != (resolution, resolution):
        array = _fitted(array, resolution)
    # Byte for byte, if that is possible: the same input gives the same shards, whatever numpy
    # writes.
    elif stored.dtype == np.dtype("<f4") and stored.flags.c_contiguous:
        return Normalised(data, array)
    return Normalised(encode_npy(array), array)


def encode_npy(array: NDArray[np.float32]) -> bytes:
    """An npy file of little-endian float32."""
    buffer = io.BytesIO()
    npy.write_array(buffer, np.ascontiguousarray(array, "<f4"), (1, 0), allow_pickle=False)
    return buffer.getvalue()


def _opened(data: bytes) -> NDArray[np.floating[Any]]:
    """The array as it is stored, not copied; (H, W) or (C, H, W), of any floating type."""
    file = io.BytesIO(data)
    # By numpy's readers of headers, not by np.load: that one allocates what the header claims, and
    # reads pickles if it is allowed to.
    try:
        version = npy.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"format {version[0]}.{version[1]} is not one of arrays of numbers")
        shape, by_columns, dtype = _HEADERS[version](file)
    except ValueError as error:
        raise DataError(f"is not an npy file: {str(error).partition(chr(10))[0]}") from None
    if dtype.kind != "f":
        raise DataError(f"has values of type {dtype}; expected floats: convert them first")
    is_trainable = len(shape) == 2 or len(shape) == 3 and shape[0] in CHANNELS.values()
    if not is_trainable or min(shape) < 1:
        raise DataError(
            f"has shape {shape}; expected (height, width) or (channels, height, width) with "
            "1, 3 or 4 channels"
        )
    start = file.tell()
    if len(data) - start != dtype.itemsize * prod(shape):
        raise DataError(
            f"claims shape {shape} of {dtype}, {dtype.itemsize * prod(shape)} bytes, and has "
            f"{len(data) - start}"
        )
    flat = np.frombuffer(data, dtype, offset=start)
    return flat.reshape(shape, order="F" if by_columns else "C")


def _as_float32(stored: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and an error
        array = stored.astype(np.float32, order="C", copy=False)
    finite = np.isfinite(array)
    if not finite.all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise DataError(
            f"has {np.count_nonzero(~finite)} values that are no finite float32, the first at "
            f"{place}: {stored[place]}"
        )
    return array if array.ndim == 3 else array[None]


def _fitted(array: NDArray[np.float32], resolution: int) -> NDArray[np.float32]:
    size = (resolution, resolution)
    method = Image.Resampling.LANCZOS
    # A plane at a time, as Pillow has images of floats with one channel only.
    planes = [ImageOps.fit(Image.fromarray(plane), size, method=method) for plane in array]
    return np.stack([np.asarray(plane, dtype=np.float32) for plane in planes])
