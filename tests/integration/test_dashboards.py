"""Dashboards ask for what runs log, which runs of all training methods say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import wandb
from torch import Tensor

from ganscale.atomic_files import write_bytes, write_text
from ganscale.cli import main
from ganscale.config import Config
from ganscale.config.sections import MetricName
from ganscale.json_lines import encode_line
from ganscale.launch import ray_metrics
from ganscale.tracking import wandb_sink
from ganscale.tracking.dashboard import (
    SECTIONS,
    WITHOUT_PANEL,
    Curve,
    Pictures,
    definition,
    workspace,
)
from ganscale.tracking.wandb_process import RunLog
from ganscale.training import evaluator
from ganscale.training.loop import train
from ganscale.world import World, process_group
from tests.support.documentation import DOCS, column_pattern, is_documented_column, table_names
from tests.support.ranks import free_port
from tests.support.small_extractor import SmallExtractor

CURVES = [panel for section in SECTIONS for panel in section.panels if isinstance(panel, Curve)]

NOT_EXPORTED = {
    r"nimg": "is the gauge position_kimg, in thousands",
    r"attempt": "a restart shows as a fault",
    r"train/(real|fake)_logits": "for the study of a run; Prometheus watches its health",
    r"train/(penalty_.*|augment_p)": "for the study of a run, as are the logits",
    r"train/(squared_error|kl|adversarial_loss|cross_entropy|accuracy)": "for studies of a run",
    r"data/num_skipped": "rows count since the last row, which a gauge would lose; an event counts",
    r"gpu/peak_memory_gib": "worker_gpu_memory_gib shows the memory of every worker",
}
"""Columns that are no gauge, and why."""
METHODS: dict[str, dict[str, Any]] = {
    "gan": {"method": {"name": "gan"}},
    "vae": {"method": {"name": "vae"}},
    "vae-gan": {"method": {"name": "vae-gan"}},
    "encoder": {"method": {"name": "encoder", "generator": "of the run gan"}},
    "bigan": {"method": {"name": "bigan"}},
    "semi-supervised": {
        "method": {"name": "semi-supervised", "labels": 20},
        "model.num_classes": 10,
    },
}
METRICS = list(get_args(MetricName))
ONLY_ON_A_GPU = {"gpu/peak_memory_gib", "time/step_seconds", "workers/RANK/gpu_memory_gib"}
LOG_KEYS = DOCS / "reference" / "log-keys.md"


class ScoringExtractor(SmallExtractor):
    """With logits, so that there is an inception score too."""

    def logits(self, features: Tensor) -> Tensor:
        return features


class Received:
    """What a W&B run gets, in place of one."""

    def __init__(self) -> None:
        self.columns: set[str] = set()
        self.pictures: set[str] = set()

    def log(self, row: Mapping[str, Any]) -> None:
        pictures = {name for name, value in row.items() if isinstance(value, wandb.Image)}
        self.pictures |= pictures
        self.columns |= set(row) - pictures


@pytest.fixture(scope="module")
def received(procedural_shards: Path, tmp_path_factory: Any) -> dict[str, Received]:
    """From tiny runs of all methods, with everything on that they have, that were resumed."""
    storage, world = tmp_path_factory.mktemp("methods"), World.detect("auto")
    base = {
        "storage": str(storage),
        "data.shards": str(procedural_shards),
        "data.on_error": "skip",
        "model": {"base_channels": 8, "z_dim": 16},
        "training.batch_size": 16,
        "training.total_kimg": 0.032,
        "samples.num_images": 4,
        "tracking.wandb": "disabled",
        "tracking.log_every_kimg": 0.016,
        "launch.backend": "inprocess",
    }
    longer = {
        "training.total_kimg": 0.064,
        "evaluation.every_kimg": 0.064,
        "evaluation.num_images": 100,
        "evaluation.metrics": METRICS,
    }
    results: dict[str, Received] = {}
    with pytest.MonkeyPatch.context() as patch, process_group(world):
        patch.setenv("GANSCALE_CACHE", str(storage / "cache"))
        patch.setattr(evaluator, "open_extractor", lambda name: ScoringExtractor())
        for method, changes in METHODS.items():
            results[method] = Received()
            config = Config().with_changes({**base, "name": method, **changes})
            if method == "encoder":
                config = config.with_changes({"method.generator": str(storage / "gan")})
            if method != "vae":
                game = {"penalty.r1": 1, "augment": {"name": "ada", "p": 0.5}}
                config = config.with_changes(game)
            train(config, world)
            train(config.with_changes(longer), world)
            _log_to_wandb(config.run_dir, results[method])
    return results


def _log_to_wandb(root: Path, run: Received) -> None:
    """What W&B's process does with the folder of a run."""
    picture = min(root.glob("samples/*.png"))
    line = {"time": 1.0, "picture": "samples", "path": str(picture), "nimg": 32}
    write_bytes(root / wandb_sink.FILES, encode_line(line))
    write_text(root / wandb_sink.POSITIONS, json.dumps(dict.fromkeys(wandb_sink.FOLLOWED, 0)))
    RunLog(root, run).log_new()


