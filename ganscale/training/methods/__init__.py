"""Training methods. Adding one is a file, a line here, its section of the configuration, tests."""

from __future__ import annotations

from ganscale.training.methods.bigan import Bigan
from ganscale.training.methods.encoder import InDomainEncoder
from ganscale.training.methods.gan import Gan
from ganscale.training.methods.method import AVERAGED, Method, MethodClass
from ganscale.training.methods.semi_supervised import SemiSupervised
from ganscale.training.methods.vae import Vae
from ganscale.training.methods.vae_gan import VaeGan

__all__ = ["AVERAGED", "METHODS", "Method", "MethodClass"]

METHODS: dict[str, MethodClass] = {
    "bigan": Bigan,
    "encoder": InDomainEncoder,
    "gan": Gan,
    "semi-supervised": SemiSupervised,
    "vae": Vae,
    "vae-gan": VaeGan,
}
