"""Images of latents, mixtures of classes and styles w, with or without truncation.

Every forward has as many rows as one of `SampleableGenerator`, so an image does not depend on the
rest of its batch, and a seed without truncation gives the same image as there. Mixtures and styles
are put into the unchanged model by forward hooks, so models need no code for exploring them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.errors import ConfigError
from ganscale.generation.latents import seed_for, seeded_labels, seeded_latents
from ganscale.generation.pictures import as_pictures
from ganscale.generation.sampler import SampleableGenerator

Label = int | list[int] | None
"""A class for all images, one for each of them, or those that the seeds decide."""
_MEAN_SEEDS = 1024
"""The number of latents that the mean of w is estimated from."""
_LEAST_PSI = 0.05
"""Below it nearly every draw is rejected, and the images are nearly one."""


class LatentSampler:
    """A generator that also takes mixtures of classes, styles, and a truncation.

    Args:
        generator: the generator to draw from.
        pictures: whether arrays of floats are returned as uint8 pictures in colours.
        truncation_psi: with a mapping network (StyleGAN2), the fraction of w's distance to its mean
            that is kept, 0 to 1. Without one, the largest magnitude of a latent's elements.

    Raises `ConfigError` if truncation_psi is out of its range.
    """

    def __init__(
        self,
        generator: SampleableGenerator,
        *,
        pictures: bool = False,
        truncation_psi: float | None = None,
    ) -> None:
        self.generator = generator
        self.pictures = pictures
        self.model = generator.model
        self.num_classes = generator.num_classes
        self.mapping: nn.Module | None = getattr(generator.model, "mapping", None)
        self.truncation_psi = truncation_psi
        self._means: dict[int | None, Tensor] = {}
        if truncation_psi is not None and self.mapping is not None and not 0 <= truncation_psi <= 1:
            raise ConfigError(f"truncation_psi={truncation_psi}: this generator takes 0 to 1")

    def latents(self, seeds: list[int]) -> Tensor:
        """One z for each seed, (n, z_dim); truncated here if the generator has no w."""
        if not seeds:
            raise ConfigError("expected at least one seed")
        if self.truncation_psi is None or self.mapping is not None:
            return seeded_latents(seeds, self.generator.z_dim)
        return truncated_latents(seeds, self.generator.z_dim, threshold=self.truncation_psi)

    def classes(self, seeds: list[int], label: Label = None) -> Tensor | None:
        """Each seed's class as weights (n, num_classes); None for a generator without classes.

        `label` is the class of all seeds, or of each of them in turn. Raises `ConfigError` for one
        that the generator does not know.
        """
        if label is None:
            if not self.num_classes:
                return None
            labels = seeded_labels(seeds, self.num_classes)
        else:
            labels = torch.tensor(label).expand(len(seeds))
            for unknown in labels[(labels < 0) | (labels >= self.num_classes)].tolist():
                known = f"0 to {self.num_classes - 1}" if self.num_classes else "no labels"
                raise ConfigError(f"label {unknown}: this generator takes {known}")
        return F.one_hot(labels, self.num_classes).float()

    def sample_seeds(self, seeds: list[int], *, label: Label = None) -> Tensor:
        """One image for each seed, (n, C, H, W) of the generator's values."""
        return self.draw(self.latents(seeds), self.classes(seeds, label))

    def draw(self, z: Tensor, classes: Tensor | None = None) -> Tensor:
        """Images (n, C, H, W) of latents (n, z_dim) and class weights (n, num_classes)."""
        # Truncation of w must happen between the mapping network and the convolutions.
        if self.mapping is not None and self.truncation_psi is not None:
            return self.draw_styles(self.styles(z, classes))
        return torch.cat([self._stored(part) for part in self._forwards(self.model, z, classes)])

    @torch.no_grad()
    def styles(self, z: Tensor, classes: Tensor | None = None) -> Tensor:
        """w of latents, truncated, (n, w_dim). Raises `ConfigError` if the generator has none."""
        if self.mapping is None:
            name = self.generator.info.get("model", {}).get("name", "this model")
            raise ConfigError(f"{name} has no styles w: expected a stylegan2 generator")
        w = torch.cat(list(self._forwards(self.mapping, z, classes)))
        if self.truncation_psi is None:
            return w
        return truncated_styles(w, self._mean(classes), self.truncation_psi)

    def draw_styles(self, w: Tensor) -> Tensor:
        """Images of styles, (n, w_dim) or one for each layer, (n, num_layers, w_dim)."""
        images = []
        num_rows = self.generator.forward_rows
        for part in w.split(num_rows):
            with ExitStack() as stack:
                stack.enter_context(_styled(self.model, _padded(part, num_rows)))
                # The hooks replace whatever the model makes of z and labels.
                z = torch.zeros(len(part), self.generator.z_dim)
                outputs = self._forwards(self.model, z, self.classes([0] * len(part)))
                images += [self._stored(output) for output in outputs]
        return torch.cat(images)

    @property
    def num_layers(self) -> int:
        """Styles that an image is made of: one for each convolution, and one for the last image."""
        return 1 + max(index for _, index in _affines(self.model))

    def _stored(self, images: Tensor) -> Tensor:
        """The network's images as they are returned, on the CPU."""
        values = self.generator.values
        images = values.from_network(images).cpu()
        return as_pictures(images, values) if self.pictures else images

    @torch.no_grad()
    def _forwards(self, module: nn.Module, z: Tensor, classes: Tensor | None) -> Iterator[Tensor]:
        """Each forward's output for its part of the rows, on the device.

        They are not joined here, since the device may not have the memory for all images.
        """
        device = next(self.model.parameters()).device
        num_rows = self.generator.forward_rows
        for start in range(0, len(z), num_rows):
            rows = _padded(z[start : start + num_rows], num_rows).to(device)
            # Ignored where classes are mixed: the hook replaces what their embedding returns.
            labels = torch.zeros(num_rows, dtype=torch.int64, device=device)
            with ExitStack() as stack:
                if classes is not None:
                    weights = _padded(classes[start : start + num_rows], num_rows).to(device)
                    stack.enter_context(_mixed_classes(self.model, weights))
                outputs: Tensor = module(rows, labels)
            yield outputs[: len(z) - start]

    def _mean(self, classes: Tensor | None) -> Tensor:
        """The mean w of each row's classes, (n, w_dim), or of all latents, (w_dim,).

        Each class has a mean of its own: the mean over all classes would pull an image out of its
        class.
        """
        if classes is None:
            return self._mean_of(None)
        means = [
            sum(float(row[k]) * self._mean_of(k) for k in row.nonzero().flatten().tolist())
            for row in classes
        ]
        return torch.stack(means)  # type: ignore[arg-type]

    def _mean_of(self, label: int | None) -> Tensor:
        # A mean takes 1,024 latents through the mapping network, so it is computed once.
        if label not in self._means:
            seeds = list(range(_MEAN_SEEDS))
            z = seeded_latents(seeds, self.generator.z_dim)
            assert self.mapping is not None
            styles = self._forwards(self.mapping, z, self.classes(seeds, label))
            self._means[label] = torch.cat(list(styles)).mean(0)
        return self._means[label]


