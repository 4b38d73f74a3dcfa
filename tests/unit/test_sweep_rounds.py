"""What a sweep remembers, decides and copies, without training."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from ganscale.atomic_files import write_text
from ganscale.checkpoint import CheckpointStore
from ganscale.config import Config, load_config
from ganscale.config.sweep import Sweep
from ganscale.errors import ConfigError
from ganscale.json_lines import read_lines
from ganscale.launch import sweep_schedulers
from ganscale.launch.sweep_book import Book, Copy
from ganscale.launch.sweep_schedulers import Halving, PopulationScheduler, make_copy
from ganscale.launch.sweep_table import best_command, ranked
from ganscale.launch.sweep_trial import durable_reports, reports, value_of
from ganscale.run_directory import RunDirectory
from ganscale.tracking.sinks import EventLog, JsonlSink
from tests.support.attempts import saved_at, state_at
from tests.support.checkpoints import begin, bits

MakeSweep = Callable[..., Sweep]

ASHA = {"name": "asha", "grace_kimg": 16, "reduction": 2}
PBT = {"name": "pbt", "interval_kimg": 16, "quantile": 0.25}


@pytest.fixture
def make_sweep(tmp_path: Path) -> MakeSweep:
    """A sweep of four trials in `tmp_path`."""

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


def opened(sweep: Sweep) -> Book:
    book = Book(sweep)
    book.open()
    return book


def test_the_book_reads_what_it_wrote_through_any_kill(make_sweep: MakeSweep) -> None:
    book = opened(make_sweep())
    for name in ("s-000", "s-001", "s-002"):
        book.started(name)
    assert book.result("s-000", 16, 1.5, "running")
    assert not book.result("s-000", 16, 1.5, "running")  # told again, trained again
    book.result("s-001", 16, None, "stopped")
    book.result("s-000", 96, 2.5, "finished")
    book.result("s-002", 16, 0.5, "running")
    book.ended("s-003", "failed", "no room")
    book.close()
    with book.path.open("a") as file:
        file.write('{"event": "result", "trial": "s-002", "kimg": 32, "sc')
    again = Book(make_sweep())
    states = {s.name: (s.state, s.kimg, s.score) for s in again.standings.values()}
    assert states == {
        "s-000": ("finished", 96, 2.5),
        "s-001": ("stopped", 16, None),
        "s-002": ("interrupted", 16, 0.5),
        "s-003": ("failed", 0, None),
    }
    assert [s.name for s in again.unfinished] == ["s-002", "s-003"]
    assert [s.name for s in ranked(again)] == ["s-000", "s-002", "s-001", "s-003"]
    assert again.results == [
        ("s-000", 16, 1.5),
        ("s-001", 16, None),
        ("s-000", 96, 2.5),
        ("s-002", 16, 0.5),
    ]


def test_a_folder_holds_one_sweep(make_sweep: MakeSweep) -> None:
    opened(make_sweep()).close()
    opened(make_sweep(trials=6, max_concurrent=2)).close()
    with pytest.raises(ConfigError, match=r"other settings \(mode\)"):
        opened(make_sweep(trials=6, mode="min"))
    with pytest.raises(ConfigError, match="fewer trials"):
        opened(make_sweep(trials=5))


def test_the_best_trial_s_command_trains_it_again(make_sweep: MakeSweep) -> None:
    schedule = {"start": 4e-4, "end": 1e-4, "kimg": 50, "shape": "cosine"}
    sweep = make_sweep(
        search={"optimizer.lr": {"uniform": [0.5, 2], "relative": True}},
        overrides={**make_sweep().file.overrides, "optimizer.lr": schedule},
    )
    book = opened(sweep)
    assert best_command(book) is None
    book.result("s-002", 16, 3.0, "running")
    command = best_command(book)
    book.close()
    assert command is not None

    words = shlex.split(command)
    assert words[:4] == ["ganscale", "train", "--config", "quickstart"]
    expected = sweep.config("s-002-again", sweep.trials()[2].values)
    again = load_config("quickstart", words[4:])
    assert again == expected.with_changes({"storage": sweep.base.storage})


def test_halving_goes_on_as_if_it_had_never_stopped(make_sweep: MakeSweep) -> None:
    """Whatever number of results was told by then; the decisions are those of the medians."""
    sweep = make_sweep(scheduler=ASHA)
    told = [
        ("s-000", 16, 1.0, "CONTINUE"),  # the first to come always goes on
        ("s-001", 16, 3.0, "CONTINUE"),
        ("s-002", 16, 1.5, "STOP"),  # the median of 1 and 3 is 2
        ("s-000", 32, 2.0, "CONTINUE"),
        ("s-003", 16, 1.6, "CONTINUE"),  # the median of 1, 1.5 and 3 is 1.5
        ("s-001", 32, 1.9, "STOP"),
        ("s-000", 48, math.nan, "STOP"),  # no number is no reason to go on
    ]
    for cut in range(len(told)):
        book = Book(sweep)
        book.results += [(name, kimg, score) for name, kimg, score, _ in told[:cut]]
        halving = Halving(book, sweep.file.scheduler)  # type: ignore[arg-type]
        trials = {name: FakeTrial(name) for name in book.standings}
        for trial in trials.values():
            halving.on_trial_add(None, trial)
        for name, kimg, score, decision in told[cut:]:
            result = {"kimg": kimg, "score": score}
            assert halving.on_trial_result(None, trials[name], result) == decision, (cut, name)


class FakeTrial:
    """What Tune's schedulers see of a trial."""

    def __init__(self, name: str, values: dict[str, Any] | None = None) -> None:
        self.config = {"trial": {"name": name, "values": values or {}, "after_kimg": 0}}
        self.evaluated_params: dict[str, Any] = {}
        self.trial_id = f"tune-{id(self)}"
        self.experiment_tag = name
        self.status = "RUNNING"
        self.checkpoint = f"checkpoint of {name}"
        self.temporary_state = SimpleNamespace(saving_to=None)
        manager = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
        self.run_metadata = SimpleNamespace(checkpoint_manager=manager)

    def is_finished(self) -> bool:
        return self.status == "TERMINATED"

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config


