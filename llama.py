"""LLaMA (https://arxiv.org/abs/2302.13971): the frozen language model and its key/value cache.
weights.py reads official weights, in Meta's layout or Hugging Face's. Parameters have Meta's names.

There are four ways through the blocks. `forward` trains on packed sequences: all lie end to end in one row,
without padding. `prefill` reads packed prompts into a cache. `decode` reads one more token of each sequence.
`Block.route` is for modality tokens, each of which attends only to itself. The four differ in a function
attend(layer, q, k, v), which Attention calls.

Shapes: B rows, T tokens in a row, C = dim, H heads, D = C / H, G key/value heads (LLaMA-1: G = H; in
others, H / G query heads share one), S slots of a cache, M modality tokens, r hidden units of an adapter.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import weights
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
    n_kv_heads: int | None = None  # G, the heads of keys and values; None: n_heads, as in LLaMA-1
    rope_scaling: dict | None = None  # from LLaMA-3.1 on: some pairs of units rotate more slowly

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads


PRESETS = {
    "7B": LLaMAConfig(),
    "13B": LLaMAConfig(dim=5120, n_layers=40, n_heads=40, ffn_dim=13824),
    "tiny": LLaMAConfig(dim=128, n_layers=5, n_heads=8, ffn_dim=352, vocab_size=2057, norm_eps=1e-5,
                        rope_theta=100.0, max_seq_len=256),
}


def recomputed(f):
    """Decorator that saves memory: autograd keeps only the arguments of f; the backward pass runs f again."""
    how = dict(use_reentrant=False, preserve_rng_state=False)  # f draws no random numbers
    return lambda *args: checkpoint(f, *args, **how) if torch.is_grad_enabled() else f(*args)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, in fp32"""
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).type_as(x)


def rope_table(positions: torch.Tensor, cfg: LLaMAConfig) -> torch.Tensor:
    """Rotary embedding: at position p, the j-th pair of units of q and of k is rotated by the angle p freq_j.
    So q . k depends only on the distance between the two positions. positions [.., T] -> e^(i angle), of
    shape [.., T, 1, D/2]"""
    D = cfg.dim // cfg.n_heads
    freq = cfg.rope_theta ** (-torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D)
    angle = positions[..., None, None].float() * slowed(freq, cfg.rope_scaling)  # unchanged before LLaMA-3.1
    return torch.complex(angle.cos(), angle.sin())


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, D]: rotate each pair (2j, 2j+1), taken as a complex number, by its angle."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [B, T, H, D/2]
    return torch.view_as_real(pairs * rope).flatten(-2).type_as(x)


def dot_product_attention(q, k, v, mask=None, is_causal: bool = False) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v; q [B, T, H, D], k and v [B, S, G, D]. mask [B, 1, T, S]: True = visible"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H or G, .., D]
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=k.shape[1] < q.shape[1])
    return y.transpose(1, 2)


def packed_attention(q, k, v, lengths: list[int]) -> torch.Tensor:
    """Causal attention in each of the sequences that are packed in a row; none sees another."""
    sequences = zip(*(x.split(lengths, dim=1) for x in (q, k, v)))
    return torch.cat([dot_product_attention(*qkv, is_causal=True) for qkv in sequences], dim=1)


class KVCache:
    """Keys and values of all tokens read so far. There is room for the prompts and `room` more tokens. In
    memory, the keys of one head lie side by side, as attention reads them: [B, G, S, D]."""

    def __init__(self, cfg: LLaMAConfig, lengths: list[int], room: int, device=None, dtype=None):
        shape = len(lengths), cfg.n_kv_heads, max(lengths) + room, cfg.dim // cfg.n_heads
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.n_layers)]
        self.v = [torch.zeros_like(k) for k in self.k]
        self.lengths = torch.tensor(lengths, device=device)  # tokens of each sequence
        self.filled = max(lengths)  # tokens of the longest sequence

    def advance(self) -> torch.Tensor:
        """Lengthen each sequence by one token; return the positions of these tokens, [B]."""
        self.lengths, self.filled = self.lengths + 1, self.filled + 1
        return self.lengths - 1

    def update(self, layer: int, seq: torch.Tensor, positions: torch.Tensor, k, v) -> tuple:
        """Store k and v [tokens, G, D] of new tokens: token i goes to slot positions[i] of sequence seq[i].
        Return all filled slots, [B, filled, G, D]. `decode` masks the empty slots of shorter sequences."""
        # a slice between two index tensors: torch puts the indexed axis first, so these are [tokens, G, D]
        self.k[layer][seq, :, positions] = k
        self.v[layer][seq, :, positions] = v
        return tuple(x[layer][:, :, :self.filled].transpose(1, 2) for x in (self.k, self.v))


class Attention(nn.Module):
    def __init__(self, cfg: LLaMAConfig, layer: int):
        super().__init__()
        self.layer, self.D = layer, cfg.dim // cfg.n_heads
        C, C_kv = cfg.dim, cfg.n_kv_heads * self.D
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(C, out, bias=False) for out in (C, C_kv, C_kv, C))

    def forward(self, z, rope, attend):
        B, T, C = z.shape
        q, k, v = (linear(z).view(B, T, -1, self.D) for linear in (self.wq, self.wk, self.wv))
        y = attend(self.layer, rotate(q, rope), rotate(k, rope), v)  # made by forward, prefill, decode, route
        return self.wo(y.reshape(B, T, C))