def truncated_styles(w: Tensor, mean: Tensor, psi: float) -> Tensor:
    """mean + psi (w - mean), which is the mean at psi = 0 and w itself at 1.

    Karras et al. 2019, arXiv 1812.04948, appendix B.
    """
    return torch.lerp(mean.expand_as(w), w, psi)


def truncated_latents(seeds: list[int], z_dim: int, *, threshold: float) -> Tensor:
    """One latent for each seed, (n, z_dim), no element of which is larger than `threshold`.

    Elements are of a truncated normal (Brock et al. 2019, arXiv 1809.11096, section 3.1). Those
    that are small enough are those of `seeded_latents`, so images stay near theirs. Raises
    `ConfigError` for a threshold below 0.05.
    """
    if not threshold >= _LEAST_PSI:
        raise ConfigError(f"truncation_psi={threshold}: expected at least {_LEAST_PSI} without w")
    rows = []
    for seed in seeds:
        # The seed of `seeded_latents`, whose first draw is repeated here.
        generator = torch.Generator().manual_seed(seed_for("sample", seed))
        z = torch.randn(z_dim, generator=generator)
        # Rejected elements are drawn again from the same stream, which gives a truncated normal;
        # clamping would pile them up at the threshold.
        while bool((large := z.abs() > threshold).any()):
            z = torch.where(large, torch.randn(z_dim, generator=generator), z)
        rows.append(z)
    return torch.stack(rows)


