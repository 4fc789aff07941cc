"""LLaMA: the frozen language model and its key/value cache.

    Touvron et al. 2023: https://arxiv.org/abs/2302.13971

Official weights come from Meta on request, or from the Hugging Face hub; weights.py reads both layouts.
Parameters have Meta's names. The tokenizer is in official/tokenizer.py.

There are three ways through the blocks. `forward` trains on whole sequences, packed end to end without
padding. `prefill` reads prompts into a cache. `decode` reads one more token per row. The three differ only in
which keys a query may see: each hands its own function `attend(layer, q, k, v)` to the blocks.

Shapes: B rows, T tokens, C = dim, H heads, G key/value heads, each of which serves H / G heads (in LLaMA-1
G = H), D = C / H, S slots of a cache, L layers, r width of an adapter.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

import weights
from adapters import recompute
from official.rope import slowed


@dataclass
class LLaMAConfig:
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    ffn_dim: int = 11008  # 256 * ceil(int(8 dim / 3) / 256) in 7B and 13B
    vocab_size: int = 32000
    norm_eps: float = 1e-6  # 1e-5 in LLaMA-2
    rope_theta: float = 10000.0
    max_seq_len: int = 2048
    n_kv_heads: int | None = None  # fewer than n_heads: grouped-query attention; None: n_heads
    rope_scaling: dict | None = None  # only from LLaMA-3.1 on: slower rotation, see official/rope.py

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads


PRESETS = {
    "7B": LLaMAConfig(),
    "13B": LLaMAConfig(dim=5120, n_layers=40, n_heads=40, ffn_dim=13824),
    "tiny": LLaMAConfig(dim=128, n_layers=5, n_heads=8, ffn_dim=352, vocab_size=2057, norm_eps=1e-5,
                        rope_theta=100.0, max_seq_len=256),  # a short context needs only high frequencies
}


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).type_as(x)


def rope_table(positions: torch.Tensor, cfg: LLaMAConfig) -> torch.Tensor:
    """Rotary embedding: positions [.., T] -> cos and sin of the angle of each pair, [2, .., T, 1, D/2]"""
    D = cfg.dim // cfg.n_heads
    freq = cfg.rope_theta ** (-torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D)
    if cfg.rope_scaling:  # LLaMA-3.1 and later
        freq = slowed(freq, cfg.rope_scaling)
    angle = positions[..., None, None].float() * freq
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, D]: rotate each pair (2i, 2i+1) by the angle of its position."""
    cos, sin = rope  # [.., T, 1, D/2] each
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, T, H, D/2] each
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


def dot_product_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **which_keys) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v; q [B, T, H, D], k, v [B, S, G, D]; which_keys: is_causal or attn_mask"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H or G, .., D]
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] < q.shape[1], **which_keys)
    return y.transpose(1, 2)


class KVCache:
    """Keys and values of B rows: k and v are lists of L tensors [B, G, S, D]. Slot s holds position s.

    Rows may differ in length. The padding behind a shorter prompt lands in the cache too, but no query looks
    beyond its own position, and the row's next tokens overwrite it.
    """

    def __init__(self, cfg: LLaMAConfig, B: int, S: int, device=None, dtype=None):
        shape = B, cfg.n_kv_heads, S, cfg.dim // cfg.n_heads
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.n_layers)]
                          for _ in range(2))
        self.rows = torch.arange(B, device=device)[:, None]
        self.lengths = torch.zeros_like(self.rows[:, 0])  # tokens in each row
        self.filled = 0  # tokens in the longest row

    def grow(self) -> torch.Tensor:
        """Count one more token in each row; return its positions [B]."""
        self.lengths, self.filled = self.lengths + 1, self.filled + 1
        return self.lengths - 1

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> tuple:
        """Store k, v [B, T, G, D] at positions [B or 1, T]; return all keys and values, [B, filled, G, D]."""
        keys, values = (x[layer].transpose(1, 2) for x in (self.k, self.v))  # views, [B, S, G, D]
        keys[self.rows, positions] = k  # keys[b, positions[b, t]] = k[b, t]
        values[self.rows, positions] = v
        return keys[:, :self.filled], values[:, :self.filled]


