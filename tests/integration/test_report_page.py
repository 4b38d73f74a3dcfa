"""The report in a real browser: wide and narrow, light and dark, by keyboard, without a request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from ganscale.report import write_report
from tests.support.browsers import chromium
from tests.support.run_folders import begin, checkpoint, end, noise_grid, row, write_run

STEPS = 1500


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    with chromium(tmp_path / "profile") as chrome:
        yield chrome


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    """A finished run with pictures, one that was killed, and an empty folder."""
    rows = [row(step) for step in range(100, STEPS + 1, 100)]
    events = [begin(), checkpoint(0), checkpoint(STEPS), end(STEPS)]
    done = write_run(tmp_path / "done", rows, events, samples=(0, 750, STEPS))
    noise_grid(done / "grid.png")
    noise_grid(done / "real.png")
    noise_grid(done / "strip.png", side=30)
    half = write_run(tmp_path / ("half-" + 100 * "x"), rows[:8], events[:2], samples=(0, 750))
    (tmp_path / "nothing").mkdir()
    return [str(done), str(half), str(tmp_path / "nothing")]


class Reader:
    """Somebody who looks at the page."""

    def __init__(self, browser: Chrome) -> None:
        self.browser = browser

    def opens(self, page: Path, *, width: int, scheme: str) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.browser.get(page.as_uri())

    def runs(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def sees(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def requests(self) -> list[str]:
        names = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        return [name for name in self.runs(names) if not name.startswith("data:")]

    def problems(self) -> list[Any]:
        log: list[Any] = self.browser.get_log("browser")  # type: ignore[no-untyped-call]
        return log


@pytest.mark.parametrize(
    ("width", "scheme"), [pytest.param(1280, "light", marks=pytest.mark.slow), (400, "dark")]
)
def test_reports_fit_their_window_and_have_no_error(
    width: int, scheme: str, browser: Chrome, places: list[str], tmp_path: Path
) -> None:
    reader = Reader(browser)
    for number, runs in enumerate((places[:1], places[1:2], places[2:], places)):
        page = tmp_path / f"{number}.html"
        write_report(runs, page)
        reader.opens(page, width=width, scheme=scheme)
        root = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        needed, given = reader.runs(root)
        assert needed == given <= width
        colour = reader.runs("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, colour[4:-1].split(","))) < 3 * 128) == (scheme == "dark")
        assert reader.requests() == []
        assert reader.problems() == []


def test_the_slider_and_the_curves_are_read_by_keyboard(
    browser: Chrome, places: list[str], tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    write_report(places[:1], page)
    reader = Reader(browser)
    reader.opens(page, width=1280, scheme="light")
    newest = reader.sees("#frame-0").get_attribute("src")
    reader.sees("#position").send_keys(Keys.ARROW_LEFT)
    assert reader.sees("#shown").text == "48 kimg"
    assert reader.sees("#frame-0").get_attribute("alt") == "Samples of done at 48 kimg"
    assert reader.sees("#frame-0").get_attribute("src") != newest
    # Losses of the last row up to there, at step 700.
    assert str(round(1 + 1 / 700, 3)) in reader.sees("#values-0").text
    reader.sees("#position").send_keys(Keys.END)
    assert reader.sees("#frame-0").get_attribute("src") == newest

    losses = reader.sees(".plot")
    assert losses.accessible_name == "losses"
    reader.runs("document.querySelector('.plot').focus()")
    losses.send_keys(3 * Keys.ARROW_RIGHT)
    shown = losses.find_elements(By.CSS_SELECTOR, ".legend b")
    assert "at 19.2 kimg" in losses.text
    # Read off the drawing, whose coordinates are rounded to a tenth of a point of some 160.
    expected = (1 + 1 / 300, 2 - 1 / 300)
    assert [float(value.text) for value in shown] == pytest.approx(expected, abs=0.005)
    losses.find_element(By.CSS_SELECTOR, ".enlarge").click()
    assert losses.size["width"] > 1000
    # The grid is magnified without smoothing.
    picture = reader.sees(".still .pixels")
    assert picture.size["width"] == 2 * 265
    assert picture.value_of_css_property("image-rendering") == "pixelated"
    assert reader.problems() == []
