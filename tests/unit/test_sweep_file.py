"""A sweep's file: what is drawn, what is refused, what exploring does, and what a trial becomes."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganscale.config import Config, load_config
from ganscale.config.search_space import Domain, drawn, generator_for
from ganscale.config.sweep import Sweep
from ganscale.errors import ConfigError

SPACE: dict[str, Any] = {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}}
EVALUATED = {"evaluation.every_kimg": 16, "evaluation.metrics": ["fid", "kid"]}
PBT = {"name": "pbt", "interval_kimg": 16}


def sweep(**changes: Any) -> Sweep:
    """A valid sweep of four trials, with changes."""
    values = {"name": "s", "search": SPACE, "mode": "max", "trials": 4, **changes}
    return Sweep.of(values, Path("s.yaml"))


def refusal(**changes: Any) -> str:
    """The one line with which a sweep is refused."""
    with pytest.raises(ConfigError) as error:
        sweep(**changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def domain(**values: Any) -> Domain:
    return Domain.model_validate(values)


class Scripted(random.Random):
    """Random numbers that are given."""

    def __init__(self, *numbers: float) -> None:
        super().__init__(0)
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


def up(value: Any, space: Domain) -> Any:
    return space.explored(value, (0.8, 1.25), 0.25, Scripted(0.9, 0.1))


def down(value: Any, space: Domain) -> Any:
    return space.explored(value, (0.8, 1.25), 0.25, Scripted(0.9, 0.9))


def test_values_lie_where_they_should_and_are_spread() -> None:
    space = {
        "a": domain(uniform=[2, 4]),
        "b": domain(loguniform=[1e-4, 1e-2]),
        "c": domain(integers=[1, 3]),
        "d": domain(choice=["x", "y"]),
    }
    trials = [drawn(space, 0, number) for number in range(2000)]
    assert all(2 <= t["a"] <= 4 and 1e-4 <= t["b"] <= 1e-2 for t in trials)
    assert {t["c"] for t in trials} == {1, 2, 3}
    assert {t["d"] for t in trials} == {"x", "y"}
    # Means of the uniform distributions, with standard errors 0.013 and 0.03.
    assert sum(t["a"] for t in trials) / 2000 == pytest.approx(3, abs=0.06)
    logs = [math.log(t["b"]) for t in trials]
    assert sum(logs) / 2000 == pytest.approx(math.log(1e-3), abs=0.15)


def test_a_value_depends_on_seed_trial_and_field_alone() -> None:
    one = {"a": domain(uniform=[0, 1])}
    two = {"b": domain(uniform=[0, 1]), **one}
    assert [drawn(one, 3, n)["a"] for n in range(9)] == [drawn(two, 3, n)["a"] for n in range(9)]
    assert drawn(one, 3, 0) != drawn(one, 4, 0)
    assert drawn(two, 3, 0)["a"] != drawn(two, 3, 0)["b"]


def test_grids_are_multiplied_and_repeated() -> None:
    search = {"optimizer.beta1": {"grid": [0.0, 0.5]}, "seed": {"grid": [1, 2, 3]}}
    points = [t.values for t in sweep(search=search, trials=None).trials()]
    product = [{"optimizer.beta1": b, "seed": s} for b in (0.0, 0.5) for s in (1, 2, 3)]
    assert points == product
    assert [t.values for t in sweep(search=search, trials=12).trials()] == product * 2
    assert "trials=7: expected a multiple of 6" in refusal(search=search, trials=7)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"search": {"optimiser.lr": {"choice": [1]}}}, "did you mean 'optimizer.lr'?"),
        ({"search": {"optimizer.rl": {"choice": [1]}}}, "did you mean 'optimizer.lr'?"),
        ({"overrides": {"training.total": 3}}, "did you mean 'training.total_kimg'?"),
        ({"serch": SPACE}, "did you mean 'search'?"),
        ({"search": {"optimizer.lr": {"normal": [0, 1]}}}, "expected one of choice, grid"),
        ({"search": {"optimizer.lr": {"uniform": [2, 1]}}}, "low < high, got [2, 1]"),
        ({"search": {"optimizer.lr": {"loguniform": [0, 1]}}}, "numbers above 0, got 0"),
        ({"search": {"optimizer.beta1": {"choice": [1.5]}}}, "optimizer.beta1=1.5"),
        ({"search": {"storage": {"choice": ["a"]}}}, "storage cannot vary"),
        ({"search": {"data.source": {"choice": ["a", "b"]}}}, "data.source cannot vary"),
        ({"search": {"data.shards": {"choice": ["a", "b"]}}}, "data.shards cannot vary"),
        ({"search": {"augment.name": {"choice": [1], "relative": True}}}, "is no number"),
        ({"trials": None}, "trials: say how many"),
        ({"mode": "best"}, "mode='best'"),
        ({"metric": "frechet"}, "is now called fid"),
        ({"metric": "fid"}, "needs evaluations: set evaluation.every_kimg"),
        ({"metric": "metrics/coverage", "overrides": EVALUATED}, "not among the results of"),
        ({"metric": "metrics/fdi", "overrides": EVALUATED}, "not among the results of"),
        ({"scheduler": {"name": "asha", "grace_kimg": 1}}, "grace_kimg=1 must be between 16"),
        ({"scheduler": {"name": "pbt", "interval_kimg": 96}}, "must be between 16"),
        ({"scheduler": PBT, "trials": 1}, "two trials at least"),
        ({"scheduler": PBT, "max_concurrent": 2}, "max_concurrent: leave it out"),
        (
            {"scheduler": PBT, "search": {"training.batch_size": {"choice": [32, 64]}}},
            "training.batch_size cannot change within a run",
        ),
        ({"scheduler": PBT, "search": {"penalty.r1": {"choice": [0, 1]}}}, "may not become 0"),
        # A value that no trial begins with, but that one could come to.
        ({"scheduler": PBT, "search": {"optimizer.beta1": {"uniform": [0, 1]}}}, "beta1=1.0"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(changes: dict[str, Any], told: str) -> None:
    assert told in refusal(**changes)


def test_the_metric_may_be_any_result_of_the_evaluations() -> None:
    evaluated = {**EVALUATED, "evaluation.metrics": ["fid", "kid", "prdc"]}
    for name in ("fid", "fd_dinov2", "kid", "kd_dinov2", "recall", "density_dinov2", "diversity"):
        assert sweep(metric=f"metrics/{name}", overrides=evaluated)


def test_exploring_multiplies_within_the_bounds() -> None:
    rate = domain(loguniform=[1e-4, 1e-3])
    assert up(4e-4, rate) == pytest.approx(5e-4)
    assert down(4e-4, rate) == pytest.approx(3.2e-4)
    assert down(up(4e-4, rate), rate) == pytest.approx(4e-4)  # the factors are reciprocal
    assert up(9e-4, rate) == 1e-3
    assert down(1.1e-4, rate) == 1e-4
    assert rate.explored(4e-4, (0.8, 1.25), 0.25, Scripted(0.2, 0.5)) == pytest.approx(
        math.sqrt(1e-4 * 1e-3), rel=1e-3
    )


def test_exploring_moves_whole_numbers_and_lists_by_a_step() -> None:
    count = domain(integers=[1, 100])
    assert (up(2, count), down(2, count)) == (3, 1)
    assert (up(40, count), down(40, count)) == (50, 32)
    assert (up(100, count), down(1, count)) == (100, 1)
    listed = domain(choice=[0.1, 1.0, 10.0])
    assert (up(1.0, listed), down(1.0, listed)) == (10.0, 0.1)
    assert (up(10.0, listed), down(0.1, listed)) == (10.0, 0.1)


@given(
    value=st.floats(1e-4, 1e-2),
    factors=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    resample=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_explored_values_never_leave_the_space(
    value: float, factors: tuple[float, float], resample: float, seed: int
) -> None:
    space = domain(loguniform=[1e-4, 1e-2])
    assert 1e-4 <= space.explored(value, factors, resample, generator_for(seed)) <= 1e-2


def test_a_relative_value_multiplies_a_schedule_at_every_position() -> None:
    schedule = {"start": 4e-4, "end": 1e-4, "kimg": 50, "shape": "cosine"}
    relative = sweep(
        overrides={"optimizer.lr": schedule},
        search={"optimizer.lr": {"uniform": [0.5, 2], "relative": True}},
    )
    base, tripled = relative.base, relative.config("t", {"optimizer.lr": 3})
    for nimg in (0, 10_000, 25_000, 60_000):
        assert tripled.optimizer.lr.at(nimg) == pytest.approx(3 * base.optimizer.lr.at(nimg))
    replaced = sweep(overrides={"optimizer.lr": schedule}).config("t", {"optimizer.lr": 3e-4})
    assert {replaced.optimizer.lr.at(nimg) for nimg in (0, 25_000, 60_000)} == {3e-4}


@pytest.mark.parametrize("kind", ["choice", "grid"])
def test_a_relative_value_that_is_no_number_is_refused(kind: str) -> None:
    search = {"optimizer.lr": {kind: [0.5, "a"], "relative": True}}
    assert "optimizer.lr: 'a' is no number" in refusal(search=search)


def test_a_trial_is_a_run_in_the_folder_of_the_sweep(tmp_path: Path) -> None:
    places = {"storage": str(tmp_path), "checkpoint.location": "s3://bucket/runs/"}
    found = sweep(overrides=places)
    trial = found.trials()[3]
    config = found.config(trial.name, trial.values)
    assert config.run_dir == tmp_path / "s" / "s-003"
    assert config.checkpoints == "s3://bucket/runs/s/s-003"
    assert config.optimizer.lr.start == trial.values["optimizer.lr"]
    same = {"name": "quickstart", "storage": "runs", "optimizer.lr": 5e-4}
    assert config.with_changes({**same, "checkpoint.location": None}) == Config.model_validate(
        sweep().base.model_dump()
    )


def test_a_trial_of_another_architecture_has_the_values_that_train_gives_it(
    tmp_path: Path,
) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("model: {name: dcgan}")
    names = {"model.name": {"choice": ["sngan", "r3gan"]}}
    trials = sweep(config=str(base), search=names)
    for name in ("sngan", "r3gan"):
        config = trials.config("t", {"model.name": name})
        assert config.model == load_config(base, [f"model.name={name}"]).model


def test_the_overrides_of_a_sweep_hold_for_every_architecture() -> None:
    trials = sweep(
        config="quickstart",
        overrides={"model": {"z_dim": 48}, "training": {"total_kimg": 48}},
        search={"model.name": {"grid": ["dcgan", "sngan"]}},
    )
    dcgan, sngan = (trials.config(trial.name, trial.values) for trial in trials.trials()[:2])
    assert (dcgan.model.z_dim, dcgan.model.base_channels) == (48, 32)
    assert (sngan.model.z_dim, sngan.model.base_channels) == (48, 128)
    assert sngan.training == load_config("quickstart", ["training.total_kimg=48"]).training


def test_each_field_is_explored_within_its_own_domain() -> None:
    search = {"optimizer.lr": {"choice": [1e-4, 1e-3]}, "penalty.r1": {"uniform": [1, 2]}}
    population = sweep(scheduler={**PBT, "factors": [0.5, 2], "resample": 0}, search=search)
    # A field draws whether it is drawn anew, which is never the case here, and the direction.
    up, down = [0.9, 0.1], [0.9, 0.9]
    explored = population.explored({"optimizer.lr": 1e-4, "penalty.r1": 1.5}, Scripted(*up, *down))
    assert explored == {"optimizer.lr": 1e-3, "penalty.r1": 1}