class FakeController:
    """Tune's controller, with trials that wait when they are told to."""

    search_alg = None

    def __init__(self, scheduler: PopulationScheduler, book: Book) -> None:
        self.scheduler = scheduler
        self.trials = [FakeTrial(s.name, s.values) for s in book.standings.values()]
        for trial in self.trials:
            scheduler.on_trial_add(self, trial)

    def get_trials(self) -> list[FakeTrial]:
        return self.trials

    def get_live_trials(self) -> list[FakeTrial]:
        return self.trials

    def pause_trial(self, trial: FakeTrial, should_checkpoint: bool) -> None:
        trial.status = "PAUSED"

    def _schedule_trial_save(self, trial: FakeTrial, result: Any) -> str:
        return trial.checkpoint

    def tell(self, number: int, kimg: float, score: float) -> str:
        trial = self.trials[number]
        result = {"kimg": kimg, "score": score}
        decision: str = self.scheduler.on_trial_result(self, trial, result)
        if decision == TrialScheduler.PAUSE:
            trial.status = "PAUSED"
        return decision


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Copy]:
    """Those that are made, of checkpoints that there are none of."""
    made: list[Copy] = []

    def make(book: Book, copy: Copy) -> None:
        made.append(copy)
        book.copied(copy, "nimg-000000016000-a0002")

    monkeypatch.setattr(sweep_schedulers, "make_copy", make)
    return made


def population(sweep: Sweep) -> tuple[Book, FakeController]:
    book = opened(sweep)
    scheduler = PopulationScheduler(book, sweep.file.scheduler)  # type: ignore[arg-type]
    return book, FakeController(scheduler, book)


@pytest.mark.parametrize("worst", [0, 3])
def test_in_a_round_the_worst_copies_the_best(
    make_sweep: MakeSweep, copies: list[Copy], worst: int
) -> None:
    """Whichever comes first; Tune's own leaves it out when the worst is asked before the best."""
    sweep = make_sweep(scheduler=PBT)
    book, controller = population(sweep)
    best = 3 - worst
    scores = {1: 5.0, 2: 6.0, worst: math.nan, best: 9.0}
    for number in (1, 2, worst):
        assert controller.tell(number, 16, scores[number]) == TrialScheduler.PAUSE
        assert not copies
    controller.tell(best, 16, scores[best])
    before = sweep.trials()[best].values
    after = sweep.explored(before, 16, worst)
    assert copies == [Copy(16, f"s-00{worst}", f"s-00{best}", after)]
    assert controller.trials[worst].config["trial"]["values"] == after
    assert controller.trials[best].config["trial"]["values"] == before
    (planned,) = [row for row in read_lines(book.path) if row["event"] == "round"]
    assert planned["scores"] == {f"s-00{n}": scores[n] if n != worst else None for n in range(4)}
    assert planned["copies"][0]["before"] == before
    book.close()
    again = Book(sweep)
    assert again.round_kimg == 16
    assert again.copies == []
    assert again.standings[f"s-00{worst}"].values == after
    assert again.standings[f"s-00{worst}"].source == f"s-00{best}"
    # The next round is at 32, and not before.
    scheduler = PopulationScheduler(again, sweep.file.scheduler)  # type: ignore[arg-type]
    resumed = FakeController(scheduler, again)
    assert resumed.tell(0, 16, 1.0) == TrialScheduler.CONTINUE
    assert resumed.tell(0, 32, 1.0) == TrialScheduler.PAUSE


