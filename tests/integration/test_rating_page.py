"""The rating page in a real browser, over a killed server: every answer is there, once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from ganscale.rating.answers import read_answers
from tests.support.browsers import chromium

NUM = 12
WAIT_SECONDS = 60


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of dark images, the fakes, and one of bright ones."""
    random = np.random.default_rng(0)
    folders = tmp_path / "dark", tmp_path / "bright"
    for folder, base in zip(folders, (0, 128), strict=True):
        folder.mkdir()
        for number in range(NUM):
            pixels = random.integers(base, base + 128, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folders


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    with chromium(tmp_path / "profile") as chrome:
        yield chrome


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ganscale", "rate", *map(str, arguments)]


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command as a process of its own, and the URL that it prints."""
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        try:
            yield process, process.stdout.readline().split()[1]
        finally:
            process.kill()


class Rater:
    """Somebody who looks at the page."""

    def __init__(self, browser: Chrome) -> None:
        self.browser = browser

    def enter(self, url: str, name: str) -> None:
        self.browser.get(url)
        field = self.browser.find_element(By.ID, "name")
        assert field == self.browser.switch_to.active_element
        field.send_keys(name, Keys.ENTER)

    def text(self, element: str) -> str:
        return self.browser.find_element(By.ID, element).text

    def waits_for(self, element: str, words: str) -> None:
        wait = WebDriverWait(self.browser, WAIT_SECONDS)
        wait.until(lambda _: words in self.text(element), f"{element} never says {words!r}")

    def waits_for_question(self, number: int) -> None:
        """Until it may be answered."""
        self.waits_for("count", f"{number - 1} of {NUM}")
        ready = "return question !== null && question.number === arguments[0]"
        wait = WebDriverWait(self.browser, WAIT_SECONDS)
        wait.until(lambda _: self.browser.execute_script(ready, number), "no question")

    def presses(self, key: str) -> None:
        self.browser.find_element(By.TAG_NAME, "body").send_keys(key)

    def clicks(self, label: str) -> None:
        buttons = self.browser.find_elements(By.CSS_SELECTOR, "#choices button")
        (button,) = (b for b in buttons if b.text.startswith(label))
        button.click()

    def sees_bright(self) -> bool:
        """What the pixels on the screen say."""
        mean = self.browser.execute_script(
            "const image = document.querySelector('#pictures img');"
            "const canvas = new OffscreenCanvas(16, 16).getContext('2d');"
            "canvas.drawImage(image, 0, 0);"
            "const data = [...canvas.getImageData(0, 0, 16, 16).data];"
            "return data.reduce((a, b) => a + b) / data.length;"
        )
        return float(mean) > (64 * 3 + 255) / 4 + 32


def test_answers_over_a_killed_server(
    browser: Chrome, images: tuple[Path, Path], tmp_path: Path
) -> None:
    dark, bright = images
    out = tmp_path / "out"
    arguments = (dark, "--reference", bright, "--num", NUM, "--out", out, "--port")
    rater = Rater(browser)
    ways = [
        lambda: rater.presses("f"),
        lambda: rater.presses("j"),
        lambda: rater.clicks("Fake"),
        lambda: rater.clicks("Real"),
        lambda: rater.presses(Keys.ARROW_LEFT),
        lambda: rater.presses(Keys.ARROW_RIGHT),
    ]
    seen = []

    def answer(first: int, last: int) -> None:
        for number in range(first, last + 1):
            rater.waits_for_question(number)
            seen.append(rater.sees_bright())
            ways[number % len(ways)]()

    with serving(*arguments, 0) as (process, url):
        rater.enter(url, "Ada")
        answer(1, 7)
        rater.waits_for_question(8)
        process.send_signal(signal.SIGKILL)
        process.wait(WAIT_SECONDS)
        rater.presses("j")
        rater.waits_for("problem", "The server does not answer")
        assert len(read_answers(out / "answers.jsonl")) == 7

    with serving(*arguments, url.rstrip("/").rpartition(":")[2]) as (process, _):
        rater.enter(url, "  ADA ")
        answer(8, NUM)
        rater.waits_for("end", f"All {NUM} answers are stored")
        assert rater.text("count") == f"{NUM} of {NUM}"
        assert "wrong" not in rater.text("end")
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        table = process.stdout.read()
        assert process.wait(WAIT_SECONDS) == 0

    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == list(range(1, NUM + 1))
    assert {row["rater"] for row in rows} == {"ada"}
    assert [row["answer"] for row in rows] == [
        "real" if number % 2 else "fake" for number in range(1, NUM + 1)
    ]
    assert [row["truth"] == ["real"] for row in rows] == seen
    assert sum(seen) == NUM // 2
    assert [row["correct"] for row in rows] == [
        (row["answer"] == "real") == real for row, real in zip(rows, seen, strict=True)
    ]
    assert all(0 < row["response_seconds"] < WAIT_SECONDS for row in rows)
    wrong = sum(not row["correct"] for row in rows)
    assert f"1 rater, {NUM} answers" in table
    assert f"(HYPE)      {NUM}  {wrong / NUM:6.1%}" in table
    printed = subprocess.run(
        command("--results", "--out", out), capture_output=True, text=True, check=True
    )
    assert printed.stdout.splitlines() == table.strip().splitlines()[-4:]
    problems = browser.get_log("browser")  # type: ignore[no-untyped-call]
    # The killed server's; a script's and the content policy's would have other sources.
    assert {problem["source"] for problem in problems} <= {"network"}, problems


@pytest.mark.slow
def test_of_two_images_one_is_preferred_and_a_lost_answer_is_sent_again(
    browser: Chrome, images: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = (*images, "--task", "preference", "--num", NUM, "--out", out, "--port")
    rater = Rater(browser)
    with serving(*arguments, 0) as (_, url):
        rater.enter(url, "ada")
        rater.waits_for_question(1)
        assert len(browser.find_elements(By.CSS_SELECTOR, "#pictures img")) == 2
        bright = rater.sees_bright()
    rater.presses("f")
    rater.waits_for("problem", "The server does not answer")
    with serving(*arguments, url.rstrip("/").rpartition(":")[2]):
        browser.find_element(By.CSS_SELECTOR, "#problem button").click()
        rater.waits_for_question(2)
    (answer,) = read_answers(out / "answers.jsonl")
    assert answer.chosen == answer.truth[0] == ("bright" if bright else "dark")
    assert answer.correct is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_also_where_a_shell_lets_none_through(
    images: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    dark, bright = images
    arguments = (dark, "--reference", bright, "--num", NUM, "--out", tmp_path / "out", "--port", 0)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # children inherit it, as of a shell's &
    try:
        with serving(*arguments) as (process, _):
            process.send_signal(number)
            assert process.wait(WAIT_SECONDS) == 0
    finally:
        signal.signal(signal.SIGINT, before)
