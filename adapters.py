"""What trains: RepAdapters, the router that mixes two of them, and the files they are kept in.

LaVIN (Luo et al., "Cheap and Quick", NeurIPS 2023) puts one adapter in front of every attention of a
frozen LLaMA and a frozen CLIP ViT. An adapter is two small linear maps without an activation, so an
untrained one is exactly the identity, and a trained one is one affine map per modality.

Shapes: B samples, T tokens, d width of the host model, r hidden width of the adapter (8).
"""
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file


@dataclass
class AdapterConfig:
    kind: str = "mm"  # LLaMA's adapters: "mm" two experts and a router, "rep" one plain RepAdapter
    dim: int = 8  # r, hidden width
    scale: float = 1.0  # s
    tau: float = 10.0  # router temperature: 10 for LLaMA-7B, 5 for 13B
    dropout: float = 0.1  # on the hidden


class Recompute(torch.autograd.Function):
    """Keep the arguments of f for the backward, and there work f out again, this time with a graph.

    What torch.utils.checkpoint does, less its generality, which takes longer than our small regions do.
    """

    @staticmethod
    def forward(ctx, f, n, *args):  # n arguments of f, then the parameters that it uses
        ctx.f, ctx.n = f, n
        ctx.plain = [None if isinstance(a, torch.Tensor) else (a,) for a in args]
        ctx.save_for_backward(*(a for a in args if isinstance(a, torch.Tensor)))
        ctx.device = args[0].device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.device)
        return f(*args[:n])

    @staticmethod
    def backward(ctx, d):
        saved, needs = iter(ctx.saved_tensors), ctx.needs_input_grad[2:]
        args = [next(saved) if a is None else a[0] for a in ctx.plain]
        for i, a in enumerate(args[:ctx.n]):  # cut from what made them; parameters are leaves anyhow
            args[i] = a.detach().requires_grad_(needs[i]) if isinstance(a, torch.Tensor) else a
        with torch.enable_grad(), torch.autocast(ctx.device, torch.bfloat16, enabled=ctx.autocast):
            # views, since torch's FLOP counter can't bear a leaf as a module's input
            y = ctx.f(*(a.view_as(a) if need else a for a, need in zip(args[:ctx.n], needs)))
        wanted = [a for a, need in zip(args, needs) if need]
        grads = iter(torch.autograd.grad(y, wanted, d, allow_unused=True))  # LLaMA routes elsewhere: f_w is unused here
        return None, None, *(next(grads) if need else None for need in needs)


def recompute(f, *args):
    """f(*args), keeping the arguments (args[0] is a tensor) for the backward instead of what happens inside f.

    For norms, adapters and activations, whose products are large beside the time it takes to make them again.
    """
    if not torch.is_grad_enabled():
        return f(*args)
    owner = getattr(f, "__self__", f)  # f is a module, a method of one, or a function
    if recompute.fused:  # the compiler sees by itself what is cheaper made again than kept
        method = isinstance(owner, nn.Module)
        return fused(type(f).forward if owner is f else f.__func__)(owner, *args) if method else fused(f)(*args)
    params = [p for p in owner.parameters() if p.requires_grad] if isinstance(owner, nn.Module) else []
    return Recompute.apply(f, len(args), *args, *params)


recompute.fused = False  # --compile


@functools.cache
def fused(f):
    """f as a few kernels, compiled once for all layers and lengths"""
    return torch.compile(f, dynamic=True)


