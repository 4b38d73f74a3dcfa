"""The interface of what is run between steps: by the built-in actions and by a user's callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ganscale.training.state import TrainingState


class Rollback(Exception):  # noqa: N818 - not an error: the loop goes on from a checkpoint
    """Asks the loop to go on from the newest checkpoint up to `healthy_nimg`.

    All ranks have to raise it at the same position. Random numbers then differ
    from those of the first attempt. After `guard.max_rollbacks` of a run, the next one ends it with
    `TrainingFault`.
    """

    def __init__(self, healthy_nimg: int) -> None:
        super().__init__(f"back to {healthy_nimg / 1000:g} kimg")
        self.healthy_nimg = healthy_nimg


class Callback:
    """Something that is done between steps, every so many thousands of real images.

    Subclass it and pass objects to `ganscale.train(config, callbacks=[...])`:

        class LogWeightNorm(ganscale.Callback):
            every_kimg = 2.0

            def run(self, state):
                weights = state.generator.parameters()
                norm = sum(float(w.square().sum()) for w in weights) ** 0.5
                state.next_row["train/weight_norm"] = norm

    When it is run follows from the position alone, so a resumed run does what an uninterrupted one
    does. All ranks run it at the same step.
    """

    every_kimg: float = 1.0
    """Distance between runs, above 0; there is one more at the end of the run. A distance of less
    than a batch is after each step."""
    at_start: bool = False
    """Whether it is run before the first step as well."""

    def is_due(self, state: TrainingState) -> bool:
        """Whether the last step crossed a multiple of `every_kimg`, or was the last one."""
        # Nothing has been crossed yet, and 0 is a multiple of every distance.
        if state.nimg == 0:
            return self.at_start
        # By crossing, not by equality: a multiple need not be a position, since positions are
        # multiples of the batch size.
        every_nimg = 1000 * self.every_kimg
        return state.done or state.nimg // every_nimg > state.previous_nimg // every_nimg

    def run(self, state: TrainingState) -> None:
        """Do it. Metrics put into `state.next_row` are logged.

        To end training here with a checkpoint, set `state.stop_requested` on all ranks; to go back
        to an earlier checkpoint, raise `Rollback` on all ranks.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, of tensors, numbers, strings, lists and dictionaries."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned when the checkpoint was saved."""
