"""What wandb would refuse of its variables is said in a line before anything starts."""

from __future__ import annotations

import os

import pytest

from ganscale.config import load_config
from ganscale.errors import ConfigError
from ganscale.tracking.wandb_settings import check_environment, resolve_mode, variables


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "GANSCALE_WANDB"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", os.devnull)


def refusal() -> str:
    """The line with which the environment is refused; empty if it is not."""
    try:
        check_environment("auto")
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("WANDB_PROJECT", "a/b", "cannot contain characters"),
        ("WANDB_PROJECT", "x" * 129, "exceeded 128 characters"),
        ("WANDB_MODE", "ofline", "expected online, offline or disabled"),
        ("WANDB_MODE", "shared", "expected online, offline or disabled"),
        ("WANDB_RUN_ID", "a/b", "cannot contain the characters"),
        ("WANDB_RESUME", "sometimes", "'allow'"),
        ("WANDB_TAGS", f"a,{'b' * 65}", "64"),
        ("WANDB_TAGS", "a,,b", "64"),
        ("WANDB_BASE_URL", "127.0.0.1:8080", "valid URL"),
        ("WANDB_BASE_URL", "http://api.wandb.ai", "http"),
        ("WANDB_API_KEY", "secret\n", "whitespace"),
        ("WANDB_INIT_TIMEOUT", "soon", "expected a number"),
        ("WANDB_FINISH_TIMEOUT", "-1", "greater than 0"),
        ("WANDB_FINISH_TIMEOUT", "nan", "greater than 0"),
        ("GANSCALE_WANDB_ARTIFACTS", "some", "expected none, best or all"),
    ],
)
def test_a_wrong_variable_is_named_in_one_line_with_the_rule(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, rule: str
) -> None:
    monkeypatch.setenv(name, value)
    line = refusal()
    assert name in line
    assert rule in line
    assert "\n" not in line
    assert "secret" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_PROJECT", "faces of 2026, v1.0_a-b"),
        ("WANDB_MODE", "dryrun"),
        ("WANDB_RUN_ID", "a1b2c3"),
        ("WANDB_TAGS", f"a,{'b' * 64}"),
        ("WANDB_BASE_URL", "http://127.0.0.1:8080"),
        ("WANDB_API_KEY", "0" * 40),
        *((f"WANDB_{name}", "") for name in ("MODE", "TAGS", "RUN_ID", "BASE_URL")),
    ],
)
def test_a_right_or_empty_variable_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert refusal() == ""


def test_all_wrong_variables_are_named_unless_wandb_is_disabled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_TAGS", "x" * 65)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "soon")
    assert "WANDB_TAGS" in refusal()
    assert "WANDB_FINISH_TIMEOUT" in refusal()
    check_environment("disabled")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert refusal() == ""


def test_auto_is_online_with_a_key_and_the_key_is_not_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    assert resolve_mode("auto") == "online"
    assert variables() == {"WANDB_TAGS": "a,b"}


def test_an_empty_mode_in_the_configuration_is_auto() -> None:
    for text in ("tracking.wandb=", "tracking.wandb=null", "tracking.wandb=''"):
        assert load_config("quickstart", [text]).tracking.wandb == "auto"


@pytest.mark.parametrize("project", ["a/b", "", "x" * 129, "a?b"])
def test_a_project_that_wandb_would_refuse_is_refused_with_the_rule(project: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.project=.*1 to 128 characters"):
        load_config("quickstart", [f"tracking.project='{project}'"])
