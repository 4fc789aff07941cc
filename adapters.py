"""What LaVIN puts into every block: two adapters and a router. https://arxiv.org/abs/2305.15023

One Mixture-of-Modality Adapter (MM-Adapter) stands in front of every attention of the two frozen models:

    z ──┬──────────────────────────────────────────────────────────── + ──> z'        Eq. (2)
        │                      ┌── phi_u1 ── f_a1(z) ── x w_0 ──┐     │
        └── phi_d ── dropout ──┤                                + ── x s
                               └── phi_u2 ── f_a2(z) ── x w_1 ──┘
    t_m ── W_m, b_m ── / tau ── softmax ── w_0, w_1                                   Eq. (3)

Why a modality token. One LLM has to serve text alone and text with an image, and the two need different
adaptation. A token t_m says which of the two the input is. It acts only through routing: in every layer, f_w
reads the hidden state of t_m and gives w_0 and w_1, the weights of the adapters f_a1 and f_a2.

Why LLaMA's routing weights are constants. The paper calls the routing dynamic. But t_m stands first, so it
attends only to itself. So its state depends only on the modality, and each layer of a trained model has one
pair (w_0, w_1) for text and one for images. And in the authors' code, a mask hides t_m from all other tokens.
So t_m need not stand in the sequence: it runs through LLaMA on its own (`llama.Block.route`). (All positions
then move by one, but LLaMA's attention depends only on their differences.) An adapter, which has no
activation, is one affine map per modality, so it can be merged (`fold`) into wq, wk and wv. The ViT has no
t_m: f_w reads the image's [cls], which from block 1 on has attended to the patches. So there, w depends on
the image.

Why an untrained MM-Adapter is the identity. phi_u starts at zero, so f_a(z) = 0 and z' = z. At first, only
phi_u and the neck have nonzero gradients: phi_d, f_w and E_m act only through phi_u, which is zero.

Why phi_u1 and phi_u2 become different, though both start at zero. Let g be the gradient that a sample would
give to both if w were (1, 1). Then phi_u1 gets the sum of w_0 g over the samples, phi_u2 that of w_1 g. If
all samples had the same w, the two sums would be parallel. AdamW nearly ignores their lengths, so it would
keep phi_u1 and phi_u2 equal. But text and images have different w from the start: E_m and f_w start at
random. (In the ViT, w varies little between images, so there phi_u1 and phi_u2 stay similar.)

Shapes: z is [images, T, d] in the ViT, and [rows, T, d] in LLaMA. In training, LLaMA has a single row, in
which all samples lie end to end. T tokens, d width, r hidden units (8).
"""
from dataclasses import dataclass

import torch
import torch.nn as nn


@dataclass
class AdapterConfig:
    kind: str = "mm"  # in LLaMA: "mm" = MM-Adapter, "rep" = one RepAdapter, no router. In the ViT always MM
    dim: int = 8  # r, the number of hidden units; even: phi_u1 and phi_u2 have two groups each
    scale: float = 1.0  # s
    tau: float = 10.0  # temperature of the softmax in f_w: 10 for LLaMA-7B, 5 for 13B
    dropout: float = 0.1  # on the hidden units of the adapter


