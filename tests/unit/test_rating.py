"""Raters are asked fairly and blindly, no answer is lost or counted twice, and rates are right."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from ganscale.errors import DataError
from ganscale.rating.answers import Answer, AnswerLog, read_answers
from ganscale.rating.questions import REAL, Question, Task, num_needed, questions_for
from ganscale.rating.results import Rate, as_json, as_table, own_errors, rates_of

RATERS = ("ada", "ben", "cleo")
FAKES = ("runs/a", "runs/b", "runs/c")


def asked(
    rater: str, names: tuple[str, ...], task: Task, num: int, *, seed: int = 0
) -> tuple[Question, ...]:
    pools = num_needed(names, task=task, num=num)
    return questions_for(rater, task=task, num=num, seed=seed, pools=pools)


def shown(questions: tuple[Question, ...]) -> list[tuple[str, ...]]:
    return [tuple(p.contestant for p in q.pictures) for q in questions]


# Questions


@pytest.mark.parametrize("rater", RATERS)
@pytest.mark.parametrize(("num_runs", "num"), [(1, 2), (1, 100), (2, 100), (3, 100), (3, 4)])
def test_half_are_real_and_the_runs_share_the_rest(rater: str, num_runs: int, num: int) -> None:
    questions = asked(rater, (REAL, *FAKES[:num_runs]), "realness", num)
    assert [question.number for question in questions] == list(range(1, num + 1))
    counts = Counter(name for (name,) in shown(questions))
    assert counts[REAL] == num // 2
    shares = [counts[run] for run in FAKES[:num_runs]]
    assert sum(shares) == num // 2
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("rater", RATERS)
@pytest.mark.parametrize("names", [(REAL, "runs/a"), FAKES[:2], FAKES, (REAL, *FAKES)])
@pytest.mark.parametrize("num", [1, 12, 100])
def test_every_pair_and_side_comes_equally_often(
    rater: str, names: tuple[str, ...], num: int
) -> None:
    pairs = shown(asked(rater, names, "preference", num))
    assert all(left != right for left, right in pairs)
    num_pairs = len(names) * (len(names) - 1) // 2
    by_pair = Counter(frozenset(pair) for pair in pairs)
    assert set(by_pair.values()) <= {num // num_pairs, -(-num // num_pairs)}
    assert sum(by_pair.values()) == num
    by_order = Counter(pairs)
    for left, right in by_order:
        assert abs(by_order[left, right] - by_order[right, left]) <= 1


@pytest.mark.parametrize("task", ["realness", "preference"])
def test_a_rater_sees_no_image_twice_and_others_see_them_otherwise(task: Task) -> None:
    sessions = [asked(rater, (REAL, *FAKES), task, 60) for rater in RATERS]
    for questions in sessions:
        pictures = [picture for question in questions for picture in question.pictures]
        assert len(set(pictures)) == len(pictures)
    assert len(set(sessions)) == len(RATERS)
    assert sessions[0] == asked("ada", (REAL, *FAKES), task, 60)
    assert sessions[0] != asked("ada", (REAL, *FAKES), task, 60, seed=1)


def test_the_order_tells_nothing() -> None:
    sessions = [shown(asked(f"rater {n}", (REAL, "runs/a"), "realness", 20)) for n in range(400)]
    real = np.array([[name == REAL for (name,) in session] for session in sessions])
    # Over 400 raters a place's share of real images has a standard deviation of 0.025.
    assert np.abs(real.mean(axis=0) - 0.5).max() < 0.1
    repeats = (real[:, 1:] == real[:, :-1]).mean()
    assert abs(repeats - 9 / 19) < 0.02


# Answers


def row(rater: str, question: int, truth: str | tuple[str, str], answer: str) -> Answer:
    """`truth` names the image's origin, or those of the left and the right one."""
    single = isinstance(truth, str)
    return Answer(
        time=1.0,
        rater=rater,
        question=question,
        task="realness" if single else "preference",
        token=f"{question:032x}",
        truth=(truth,) if isinstance(truth, str) else truth,
        answer=answer,
        correct=(truth == REAL) == (answer == "real") if single else None,
        response_seconds=0.5,
        seed=0,
        digests=("0" * 64,),
    )


def test_an_answer_is_a_line_when_add_returns_and_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    rows = [row("ada", 1, REAL, "fake"), row("bén", 1, ("runs/a", REAL), "left")]
    with closing(AnswerLog(path)) as log:
        for count, answer in enumerate(rows, start=1):
            log.add(answer)
            assert read_answers(path) == rows[:count]
    assert json.loads(path.read_text().splitlines()[1])["truth"] == ["runs/a", REAL]


def test_whatever_is_left_of_a_torn_line_it_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with closing(AnswerLog(path)) as log:
        log.add(row("ada", 1, REAL, "real"))
        whole = path.stat().st_size
        log.add(row("ada", 2, REAL, "real"))
    data = path.read_bytes()
    for size in range(whole, len(data)):
        path.write_bytes(data[:size])
        assert len(read_answers(path)) == 1
        with closing(AnswerLog(path)) as log:
            assert path.read_bytes() == data[:whole]
            assert list(log.of("ada")) == [1]
            log.add(row("ada", 2, REAL, "real"))
        assert path.read_bytes() == data


