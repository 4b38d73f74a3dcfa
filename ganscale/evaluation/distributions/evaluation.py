"""What was measured and by which protocol; as text, a table with a row for each metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ganscale.errors import DataError
from ganscale.metrics.intervals import Estimate

# Published figures are of 10,000 or 50,000 samples; the bias of fewer is what one would see.
_FEW_SAMPLES = 10_000

# FID of 50,000 samples against the training set by the same network, by StudioGAN's benchmark of
# published models; that of the test images is by this code and agrees with the published 3.15.
_KNOWN_FID = {
    "CIFAR-10's training images": (
        "its test images 3.15, StyleGAN2-ADA 2.31, SNGAN 9.01, DCGAN 48.29"
    )
}


@dataclass(frozen=True)
class Protocol:
    """How the metrics were measured; values of different protocols cannot be compared."""

    extractor: str
    extractor_digest: str
    resizer: str
    samples: str
    num_samples: int
    reference: str
    reference_digest: str
    num_reference: int
    reference_statistics: str
    """Where the moments of all reference images come from, "extracted" or an included file."""
    num_reference_rows: int
    """Reference images that metrics of single images use; 0 where no such metric is asked for."""


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The metrics of one set of samples and the protocol that they were measured by.

    Shown as text it is the table that `ganscale evaluate` prints.
    """

    protocol: Protocol
    metrics: Mapping[str, Estimate]
    """The values with their 95 % intervals, by name."""
    skipped: Mapping[str, str]
    """Metrics that could not be computed, with the reasons."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further results of a metric, by its name."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """How long each part took."""

    def __repr__(self) -> str:
        return "\n".join(_lines(self))

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they are written to files."""
        return {
            "protocol": asdict(self.protocol),
            "metrics": {name: asdict(value) for name, value in self.metrics.items()},
            "skipped": dict(self.skipped),
            "details": dict(self.details),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }

    def check_complete(self) -> None:
        """Raise `DataError` if a metric could not be computed; a note of it shows the others."""
        if self.skipped:
            error = DataError(describe_reasons(self.skipped))
            error.add_note(repr(self))
            raise error

    def row(self) -> dict[str, float]:
        """The metrics as columns of a run's metrics.jsonl."""
        return {f"metrics/{name}": value.value for name, value in self.metrics.items()}


def describe_reasons(reasons: Mapping[str, str]) -> str:
    """Metrics that cannot be computed and the reasons, as one line."""
    return "; ".join(f"{metric}: {reason}" for metric, reason in reasons.items())


def _lines(evaluation: Evaluation) -> Iterator[str]:
    protocol = evaluation.protocol
    yield f"samples    {protocol.samples}"
    yield f"reference  {protocol.reference}"
    if protocol.num_reference_rows:
        drawn = f"{protocol.num_reference_rows:,} of them, at random,"
        yield f"           {drawn} for kid, prdc, authenticity and c2st_1nn"
    if protocol.reference_statistics != "extracted":
        yield f"           included mean and covariance of {protocol.reference_statistics}"
    yield f"features   {protocol.extractor}, {protocol.resizer}"
    yield ""
    width = max(len("metric"), *map(len, (*evaluation.metrics, *evaluation.skipped)))
    yield f"{'metric':{width}} {'value':>9}  {'95 % interval':20}  better"
    for name, value in evaluation.metrics.items():
        bounds = "" if value.low is None else f"{value.low:.4g} to {value.high:.4g}"
        better = _better(name, protocol)
        yield f"{name:{width}} {value.value:9.4g}  {bounds:20}  {better}".rstrip()
    for name, reason in evaluation.skipped.items():
        yield f"{name:{width}} {'-':>9}  {reason}"
    yield ""
    yield f"{sum(evaluation.seconds.values()):.0f} s"


def _better(column: str, protocol: Protocol) -> str:
    """Which direction is better, and what is known of the scale."""
    is_biased = column.startswith(("fid", "fd_")) and "infinity" not in column
    if column.startswith(("fid_per_class", "fd_per_class")):
        return "lower; compare equally many images of each class"
    if is_biased and protocol.num_samples < _FEW_SAMPLES:
        return f"lower; too high by its bias: fewer than {_FEW_SAMPLES:,} samples"
    if column == "fid" and protocol.reference_statistics in _KNOWN_FID:
        return f"lower: {_KNOWN_FID[protocol.reference_statistics]}"
    if column.startswith(("fid", "fd_", "kid", "kd_")):
        return "lower"
    if column.startswith("c2st"):
        return "lower: 0.5 is indistinguishable"
    return "higher"
