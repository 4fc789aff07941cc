"""The trained part of LaVIN: RepAdapters, the router that mixes two of them, freezing, folding, adapter files.

    LaVIN, Luo et al., NeurIPS 2023: https://arxiv.org/abs/2305.15023

One Mixture-of-Modality Adapter (MM-Adapter) stands in front of every attention of the frozen models:

    z ──┬──────────────────────────────────────────────────────────────── + ──> z'     Eq. (2)
        │                        ┌── phi_u1 ── f_a1(z) ── x w[0] ──┐      │
        └── phi_d ── dropout ────┤                                 + ─ x s ┘
                                 └── phi_u2 ── f_a2(z) ── x w[1] ──┘
    t_m ── f_w ── / tau ── softmax ── w                                                Eq. (3)

Why a modality token. One LLM has to serve text alone and text with an image, and the two need different
adaptation. A token t_m states which of the two the input is. In every layer a router reads t_m and mixes two
adapters: if a modality needs its own adaptation, the router can learn to prefer one of them.

Why LLaMA's routing weights are constants. The paper calls the routing dynamic. But the mask of the authors' code
lets t_m see only itself and hides it from all other tokens. In every layer the state of t_m therefore depends on
the modality alone, and so do the weights w: two constant pairs per layer. We use this in three ways. t_m runs
outside the sequence (`LLaMA.route`); leaving it out moves all positions by one, which changes nothing, because
rotary attention depends only on differences of positions. Once trained, an adapter is one fixed affine map per
modality, because it contains no activation, and `fold` merges it into the next projection at no cost. In the ViT
there is no t_m. The router reads the image's own [cls] token, so w differs from image to image.

Why an untrained adapter is the identity. phi_u starts at zero, so f_a(z) = 0 and z' = z: training starts from
exactly the pretrained model.

Shapes: B samples, T tokens, d width of the frozen model, r width of the adapter (8), L layers.
"""
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch.utils.checkpoint import checkpoint


@dataclass
class AdapterConfig:
    kind: str = "mm"  # in LLaMA: "mm" = MM-Adapter, "rep" = one RepAdapter without a router
    dim: int = 8  # r
    scale: float = 1.0  # s
    tau: float = 10.0  # router temperature: 10 for LLaMA-7B, 5 for 13B
    dropout: float = 0.1  # on the hidden units of the adapter


def recompute(f, *args):
    """Run f without keeping its intermediates; the backward pass runs it again. For cheap, wide operations."""
    if not torch.is_grad_enabled():
        return f(*args)
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)


def xavier(linear: nn.Linear) -> nn.Linear:
    """Xavier-uniform weight, zero bias: how every new projection that must not start at zero begins."""
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class GroupedLinear(nn.Module):
    """phi_u: r -> d in two groups: outputs 0..d/2-1 read hidden units 0..r/2-1, the other outputs read the rest.

    Two groups halve the parameters of a dense phi_u (RepAdapter, Luo et al. 2023: https://arxiv.org/abs/2302.08106).
    """

    def __init__(self, r: int, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d, r // 2))
        self.bias = nn.Parameter(torch.zeros(d))

    def dense(self) -> torch.Tensor:
        """The weight as one matrix [d, r]: the two groups on the block diagonal, zeros elsewhere."""
        return torch.block_diag(*self.weight.chunk(2))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, self.dense(), self.bias)


def dropout(h: torch.Tensor, keep: torch.Tensor | None, p: float) -> torch.Tensor:
    """h [B, T, r], keep: the units that survive (bool, made with the batch); None: no dropout"""
    return h if keep is None else h * keep / (1 - p)


class RepAdapter(nn.Module):
    """One adapter on its own, as in the text-only rows of Table 2: z + s f_a(z), f_a(z) = phi_u(phi_d(z)).

    Released code: this option lost the residual and the scale. Here: both restored.
    """

    def __init__(self, d: int, cfg: AdapterConfig):
        super().__init__()
        self.cfg = cfg
        self.phi_d = xavier(nn.Linear(d, cfg.dim))
        self.phi_u = GroupedLinear(cfg.dim, d)

    def forward(self, z: torch.Tensor, w: None = None, keep: torch.Tensor | None = None) -> torch.Tensor:
        """z [B, T, d] -> z' [B, T, d]. w is ignored: a block calls both kinds of adapter alike."""
        h = dropout(self.phi_d(z), keep, self.cfg.dropout)  # [B, T, r]
        return z + self.cfg.scale * self.phi_u(h)


