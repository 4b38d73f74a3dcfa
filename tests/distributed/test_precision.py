"""fp16 with gradient scaling; on the CPU its logic is tested without a GPU."""

from __future__ import annotations

from pathlib import Path

import torch

from ganscale.config import Config
from ganscale.data.shards import ShardSet
from ganscale.run_directory import RunDirectory
from ganscale.training.loop import Trainer, train
from ganscale.world import World, process_group
from tests.conftest import MakeConfig
from tests.support.devices import on_each_device
from tests.support.ranks import run_ranks
from tests.support.runs import read_rows
from tests.support.steps import next_inputs


@on_each_device
def test_fp16_losses_follow_fp32(make_config: MakeConfig, image_shards: Path, device: str) -> None:
    world = World(device=device)
    curves = {}
    for precision in ("fp32", "fp16"):
        config = make_config(
            name=precision,
            data__shards=str(image_shards),
            training__precision=precision,
            training__batch_size=8,
            training__total_kimg=0.24,
            tracking__log_every_kimg=0.008,
            model__base_channels=4,
            model__z_dim=8,
        )
        with process_group(world):
            train(config, world)
        rows = read_rows(RunDirectory(config.run_dir).metrics)
        assert len(rows) == 30
        assert rows[-1]["train/skips_D"] == rows[-1]["train/skips_G"] == 0
        names = ("train/loss_D", "train/loss_G")
        curves[precision] = torch.tensor([[row[name] for name in names] for row in rows])
    assert rows[-1]["train/loss_scale_D"] > 1
    torch.testing.assert_close(curves["fp16"], curves["fp32"], rtol=0.05, atol=0)


def _overflow_on_one_rank(world: World, config: Config) -> dict[str, list[float]]:
    """Three steps; in the second, one gradient of rank 1's discriminator overflows."""
    assert config.data.shards is not None
    trainer = Trainer(config, world, ShardSet.load(config.data.shards))
    state = trainer.state
    seen: dict[str, list[float]] = {"D": [], "G": [], "weight": []}
    for step in range(3):
        weight = next(state.method.models["D"].module.parameters())
        hook = None
        if step == 1 and world.rank == 1:
            hook = weight.register_hook(lambda grad: torch.full_like(grad, torch.inf))
        before = weight.detach().clone()
        trainer.step(next_inputs(trainer))
        if hook is not None:
            hook.remove()
        for letter, model in state.method.models.items():
            seen[letter] += [model.scaler.scale, int(model.num_skips)]
        seen["weight"].append(float((weight.detach() - before).abs().max()))
    trainer.close()
    return seen


@on_each_device
def test_overflow_on_one_rank_skips_that_player_on_all(
    make_config: MakeConfig, device: str
) -> None:
    config = make_config(training__precision="fp16", training__batch_size=8, launch__num_workers=2)
    first, second = run_ranks(2, _overflow_on_one_rank, config, device=device)
    assert first == second
    scale = first["D"][0]
    assert first["D"] == [scale, 0, scale / 2, 1, scale / 2, 1]
    assert first["G"] == [scale, 0, scale, 0, scale, 0]
    assert first["weight"][0] > 0
    assert first["weight"][1] == 0
    assert first["weight"][2] > 0
