"""The loss of Eq. (5) in less memory: what train.py puts in the place of lavin.negative_log_likelihood.

Logits are the largest tensors of training: a target of LLaMA has 32,000 of them. Autograd would keep them
until the backward pass. Here, the forward pass handles a few targets at a time. It computes the gradient of
their hidden states at once, and keeps nothing else. Value and gradient are those of lavin.py.
"""
import torch
import torch.nn.functional as F

ROWS = 256  # targets at a time


class Chunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, W, R):
        log_p = F.log_softmax(F.linear(hidden, W).float(), dim=-1)  # [targets, V]
        L = -log_p.gather(1, R[:, None]).sum()
        dL_dlogits = log_p.exp_()  # in place. The gradient is p, and at the target p - 1
        dL_dlogits[torch.arange(len(R), device=R.device), R] -= 1
        ctx.save_for_backward((dL_dlogits.type_as(W) @ W).type_as(hidden))  # dL_dhidden
        return L

    @staticmethod
    def backward(ctx, dL):
        return dL * ctx.saved_tensors[0], None, None  # none for W, which is frozen


def negative_log_likelihood(hidden: torch.Tensor, W: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """hidden [targets, C], W [V, C], R [targets] -> L, as lavin.negative_log_likelihood"""
    return sum(Chunk.apply(h, W, r) for h, r in zip(hidden.split(ROWS), R.split(ROWS)))
