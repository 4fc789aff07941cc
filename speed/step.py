"""LaVIN made faster for answering: LLaMA's adapters merged, and one token of one row as straight-line code.

`FoldedLaVIN` merges ("folds") each adapter of LLaMA into the projections that follow it. So the adapters cost
nothing. `FastStep` replaces `LaVIN.decode` for a single row. There, most of the time goes into calling many
small operations and into matrix-vector products that some CPUs read slowly. Here, q, k and v come from one
product, and `matvec` reads a matrix the fast way. Tests check that all of them give the same logits.

Shapes: C width, H heads, G key/value heads, D = C / H, S slots of the cache in use, V vocabulary.
"""
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import adapters
from data import Batch
from lavin import LaVIN
from llama import KVCache, LLaMA, LLaMAConfig, rope_table
from speed.machine import release_freed_memory
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


def rope_pairs(n: int, cfg: LLaMAConfig, device) -> torch.Tensor:
    """[n, 2, D/2, 2]: (cos, cos) and (-sin, sin) of every position and pair."""
    rope = rope_table(torch.arange(n, device=device), cfg)[:, 0]  # [n, D/2]
    cos, sin = rope.real, rope.imag
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
    """step(modality, token, cache) -> logits [1, V], from the folded projections {modality: [(W, b), ..]}"""

    def __init__(self, llama: LLaMA, projections: dict[int, list]):
        self.cfg, self.device = llama.cfg, llama.norm.weight.device
        self.weights = {modality: self.collect(llama, qkv) for modality, qkv in projections.items()}
        self.rope = rope_pairs(self.cfg.max_seq_len, self.cfg, self.device)

    @staticmethod
    def collect(llama: LLaMA, qkv: list) -> Weights:
        """The tensors of the model, without copies."""
        layers = [Layer(x.attention_norm.weight, *folded, x.attention.wo.weight, x.ffn_norm.weight,
                        *(w.weight for w in (x.feed_forward.w1, x.feed_forward.w3, x.feed_forward.w2)))
                  for x, folded in zip(llama.layers, qkv)]
        return Weights(llama.tok_embeddings.weight, layers, llama.norm.weight, llama.output.weight)

    def __call__(self, modality: int, token: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return one_token(self.weights[modality], self.cfg.n_heads, self.cfg.norm_eps, token, cache.advance(),
                         self.rope[:cache.filled], cache.k, cache.v)


class FoldedLaVIN(LaVIN):
    """A LaVIN whose LLaMA has merged its adapters into wq, wk and wv, once for each of the modalities given.

    It takes over the modules of `model`. It answers rows of one modality at a time, and cannot be trained or
    saved. The ViT's adapters stay, because their routing weights depend on the image. A second modality needs
    a second copy of the three matrices.
    """

    def __init__(self, model: LaVIN, *modalities: int):
        torch.nn.Module.__init__(self)
        self.cfg, self.llama, self.vit = model.cfg, model.llama, model.vit
        if self.vit:
            self.adapter_proj = model.adapter_proj
        self.projections = {m: [] for m in modalities}  # of every layer W [C + 2 G D, C] and b [C + 2 G D]
        with torch.no_grad(), self.autocast():
            w = model.routing_weights()
        for i, layer in enumerate(self.llama.layers):
            a, adapter = layer.attention, layer.adapter_attn
            qkv, layer.adapter_attn = torch.cat([a.wq.weight, a.wk.weight, a.wv.weight]), None
            for m in modalities:
                self.projections[m].append(adapters.fold(qkv, adapter, None if w is None else w[i, m]))
            self.use(modalities[0], i)  # layer by layer, so the old matrices are freed early
            del qkv
            release_freed_memory()
        self.step = FastStep(self.llama, self.projections)

    def routing_weights(self) -> None:
        """None: they are part of the projections."""

    def use(self, modality: int, *layers: int) -> None:
        """Put the projections of this modality into these layers; default: all."""
        if modality not in self.projections:
            raise ValueError("the model was folded for the other modality; name both: TEXT, IMAGE")
        self.modality = modality
        for i in layers or range(len(self.llama.layers)):
            a, (W, b) = self.llama.layers[i].attention, self.projections[modality][i]
            rows = [linear.out_features for linear in (a.wq, a.wk, a.wv)]  # C, G D, G D
            for linear, W_i, b_i in zip((a.wq, a.wk, a.wv), W.split(rows), b.split(rows)):
                linear.weight, linear.bias = (torch.nn.Parameter(x, False) for x in (W_i, b_i))

    def pack(self, batch: Batch) -> tuple[torch.Tensor, None]:
        assert len(set(batch.modality)) == 1, "a folded model answers one modality at a time"
        self.use(batch.modality[0])
        return super().pack(batch)

    def decode(self, w: None, token: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """A single row takes the fast step."""
        return super().decode(w, token, cache) if len(token) > 1 else self.step(self.modality, token, cache)


def folded(model: LaVIN, *modalities: int) -> LaVIN:
    """The model to answer with: folded, unless it is already. Matrices in 4 bits cannot take in adapters."""
    if isinstance(model, FoldedLaVIN) or isinstance(model.llama.layers[0].attention.wq, NF4Linear):
        return model
    return FoldedLaVIN(model, *modalities)
