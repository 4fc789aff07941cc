"""One token of one row, as straight-line code over the folded weights.

`LaVIN.decode` does the same for any number of rows, through the modules of llama.py. For a single row, most
of its time goes into calling many small operations and into matrix-vector products that some CPUs read
slowly. Here q, k and v come from one product, and `matvec` reads a matrix the fast way. A test checks that
both give the same logits.

Shapes: C width, H heads, G key/value heads, D = C / H, S slots of the cache in use, V vocabulary.
"""
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lavin import LaVIN
from llama import KVCache, LLaMAConfig, rope_table
from speed.nf4 import NF4Linear


@cache
def amd() -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "AuthenticAMD" in cpu.read_text()


def matvec(W: torch.Tensor, x: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """W x + b; W [out, in], x [1, in] -> [1, out]. Nearly all of its time is reading W from memory."""
    if W.device.type == "cpu" and torch.compiler.is_compiling():
        # compiled, this is one loop that reads W at four places at once, at the speed of the memory
        y = torch.cat([(rows * x[0]).sum(-1) for rows in W.chunk(4)])[None]
        return y if b is None else y + b
    if amd() and W.device.type == "cpu" and W.dtype == torch.float32 and W.shape[0] % 2 == 0 \
            and W.shape[1] <= 2048 and W.numel() >= 2 ** 18:
        # On AMD's CPUs, MKL's product with one vector reads 8 GB/s where the memory gives 22: a token of the
        # small preset then takes 12.2 ms instead of 4.2. Two halves of W in one batched product take a faster
        # path of MKL, but only if the vector is a [in, 1] column with strides (1, in), as the transpose of x
        # is. A column made by x[0, :, None] has strides (1, 1) and is read slowly again. Intel's CPUs do not
        # need this.
        W, column = W.view(2, -1, W.shape[1]), x.t().expand(2, -1, -1)  # [2, in, 1]
        y = torch.bmm(W, column) if b is None else torch.baddbmm(b.view(2, -1, 1), W, column)
        return y.view(1, -1)
    return F.linear(x, W, b)


class Layer(NamedTuple):
    """The tensors of one block, with its adapter folded in."""
    attention_norm: torch.Tensor
    wqkv: torch.Tensor  # [C + 2 G D, C]
    bqkv: torch.Tensor
    wo: torch.Tensor
    ffn_norm: torch.Tensor
    w1: torch.Tensor
    w3: torch.Tensor
    w2: torch.Tensor


class Weights(NamedTuple):
    embeddings: torch.Tensor
    layers: list[Layer]
    norm: torch.Tensor
    output: torch.Tensor

    @classmethod
    def of(cls, model: LaVIN, modality: int) -> "Weights":
        """The tensors of a folded model, without copies."""
        layers = [Layer(x.attention_norm.weight, *folded, x.attention.wo.weight, x.ffn_norm.weight,
                        *(w.weight for w in (x.feed_forward.w1, x.feed_forward.w3, x.feed_forward.w2)))
                  for x, folded in zip(model.llama.layers, model.folded[modality])]
        llama = model.llama
        return cls(llama.tok_embeddings.weight, layers, llama.norm.weight, llama.output.weight)


def rope_pairs(n: int, cfg: LLaMAConfig, device) -> torch.Tensor:
    """[n, 2, D/2, 2]: (cos, cos) and (-sin, sin) of every position and pair."""
    cos, sin = rope_table(torch.arange(n, device=device), cfg)[:, :, 0]  # [n, D/2]
    return torch.stack([torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)], dim=1)


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """x [.., H, D], rope [2, D/2, 2] of one position: (a, b) -> (a cos - b sin, b cos + a sin)"""
    pairs = x.float().unflatten(-1, (-1, 2))  # [.., H, D/2, 2]
    return torch.addcmul(pairs * rope[0], pairs.flip(-1), rope[1]).flatten(-2).type_as(x)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).type_as(x)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """q [1, H, 1, D], k and v [1, G, S, D] -> [1, C]"""
    if torch.compiler.is_compiling() and mask is None:  # written out, so the compiler can fuse it
        q = q.view(k.shape[1], -1, 1, q.shape[-1])  # [G, H / G, 1, D]: the heads of a group are neighbours
        p = (q.float() * q.shape[-1] ** -0.5 * k[0, :, None]).sum(-1).softmax(-1)  # [G, H / G, S]
        y = (p[..., None] * v[0, :, None]).sum(-2).type_as(v)  # [G, H / G, D]
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] < q.shape[1])
    return y.reshape(1, -1)


def one_token(weights: Weights, H: int, eps: float, token, position, rope, keys, values,
              mask=None) -> torch.Tensor:
    """Logits [1, V] after `token` [1] at `position` [1].

    rope          `rope_pairs` of the S slots that are read
    keys, values  one [1, G, slots, D] per layer; the new token is written at `position`
    mask          [1, S], which slots the token sees; None: all S
    """
    S, G, rope = rope.shape[0], keys[0].shape[1], rope[position][0]
    x = weights.embeddings[token]  # [1, C]
    for layer, k, v in zip(weights.layers, keys, values):
        z = rms_norm(x, layer.attention_norm, eps)
        qkv = matvec(layer.wqkv, z, layer.bqkv).view(1, H + 2 * G, 1, -1)  # [1, H + 2 G, 1, D]
        qk = rotate(qkv[:, :H + G], rope)
        k.index_copy_(2, position, qk[:, H:])
        v.index_copy_(2, position, qkv[:, H + G:])
        x = x + matvec(layer.wo, attention(qk[:, :H], k[:, :, :S], v[:, :, :S], mask))
        z = rms_norm(x, layer.ffn_norm, eps)
        x = x + matvec(layer.w2, F.silu(matvec(layer.w1, z)) * matvec(layer.w3, z))
    return matvec(weights.output, rms_norm(x, weights.norm, eps)).float()


class FastStep:
    """step(token, cache) for `LaVIN.stream`. One row takes the fast path, several rows `LaVIN.decode`."""

    def __init__(self, model: LaVIN):
        assert model.folded, "FastStep needs a folded model"
        c = model.llama.cfg
        self.model, self.cfg = model, c
        self.weights = {modality: Weights.of(model, modality) for modality in model.folded}
        self.rope = rope_pairs(c.max_seq_len, c, model.device)

    def __call__(self, token: torch.Tensor, cache: KVCache) -> torch.Tensor:
        if len(token) > 1:
            return self.model.decode(None, token, cache)
        return self.run(self.weights[self.model.folded_for], token, cache.grow(), cache)

    def run(self, weights: Weights, token: torch.Tensor, position: torch.Tensor,
            cache: KVCache) -> torch.Tensor:
        return one_token(weights, self.cfg.n_heads, self.cfg.norm_eps, token, position,
                         self.rope[:cache.filled], cache.k, cache.v)


def folded_step(model: LaVIN, *modalities: int) -> FastStep | None:
    """Fold the adapters, unless that was done, and return the fast step.

    None if LLaMA's matrices are in 4 bits. They cannot take in an adapter, so LaVIN.decode takes each step.
    """
    if isinstance(model.llama.layers[0].attention.wq, NF4Linear):
        return None
    if not model.folded:
        model.fold(*modalities)
    return FastStep(model)
