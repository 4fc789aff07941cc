"""A naive LaVIN: numpy, float64, one sample at a time, with the modality token in the sequence.

It shares no code with the model under test. `p` is a dict of the model's parameters, as numpy arrays.
"""
from typing import NamedTuple

import numpy as np


def params(model) -> dict[str, np.ndarray]:
    return {n: p.detach().double().numpy() for n, p in model.named_parameters()}


def sub(p: dict, prefix: str) -> dict:
    return {n[len(prefix):]: x for n, x in p.items() if n.startswith(prefix)}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def rep_adapter(z, down, down_b, up, up_b):
    """phi_u(phi_d(z)), with the grouped projection written as two separate ones"""
    h, r, d = z @ down.T + down_b, down.shape[0], up.shape[0]
    first = h[..., : r // 2] @ up[: d // 2].T
    second = h[..., r // 2:] @ up[d // 2:].T
    return np.concatenate([first, second], -1) + up_b


def mm_adapter(z, w, p, s):
    """Eq. (2) and the first line of Eq. (3); w [2] or [T, 2]"""
    f = [rep_adapter(z, p["phi_d.weight"], p["phi_d.bias"], p[f"phi_u{i}.weight"], p[f"phi_u{i}.bias"])
         for i in (1, 2)]
    return z + s * (w[..., :1] * f[0] + w[..., 1:] * f[1])


def route(t, p, tau):
    """the second line of Eq. (3)"""
    return softmax((t @ p["f_w.weight"].T + p["f_w.bias"]) / tau)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def rotary(x, theta):
    """x [T, D]: position t rotates the pair (2i, 2i + 1), a complex number, by t theta^(-2i / D)"""
    T, D = x.shape
    angle = np.arange(T)[:, None] * theta ** (-np.arange(0, D, 2) / D)
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], -1).reshape(T, D)


def attention(q, k, v, heads, visible):
    """q, k, v [T, C], visible [T, T] of bool -> [T, C]"""
    D = q.shape[1] // heads
    out = []
    for h in range(heads):
        cols = slice(h * D, (h + 1) * D)
        scores = q[:, cols] @ k[:, cols].T / np.sqrt(D)
        out.append(softmax(np.where(visible, scores, -np.inf)) @ v[:, cols])
    return np.concatenate(out, -1)


def llama(z, p, cfg, acfg=None, token=False):
    """z [T, C] -> (hidden states after the last norm, routing weights of each layer).

    token: z[0] is the modality token. It attends only to itself, no other position attends to it, and the
    router of each layer reads it.
    """
    T = len(z)
    visible = np.tril(np.ones((T, T), bool))
    if token:
        visible[1:, 0] = False
    D, routing = cfg.dim // cfg.n_heads, []
    for i in range(cfg.n_layers):
        lp = sub(p, f"layers.{i}.")
        x = rms_norm(z, lp["attention_norm.weight"], cfg.norm_eps)
        if token:
            a = sub(lp, "adapter_attn.")
            routing.append(route(x[0], a, acfg.tau))
            x = mm_adapter(x, routing[-1], a, acfg.scale)
        q, k, v = (x @ lp[f"attention.w{c}.weight"].T for c in "qkv")
        served = cfg.n_heads // cfg.n_kv_heads  # heads that read the same keys and values
        k, v = (x.reshape(T, -1, D).repeat(served, axis=1).reshape(T, -1) for x in (k, v))
        for h in range(cfg.n_heads):
            cols = slice(h * D, (h + 1) * D)
            q[:, cols], k[:, cols] = rotary(q[:, cols], cfg.rope_theta), rotary(k[:, cols], cfg.rope_theta)
        z = z + attention(q, k, v, cfg.n_heads, visible) @ lp["attention.wo.weight"].T
        x = rms_norm(z, lp["ffn_norm.weight"], cfg.norm_eps)
        f = sub(lp, "feed_forward.")
        z = z + (silu(x @ f["w1.weight"].T) * (x @ f["w3.weight"].T)) @ f["w2.weight"].T
    return rms_norm(z, p["norm.weight"], cfg.norm_eps), routing