def xavier(linear: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class GroupedLinear(nn.Module):
    """phi_u: r -> d in two groups: each half of the outputs reads only its own half of the hidden units. This
    halves the number of weights. It is RepAdapter's design: https://arxiv.org/abs/2302.08106"""

    def __init__(self, r: int, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d, r // 2))
        self.bias = nn.Parameter(torch.zeros(d))

    def dense(self) -> torch.Tensor:
        """The weight as one matrix [d, r]: the two groups are its diagonal blocks, the rest is zero."""
        return torch.block_diag(*self.weight.chunk(2))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(h, self.dense(), self.bias)  # faster than one product per group


def dropout(h: torch.Tensor, mask: torch.Tensor | None, p: float) -> torch.Tensor:
    """mask [.., T, r] is False where a unit is dropped; None: no dropout. data.py draws the mask for each
    sample separately, so that training gives the same result on one GPU and on eight."""
    return h if mask is None else h * mask / (1 - p)


class RepAdapter(nn.Module):
    """z + s f_a(z): one adapter, f_a(z) = phi_u(phi_d(z)), without a router, as in the first rows of Table 2.
    MMAdapter does not use this class, because f_a1 and f_a2 share phi_d and have no residual of their own."""

    def __init__(self, d: int, cfg: AdapterConfig):
        super().__init__()
        self.cfg = cfg
        self.phi_d, self.phi_u = xavier(nn.Linear(d, cfg.dim)), GroupedLinear(cfg.dim, d)

    def forward(self, z: torch.Tensor, w=None, dropout_mask=None) -> torch.Tensor:
        """z [.., T, d] -> z' [.., T, d]. w is ignored; it is here because a block calls both kinds alike."""
        h = dropout(self.phi_d(z), dropout_mask, self.cfg.dropout)  # [.., T, r]
        return z + self.cfg.scale * self.phi_u(h)  # the released code returns phi_u(h) alone


class RoutingFunction(nn.Linear):
    """f_w, which gives the routing weights w. Its weight is W_m, its bias b_m. In the ViT, it reads [cls]."""

    def __init__(self, d: int, tau: float):
        super().__init__(d, 2)
        self.tau = tau

    def forward(self, t_m: torch.Tensor) -> torch.Tensor:
        """t_m [.., d] -> w [.., 2], fp32. As in the released code, f_w reads not the modality token itself,
        but its hidden state in this layer, after the layer's norm."""
        logits = super().forward(t_m).float()  # t_m W_m + b_m
        return torch.softmax(logits / self.tau, -1)  # Eq. (3): f_w(t_m) = softmax((t_m W_m + b_m) / tau)


class MMAdapter(nn.Module):
    """Mixture-of-Modality Adapter: f_a1 and f_a2, which share phi_d, weighted by f_w."""

    def __init__(self, d: int, cfg: AdapterConfig):
        super().__init__()
        self.cfg, r = cfg, cfg.dim
        self.phi_d = xavier(nn.Linear(d, r))
        self.phi_u1, self.phi_u2 = GroupedLinear(r, d), GroupedLinear(r, d)
        self.f_w = RoutingFunction(d, cfg.tau)  # called by llama.Block.route and clip.Block

    def forward(self, z: torch.Tensor, w: torch.Tensor, dropout_mask=None) -> torch.Tensor:
        """z [.., T, d] -> z' [.., T, d]. w = f_w(t_m): a pair for each token, [.., T, 2], since samples of
        both modalities may lie in one row; or one pair for all tokens, [.., 1, 2]."""
        h = dropout(self.phi_d(z), dropout_mask, self.cfg.dropout)  # [.., T, r]
        f_a1, f_a2 = self.phi_u1(h), self.phi_u2(h)  # [.., T, d] each
        w_0, w_1 = w.type_as(h).split(1, dim=-1)  # [.., 1] each
        mixed = w_0 * f_a1 + w_1 * f_a2  # Eq. (3): router(f_a1(Z), f_a2(Z)) = w_0 f_a1(Z) + w_1 f_a2(Z)
        return z + self.cfg.scale * mixed  # Eq. (2): Z' = Z + s router(f_a1(Z), f_a2(Z); f_w(t_m))


@torch.no_grad()
def fold(W: torch.Tensor, adapter: nn.Module, w: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge an adapter into W [out, d], the projection after it. Return W' and b' such that, for every z,

        W' z + b' = W adapter(z, w), up to rounding to W's dtype.

    In speed/step.py, wq, wk and wv get these as weight and bias. w has shape [2]. Write phi_d(z) = A z + a,
    and w_0 phi_u1(h) + w_1 phi_u2(h) = U h + b. Then

        W adapter(z, w) = W (z + s (U (A z + a) + b)) = (W + s W U A) z + s W (U a + b).
    """
    A, a = adapter.phi_d.weight, adapter.phi_d.bias  # [r, d], [r]
    if isinstance(adapter, MMAdapter):
        U = w[0] * adapter.phi_u1.dense() + w[1] * adapter.phi_u2.dense()  # [d, r]
        b = w[0] * adapter.phi_u1.bias + w[1] * adapter.phi_u2.bias  # [d]
    else:
        U, b = adapter.phi_u.dense(), adapter.phi_u.bias
    sW = adapter.cfg.scale * W.float()
    return (W + sW @ U @ A).type_as(W), (sW @ (U @ a + b)).type_as(W)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """theta_a of Eq. (4): the parameters with adapter_ in their name. Every trained module of LaVIN has it:
    adapter_attn in each block, adapter_proj (the neck), adapter_modality_embedding (E_m)."""
    return {name: p for name, p in model.named_parameters() if "adapter_" in name}


def freeze_base(model: nn.Module) -> None:
    """Let gradients reach only theta_a; all other parameters are frozen."""
    model.requires_grad_(False)
    for p in trainable(model).values():
        p.requires_grad_(True)
