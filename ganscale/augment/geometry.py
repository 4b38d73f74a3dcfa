"""Moving pixels: exactly where a move is whole, between two lowpass filters where it is not.

Whole moves (mirror, quarter turns, whole shifts) are one gather and change no value. The others
follow Karras et al. (2020, arXiv 2006.06676, appendix B): upsample by 2 with the orthogonal sym6
lowpass, sample bilinearly at the transformed points, downsample with the same filter. Orthogonality
makes the two filters undo each other, so a move by nothing is the identity to rounding, borders
included. Borders are reflected at the border pixels' centres, without limit and without padding.

The filters are dense matrices, one product per axis: plain, twice differentiable and fast up to
some 256 pixels; the cost per pixel grows with the resolution. Bilinear sampling is four gathers,
because `grid_sample` has no second derivative.

Images are square, (n, C, R, R) with R >= 2, in fp32 or float64. Axes are (down, right) and angles
turn counter-clockwise, as `torch.rot90` does. Everything is linear in the images.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ganscale.augment.gather import gather_pixels

SYM6 = (
    0.015404109327044824,
    0.0034907120842221625,
    -0.11799011114852003,
    -0.048311742585698055,
    0.49105594192797373,
    0.787641141028651,
    0.33792942172816583,
    -0.07263752278637658,
    -0.021060292512370848,
    0.044724901770781385,
    0.0017677118642540077,
    -0.007800708325032380,
)
"""The lowpass with six vanishing moments and 12 taps whose phase is the closest to linear."""

DELAY = sum(tap * weight for tap, weight in enumerate(SYM6)) / math.sqrt(2)
"""The filter's centre of mass: fine sample m lies at (m - DELAY) / 2 pixels."""

MARGIN = 5
"""How many pixels the filter reaches over each border."""


def reflect(place: Tensor, resolution: int) -> Tensor:
    """Fold places, whole or not, into [0, resolution - 1] by mirroring at both ends."""
    period = 2 * (resolution - 1)
    place = place.remainder(period)
    return torch.minimum(place, period - place)


