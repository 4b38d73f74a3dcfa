"""An evaluation as a table for people: the protocol, then a row for each metric."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ganscale.evaluation.distributions.evaluate import Evaluation, Protocol

# Published figures are of 10,000 or 50,000 samples; the bias of fewer is what one would see.
_FEW_SAMPLES = 10_000

# FID of 50,000 samples against the training set by the same network, by StudioGAN's benchmark of
# published models; that of the test images is by this code and agrees with the published 3.15.
_KNOWN_FID = {
    "CIFAR-10's training images": (
        "its test images 3.15, StyleGAN2-ADA 2.31, SNGAN 9.01, DCGAN 48.29"
    )
}


def table_of(evaluation: Evaluation) -> str:
    """The table, without a newline at its end."""
    return "\n".join(_lines(evaluation))


def _lines(evaluation: Evaluation) -> Iterator[str]:
    protocol = evaluation.protocol
    yield f"samples    {protocol.samples}"
    yield f"reference  {protocol.reference}"
    if protocol.num_reference_rows:
        drawn = f"{protocol.num_reference_rows:,} of them, at random,"
        yield f"           {drawn} for all metrics but fid and fid_infinity"
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
    if is_biased and protocol.num_samples < _FEW_SAMPLES:
        return f"lower; too high by its bias: fewer than {_FEW_SAMPLES:,} samples"
    if column == "fid" and protocol.reference_statistics in _KNOWN_FID:
        return f"lower: {_KNOWN_FID[protocol.reference_statistics]}"
    if column.startswith(("fid", "fd_", "kid", "kd_")):
        return "lower"
    if column.startswith("c2st"):
        return "lower: 0.5 is indistinguishable"
    return "higher"
