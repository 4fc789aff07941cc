"""The loss of Eq. (5) in less memory: call it for a few targets at a time, and add up.

Logits are the largest tensors of training: a target of LLaMA has 32,000 of them. Autograd would keep them
until the backward pass. Here, the forward pass computes L of a few targets and at once its gradient with
respect to their hidden states. Only this gradient is kept.
"""
from typing import Callable

import torch

ROWS = 256  # targets at a time


class Chunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, hidden, W, R):
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            L = loss(hidden, W, R)
            ctx.save_for_backward(*torch.autograd.grad(L, hidden))
        return L.detach()

    @staticmethod
    def backward(ctx, dL):
        dL_dhidden, = ctx.saved_tensors
        return None, dL * dL_dhidden, None, None  # none for W, which is frozen


def in_chunks(loss: Callable) -> Callable:
    """loss: a sum over targets, a function of hidden [targets, C], W [V, C], R [targets]. Returns a function
    with the same value and the same gradient for `hidden`."""
    def chunked(hidden, W, R):
        return sum(Chunk.apply(loss, h, W, r) for h, r in zip(hidden.split(ROWS), R.split(ROWS)))

    return chunked
