"""Model cards: what a generator that is given away is, as Markdown, from its description and run.

A card says which model it is, what it was trained on and how long, the figures that were measured
of it with their protocol, and the configuration of its run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ganscale.config import load_config
from ganscale.generation.sampler import SampleableGenerator
from ganscale.run_directory import containing_run
from ganscale.tracking.history import History

_PROTOCOL = (
    "extractor",
    "num_samples",
    "reference",
    "num_reference",
    "reference_statistics",
    "extractor_digest",
)
_RECIPE = ("seed", "model", "method", "objective", "penalty", "augment", "optimizer", "training")


def card_text(
    title: str,
    generator: SampleableGenerator,
    snapshot: Path | None,
    *,
    about: Mapping[str, Any],
    file: str,
    usage: str,
) -> str:
    """A card as Markdown.

    Args:
        title: the heading.
        generator: what the card is of.
        snapshot: the file that it was loaded from; if that is in a run's folder, the card has the
            run's configuration.
        about: what people should know of it, as plain values: licence, figures, date.
        file: the size and precision of what was written.
        usage: lines of Python that draw images with it.
    """
    spec, info = generator.info["model"], generator.info
    classes = ", ".join(info.get("classes", ()))
    num_parameters = sum(parameter.numel() for parameter in generator.model.parameters())
    facts = {
        "model": f"{spec['name']}, {num_parameters / 1e6:.2f} million parameters",
        "images": f"{spec['img_channels']}x{spec['resolution']}x{spec['resolution']}",
        "classes": f"{spec['num_classes']}: {classes}" if spec["num_classes"] else "none",
        "trained on": f"{info['nimg']:,} real images",
        **{name: _fact(value) for name, value in about.items()},
        "file": file,
    }
    lines = [f"# {title}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {' '.join(str(value).split())} |" for name, value in facts.items()]
    lines += ["", "```python", usage.rstrip(), "```"]
    run_dir = None if snapshot is None else containing_run(snapshot)
    if run_dir is not None:
        values = load_config(run_dir.config).model_dump(mode="json")
        # The sections that decide what is learnt.
        text = yaml.safe_dump({name: values[name] for name in _RECIPE}, sort_keys=False).rstrip()
        lines += ["", "The configuration that it was trained with:", "", "```yaml", text, "```"]
    return "\n".join(lines) + "\n"


def hub_header(generator: SampleableGenerator, licence: str | None) -> str:
    """The YAML before a card by which the Hugging Face hub files a model."""
    header: dict[str, Any] = {
        "library_name": "ganscale",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["gan", generator.info["model"]["name"]],
    }
    if licence is not None:
        # The hub knows licences by their SPDX names in lower case.
        header["license"] = licence.lower()
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n"


def evaluation_summary(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation and their protocol, for `about`.

    `evaluation` is what `Evaluation.to_json` returns.
    """
    protocol = evaluation["protocol"]
    return {
        "metrics": {name: value["value"] for name, value in evaluation["metrics"].items()},
        "protocol": {name: protocol[name] for name in _PROTOCOL},
    }


def recorded_evaluation(snapshot: Path, nimg: int) -> dict[str, Any]:
    """The figures that a snapshot's run has recorded of it, for `about`; empty if it has none.

    Those that `ganscale evaluate --run` has added come first, then those of training.
    """
    run_dir = containing_run(snapshot)
    if run_dir is None:
        return {}
    snapshot = snapshot.expanduser().absolute()
    # A run evaluates its main average, of which `best` holds a copy; figures of another average
    # would not be of this file.
    if snapshot not in (run_dir.snapshot(nimg), run_dir.snapshot(nimg, "best")):
        return {}
    history = History.read(run_dir)
    events = [e for e in history.events if e["event"] == "evaluation" and e["nimg"] == nimg]
    afterwards = [event for event in events if "protocol" in event and event.get("metrics")]
    if afterwards:
        return evaluation_summary(afterwards[-1])
    # Training puts the figures into the next row, which may be of a later position.
    row = next((row for row in history.rows if row["nimg"] >= nimg and "step" in row), None)
    if not events or row is None:
        return {}
    metrics = {
        name.removeprefix("metrics/"): value
        for name, value in row.items()
        if name.startswith("metrics/") and name != "metrics/diversity" and value is not None
    }
    return {"metrics": metrics, "protocol": {"measured": "during training"}} if metrics else {}


def frechet_distance_of(evaluation: Mapping[str, Any]) -> tuple[str, float] | None:
    """Name and value of the Frechet distance of an evaluation, such as ("fid", 12.3), or None."""
    for name, value in evaluation.get("metrics", {}).items():
        if name == "fid" or (name.startswith("fd_") and "infinity" not in name):
            return name, value
    return None


def usage_of(source: str) -> str:
    """Lines of Python that load the generator at a place and draw images."""
    return (
        "import ganscale\n\n"
        f'generator = ganscale.Generator.from_pretrained("{source}")\n'
        "images = generator(16, seed=0)  # a list of Pillow images\n"
    )


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_fact(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
