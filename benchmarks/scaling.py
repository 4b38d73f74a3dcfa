"""How two workers on this machine compare with two independent runs, and a model of many GPUs.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling --shards data/cifar10-train --out scaling.json
    python -m benchmarks.scaling --table scaling.json          # what was measured
    python -m benchmarks.scaling --model                       # images/s of 1 to 1,024 GPUs

Two processes train at the same time, each on one thread: in one form as two ranks of one run, whose
global batch is twice `--per-worker`, in the other as two runs of their own with that batch, which
share nothing but the machine. Both forms load the machine alike, so their ratio is what working
together costs: all-reduces of gradients and of batch statistics, and waiting for the slower rank.
The forms are measured in turns, `--rounds` times, each for `--seconds` after a warm-up that ends
in both processes at once.

A last round of each form has clocks around the collectives (`CollectiveTimes`), to say what the
difference is made of. The model and its assumptions are in `scaling_model` and
docs/explanation/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.scaling_model import model_tables
from ganscale.config import Config, load_config
from ganscale.json_lines import read_lines
from ganscale.run_directory import RunDirectory
from ganscale.training.build import load_shards
from ganscale.training.callbacks import Callback
from ganscale.training.loop import Trainer
from ganscale.training.state import TrainingState
from ganscale.training.stopping import StopRequest
from ganscale.world import World, process_group

NUM_PROCESSES = 2
WARM_UP_STEPS = 5
TIMEOUT_SECONDS = 1800.0
FORMS = ("independent", "together")


def main() -> None:
    """Measure, or print what was measured, or print what the model says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shards", help="a shard set of 32x32 images")
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    parser.add_argument("--table", type=Path, help="print this file's measurements as a table")
    parser.add_argument("--model", action="store_true", help="print the model's tables")
    parser.add_argument("--config", default="dcgan-cifar10")
    parser.add_argument("--per-worker", type=int, default=128, help="images a worker and step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    if arguments.model:
        print(model_tables())
        return
    if arguments.table:
        print(table(read_lines(arguments.table)))
        return
    if not (arguments.shards and arguments.out):
        parser.error("--shards and --out, or --table, or --model")
    for number in range(arguments.rounds + 1):
        with_clocks = number == arguments.rounds
        # In turns within a round, so that a machine that becomes busier does not favour a form.
        for form in FORMS if number % 2 == 0 else reversed(FORMS):
            row = measured_form(form, arguments, with_clocks=with_clocks)
            print(json.dumps(row), flush=True)
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table(read_lines(arguments.out)))


def measured_form(form: str, arguments: argparse.Namespace, *, with_clocks: bool) -> dict[str, Any]:
    """Images a second of both processes, and what their steps were made of."""
    together = form == "together"
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(arguments.config, [f"data.shards={arguments.shards}"]).with_changes(
            {
                "training.batch_size": arguments.per_worker * (NUM_PROCESSES if together else 1),
                "training.total_kimg": 1e9,
                "training.cuda_graphs": "off",
                "launch.num_workers": NUM_PROCESSES if together else 1,
                "launch.backend": "inprocess",
                "launch.threads_per_worker": 1,
                # What a run does now and then is not what a second worker costs.
                "checkpoint.every_kimg": 1e9,
                "checkpoint.every_minutes": 1e6,
                "checkpoint.snapshot_every_kimg": 1e9,
                "samples.every_kimg": 1e9,
                "samples.num_images": 1,
                "evaluation.every_kimg": 0,
                "tracking.wandb": "disabled",
                "storage": folder,
            }
        )
        task = Task(together, config.model_dump(), arguments.seconds, with_clocks)
        processes = _run_processes(task)
    # The ranks of one run take the same steps, each of which has the images of both.
    own = processes[:1] if together else processes
    return {
        "form": form,
        "config": arguments.config,
        "per_worker": arguments.per_worker,
        "with_clocks": with_clocks,
        "images_per_second": sum(p["images_per_second"] for p in own),
        "step_seconds": statistics.fmean(p["step_seconds"] for p in own),
        "load_before": load_before,
        "processes": processes,
    }


@dataclass(frozen=True)
class Task:
    """What the two processes do."""

    together: bool
    """Whether they are ranks of one run."""
    config: dict[str, Any]
    seconds: float
    with_clocks: bool


