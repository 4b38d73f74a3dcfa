"""Choices that the command line writes out are those of the library; lists in options."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from ganscale.cli import explore, options
from ganscale.cli.options import parse_integers, parse_names
from ganscale.data import images, layout
from ganscale.errors import ConfigError
from ganscale.evaluation.distributions.features import MAX_ROWS
from ganscale.generation.degradations import TASKS
from ganscale.rating.questions import Task
from tests.conftest import Verb


@pytest.mark.parametrize(
    ("written", "known"),
    [
        (options.Split, get_args(layout.Split)),
        (options.Layout, get_args(layout.Layout)),
        (options.Fit, get_args(images.Fit)),
        (options.DegradationTask, TASKS),
        (options.RatingTask, get_args(Task)),
    ],
)
def test_choices_are_those_of_the_library(written: Any, known: tuple[str, ...]) -> None:
    assert get_args(written) == known


def test_lists_of_numbers_and_names() -> None:
    assert parse_integers("--seeds", "3, 1,2") == [3, 1, 2]
    assert parse_names("fid, ,kid,") == ["fid", "kid"]


@pytest.mark.parametrize("text", ["", "1,,2", "one", "1.5"])
def test_what_is_no_number_is_refused_by_its_option(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--seeds {text}: expected numbers"):
        parse_integers("--seeds", text)


def test_nearest_searches_no_more_images_than_keep_their_features(verb: Verb) -> None:
    assert explore._MOST_SEARCHED == MAX_ROWS
    code, _, err = verb("nearest", "x", "--reference", "y", "--num-reference", MAX_ROWS + 1)
    assert code == 2
    assert "--num-reference" in err
