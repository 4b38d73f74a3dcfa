"""What is refused of W&B's settings is what the installed wandb refuses, and is said in a line."""

from __future__ import annotations

import os

import pytest
from wandb import Settings

from ganscale.config import load_config
from ganscale.errors import ConfigError
from ganscale.tracking.wandb_settings import (
    check_environment,
    check_run_id,
    helper_environment,
    resolve_mode,
)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "GANSCALE_WANDB"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", os.devnull)


def wandb_refuses(environment: dict[str, str]) -> bool:
    try:
        Settings().update_from_env_vars(environment)
    except Exception:  # UsageError, pydantic's and Python's ValueError
        return True
    return False


def our_refusal(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> str:
    """The line with which we refuse the variable; empty if we do not."""
    monkeypatch.setenv(name, value)
    try:
        check_environment("auto")
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "value", "is_refused"),
    [
        ("WANDB_PROJECT", "faces", False),
        ("WANDB_PROJECT", "faces of 2026, v1.0_a-b", False),
        *(("WANDB_PROJECT", f"a{character}b", True) for character in "/\\#?%:"),
        ("WANDB_PROJECT", "x" * 128, False),
        ("WANDB_PROJECT", "x" * 129, True),
        ("WANDB_MODE", "online", False),
        ("WANDB_MODE", "offline", False),
        ("WANDB_MODE", "dryrun", False),
        ("WANDB_MODE", "ofline", True),
        ("WANDB_RUN_ID", "a1b2c3", False),
        *(("WANDB_RUN_ID", f"a{character}b", True) for character in ":;,#?/'"),
        ("WANDB_RUN_ID", " a", True),
        ("WANDB_TAGS", "a", False),
        ("WANDB_TAGS", f"a,{'b' * 64}", False),
        ("WANDB_TAGS", f"a,{'b' * 65}", True),
        ("WANDB_TAGS", "a,,b", True),
        ("WANDB_TAGS", "a,", True),
        ("WANDB_BASE_URL", "https://api.wandb.ai", False),
        ("WANDB_BASE_URL", "http://127.0.0.1:8080", False),
        ("WANDB_BASE_URL", "127.0.0.1:8080", True),
        ("WANDB_BASE_URL", "ftp://127.0.0.1", True),
        ("WANDB_BASE_URL", "https://wandb.ai", True),
        ("WANDB_BASE_URL", "http://api.wandb.ai", True),
        ("WANDB_API_KEY", "0" * 40, False),
        ("WANDB_API_KEY", "0" * 40 + "\n", True),
    ],
)
def test_a_variable_is_refused_if_and_only_if_wandb_refuses_it(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, is_refused: bool
) -> None:
    assert wandb_refuses({name: value}) == is_refused
    line = our_refusal(monkeypatch, name, value)
    assert (name in line) == bool(line) == is_refused
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_MODE", "shared"),  # wandb's own, which does not go on with a resumed run
        ("WANDB_ENTITY", "team/project"),
        ("WANDB_ENTITY", "my team"),
        ("WANDB_INIT_TIMEOUT", "soon"),
        ("WANDB_FINISH_TIMEOUT", "-1"),
        ("WANDB_FINISH_TIMEOUT", "nan"),
        ("GANSCALE_WANDB_ARTIFACTS", "some"),
    ],
)
def test_what_only_we_refuse_is_named_too(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    assert name in our_refusal(monkeypatch, name, value)


@pytest.mark.parametrize("name", ["WANDB_MODE", "WANDB_TAGS", "WANDB_RUN_ID", "WANDB_BASE_URL"])
def test_an_empty_variable_is_unset_though_wandb_refuses_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert wandb_refuses({name: ""})
    assert our_refusal(monkeypatch, name, "") == ""
    assert resolve_mode("auto") == "offline"
    assert name not in helper_environment()
    assert "PATH" in helper_environment()


def test_an_empty_mode_in_the_configuration_is_auto() -> None:
    for text in ("tracking.wandb=", "tracking.wandb=null", "tracking.wandb=''"):
        assert load_config("quickstart", [text]).tracking.wandb == "auto"


def test_all_wrong_variables_are_named_and_the_key_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_TAGS", "x" * 65)
    monkeypatch.setenv("WANDB_API_KEY", "secret ")
    with pytest.raises(ConfigError, match="WANDB_TAGS.*WANDB_API_KEY") as error:
        check_environment("online")
    assert "secret" not in str(error.value)
    check_environment("disabled")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    check_environment("auto")


@pytest.mark.parametrize("run_id", ["", "a/b", "a "])
def test_a_run_id_that_wandb_would_refuse_is_refused_with_its_file(run_id: str) -> None:
    with pytest.raises(ConfigError, match="runs/a/wandb_run_id"):
        check_run_id(run_id, "runs/a/wandb_run_id")


@pytest.mark.parametrize("project", ["a/b", "", "x" * 129, "a?b"])
def test_a_project_that_wandb_would_refuse_is_refused_with_the_rule(project: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.project=.*1 to 128 characters"):
        load_config("quickstart", [f"tracking.project='{project}'"])
