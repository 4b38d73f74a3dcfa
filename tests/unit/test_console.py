"""What the terminal shows of a run's rows, whatever the method."""

from __future__ import annotations

import pytest

from ganscale.tracking.console import describe_row

PLAYERS: dict[str, tuple[dict[str, float | None], str, str]] = {
    "gan": ({"D": 0.5, "G": 2.25}, "loss_D  0.500  loss_G  2.250", "1/1"),
    "vae": ({"G": 0.125}, "loss_G  0.125", "1"),
    "encoder": ({"D": None, "E": 1.0}, "loss_D not finite  loss_E  1.000", "1/1"),
}


@pytest.mark.parametrize("method", PLAYERS)
def test_a_row_names_the_losses_that_the_method_has(method: str) -> None:
    losses, shown, scales = PLAYERS[method]
    row: dict[str, float | None] = {"nimg": 1000, "time/images_per_second": 500.0}
    for letter, loss in losses.items():
        row |= {f"train/loss_{letter}": loss, f"train/loss_scale_{letter}": 1.0}
        row[f"train/skips_{letter}"] = 0
    assert describe_row(row, 31_000) == f"   500 img/s  ETA 0:01:00  {shown}  scale {scales}"
