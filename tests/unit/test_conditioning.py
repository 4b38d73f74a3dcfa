"""One-hot labels, conditional batch norm and the projection head against loops by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from ganscale.models.conditioning import ConditionalBatchNorm2d, ProjectionHead, one_hot


def test_one_hot_is_one_at_the_label_in_fp32() -> None:
    found = one_hot(torch.tensor([2, 0, 3]), 4)
    assert found.dtype == torch.float32
    assert found.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]


def test_a_label_is_needed_and_lies_within_the_classes() -> None:
    with pytest.raises(AssertionError, match="needs labels"):
        one_hot(None, 4)
    for label in (4, -1):
        with pytest.raises(IndexError, match="out of range"):
            one_hot(torch.tensor([label]), 4)
    head = ProjectionHead(nn.Linear(2, 1), nn.Embedding(3, 2))
    with pytest.raises(AssertionError, match="needs labels"):
        head(torch.ones(1, 2), None)


def class_norm() -> ConditionalBatchNorm2d:
    torch.manual_seed(0)
    return ConditionalBatchNorm2d(2, nn.Embedding(3, 2), nn.Embedding(3, 2)).double()


def weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight.detach()


def affine_by_loops(
    norm: ConditionalBatchNorm2d, x: Tensor, labels: Tensor, mean: list[float], var: list[float]
) -> Tensor:
    """Each pixel standardised, times 1 plus its class's gain, plus its class's bias."""
    out = torch.empty_like(x)
    for n, label in enumerate(labels.tolist()):
        for channel in range(x.shape[1]):
            gain = 1 + weight(norm.gain)[label, channel].item()
            bias = weight(norm.bias)[label, channel].item()
            scale = gain / (var[channel] + 1e-5) ** 0.5
            out[n, channel] = (x[n, channel] - mean[channel]) * scale + bias
    return out


def moments(x: Tensor) -> tuple[list[float], list[float]]:
    """Each channel's mean and biased variance, from plain lists."""
    columns = x.transpose(0, 1).flatten(1).tolist()
    means = [sum(column) / len(column) for column in columns]
    variances = [
        sum((value - mean) ** 2 for value in column) / len(column)
        for column, mean in zip(columns, means, strict=True)
    ]
    return means, variances


def test_class_norm_in_training_is_the_batchs_moments_and_each_samples_class() -> None:
    norm, labels = class_norm(), torch.tensor([2, 0, 0, 1])
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64) * 3 + 5
    torch.testing.assert_close(norm(x, labels), affine_by_loops(norm, x, labels, *moments(x)))


def test_class_norm_in_evaluation_is_its_running_moments() -> None:
    norm, labels = class_norm(), torch.tensor([1, 2])
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64) * 3 + 5
    norm(x, labels)
    means, variances = moments(x)
    num = x[:, 0].numel()
    running_mean = [0.1 * mean for mean in means]
    running_var = [0.9 + 0.1 * var * num / (num - 1) for var in variances]
    norm.eval()
    other = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    expected = affine_by_loops(norm, other, labels, running_mean, running_var)
    torch.testing.assert_close(norm(other, labels), expected)
    alone = norm(other[1:], labels[1:])
    torch.testing.assert_close(alone, expected[1:])


def test_class_norm_without_gain_and_bias_is_plain_batch_norm() -> None:
    norm = class_norm()
    for embedding in (norm.gain, norm.bias):
        assert isinstance(embedding, nn.Embedding)
        nn.init.zeros_(embedding.weight)
    x, plain = torch.randn(4, 2, 3, 3).double(), nn.BatchNorm2d(2).double()
    torch.testing.assert_close(norm(x, torch.tensor([0, 1, 2, 0])), plain(x))


def test_class_norm_has_the_gradients_of_finite_differences() -> None:
    norm, labels = class_norm(), torch.tensor([2, 0, 1])
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert isinstance(norm.gain, nn.Embedding)
    assert isinstance(norm.bias, nn.Embedding)

    def normed(images: Tensor, *_: Tensor) -> Tensor:
        out: Tensor = norm(images, labels)
        return out

    assert gradcheck(normed, (x, norm.gain.weight, norm.bias.weight))


@pytest.mark.parametrize("classes", [False, True])
def test_the_head_is_a_linear_form_plus_the_embeddings_product_with_the_features(
    classes: bool,
) -> None:
    torch.manual_seed(0)
    linear, embedding = nn.Linear(4, 1).double(), nn.Embedding(3, 4).double()
    features, labels = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 1, 0])
    expected = []
    for row, label in zip(features.tolist(), labels.tolist(), strict=True):
        logit = linear.bias.item()
        for channel, value in enumerate(row):
            logit += value * linear.weight[0, channel].item()
            logit += value * embedding.weight[label, channel].item() if classes else 0.0
        expected.append(logit)
    head = ProjectionHead(linear, embedding if classes else None)
    found = head(features, labels)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    if not classes:
        assert torch.equal(head(features, None), found)


def test_the_head_widens_half_precision_features_to_fp32() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(nn.Linear(64, 1), nn.Embedding(3, 64))
    features, labels = torch.randn(5, 64).bfloat16(), torch.tensor([0, 1, 2, 1, 0])
    with torch.autocast("cpu", torch.bfloat16):
        found = head(features, labels)
        assert head.linear(features.float()).dtype == torch.bfloat16  # it is active
    assert found.dtype == torch.float32
    assert torch.equal(found, head(features.float(), labels))
