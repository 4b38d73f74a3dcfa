"""Choices that the command line writes out are those of the library; lists in options."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest

from ganscale.cli import explore, main, options
from ganscale.cli.app import write_json
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


def test_a_json_file_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    values = {"mean": math.nan, "interval": [-math.inf, math.inf], "of_each": (1.5, None)}
    write_json(tmp_path / "a.json", values)
    # Python's reader takes NaN and Infinity, which are no JSON, unless it is told otherwise.
    content = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert content == {"mean": None, "interval": [None, None], "of_each": [1.5, None]}


@pytest.mark.parametrize(
    ("typed", "expected"), [("ganscale tourn", ["tournament"]), ("ganscale shards ver", ["verify"])]
)
def test_the_shell_completes_verbs(
    typed: str,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the variables that the script of --install-completion sets in bash."""
    monkeypatch.setattr("sys.argv", ["ganscale"])
    monkeypatch.setenv("_GANSCALE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    with pytest.raises(SystemExit, match="0"):
        main([])
    assert capsys.readouterr().out.split() == expected
