"""The guard raises each alarm when its sign lasts, once, and never on a run that goes well."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from ganscale.training.guard import Alarm, Guard


def row(number: int, **changes: float) -> dict[str, float]:
    """Row 1, 2, ... of a run of 8 steps and 1000 images a row in which all is well."""
    values = {
        "nimg": 1000.0 * number,
        "step": 8.0 * number,
        "train/loss_D": 0.7,
        "train/loss_G": 1.2,
        "train/grad_norm_D": 2.0,
        "train/grad_norm_G": 0.5,
        "train/real_logits": 1.5,
        "train/fake_logits": -1.5,
        "train/loss_scale_D": 4096.0,
        "train/loss_scale_G": 4096.0,
        "train/skips_D": 0.0,
        "train/skips_G": 0.0,
    }
    return {**values, **{name.replace("__", "/"): value for name, value in changes.items()}}


def alarms(guard: Guard, *rows: dict[str, float]) -> list[tuple[int, Alarm]]:
    """The alarms with the numbers (1, 2, ...) of the rows that gave them."""
    return [(n, alarm) for n, r in enumerate(rows, start=1) for alarm in guard.look(r)]


def healthy(count: int) -> list[dict[str, float]]:
    return [row(n) for n in range(1, count + 1)]


@pytest.mark.parametrize("scaled", [False, True])
def test_a_run_that_goes_well_gives_no_alarm(scaled: bool) -> None:
    rng = random.Random(0)
    guard = Guard("nonsaturating", models="DG", scaled=scaled)
    for number in range(1, 3000):
        noise = math.exp(rng.gauss(0, 1))
        gap = rng.uniform(0, 30)
        changes = {
            "train__grad_norm_D": 2 * noise,
            "train__grad_norm_G": 0.5 / noise,
            "train__real_logits": gap,
            "metrics__diversity": 60 + rng.gauss(0, 10),
        }
        if scaled:  # the scale is tried out, and a step is skipped now and then
            changes["train__skips_D"] = float(number // 20)
        assert guard.look(row(number, **changes)) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("player", "DG")
def test_a_loss_that_is_no_number_is_an_alarm_at_once(player: str, value: float) -> None:
    guard = Guard("hinge", models="DG", scaled=True)
    bad = row(4, **{f"train__loss_{player}": value})
    ((number, alarm),) = alarms(guard, *healthy(3), bad)
    assert (number, alarm.kind, alarm.healthy_nimg) == (4, "non_finite", 3000)
    assert f"loss of {player}" in alarm.message


def test_a_skipped_step_is_an_alarm_unless_gradients_are_scaled() -> None:
    rows = [*healthy(3), row(4, train__skips_D=1), row(5, train__skips_D=1)]
    ((number, alarm),) = alarms(Guard("hinge", models="DG", scaled=False), *rows)
    assert (number, alarm.kind) == (4, "non_finite")
    assert alarms(Guard("hinge", models="DG", scaled=True), *rows) == []


def test_a_scale_that_has_collapsed_is_an_alarm_after_three_rows() -> None:
    rows = [*healthy(2), *(row(n, train__loss_scale_G=0.5) for n in range(3, 9))]
    ((number, alarm),) = alarms(Guard("hinge", models="DG", scaled=True), *rows)
    assert (number, alarm.kind, alarm.healthy_nimg) == (5, "scale_collapse", 2000)


def test_steps_that_overflow_again_and_again_are_an_alarm() -> None:
    rows = [*healthy(2), *(row(n, train__skips_D=5.0 * (n - 2)) for n in range(3, 9))]
    ((number, alarm),) = alarms(Guard("hinge", models="DG", scaled=True), *rows)
    assert (number, alarm.kind) == (5, "scale_collapse")
    assert alarm.message == "5 of 8 steps of D overflowed"


def test_overflows_are_counted_against_the_turns_of_their_network() -> None:
    # Of 8 steps a row the discriminator has 8 and the generator 4.
    rows = [
        *healthy(2),
        *(row(n, train__skips_D=3.0 * (n - 2), train__skips_G=3.0 * (n - 2)) for n in range(3, 9)),
    ]
    guard = Guard("hinge", models="DG", scaled=True, discriminator_steps=2)
    ((number, alarm),) = alarms(guard, *rows)
    assert (number, alarm.kind) == (5, "scale_collapse")
    assert alarm.message == "3 of 4 steps of G overflowed"


@pytest.mark.parametrize(
    ("norm", "kind"), [(2001.0, "exploding"), (0.0019, "vanishing"), (1999.0, ""), (0.0021, "")]
)
def test_gradients_a_thousand_times_off_their_past_are_an_alarm(norm: float, kind: str) -> None:
    rows = [*healthy(25), *(row(n, train__grad_norm_D=norm) for n in range(26, 32))]
    found = [
        (n, a.kind, a.healthy_nimg)
        for n, a in alarms(Guard("hinge", models="DG", scaled=False), *rows)
    ]
    assert found == ([(30, kind, 25_000)] if kind else [])


def test_an_overflow_in_an_explosion_neither_ends_it_nor_is_healthy() -> None:
    rows = [*healthy(25), *(row(n, train__grad_norm_D=2001.0) for n in range(26, 32))]
    rows[27] = row(28, train__grad_norm_D=math.nan, train__skips_D=1.0)
    guard = Guard("hinge", models="DG", scaled=True)
    found = [(n, a.kind, a.healthy_nimg) for n, a in alarms(guard, *rows[:30])]
    assert found == []
    assert guard.healthy_nimg(30_000) == 25_000
    ((_, alarm),) = alarms(guard, rows[30])
    assert (alarm.kind, alarm.healthy_nimg) == ("exploding", 25_000)


def test_gradients_have_no_past_in_the_first_rows() -> None:
    rows = [row(n, train__grad_norm_D=1e-6 if n > 5 else 2.0) for n in range(1, 15)]
    assert alarms(Guard("hinge", models="DG", scaled=False), *rows) == []


@pytest.mark.parametrize(
    ("objective", "gap", "expected"),
    [("nonsaturating", 61, True), ("hinge", -61, True), ("relativistic", 59, False),
     ("wasserstein", 1000, False), ("least_squares", 1000, False)],
)  # fmt: skip
def test_logits_far_apart_are_an_alarm_where_the_loss_has_a_bound(
    objective: str, gap: float, expected: bool
) -> None:
    rows = [*healthy(2), *(row(n, train__real_logits=gap - 1.5) for n in range(3, 20))]
    found = alarms(Guard(objective, models="DG", scaled=False), *rows)
    assert [(n, a.kind) for n, a in found] == ([(12, "stuck")] if expected else [])


def test_images_that_become_alike_are_an_alarm_at_the_second_drawing() -> None:
    drawn = {5: 80.0, 10: 70.0, 15: 21.0, 20: 19.0, 25: 19.5, 30: 60.0}
    rows = [
        row(n, **({"metrics__diversity": drawn[n]} if n in drawn else {})) for n in range(1, 31)
    ]
    ((number, alarm),) = alarms(Guard("hinge", models="DG", scaled=False), *rows)
    assert (number, alarm.kind, alarm.healthy_nimg) == (25, "collapse", 15_000)


def test_images_that_were_never_diverse_are_none() -> None:
    rows = [row(n, metrics__diversity=2.0 + n / 10) for n in range(1, 31)]
    assert alarms(Guard("hinge", models="DG", scaled=False), *rows) == []


def test_an_alarm_is_raised_again_only_after_its_sign_has_gone() -> None:
    bad = {"train__loss_D": math.nan}
    rows = [row(1), row(2, **bad), row(3, **bad), row(4), row(5, **bad), row(6, **bad)]
    found = alarms(Guard("hinge", models="DG", scaled=False), *rows)
    assert [n for n, _ in found] == [2, 5]


def test_the_healthy_position_is_before_the_first_sign_of_anything() -> None:
    guard = Guard("hinge", models="DG", scaled=True)
    alarms(guard, *healthy(3))
    assert guard.healthy_nimg(3000) == 3000
    alarms(guard, row(4, train__loss_scale_D=0.5), row(5, train__loss_scale_D=0.5))
    assert guard.healthy_nimg(5000) == 3000
    alarms(guard, row(6))
    assert guard.healthy_nimg(6000) == 6000


def test_the_healthy_position_is_one_at_which_every_rule_has_looked() -> None:
    guard = Guard("hinge", models="DG", scaled=True)
    for n in range(1, 30):
        guard.look(row(n, **({"metrics__diversity": 80.0} if n % 10 == 0 else {})))
        # The next drawing may show that images have become alike since the last one.
        assert guard.healthy_nimg(1000 * n) == (1000 * n if n < 10 else n // 10 * 10_000)
    guard.look(row(30, metrics__diversity=1.0))
    assert guard.healthy_nimg(30_000) == 20_000
    # A checkpoint at a position without a row is as healthy as the last row.
    assert Guard("hinge", models="DG", scaled=True).healthy_nimg(5000) == 0


def test_a_guard_that_was_saved_goes_on_as_if_nothing_had_happened() -> None:
    rng = random.Random(1)
    rows = []
    for n in range(1, 80):
        changes: dict[str, Any] = {"train__grad_norm_D": rng.choice([2.0, 1e-4])}
        changes["train__skips_D"] = float(5 * n if n > 30 else 0)
        changes["metrics__diversity"] = rng.choice([80.0, 3.0])
        rows.append(row(n, **changes))
    whole = Guard("hinge", models="DG", scaled=True)
    expected = [whole.look(r) for r in rows]
    assert any(expected[50:])
    for cut in (1, 22, 33, 50):
        first, second = (
            Guard("hinge", models="DG", scaled=True),
            Guard("hinge", models="DG", scaled=True),
        )
        before = [first.look(r) for r in rows[:cut]]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert before + [second.look(r) for r in rows[cut:]] == expected
