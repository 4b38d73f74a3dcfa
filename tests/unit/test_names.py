"""Names that were replaced by the field's own terms do not come back."""

from __future__ import annotations

import tokenize
from pathlib import Path

import pytest

import ganscale

PACKAGE = Path(ganscale.__file__).parent
FOLDERS = ("training", "objectives")
RETIRED = {
    "Share": "LocalBatch",
    "share": "batch",
    "Moment": "StepContext",
    "moment": "context",
    "Player": "OptimizedModel",
    "player": "model",
    "players": "models",
    "Opponent": "DiscriminatorTrainer",
    "opponent": "discriminator",
    "Rules": "the fields of DiscriminatorTrainer",
    "Shown": "Samples",
    "beside": "condition",
    "Played": "PenaltyInputs",
    "played": "inputs",
    "Judge": "LogitsFn",
    "judge": "logits_fn",
    "fooling": "adversarial_loss",
    "fooling_loss": "generator_loss",
    "also": "extra_loss",
    "figures": "extra_metrics",
    "_compared": "center_logits",
    "_chosen": "top_k_weights",
    "Feedback": "AdaController and LecamAnchors",
    "feedback": "ada, lecam",
    "Saving": "CheckpointManager",
    "saving": "checkpoints",
    "patiently": "retry",
    "Ending": "TrainResult",
    "Wishes": "RankRequests",
    "wishes": "requests",
    "Agreement": "StopConsensus",
    "Beat": "Heartbeat",
    "likeness": "reconstruction_likelihood",
    "found": "what it is: features, metrics, ...",
    "judgements": "classifier_metrics",
    "contestants": "gan_pairs",
    "minimisers": "batched_optimizers",
    "told": "what is reported",
}


def retired_names(path: Path) -> list[str]:
    """The retired names among the identifiers of a file, each with its line."""
    with path.open("rb") as file:
        return [
            f"{path.relative_to(PACKAGE)}:{token.start[0]}: {token.string} is now called "
            f"{RETIRED[token.string]}"
            for token in tokenize.tokenize(file.readline)
            if token.type == tokenize.NAME and token.string in RETIRED
        ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_retired_name_is_used(folder: str) -> None:
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files
    assert [name for path in files for name in retired_names(path)] == []


def test_a_retired_name_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    file = tmp_path / "new.py"
    file.write_text('"""A player in a docstring is no identifier."""\nfound = 1\n')
    assert retired_names(file) == ["new.py:2: found is now called " + RETIRED["found"]]