def mixed_images(sampler: LatentSampler, rows: list[int], columns: list[int], layer: int) -> Tensor:
    """Images with the row seed's styles before `layer` and the column seed's from it on.

    Style mixing (Karras et al. 2019, arXiv 1812.04948, section 3.1): coarse layers take their
    styles from one image and fine layers from another. Returns uint8 (rows, columns, C, H, W).
    Raises `ConfigError` if the generator has no styles, or the layer is not one of 0 to their
    number.
    """
    w_rows, w_columns = (
        sampler.styles(sampler.latents(seeds), sampler.classes(seeds)).cpu()
        for seeds in (rows, columns)
    )
    num_layers = sampler.num_layers
    if not 0 <= layer <= num_layers:
        raise ConfigError(f"layer {layer}: this generator has layers 0 to {num_layers}")
    before = torch.arange(num_layers)[:, None] < layer  # (layers, 1)
    w = torch.where(before, w_rows[:, None, None], w_columns[None, :, None])
    images = sampler.draw_styles(w.flatten(0, 1))
    grid: Tensor = images.unflatten(0, (len(rows), len(columns)))
    return grid


def _padded(rows: Tensor, num_rows: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(num_rows - len(rows), *rows.shape[1:])])


@contextmanager
def _mixed_classes(model: nn.Module, weights: Tensor) -> Iterator[None]:
    """Embeddings of labels return mixtures of all classes' embeddings by `weights` (n,
    num_classes)."""

    def mixed(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        if isinstance(module, nn.Embedding):
            return weights @ module.weight
        # A linear map of one-hot labels, as in R3GAN: called with weights instead. `forward`
        # and not a call, which would run this hook again.
        with torch.no_grad():
            embedded: Tensor = module.forward(weights)
        return embedded

    embeddings = [
        module
        for name, module in model.named_modules()
        # Models name their map of labels `embedding`, whatever module it is.
        if isinstance(module, nn.Embedding) or name.split(".")[-1] == "embedding"
    ]
    if not embeddings:
        raise ConfigError("this generator has no embedding of classes to mix")
    hooks = [module.register_forward_hook(mixed) for module in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _styled(model: nn.Module, w: Tensor) -> Iterator[None]:
    """Style maps of a StyleGAN2 generator take w, (n, w_dim) or (n, layers, w_dim), as their
    input."""
    device = next(model.parameters()).device
    w = w.to(device)

    def given(index: int) -> Any:
        layer = w if w.ndim == 2 else w[:, index]
        return lambda module, inputs: (layer,)

    hooks = [m.register_forward_pre_hook(given(index)) for m, index in _affines(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _affines(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """Style maps and the layer that each belongs to.

    A map of an image output has the layer of the next convolution, as in the published code: mixing
    at a layer changes a resolution's image with the convolution that follows it.
    """
    affines, layer = [], 0
    for name, module in model.named_modules():
        if name.endswith(".affine"):
            affines.append((module, layer))
            layer += "image" not in name
    return affines
