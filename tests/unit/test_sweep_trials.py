"""How trials of a sweep stand, what is compared, copied and shown, without training."""

from __future__ import annotations

import io
import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
from rich.console import Console

from ganscale.atomic_files import write_text
from ganscale.checkpoint import CheckpointStore, RunInUse
from ganscale.cli.sweep import _best_command
from ganscale.config import Config, load_config
from ganscale.config.sweep import Sweep
from ganscale.errors import ConfigError
from ganscale.json_lines import read_lines
from ganscale.launch import sweep as sweep_module
from ganscale.launch import sweep_trial
from ganscale.launch.driver_actor import Messages
from ganscale.launch.sweep import _Experiment, run_sweep
from ganscale.launch.sweep_status import (
    TrialStatus,
    copy_trial,
    metric_column,
    missing_metric,
    read_status,
    reports,
)
from ganscale.launch.sweep_table import displayed, ranked
from ganscale.launch.sweep_trial import SweepTrial
from ganscale.run_directory import RunDirectory
from ganscale.tracking.sinks import EventLog, JsonlSink
from ganscale.training.stopping import StopRequest
from tests.support.attempts import saved_at, state_at
from tests.support.checkpoints import begin, bits

MakeSweep = Callable[..., Sweep]

ASHA = {"name": "asha", "grace_kimg": 16, "reduction": 2}
PBT = {"name": "pbt", "interval_kimg": 16, "quantile": 0.25}


@pytest.fixture
def make_sweep(tmp_path: Path) -> MakeSweep:
    """A sweep of four trials of 96 kimg in `tmp_path`, with values every 16 kimg."""

    def make(**changes: Any) -> Sweep:
        values = {
            "name": "s",
            "overrides": {"storage": str(tmp_path), "data.shards": "shards"},
            "search": {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}},
            "mode": "max",
            "trials": 4,
            **changes,
        }
        return Sweep.of(values, tmp_path / "s.yaml")

    return make


def config_of(sweep: Sweep, number: int) -> Config:
    trial = sweep.trials()[number]
    return sweep.config(trial.name, trial.values)


def make_run(
    sweep: Sweep, number: int, scores: dict[int, float], *checkpoints: int
) -> tuple[Config, CheckpointStore]:
    """A trial's run with values of the metric and checkpoints at these positions, in images."""
    config = config_of(sweep, number)
    run_dir, store = RunDirectory(config.run_dir), CheckpointStore(config.checkpoints)
    write_text(run_dir.config, config.to_yaml())
    note(run_dir, "start", attempt=1, nimg=0)
    log_scores(run_dir, 1, scores)
    attempt = begin(store)
    for nimg in checkpoints:
        store.write(attempt, saved_at(nimg))
    return config, store


def log_scores(
    run_dir: RunDirectory,
    attempt: int,
    scores: dict[int, float],
    column: str = "metrics/diversity",
) -> None:
    sink = JsonlSink(run_dir.metrics)
    for nimg, score in scores.items():
        sink.log({"step": 1, "nimg": nimg, "attempt": attempt, column: score})
    sink.close()


def note(run_dir: RunDirectory, event: str, **fields: Any) -> None:
    log = EventLog(run_dir.events)
    log.write(event, **fields)
    log.close()


def statuses(sweep: Sweep) -> list[TrialStatus]:
    return [read_status(sweep, trial) for trial in sweep.trials()]


