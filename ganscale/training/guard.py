"""Notices when training has gone wrong, from the rows of metrics that all ranks share.

A GAN fails in a few ways that metrics show long before anybody looks at samples:

- `non_finite`: a loss is not a number, or, where gradients need no scaling, a gradient is not;
- `scale_collapse`: under fp16, the loss scale has fallen below 1, or every other step is skipped;
- `exploding`, `vanishing`: a gradient norm a thousand times off its own past;
- `stuck`: the discriminator is so sure of itself that its logits lie far apart, row after row;
- `collapse`: images from fixed latents, which were diverse, have become alike.

Every rule but `non_finite` must hold for several rows in a row, so that a single odd row is no
alarm. Rows are the same on all ranks, and so is the verdict, without any exchange. The guard's
memory is part of a checkpoint: a resumed run raises the alarms that the uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ganscale.objectives.adversarial import OBJECTIVES

_PATIENCE = {
    "non_finite": 1,
    "scale_collapse": 3,
    "exploding": 5,
    "vanishing": 5,
    "stuck": 10,
    "collapse": 2,
}
"""Rows in which a sign must be seen (for `collapse`, draws of samples)."""

_WARM_UP_ROWS = 20
"""Before gradient norms have a past to be compared with."""
_NORM_MEMORY = 0.95
_NORM_FACTOR = 1000.0
_LOGIT_GAP = 60.0
_LOST_DIVERSITY = 0.25
"""Part of the run's best diversity below which images count as alike."""


@dataclass(frozen=True)
class Alarm:
    """What is wrong, in one line, and the last position at which nothing of it was seen."""

    kind: str
    message: str
    healthy_nimg: int