def matches(panel: Curve | Pictures, received: Received) -> set[str]:
    """The names among what was received that a panel shows."""
    if isinstance(panel, Pictures):
        return received.pictures & {panel.name}
    names = received.columns & set(panel.names)
    return names | {n for n in received.columns if re.fullmatch(panel.regex or "", n)}


@pytest.mark.parametrize("method", METHODS)
def test_every_panel_shows_something_and_every_column_has_a_panel(
    received: dict[str, Received], method: str
) -> None:
    of_run, shown = received[method], set[str]()
    for panel in (panel for section in SECTIONS for panel in section.panels):
        names = matches(panel, of_run)
        if isinstance(panel, Curve):
            is_for = method in panel.methods
            is_for &= torch.cuda.is_available() or not panel.needs_gpu
            assert bool(names) == is_for, (panel.title, names)
        else:
            assert names, panel.name
        shown |= names
    assert of_run.columns - shown == set(WITHOUT_PANEL)
    assert shown >= of_run.pictures


def test_each_name_of_a_curve_is_logged_by_some_method(received: dict[str, Received]) -> None:
    logged = {name for of_run in received.values() for name in of_run.columns}
    for curve in CURVES:
        if torch.cuda.is_available() or not curve.needs_gpu:
            assert set(curve.names) <= logged, curve.title


def test_every_column_is_documented_and_every_documented_column_is_logged(
    received: dict[str, Received],
) -> None:
    logged = {name for of_run in received.values() for name in of_run.columns}
    assert [name for name in sorted(logged) if not is_documented_column(name)] == []
    stale = {
        name
        for name in table_names(LOG_KEYS, "Columns of metrics.jsonl")
        if not any(column_pattern(name).fullmatch(other) for other in logged)
        # Which metrics there are depends on the extractor; their table is that of `evaluate`.
        and not name.startswith("metrics/")
    }
    assert stale == (set() if torch.cuda.is_available() else ONLY_ON_A_GPU)


@pytest.mark.parametrize("method", METHODS)
def test_every_gauge_has_a_column_and_every_column_a_gauge_or_a_reason(
    received: dict[str, Received], method: str
) -> None:
    # The sink that exports counts faults itself, from events.
    columns = {name for name in received[method].columns if not name.startswith("faults/")}
    patterns = [pattern for pattern, _ in ray_metrics._FROM_ROW]
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in columns), pattern
    without = [*patterns, *NOT_EXPORTED]
    assert [name for name in columns if not any(re.fullmatch(p, name) for p in without)] == []


def test_the_definition_has_every_panel_and_no_server_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    found = definition("team", "faces", "sweep-1")
    bank = found["workspace"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in bank] == [section.name for section in SECTIONS]
    panels = [panel for section in bank for panel in section["panels"]]
    titles = {panel["config"].get("chartTitle") for panel in panels}
    assert {curve.title for curve in CURVES} <= titles
    grids = [b for b in found["report"]["blocks"] if b["type"] == "panel-grid"]
    assert len(grids) == len(SECTIONS)
    for section in SECTIONS:
        for panel in section.panels:
            if isinstance(panel, Pictures):
                assert f'"{panel.name}"' in json.dumps(bank)
                assert f'"{panel.name}"' in json.dumps(grids)
    for place in (found["workspace"]["section"]["runSets"], grids[0]["metadata"]["runSets"]):
        assert '"sweep-1"' in json.dumps(place)


def test_the_workspace_is_read_back_as_it_was_made() -> None:
    made = workspace("team", "faces", None)
    again = type(made)._from_model(made._to_model())
    assert [s.name for s in again.sections] == [s.name for s in made.sections]
    panels = [panel for section in again.sections for panel in section.panels]
    assert [type(p) for p in panels] == [type(p) for s in made.sections for p in s.panels]
    regexes = [panel.metric_regex for panel in panels if getattr(panel, "metric_regex", None)]
    assert regexes == [curve.regex for curve in CURVES if curve.regex]


def test_without_a_key_the_command_prints_the_definition(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(SystemExit) as stop:
        main(["dashboard", "--project", "faces"])
    assert stop.value.code == 0
    assert set(json.loads(capsys.readouterr().out)) == {"workspace", "report"}
    with pytest.raises(SystemExit) as stop:
        main(["dashboard", "--out", str(tmp_path / "dashboard.json")])
    assert stop.value.code == 0
    assert set(json.loads((tmp_path / "dashboard.json").read_text())) == {"workspace", "report"}


@pytest.mark.slow  # wandb asks for twenty seconds
def test_a_server_that_cannot_be_asked_is_an_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "local" + 35 * "0")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(SystemExit) as stop:
        main(["dashboard", "--entity", "team"])
    assert stop.value.code == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("ganscale: ")]
    assert "--out FILE writes its definition" in line
