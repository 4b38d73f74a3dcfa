"""BigGAN against explicit loops, formulas by hand, singular values and counts by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ganscale.models.biggan import BigganDiscriminator, BigganGenerator, SelfAttention

CHANNELS, NUM_CLASSES = 4, 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def generator(resolution: int = 16, **changes: Any) -> BigganGenerator:
    """Latent in parts of 4; two forwards have settled its statistics and spectral norms."""
    z_dim = 4 * (resolution.bit_length() - 2)
    options = {"img_channels": 3, "base_channels": CHANNELS, "num_classes": NUM_CLASSES}
    G = BigganGenerator(resolution=resolution, z_dim=z_dim, **(options | changes))
    for _ in range(2):
        G(torch.randn(8, z_dim), torch.arange(8) % NUM_CLASSES)
    return G


def discriminator(resolution: int = 16, **changes: Any) -> BigganDiscriminator:
    options = {"img_channels": 3, "base_channels": CHANNELS, "num_classes": NUM_CLASSES}
    options |= changes
    D = BigganDiscriminator(resolution=resolution, **options)
    for _ in range(2):
        D(torch.randn(4, options["img_channels"], resolution, resolution), torch.arange(4) % 3)
    return D


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def weighted(module: nn.Module) -> dict[str, Any]:
    kinds = (nn.Conv2d, nn.Linear, nn.Embedding)
    return {name: part for name, part in module.named_modules() if isinstance(part, kinds)}


def inputs(resolution: int = 16, number: int = 4) -> tuple[Tensor, Tensor]:
    z = torch.randn(number, 4 * (resolution.bit_length() - 2))
    return z, torch.arange(number) % NUM_CLASSES


def test_self_attention_is_a_softmax_loop_over_positions() -> None:
    layer = SelfAttention(16).double()
    nn.init.constant_(layer.gamma, 0.7)
    x = torch.randn(2, 16, 4, 6, dtype=torch.float64)
    key_weight, query_weight, value_weight, out_weight = (
        conv.weight.detach()[:, :, 0, 0]
        for conv in (layer.key, layer.query, layer.value, layer.project)
    )
    expected = x.clone()
    squares = [(2 * row, 2 * column) for row in range(2) for column in range(3)]
    for n in range(2):
        cells = {(i, j): x[n, :, i, j] for i in range(4) for j in range(6)}
        keys, values = [], []
        for i, j in squares:
            square = [cells[i + a, j + b] for a in (0, 1) for b in (0, 1)]
            keys.append(torch.stack([key_weight @ cell for cell in square]).amax(0))
            values.append(torch.stack([value_weight @ cell for cell in square]).amax(0))
        for (i, j), cell in cells.items():
            shares = [math.exp(float((query_weight @ cell) @ key)) for key in keys]
            mixed = sum(
                (share / sum(shares) * v for share, v in zip(shares, values, strict=True)),
                torch.zeros(8, dtype=torch.float64),
            )
            expected[n, :, i, j] += 0.7 * (out_weight @ mixed)
    torch.testing.assert_close(layer(x), expected)


def test_self_attention_starts_as_the_identity_and_can_learn() -> None:
    layer, x = SelfAttention(16), torch.randn(2, 16, 8, 8)
    assert torch.equal(layer(x), x)
    layer(x).square().sum().backward()
    assert layer.gamma.grad is not None
    assert float(layer.gamma.grad) != 0


def test_attention_scores_beyond_half_precision_stay_finite() -> None:
    layer = SelfAttention(16)
    nn.init.constant_(layer.gamma, 1.0)
    x = torch.randn(1, 16, 4, 4) * 1e3
    with torch.autocast("cpu", dtype=torch.float16):
        assert layer.attend(x).dtype == torch.float32
        assert torch.isfinite(layer(x.half())).all()


@pytest.mark.parametrize(("resolution", "size"), [(16, 8), (32, 16), (64, 16)])
def test_attention_sees_the_middle_of_both_players(resolution: int, size: int) -> None:
    seen: list[int] = []
    G, D = generator(resolution), discriminator(resolution)
    for player in (G, D):
        for part in player.modules():
            if isinstance(part, SelfAttention):
                part.register_forward_hook(lambda _module, x, _out: seen.append(x[0].shape[-1]))
    z, labels = inputs(resolution)
    D(G(z, labels), labels)
    assert seen == [size, size]


def test_a_block_of_the_generator_is_the_formula_of_the_paper() -> None:
    G = generator().double()
    block: Any = G.blocks[1]
    x, condition = torch.randn(3, 16, 8, 8).double(), torch.randn(3, 4 + 128).double()
    block.eval()
    block.norm1.norm.running_mean.normal_()
    block.norm2.norm.running_var.uniform_(0.5, 2)

    def norm(layer: Any, x: Tensor) -> Tensor:
        mean, var = layer.norm.running_mean, layer.norm.running_var
        rows = []
        for image, c in zip(x, condition, strict=True):
            gain, bias = 1 + layer.gain.weight @ c, layer.bias.weight @ c
            centred = image - mean[:, None, None]
            scale = gain / (var + 1e-5).sqrt()
            rows.append(centred * scale[:, None, None] + bias[:, None, None])
        return torch.stack(rows)

    def twice(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def conv(layer: Any, x: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, layer.weight, layer.bias, padding=padding)

    h = conv(block.conv1, twice(norm(block.norm1, x).relu()), 1)
    h = conv(block.conv2, norm(block.norm2, h).relu(), 1)
    torch.testing.assert_close(block(x, condition), h + conv(block.shortcut, twice(x), 0))


@pytest.mark.parametrize(("index", "activates"), [(0, False), (2, True)])
def test_a_block_of_the_discriminator_halves_the_sum_of_both_paths(
    index: int, activates: bool
) -> None:
    block: Any = discriminator(32).eval().blocks[index]
    x = torch.randn(2, block.conv1.in_channels, 8, 8)
    h = F.conv2d(x.relu() if activates else x, block.conv1.weight, block.conv1.bias, padding=1)
    h = F.conv2d(h.relu(), block.conv2.weight, block.conv2.bias, padding=1)
    total = h + F.conv2d(x, block.shortcut.weight, block.shortcut.bias)
    expected = total.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    torch.testing.assert_close(block(x), expected)


def test_the_last_blocks_of_the_discriminator_stay_at_8x8_and_are_summed() -> None:
    D = discriminator(32).eval()
    plain: Any = D.blocks[4]
    x = torch.randn(2, 2 * CHANNELS, 8, 8)
    h = F.conv2d(x.relu(), plain.conv1.weight, plain.conv1.bias, padding=1).relu()
    h = F.conv2d(h, plain.conv2.weight, plain.conv2.bias, padding=1)
    torch.testing.assert_close(plain(x), x + h)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([2, 0])
    maps = D.blocks(images)
    assert maps.shape == (2, 2 * CHANNELS, 8, 8)
    features = maps.clamp(min=0).flatten(2).sum(2)
    head: Any = D.head
    weights = head.linear.weight + head.embedding.weight[labels]
    expected = (features * weights).sum(1) + head.linear.bias
    torch.testing.assert_close(D(images, labels), expected)


@pytest.mark.parametrize("player", [generator, discriminator])
def test_weights_start_orthogonal_and_biases_at_zero(player: Any) -> None:
    for name, part in weighted(player()).items():
        normed = parametrize.is_parametrized(part)
        weight = part.parametrizations.weight.original if normed else part.weight
        matrix = weight.detach().flatten(1)
        matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
        identity = torch.eye(len(matrix))
        torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-5, msg=name)
        if getattr(part, "bias", None) is not None:
            assert not part.bias.any(), name


@pytest.mark.parametrize("player", [generator, discriminator])
def test_every_weight_but_the_class_embedding_has_a_spectral_norm_of_1(player: Any) -> None:
    model = player()
    labels = torch.zeros(2).long()
    with torch.no_grad():
        for part in weighted(model).values():
            for parameter in part.parameters():
                parameter.mul_(3).add_(torch.randn_like(parameter))
        for _ in range(40):
            model(torch.randn(2, 12) if player is generator else torch.randn(2, 3, 16, 16), labels)
    free = [n for n, part in weighted(model).items() if not parametrize.is_parametrized(part)]
    assert free == (["embedding"] if player is generator else [])
    model.eval()
    for name, part in weighted(model).items():
        largest = float(torch.linalg.svdvals(part.weight.detach().flatten(1))[0])
        assert name in free or largest == pytest.approx(1, rel=0.03), name


def test_each_part_of_the_latent_and_the_label_change_the_image() -> None:
    G = generator(32).eval()
    z, labels = inputs(32)
    before = G(z, labels)
    for part in range(4):
        moved = z.clone()
        moved[:, 4 * part : 4 * part + 4] += 1.0
        assert not torch.allclose(G(moved, labels), before, atol=1e-4), part
    assert not torch.allclose(G(z, (labels + 1) % NUM_CLASSES), before, atol=1e-4)
    D = discriminator().eval()
    images = torch.randn(4, 3, 16, 16)
    assert not torch.allclose(D(images, labels), D(images, (labels + 1) % NUM_CLASSES), atol=1e-4)


def test_a_block_is_conditioned_on_its_part_of_the_latent_and_the_shared_embedding() -> None:
    G, seen = generator(32), []
    for block in G.blocks:
        block.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[1]))
    z, labels = inputs(32)
    G(z, labels)
    assert len(seen) == 3
    for index, condition in enumerate(seen):
        part = z[:, 4 + 4 * index : 8 + 4 * index]
        torch.testing.assert_close(condition, torch.cat([part, G.embedding.weight[labels]], dim=1))


def test_in_evaluation_an_image_and_a_logit_depend_on_no_other_of_their_batch() -> None:
    G, D = generator().eval(), discriminator().eval()
    z, labels = inputs()
    images = G(z, labels)
    logits = D(images, labels)
    for n in range(4):
        alone = G(z[n : n + 1], labels[n : n + 1])
        torch.testing.assert_close(alone[0], images[n], rtol=0, atol=1e-5)
        logit = D(images[n : n + 1], labels[n : n + 1])
        torch.testing.assert_close(logit[0], logits[n], rtol=1e-5, atol=1e-5)


def test_the_gradient_of_r1_is_its_finite_difference() -> None:
    D = discriminator().double().eval()
    nn.init.constant_(next(p for n, p in D.named_parameters() if n.endswith("gamma")), 0.5)
    images, labels = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 2])
    parameters = dict(D.named_parameters())
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}

    def r1(step: float) -> Tensor:
        moved = {name: p + step * directions[name] for name, p in parameters.items()}
        x = images.clone().requires_grad_()
        logits = torch.func.functional_call(D, moved, (x, labels))
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return gradient.square().sum()

    gradients = torch.autograd.grad(r1(0.0), list(parameters.values()), allow_unused=True)
    pairs = zip(gradients, directions.values(), strict=True)
    slope = sum(float((g * d).sum()) for g, d in pairs if g is not None)
    step = 1e-7
    difference = float((r1(step) - r1(-step)).detach()) / (2 * step)
    assert slope == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_fp32(dtype: torch.dtype) -> None:
    G, D = generator().eval(), discriminator().eval()
    z, labels = inputs(number=8)
    real = torch.randn(8, 3, 16, 16)
    images, logits = G(z, labels), D(real, labels)
    with torch.autocast("cpu", dtype=dtype):
        half_images, half_logits = G(z, labels), D(real, labels)
    assert half_images.dtype == half_logits.dtype == torch.float32
    for half, full in ((half_images, images), (half_logits, logits)):
        assert not torch.equal(half, full)
        error = (half - full).square().mean().sqrt() / full.square().mean().sqrt()
        assert float(error.detach()) < (0.01 if dtype == torch.float16 else 0.06)


@pytest.mark.parametrize("resolution", [16, 32, 64])
@pytest.mark.parametrize("img_channels", [1, 3, 4])
def test_every_resolution_and_number_of_channels_trains(resolution: int, img_channels: int) -> None:
    G = generator(resolution, img_channels=img_channels)
    D = discriminator(resolution, img_channels=img_channels)
    z, labels = inputs(resolution)
    images = G(z, labels)
    assert images.shape == (4, img_channels, resolution, resolution)
    assert float(images.detach().abs().max()) <= 1
    logits = D(images, labels)
    assert logits.shape == (4,)
    logits.sum().backward()
    for player in (G, D):
        for name, parameter in player.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def test_a_copy_takes_the_state_of_a_trained_model() -> None:
    for model, first in ((generator(), inputs()[0]), (discriminator(), torch.randn(4, 3, 16, 16))):
        labels = torch.arange(4) % NUM_CLASSES
        other = copy.deepcopy(model)
        for _ in range(3):
            model(first, labels)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.eval()
        other.eval()
        assert not torch.equal(other(first, labels), model(first, labels))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(first, labels), model(first, labels))


def test_a_latent_that_cannot_be_split_names_the_fix() -> None:
    with pytest.raises(ValueError, match=r"z_dim=80 .* 3 parts .* multiple of 3, such as 81"):
        BigganGenerator(
            resolution=16, img_channels=3, z_dim=80, base_channels=4, num_classes=NUM_CLASSES
        )


def test_the_cifar_form_has_as_many_parameters_as_counted_by_hand() -> None:
    common = {"resolution": 32, "img_channels": 3, "base_channels": 96, "num_classes": 10}
    G, D = BigganGenerator(**common, z_dim=80), BigganDiscriminator(**common)

    def conv(a: int, b: int, k: int) -> int:
        return a * b * k * k + b

    def attention(c: int) -> int:
        return 2 * c * (c // 8) + 2 * c * (c // 2) + 1

    norms = 2 * 2 * 384 * (20 + 128)
    blocks = 3 * (2 * conv(384, 384, 3) + conv(384, 384, 1) + norms)
    ends = 10 * 128 + (20 + 1) * 384 * 16 + 2 * 384 + conv(384, 3, 3)
    assert num_parameters(G) == blocks + ends + attention(384)
    first = conv(3, 192, 3) + conv(192, 192, 3) + conv(3, 192, 1)
    blocks = 6 * conv(192, 192, 3) + conv(192, 192, 1)
    assert num_parameters(D) == first + blocks + attention(192) + 193 + 10 * 192


def test_beyond_32x32_widths_halve_with_every_doubling() -> None:
    G, D = generator(128), discriminator(128)
    blocks: list[Any] = list(G.blocks)
    assert [block.conv2.out_channels for block in blocks] == [16, 16, 16, 8, 4]
    downs: list[Any] = [block for block in D.blocks if not isinstance(block, SelfAttention)]
    assert [block.conv2.out_channels for block in downs] == [2, 4, 8, 8, 8, 8]
