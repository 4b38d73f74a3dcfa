"""Adam whose second decay rate follows a schedule, as R3GAN's does.

PyTorch's fused Adam takes its decay rates as numbers. In a captured graph they could not move, so
here they are tensors, and the update is written with the multi-tensor operations.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class ScheduledAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1) with tensors for its rates.

    `lr` and `beta2` are tensors () on the parameters' device, which are read at each step: write
    new values into them. As in PyTorch's Adam, the bias correction uses the current `beta2`.
    """

    # GradScaler then sets `found_inf` on the device instead of reading it on the host.
    _step_supports_amp_scaling = True
    found_inf: Tensor

    def __init__(
        self, parameters: Iterable[Tensor], lr: Tensor, beta1: float, beta2: Tensor, eps: float
    ) -> None:
        defaults = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}
        super().__init__(parameters, defaults)
        # The same state as that of PyTorch's Adam, so each loads the other's.
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters, or none and no moment where `found_inf` is not 0."""
        (group,) = self.param_groups
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        finite = getattr(self, "found_inf", weights[0].new_zeros(())) == 0
        # Where a step is skipped all changes are multiplied by 0; an inf or nan would survive that.
        gradients = [torch.where(finite, p.grad, 0.0) for p in weights]
        steps, means, squares = (
            [self.state[p][name] for p in weights] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        taken = finite.double()
        beta1, beta2 = group["beta1"], group["beta2"].double()

        torch._foreach_add_(steps, [taken.to(steps[0])] * len(steps))
        torch._foreach_mul_(means, 1 - (1 - beta1) * taken)
        torch._foreach_add_(means, torch._foreach_mul(gradients, (1 - beta1) * taken))
        torch._foreach_mul_(squares, 1 - (1 - beta2) * taken)
        gradients = list(torch._foreach_mul(gradients, gradients))
        torch._foreach_add_(squares, torch._foreach_mul(gradients, (1 - beta2) * taken))

        # All weights are updated in the same steps; before the first one that is taken, the count
        # is 0 and so would be both divisors.
        step = steps[0].double().clamp(min=1)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - beta2**step).sqrt())
        torch._foreach_add_(roots, group["eps"])
        changes = list(torch._foreach_div(means, roots))
        torch._foreach_mul_(changes, -group["lr"] / (1 - beta1**step) * taken)
        torch._foreach_add_(weights, changes)
