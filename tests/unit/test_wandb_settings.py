"""W&B's variables: which mode they ask for, and what is refused before anything starts."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ganscale.cli.training import _check_environment
from ganscale.config import load_config
from ganscale.errors import ConfigError
from ganscale.run_directory import RunDirectory
from ganscale.tracking import dashboard, wandb_process
from ganscale.tracking.wandb_sink import (
    FOLLOWED,
    NOT_UPLOADED,
    POSITIONS,
    WandbSink,
    resolve_mode,
    variables,
)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", os.devnull)


@pytest.mark.parametrize("mode", ["ofline", "shared"])
def test_an_unknown_mode_is_refused_unless_the_configuration_has_one(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(ConfigError, match=f"WANDB_MODE='{mode}': expected online, offline or"):
        resolve_mode("auto")
    assert resolve_mode("disabled") == "disabled"


@pytest.mark.parametrize(
    ("stated", "mode"), [("dryrun", "offline"), ("run", "online"), ("disabled", "disabled")]
)
def test_auto_is_the_mode_of_the_variable(
    monkeypatch: pytest.MonkeyPatch, stated: str, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", stated)
    assert resolve_mode("auto") == mode


def test_auto_is_online_with_a_key_and_the_key_is_not_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "")
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    assert resolve_mode("auto") == "online"
    assert variables() == {"WANDB_TAGS": "a,b"}


def test_auto_is_online_where_netrc_has_the_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine wandb.example login user password {'0' * 40}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    assert resolve_mode("auto") == "online"


@pytest.mark.parametrize("stated", ["soon", "-1", "nan"])
def test_a_wrong_timeout_is_refused_when_the_run_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stated: str
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", stated)
    problem = f"WANDB_FINISH_TIMEOUT='{stated}': expected a number"
    with pytest.raises(ConfigError, match=problem):
        WandbSink(RunDirectory(tmp_path), project="tests", mode="offline", config={})
    # Before shards are built.
    with pytest.raises(ConfigError, match=problem):
        _check_environment(load_config("quickstart"))
    _check_environment(load_config("quickstart", ["tracking.wandb=disabled"]))


def test_a_key_without_an_entity_makes_no_dashboard_of_an_entity_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wandb.Api", lambda timeout: SimpleNamespace(default_entity=None))
    with pytest.raises(ConfigError, match="set --entity"):
        dashboard.saved(None, "tests", None)


def test_a_server_that_refuses_is_not_asked_without_a_pause_at_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    requests: list[int] = []
    pauses: list[float] = []

    def refuse(*_: object, **__: object) -> None:
        requests.append(1)
        if len(requests) > 3:
            raise KeyboardInterrupt
        raise ConnectionError

    monkeypatch.setattr(wandb_process, "cli", refuse)
    monkeypatch.setattr(time, "sleep", pauses.append)
    ending = threading.Event()
    ending.set()
    with pytest.raises(KeyboardInterrupt):
        wandb_process._upload(tmp_path / "offline-run-1-abcd", ending)
    assert len(pauses) == 3
    assert min(pauses) >= 1


def test_an_empty_mode_in_the_configuration_is_auto() -> None:
    for text in ("tracking.wandb=", "tracking.wandb=null", "tracking.wandb=''"):
        assert load_config("quickstart", [text]).tracking.wandb == "auto"


@pytest.mark.parametrize("project", ["a/b", "", "x" * 129, "a?b"])
def test_a_project_that_wandb_would_refuse_is_refused_with_the_rule(project: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.project=.*1 to 128 characters"):
        load_config("quickstart", [f"tracking.project='{project}'"])


def test_the_command_that_uploads_the_rest_is_one_for_a_shell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The folder is one word, and the pattern is left to the shell."""
    told: list[str] = []
    process = SimpleNamespace(
        poll=lambda: None,
        communicate=lambda *_: None,
        kill=lambda: None,
        wait=lambda: NOT_UPLOADED,
    )
    monkeypatch.setattr(WandbSink, "_start", lambda sink: setattr(sink, "_process", process))
    root = tmp_path / "my run"
    sink = WandbSink(RunDirectory(root), project="p", mode="online", config={}, report=told.append)
    sink.close()
    assert told[0].endswith(f"later: wandb sync '{root}/wandb'/offline-run-*")


@pytest.mark.parametrize(("known", "begins_at"), [("", 0), ("its-run", 16)])
def test_a_new_run_in_wandb_gets_what_was_logged_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: str, begins_at: int
) -> None:
    """As when a run goes on with W&B switched on; one that came with its id is there already."""
    run_dir, ids = RunDirectory(tmp_path), set[str]()
    run_dir.metrics.write_text('{"loss_G": 1.0}\n')
    if known:
        run_dir.wandb_run_id.write_text(known)
    monkeypatch.setattr(WandbSink, "_start", lambda sink: None)
    for _ in range(2):  # what is known then stays
        WandbSink(run_dir, project="p", mode="offline", config={})._files.close()
        positions = json.loads((tmp_path / POSITIONS).read_text())
        assert positions == {**dict.fromkeys(FOLLOWED, 0), "metrics.jsonl": begins_at}
        ids.add(run_dir.wandb_run_id.read_text())
    assert len(ids) == 1
    assert ids == {known} or not known
