"""The loss of Eq. (5) in less memory: train.py puts it in the place of lavin.negative_log_likelihood.

Logits are the largest tensors of training: a target of LLaMA has 32,000 of them. Autograd would keep them
until the backward pass. Here, the forward pass handles a few targets at a time, and computes the gradient of
their hidden states at once. Only this gradient is kept.
"""
import torch

import lavin

ROWS = 256  # targets at a time


class Chunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, W, R):
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            L = lavin.negative_log_likelihood(hidden, W, R)
            ctx.save_for_backward(*torch.autograd.grad(L, hidden))
        return L.detach()

    @staticmethod
    def backward(ctx, dL):
        dL_dhidden, = ctx.saved_tensors
        return dL * dL_dhidden, None, None  # none for W, which is frozen


def negative_log_likelihood(hidden: torch.Tensor, W: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """hidden [targets, C], W [V, C], R [targets] -> L; value and gradient as in lavin.py"""
    return sum(Chunk.apply(h, W, r) for h, r in zip(hidden.split(ROWS), R.split(ROWS)))