# after splitmix64 (Steele, Lea and Flood, 2014; torch's shifts are signed): the n-th number of a seed's stream, without
# those before it
GOLDEN, MIX_1, MIX_2 = (x - 2 ** 64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # as int64


def survivors(seeds: torch.Tensor, positions: torch.Tensor, cfg: AdapterConfig, first: int, layers: int
              ) -> list[torch.Tensor]:
    """Dropout's mask [.., r] for each of `layers` adapters, the first of which is number `first` of the whole model.

    seeds, positions (int64, shapes that broadcast): of the sample that a token belongs to, and of the token in it. A unit is
    dropped with probability p by a function of (seed, position, layer, unit): which ranks and micro-batches a step is
    spread over, resuming, and working it out a second time for the backward, all change nothing.
    """
    unit = torch.arange(first * cfg.dim, (first + layers) * cfg.dim, device=seeds.device).view(layers, cfg.dim)
    x = seeds + GOLDEN * (positions << 20)  # where that token's stretch of numbers begins
    x = x[..., None] + GOLDEN * unit.view(layers, *[1] * x.ndim, cfg.dim)  # [layers, .., r]
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return list((((x ^ (x >> 31)) & 0xFFFFFF) >= cfg.dropout * 2 ** 24))


def drop(h: torch.Tensor, keep: torch.Tensor | None, p: float) -> torch.Tensor:
    """dropout on h [.., T, r], in training only"""
    return h if keep is None else h * keep / (1 - p)


class GroupedLinear(nn.Module):
    """phi_u: r -> d in two groups; outputs 0..d/2-1 read hidden 0..r/2-1, the others read the rest.

    Starts at zero: whatever comes before it, an untrained adapter adds nothing.
    """

    def __init__(self, r: int, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d, r // 2))
        self.bias = nn.Parameter(torch.zeros(d))

    def dense(self) -> torch.Tensor:
        """[d, r]: the two groups on a block diagonal; r is 8, so the zeros cost nothing"""
        return torch.block_diag(*self.weight.chunk(2))


def down_projection(d: int, r: int) -> nn.Linear:
    """phi_d: dense d -> r, Xavier-uniform weight and zero bias"""
    phi_d = nn.Linear(d, r)
    nn.init.xavier_uniform_(phi_d.weight)
    nn.init.zeros_(phi_d.bias)
    return phi_d


class RepAdapter(nn.Module):
    """One expert on its own (uni-modal use, Table 2): Z + s f_a(Z), f_a(Z) = phi_u(phi_d(Z)).

    The released code's plain option lost this residual and the scale; both are here.
    """

    def __init__(self, d: int, cfg: AdapterConfig):
        super().__init__()
        self.cfg, self.scale, self.p = cfg, cfg.scale, cfg.dropout
        self.phi_d = down_projection(d, cfg.dim)
        self.phi_u = GroupedLinear(cfg.dim, d)

    def forward(self, z: torch.Tensor, w: None = None, keep: torch.Tensor | None = None) -> torch.Tensor:
        """z [B, T, d] -> [B, T, d]; w is there so that a block need not know which adapter it holds"""
        h = drop(self.phi_d(z), keep, self.p)  # [B, T, r]
        return z + self.scale * F.linear(h, self.phi_u.dense(), self.phi_u.bias)


class MMAdapter(nn.Module):
    """Mixture-of-modality adapter: two RepAdapters that share phi_d, mixed by routing weights w."""

    def __init__(self, d: int, cfg: AdapterConfig):
        super().__init__()
        self.cfg, self.scale, self.tau, self.p = cfg, cfg.scale, cfg.tau, cfg.dropout
        self.phi_d = down_projection(d, cfg.dim)
        self.phi_u1 = GroupedLinear(cfg.dim, d)
        self.phi_u2 = GroupedLinear(cfg.dim, d)
        self.f_w = nn.Linear(d, 2)  # W_m, b_m

    def route(self, t: torch.Tensor) -> torch.Tensor:
        """t [..., d], what decides: the modality token in LLaMA, [cls] in the ViT -> w [..., 2]"""
        # Eq. (3), second line: w = f_w(t_m) = softmax((t_m W_m + b_m) / tau)
        return torch.softmax(self.f_w(t).float() / self.tau, dim=-1)

    def forward(self, z: torch.Tensor, w: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """z [B, T, d], w [B or 1, T or 1, 2], keep [B, T, r] of `survivors`, None without dropout -> [B, T, d]"""
        h = drop(self.phi_d(z), keep, self.p)  # [B, T, r]; one mask for both experts
        w = w.to(h.dtype).expand(*h.shape[:-1], 2)  # [B, T, 2]
        # Eq. (3), first line: router(f_a1(Z), f_a2(Z); w) = w_0 f_a1(Z) + w_1 f_a2(Z)
        # w_0 (U1 h + b1) + w_1 (U2 h + b2) = [U1 U2 b1 b2] [w_0 h, w_1 h, w_0, w_1]: one product, and
        # nothing d wide is kept for the backward
        hw = torch.cat([w[..., :1] * h, w[..., 1:] * h, w], dim=-1)  # [B, T, 2r + 2]
        up = torch.cat([self.phi_u1.dense(), self.phi_u2.dense(),
                        self.phi_u1.bias[:, None], self.phi_u2.bias[:, None]], dim=1)  # [d, 2r + 2]
        return z + self.scale * F.linear(hw, up)  # Eq. (2): Z' = Z + s router(f_a1(Z), f_a2(Z); f_w(t_m))


def new_adapter(d: int, cfg: AdapterConfig) -> nn.Module:
    """the LLaMA adapter that cfg.kind names; ValueError lists the known kinds"""
    kinds = {"mm": MMAdapter, "rep": RepAdapter}
    if cfg.dim < 2 or cfg.dim % 2:
        raise ValueError(f"adapter width {cfg.dim}: expected an even number, for phi_u's two groups")
    if cfg.kind not in kinds:
        raise ValueError(f"unknown adapter kind {cfg.kind!r}; known: {', '.join(kinds)}")
    return kinds[cfg.kind](d, cfg)


@torch.no_grad()
def fold(linears: list[nn.Linear], adapter: nn.Module, w: torch.Tensor | None) -> nn.Linear:
    """One Linear that does what `linears`, side by side, do after `adapter` at routing weights w [2].

    Structural re-parameterisation: an adapter is affine, so W (z + s (U (A z + a) + b)) = (W + s W U A) z + s W (U a + b),
    exactly, up to the rounding of W's dtype.
    """
    if isinstance(adapter, MMAdapter):
        U = w[0] * adapter.phi_u1.dense() + w[1] * adapter.phi_u2.dense()  # [d, r]
        b = w[0] * adapter.phi_u1.bias + w[1] * adapter.phi_u2.bias
    else:
        U, b = adapter.phi_u.dense(), adapter.phi_u.bias
    A, a, weights, biases = adapter.phi_d.weight, adapter.phi_d.bias, [], []
    for linear in linears:
        W = linear.weight.float()
        sWU = adapter.scale * W @ U  # [out, r]
        weights.append((W + sWU @ A).type_as(linear.weight))
        biases.append((sWU @ a + adapter.scale * W @ b).type_as(linear.weight))
    W = torch.cat(weights)  # [sum of outs, d]
    folded = type(linears[0])(*W.shape[::-1], device="meta")
    folded.weight, folded.bias = (nn.Parameter(x, requires_grad=False) for x in (W, torch.cat(biases)))
    return folded


# ---------------------------------------------------------------------------------------------------
# freezing

def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters theta_a of Eq. (4): everything under a module whose name starts with `adapter_`."""
    return {name: p for name, p in model.named_parameters() if "adapter_" in name}


def freeze_base(model: nn.Module) -> dict[str, nn.Parameter]:
    """Freeze all but the adapters (also in the eyes of autograd) and return what trains, by name."""
    # Eq. (4): theta_a* = argmin L(f_phi(Z), R; theta_a): phi is fixed, only theta_a moves
    params = trainable(model)
    model.requires_grad_(False)
    for p in params.values():
        p.requires_grad_(True)
    return params


# ---------------------------------------------------------------------------------------------------
# files: a safetensors file whose metadata rebuilds the model around a base

FORMAT = "lavin-adapters"


def save_adapters(path: str | Path, model: nn.Module, meta: dict) -> None:
    """Write the adapters of `model` as fp32 safetensors with `meta` (JSON) beside them, atomically."""
    write_adapters(path, {n: p.detach().float().contiguous().cpu() for n, p in trainable(model).items()}, meta)


def write_adapters(path: str | Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    path = Path(path)
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"format": FORMAT, "config": json.dumps(meta)})
    part.replace(path)


def read_adapters(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors by name, metadata) of an adapter file; ValueError if it is not one"""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such adapter file; `python train.py` writes one")
    try:
        with safe_open(path, "pt") as f:
            meta = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}
    except Exception as e:  # safetensors raises its own type on a cut or foreign file
        raise ValueError(f"{path}: not a readable safetensors file ({e})") from None
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path}: a safetensors file, but not LaVIN adapters; give the adapters.safetensors "
                         "that train.py wrote")
    return tensors, json.loads(meta["config"])


def load_adapters(model: nn.Module, tensors: dict[str, torch.Tensor], path: str = "adapters") -> None:
    """Copy `tensors` into the adapters of `model`; every name and every shape must match."""
    params = trainable(model)
    missing, extra = sorted(params.keys() - tensors.keys()), sorted(tensors.keys() - params.keys())
    shapes = [f"{n} {list(tensors[n].shape)}, here {list(params[n].shape)}"
              for n in params.keys() & tensors.keys() if params[n].shape != tensors[n].shape]
    for what, names in (("lacks", missing), ("has unknown", extra), ("is for a base of another size:", shapes)):
        if names:
            raise ValueError(f"{path}: {what} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(tensors[name])
