"""StyleGAN2 (Karras et al. 2020, arXiv 1912.04958), with the CIFAR form of arXiv 2006.06676.

The generator maps the latent to w, whose affine images scale the channels of each convolution; its
output is a sum of images, one from each resolution. The discriminator is a plain or residual
pyramid that ends in the minibatch standard deviation. All weights are N(0, 1) parameters, scaled at
run time (equalised learning rate, Karras et al. 2018, arXiv 1710.10196, section 4.1).

There is no noise: an image is a function of its latent and label, as in StyleGAN3 (arXiv
2106.12423), so the per-pixel noise inputs of the paper are left out. For half precision, mapping,
styles, the 4x4 stages, images and logits stay fp32; styles and weights are divided by their largest
element and activations clamped to 256, which bounds every product, as arXiv 2006.06676 does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.models.conditioning import one_hot
from ganscale.models.convolution import conv2d, conv_transpose2d
from ganscale.models.fused import bias_leaky_relu, scaled_sum
from ganscale.models.layers import (
    FullPrecision,
    MinibatchStd,
    binomial_filter,
    downsample,
    side_lengths,
    upsample,
    without_autocast,
)

_SLOPE = 0.2
_CLAMP = 256.0
_EPSILON = 1e-8
# The mapping learns a hundred times more slowly than the rest (Karras et al. 2019, arXiv
# 1812.04948, appendix C).
_MAPPING_RATE = 0.01
_LABEL_LAYERS = 8
_WIDTH_TIMES_RESOLUTION = 16384


class Stylegan2Generator(nn.Module):
    """Latents (N, z_dim) to images (N, img_channels, resolution, resolution), not bounded, fp32.

    The width at a resolution R is min(base_channels, 16384 / R); w has z_dim elements. Nothing in
    the forward is random.
    """

    def __init__(
        self,
        *,
        resolution: int,
        img_channels: int,
        z_dim: int,
        base_channels: int,
        num_classes: int,
        mapping_layers: int,
    ) -> None:
        super().__init__()
        self.mapping = _Mapping(z_dim, num_classes, z_dim, mapping_layers)
        width = _width(base_channels, 4)
        # The synthesis starts from a constant: all that distinguishes images comes in through
        # styles.
        self.constant = nn.Parameter(torch.randn(width, 4, 4))
        self.first = _ModulatedLayer(width, width, z_dim, up=False)
        self.first_image = _ToImage(width, img_channels, z_dim)
        self.blocks = nn.ModuleList()
        for size in side_lengths(resolution)[1:]:
            out = _width(base_channels, size)
            self.blocks.append(_SynthesisBlock(width, out, img_channels, z_dim))
            width = out

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        w = self.mapping(z, labels)
        with without_autocast(z):
            # Not `len(w)`, which would be a constant of an exported graph.
            x = self.first(self.constant.expand(w.shape[0], -1, -1, -1), w)
        images: Tensor = self.first_image(x, w)
        for block in self.blocks:
            x, images = block(x, images, w)
        return images


class Stylegan2Discriminator(nn.Module):
    """Images (N, img_channels, resolution, resolution) to logits (N,), fp32; positive means real.

    With classes the logit is <f(x), g(y)> / sqrt(width) for the features f and a mapping g of the
    label. `residual` is the paper's; without, the plain form that suits CIFAR.
    """

    def __init__(
        self,
        *,
        resolution: int,
        img_channels: int,
        base_channels: int,
        num_classes: int,
        residual: bool,
    ) -> None:
        super().__init__()
        sizes = side_lengths(resolution)[::-1]
        self.from_image = _ConvLayer(img_channels, _width(base_channels, resolution), 1)
        block = _ResidualBlock if residual else _PlainBlock
        self.blocks = nn.Sequential(
            *(
                block(_width(base_channels, size), _width(base_channels, after))
                for size, after in zip(sizes, sizes[1:], strict=False)
            )
        )
        width = _width(base_channels, 4)
        self.last = FullPrecision(
            MinibatchStd(),
            _ConvLayer(width + 1, width, 3),
            nn.Flatten(),
            EqualisedLinear(width * 4 * 4, width),
            _Activation(),
            EqualisedLinear(width, width if num_classes else 1),
        )
        self.label_mapping = _Mapping(0, num_classes, width, _LABEL_LAYERS) if num_classes else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        features: Tensor = self.last(self.blocks(self.from_image(images)))
        if self.label_mapping is None:
            return features.squeeze(1)
        mapped: Tensor = self.label_mapping(None, labels)
        # Both factors have elements of a size around 1, so the sum's deviation grows as the root.
        return (features * mapped).sum(dim=1) / math.sqrt(features.shape[1])


def modulated_conv2d(
    x: Tensor, weight: Tensor, style: Tensor, taps: Tensor | None = None, *, demodulate: bool
) -> Tensor:
    """Convolve each sample of x (N, I, H, W) with its own weight: equations 1 and 3 of the paper.

    The weight of sample n is style[n, i] weight[o, i, k], for `style` (N, I) and `weight`
    (O, I, K, K), and with `demodulate` that over its norm for each o. Instead of the weights, the
    channels are scaled before and after one shared convolution. With `taps`, twice the side.
    """
    with without_autocast(x):
        if demodulate:
            # The norm cancels any scale, so these leave the result and its gradients as they are.
            style = style / style.detach().abs().amax(dim=1, keepdim=True).clamp_min(_EPSILON)
            largest = weight.detach().abs().amax(dim=(1, 2, 3), keepdim=True)
            weight = weight / (largest.clamp_min(_EPSILON) * math.sqrt(weight[0].numel()))
            # Equation 3 without a weight for each sample: sum_ik (s_i w_oik)^2 = sum_i s_i^2 sum_k
            # w_oik^2.
            norms = style.square() @ weight.square().sum(dim=(2, 3)).T
            scale = torch.rsqrt(norms + _EPSILON)
    # A convolution is linear in its input channels, so scaling those is scaling the weight's.
    x = x * style.to(x.dtype)[:, :, None, None]
    x = (
        conv2d(x, weight, padding=weight.shape[-1] // 2)
        if taps is None
        else _up_conv2d(x, weight, taps)
    )
    return x * scale.to(x.dtype)[:, :, None, None] if demodulate else x


class EqualisedLinear(nn.Module):
    """Linear layer with the weight learning_rate * weight / sqrt(in_features), weight ~ N(0, 1).

    `learning_rate` multiplies that of the optimizer: the parameters start larger by its inverse.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: float = 0.0, learning_rate: float = 1.0
    ) -> None:
        super().__init__()
        # Adam moves parameters of all sizes alike, so a larger parameter that is scaled down learns
        # more slowly.
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / learning_rate)
        self.bias = nn.Parameter(torch.full((out_features,), bias / learning_rate))
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        scale = self.learning_rate / math.sqrt(self.weight.shape[1])
        return F.linear(x, self.weight * scale, self.bias * self.learning_rate)


