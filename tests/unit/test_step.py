"""What a step minimises, and the state that follows its logits: against figures made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from ganscale.config import AugmentConfig, Config, OptimizerConfig, Schedule
from ganscale.models import elementwise
from ganscale.training.adaptive import AdaController, LecamAnchors, ada_p_step
from ganscale.training.build import build_state, load_shards
from ganscale.training.loop import Trainer
from ganscale.training.optimized_model import OptimizedModel
from ganscale.training.precision import Precision
from ganscale.training.step_inputs import LocalBatch, Rates
from ganscale.training.steps.adversarial_schedules import penalty_weights
from ganscale.training.steps.gan import Gan
from ganscale.world import World, process_group
from tests.conftest import MakeConfig
from tests.support.devices import on_each_device
from tests.support.small_models import SMALL_MODELS
from tests.support.steps import local_batch, next_inputs, recorded_gradients, step_inputs

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


def gan_and_batch(
    config: Config, weights: int = 3, precision: Precision = FP32, device: str = "cpu"
) -> tuple[Gan, LocalBatch]:
    """A GAN without the zeros of an initialisation, and a batch of eight."""
    gan = build_state(config, precision, World(device=device)).method
    assert isinstance(gan, Gan)
    torch.manual_seed(weights)
    for model in gan.models.values():
        for parameter in model.module.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape).to(device))
    images = (torch.rand(BATCH_SIZE, 3, 16, 16) * 2 - 1).to(device)
    labels = torch.arange(BATCH_SIZE, device=device) if config.model.num_classes else None
    return gan, local_batch(images, labels)


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
        trainer.step(next_inputs(trainer))
    means = trainer.state.means.averages(lambda sums: sums, 1)
    trainer.close()
    assert means["train/penalty_r1"] > 0


def test_a_penalty_adds_its_weighted_gradient() -> None:
    gradients = []
    for weight in (0.0, 1.0, 3.0):
        gan, batch = gan_and_batch(configured(penalty={"r1": weight}))
        with recorded_gradients(gan.discriminator.model) as recorded:
            gan.update_discriminator(*step_inputs(gan, batch))
        gradients.append(torch.cat([g.flatten() for g in recorded]))
    without, once, thrice = gradients
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
        gan, batch = gan_and_batch(config, 100, precision, device)
        if scale is not None:
            scaler = precision.scaler()
            scaler.load_state_dict({**scaler.state_dict(), "scale": scale})
            gan.discriminator.model.scaler = scaler
            assert scaler.scale == scale
        statistics = gan.update_discriminator(*step_inputs(gan, batch))
        values[scale] = statistics[f"penalty_{penalty}"].item()
    exact = values.pop(None)
    assert exact > 1e-6
    assert list(values.values()) == pytest.approx([exact] * 3, rel=1e-2)


def test_top_k_learns_from_the_best_half_alone() -> None:
    gan, batch = gan_and_batch(configured(objective={"top_k": 0.5}))
    inputs, variant = step_inputs(gan, batch)
    images = gan.generator.module(inputs.noise["G z"], batch.labels)
    logits = gan.discriminator.model.module(images, batch.labels)
    best = logits.sort().values[BATCH_SIZE // 2 :]
    loss = nn.functional.softplus(-best).mean()
    parameters = list(gan.generator.module.parameters())
    expected = torch.autograd.grad(loss, parameters)
    with recorded_gradients(gan.generator) as gradients:
        statistics = gan.update_generator(inputs, variant)
    torch.testing.assert_close(statistics["loss_G"], loss.detach())
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("model", ["dcgan", "r3gan", "stylegan2-classes"])
def test_shared_fakes_are_those_of_equal_latents_at_one_forward(model: str) -> None:
    weights, num_forwards = [], []
    for shared in (False, True):
        config = configured(model, training={"shared_fakes": shared})
        gan, batch = gan_and_batch(config)
        forwards: list[int] = []
        gan.generator.module.register_forward_hook(lambda *_, count=forwards: count.append(1))
        inputs, variant = step_inputs(gan, batch)
        assert ("G z" in inputs.noise) is not shared
        noise = {**inputs.noise, "G z": inputs.noise["D z"]}
        gan.step(replace(inputs, noise=noise), variant)
        parameters = [p for m in gan.models.values() for p in m.module.parameters()]
        weights.append([p.detach().clone() for p in parameters])
        num_forwards.append(len(forwards))
    assert num_forwards == [2, 1]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_with_shared_fakes_a_step_of_the_discriminator_alone_records_no_gradients() -> None:
    training = {"shared_fakes": True, "discriminator_steps": 2}
    gan, batch = gan_and_batch(configured(training=training))
    inputs, variant = step_inputs(gan, batch, discriminator_steps=2)
    assert not variant.generator_turn
    before = [p.detach().clone() for p in gan.generator.module.parameters()]
    gan.step(inputs, variant)
    assert all(map(torch.equal, gan.generator.module.parameters(), before))
    assert gan._shared_fakes is None


def test_the_generators_update_gives_the_discriminator_no_gradients() -> None:
    gan, batch = gan_and_batch(configured(objective={"name": "relativistic"}))
    gan.update_generator(*step_inputs(gan, batch))
    parameters = list(gan.discriminator.model.module.parameters())
    assert all(parameter.grad is None for parameter in parameters)
    assert all(parameter.requires_grad for parameter in parameters)


def test_what_follows_the_logits_may_be_new_to_a_run() -> None:
    gan, _ = gan_and_batch(configured(augment={"name": "ada", "target": 0.6}))
    gan.load_state_dict({})
    assert gan.discriminator.ada is not None
    assert float(gan.discriminator.ada.p) == 0


def test_ada_moves_p_by_a_constant_step_towards_the_target() -> None:
    config = AugmentConfig(name="ada", target=0.6, adapt_kimg=1)
    ada = AdaController(config, CPU)
    strengths = []
    for step, sign in enumerate([1.0, 0.9, 0.7, 0.8, *[0.2] * 4, *[0.1] * 4, *[0.61] * 4]):
        ada.update(torch.tensor(sign), torch.tensor(ada_p_step(config, step, batch_size=100)))
        strengths.append(ada.p.item())
    # Four steps of 100 images are 0.4 of a kimg, in which p may go from 0 to 1.
    assert strengths == pytest.approx([0.0] * 3 + [0.4] * 4 + [0.0] * 8 + [0.4])


def test_lecams_anchors_are_running_means() -> None:
    anchors = LecamAnchors(CPU)
    expected = torch.zeros(2)
    for logits in ([2.0, -1.0], [1.0, 0.5]):
        anchors.update(torch.tensor(logits))
        expected = 0.99 * expected + 0.01 * torch.tensor(logits)
    torch.testing.assert_close(anchors.values, expected)


def test_a_step_that_is_skipped_moves_neither_ada_nor_lecam() -> None:
    config = configured(augment={"name": "ada", "target": 0.6}, penalty={"lecam": 0.1})
    gan, batch = gan_and_batch(config)
    gan.update_discriminator(*step_inputs(gan, batch))
    before = {name: s.clone() for name, s in _flat(gan.state_dict()).items()}
    assert before["lecam/values"].abs().sum() > 0
    batch.real_images[0] = torch.nan
    statistics = gan.update_discriminator(*step_inputs(gan, batch))
    assert statistics["real_logits"].isnan()
    assert gan.discriminator.model.num_skips == 1
    after = _flat(gan.state_dict())
    assert all(torch.equal(after[name], before[name]) for name in before)


def _flat(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{part}/{name}": v for part, values in state.items() for name, v in values.items()}


def updated(
    config: OptimizerConfig, nimg: int = 0, **options: Any
) -> tuple[OptimizedModel, torch.Tensor]:
    """A model of two weights after an update on the gradient (3, 4), and the gradient's norm."""
    model = OptimizedModel(nn.Linear(2, 1, bias=False), config, FP32, World(), **options)
    model.backward(model.ddp_module(torch.tensor([[3.0, 4.0]])).sum())
    lr, beta2 = (torch.tensor(s.at(nimg), dtype=torch.float64) for s in (config.lr, config.beta2))
    return model, model.step(Rates(lr, beta2))


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ({}, [3.0, 4.0]),
        ({"clip_norm": 1.0}, [0.6, 0.8]),
        ({"clip_norm": 10.0}, [3.0, 4.0]),
        ({"clip_value": 3.5}, [3.0, 3.5]),
    ],
)
def test_gradients_are_clipped_before_the_step_and_their_norm_is_the_unclipped_one(
    clip: dict[str, float], expected: list[float]
) -> None:
    model, norm = updated(OptimizerConfig(beta1=0.0, **clip))
    assert norm.item() == pytest.approx(5.0)
    (moments,) = model.optimizer.state.values()
    assert moments["exp_avg"].flatten().tolist() == pytest.approx(expected)


