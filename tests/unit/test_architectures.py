"""What an architecture's section says of its networks is what they do."""

from __future__ import annotations

import pytest
import torch

from ganscale.config import Config
from ganscale.errors import ConfigError
from ganscale.models import build_discriminator, build_generator
from tests.support.small_models import SMALL_MODELS


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_an_architecture_takes_labels_if_it_says_so_and_is_refused_classes_otherwise(
    name: str,
) -> None:
    base = Config().with_changes({"model": SMALL_MODELS[name]})
    spec = {**base.model.model_dump(), "num_classes": 10}
    torch.manual_seed(0)
    networks = build_generator(spec).eval(), build_discriminator(spec).eval()
    inputs = torch.randn(2, spec["z_dim"]), torch.randn(2, 3, 16, 16)
    for network, x in zip(networks, inputs, strict=True):
        # Embeddings may begin as zeros, and so may the layers behind them.
        for parameter in network.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
        one, other = (network(x, torch.tensor([label, label])) for label in (0, 1))
        assert torch.equal(one, other) is not base.model.takes_labels
    if base.model.takes_labels:
        base.with_changes({"model.num_classes": 10})
    else:
        with pytest.raises(ConfigError, match=rf"which {base.model.name} does not take: set"):
            base.with_changes({"model.num_classes": 10})


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_an_architecture_is_lipschitz_if_all_weights_of_its_discriminator_are_normed(
    name: str,
) -> None:
    model = Config().with_changes({"model": SMALL_MODELS[name]}).model
    discriminator = build_discriminator(model.model_dump())
    names = [name for name, p in discriminator.named_parameters() if p.ndim > 1]
    assert names
    # `spectral_norm` is a parametrization of the weight.
    assert all(name.endswith("parametrizations.weight.original") for name in names) is (
        model.is_lipschitz
    )