def _run_processes(task: Task) -> list[dict[str, Any]]:
    """The results of both processes, in order."""
    context = multiprocessing.get_context("spawn")
    results: Queue[tuple[int, dict[str, Any] | str]] = context.Queue()
    barrier = context.Barrier(NUM_PROCESSES)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_process_main, args=(number, port, task, barrier, results))
        for number in range(NUM_PROCESSES)
    ]
    for process in processes:
        process.start()
    try:
        collected = {}
        for _ in processes:
            number, result = results.get(timeout=TIMEOUT_SECONDS)
            if isinstance(result, str):
                raise RuntimeError(f"process {number} failed:\n{result}")
            collected[number] = result
        for process in processes:
            process.join(TIMEOUT_SECONDS)
    finally:
        for process in processes:
            process.kill()
    return [collected[number] for number in range(NUM_PROCESSES)]


def _process_main(
    number: int,
    port: int,
    task: Task,
    barrier: Barrier,
    results: Queue[tuple[int, dict[str, Any] | str]],
) -> None:
    try:
        results.put((number, _measured_process(number, port, task, barrier)))
    except Exception:
        results.put((number, traceback.format_exc()))


def _measured_process(number: int, port: int, task: Task, barrier: Barrier) -> dict[str, Any]:
    torch.set_num_threads(1)
    config = Config.model_validate(task.config)
    if task.together:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        world = World(number, number, NUM_PROCESSES)
    else:
        world = World()
        config = config.with_changes({"name": f"{config.name}-{number}"})
    with process_group(world), ExitStack() as stack:
        stop = StopRequest()
        clocks = stack.enter_context(CollectiveTimes()) if task.with_clocks else None
        window = Window(config, barrier, stop, task.seconds, clocks)
        trainer = Trainer(config, world, load_shards(config), stop, callbacks=[window])
        try:
            if clocks is not None:
                clocks.watch(trainer)
            trainer.run()
        finally:
            trainer.close()
        parts = _mean_parts(config) if world.is_main else {}
        return {**window.result(), "parts": parts}


def _mean_parts(config: Config) -> dict[str, float]:
    """Seconds of a step by part, from the rows of metrics but the first, which is the warm-up."""
    rows = read_lines(RunDirectory(config.run_dir).metrics)[1:]
    names = [name for name in rows[0] if name.endswith("_seconds")] if rows else []
    return {
        name.removeprefix("time/").removesuffix("_seconds"): statistics.fmean(
            row[name] for row in rows
        )
        for name in names
    }


class Window(Callback):
    """Counts the steps of a stretch of time that begins in both processes at once; ends the run."""

    def __init__(
        self,
        config: Config,
        barrier: Barrier,
        stop: StopRequest,
        seconds: float,
        clocks: CollectiveTimes | None,
    ) -> None:
        self.every_kimg = config.training.batch_size / 1000
        self._batch_size = config.training.batch_size
        self._barrier, self._stop, self._seconds = barrier, stop, seconds
        self._clocks = clocks
        self._num_steps = -WARM_UP_STEPS
        self._began = self._elapsed = 0.0

    def run(self, state: TrainingState) -> None:
        """Called after each step."""
        if self._elapsed:  # the other process is not done yet
            return
        self._num_steps += 1
        if self._num_steps == 0:
            self._barrier.wait(TIMEOUT_SECONDS)
            self._began = time.perf_counter()
            if self._clocks is not None:
                self._clocks.reset()
        elif self._num_steps > 0 and time.perf_counter() - self._began >= self._seconds:
            self._elapsed = time.perf_counter() - self._began
            if self._clocks is not None:
                self._clocks.freeze(self._num_steps)
            self._stop.reason = "interrupted"

    def result(self) -> dict[str, Any]:
        """Figures of the window."""
        return {
            "images_per_second": self._num_steps * self._batch_size / self._elapsed,
            "step_seconds": self._elapsed / self._num_steps,
            "num_steps": self._num_steps,
            "collectives": {} if self._clocks is None else self._clocks.per_step,
        }


