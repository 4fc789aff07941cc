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
w, depends on the input only through its modality. A trained model has two pairs (w_0, w_1) in each layer:
one for text, one for images. This has three consequences. First, t_m runs outside the sequence
(`LLaMA.route`). All positions then move by one, which changes nothing, because rotary attention depends only
on differences of positions. Second, an adapter of LLaMA is one affine map per modality, because it has no
activation. Third, a trained adapter can be merged into the projection that follows it (`fold`). The ViT has
no t_m: its router reads the image's own [cls]. After block 0, [cls] has seen the image, and w depends on it.

Why an untrained adapter is the identity. phi_u starts at zero, so f_a(z) = 0 and z' = z. The two phi_u start
equal, but grow apart. Let g_T and g_I be the gradients that a single phi_u would get from the samples without
and with an image. The first phi_u gets w_0(text) g_T + w_0(image) g_I, the second the same with w_1. E_m is
random, so w differs between text and images, and the two sums have different directions. (If only their
lengths differed, AdamW would move both alike.) In the ViT, w depends on the image.

Shapes: B samples, T tokens, d width of the frozen model, r width of the adapter (8). phi_d and phi_u are
the adapter's; the phi of Eq. (4) is the frozen LLM.
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
    """phi_u: r -> d in two groups: each half of the outputs reads its own half of the hidden units.

    So it has half the parameters of a dense matrix: https://arxiv.org/abs/2302.08106.
    """

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
    """mask [B, T, r]: True where a unit survives. Given, as the backward pass must drop the same ones."""
    return h if mask is None else h * mask / (1 - p)


class RepAdapter(nn.Module):
    """One adapter on its own, as in the first rows of Table 2: z + s f_a(z), f_a(z) = phi_u(phi_d(z))"""

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
    """Mixture-of-Modality Adapter: two RepAdapters that share phi_d, and a router that weighs them."""

    def __init__(self, d: int, cfg: AdapterConfig):
        super().__init__()
        self.cfg, r = cfg, cfg.dim
        self.phi_d = xavier(nn.Linear(d, r))
        self.phi_u1, self.phi_u2 = GroupedLinear(r, d), GroupedLinear(r, d)
        self.f_w = nn.Linear(d, 2)  # W_m and b_m; the paper's f_w includes the softmax

    def route(self, t: torch.Tensor) -> torch.Tensor:
        """w [.., 2], fp32, from t [.., d]: t_m (LLaMA) or [cls] (ViT) in this layer, normalised like z."""
        logits = self.f_w(t).float()  # t_m W_m + b_m
        return torch.softmax(logits / self.cfg.tau, dim=-1)  # Eq. (3): w = softmax((t_m W_m + b_m) / tau)

    def forward(self, z: torch.Tensor, w: torch.Tensor, dropout_mask=None) -> torch.Tensor:
        """z [B, T, d] -> z' [B, T, d]. w: a pair (w_0, w_1) for each token [B, T, 2] or each row [B, 1, 2]"""
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
    """The adapter merged into the projection W [out, d] that follows it: W' z + b' = W adapter(z, w), w [2].

    Insert phi_d(z) = A z + a and phi_u(h) = U h + b, where U and b are those of the two phi_u, mixed by w:
    W (z + s (U (A z + a) + b)) = (W + s W U A) z + s W (U a + b), exact up to one rounding to W's dtype.
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
    """theta_a of Eq. (4): adapters, neck (adapter_proj) and E_m. Their modules' names begin with adapter_."""
    return {name: p for name, p in model.named_parameters() if "adapter_" in name}


def freeze_base(model: nn.Module) -> None:
    """Let gradients reach only theta_a; all other parameters are frozen."""
    for name, p in model.named_parameters():
        p.requires_grad_("adapter_" in name)


def recompute(f, *args):
    """f(*args), for what is cheap to compute and large to keep: the backward pass computes it again."""
    if not torch.is_grad_enabled():
        return f(*args)
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)