def test_a_question_is_answered_once_whoever_asks_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with closing(AnswerLog(path)) as log:
        log.add(row("ada", 1, REAL, "real"))
        clicks = [
            threading.Thread(target=log.add, args=(row("ada", number, REAL, "fake"),))
            for number in (1, 2) * 8
        ]
        for click in clicks:
            click.start()
        for click in clicks:
            click.join()
    assert {(a.question, a.answer) for a in read_answers(path)} == {(1, "real"), (2, "fake")}
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("num_written", [None, 0, 40])
def test_a_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_written: int | None
) -> None:
    path = tmp_path / "answers.jsonl"
    pwrite = os.pwrite

    def full(file: int, data: bytes, offset: int) -> int:
        if num_written is None:
            raise OSError(28, "No space left on device")
        return pwrite(file, data[:num_written], offset)

    with closing(AnswerLog(path)) as log:
        log.add(row("ada", 1, REAL, "real"))
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(OSError, match=r"No space|could be written"):
                log.add(row("ada", 2, REAL, "real"))
        assert path.read_bytes() == before
        log.add(row("ada", 2, REAL, "fake"))
    assert [a.answer for a in read_answers(path)] == ["real", "fake"]


@pytest.mark.parametrize("line", ["", "[]", "{}", '{"rater": "ada"', "null"])
def test_a_whole_line_that_is_no_answer_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(asdict(row("ada", 1, REAL, "real"))) + f"\n{line}\n")
    with pytest.raises(DataError, match=r"answers\.jsonl: line 2 is not an answer"):
        read_answers(path)


# Results


def judged(rater: str, fakes: str, reals: str, run: str = "runs/a") -> list[Answer]:
    """A rater's answers to fakes and to real images, r for real and f for fake."""
    words = {"r": "real", "f": "fake"}
    given = [(run, words[a]) for a in fakes] + [(REAL, words[a]) for a in reals]
    return [row(rater, number, *answer) for number, answer in enumerate(given, start=1)]


def rate(rates: list[Rate], measure: str, *contestants: str) -> Rate:
    (found,) = (r for r in rates if (r.measure, r.contestants) == (measure, contestants))
    return found


def test_the_score_is_the_mean_of_the_errors_on_fakes_and_on_real_images() -> None:
    rates = rates_of(judged("ada", "rrrf", "ffrrrrrr"))
    assert rate(rates, "fakes_called_real").estimate.value == pytest.approx(3 / 4)
    assert rate(rates, "reals_called_fake").estimate.value == pytest.approx(2 / 8)
    assert rate(rates, "error").estimate.value == pytest.approx((3 / 4 + 2 / 8) / 2)
    assert [r.num_answers for r in rates] == [12, 4, 8]


def test_intervals_over_raters_are_those_of_scipy() -> None:
    random = np.random.default_rng(0)
    answers, errors = [], []
    for rater in range(30):
        wrong = random.integers(5, 40, 2)
        fakes = "r" * wrong[0] + "f" * (50 - wrong[0])
        reals = "f" * wrong[1] + "r" * (50 - wrong[1])
        answers += judged(f"rater {rater}", fakes, reals)
        errors.append(wrong.sum() / 100)
    found = rate(rates_of(answers), "error").estimate
    expected = bootstrap(
        (errors,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.value == pytest.approx(np.mean(errors))
    assert found.low == pytest.approx(expected.low, abs=0.003)
    assert found.high == pytest.approx(expected.high, abs=0.003)


def test_the_interval_of_one_rater_is_over_the_answers() -> None:
    found = rate(rates_of(judged("ada", "r" * 20 + "f" * 30, "r")), "fakes_called_real").estimate
    draws = np.random.default_rng(1).binomial(50, 0.4, 100_000) / 50
    assert (found.low, found.high) == pytest.approx(
        tuple(np.quantile(draws, [0.025, 0.975])), abs=0.021
    )


def test_raters_who_agree_leave_no_doubt_however_often_they_erred() -> None:
    answers = [a for rater in RATERS for a in judged(rater, "rf", "rf")]
    found = rate(rates_of(answers), "error").estimate
    assert (found.low, found.value, found.high) == (0.5, 0.5, 0.5)


def test_of_several_runs_each_has_its_own_error() -> None:
    answers = judged("ada", "rr", "frrr") + judged("ben", "rfff", "", run="runs/b")
    rates = rates_of(answers)
    assert rate(rates, "fakes_called_real").estimate.value == pytest.approx(3 / 6)
    assert rate(rates, "fakes_called_real", "runs/a").estimate.value == 1
    assert rate(rates, "fakes_called_real", "runs/b").estimate.value == pytest.approx(1 / 4)
    assert rate(rates, "error", "runs/b").estimate.value == pytest.approx((1 / 4 + 1 / 4) / 2)


def test_preferences_have_wilson_intervals_and_a_two_sided_p() -> None:
    pair = ("runs/b", "runs/a")
    sides = ["left"] * 6 + ["right"] * 14
    answers = [row("ada", n, pair, side) for n, side in enumerate(sides)]
    answers += [row("ben", n, pair[::-1], "left") for n in range(5)]
    (found,) = rates_of(answers)
    expected = binomtest(19, 25)
    interval = expected.proportion_ci(method="wilson")
    assert found.contestants == ("runs/a", "runs/b")
    assert found.estimate.value == pytest.approx(19 / 25)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((interval.low, interval.high))
    # Twice the chance of 19 heads or more in 25 throws.
    assert found.p_value == pytest.approx(0.0146332979)


def test_the_table_and_the_json_say_the_same() -> None:
    answers = judged("ada", "rrrf", "ffrr") + judged("ben", "ffff", "rrrr")
    text = "\n".join(as_table(answers))
    assert "2 raters, 16 answers" in text
    content = as_json(answers)
    assert content["raters"] == ["ada", "ben"]
    (score,) = (r for r in content["rates"] if r["measure"] == "error")
    assert re.search(rf"\(HYPE\) +16 +{score['value']:.1%}", text)
    assert score["value"] == pytest.approx((3 / 8 + 2 / 8) / 2)
    assert as_table([]) == ["no answers yet"]
    assert own_errors(judged("ada", "rrrf", "ffrr")) == "5 of 8 answers were wrong"
