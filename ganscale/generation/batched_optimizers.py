"""Minimisation of many small independent problems at once: a row is a problem, (N, d).

torch's L-BFGS takes all of its parameters as one problem, so that rows would share a line search,
and the result of one would depend on the others. Here every row has its own history and step
length, and what differs between rows is expressed by masks, so that a step is a few operations on
all rows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LossFn = Callable[[Tensor], Tensor]
"""Points (N, d) to losses (N,), each row of its own."""

_HISTORY = 10
_SUFFICIENT = 1e-4
"""Fraction of the decrease that the slope promises which a step must achieve (Armijo)."""
# 2^-20 of a quasi-Newton step: a row that needs a shorter one has no descent that fp32 resolves.
_MAX_HALVINGS = 20


class Minimum(NamedTuple):
    """The best point of each row among those that were evaluated."""

    points: Tensor
    """(N, d)"""
    losses: Tensor
    """(N,)"""


class _Pair(NamedTuple):
    """A step of L-BFGS: the change of points and of gradients, (N, d), and 1 / (s y), (N, 1).

    The latter is 0 for a row without positive curvature there, which leaves the pair out of that
    row's recursion.
    """

    step: Tensor
    change: Tensor
    rho: Tensor


def adam(
    loss_fn: LossFn,
    start: Tensor,
    *,
    steps: int,
    lr: float,
    progress: Callable[[int], None] = lambda steps: None,
) -> Minimum:
    """Adam (Kingma and Ba 2015) with a cosine schedule to 0."""
    # Adam works element by element, so torch's serves many rows at once. Losses may rise on the
    # way, hence the best point so far is kept.
    points = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([points], lr=lr)
    best = Minimum(start.clone(), torch.full_like(start[:, 0], torch.inf))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        losses, points.grad = _losses_and_gradients(loss_fn, points)
        best = _update_best(best, points, losses)
        optimizer.step()
        progress(1)
    with torch.no_grad():
        return _update_best(best, points, loss_fn(points))


def lbfgs(
    loss_fn: LossFn,
    start: Tensor,
    *,
    steps: int,
    progress: Callable[[int], None] = lambda steps: None,
) -> Minimum:
    """L-BFGS (Nocedal 1980) with ten pairs; steps are halved until they decrease the loss enough.

    Losses never rise. A row that no step improves restarts from its steepest descent, and is done
    when that does not help either.
    """
    points = start.clone()
    losses, gradients = _losses_and_gradients(loss_fn, points)
    pairs: deque[_Pair] = deque(maxlen=_HISTORY)
    fresh = torch.ones_like(losses, dtype=torch.bool)  # rows without a usable history
    done = torch.zeros_like(fresh)
    for step in range(steps):
        direction = -_inverse_hessian_times(gradients, pairs)
        falls = (direction * gradients).sum(1, keepdim=True) < 0
        # Rounding or a stale history can make the direction point uphill; the steepest descent does
        # not.
        direction = torch.where(falls, direction, -gradients)
        # Without a history nothing is known of the loss's scale, so the first step has length 1 at
        # most: latents are of size 1.
        scale = 1 / gradients.norm(dim=1).clamp(min=1)
        direction = direction * torch.where(fresh, scale, torch.ones_like(scale))[:, None]
        points, losses, gradients, pair = _line_search(
            loss_fn, points, losses, gradients, direction, ~done
        )
        # A stuck row drops its history and tries the steepest descent in the next step; if it was
        # already fresh, it is at a minimum as far as fp32 can tell.
        stuck = ~pair.step.any(1)
        done |= stuck & fresh
        fresh = stuck | (fresh & (pair.rho[:, 0] == 0))
        kept = (old._replace(rho=old.rho.masked_fill(stuck[:, None], 0.0)) for old in pairs)
        pairs = deque(kept, maxlen=_HISTORY)
        pairs.append(pair)
        progress(1)
        if done.all():
            progress(steps - step - 1)
            break
    return Minimum(points, losses)


def _line_search(
    loss_fn: LossFn,
    points: Tensor,
    losses: Tensor,
    gradients: Tensor,
    direction: Tensor,
    open_rows: Tensor,
) -> tuple[Tensor, Tensor, Tensor, _Pair]:
    """A backtracking line search for each row: points, losses, slopes, and the pair of the step.

    A row for which no length decreases the loss enough, or that is not open, stays where it is.
    """
    promised = (direction * gradients).sum(1)
    length = torch.ones_like(losses)
    new_points, new_losses, new_gradients = points, losses, gradients
    open_rows = open_rows.clone()
    for _ in range(_MAX_HALVINGS):
        tried = points + length[:, None] * direction
        tried_losses, tried_gradients = _losses_and_gradients(loss_fn, tried)
        enough = tried_losses <= losses + _SUFFICIENT * length * promised
        # Strictly less, since at rounding's limit the promised decrease is nothing and the loss the
        # same.
        taken = open_rows & enough & (tried_losses < losses)
        new_points = torch.where(taken[:, None], tried, new_points)
        new_losses = torch.where(taken, tried_losses, new_losses)
        new_gradients = torch.where(taken[:, None], tried_gradients, new_gradients)
        open_rows &= ~taken
        if not open_rows.any():
            break
        length = torch.where(open_rows, length / 2, length)
    step, change = new_points - points, new_gradients - gradients
    curvature = (step * change).sum(1, keepdim=True)
    upward = curvature > 1e-10 * change.square().sum(1, keepdim=True)
    # Where nothing moved, curvature is 0 and rho, too; `where` discards the infinite quotient.
    rho = torch.where(upward, 1 / curvature, torch.zeros_like(curvature))
    return new_points, new_losses, new_gradients, _Pair(step, change, rho)


def _inverse_hessian_times(gradients: Tensor, pairs: deque[_Pair]) -> Tensor:
    """The two-loop recursion (Nocedal and Wright 2006, algorithm 7.4), row by row."""
    q = gradients
    alphas = []
    for pair in reversed(pairs):
        alpha = pair.rho * (pair.step * q).sum(1, keepdim=True)
        q = q - alpha * pair.change
        alphas.append(alpha)
    scale = torch.ones_like(gradients[:, :1])
    # The initial matrix is scaled by the row's newest usable pair (Nocedal and Wright, equation
    # 7.20).
    for pair in pairs:
        inverse = pair.rho * pair.change.square().sum(1, keepdim=True)
        scale = torch.where(pair.rho > 0, 1 / inverse, scale)
    r = scale * q
    for pair, alpha in zip(pairs, reversed(alphas), strict=True):
        beta = pair.rho * (pair.change * r).sum(1, keepdim=True)
        r = r + pair.step * (alpha - beta)
    return r


def _losses_and_gradients(loss_fn: LossFn, points: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (N,) and gradients (N, d), both detached."""
    with torch.enable_grad():
        inputs = points.detach().requires_grad_(True)
        losses = loss_fn(inputs)
        # The gradient of a sum has each row's own, since no loss depends on another row.
        (gradients,) = torch.autograd.grad(losses.sum(), inputs)
    return losses.detach(), gradients


def _update_best(best: Minimum, points: Tensor, losses: Tensor) -> Minimum:
    improved = losses < best.losses
    return Minimum(
        torch.where(improved[:, None], points.detach(), best.points),
        torch.where(improved, losses, best.losses),
    )
