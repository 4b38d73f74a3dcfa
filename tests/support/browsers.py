"""A headless browser, for pages that people look at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

_CHROMIUM, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "disable-dev-shm-usage",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "window-size=1000,800",
)


@contextmanager
def chromium(profile: Path) -> Iterator[Chrome]:
    """Chromium with a profile of its own; the test is skipped where there is none."""
    if not (_CHROMIUM and _DRIVER):
        pytest.skip("NO BROWSER: the page is NOT tested (needs chromium and chromedriver)")
    options = ChromeOptions()
    options.binary_location = str(_CHROMIUM)
    for flag in (*_FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    chrome = Chrome(options, ChromeService(_DRIVER))
    try:
        yield chrome
    finally:
        chrome.quit()