def test_copies_that_were_planned_and_not_made_are_still_to_make(
    make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(book: Book, copy: Copy) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_schedulers, "make_copy", killed)
    sweep = make_sweep(scheduler={**PBT, "quantile": 0.5})
    book, controller = population(sweep)
    for number, score in enumerate([1.0, 8.0, 2.0]):
        controller.tell(number, 16, score)
    with pytest.raises(KeyboardInterrupt):
        controller.tell(3, 16, 9.0)
    book.close()
    left = Book(sweep).copies
    assert [copy.target for copy in left] == ["s-000", "s-002"]
    assert {copy.source for copy in left} <= {"s-001", "s-003"}


@pytest.mark.parametrize("end", ["on_trial_complete", "on_trial_error"])
def test_a_trial_that_ends_keeps_nobody_waiting(
    make_sweep: MakeSweep, copies: list[Copy], end: str
) -> None:
    book, controller = population(make_sweep(scheduler=PBT))
    for number, score in enumerate([1.0, 2.0, 3.0]):
        controller.tell(number, 16, score)
    assert not copies
    gone = controller.trials[3]
    more: list[Any] = [{}] if end == "on_trial_complete" else []
    getattr(controller.scheduler, end)(controller, gone, *more)
    gone.status = "TERMINATED"
    assert [(copy.target, copy.source) for copy in copies] == [("s-000", "s-002")]
    assert controller.scheduler.choose_trial_to_run(controller) is controller.trials[0]
    # Nor in the rounds to come, though Tune goes on to count a trial that failed as alive.
    for number, score in enumerate([1.0, 2.0, 3.0]):
        controller.tell(number, 32, score)
    assert [(copy.kimg, copy.target, copy.source) for copy in copies[1:]] == [
        (32, "s-000", "s-002")
    ]
    book.close()


def test_trials_that_fail_before_anybody_has_a_result_end_no_sweep(
    make_sweep: MakeSweep, copies: list[Copy]
) -> None:
    book, controller = population(make_sweep(scheduler=PBT))
    for trial in controller.trials:
        controller.scheduler.on_trial_error(controller, trial)
        trial.status = "TERMINATED"
    assert not copies
    book.close()


def _with_checkpoints(config: Config, *positions: int) -> CheckpointStore:
    store = CheckpointStore(config.checkpoints)
    attempt = begin(store)
    for nimg in positions:
        store.write(attempt, saved_at(nimg))
    return store


def _pair(sweep: Sweep) -> tuple[Book, Copy, CheckpointStore, CheckpointStore]:
    """Trial 0 at 1000 images is to copy trial 1 at 2000."""
    book = opened(sweep)
    first, second = (sweep.config(t.name, t.values) for t in sweep.trials()[:2])
    mine, other = _with_checkpoints(first, 500, 1000), _with_checkpoints(second, 2000)
    write_text(RunDirectory(first.run_dir).config, first.to_yaml())
    sink = JsonlSink(RunDirectory(first.run_dir).metrics)
    sink.log({"step": 1, "nimg": 1000, "attempt": 1})
    sink.close()
    copy = Copy(16, "s-000", "s-001", sweep.explored(sweep.trials()[1].values, 16, 0))
    book.plan(16, [copy], {})
    return book, copy, mine, other


