"""The training loop: log, draw, checkpoint, done?, step. It knows nothing of Ray.

What happens when is a function of the position alone, so a run that was killed and resumed does
what the uninterrupted one does, bit for bit at the same world size on the CPU.
"""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import asdict
from typing import Literal

import torch
from torch import distributed as dist

import ganscale
from ganscale.checkpoint import load_state, newest_valid, save_checkpoint
from ganscale.config import Config
from ganscale.data.reader import Batch
from ganscale.data.shards import ShardSet
from ganscale.generation.latents import StepRandomness
from ganscale.generation.sampling import SampleableGenerator, save_grid, save_snapshot
from ganscale.run_directory import RunDirectory
from ganscale.tracking.sinks import EventLog, JsonlSink, NullSink, Sink, Sinks
from ganscale.tracking.wandb_sink import WandbSink, resolve_mode
from ganscale.training.adversarial_step import (
    PhaseResult,
    Share,
    discriminator_phase,
    generator_phase,
)
from ganscale.training.build import (
    build_reader,
    build_rules,
    build_state,
    check_against_shards,
    ema_names,
    load_shards,
)
from ganscale.training.distribute import gather_objects, sum_over_ranks
from ganscale.training.precision import Precision
from ganscale.world import World

__all__ = ["Trainer", "train"]

_MAX_SKIPS_NAMED = 100


def train(config: Config, world: World) -> None:
    """Train to `training.total_kimg`, going on from the newest checkpoint that verifies.

    Every rank calls this inside a process group. Raises `ConfigError` or `DataError` before
    anything is written if the configuration cannot be trained.
    """
    shard_set = load_shards(config)
    check_against_shards(config, shard_set)
    if world.device == "cpu":
        torch.set_num_threads(config.launch.threads_per_worker)
    trainer = Trainer(config, world, shard_set)
    with warnings.catch_warnings():
        # Of gradients with a dimension of size 1, whose strides mean nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        try:
            trainer.run()
        finally:
            trainer.close()