@dataclass
class CollectiveTimes:
    """Clocks around what ranks exchange within a step.

    `statistics` are the all-reduces that a step waits for one by one: those of batch norm and of
    minibatch deviations, forward and backward. `gradients` are the buckets of
    DistributedDataParallel, which travel while the backward goes on; only the time from when the
    last bucket of a network is ready to when its sum is there is `exposed`. All of these include
    waiting for the other rank to arrive.
    """

    per_step: dict[str, float] = field(default_factory=dict)
    """Seconds, numbers and bytes of one step, once frozen."""
    _sums: dict[str, float] = field(default_factory=dict)
    _all_reduce: Callable[..., Any] = dist.all_reduce

    def __enter__(self) -> CollectiveTimes:
        dist.all_reduce = self._timed_all_reduce
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._all_reduce

    def watch(self, trainer: Trainer) -> None:
        """Time the gradients of a trainer's networks."""
        for model in trainer.state.method.models.values():
            network: DistributedDataParallel = model.ddp_module
            network.register_comm_hook(None, lambda state, bucket: self._timed_bucket(bucket))

    def reset(self) -> None:
        """Forget what has been added up."""
        self._sums.clear()

    def freeze(self, num_steps: int) -> None:
        """Keep the means of so many steps."""
        self.per_step = {name: value / num_steps for name, value in self._sums.items()}

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def _timed_all_reduce(self, tensor: Tensor, *args: Any, **options: Any) -> Any:
        if options.get("async_op"):
            return self._all_reduce(tensor, *args, **options)
        began = time.perf_counter()
        result = self._all_reduce(tensor, *args, **options)
        self._add("statistics_seconds", time.perf_counter() - began)
        self._add("statistics_calls", 1)
        self._add("statistics_bytes", tensor.nbytes)
        return result

    def _timed_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        began = time.perf_counter()
        gradients = bucket.buffer().div_(dist.get_world_size())
        work = self._all_reduce(gradients, async_op=True)

        def done(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            seconds = time.perf_counter() - began
            self._add("gradients_seconds", seconds)
            self._add("gradients_bytes", gradients.nbytes)
            if bucket.is_last():
                self._add("exposed_seconds", seconds)
            return future.value()[0]

        return work.get_future().then(done)


def table(rows: list[dict[str, Any]]) -> str:
    """What was measured: a line a round, then efficiency, then what the steps were made of."""
    kinds = list(dict.fromkeys((row["config"], row["per_worker"]) for row in rows))
    lines = []
    for kind in kinds:
        own = [row for row in rows if (row["config"], row["per_worker"]) == kind]
        plain = [row for row in own if not row["with_clocks"]]
        by_form = {form: [r for r in plain if r["form"] == form] for form in FORMS}
        # A round that was cut short has one form only.
        pairs = list(zip(*by_form.values(), strict=False))
        lines += [
            f"{kind[0]}, {kind[1]} images a worker and step, {NUM_PROCESSES} processes",
            "",
            "| round | load before | two independent runs, images/s | two workers, images/s "
            "| efficiency | ms a step |",
            "|---|---|---|---|---|---|",
        ]
        ratios = []
        for number, (alone, joint) in enumerate(pairs, 1):
            ratios.append(joint["images_per_second"] / alone["images_per_second"])
            lines.append(
                f"| {number} | {alone['load_before']:.1f}, {joint['load_before']:.1f} "
                f"| {alone['images_per_second']:.1f} | {joint['images_per_second']:.1f} "
                f"| {100 * ratios[-1]:.1f} % | {1000 * joint['step_seconds']:.0f} |"
            )
        if ratios:
            lines += ["", f"median efficiency {100 * statistics.median(ratios):.1f} %"]
        lines += ["", *(_made_of(row) for row in own if row["with_clocks"]), ""]
    return "\n".join(lines)


def _made_of(row: dict[str, Any]) -> str:
    """One form's step in milliseconds, on rank 0."""
    first = row["processes"][0]
    clocks, parts = first["collectives"], first["parts"]
    milliseconds = {
        "step": first["step_seconds"],
        "waiting for data": parts.get("data_wait", 0.0),
        f"{clocks['statistics_calls']:.0f} all-reduces of statistics": clocks["statistics_seconds"],
        "gradients in flight": clocks["gradients_seconds"],
        "of these after the backward": clocks["exposed_seconds"],
    }
    figures = ", ".join(f"{name} {1000 * value:.1f}" for name, value in milliseconds.items())
    megabytes = (clocks["gradients_bytes"] + clocks["statistics_bytes"]) / 1e6
    return f"{row['form']}, ms: {figures}; {megabytes:.2f} MB exchanged"


if __name__ == "__main__":
    main()
