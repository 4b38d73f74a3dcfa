"""Closed-form directions against the singular value decomposition, and a known one is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ganscale.config.models import (
    BigganModel,
    DcganModel,
    R3ganModel,
    SndcganModel,
    SnganModel,
    Stylegan2Model,
)
from ganscale.errors import ConfigError
from ganscale.generation.directions import closed_form_directions, first_weight
from ganscale.models import build_generator

MODELS = [
    DcganModel(z_dim=16, base_channels=8),
    SndcganModel(z_dim=16, base_channels=8),
    SnganModel(z_dim=16, base_channels=8),
    BigganModel(z_dim=16, base_channels=8, num_classes=3),
    R3ganModel(z_dim=16, base_channels=16, num_classes=3, blocks_per_stage=1),
    Stylegan2Model(z_dim=16, base_channels=16),
]


def test_directions_are_right_singular_vectors() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((40, 12))
    _, values, vectors = np.linalg.svd(weight)
    found = closed_form_directions(torch.from_numpy(weight), 5)
    torch.testing.assert_close(found.eigenvalues, torch.from_numpy(values[:5] ** 2))
    cosines = (found.vectors.numpy() * vectors[:5]).sum(1)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-12)
    largest = found.vectors.gather(1, found.vectors.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())


def test_a_number_of_directions_must_be_there() -> None:
    with pytest.raises(ConfigError, match="13 directions: expected 1 to 12"):
        closed_form_directions(torch.zeros(40, 12), 13)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_direction_put_into_the_weights_is_found_first(model: Any) -> None:
    torch.manual_seed(0)
    generator = build_generator(model.model_dump()).eval()
    known = torch.zeros(16)
    known[5] = 0.6
    known[6] = 0.8
    _strengthen(generator, model.name, known)
    weight = first_weight(generator, model.name, 16)
    found = closed_form_directions(weight, 1)
    torch.testing.assert_close(found.vectors[0], known, atol=0.02, rtol=0)


def _strengthen(generator: nn.Module, name: str, known: torch.Tensor) -> None:
    """Make the layer answer the direction much more than others."""
    ends: str | tuple[str, ...] = {"dcgan": "layers.0", "stylegan2": ".affine"}.get(name, "linear")
    if name == "biggan":
        # Those of the first block read the second part of the latent.
        ends = tuple(f"blocks.0.norm{n}.{m}" for n in (1, 2) for m in ("gain", "bias"))
        known = known[4:8]
    for part, module in generator.named_modules():
        if part.endswith(ends):
            for weight in module.parameters():
                if weight.ndim == 4:
                    weight.data += known[:, None, None, None]
                elif weight.ndim == 2:
                    weight.data[:, : len(known)] += 40 * known
            if name == "biggan":  # spectral norm follows in training mode
                module.train()
                for _ in range(20):
                    module(torch.zeros(1, 132))
                module.eval()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_weight_says_how_far_the_first_layer_moves(model: Any) -> None:
    """|A n| is the change of what the layers that read the latent put out, for a unit step n."""
    torch.manual_seed(0)
    generator = build_generator(model.model_dump()).eval()
    step = torch.nn.functional.normalize(torch.randn(16), dim=0)
    outputs: list[torch.Tensor] = []
    for name, module in generator.named_modules():
        if _reads_latent(model.name, name):
            module.register_forward_hook(lambda m, i, out: outputs.append(out.flatten(1)))
    z = torch.zeros(2, 16)
    z[1] = step
    if model.name == "stylegan2":
        generator.get_submodule("mapping").register_forward_hook(lambda m, i, out: z)
    with torch.no_grad():
        generator(z, torch.zeros(2, dtype=torch.int64))
    moved = torch.cat(outputs, 1)
    moved = (moved[1] - moved[0]).norm()
    expected = (first_weight(generator, model.name, 16) @ step).norm()
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)


def _reads_latent(model: str, name: str) -> bool:
    if model == "biggan":
        return name == "linear.0" or name.endswith((".gain", ".bias"))
    names = {"dcgan": "layers.0", "stylegan2": ".affine"}
    return name.endswith(names.get(model, "linear"))
