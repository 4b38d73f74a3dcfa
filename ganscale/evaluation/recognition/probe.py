"""Linear probes: how well a linear classifier works on a discriminator's features.

Radford et al. (2016, arXiv 1511.06434, section 5.1): the activations of all convolutions, each
max-pooled to a 4x4 grid, are one vector, on which a linear model is trained with labels. Here it is
multinomial logistic regression on standardised features; the strength of its L2 term is chosen on a
part of the training images that is held out, then it is trained on all of them. The same network
without training and the pixels are probed as well, which shows what the training has added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d, cross_entropy

from ganscale.errors import ConfigError, DataError
from ganscale.evaluation.image_sets import ImageSet, required_labels
from ganscale.evaluation.image_views import Subset, with_classes_of
from ganscale.metrics.intervals import Estimate, t_interval
from ganscale.models.activations import recorded_convolutions

FeatureFn = Callable[[Tensor], Tensor]
"""uint8 images (n, C, H, W) to features (n, F)."""
StartTask = Callable[[str, int], Callable[[int], object]]
Labels = NDArray[np.int64]

_GRID = 4
_ROWS = 64
_HELD_OUT = 0.2
# A wide range: with a narrower one the strongest was chosen, so the best lay outside.
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
_MAX_ITERATIONS = 200
# L-BFGS passes over all features again and again, so they are kept in memory.
_MAX_BYTES = 8 * 2**30
# Of features that are the same for all images, such as those of dead channels, which stay 0.
_DEVIATION_FLOOR = 1e-6


def pooled_activations(network: nn.Module, *, num_classes: int = 0) -> FeatureFn:
    """Features of a discriminator in evaluation mode, whatever labels it takes.

    Labels enter after the convolutions, so their activations are the same for all labels. Maps
    smaller than 4x4 are left out.
    """

    @torch.no_grad()
    def features_of(images: Tensor) -> Tensor:
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        with recorded_convolutions(network) as outputs:
            network(images.float() / 127.5 - 1, labels if num_classes else None)
        maps = [output for output in outputs if min(output.shape[2:]) >= _GRID]
        return torch.cat([adaptive_max_pool2d(m.float(), _GRID).flatten(1) for m in maps], dim=1)

    return features_of


def scaled_pixels(images: Tensor) -> Tensor:
    """The images themselves as features in [-1, 1]."""
    return images.flatten(1).float() / 127.5 - 1


@dataclass(frozen=True, eq=False)
class LogisticRegression:
    """Class logits of standardised features: ((x - mean) / deviation) weight + bias."""

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    """(F, K)"""
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(n, K) of features (n, F)."""
        return ((features - self.mean) / self.deviation) @ self.weight + self.bias

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Part of the rows whose class has the highest logit."""
        return float((self.logits(features).argmax(1) == labels).double().mean())


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    strength: float,
    start: LogisticRegression | None = None,
) -> LogisticRegression:
    """Minimise mean cross-entropy + strength / 2 |weight|^2 by L-BFGS.

    Args:
        features: (N, F), float32 or float64.
        labels: int64 (N,).
        num_classes: K.
        strength: of the L2 term on standardised features; the bias has none.
        start: weights to begin with, zero by default. The problem is strictly convex in the
            weights, so they decide only how long it takes.
    """
    mean = features.mean(0)
    deviation = features.std(0, correction=0).clamp(min=_DEVIATION_FLOOR)
    inputs = (features - mean) / deviation
    weight = inputs.new_zeros(features.shape[1], num_classes)
    bias = inputs.new_zeros(num_classes)
    if start is not None:
        weight.copy_(start.weight)
        bias.copy_(start.bias)
    weight.requires_grad_()
    bias.requires_grad_()
    # The problem is convex and has no noise, so L-BFGS with a line search reaches the one minimum;
    # an accuracy must not depend on a learning rate.
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=1e-5,
        tolerance_change=1e-8,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(inputs @ weight + bias, labels)
        value = value + strength / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return LogisticRegression(mean, deviation, weight.detach(), bias.detach())


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy on test images of linear models on one kind of features."""

    features: str
    num_features: int
    accuracy: Estimate
    """Mean over seeds with Student's interval."""
    by_seed: tuple[float, ...]
    strengths: tuple[float, ...]
    """L2 strengths that were chosen, by seed."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they are written to files."""
        return asdict(self)


