"""Training methods: what one step computes, a file each, and the two phases that GANs share.

Adding one is a file, a line here, its section of the configuration, and tests.
"""

from __future__ import annotations

from ganscale.training.steps.bigan import Bigan
from ganscale.training.steps.encoder import InDomainEncoder
from ganscale.training.steps.gan import Gan
from ganscale.training.steps.method import AVERAGED, MethodClass, TrainingMethod
from ganscale.training.steps.semi_supervised import SemiSupervised
from ganscale.training.steps.vae import Vae
from ganscale.training.steps.vae_gan import VaeGan

__all__ = ["AVERAGED", "METHODS", "MethodClass", "TrainingMethod"]

METHODS: dict[str, MethodClass] = {
    "bigan": Bigan,
    "encoder": InDomainEncoder,
    "gan": Gan,
    "semi-supervised": SemiSupervised,
    "vae": Vae,
    "vae-gan": VaeGan,
}
