"""What a step adds to the objective, and what it feeds back: against figures made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ganscale.config import AugmentConfig, Config, OptimizerConfig, Schedule
from ganscale.generation.latents import StepRandomness
from ganscale.training.adversarial_step import PhaseResult
from ganscale.training.build import build_state, load_shards
from ganscale.training.feedback import Feedback
from ganscale.training.loop import Trainer
from ganscale.training.methods.gan import Gan
from ganscale.training.opponent import penalty_weights
from ganscale.training.players import Player
from ganscale.training.precision import Precision
from ganscale.training.share import Moment, Share
from ganscale.world import World, process_group
from tests.conftest import MakeConfig
from tests.support.devices import on_each_device
from tests.support.small_models import SMALL_MODELS

CPU = torch.device("cpu")
FP32 = Precision.resolve("fp32", CPU)
BATCH_SIZE = 8


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(World()):
        yield


def configured(model: str = "r3gan", **sections: Any) -> Config:
    training = {"batch_size": BATCH_SIZE, "precision": "fp32", **sections.pop("training", {})}
    return Config(model=SMALL_MODELS[model], training=training, **sections)


def game(
    config: Config, weights: int = 3, precision: Precision = FP32, device: str = "cpu"
) -> tuple[Gan, Share]:
    """Players without zeros of an initialisation, and a batch of eight."""
    gan = build_state(config, precision, World(device=device)).method
    assert isinstance(gan, Gan)
    torch.manual_seed(weights)
    for player in gan.players.values():
        for parameter in player.module.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape).to(device))
    images = (torch.rand(BATCH_SIZE, 3, 16, 16) * 2 - 1).to(device)
    labels = torch.arange(BATCH_SIZE, device=device) if config.model.num_classes else None
    slots = torch.arange(BATCH_SIZE)
    random = StepRandomness(0, 0, BATCH_SIZE, slots, torch.device(device))
    return gan, Share(images, labels, random, config.model.z_dim, 1 / BATCH_SIZE)


def gradients(player: Player) -> list[torch.Tensor]:
    return [p.grad.clone() for p in player.module.parameters() if p.grad is not None]


def test_lazy_penalties_come_at_every_so_many_steps_so_many_times_as_strong() -> None:
    config = configured(penalty={"r1": 0.5, "wgan_gp": 2.0, "lecam": 0.1, "interval": 4})
    often = {"lecam": 0.1}
    expected = [{"r1": 2.0, "wgan_gp": 8.0, **often}, often, often, often]
    assert [penalty_weights(config, nimg=0, step=step) for step in (4, 5, 6, 7)] == expected


def test_the_weight_of_a_penalty_follows_its_schedule() -> None:
    way = {"start": 1.0, "end": 0.0, "kimg": 1, "shape": "linear"}
    config = configured(penalty={"r1": way, "form": "finite_difference"})
    found = [penalty_weights(config, nimg=nimg, step=0) for nimg in (0, 500, 1000)]
    assert found == [{"r1_finite_difference": 1.0}, {"r1_finite_difference": 0.5}, {}]


def test_a_penalty_that_comes_later_is_a_statistic_from_the_start(
    make_config: MakeConfig,
) -> None:
    way = {"start": 0.0, "end": 1.0, "kimg": 1, "shape": "linear"}
    config = make_config(penalty={"r1": way})
    trainer = Trainer(config, World(), load_shards(config))
    for _ in range(2):
        trainer.step(trainer.reader.read(trainer.state.nimg, config.training.batch_size))
    means = trainer.state.means.averages(lambda sums: sums, 1)
    trainer.close()
    assert means["train/penalty_r1"] > 0


def test_a_penalty_adds_its_weighted_gradient() -> None:
    found = []
    for weight in (0.0, 1.0, 3.0):
        config = configured(penalty={"r1": weight})
        gan, share = game(config)
        gan.discriminator_phase(share, gan.opponent.rules(Moment()))
        found.append(torch.cat([g.flatten() for g in gradients(gan.opponent.player)]))
    without, once, thrice = found
    assert (once - without).norm() > 1e-3
    torch.testing.assert_close(thrice - without, 3 * (once - without), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", ["dcgan", "r3gan", "sngan", "stylegan2"])
@pytest.mark.parametrize("penalty", ["r1", "r2", "wgan_gp", "dragan"])
@on_each_device
def test_a_penalty_in_fp16_is_that_in_fp32_at_any_loss_scale(
    model: str, penalty: str, device: str
) -> None:
    values = {}
    for scale in (None, 2.0**8, 2.0**14, 2.0**20):
        precision = Precision.resolve("fp16" if scale else "fp32", torch.device(device))
        config = configured(model, penalty={penalty: 1.0})
        # With weights 3 rounding moves a kink of DCGAN's: worth 1.1e-2 of DRAGAN's in eight images.
        gan, share = game(config, 100, precision, device)
        if scale is not None:
            scaler = precision.scaler()
            scaler.load_state_dict({**scaler.state_dict(), "scale": scale})
            gan.opponent.player.scaler = scaler
            assert scaler.scale == scale
        phase = gan.discriminator_phase(share, gan.opponent.rules(Moment()))
        values[scale] = phase.penalties[penalty].item()
    exact = values.pop(None)
    assert exact > 1e-6
    assert list(values.values()) == pytest.approx([exact] * 3, rel=1e-2)


def test_top_k_learns_from_the_best_half_alone() -> None:
    config = configured(objective={"top_k": 0.5})
    gan, share = game(config)
    gan.generator_phase(share, gan.opponent.rules(Moment()))
    found = gradients(gan.generator)

    gan.generator.optimizer.zero_grad()
    z = share.random.normal("G z", share.z_dim)
    images = gan.generator.module(z, share.labels)
    logits = gan.opponent.player.module(images, share.labels)
    best = logits.sort().values[BATCH_SIZE // 2 :]
    nn.functional.softplus(-best).mean().backward()
    for mine, expected in zip(found, gradients(gan.generator), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-7)


def test_the_generators_phase_leaves_the_discriminators_gradients_alone() -> None:
    config = configured(objective={"name": "relativistic"})
    gan, share = game(config)
    gan.generator_phase(share, gan.opponent.rules(Moment()))
    assert gradients(gan.opponent.player) == []
    assert all(p.requires_grad for p in gan.opponent.player.module.parameters())


def seen(real: float, fake: float, sign: float) -> PhaseResult:
    return PhaseResult(
        loss=torch.tensor(0.0),
        fake_logits=torch.tensor(fake),
        real_logits=torch.tensor(real),
        real_signs=torch.tensor(sign),
    )


def test_ada_moves_p_by_a_constant_step_towards_the_target() -> None:
    config = AugmentConfig(name="ada", target=0.6, adapt_kimg=1)
    feedback = Feedback(config, 1, CPU)
    strengths = []
    for step, sign in enumerate([1.0, 0.9, 0.7, 0.8, *[0.2] * 4, *[0.1] * 4, *[0.61] * 4]):
        feedback.update(seen(0.0, 0.0, sign), step=step, batch_size=100)
        strengths.append(feedback.augment_p.item())
    # Four steps of 100 images are 0.4 of a kimg, in which p may go from 0 to 1.
    assert strengths == pytest.approx([0.0] * 3 + [0.4] * 4 + [0.0] * 8 + [0.4])


def test_lecams_anchors_are_running_means_and_ignore_a_skipped_step() -> None:
    feedback = Feedback(AugmentConfig(), 1, CPU)
    expected = torch.zeros(2)
    for step, (real, fake) in enumerate([(2.0, -1.0), (1.0, 0.5)]):
        feedback.update(seen(real, fake, 1.0), step=step, batch_size=8)
        expected = 0.99 * expected + 0.01 * torch.tensor([real, fake])
    torch.testing.assert_close(feedback.anchors, expected)
    feedback.update(seen(torch.inf, 0.0, 1.0), step=2, batch_size=8)
    torch.testing.assert_close(feedback.anchors, expected)


def learnt(config: OptimizerConfig, nimg: int = 0, **options: Any) -> tuple[Player, torch.Tensor]:
    """A player of two weights after a step on the gradient (3, 4); its norm is returned too."""
    player = Player(nn.Linear(2, 1, bias=False), config, FP32, World(), **options)
    player.backward(player.network(torch.tensor([[3.0, 4.0]])).sum())
    return player, player.step(nimg)


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ({}, [3.0, 4.0]),
        ({"clip_norm": 1.0}, [0.6, 0.8]),
        ({"clip_norm": 10.0}, [3.0, 4.0]),
        ({"clip_value": 3.5}, [3.0, 3.5]),
    ],
)
def test_gradients_are_clipped_before_the_step_and_their_norm_told_unclipped(
    clip: dict[str, float], expected: list[float]
) -> None:
    player, norm = learnt(OptimizerConfig(beta1=0.0, **clip))
    assert norm.item() == pytest.approx(5.0)
    (moments,) = player.optimizer.state.values()
    assert moments["exp_avg"].flatten().tolist() == pytest.approx(expected)


def test_rates_are_those_of_the_position() -> None:
    config = OptimizerConfig(
        lr=Schedule(start=0.1, end=0.3, kimg=1, shape="linear"),
        beta2=Schedule(start=0.5, end=0.9, kimg=1, shape="linear"),
    )
    torch.manual_seed(0)
    before = nn.Linear(2, 1, bias=False).weight.detach().clone()
    torch.manual_seed(0)
    player, _ = learnt(config, nimg=500)
    weight = player.module.weight
    assert isinstance(weight, torch.Tensor)
    torch.testing.assert_close(weight.detach(), before - 0.2)  # Adam's first step is lr * sign
    (moments,) = player.optimizer.state.values()
    torch.testing.assert_close(moments["exp_avg_sq"], 0.3 * torch.tensor([[9.0, 16.0]]))


def test_weights_are_clipped_after_the_step() -> None:
    player, _ = learnt(OptimizerConfig(lr=Schedule.constant(5.0)), clip_weights=0.01)
    weight = player.module.weight
    assert isinstance(weight, torch.Tensor)
    assert weight.flatten().tolist() == pytest.approx([-0.01, -0.01])


def test_the_generator_learns_at_every_so_manieth_step(make_config: MakeConfig) -> None:
    config = make_config(training__discriminator_steps=3)
    trainer = Trainer(config, World(), load_shards(config))
    moved = []
    for _ in range(6):
        before = next(trainer.state.method.players["G"].module.parameters()).detach().clone()
        trainer.step(trainer.reader.read(trainer.state.nimg, config.training.batch_size))
        after = next(trainer.state.method.players["G"].module.parameters())
        moved.append(not torch.equal(before, after))
    trainer.close()
    assert moved == [False, False, True, False, False, True]
    assert trainer.state.nimg == 6 * config.training.batch_size


@pytest.mark.parametrize("model", ["dcgan", pytest.param("r3gan", marks=pytest.mark.slow)])
@on_each_device
def test_compiled_players_lose_alike(make_config: MakeConfig, model: str, device: str) -> None:
    losses = []
    for compiled in (False, True):
        config = configured(
            model,
            training={"compile": compiled},
            penalty={"r1": 0.1, "form": "finite_difference"},
        )
        gan, share = game(config, precision=FP32, device=device)
        d = gan.discriminator_phase(share, gan.opponent.rules(Moment()))
        g = gan.generator_phase(share, gan.opponent.rules(Moment()))
        losses.append(torch.stack([d.loss, g, *d.penalties.values()]))
        if compiled:
            assert gan.opponent.player.module._compiled_call_impl is not None
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)