def probe(
    name: str,
    features_for_seed: Callable[[int], FeatureFn],
    train: ImageSet,
    test: ImageSet,
    *,
    num_train: int,
    seeds: Sequence[int] = (0, 1, 2),
    device: str = "cpu",
    start_task: StartTask = lambda text, total: lambda count: None,
) -> ProbeResult:
    """Train on labelled images, test on others, once for each seed.

    Args:
        name: of the features, for messages and results.
        features_for_seed: returns the function that extracts features, for a seed; one function
            for all seeds if the network is trained.
        train: labelled images; a seed chooses `num_train` of them and which are held out.
        test: labelled images of the same shape, all of which are used; classes are matched by name.
        num_train: images to train on.
        seeds: one for each repeat.
        device: the device to compute on.
        start_task: called with the name of each task and its number of items; what it returns is
            called with the number of items done since the last call.

    Raises:
        ConfigError: for images without labels, or more features than fit in 8 GiB.
        DataError: for sets of different shapes, test images of classes that `train` has not, or
            fewer than 10 training images.
    """
    test = _checked_test(train, test, num_train)
    train_labels, test_labels = required_labels(train, "a probe"), required_labels(test, "a probe")
    num_classes = len(train.classes)
    accuracies, strengths = [], []
    test_features: tuple[FeatureFn, Tensor] | None = None
    for seed in seeds:
        features_of, text = features_for_seed(seed), f"{name}, seed {seed}"
        # A trained network has the same features for all seeds, so those of the test images are
        # computed once; an untrained one is another network for each seed.
        if test_features is None or test_features[0] is not features_of:
            progress = start_task(f"{text}: test images", len(test))
            test_features = (features_of, _extract(test, features_of, device, progress))
        chosen = np.random.default_rng(seed).permutation(len(train))[:num_train]
        progress = start_task(f"{text}: training images", len(chosen))
        features = _extract(Subset(train, chosen), features_of, device, progress)
        labels = torch.from_numpy(train_labels[chosen]).to(device)
        progress = start_task(f"{text}: linear models", len(_STRENGTHS) + 1)
        strength, start = _best_strength(features, labels, num_classes, progress)
        model = fit_logistic(features, labels, num_classes, strength=strength, start=start)
        progress(1)
        del features  # up to 8 GiB, before the next seed's are computed
        accuracies.append(
            model.accuracy(test_features[1], torch.from_numpy(test_labels).to(device))
        )
        strengths.append(strength)
    assert test_features is not None
    return ProbeResult(
        name, test_features[1].shape[1], t_interval(accuracies), tuple(accuracies), tuple(strengths)
    )


def _checked_test(train: ImageSet, test: ImageSet, num_train: int) -> ImageSet:
    """The test images with the numbering of `train`'s classes. Raises the errors of `probe`."""
    required_labels(test, "a probe")
    test = with_classes_of(test, train.classes, train.description)
    if train.shape != test.shape:
        raise DataError(
            f"{train.description} have shape {train.shape}, {test.description} {test.shape}"
        )
    if min(num_train, len(train)) < 10:
        raise DataError(f"a probe needs at least 10 images, {train.description} are too few")
    return test


def _best_strength(
    features: Tensor, labels: Tensor, num_classes: int, progress: Callable[[int], object]
) -> tuple[float, LogisticRegression]:
    """The strength with the highest accuracy on held-out images, and its model.

    Strengths are tried in descending order, so that each fit starts from a solution nearby.
    """
    num_fit = round(len(features) * (1 - _HELD_OUT))
    candidates: list[tuple[float, float, LogisticRegression]] = []
    start = None
    for strength in sorted(_STRENGTHS, reverse=True):
        start = fit_logistic(
            features[:num_fit], labels[:num_fit], num_classes, strength=strength, start=start
        )
        candidates.append((start.accuracy(features[num_fit:], labels[num_fit:]), strength, start))
        progress(1)
    # Of equally accurate strengths the largest, which is the simplest model.
    _, strength, model = max(candidates, key=lambda tried: tried[:2])
    return strength, model


def _extract(
    images: ImageSet, features_of: FeatureFn, device: str, progress: Callable[[int], object]
) -> Tensor:
    """Features of all images, float32 (N, F)."""
    rows: Tensor | None = None
    for start in range(0, len(images), _ROWS):
        numbers = np.arange(start, min(start + _ROWS, len(images)))
        features = features_of(images.read(numbers).to(device))
        if rows is None:
            if len(images) * features.shape[1] * 4 > _MAX_BYTES:
                raise ConfigError(
                    f"{features.shape[1]} features of {len(images)} images need more than 8 GiB: "
                    "take fewer images (--num)"
                )
            rows = torch.empty(len(images), features.shape[1], device=device)
        rows[start : start + len(numbers)] = features
        progress(len(numbers))
    assert rows is not None
    return rows
