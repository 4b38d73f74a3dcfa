"""Directions in latent space that change an image most, computed from the weights alone.

SeFa (Shen and Zhou 2021, arXiv 2007.06600): the first layer takes a latent x to A x + b, so a step
n of length 1 moves its output by A n, which is largest along eigenvectors of A^T A (equation 5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ganscale.errors import ConfigError
from ganscale.generation.latent_sampler import LatentSampler

# Latents by which the spread of w along a direction is measured.
_SPREAD_SEEDS = 256


@dataclass(frozen=True)
class Directions:
    """Directions with the largest effect first."""

    vectors: Tensor
    """(k, d), of length 1, the largest element of each positive; in w where there is one, or z."""
    eigenvalues: Tensor
    """(k,), of A^T A: the squared length of A n."""


def closed_form_directions(weight: Tensor, num: int) -> Directions:
    """The first `num` eigenvectors of A^T A for the matrix A = `weight`, (outputs, d).

    Raises `ConfigError` if d is less.
    """
    if not 1 <= num <= weight.shape[1]:
        raise ConfigError(f"{num} directions: expected 1 to {weight.shape[1]}")
    matrix = weight.double()
    # In float64, since forming A^T A squares the ratio of its singular values. `eigh` returns
    # eigenvalues in ascending order and vectors in columns.
    eigenvalues, vectors = torch.linalg.eigh(matrix.T @ matrix)
    largest = vectors.flip(1)[:, :num].T
    # An eigenvector's sign is arbitrary and differs between libraries.
    signs = largest.gather(1, largest.abs().argmax(1, keepdim=True)).sign()
    return Directions((largest * signs).to(weight), eigenvalues.flip(0)[:num].to(weight))


def first_weight(model: nn.Module, name: str, z_dim: int) -> Tensor:
    """The matrix A (outputs, z_dim) that a generator's latent, or w, meets first.

    Args:
        model: the generator.
        name: its architecture, of `MODELS`.
        z_dim: size of its latent; labels may come after it.
    """
    if name not in _WEIGHTS:
        raise ConfigError(f"no directions for {name!r}: expected one of {', '.join(_WEIGHTS)}")
    return _WEIGHTS[name](model, z_dim).detach().cpu()


def find_directions(sampler: LatentSampler, num: int) -> Directions:
    """The first `num` directions of a generator."""
    generator = sampler.generator
    name = generator.info["model"]["name"]
    return closed_form_directions(first_weight(generator.model, name, generator.z_dim), num)


def edit_images(
    sampler: LatentSampler,
    seed: int,
    vectors: Tensor,
    steps: Tensor,
    *,
    label: int | None = None,
) -> Tensor:
    """A seed's image moved by each step along each direction, uint8 (k, steps, C, H, W).

    Steps (steps,) are in standard deviations of the latent along the direction: 1 for z, measured
    on a few hundred latents for w.
    """
    z, classes = sampler.latents([seed]), sampler.classes([seed], label)
    # z is standard normal in every direction, so a step needs no scale; w has none that is known.
    if sampler.mapping is None:
        moved = z + steps[None, :, None] * vectors[:, None]
        count = moved.shape[0] * moved.shape[1]
        images = sampler.draw(
            moved.flatten(0, 1), None if classes is None else classes.expand(count, -1)
        )
    else:
        seeds = list(range(_SPREAD_SEEDS))
        w = sampler.styles(sampler.latents(seeds), sampler.classes(seeds)).cpu()
        step = steps[None, :] * (w @ vectors.T).std(0)[:, None]
        moved = sampler.styles(z, classes).cpu() + step[..., None] * vectors[:, None]
        images = sampler.draw_styles(moved.flatten(0, 1))
    grid: Tensor = images.unflatten(0, (len(vectors), len(steps)))
    return grid


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _of_dcgan(model: nn.Module, z_dim: int) -> Tensor:
    """The first layer is a transposed convolution of one pixel: a matrix (z_dim, out 4 4)."""
    return _weight(model.get_submodule("layers.0")).flatten(1).T


def _of_linear(model: nn.Module, z_dim: int) -> Tensor:
    return _weight(model.get_submodule("linear"))[:, :z_dim]


def _of_biggan(model: nn.Module, z_dim: int) -> Tensor:
    """Each part of the latent meets its own layers, so A is block diagonal."""
    first = _weight(model.get_submodule("linear.0"))
    blocks = [first]
    for block in model.get_submodule("blocks").children():
        maps = [m for n, m in block.named_modules() if n.endswith((".gain", ".bias"))]
        blocks.append(torch.cat([_weight(m)[:, : first.shape[1]] for m in maps]))
    whole: Tensor = torch.block_diag(*blocks)
    return whole


def _of_stylegan2(model: nn.Module, z_dim: int) -> Tensor:
    """The matrices of all style maps, one below the other, since w enters each of them."""
    # Equalised layers divide their weights by the root of their inputs when they run, so the same
    # is done here to get eigenvalues of the maps as they act.
    maps = [module for name, module in model.named_modules() if name.endswith(".affine")]
    return torch.cat([_weight(m) for m in maps]).div(z_dim**0.5)


_WEIGHTS: dict[str, Callable[[nn.Module, int], Tensor]] = {
    "biggan": _of_biggan,
    "dcgan": _of_dcgan,
    "r3gan": _of_linear,
    "sndcgan": _of_linear,
    "sngan": _of_linear,
    "stylegan2": _of_stylegan2,
}