class Trainer:
    """One rank of a run."""

    def __init__(self, config: Config, world: World, shard_set: ShardSet) -> None:
        self.config = config
        self.world = world
        self.run_dir = RunDirectory(config.run_dir)
        self.precision = Precision.resolve(config.training.precision, world.torch_device)
        self.state = build_state(config, self.precision, world)
        self.reader = build_reader(config, shard_set, world, gather_objects)
        self._start_from_newest_checkpoint()
        self.sink: Sink = NullSink()
        self.events: EventLog | None = None
        if world.is_main:
            self._open_tracking()
        self._skipped: list[str] = []
        self._clock = time.perf_counter()

    def run(self) -> None:
        """The loop, to the end of the run."""
        batches = self.reader.batches(self.state.nimg, self.config.training.batch_size)
        started_at = self.state.nimg
        while True:
            done = self.state.nimg >= self.config.total_nimg
            if self.state.nimg > started_at or started_at == 0:
                self._write_what_is_due(done=done)
            if done:
                break
            self.step(next(batches))
        batches.close()

    def step(self, batch: Batch) -> None:
        """A discriminator update on a global batch, of which this rank has `batch`.

        Every `training.discriminator_steps`-th is followed by one of the generator.
        """
        state, training = self.state, self.config.training
        self._skipped += [str(error) for error in batch.skipped]
        rules, share = build_rules(self.config, state, self.precision), self._share(batch)
        seen = discriminator_phase(state.generator, state.discriminator, rules, share)
        self._note(seen, "D", state.discriminator.step(state.nimg))
        if self.config.augment.target is not None or self.config.penalty.lecam:
            state.feedback.update(seen, step=state.step, batch_size=training.batch_size)
        state.nimg += training.batch_size
        state.step += 1
        if state.step % training.discriminator_steps == 0:
            fooled = generator_phase(state.generator, state.discriminator, rules, share)
            self._note(fooled, "G", state.generator.step(state.nimg))
            self._average()
        state.means.num_steps += 1

    def close(self) -> None:
        """Close files and W&B."""
        self.sink.close()
        if self.events is not None:
            self.events.close()

    def _share(self, batch: Batch) -> Share:
        device, size = self.world.torch_device, self.config.training.batch_size
        images = batch.images.to(device, non_blocking=True).float() / 127.5 - 1
        labels = batch.labels.to(device, non_blocking=True)
        return Share(
            real_images=images.contiguous(memory_format=torch.channels_last),
            labels=labels if self.config.model.num_classes else None,
            random=StepRandomness(self.config.seed, self.state.nimg, size, batch.slots, device),
            z_dim=self.config.model.z_dim,
            weight=self.world.world_size / size,
        )

    def _average(self) -> None:
        training, model = self.config.training, self.state.generator.module
        num_images = training.discriminator_steps * training.batch_size
        halflives = {"": 1000 * training.ema_halflife_kimg.at(self.state.nimg)}
        halflives |= ema_names(self.config)
        for name, ema in self.state.emas.items():
            ema.update(model, num_images, halflife_nimg=halflives[name])

    def _note(self, seen: PhaseResult, player: Literal["D", "G"], grad_norm: torch.Tensor) -> None:
        values = {f"train/loss_{player}": seen.loss, f"train/grad_norm_{player}": grad_norm}
        if seen.real_logits is not None:
            values["train/real_logits"] = seen.real_logits
            values["train/fake_logits"] = seen.fake_logits
        for name, value in seen.penalties.items():
            values[f"train/penalty_{name}"] = value
        self.state.means.add(values)

    def _write_what_is_due(self, *, done: bool) -> None:
        config, nimg = self.config, self.state.nimg
        checkpoint = done or self._due(config.checkpoint.every_kimg)
        if self.state.means.num_steps and (checkpoint or self._due(config.tracking.log_every_kimg)):
            self._log_row()
        if self.world.is_main:
            if done or nimg == 0 or self._due(config.samples.every_kimg):
                self._draw_samples()
            if done or (nimg and self._due(config.checkpoint.snapshot_every_kimg)):
                self._save_snapshots()
            if nimg and checkpoint:
                self._save_checkpoint()
            if done and self.events is not None:
                self.events.write("end", nimg=nimg, step=self.state.step)
        self._restart_clock_after(checkpoint)

    def _due(self, every_kimg: float) -> bool:
        """Whether the last step crossed a multiple of `every_kimg`."""
        nimg, every = self.state.nimg, 1000 * every_kimg
        return nimg // every > (nimg - self.config.training.batch_size) // every

    def _restart_clock_after(self, written: bool) -> None:
        """Images per second are those of training, not of writing."""
        if written:
            self._clock = time.perf_counter()

    def _log_row(self) -> None:
        state, steps = self.state, self.state.means.num_steps
        means = state.means.averages(sum_over_ranks, self.world.world_size)
        seconds = time.perf_counter() - self._clock
        self._clock = time.perf_counter()
        row: dict[str, float] = {"step": state.step, "nimg": state.nimg, **means}
        for name, player in (("D", state.discriminator), ("G", state.generator)):
            row[f"train/loss_scale_{name}"] = player.scaler.scale
            row[f"train/skips_{name}"] = int(player.num_skips)
        row["time/images_per_second"] = steps * self.config.training.batch_size / seconds
        row["time/unix"] = time.time()
        if self.config.augment.name != "none":
            row["train/augment_p"] = self._augment_p()
        if self.config.data.on_error == "skip":
            row["data/num_skipped"] = self._report_skipped()
        if self.world.device != "cpu":
            row["gpu/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.sink.log(row)

    def _augment_p(self) -> float:
        augment = self.config.augment
        adaptive = augment.target is not None
        return self.state.feedback.augment_p.item() if adaptive else augment.p.at(self.state.nimg)

    def _report_skipped(self) -> int:
        """Tell of the damaged samples that were left out since the last row, on any rank."""
        skipped = [text for texts in gather_objects(self._skipped) for text in texts]
        self._skipped.clear()
        if skipped and self.events is not None:
            self.events.write(
                "skip",
                nimg=self.state.nimg,
                num_skipped=len(skipped),
                samples=sorted(skipped)[:_MAX_SKIPS_NAMED],
            )
        return len(skipped)

    def _draw_samples(self) -> None:
        generator = SampleableGenerator(
            self.state.ema.model, spec=self.config.model.model_dump(), info={}
        )
        path = self.run_dir.sample_grid(self.state.nimg)
        save_grid(generator.sample(self.config.samples.num_images, seed=0), path)
        self.sink.log_picture("samples", path, nimg=self.state.nimg, step=self.state.step)

    def _save_snapshots(self) -> None:
        spec = self.config.model.model_dump()
        for name, ema in self.state.emas.items():
            path = self.run_dir.snapshot(self.state.nimg, name)
            save_snapshot(path, ema.model, spec=spec, nimg=self.state.nimg)

    def _save_checkpoint(self) -> None:
        assert self.events is not None
        checkpoint = save_checkpoint(
            self.run_dir.checkpoints,
            self.state.state_dict(),
            meta={
                "step": self.state.step,
                "world": asdict(self.world),
                "versions": {"ganscale": ganscale.__version__, "torch": torch.__version__},
                "config": self.config.model_dump(),
            },
            nimg=self.state.nimg,
            keep_last=self.config.checkpoint.keep_last,
        )
        self.events.write("checkpoint", nimg=checkpoint.nimg, path=str(checkpoint.path))

    def _start_from_newest_checkpoint(self) -> None:
        """Rank 0 decides which checkpoint; all ranks load it."""
        choice = [newest_valid(self.run_dir.checkpoints) if self.world.is_main else None]
        dist.broadcast_object_list(choice, src=0)
        if choice[0] is not None:
            self.state.load_state_dict(load_state(choice[0]))

    def _open_tracking(self) -> None:
        tracking = self.config.tracking
        self.run_dir.root.mkdir(parents=True, exist_ok=True)
        self.events = EventLog(self.run_dir.events)
        sinks: list[Sink] = [JsonlSink(self.run_dir.metrics)]
        mode = resolve_mode(tracking.wandb)
        if mode != "disabled":
            config = self.config.model_dump()
            sinks.append(
                WandbSink(self.run_dir, project=tracking.project, mode=mode, config=config)
            )
        self.sink = Sinks(*sinks)
        kind = "start" if self.state.nimg == 0 else "resume"
        self.events.write(
            kind,
            nimg=self.state.nimg,
            step=self.state.step,
            world_size=self.world.world_size,
            pid=os.getpid(),
            precision=self.precision.name,
            device=self.world.device,
            wandb=mode,
        )