class FeedForward(nn.Module):
    def __init__(self, cfg: LLaMAConfig):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(cfg.dim, cfg.ffn_dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(cfg.ffn_dim, cfg.dim, bias=False)
        self.swiglu = recomputed(lambda gate, x: F.silu(gate) * x)  # so that only gate and x are kept

    def forward(self, x):
        return self.w2(self.swiglu(self.w1(x), self.w3(x)))


class Block(nn.Module):
    """x + attention(adapter(norm(x))), then x + feed_forward(norm(x)).
    For the backward pass, autograd keeps for each token: x before each norm; q, k, v; attention's output;
    w1(x) and w3(x); and a number per head, the log-sum-exp of its scores. From q, k and these numbers,
    torch's kernel computes the attention weights again. Norms, adapter and SwiGLU run again, too
    (`recomputed`). Frozen matrices get no gradient, so autograd does not keep their inputs."""

    def __init__(self, cfg: LLaMAConfig, layer: int):
        super().__init__()
        self.attention, self.feed_forward = Attention(cfg, layer), FeedForward(cfg)
        self.attention_norm, self.ffn_norm = (RMSNorm(cfg.dim, cfg.norm_eps) for _ in range(2))
        self.adapter_attn = None  # an MMAdapter or RepAdapter, once LaVIN adds it

    @recomputed
    def attention_input(self, x, w, dropout_mask):
        """Normalise, then Eq. (2). The residual x itself is not adapted."""
        z = self.attention_norm(x)
        return z if self.adapter_attn is None else self.adapter_attn(z, w, dropout_mask)

    @recomputed
    def ffn_input(self, x):  # so that only x is kept
        return self.ffn_norm(x)

    def forward(self, x, rope, attend, w=None, dropout_mask=None):
        """x [B, T, C]; w: this layer's routing weights; w and dropout_mask may be None"""
        x = x + self.attention(self.attention_input(x, w, dropout_mask), rope, attend)
        return x + self.feed_forward(self.ffn_input(x))

    def route(self, t):
        """t [M, 1, C]: modality tokens, each in a row of its own. Returns this layer's routing weights
        w [M, 1, 2], and t for the next layer. All t have position 0, where the rotation is 1."""
        w = self.adapter_attn.f_w(self.attention_norm(t))
        attend = lambda layer, q, k, v: dot_product_attention(q, k, v)
        return w, self.forward(t, rope=1, attend=attend, w=w)  # the released code has dropout here


class LLaMA(nn.Module):
    def __init__(self, cfg: LLaMAConfig):
        super().__init__()
        self.cfg = cfg
        self.recompute_blocks = False  # if True, autograd keeps only the input of each block
        self.tok_embeddings = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.output = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)  # LaVIN applies it where needed

    def forward(self, x, w=None, lengths: list[int] | None = None, dropout_mask=None) -> torch.Tensor:
        """x [B, T, C] -> hidden states after the last norm, [B, T, C]. lengths: of the sequences packed in a
        row; None: each row is one sequence. w [layers, B, T, 2]; dropout_mask [layers, B, T, r]"""
        lengths = lengths or [x.shape[1]]
        positions = torch.cat([torch.arange(n, device=x.device) for n in lengths])
        attend = lambda layer, q, k, v: packed_attention(q, k, v, lengths)
        return self.blocks(x, w, positions, attend, dropout_mask)

    def prefill(self, x, w, lengths: list[int], cache: KVCache) -> torch.Tensor:
        """Read packed prompts, x [1, T, C], into a new cache -> [1, T, C]"""
        positions = torch.cat([torch.arange(n, device=x.device) for n in lengths])  # [T]
        seq = torch.cat([torch.full([n], i, device=x.device) for i, n in enumerate(lengths)])  # 0 0 0 1 ..

        def attend(layer, q, k, v):
            cache.update(layer, seq, positions, k[0], v[0])
            return packed_attention(q, k, v, lengths)

        return self.blocks(x, w, positions, attend)

    def decode(self, x, w, cache: KVCache) -> torch.Tensor:
        """Read one more token of each sequence, x [B, 1, C] -> [B, 1, C]; w [layers, B, 1, 2]"""
        positions = cache.advance()  # of the new tokens, [B]
        seq = torch.arange(len(x), device=x.device)  # [B]: one token of each sequence
        visible = torch.arange(cache.filled, device=x.device) <= positions[:, None]  # [B, filled]
        mask = visible[:, None, None] if len(x) > 1 else None  # a single sequence sees every filled slot

        def attend(layer, q, k, v):
            k, v = cache.update(layer, seq, positions, k[:, 0], v[:, 0])
            return dot_product_attention(q, k, v, mask)

        return self.blocks(x, w, positions[:, None], attend)

    def blocks(self, x, w, positions, attend, dropout_mask=None) -> torch.Tensor:
        rope = rope_table(positions, self.cfg)
        for i, block in enumerate(self.layers):
            w_i = None if w is None else w[i]
            mask_i = None if dropout_mask is None else dropout_mask[i]
            run = recomputed(block) if self.recompute_blocks else block
            x = run(x, rope, attend, w_i, mask_i)
        return self.norm(x)

    @classmethod
    def from_pretrained(cls, path: str | Path, device="cpu", dtype=torch.float32, after_read=None) -> "LLaMA":
        """Read official weights. after_read(module) may quantise or shard each module once it is read."""
        return weights.load(cls, LLaMAConfig, weights.read_llama, path, device, dtype, after_read)
