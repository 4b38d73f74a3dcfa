"""Backward passes that are asked for gradients of images, and for none of weights and biases.

R1 and its relatives take `torch.autograd.grad(logits, images)` in the middle of a loss. PyTorch's
own operations then leave out the gradients of the weights. A custom Function cannot: its
`needs_input_grad` says what requires a gradient, not what was asked for (pytorch#56500). It would
compute them and the engine would throw them away: for R3GAN a seventh of the convolutions of the
discriminator's phase.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# Not a thread's own: on CUDA a backward is run by a thread of the engine, while the one that asked
# for it waits.
_parameters_wanted = True


@contextmanager
def input_gradients_only() -> Iterator[None]:
    """Backward passes in the block skip the gradients of weights and biases in our Functions.

    Whoever asks for those of a parameter in the block gets None. What is recorded in the block is
    differentiated by everything afterwards.
    """
    global _parameters_wanted
    before, _parameters_wanted = _parameters_wanted, False
    try:
        yield
    finally:
        _parameters_wanted = before


def are_parameters_wanted() -> bool:
    """Whether a Function's backward has to compute the gradients of weights and biases."""
    return _parameters_wanted