def experiment(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The sweep's next experiment, without a Ray to run it on."""
    monkeypatch.setattr(sweep_module, "start_driver_actor", lambda *_: None)
    return _Experiment(sweep, statuses(sweep), StopRequest(), lambda status: None)


def test_a_run_folder_tells_how_its_trial_stands(make_sweep: MakeSweep) -> None:
    """A report counts if a checkpoint holds it; the rest will be trained again."""
    sweep = make_sweep()
    make_run(sweep, 0, {16_000: 1.0, 32_000: 2.0, 48_000: 3.0}, 20_000, 32_000)
    make_run(sweep, 1, {16_000: 1.0, 96_000: math.nan}, 96_000)
    config, _ = make_run(sweep, 2, {16_000: 0.5}, 24_000)
    note(RunDirectory(config.run_dir), "sweep_stop", kimg=16, score=0.5)
    stood = {s.name: (s.state, s.kimg, s.score) for s in statuses(sweep)}
    assert stood == {
        "s-000": ("interrupted", 32, 2.0),
        "s-001": ("finished", 96, None),
        "s-002": ("stopped", 16, 0.5),
        "s-003": ("waiting", 0, None),
    }
    assert [s.name for s in statuses(sweep) if not s.is_over] == ["s-000", "s-003"]
    assert statuses(sweep)[0].known == [(16, 1.0), (32, 2.0)]
    assert [s.name for s in ranked(sweep, statuses(sweep))] == ["s-000", "s-002", "s-001", "s-003"]


def test_a_folder_holds_the_runs_of_one_sweep(make_sweep: MakeSweep) -> None:
    make_run(make_sweep(), 0, {16_000: 1.0}, 16_000)
    assert statuses(make_sweep(trials=6, max_concurrent=2, metric="train/loss_D"))
    with pytest.raises(ConfigError, match=r"s-000 holds a run with other settings \(optimizer.lr"):
        statuses(make_sweep(seed=1))


def test_reports_are_at_positions_that_trials_share(make_sweep: MakeSweep) -> None:
    """A row is behind the multiple of 16 kimg by part of a batch, or by part of a log interval;
    rows of superseded attempts and those that will be trained again are left out."""
    sweep = make_sweep(search={"training.batch_size": {"choice": [100]}})
    config, _ = make_run(sweep, 0, {16_100: 1.0, 17_000: 1.1, 32_000: 2.0, 48_000: 3.0})
    run_dir = RunDirectory(config.run_dir)
    note(run_dir, "resume", attempt=2, nimg=32_000)
    log_scores(run_dir, 2, {48_000: math.nan, 96_000: 6.0})
    everything = [(16, 1.0), (32, 2.0), (48, None), (96, 6.0)]
    assert reports(sweep, config, attempt=2, start_nimg=32_000) == everything
    assert reports(sweep, config, attempt=3, start_nimg=50_000) == everything[:3]
    assert reports(sweep, config, attempt=1, start_nimg=0) == everything


def test_a_trial_whose_rows_lack_the_metric_ends_when_it_is_due_the_second_time(
    make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the end of its training, which may be days later."""
    sweep, reasons = make_sweep(metric="train/loss_g"), list[str]()

    def train(config: Config, stop: StopRequest) -> SimpleNamespace:
        note(RunDirectory(config.run_dir), "start", attempt=1, nimg=0)
        due = [round(1000 * times * sweep.every_kimg) for times in (0, 1, 2)]
        log_scores(RunDirectory(config.run_dir), 1, dict.fromkeys(due, 1.0), "train/loss_G")
        for _ in range(500):
            if stop.reason:
                break
            time.sleep(0.01)
        reasons.append(stop.reason)
        return SimpleNamespace(reason=stop.reason)

    monkeypatch.setattr(sweep_trial, "_train", train)
    trial = object.__new__(SweepTrial)
    trial._sweep, trial._thread = sweep, None
    trial._messages = cast("Messages", SimpleNamespace(put=lambda *_: None, get=lambda _: None))
    trial.reset_config({"trial": {"name": "s-000", "values": sweep.trials()[0].values, "kimg": 0}})
    told = trial.step()
    assert (told["state"], reasons) == ("failed", ["terminated"])
    assert "has train/loss_g; there are train/loss_G" in told["message"]


def test_a_metric_is_missing_only_once_it_was_due_twice(make_sweep: MakeSweep) -> None:
    """Of the attempt that trains now; a lazy penalty is in no row before its first step."""
    evaluated = {"evaluation.every_kimg": 16, "penalty.r1": 1}
    sweep = make_sweep(metric="fid", overrides={**make_sweep().file.overrides, **evaluated})
    config, _ = make_run(sweep, 0, {16_000: 1.0, 31_000: 1.0})
    lazy = config.with_changes({"penalty.interval": 600})  # of 64 images: 38.4 kimg
    run_dir = RunDirectory(config.run_dir)
    assert missing_metric(sweep, config, 1, 0) == ""
    log_scores(run_dir, 1, {32_000: 1.0})
    assert missing_metric(sweep, config, 1, 0).endswith("has fid; there are metrics/diversity")
    assert missing_metric(sweep, lazy, 1, 0) == ""
    assert missing_metric(sweep, config, 1, 1_000) == ""
    assert missing_metric(sweep, config, 2, 0) == ""
    log_scores(run_dir, 1, {33_000: math.nan}, "metrics/fd_dinov2")
    assert missing_metric(sweep, config, 1, 0) == ""


def test_the_frechet_distance_is_found_under_any_network() -> None:
    row = {
        "metrics/fd_infinity_dinov2": 1.0,
        "metrics/fd_per_class_dinov2": 1.0,
        "metrics/kd_dinov2": 1.0,
        "metrics/fd_dinov2": 2.0,
    }
    assert metric_column("fid", row) == "metrics/fd_dinov2"
    assert metric_column("fid", {"metrics/fid_infinity": 1.0, "metrics/fid": 2}) == "metrics/fid"
    assert metric_column("fid", {"metrics/diversity": 1.0}) is None
    assert metric_column("train/loss_D", {"train/loss_D": 1.0}) == "train/loss_D"


def test_halving_remembers_what_earlier_experiments_have_reported(
    make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial goes on if it is not below the median of what was reported at its position."""
    sweep = make_sweep(scheduler=ASHA, trials=5)
    make_run(sweep, 0, {16_000: 1.0, 32_000: 4.0, 96_000: 5.0}, 96_000)
    config, _ = make_run(sweep, 1, {16_000: 3.0}, 16_000)
    note(RunDirectory(config.run_dir), "sweep_stop", kimg=16, score=3.0)
    make_run(sweep, 2, {16_000: 1.5}, 16_000)
    begun = experiment(sweep, monkeypatch)
    scheduler = begun._scheduler

    class Trial(SimpleNamespace):
        def __str__(self) -> str:
            return str(self.name)

    def decision(trial: Trial, kimg: int, score: float) -> str:
        told: str = scheduler.on_trial_result(None, trial, {"nimg": 1000 * kimg, "score": score})
        return told

    third, fourth, fifth = (Trial(name=f"s-{n:03d}", trial_id=f"t{n}") for n in (2, 3, 4))
    for trial in (third, fourth, fifth):
        scheduler.on_trial_add(None, trial)
    # It is below the median of 1 and 3, but was let go on there when it was the second one.
    begun.on_trial_start(trial=third)
    assert decision(fourth, 16, 1.4) == TrialScheduler.STOP  # the median of 1, 1.5 and 3 is 1.5
    assert decision(fifth, 16, 1.5) == TrialScheduler.CONTINUE  # that of 1, 1.4, 1.5 and 3 is 1.45
    assert decision(third, 32, 3.9) == TrialScheduler.STOP  # below 4
    assert begun("t3", {"score": math.nan})
    assert not begun("t3", {"score": 1.0})


def test_a_population_begins_with_the_first_round_that_not_all_have_reached(
    make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(scheduler=PBT)
    make_run(sweep, 0, {16_000: 1.0, 32_000: 2.0, 48_000: 2.5}, 50_000)
    for number in (1, 2, 3):
        make_run(sweep, number, {16_000: 1.0}, 20_000)
    scheduler = experiment(sweep, monkeypatch)._scheduler
    assert isinstance(scheduler, PopulationBasedTraining)
    trials = [_PopulationTrial(n) for n in range(4)]
    controller = SimpleNamespace(
        search_alg=None, get_trials=lambda: trials, get_live_trials=lambda: trials
    )
    for trial in trials:
        scheduler.on_trial_add(controller, trial)

    def decision(number: int, kimg: int) -> str:
        result = {"nimg": 1000 * kimg, "score": 1.0}
        told: str = scheduler.on_trial_result(controller, trials[number], result)
        return told

    assert [decision(1, kimg) for kimg in (16, 32)] == ["CONTINUE", "PAUSE"]
    assert decision(0, 32) == "PAUSE"


class _PopulationTrial:
    """What Tune's scheduler asks of a trial until a round is complete."""

    def __init__(self, number: int) -> None:
        self.trial_id = self.experiment_tag = f"t{number}"
        self.config: dict[str, Any] = {}
        self.status = "RUNNING"
        manager = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
        self.run_metadata = SimpleNamespace(checkpoint_manager=manager)


@pytest.mark.parametrize(
    ("scheduler", "mode", "score"),
    [(PBT, "max", -math.inf), (PBT, "min", math.inf), (ASHA, "max", math.nan)],
)
def test_a_value_that_is_not_finite_is_the_worst(
    make_sweep: MakeSweep, scheduler: dict[str, Any], mode: str, score: float
) -> None:
    """Of a population, which would else keep the trial; in halving a NaN is what ends it."""
    trial = object.__new__(SweepTrial)
    trial._sweep, trial._reported = make_sweep(scheduler=scheduler, mode=mode), 16.0
    told = trial._result("", None)
    assert told["score"] == pytest.approx(score, nan_ok=True)
    assert (told["nimg"], told["done"]) == (16_000, False)


def test_a_copy_is_the_newest_checkpoint_of_a_new_attempt(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(scheduler=PBT)
    config, mine = make_run(sweep, 0, {16_000: 1.0}, 500, 1000)
    make_run(sweep, 1, {16_000: 2.0}, 2000)
    target, source = statuses(sweep)[:2]
    values = {"optimizer.lr": 0.005}
    copy_trial(sweep, source, target, values)
    assert [str(name) for name in mine.lineage()] == [
        "nimg-000000002000-a0002",
        "nimg-000000001000-a0001",
        "nimg-000000000500-a0001",
    ]
    newest = mine.newest()
    assert newest is not None
    assert bits(newest.state()) == bits(state_at(2000))
    run_dir = RunDirectory(config.run_dir)
    assert newest.history == run_dir.metrics.read_bytes()  # its own, not that of the other
    now = sweep.config("s-000", values)
    assert newest.meta["config"] == now.model_dump(mode="json")
    copied = "s-001/checkpoints/nimg-000000002000-a0001"
    assert newest.meta["copied_from"] == f"{sweep.root}/{copied}"
    event = read_lines(run_dir.events)[-1]
    assert (event["event"], event["source"], event["nimg"]) == ("copy", "s-001", 2000)
    again = statuses(sweep)[0]
    assert (again.values, again.source) == (target.values, target.source) == (values, "s-001")


def test_a_kill_in_the_middle_of_a_copy_leaves_a_run_that_goes_on(
    make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(scheduler=PBT)
    _, mine = make_run(sweep, 0, {16_000: 1.0}, 1000)
    make_run(sweep, 1, {16_000: 2.0}, 2000)
    target, source = statuses(sweep)[:2]

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for owner, name, nimg in ((CheckpointStore, "write", 1000), (EventLog, "write", 2000)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                copy_trial(sweep, source, target, {"optimizer.lr": 0.005})
        newest = mine.newest()
        assert newest is not None
        assert bits(newest.state()) == bits(state_at(nimg))
        assert statuses(sweep)[0].values == sweep.trials()[0].values


def test_the_best_trial_s_command_trains_it_again(make_sweep: MakeSweep) -> None:
    schedule = {"start": 4e-4, "end": 1e-4, "kimg": 50, "shape": "cosine"}
    sweep = make_sweep(
        search={"optimizer.lr": {"uniform": [0.5, 2], "relative": True}},
        overrides={**make_sweep().file.overrides, "optimizer.lr": schedule},
    )
    stood = statuses(sweep)
    assert _best_command(sweep, stood) is None
    stood[2].score = 3.0
    command = _best_command(sweep, stood)
    assert command is not None

    words = shlex.split(command)
    assert words[:4] == ["ganscale", "train", "--config", "quickstart"]
    expected = sweep.config("s-002-again", sweep.trials()[2].values)
    again = load_config("quickstart", words[4:])
    assert again == expected.with_changes({"storage": sweep.base.storage})


def test_a_sweep_that_a_live_process_runs_is_not_started_a_second_time(
    make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trials would take their runs over from those of the first."""
    sweep, starts = make_sweep(), list[str]()

    def start_again(*_: Any) -> Any:
        starts.append("first" if not starts else "second")
        with pytest.raises(RunInUse, match=f"the sweep in {sweep.root} is in use by process"):
            run_sweep(sweep, Console(quiet=True))
        return [], ""

    monkeypatch.setattr(sweep_module, "resolve_config", lambda config, _: config)
    monkeypatch.setattr(sweep_module, "_run", start_again)
    for _ in range(2):  # the end of the first makes way for the next
        run_sweep(sweep, Console(quiet=True))
    assert starts == ["first", "second"]


def test_the_best_member_of_a_population_goes_on_wherever_it_lies(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    storage = str(tmp_path / "my runs")
    sweep = make_sweep(scheduler=PBT, overrides={**make_sweep().file.overrides, "storage": storage})
    stood = statuses(sweep)
    stood[1].score = 3.0
    command = _best_command(sweep, stood)
    assert command is not None
    words = ["ganscale", "resume", f"{storage}/s/s-001", "training.total_kimg=192"]
    assert shlex.split(command) == words


def test_reports_are_lines_when_piped_and_a_table_on_a_terminal(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(scheduler=PBT)
    make_run(sweep, 0, {16_000: 1.25}, 16_000)
    stood = statuses(sweep)
    stood[0].message = "no room"
    piped, terminal = io.StringIO(), io.StringIO()
    with displayed(sweep, stood, Console(file=piped)) as report:
        report(stood[0])
    assert " ".join(piped.getvalue().split()) == "s-000 16 kimg 1.25 interrupted: no room"
    with displayed(sweep, stood, Console(file=terminal, force_terminal=True, width=120)):
        stood[3].score, stood[3].source = 2.5, "s-000"
    last = terminal.getvalue().rsplit("trial", 1)[1].splitlines()
    assert [line.split()[0] for line in last[1:5]] == ["s-003", "s-000", "s-001", "s-002"]
    assert last[1].split()[3] == "2.5"
    assert last[1].split()[-1] == "s-000"