def vit(image, p, cfg, acfg=None, routing="cls"):
    """image [3, H, W] -> [n, width], the [cls] token after every cls_every-th block"""
    n, s = cfg.image_size // cfg.patch_size, cfg.patch_size
    patches = [image[:, y * s:(y + 1) * s, x * s:(x + 1) * s].ravel() for y in range(n) for x in range(n)]
    x = np.stack(patches) @ p["conv1.weight"].reshape(cfg.width, -1).T
    x = np.concatenate([p["class_embedding"][None], x]) + p["positional_embedding"]
    x = layer_norm(x, p["ln_pre.weight"], p["ln_pre.bias"])
    cls = []
    for i in range(cfg.layers):
        bp = sub(p, f"transformer.resblocks.{i}.")
        z = layer_norm(x, bp["ln_1.weight"], bp["ln_1.bias"])
        if acfg:
            a = sub(bp, "adapter_attn.")
            z = mm_adapter(z, route(z[0] if routing == "cls" else z, a, acfg.tau), a, acfg.scale)
        q, k, v = np.split(z @ bp["attn.in_proj_weight"].T + bp["attn.in_proj_bias"], 3, -1)
        y = attention(q, k, v, cfg.heads, np.ones((len(x), len(x)), bool))
        x = x + y @ bp["attn.out_proj.weight"].T + bp["attn.out_proj.bias"]
        z = layer_norm(x, bp["ln_2.weight"], bp["ln_2.bias"])
        h = z @ bp["mlp.c_fc.weight"].T + bp["mlp.c_fc.bias"]
        x = x + (h / (1 + np.exp(-1.702 * h))) @ bp["mlp.c_proj.weight"].T + bp["mlp.c_proj.bias"]
        if (i + 1) % cfg.cls_every == 0:
            cls.append(x[0])
    return np.stack(cls)


def neck(x, p):
    """Eq. (6)"""
    return silu(x @ p["W_d.weight"].T + p["W_d.bias"]) @ p["W_u.weight"].T + p["W_u.bias"]


def sequence(ids, image, slot, p, model_cfg, clip_cfg):
    """Eqs. (1) and (7): Z = [t_m, X', Y]; X' replaces the embeddings from index slot on"""
    m = np.array([0.0, 1.0]) if image is not None else np.array([1.0, 0.0])
    t_m = m @ p["adapter_modality_embedding.weight"]
    z = p["llama.tok_embeddings.weight"][ids]
    if image is not None:
        x = vit(image, sub(p, "vit."), clip_cfg, model_cfg.adapter, model_cfg.vit_routing)
        z[slot: slot + len(x)] = neck(x, sub(p, "adapter_proj."))
    return np.concatenate([t_m[None], z])


class Run(NamedTuple):
    Z: np.ndarray  # [1 + T, C], t_m in front
    w: np.ndarray  # [layer, 2]
    log_p: np.ndarray  # [tokens of the response]


def run(p, model, e, image) -> Run:
    """An Example of data.py, computed from the parameters p.

    image: numpy or torch, [3, H, W]; used if the example has visual tokens.
    """
    ids = e.head + [0] * e.n_visual + list(e.rest)  # zeros hold the places of X'
    image = np.asarray(image) if e.n_visual else None
    Z = sequence(ids, image, len(e.head), p, model.cfg, model.vit.cfg)
    h, w = llama(Z, sub(p, "llama."), model.llama.cfg, model.cfg.adapter, token=True)
    log_p = np.log(softmax(h[1:] @ p["llama.output.weight"].T))  # [T, V]
    before = range(e.length - e.n_targets - 1, e.length - 1)  # the positions that predict the targets
    return Run(Z, np.stack(w), log_p[before, e.rest[e.n_prompt:]])
