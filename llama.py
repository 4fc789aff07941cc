"""LLaMA: the frozen language model, its key/value cache, its tokenizer.

    Touvron et al. 2023: https://arxiv.org/abs/2302.13971

Official weights come from Meta on request, or from the Hugging Face hub; weights.py reads both layouts. Parameter
names are Meta's, so loading needs hardly any renaming.

One block, three ways to use it. `forward` trains on whole sequences, packed end to end without padding. `prefill`
reads prompts into a cache. `decode` reads one more token of each row. They differ only in which keys a query sees.
An adapter stands in front of each attention as an explicit call; without one, the block is plain LLaMA.

What a training step keeps for the backward, per token and block: x, q, k, v, the attention's output and log-sums, x
after the attention, gate and up. Frozen projections keep nothing, because their weights need no gradient; norms,
adapters and SwiGLU are recomputed.

Shapes: B samples, T tokens, C = dim, H heads, D = C / H, S slots of a cache, L layers, r width of an adapter.
"""
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F

import weights
from adapters import recompute


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


PRESETS = {
    "7B": LLaMAConfig(),
    "13B": LLaMAConfig(dim=5120, n_layers=40, n_heads=40, ffn_dim=13824),
    "tiny": LLaMAConfig(dim=128, n_layers=4, n_heads=8, ffn_dim=352, vocab_size=1096, norm_eps=1e-5,
                        rope_theta=100.0, max_seq_len=256),
}


def from_name(name: str) -> LLaMAConfig:
    if name not in PRESETS:
        raise ValueError(f"unknown LLaMA {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).type_as(x)


def rope_table(positions: torch.Tensor, D: int, theta: float) -> torch.Tensor:
    """Rotary embedding: positions [.., T] -> e^(i angle) [.., T, 1, D/2], complex64."""
    freq = theta ** (-torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D)
    angle = positions[..., None, None].float() * freq
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, D]: rotate each pair (2i, 2i+1), read as a complex number, by the angle of its position."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [B, T, H, D/2]
    return torch.view_as_real(pairs * rope).flatten(-2).type_as(x)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **mask) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v; q [B, T, H, D], k and v [B, S, H, D] -> [B, T, H, D]"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, .., D]
    return F.scaled_dot_product_attention(q, k, v, **mask).transpose(1, 2)


class KVCache:
    """Keys and values of B rows, [L, B, H, S, D]. A slot is a position in the row's own sequence.

    Rows may differ in length. Padding behind a shorter prompt fills slots that the row's next tokens overwrite,
    and no query looks beyond its own position.
    """

    def __init__(self, cfg: LLaMAConfig, B: int, S: int, device=None, dtype=None):
        shape = cfg.n_layers, B, cfg.n_heads, S, cfg.dim // cfg.n_heads
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(B, dtype=torch.long, device=device)  # tokens in each row
        self.filled = 0  # tokens in the longest row
        self.rows = torch.arange(B, device=device)[:, None]  # [B, 1]

    def grow(self) -> torch.Tensor:
        """Make room for one more token in each row; return its positions [B]."""
        positions, self.lengths, self.filled = self.lengths, self.lengths + 1, self.filled + 1
        return positions

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> tuple:
        """Store k, v [B, T, H, D] of new tokens at positions [B or 1, T]; return all k, v so far [B, filled, H, D]."""
        keys, values = self.k[layer], self.v[layer]  # [B, H, S, D]
        keys[self.rows, :, positions], values[self.rows, :, positions] = k, v
        return tuple(x[:, :, :self.filled].transpose(1, 2) for x in (keys, values))


class Attention(nn.Module):
    def __init__(self, cfg: LLaMAConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(cfg.dim, cfg.dim, bias=False) for _ in range(4))

    def forward(self, z, attend):
        B, T, C = z.shape
        q, k, v = (w(z).view(B, T, self.n_heads, -1) for w in (self.wq, self.wk, self.wv))  # [B, T, H, D]
        return self.wo(attend(q, k, v).reshape(B, T, C))

    def alone(self, z):
        """z [.., C] of a token that sees only itself: softmax over one score is 1, so it reads its own value"""
        return self.wo(self.wv(z))


def swiglu(gate, up):
    return F.silu(gate) * up


class FeedForward(nn.Module):
    def __init__(self, cfg: LLaMAConfig):
        super().__init__()
        self.w1 = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.w2 = nn.Linear(cfg.ffn_dim, cfg.dim, bias=False)
        self.w3 = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)

    def forward(self, x):
        return self.w2(recompute(swiglu, self.w1(x), self.w3(x)))


class Block(nn.Module):
    def __init__(self, cfg: LLaMAConfig):
        super().__init__()
        self.attention = Attention(cfg)
        self.feed_forward = FeedForward(cfg)
        self.attention_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.adapter_attn = None  # an MMAdapter or RepAdapter, once LaVIN adds it

    def adapted(self, x, w, keep):
        """The attention's input: normalised, then Eq. (2). The residual stream x itself is not adapted."""
        z = self.attention_norm(x)
        return z if self.adapter_attn is None else self.adapter_attn(z, w, keep)

    def forward(self, x, w, attend, keep=None):
        """x [B, T, C]; w: routing weights; attend(q, k, v): which keys a query sees; keep: dropout's survivors"""
        x = x + self.attention(recompute(self.adapted, x, w, keep), attend)
        return x + self.feed_forward(recompute(self.ffn_norm, x))