class Attention(nn.Module):
    def __init__(self, cfg: LLaMAConfig, layer: int):
        super().__init__()
        self.layer, self.D, self.group = layer, cfg.dim // cfg.n_heads, cfg.n_heads // cfg.n_kv_heads
        C, C_kv = cfg.dim, cfg.n_kv_heads * self.D
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(C, out, bias=False) for out in (C, C_kv, C_kv, C))

    def forward(self, z, rope, attend):
        B, T, C = z.shape
        q, k, v = (linear(z).view(B, T, -1, self.D) for linear in (self.wq, self.wk, self.wv))
        y = attend(self.layer, rotate(q, rope), rotate(k, rope), v)  # [B, T, H, D]
        return self.wo(y.reshape(B, T, C))

    def alone(self, z):
        """A token z [.., C] that sees only itself. Softmax over one score is 1: it reads its own value."""
        v = self.wv(z).unflatten(-1, (-1, self.D))  # [.., G, D]
        return self.wo(v.repeat_interleave(self.group, dim=-2).flatten(-2))  # the heads of a group read one v


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1(x)) * w3(x))"""

    def __init__(self, cfg: LLaMAConfig):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(cfg.dim, cfg.ffn_dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(cfg.ffn_dim, cfg.dim, bias=False)

    def forward(self, x):
        gated = recompute(lambda w1_x, w3_x: F.silu(w1_x) * w3_x, self.w1(x), self.w3(x))
        return self.w2(gated)


class Block(nn.Module):
    """Attention, then feed-forward layer. For the backward pass, a block keeps of each token: x before and
    after the attention; q, k, v; the attention's output, and for each head the log-sum-exp of the scores,
    which flash attention keeps in place of all probabilities; w1 x and w3 x (in the ViT, the output of c_fc).
    Norms, adapters and silu(w1 x) are recomputed. The frozen matrices keep nothing.
    """

    def __init__(self, cfg: LLaMAConfig, layer: int):
        super().__init__()
        self.attention, self.feed_forward = Attention(cfg, layer), FeedForward(cfg)
        self.attention_norm, self.ffn_norm = (RMSNorm(cfg.dim, cfg.norm_eps) for _ in range(2))
        self.adapter_attn = None  # an MMAdapter or RepAdapter, once LaVIN adds it

    def adapted(self, x, w, dropout_mask):
        """The input of the attention: normalise, then Eq. (2). The residual x itself is not adapted."""
        z = self.attention_norm(x)
        return z if self.adapter_attn is None else self.adapter_attn(z, w, dropout_mask)

    def forward(self, x, rope, attend, w=None, dropout_mask=None):
        """x [B, T, C]; w: this layer's routing weights; w and dropout_mask may be None"""
        x = x + self.attention(recompute(self.adapted, x, w, dropout_mask), rope, attend)
        return x + self.feed_forward(recompute(self.ffn_norm, x))

    def alone(self, t):
        """`forward` for tokens t [M, C] that see only themselves; q, k and rotation do not matter to them.

        Returns their new states [M, C], and the routing weights w [M, 2] that come from the old ones.
        """
        z = self.attention_norm(t)
        w = self.adapter_attn.route(z)
        t = t + self.attention.alone(self.adapter_attn(z, w))
        return t + self.feed_forward(self.ffn_norm(t)), w


class LLaMA(nn.Module):
    def __init__(self, cfg: LLaMAConfig):
        super().__init__()
        self.cfg, self.recompute_blocks = cfg, False  # True: keep only each block's input for the backward
        self.tok_embeddings = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.output = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)

    def forward(self, x, w=None, lengths: list[int] | None = None, dropout_mask=None) -> torch.Tensor:
        """Training: one row, x [1, T, C], holds sequences of these lengths. Without lengths: one in each row.

        x             embeddings [B, T, C], or token ids [B, T]
        w             routing weights of every layer: a pair per token [L, 1, T, 2], or per row [L, B, 1, 2]
        dropout_mask  of the hidden units of every layer's adapter, [L, B, T, r]; None: no dropout
        Returns the hidden states after the last norm, [B, T, C]; `output` turns them into logits.
        """
        x = x if x.is_floating_point() else self.tok_embeddings(x)
        lengths = lengths or [x.shape[1]]
        positions = torch.cat([torch.arange(n, device=x.device) for n in lengths])

        def attend(layer, q, k, v):  # sequence by sequence: none sees another
            sequences = zip(*(t.split(lengths, dim=1) for t in (q, k, v)))
            return torch.cat([dot_product_attention(*qkv, is_causal=True) for qkv in sequences], dim=1)

        return self.blocks(x, w, positions, attend, dropout_mask)

    def prefill(self, x, w, lengths: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Read prompts x [B, T, C] of `lengths` [B], padded at their ends, into a new cache -> [B, T, C]"""
        positions = torch.arange(x.shape[1], device=x.device)
        cache.lengths, cache.filled = lengths, x.shape[1]

        def attend(layer, q, k, v):
            cache.update(layer, k, v, positions[None])
            return dot_product_attention(q, k, v, is_causal=True)

        return self.blocks(x, w, positions, attend)

    def decode(self, x, w, cache: KVCache) -> torch.Tensor:
        """Read one more token of each row, x [B, 1, C] -> [B, 1, C]"""
        positions = cache.grow()[:, None]  # [B, 1]
        seen = torch.arange(cache.filled, device=x.device) <= positions  # [B, filled]
        mask = seen[:, None, None] if len(x) > 1 else None  # one row sees all that is filled

        def attend(layer, q, k, v):
            return dot_product_attention(q, *cache.update(layer, k, v, positions), attn_mask=mask)

        return self.blocks(x, w, positions, attend)

    def blocks(self, x, w, positions, attend: Callable, dropout_mask=None) -> torch.Tensor:
        """All blocks and the last norm."""
        rope = rope_table(positions, self.cfg)
        for i, block in enumerate(self.layers):
            w_i = None if w is None else w[i]
            dropout_mask_i = None if dropout_mask is None else dropout_mask[i]
            inputs = x, rope, attend, w_i, dropout_mask_i
            x = recompute(block, *inputs) if self.recompute_blocks else block(*inputs)
        return self.norm(x)

    def route(self, t: torch.Tensor) -> torch.Tensor:
        """Routing weights [L, M, 2] of M modality tokens t [M, C]: each layer's router reads their state."""
        routing_weights = []
        for block in self.layers:
            t, w = block.alone(t)  # without dropout; the released code has it here, too
            routing_weights.append(w)
        return torch.stack(routing_weights)

    @classmethod
    def from_pretrained(cls, path: str | Path, device="cpu", dtype=torch.float32, store=None) -> "LLaMA":
        """Read official weights; ValueError or FileNotFoundError if bad.

        store: called on each module once it is read; packs it (--bits 4) or spreads it over GPUs (--shard)
        """
        return weights.load(cls, LLaMAConfig, weights.read_llama, path, device, dtype, store)