def test_a_copy_is_the_newest_checkpoint_of_a_new_attempt(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(scheduler=PBT)
    book, copy, mine, _ = _pair(sweep)
    make_copy(book, copy)
    book.close()
    assert [str(name) for name in mine.lineage()] == [
        "nimg-000000002000-a0002",
        "nimg-000000001000-a0001",
        "nimg-000000000500-a0001",
    ]
    newest = mine.newest()
    assert newest is not None
    assert bits(newest.state()) == bits(state_at(2000))
    config = sweep.config("s-000", copy.values)
    run_dir = RunDirectory(config.run_dir)
    assert newest.history == run_dir.metrics.read_bytes()  # its own, not that of the other
    assert newest.meta["config"] == config.model_dump(mode="json")
    assert newest.meta["copied_from"].endswith("s-001/checkpoints/nimg-000000002000-a0001")
    assert load_config(run_dir.config) == config
    (event,) = read_lines(run_dir.events)
    assert (event["event"], event["source"], event["nimg"]) == ("copy", "s-001", 2000)
    assert event["values"] == copy.values
    assert event["values_before"] == sweep.trials()[0].values
    assert Book(sweep).copies == []


def test_a_kill_in_the_middle_of_a_copy_loses_nothing(
    make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(scheduler=PBT)
    book, copy, mine, _ = _pair(sweep)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # the attempt is claimed, nothing is written
        patch.setattr(CheckpointStore, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            make_copy(book, copy)
    assert str(mine.lineage()[0]) == "nimg-000000001000-a0001"
    with monkeypatch.context() as patch:  # the checkpoint is there, its configuration is not
        patch.setattr(sweep_schedulers, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            make_copy(book, copy)
    book.close()
    again = opened(sweep)
    assert again.copies == [copy]
    sweep_schedulers.finish_copies(again)
    again.close()
    assert again.copies == []
    newest = mine.newest()
    assert newest is not None
    assert bits(newest.state()) == bits(state_at(2000))
    assert (
        load_config(RunDirectory(mine_dir(sweep)).config).optimizer.lr.start
        == (copy.values["optimizer.lr"])
    )


def mine_dir(sweep: Sweep) -> Path:
    return sweep.root / "s-000"


def test_results_are_at_positions_that_trials_share(make_sweep: MakeSweep) -> None:
    """The row is behind the multiple of 16 kimg by part of a batch, or by part of a log interval;
    rows of superseded attempts and those that no checkpoint holds are left out."""
    sweep = make_sweep(search={"training.batch_size": {"choice": [100]}})
    trial = sweep.trials()[0]
    config = sweep.config(trial.name, trial.values)
    run_dir = RunDirectory(config.run_dir)
    sink, events = JsonlSink(run_dir.metrics), EventLog(run_dir.events)
    events.write("start", attempt=1, nimg=0)
    for nimg, value in ((16_100, 1.0), (17_000, 1.1), (32_000, 2.0), (48_000, 3.0)):
        sink.log({"step": 1, "nimg": nimg, "attempt": 1, "metrics/diversity": value})
    sink.log({"step": 1, "nimg": 33_000, "attempt": 1, "train/loss_D": 1.0})
    events.write("resume", attempt=2, nimg=32_000)
    sink.log({"step": 1, "nimg": 48_000, "attempt": 2, "metrics/diversity": math.nan})
    sink.log({"step": 1, "nimg": 96_000, "attempt": 2, "metrics/diversity": 6.0})
    events.close()
    sink.close()
    everything = [(16, 1.0), (32, 2.0), (48, None), (96, 6.0)]
    assert reports(sweep, config, after_kimg=0) == everything
    assert reports(sweep, config, after_kimg=16) == everything[1:]
    assert reports(sweep, config, after_kimg=0, first_attempt=2) == everything[2:]
    assert durable_reports(sweep, config, after_kimg=0) == []
    _with_checkpoints(config, 32_000)
    assert durable_reports(sweep, config, after_kimg=0) == everything[:2]


def test_the_frechet_distance_is_found_under_any_network() -> None:
    row = {
        "metrics/fd_infinity_dinov2": 1.0,
        "metrics/fd_per_class_dinov2": 1.0,
        "metrics/kd_dinov2": 1.0,
        "metrics/fd_dinov2": 2.0,
    }
    assert value_of("fid", row) == "metrics/fd_dinov2"
    assert value_of("fid", {"metrics/fid_infinity": 1.0, "metrics/fid": 2.0}) == "metrics/fid"
    assert value_of("fid", {"metrics/diversity": 1.0}) is None
    assert value_of("train/loss_D", {"train/loss_D": 1.0}) == "train/loss_D"
