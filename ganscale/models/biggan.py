"""BigGAN (Brock et al. 2019, arXiv 1809.11096), the CIFAR form: class-conditional only.

Residual networks with spectral norm on every weight (but the generator's class embedding) and
orthogonal initialisation. The latent is split: a part enters the first layer, and one more with the
class embedding sets the batch norm gains and biases of each block. Self-attention (Zhang et al.
2019, arXiv 1805.08318) at 16x16, or at 8x8 of 16x16 images. `base_channels` is ch of the paper (96
in StudioGAN's configuration for CIFAR): the generator is 4 ch wide up to 32x32 and the
discriminator 2 ch, halved with every doubling beyond. The first linear layer, attention weights,
image and logit stay fp32.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.models.conditioning import ConditionalBatchNorm2d, ProjectionHead
from ganscale.models.convolution import Conv2d
from ganscale.models.layers import FullPrecision, spectral_norm_everywhere, without_autocast
from ganscale.models.residual import DownBlock, UpBlock, width_at

_EMBEDDING_DIM = 128
_ATTENTION_RESOLUTION = 16


class BigganGenerator(nn.Module):
    """Latents (N, z_dim), labels (N,) to images (N, img_channels, resolution, resolution), [-1, 1].

    Nothing in the forward is random. z_dim must be a multiple of one part for the first layer and
    one for each doubling from 4x4.
    """

    def __init__(
        self,
        *,
        resolution: int,
        img_channels: int,
        z_dim: int,
        base_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        assert num_classes >= 1, "BigGAN is class-conditional"
        sizes = [8 << level for level in range(resolution.bit_length() - 3)]
        self.part_dim = _part_dim(z_dim, 1 + len(sizes))
        self.embedding = nn.Embedding(num_classes, _EMBEDDING_DIM)
        width = width_at(4, 4 * base_channels)
        # The first part of the latent enters here, the others one block each (the paper's appendix
        # B).
        self.linear = FullPrecision(nn.Linear(self.part_dim, width * 4 * 4))
        self.blocks, self.attentions = nn.ModuleList(), nn.ModuleList()
        norm = partial(_conditional_norm, condition_dim=self.part_dim + _EMBEDDING_DIM)
        for size in sizes:
            out = width_at(size, 4 * base_channels)
            self.blocks.append(UpBlock(width, out, norm(width), norm(out)))
            attended = size == _attention_size(resolution)
            self.attentions.append(SelfAttention(out) if attended else nn.Identity())
            width = out
        self.last = FullPrecision(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, img_channels, 3, padding=1),
            nn.Tanh(),
        )
        _initialise(self)
        spectral_norm_everywhere(self, besides=self.embedding)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None, "a class-conditional model needs labels"
        embedded = self.embedding(labels)
        first, *parts = z.split(self.part_dim, dim=1)
        x: Tensor = self.linear(first).unflatten(1, (-1, 4, 4))
        for block, attention, part in zip(self.blocks, self.attentions, parts, strict=True):
            x = attention(block(x, torch.cat([part, embedded], dim=1)))
        images: Tensor = self.last(x)
        return images


class BigganDiscriminator(nn.Module):
    """Images (N, img_channels, resolution, resolution), labels (N,) to logits (N,), fp32.

    Positive means real. Blocks halve the image down to 8x8 and two more stay there.
    """

    def __init__(
        self, *, resolution: int, img_channels: int, base_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        assert num_classes >= 1, "BigGAN is class-conditional"
        before, size = img_channels, resolution
        blocks: list[nn.Module] = []
        while size > 8:
            width = width_at(size, 2 * base_channels)
            blocks.append(DownBlock(before, width, down=True, first=not blocks))
            before, size = width, size // 2
            if size == _attention_size(resolution):
                blocks.append(SelfAttention(width))
        width = width_at(8, 2 * base_channels)
        for _ in range(2):
            blocks.append(DownBlock(before, width, down=False))
            before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = ProjectionHead(nn.Linear(width, 1), nn.Embedding(num_classes, width))
        _initialise(self)
        spectral_norm_everywhere(self)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x: Tensor = self.blocks(images).relu()
        # Summed and not averaged, as in the paper; in fp32, as a sum of 64 values has more digits
        # than half precision holds.
        features = x.sum(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        logits: Tensor = self.head(features, labels)
        return logits


class SelfAttention(nn.Module):
    """x + gamma o(x) over the positions of a map (N, C, H, W), gamma starting at 0.

    Zhang et al. (2019), equations 1 to 3: o is a projection of sum_i beta_ji h(x_i), where beta_j
    is the softmax over i of <f(x_i), g(x_j)>. Queries g and keys f have C / 8 channels. As in Wang
    et al. (2018, arXiv 1711.07971, section 3.3) the values h have C / 2, and keys and values are
    the maxima of 2x2 squares.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner, values = max(1, channels // 8), max(1, channels // 2)
        self.query = Conv2d(channels, inner, 1, bias=False)
        self.key = Conv2d(channels, inner, 1, bias=False)
        self.value = Conv2d(channels, values, 1, bias=False)
        self.project = Conv2d(values, channels, 1, bias=False)
        # At the start attention adds nothing; the network learns how much of it to let in.
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.project(self.attend(x).to(x.dtype))
        return x + self.gamma * attended

    def attend(self, x: Tensor) -> Tensor:
        """The values averaged with each position's attention weights, (N, C / 2, H, W), fp32."""
        query = self.query(x).flatten(2)
        # A quarter of the positions to attend to: a quarter of the scores, which are the memory
        # here.
        key = F.max_pool2d(self.key(x), 2).flatten(2)
        value = F.max_pool2d(self.value(x), 2).flatten(2)
        dtype = torch.promote_types(query.dtype, torch.float32)
        with without_autocast(x):
            # Scores are not divided by a root of the width, so they may leave the range of fp16.
            scores = query.to(dtype).transpose(1, 2) @ key.to(dtype)  # (N, HW, HW / 4)
            mixed: Tensor = value.to(dtype) @ scores.softmax(dim=2).transpose(1, 2)
        return mixed.view(*mixed.shape[:2], *x.shape[2:])


def _conditional_norm(num_features: int, condition_dim: int) -> ConditionalBatchNorm2d:
    gain, bias = (nn.Linear(condition_dim, num_features, bias=False) for _ in range(2))
    return ConditionalBatchNorm2d(num_features, gain, bias)


def _part_dim(z_dim: int, num_parts: int) -> int:
    if z_dim % num_parts:
        below = z_dim - z_dim % num_parts
        raise ValueError(
            f"z_dim={z_dim} cannot be split evenly into the {num_parts} parts that this resolution "
            f"takes: choose a multiple of {num_parts}, such as {below + num_parts}"
        )
    return z_dim // num_parts


def _attention_size(resolution: int) -> int:
    """Side of the map that attention sees: 16, or half the image if that is less."""
    return min(_ATTENTION_RESOLUTION, resolution // 2)


def _initialise(module: nn.Module) -> None:
    """Orthogonal weights (Saxe et al. 2014, arXiv 1312.6120), no biases."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear | nn.Embedding):
            nn.init.orthogonal_(part.weight)
            bias = getattr(part, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)
