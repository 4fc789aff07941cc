"""What LaVIN trains: RepAdapters and the router that mixes two of them. https://arxiv.org/abs/2305.15023

One Mixture-of-Modality Adapter (MM-Adapter) stands in front of every attention of the two frozen models:

    z ──┬──────────────────────────────────────────────────────────── + ──> z'        Eq. (2)
        │                      ┌── phi_u1 ── f_a1(z) ── x w_0 ──┐     │
        └── phi_d ── dropout ──┤                                + ── x s
                               └── phi_u2 ── f_a2(z) ── x w_1 ──┘
    t_m ── W_m, b_m ── / tau ── softmax ── w_0, w_1                                   Eq. (3)

Why a modality token. One LLM has to serve text alone and text with an image, and the two need different
adaptation. A token t_m says which of the two the input is. It acts only through the routers: in every
layer, a router reads the hidden state of t_m and mixes two adapters, w_0 of the first and w_1 of the second.

Why LLaMA's routing weights are constants. The paper calls the routing dynamic. But in the authors' code the
attention mask lets t_m see only itself, and hides t_m from all other tokens. So the state of t_m, and with it
w, depends only on the modality: each layer of a trained model has two pairs (w_0, w_1), one for text and one
for images. Three things follow. First, t_m need not stand in the sequence, so it passes through LLaMA on its
own (`LLaMA.route`). This moves all positions by one, which changes nothing: rotary attention depends only on
differences of positions. Second, an adapter of LLaMA is one affine map per modality, because it has no
activation. Third, a trained adapter can be merged into the projection that follows it (`fold`).

Why the ViT's are not. There is no t_m: the router reads the image's own [cls]. From block 1 on, [cls] has
attended to the patches, so w depends on the image.

Why an untrained adapter is the identity. phi_u starts at zero, so f_a(z) = 0 and z' = z.

Why the two phi_u become different, although both start at zero. In the gradient of phi_u1, the share of each
sample is multiplied by its w_0; in that of phi_u2, by its w_1. E_m starts at random, so w differs between
text and images, and the two gradients have different directions. In the ViT, w varies little from image to
image, and the two stay similar: in the tiny model, their cosine is about 0.9 in the ViT and 0.5 in LLaMA.

Shapes: B rows (1 in LLaMA's training, where samples are packed), T tokens, d width, r hidden units (8).
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class AdapterConfig:
    kind: str = "mm"  # in LLaMA: "mm" = MM-Adapter, "rep" = one RepAdapter, no router. In the ViT always MM
    dim: int = 8  # r, the number of hidden units
    scale: float = 1.0  # s
    tau: float = 10.0  # router temperature: 10 for LLaMA-7B, 5 for 13B
    dropout: float = 0.1  # on the hidden units of the adapter


def xavier(linear: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(linear.weight), nn.init.zeros_(linear.bias)
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
        return F.linear(h, self.dense(), self.bias)  # at r = 8, faster than one product per group


def dropout(h: torch.Tensor, mask: torch.Tensor | None, p: float) -> torch.Tensor:
    """mask [B, T, r], or None: no dropout. A given mask, because `recompute` runs this twice."""
    return h if mask is None else h * mask / (1 - p)


class RepAdapter(nn.Module):
    """f_a(z) = phi_u(phi_d(z)). As a module of its own, as in the first rows of Table 2: z + s f_a(z)"""

    def __init__(self, d: int, cfg: AdapterConfig):
        super().__init__()
        self.cfg, r = cfg, cfg.dim
        self.phi_d = xavier(nn.Linear(d, r))
        self.phi_u = GroupedLinear(r, d)

    def forward(self, z: torch.Tensor, w: None = None, dropout_mask=None) -> torch.Tensor:
        """z [B, T, d] -> z' [B, T, d]. w is ignored: a block calls both kinds of adapter alike."""
        h = dropout(self.phi_d(z), dropout_mask, self.cfg.dropout)  # [B, T, r]
        return z + self.cfg.scale * self.phi_u(h)  # the released code returns phi_u(h) alone


class MMAdapter(nn.Module):
    """Mixture-of-Modality Adapter: f_a1 and f_a2, which share phi_d, and the router that weighs them."""

    def __init__(self, d: int, cfg: AdapterConfig):
        super().__init__()
        self.cfg, r = cfg, cfg.dim
        self.phi_d = xavier(nn.Linear(d, r))
        self.phi_u1, self.phi_u2 = GroupedLinear(r, d), GroupedLinear(r, d)
        self.f_w = nn.Linear(d, 2)  # W_m and b_m; the paper's f_w includes the softmax

    def route(self, t: torch.Tensor) -> torch.Tensor:
        """w [.., 2], fp32. t [.., d]: the state of t_m (ViT: of [cls]) in this layer, normalised as z is"""
        logits = self.f_w(t).float()  # t_m W_m + b_m
        return torch.softmax(logits / self.cfg.tau, dim=-1)  # Eq. (3): w = softmax((t_m W_m + b_m) / tau)

    def forward(self, z: torch.Tensor, w: torch.Tensor, dropout_mask=None) -> torch.Tensor:
        """z [B, T, d] -> z' [B, T, d]. w = f_w(t_m), see `route`: of each token [B, T, 2] or row [B, 1, 2]"""
        h = dropout(self.phi_d(z), dropout_mask, self.cfg.dropout)  # [B, T, r]
        f_a1, f_a2 = self.phi_u1(h), self.phi_u2(h)  # [B, T, d] each
        w_0, w_1 = w.type_as(h).split(1, dim=-1)  # [.., 1] each
        router = w_0 * f_a1 + w_1 * f_a2  # Eq. (3): router(f_a1(Z), f_a2(Z)) = w_0 f_a1(Z) + w_1 f_a2(Z)
        return z + self.cfg.scale * router  # Eq. (2): Z' = Z + s router(f_a1(Z), f_a2(Z); f_w(t_m))


def new_adapter(d: int, cfg: AdapterConfig) -> nn.Module:
    """The adapter that cfg.kind names; ValueError lists the known kinds."""
    kinds = {"mm": MMAdapter, "rep": RepAdapter}
    if cfg.dim < 2 or cfg.dim % 2:
        raise ValueError(f"adapter width {cfg.dim}: expected an even number, because phi_u has two groups")
    if cfg.kind not in kinds:
        raise ValueError(f"unknown adapter kind {cfg.kind!r}; known: {', '.join(kinds)}")
    return kinds[cfg.kind](d, cfg)


@torch.no_grad()
def fold(W: torch.Tensor, adapter: nn.Module, w: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge an adapter into the projection W [out, d] after it: W', b' so that W' z + b' = W adapter(z, w).

    w [2]. Write phi_d(z) = A z + a and w_0 phi_u1(h) + w_1 phi_u2(h) = U h + b. Then W adapter(z, w) =
    W (z + s (U (A z + a) + b)) = (W + s W U A) z + s W (U a + b). The results are rounded to W's dtype.
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
    """theta_a of Eq. (4), what trains: adapters, neck and E_m. Their modules' names begin with adapter_."""
    return {name: p for name, p in model.named_parameters() if "adapter_" in name}


def freeze_base(model: nn.Module) -> None:
    """Let gradients reach only theta_a; all other parameters are frozen."""
    for name, p in model.named_parameters():
        p.requires_grad_("adapter_" in name)


def recompute(f, *args):
    """f(*args), but autograd keeps only args, and the backward pass runs f again. f must not be random."""
    if not torch.is_grad_enabled():
        return f(*args)
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)