class LLaMA(nn.Module):
    def __init__(self, cfg: LLaMAConfig):
        super().__init__()
        self.cfg = cfg
        self.checkpoint = False  # True: keep only the input of each block for the backward
        self.tok_embeddings = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.output = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)

    def forward(self, x, w=None, lengths: list[int] | None = None, keep=None) -> torch.Tensor:
        """Training: sequences of these lengths, packed end to end in x [1, T, C]; without `lengths`, one per row.

        x     embeddings, or token ids [B, T]
        w     routing weights of every layer, [L, B or 1, T or 1, 2]; None for a bare LLaMA or plain RepAdapters
        keep  units that survive dropout, [L, B, T, r]; None: no dropout
        Returns the hidden states after the last norm, [B, T, C]; `output` turns them into logits.
        """
        x = x if x.is_floating_point() else self.tok_embeddings(x)
        lengths = lengths or [x.shape[1]]
        positions = torch.cat([torch.arange(n, device=x.device) for n in lengths])

        def attend(layer, q, k, v):  # one call per sequence, so no sequence sees another
            sequences = zip(*(t.split(lengths, dim=1) for t in (q, k, v)))
            return torch.cat([attention(*qkv, is_causal=True) for qkv in sequences], dim=1)

        return self.blocks(x, w, positions, attend, keep)

    def prefill(self, x, w, lengths: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Prompts x [B, T, C] of `lengths` [B], padded at the end, into an empty cache -> hidden states [B, T, C]"""
        positions = torch.arange(x.shape[1], device=x.device)
        cache.lengths, cache.filled = lengths, x.shape[1]

        def attend(layer, q, k, v):
            cache.update(layer, k, v, positions[None])
            return attention(q, k, v, is_causal=True)

        return self.blocks(x, w, positions, attend)

    def decode(self, x, w, cache: KVCache) -> torch.Tensor:
        """The next token of each row, x [B, 1, C], after those in the cache -> hidden states [B, 1, C]"""
        positions = cache.grow()[:, None]  # [B, 1]
        seen = torch.arange(cache.filled, device=x.device) <= positions  # [B, S]
        mask = None if len(x) == 1 else seen[:, None, None]  # one row sees all of its slots

        def attend(layer, q, k, v):
            return attention(q, *cache.update(layer, k, v, positions), attn_mask=mask)

        return self.blocks(x, w, positions, attend)

    def blocks(self, x, w, positions, attend: Callable, keep=None) -> torch.Tensor:
        """Every block and the last norm. attend(layer, q, k, v) gets q and k already rotated."""
        rope = rope_table(positions, self.cfg.dim // self.cfg.n_heads, self.cfg.rope_theta)

        def attend_rotated(layer, q, k, v):
            return attend(layer, rotate(q, rope), rotate(k, rope), v)

        for i, layer in enumerate(self.layers):
            w_i, keep_i = (None if per_layer is None else per_layer[i] for per_layer in (w, keep))
            args = x, w_i, partial(attend_rotated, i), keep_i
            x = recompute(layer, *args) if self.checkpoint else layer(*args)
        return self.norm(x)

    def route(self, t: torch.Tensor) -> torch.Tensor:
        """Routing weights [L, M, 2] of M modality tokens t [M, C].

        A modality token sees only itself and no other token sees it, so it passes through the layers on its own,
        once per batch. The router of a layer reads its normalised state there. No dropout on this path.
        """
        routing = []
        for layer in self.layers:
            z = layer.attention_norm(t)
            routing.append(layer.adapter_attn.route(z))  # [M, 2]
            t = t + layer.attention.alone(layer.adapter_attn(z, routing[-1]))
            t = t + layer.feed_forward(layer.ffn_norm(t))
        return torch.stack(routing)

    @classmethod
    def from_pretrained(cls, path: str | Path, device="cpu", dtype=torch.float32) -> "LLaMA":
        """Read a folder of official weights; ValueError or FileNotFoundError says in one line what is wrong."""
        sizes, tensors = weights.read_llama(path)
        with torch.device("meta"):
            model = cls(LLaMAConfig(**sizes))
        weights.assign(model, tensors, path, device, dtype)
        return model


class Tokenizer:
    """sentencepiece with LLaMA's conventions: BOS 1, EOS 2, no padding id."""

    def __init__(self, path: str | Path):
        from sentencepiece import SentencePieceProcessor
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such tokenizer; tokenizer.model comes with the LLaMA weights")
        try:
            self.sp = SentencePieceProcessor(model_file=str(path))
        except Exception:
            raise ValueError(f"{path}: not a sentencepiece model") from None
        self.bos, self.eos, self.vocab_size = self.sp.bos_id(), self.sp.eos_id(), self.sp.vocab_size()

    @classmethod
    def from_pretrained(cls, path: str | Path, vocab_size: int) -> "Tokenizer":
        """The tokenizer of a folder of LLaMA weights; ValueError if the two vocabularies differ in size."""
        file = weights.tokenizer_path(path)
        tokenizer = cls(file)
        if tokenizer.vocab_size != vocab_size:
            raise ValueError(f"{file}: {tokenizer.vocab_size} pieces, but the LLaMA has {vocab_size} embeddings; "
                             "use the tokenizer.model that came with this LLaMA")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS and EOS; ValueError if the text holds bytes that are not UTF-8."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the text {ascii(text[:60])} is not valid UTF-8") from None
        return self.sp.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode(ids)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode ids one by one; the pieces join to `decode` of them all.

        One character may take several byte tokens. Until its last byte arrives, the decoded text ends in U+FFFD,
        and that piece is held back.
        """
        seen, text, printed = [], "", ""
        for id in ids:
            seen.append(id)
            text = self.decode(seen)
            if not text.endswith("\ufffd"):
                yield text[len(printed):]
                printed = text
        if text != printed:  # the text ends inside a character
            yield text[len(printed):]