def test_rates_are_those_of_the_position() -> None:
    config = OptimizerConfig(
        lr=Schedule(start=0.1, end=0.3, kimg=1, shape="linear"),
        beta2=Schedule(start=0.5, end=0.9, kimg=1, shape="linear"),
    )
    torch.manual_seed(0)
    before = nn.Linear(2, 1, bias=False).weight.detach().clone()
    torch.manual_seed(0)
    model, _ = updated(config, nimg=500)
    weight = model.module.weight
    assert isinstance(weight, torch.Tensor)
    torch.testing.assert_close(weight.detach(), before - 0.2)  # Adam's first step is lr * sign
    (moments,) = model.optimizer.state.values()
    torch.testing.assert_close(moments["exp_avg_sq"], 0.3 * torch.tensor([[9.0, 16.0]]))


def test_weights_are_clipped_after_the_step() -> None:
    model, _ = updated(OptimizerConfig(lr=Schedule.constant(5.0)), clip_weights=0.01)
    weight = model.module.weight
    assert isinstance(weight, torch.Tensor)
    assert weight.flatten().tolist() == pytest.approx([-0.01, -0.01])


def test_the_generator_learns_at_every_so_manieth_step(make_config: MakeConfig) -> None:
    config = make_config(training__discriminator_steps=3)
    trainer = Trainer(config, World(), load_shards(config))
    moved = []
    for _ in range(6):
        before = next(trainer.state.method.models["G"].module.parameters()).detach().clone()
        trainer.step(next_inputs(trainer))
        after = next(trainer.state.method.models["G"].module.parameters())
        moved.append(not torch.equal(before, after))
    trainer.close()
    assert moved == [False, False, True, False, False, True]
    assert trainer.state.nimg == 6 * config.training.batch_size


def refuse(error: Exception) -> NoReturn:
    raise error


@pytest.mark.parametrize(
    "model",
    ["r3gan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("stylegan2", "sngan"))],
)
@on_each_device
def test_compiled_steps_have_the_same_losses_and_gradients(
    model: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels: dict[object, object] = {}
    monkeypatch.setattr(elementwise, "_kernels", kernels)
    losses, gradients = [], []
    for compiler in (nullcontext(), elementwise.KernelCompiler(refuse)):
        config = configured(model, penalty={"r1": 0.1, "r2": 0.1, "lecam": 0.1})
        gan, batch = gan_and_batch(config, precision=FP32, device=device)
        with (
            recorded_gradients(gan.models["G"]) as of_generator,
            recorded_gradients(gan.models["D"]) as of_discriminator,
            compiler,
        ):
            statistics = gan.step(*step_inputs(gan, batch))
        names = ("loss_D", "loss_G", "penalty_r1", "penalty_r2", "penalty_lecam")
        losses.append(torch.stack([statistics[name] for name in names]))
        gradients.append([*of_generator, *of_discriminator])
    assert kernels
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in gradients[0])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * largest)