class Guard:
    """Looks at each row of a run.

    Args:
        objective: name of the adversarial objective, whose `bounded` decides whether logits that
            lie far apart are a sign.
        models: the letters of the networks that learn.
        scaled: whether gradients are scaled (fp16), where an overflow now and then is normal.
        discriminator_steps: the discriminator's updates for one of the other networks.
    """

    def __init__(
        self,
        objective: str,
        *,
        models: Iterable[str],
        scaled: bool,
        discriminator_steps: int = 1,
    ) -> None:
        self._bounded = OBJECTIVES[objective].bounded
        self._models = tuple(models)
        self._scaled = scaled
        self._discriminator_steps = discriminator_steps
        self._counts = dict.fromkeys(_PATIENCE, 0)
        self._healthy_nimg = dict.fromkeys(_PATIENCE, 0)
        self._norms: dict[str, float] = {}
        self._num_rows = 0
        self._skips: dict[str, float] = {}
        self._last_step = 0.0
        self._best_diversity = 0.0

    def look(self, row: Mapping[str, float]) -> list[Alarm]:
        """The alarms that this row gives; each is raised once, until its sign has gone again.

        `row` has `nimg`, `step` and the statistics of `train/`; `metrics/diversity` when samples
        were drawn.
        """
        signs = dict(self._signs(row))
        nimg = int(row["nimg"])
        alarms = []
        for kind, patience in _PATIENCE.items():
            if kind not in signs:
                # Rows without a measurement say nothing; they neither raise nor clear the alarm.
                if self._is_measured(kind, row):
                    self._counts[kind], self._healthy_nimg[kind] = 0, nimg
                continue
            self._counts[kind] += 1
            # Equal, not at least: an alarm that lasts is raised once.
            if self._counts[kind] == patience:
                alarms.append(Alarm(kind, signs[kind], self._healthy_nimg[kind]))
        # After looking: a row is compared with what came before it.
        self._remember(row, signs)
        return alarms

    def healthy_nimg(self, nimg: int) -> int:
        """The last position, at most `nimg`, at which every rule has looked and seen no sign.

        An alarm that is raised later names no earlier position, so whoever keeps a checkpoint up to
        here has one to go back to.
        """
        # Without a drawing there is no diversity that could be lost.
        kinds = [kind for kind in _PATIENCE if kind != "collapse" or self._best_diversity]
        return min([nimg, *(self._healthy_nimg[kind] for kind in kinds)])

    def raise_again(self) -> None:
        """Let the next row raise the alarms that are up, if it has their signs."""
        for kind, patience in _PATIENCE.items():
            self._counts[kind] = min(self._counts[kind], patience - 1)

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as numbers."""
        return {
            "counts": dict(self._counts),
            "healthy_nimg": dict(self._healthy_nimg),
            "norms": dict(self._norms),
            "num_rows": self._num_rows,
            "skips": dict(self._skips),
            "last_step": self._last_step,
            "best_diversity": self._best_diversity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what a checkpoint does."""
        self._counts = dict(state["counts"])
        self._healthy_nimg = dict(state["healthy_nimg"])
        self._norms = dict(state["norms"])
        self._num_rows = state["num_rows"]
        self._skips = dict(state["skips"])
        self._last_step = state["last_step"]
        self._best_diversity = state["best_diversity"]

    def _is_measured(self, kind: str, row: Mapping[str, float]) -> bool:
        """Whether the row has what a rule looks at."""
        if kind == "collapse":
            return "metrics/diversity" in row
        if kind in ("exploding", "vanishing"):
            # A single overflow, which is normal under fp16, leaves no mean norm of its row.
            norms = [row.get(f"train/grad_norm_{model}", math.nan) for model in self._norms]
            return all(map(math.isfinite, norms))
        return True

    def _signs(self, row: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """What looks wrong in this row, and how to say it."""
        skipped = {
            model: row.get(f"train/skips_{model}", 0.0) - self._skips.get(model, 0.0)
            for model in self._models
        }
        for model in self._models:
            loss = row.get(f"train/loss_{model}", 0.0)
            if not math.isfinite(loss):
                yield "non_finite", f"the loss of {model} is {loss}"
            # Without scaling no gradient overflows by design, so a single skip is a sign.
            elif skipped[model] and not self._scaled:
                yield (
                    "non_finite",
                    f"a gradient of {model} was not finite in {skipped[model]:g} steps",
                )
            scale = row.get(f"train/loss_scale_{model}", 1.0)
            # A scale below 1 makes the loss smaller, and still its gradients have overflowed.
            if self._scaled and scale < 1:
                yield "scale_collapse", f"the loss scale of {model} has fallen to {scale:g}"
            elif self._scaled and 2 * skipped[model] > (turns := self._turns(model, row)):
                yield (
                    "scale_collapse",
                    f"{skipped[model]:g} of {turns:g} steps of {model} overflowed",
                )
            yield from self._norm_signs(model, row.get(f"train/grad_norm_{model}"))
        gap = row.get("train/real_logits", 0.0) - row.get("train/fake_logits", 0.0)
        # A Wasserstein critic or least squares has no such bound; its logits may be as far apart as
        # data demand.
        if self._bounded and math.isfinite(gap) and abs(gap) > _LOGIT_GAP:
            winner = "discriminator" if gap > 0 else "generator"
            yield "stuck", f"the {winner} has won: real and fake logits are {gap:.0f} apart"
        # Compared with the run's own best, since how diverse images are depends on the data.
        diversity = row.get("metrics/diversity", math.inf)
        if diversity < _LOST_DIVERSITY * self._best_diversity:
            yield (
                "collapse",
                f"the generator's images have become alike: diversity {diversity:.3f}, "
                f"it was {self._best_diversity:.3f}",
            )

    def _turns(self, model: str, row: Mapping[str, float]) -> float:
        """The updates of a network since the last row: one in each step for D only."""
        every = 1 if model == "D" else self._discriminator_steps
        return row["step"] // every - self._last_step // every

    def _norm_signs(self, model: str, norm: float | None) -> Iterator[tuple[str, str]]:
        usual = self._norms.get(model)
        if norm is None or usual is None or self._num_rows < _WARM_UP_ROWS:
            return
        if not math.isfinite(norm):
            return  # a skipped step, which has a sign of its own
        text = f"the gradient norm of {model} is {norm:.2g}; it used to be {usual:.2g}"
        if norm > _NORM_FACTOR * usual:
            yield "exploding", text
        elif norm * _NORM_FACTOR < usual:
            yield "vanishing", text

    def _remember(self, row: Mapping[str, float], signs: Mapping[str, str]) -> None:
        self._num_rows += 1
        self._last_step = row["step"]
        self._best_diversity = max(self._best_diversity, row.get("metrics/diversity", 0.0))
        for model in self._models:
            self._skips[model] = row.get(f"train/skips_{model}", 0.0)
            norm = row.get(f"train/grad_norm_{model}")
            # A norm that is under suspicion must not become what is usual, or a slow explosion
            # would excuse itself. The mean is one of logarithms, as norms spread over orders of
            # magnitude.
            if norm and math.isfinite(norm) and not {"exploding", "vanishing"} & set(signs):
                usual = self._norms.get(model, norm)
                mean = _NORM_MEMORY * math.log(usual) + (1 - _NORM_MEMORY) * math.log(norm)
                self._norms[model] = math.exp(mean)