def _take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels (n, C, A, B) of images (n, C, H, W) at places broadcastable to (n, A, B)."""
    places = rows * images.shape[-1] + columns
    taken: Tensor = gather_pixels(images.flatten(2), places.flatten(1))
    result: Tensor = taken.unflatten(2, places.shape[1:])
    return result


def move_whole_pixels(images: Tensor, mirror: Tensor, quarters: Tensor, shift: Tensor) -> Tensor:
    """Mirror left to right, then turn by quarters, then shift; borders are reflected.

    `mirror` is (n,) bool, `quarters` (n,) int64 in 0..3, `shift` (n, 2) int64 in pixels.
    """
    resolution = images.shape[-1]
    last = resolution - 1
    place = torch.arange(resolution, device=images.device)
    down, right = shift[:, :, None, None].unbind(1)
    # From each pixel of the result back to where it comes from: what was done last, the shift, is
    # undone first. Twice the distance from the centre is whole at every resolution.
    y = 2 * (place[:, None] - down) - last
    x = 2 * (place[None, :] - right) - last
    # Rotations by quarters with whole sines and cosines; nothing is rounded.
    quarters = quarters[:, None, None]
    cos = (quarters == 0).long() - (quarters == 2).long()
    sin = (quarters == 1).long() - (quarters == 3).long()
    y, x = cos * y + sin * x, cos * x - sin * y
    x = torch.where(mirror[:, None, None], -x, x)
    return _take(images, reflect((y + last) // 2, resolution), reflect((x + last) // 2, resolution))


def shift_into_zeros(images: Tensor, shift: Tensor) -> Tensor:
    """Shift by whole pixels, (n, 2) int64; what comes in from outside is 0."""
    resolution = images.shape[-1]
    place = torch.arange(resolution, device=images.device)
    down, right = shift[:, :, None, None].unbind(1)
    y, x = place[:, None] - down, place[None, :] - right
    inside = (y >= 0) & (y < resolution) & (x >= 0) & (x < resolution)
    # Clamped, so that the gather stays inside; what it takes there is replaced below.
    moved = _take(images, y.clamp(0, resolution - 1), x.clamp(0, resolution - 1))
    return torch.where(inside.unsqueeze(1), moved, 0.0)


def cut_out(images: Tensor, centre: Tensor, executed: Tensor) -> Tensor:
    """Set to 0 the pixels whose centres are less than a quarter side from `centre` on both axes.

    `centre` is (n, 2) in sides, within [0, 1]; `executed` is (n,) bool.
    """
    resolution = images.shape[-1]
    place = (torch.arange(resolution, device=images.device) + 0.5) / resolution
    near = (place - centre.unsqueeze(2)).abs() < 0.25  # (n, 2, R)
    hole = near[:, 0, :, None] & near[:, 1, None, :] & executed[:, None, None]
    # 0 is mid-gray in [-1, 1].
    return torch.where(hole.unsqueeze(1), 0.0, images)


def inverse_motion(
    scale: Tensor, before: Tensor, stretch: Tensor, after: Tensor, shift: Tensor
) -> Tensor:
    """Return (n, 2, 3): where a place (y, x, 1) of the result lies in the image.

    The image is magnified by `scale`, turned by the angle `before`, stretched to the right by
    `stretch` and down by 1 / `stretch`, turned by `after`, shifted by `shift` pixels, (n, 2).
    Neutral parameters give exactly the identity.
    """
    zero = torch.zeros_like(scale)
    # The inverse of a product: the inverses in the opposite order. Magnifying commutes with all but
    # the shift, so it is undone together with the stretch.
    undo_stretch = _matrix(stretch / scale, zero, zero, 1 / (stretch * scale))
    linear = _product(_product(_rotation(before), undo_stretch), _rotation(after))
    return torch.cat((linear, _product(linear, -shift.unsqueeze(2))), 2)


def _rotation(angle: Tensor) -> Tensor:
    return _matrix(angle.cos(), angle.sin(), -angle.sin(), angle.cos())


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.stack((a, b, c, d), 1).reshape(-1, 2, 2)


def _product(left: Tensor, right: Tensor) -> Tensor:
    # Not `@`, whose precision is the user's choice (TF32): coordinates need all of fp32.
    return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)


def resample(images: Tensor, inverse: Tensor) -> Tensor:
    """Move continuously: the result at (y, x) is the image at `inverse` (n, 2, 3) times (y, x, 1).

    Places are pixels from the image's centre. An image whose matrix is the identity is returned
    bit for bit.
    """
    resolution = images.shape[-1]
    centre = (resolution - 1) / 2
    up, down = _filters(resolution, images.dtype, images.device)
    fine = torch.arange(len(up), device=images.device, dtype=images.dtype)
    # Coordinates of the fine grid in pixels from the centre. The result is computed there and then
    # brought down, so the second filter removes what the move has put beyond its resolution.
    place = (fine - DELAY) / 2 - centre
    entries = inverse[:, :, :, None, None].unbind(2)
    source = entries[0] * place[:, None] + entries[1] * place[None, :] + entries[2]
    y, x = _fine_index(source + centre, resolution).unbind(1)
    moved = _on_both_axes(_bilinear(_on_both_axes(images, up), y, x), down)
    # The two filters undo each other to rounding only; images that stay take no part in that.
    identity = torch.eye(2, 3, device=images.device, dtype=images.dtype)
    changed = (inverse != identity).flatten(1).any(1)
    return torch.where(changed[:, None, None, None], moved, images)


def _fine_index(place: Tensor, resolution: int) -> Tensor:
    """Places in pixels as indices of fine samples; beyond the last of those, reflected."""
    end = 2 * (resolution + MARGIN) - 1
    index = 2 * place + DELAY
    # Half a sample of tolerance, or rounding would take the outermost samples for outside.
    inside = (index > -0.5) & (index < end + 0.5)
    return torch.where(inside, index.clamp(0, end), 2 * reflect(place, resolution) + DELAY)


def _bilinear(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Pixels (n, C, A, B) of images (n, C, H, W), interpolated at indices (n, A, B) inside."""
    # At the last row the fraction becomes 1 instead, so row + 1 is always inside.
    row = y.floor().clamp(max=images.shape[-2] - 2)
    column = x.floor().clamp(max=images.shape[-1] - 2)
    right, low = (x - column).unsqueeze(1), (y - row).unsqueeze(1)
    row, column = row.long(), column.long()
    above = torch.lerp(_take(images, row, column), _take(images, row, column + 1), right)
    row = row + 1
    below = torch.lerp(_take(images, row, column), _take(images, row, column + 1), right)
    return torch.lerp(above, below, low)


def _on_both_axes(images: Tensor, matrix: Tensor) -> Tensor:
    """Multiply rows and columns, (n, C, R, R), by a matrix (S, R): (n, C, S, S)."""
    return ((images @ matrix.T).mT @ matrix.T).mT


@functools.lru_cache(maxsize=16)
def _filters(resolution: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the matrices that upsample (F, R) and downsample (R, F), F = 2 (R + MARGIN).

    Upsampled, x is y[m] = sqrt(2) sum_i h[m - 2 i] x[i], with x reflected at its borders; the
    way down is its adjoint, x[j] = sum_k h[k] y[2 j + k] / sqrt(2).
    """
    # The first call may come from a block of inference mode, whose tensors no later backward could
    # save.
    with torch.inference_mode(False), torch.no_grad():
        # The matrices are banded Toeplitz in the pixels with margin; folding the margin back onto
        # the image by `mirrored` builds the reflection at the border in.
        pixels = torch.arange(-MARGIN, resolution + MARGIN)
        fine = torch.arange(2 * (resolution + MARGIN))
        tap = fine[:, None] - 2 * pixels
        taps = torch.tensor(SYM6, dtype=torch.float64)
        band = torch.where((tap >= 0) & (tap < len(SYM6)), taps[tap.clamp(0, len(SYM6) - 1)], 0.0)
        mirrored = reflect(pixels, resolution)[:, None] == torch.arange(resolution)
        up = math.sqrt(2) * band @ mirrored.double()
        down = band[:, MARGIN : MARGIN + resolution].T / math.sqrt(2)
        return up.to(device, dtype, non_blocking=True), down.to(device, dtype, non_blocking=True)
