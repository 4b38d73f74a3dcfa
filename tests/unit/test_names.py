"""Names that the field's terms have replaced do not come back. `launch` still has its own."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import ganscale

PACKAGE = Path(ganscale.__file__).parent
REBUILT_ELSEWHERE = ("launch", "training")

RETIRED = {
    "Explorer": "LatentSampler",
    "JUDGEMENTS": "CLASSIFIER_METRICS",
    "Joined": "Concatenated",
    "LocalPlace": "LocalStore",
    "ObjectPlace": "ObjectStore",
    "Outcome": "SaveResult",
    "Place": "Store",
    "Slots": "BatchIndices",
    "Started": "StartTask",
    "Sums": "ChannelStats",
    "WorkerFigures": "WorkerStats",
    "doomed": "prunable",
    "explorer": "sampler",
    "holds": "is_cached",
    "judgements": "classifier_metrics",
    "likeness": "similarity",
    "load_contestants": "load_gan_pairs",
    "minimisers": "batched_optimizers",
    "open_place": "open_store",
    "prepare": "prefetch",
    "salt": "num_rollbacks",
    "sampling": "snapshot, sampler or pictures",
    "sound": "valid",
}

RETIRED_IN_TRAINING = {
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
    "Outcome": "SaveResult",
    "outcomes": "results",
    "salt": "num_rollbacks",
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
"""Also of objectives. Some of these words are right elsewhere."""

EVALUATION = ("metrics", "evaluation", "generation", "rating", "cli")

RETIRED_IN_EVALUATION = {
    "By": "ReconstructionMethod",
    "Describe": "FeatureFn",
    "Entry": "ComparedRun",
    "Inverted": "InversionResult",
    "Judge": "ScoringDiscriminator",
    "Judges": "EvaluationNetworks",
    "LossOf": "LossFn",
    "Reconstructed": "Reconstructions",
    "Restored": "TaskResult",
    "Search": "InversionSettings",
    "Standing": "RankedRun",
    "_FIGURES": "_COMPUTE",
    "degradation_named": "build_degradation",
    "described": "test_features",
    "directions_of": "find_directions",
    "edited": "edit_images",
    "ending": "result",
    "figures": "metrics, similarities",
    "found": "what it is: features, metrics, ...",
    "gap_of_independent": "unpaired_difference",
    "gap_of_paired": "paired_difference",
    "hold_tournament": "run_tournament",
    "judge": "discriminator",
    "judge_all": "score_images",
    "judges": "discriminators",
    "loss_of": "loss_fn",
    "mask_named": "build_mask",
    "num_judged": "num_scored",
    "of_repeats": "t_interval",
    "of_successes": "wilson_interval",
    "slopes": "gradients",
    "told": "what is reported",
    "ways": "reconstructors",
}
"""Of the rooms that measure, generate and rate, and of the commands."""

OLD_MODULES = ("frechet", "kernel", "neighbours", "places", "sums")


def identifiers(tree: ast.AST) -> Iterator[str]:
    """The names that a module defines or uses, with the words of the modules that it imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.arg
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.ImportFrom):
            yield from str(node.module).split(".")
            yield from (alias.name for alias in node.names)


def retired_names(source: str, retired: Iterable[str] = RETIRED) -> set[str]:
    return set(identifiers(ast.parse(source))) & set(retired)


def test_the_walk_sees_every_kind_of_name() -> None:
    source = (
        "from ganscale.data.minimisers import Sums\n"
        "class Slots:\n    def holds(self, sound: int) -> None:\n        self.doomed(prepare=1)\n"
    )
    assert retired_names(source) == {
        *("Slots", "Sums", "doomed", "holds", "minimisers", "prepare", "sound")
    }


def test_no_retired_name_is_used() -> None:
    used = {
        str(path.relative_to(PACKAGE)): names
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in REBUILT_ELSEWHERE
        and (names := retired_names(path.read_text()))
    }
    assert not used


@pytest.mark.parametrize(
    ("folders", "retired"),
    [(("training", "objectives"), RETIRED_IN_TRAINING), (EVALUATION, RETIRED_IN_EVALUATION)],
    ids=["training", "evaluation"],
)
def test_no_retired_name_is_used_in(folders: tuple[str, ...], retired: dict[str, str]) -> None:
    used = {
        str(path.relative_to(PACKAGE)): names
        for folder in folders
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        if (names := retired_names(path.read_text(), retired))
    }
    assert not used


def test_no_module_has_a_retired_name() -> None:
    modules = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    stems = {path.stem for path in modules if path.parts[0] not in REBUILT_ELSEWHERE}
    assert not stems & {*RETIRED, *OLD_MODULES}
