"""Batched minimisers against closed forms, scipy's L-BFGS, and themselves row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, rosen, rosen_der
from torch import Tensor
from torch.testing import assert_close

from ganscale.generation.batched_optimizers import Minimum, adam, lbfgs

DIM = 12


def quadratics(rows: int) -> tuple[Tensor, Tensor]:
    """Positive definite matrices (rows, d, d) and the minima (rows, d), condition up to 100."""
    random = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(rows, DIM, DIM, generator=random, dtype=torch.float64))
    values = torch.logspace(0, 2, DIM, dtype=torch.float64)
    matrices = basis @ torch.diag(values) @ basis.mT
    return matrices, torch.randn(rows, DIM, generator=random, dtype=torch.float64)


def loss_of(matrices: Tensor, minima: Tensor, points: Tensor) -> Tensor:
    away = points - minima
    return torch.einsum("ni,nij,nj->n", away, matrices, away) / 2 + 3.0


def test_lbfgs_finds_the_minimum_of_quadratics() -> None:
    matrices, minima = quadratics(5)
    start = torch.zeros(5, DIM, dtype=torch.float64)
    found = lbfgs(lambda z: loss_of(matrices, minima, z), start, steps=60)
    assert_close(found.points, minima, rtol=1e-6, atol=1e-6)
    assert_close(found.losses, torch.full((5,), 3.0, dtype=torch.float64))


def test_adam_comes_near_it() -> None:
    matrices, minima = quadratics(5)
    start = torch.zeros(5, DIM, dtype=torch.float64)
    found = adam(lambda z: loss_of(matrices, minima, z), start, steps=500, lr=0.1)
    assert_close(found.points, minima, rtol=0, atol=0.05)
    assert (found.losses - 3 < 1e-3 * (loss_of(matrices, minima, start) - 3)).all()


def test_lbfgs_needs_about_as_many_steps_as_scipys() -> None:
    start = np.random.default_rng(0).normal(size=DIM)
    theirs = minimize(rosen, start, jac=rosen_der, method="L-BFGS-B", options={"maxcor": 10})

    def rosenbrock(z: Tensor) -> Tensor:
        curved = 100 * (z[:, 1:] - z[:, :-1].square()).square() + (1 - z[:, :-1]).square()
        return curved.sum(1)

    steps = int(1.5 * theirs.nit)
    found = lbfgs(rosenbrock, torch.from_numpy(start)[None], steps=steps)
    assert float(found.losses) < 1e-4
    assert float(theirs.fun) < 1e-4


@pytest.mark.parametrize("minimiser", ["adam", "lbfgs"])
def test_a_row_does_not_depend_on_the_others(minimiser: str) -> None:
    matrices, minima = quadratics(3)
    start = torch.full((3, DIM), 2.0, dtype=torch.float64)

    def found(rows: slice) -> Minimum:
        def loss(z: Tensor) -> Tensor:
            return loss_of(matrices[rows], minima[rows], z)

        if minimiser == "adam":
            return adam(loss, start[rows], steps=20, lr=0.1)
        return lbfgs(loss, start[rows], steps=20)

    assert_close(found(slice(1, 2)).points, found(slice(0, 3)).points[1:2], rtol=1e-9, atol=1e-9)


def test_losses_of_lbfgs_never_rise_and_a_minimum_stays() -> None:
    matrices, minima = quadratics(2)
    start = torch.stack([minima[0], torch.full((DIM,), 4.0, dtype=torch.float64)])
    losses = [
        lbfgs(lambda z: loss_of(matrices, minima, z), start, steps=steps).losses
        for steps in range(6)
    ]
    curve = torch.stack(losses)
    assert (curve[1:] <= curve[:-1]).all()
    assert_close(curve[:, 0], torch.full((6,), 3.0, dtype=torch.float64))
    assert curve[-1, 1] < 0.1 * curve[0, 1]


def test_a_start_better_than_all_that_follows_is_kept() -> None:
    start = torch.zeros(1, 2)
    found = adam(lambda z: z.abs().sum(1), start, steps=3, lr=0.5)
    assert_close(found.losses, torch.zeros(1))
    assert_close(found.points, start)


def test_lbfgs_stops_when_all_rows_are_done() -> None:
    asked: list[int] = []

    def loss(z: Tensor) -> Tensor:
        asked.append(len(z))
        return z.square().sum(1)

    told: list[int] = []
    lbfgs(loss, torch.ones(2, 3, dtype=torch.float64), steps=1000, progress=told.append)
    assert sum(told) == 1000
    assert len(asked) < 100


def test_progress_is_told_of_every_step() -> None:
    told: list[int] = []
    lbfgs(lambda z: z.square().sum(1), torch.ones(1, 2), steps=4, progress=told.append)
    adam(lambda z: z.square().sum(1), torch.ones(1, 2), steps=3, lr=0.1, progress=told.append)
    assert told == [1] * 7