class EqualisedConv2d(nn.Module):
    """Convolution with the weight weight / sqrt(fan_in), weight ~ N(0, 1); no bias.

    Zero padding keeps the side; with `down` it is halved, through the filter [1, 3, 3, 1].
    """

    taps: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, down: bool = False
    ) -> None:
        super().__init__()
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.randn(shape))
        self.down = down
        # A constant: it moves with the module and is no part of checkpoints.
        self.register_buffer("taps", binomial_filter(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # He's scale at run time and not at initialisation, so that Adam's steps are as large for
        # wide layers as for narrow ones, relative to their weights.
        weight = self.weight / math.sqrt(self.weight[0].numel())
        if not self.down:
            return conv2d(x, weight, padding=weight.shape[-1] // 2)
        # A 1x1 convolution commutes with the filter, so it is taken on the smaller map.
        if weight.shape[-1] == 1:
            return conv2d(downsample(x, self.taps), weight)
        return _down_conv2d(x, weight, self.taps)


class _Activation(nn.Module):
    """Leaky ReLU with gain sqrt(2), which about keeps the variance, within half precision."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return bias_leaky_relu(x, bias, _SLOPE, gain=math.sqrt(2), limit=_CLAMP)


class _Mapping(nn.Module):
    """Latents (N, z_dim), labels or both to (N, w_dim); each is normalised first; fp32."""

    def __init__(self, z_dim: int, num_classes: int, w_dim: int, num_layers: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        # The label weighs as much as the latent beside it; without a latent it is all there is.
        label_dim = (z_dim or w_dim) if num_classes else 0
        self.embedding = EqualisedLinear(num_classes, label_dim) if num_classes else None
        layers: list[nn.Module] = []
        for index in range(num_layers):
            in_features = w_dim if index else z_dim + label_dim
            linear = EqualisedLinear(in_features, w_dim, learning_rate=_MAPPING_RATE)
            layers += [linear, _Activation()]
        self.layers = FullPrecision(*layers)

    def forward(self, z: Tensor | None, labels: Tensor | None) -> Tensor:
        inputs = [] if z is None else [_normalise(z)]
        if self.embedding is not None:
            weight = self.embedding.weight
            with without_autocast(weight):
                embedded = self.embedding(one_hot(labels, self.num_classes).to(weight.dtype))
            inputs.append(_normalise(embedded))
        w: Tensor = self.layers(torch.cat(inputs, dim=1))
        return w


class _ModulatedConv2d(nn.Module):
    """A modulated convolution and the affine map that makes its style from w."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, w_dim: int) -> None:
        super().__init__()
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.randn(shape))
        # Styles start around 1: they scale channels a little at first and do not flip their signs.
        self.affine = EqualisedLinear(w_dim, in_channels, bias=1.0)

    def forward(
        self, x: Tensor, w: Tensor, taps: Tensor | None = None, *, demodulate: bool
    ) -> Tensor:
        with without_autocast(x):
            style = self.affine(w)
        weight = self.weight / math.sqrt(self.weight[0].numel())
        return modulated_conv2d(x, weight, style, taps, demodulate=demodulate)


class _ModulatedLayer(nn.Module):
    """Modulated and demodulated 3x3 convolution, bias, activation; with `up`, twice the side."""

    taps: Tensor

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, *, up: bool) -> None:
        super().__init__()
        self.conv = _ModulatedConv2d(in_channels, out_channels, 3, w_dim)
        self.bias = nn.Parameter(torch.zeros(out_channels, 1, 1))
        self.activation = _Activation()
        self.up = up
        self.register_buffer("taps", binomial_filter(), persistent=False)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = self.conv(x, w, self.taps if self.up else None, demodulate=True)
        activated: Tensor = self.activation(x, self.bias)
        return activated


class _ToImage(nn.Module):
    """Modulated 1x1 convolution without demodulation, and a bias; fp32."""

    def __init__(self, in_channels: int, img_channels: int, w_dim: int) -> None:
        super().__init__()
        self.conv = _ModulatedConv2d(in_channels, img_channels, 1, w_dim)
        self.bias = nn.Parameter(torch.zeros(img_channels, 1, 1))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        with without_autocast(x):
            image: Tensor = self.conv(x.to(w.dtype), w, demodulate=False) + self.bias
        return image


class _SynthesisBlock(nn.Module):
    """From (x, image) at one resolution to those at the next: figure 7b, output skips."""

    taps: Tensor

    def __init__(self, in_channels: int, out_channels: int, img_channels: int, w_dim: int) -> None:
        super().__init__()
        self.layer1 = _ModulatedLayer(in_channels, out_channels, w_dim, up=True)
        self.layer2 = _ModulatedLayer(out_channels, out_channels, w_dim, up=False)
        self.to_image = _ToImage(out_channels, img_channels, w_dim)
        self.register_buffer("taps", binomial_filter(), persistent=False)

    def forward(self, x: Tensor, images: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layer2(self.layer1(x, w), w)
        with without_autocast(x):
            images = upsample(images, self.taps)
        return x, images + self.to_image(x, w)


class _ConvLayer(nn.Module):
    """Equalised convolution, bias, activation; with `down`, half the side."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, down: bool = False
    ) -> None:
        super().__init__()
        self.conv = EqualisedConv2d(in_channels, out_channels, kernel_size, down=down)
        self.bias = nn.Parameter(torch.zeros(out_channels, 1, 1))
        self.activation = _Activation()

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.activation(self.conv(x), self.bias)
        return activated


class _PlainBlock(nn.Sequential):
    """Two 3x3 convolutions, the second to half the side."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            _ConvLayer(in_channels, in_channels, 3),
            _ConvLayer(in_channels, out_channels, 3, down=True),
        )


class _ResidualBlock(nn.Module):
    """The plain block beside a 1x1 convolution, their sum over sqrt(2) to keep the variance."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.main = _PlainBlock(in_channels, out_channels)
        self.skip = EqualisedConv2d(in_channels, out_channels, 1, down=True)

    def forward(self, x: Tensor) -> Tensor:
        return scaled_sum(self.main(x), self.skip(x), math.sqrt(2))


def _up_conv2d(x: Tensor, weight: Tensor, taps: Tensor) -> Tensor:
    """`upsample`, then the 3x3 convolution, in the order that costs a quarter: filter last.

    The two differ only at the border, where the filter here sees what lies beyond the image.
    """
    # A transposed convolution turns the kernel over, which the flip undoes.
    x = conv_transpose2d(x, weight.transpose(0, 1).flip(2, 3), stride=2)
    # Four times as strong for the zeros that a stride of 2 has put between the pixels.
    return _filter(x, 4 * torch.outer(taps, taps), padding=1)


def _down_conv2d(x: Tensor, weight: Tensor, taps: Tensor) -> Tensor:
    """The 3x3 convolution, then `downsample`, in the order that costs a quarter: filter first."""
    x = _filter(x, torch.outer(taps, taps), padding=2)
    return conv2d(x, weight, stride=2)


def _filter(x: Tensor, kernel: Tensor, padding: int) -> Tensor:
    channels = x.shape[1]
    kernel = kernel.to(x.dtype).expand(channels, 1, *kernel.shape)
    return conv2d(x, kernel, padding=padding, groups=channels)


def _normalise(x: Tensor) -> Tensor:
    """To a mean square of 1 over each sample."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + _EPSILON)


def _width(base_channels: int, resolution: int) -> int:
    return min(base_channels, _WIDTH_TIMES_RESOLUTION // resolution)