class MMAdapter(nn.Module):
    """Mixture-of-Modality Adapter: two RepAdapters that share phi_d, and a router f_w that weighs them."""

    def __init__(self, d: int, cfg: AdapterConfig):
        super().__init__()
        self.cfg = cfg
        self.phi_d = xavier(nn.Linear(d, cfg.dim))
        self.phi_u1, self.phi_u2 = GroupedLinear(cfg.dim, d), GroupedLinear(cfg.dim, d)
        self.f_w = nn.Linear(d, 2)  # W_m, b_m

    def route(self, t: torch.Tensor) -> torch.Tensor:
        """t [.., d], the token that the router reads (t_m in LLaMA, [cls] in the ViT) -> w [.., 2] in fp32"""
        # Eq. (3): w = f_w(t_m) = softmax((t_m W_m + b_m) / tau)
        return torch.softmax(self.f_w(t).float() / self.cfg.tau, dim=-1)

    def forward(self, z: torch.Tensor, w: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """z [B, T, d], w [B or 1, T or 1, 2], keep [B, T, r] -> z' [B, T, d]"""
        h = dropout(self.phi_d(z), keep, self.cfg.dropout)  # [B, T, r]
        f_a1, f_a2 = self.phi_u1(h), self.phi_u2(h)  # [B, T, d] each
        w = w.type_as(h).split(1, dim=-1)  # w[0] and w[1]: [.., 1]
        router = w[0] * f_a1 + w[1] * f_a2  # Eq. (3): router(f_a1(Z), f_a2(Z); w) = w_0 f_a1(Z) + w_1 f_a2(Z)
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
    """(W', b') with W' z + b' = W adapter(z, w): a projection W [out, d] that has absorbed the adapter before it.

    Structural re-parameterisation: W (z + s (U (A z + a) + b)) = (W + s W U A) z + s W (U a + b). w [2].
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
    """theta_a of Eq. (4): every parameter below a module whose name starts with `adapter_`."""
    return {name: p for name, p in model.named_parameters() if "adapter_" in name}


def freeze_base(model: nn.Module) -> dict[str, nn.Parameter]:
    """Freeze everything but the adapters; return the parameters that train, by name."""
    # Eq. (4): theta_a* = argmin L(f_phi(Z), R; theta_a): phi stays fixed, only theta_a trains
    for name, p in model.named_parameters():
        p.requires_grad_("adapter_" in name)
    return trainable(model)


# ---------------------------------------------------------------------------------------------------
# adapter files: safetensors, with metadata that rebuilds the model around its base

FORMAT = "lavin-adapters"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file, fsync, rename: a crash leaves either the old file or the new one."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)


def write_adapters(path: str | Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Write tensors in fp32 with JSON metadata, atomically."""
    tensors = {name: t.detach().float().contiguous().cpu() for name, t in tensors.items()}
    write_atomically(Path(path), save(tensors, {"format": FORMAT, "config": json.dumps(meta)}))


def read_adapters(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors by name, metadata) of an adapter file; ValueError if it is something else."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such adapter file; `python train.py` writes one")
    try:
        with safe_open(path, "pt") as f:
            meta = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}
    except Exception as e:  # safetensors raises its own type
        raise ValueError(f"{path}: not a readable safetensors file ({e})") from None
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path}: a safetensors file without LaVIN adapters; expected one that train.py wrote")
    return tensors, json.loads(meta["config"])


def load_adapters(model: nn.Module, tensors: dict[str, torch.Tensor], path: str = "adapters") -> None:
    """Copy `tensors` into the adapters of `model`; ValueError unless every name and every shape matches."""
    params = trainable(model)
    shapes = [f"{n} {list(tensors[n].shape)}, the model has {list(params[n].shape)}"
              for n in params.keys() & tensors.keys() if params[n].shape != tensors[n].shape]
    for problem, names in (("lacks", sorted(params.keys() - tensors.keys())),
                           ("has unknown", sorted(tensors.keys() - params.keys())),
                           ("is for a base of another size:", shapes)):
        if names:
            raise ValueError(f"{path}: {problem} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(tensors[name])
