"""LLaMA: the frozen language model, and its tokenizer.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023. Official weights come from
Meta on request (`consolidated.NN.pth` + `params.json`) or from the Hugging Face hub; weights.py reads both.
Parameter names are Meta's, so that loading needs hardly any renaming.

One model trains and generates: `forward` takes a batch of whole sequences, side by side or packed end to end, or the
next piece of sequences whose past lies in a `KVCache`. The adapter in front of each attention is an explicit call;
absent = identity.

Shapes: B samples, T tokens, C = dim, H heads, D = C / H head width, S slots of a cache, L layers. Packed: B is 1 and
T the sum of all sequences' lengths.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import weights
from adapters import recompute, survivors


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


def mkl_is_slow() -> bool:
    """A product with one row makes MKL wait for memory on AMD's CPUs, not on Intel's."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "AuthenticAMD" in cpu.read_text()


class Linear(nn.Linear):
    """x W^T + b. A few rows on an AMD CPU are multiplied by the two halves of W in one batched product: where W comes
    from memory and its rows are short, MKL reads 22 GB/s that way and 8 in the plain product (width 512, one core of an
    EPYC; on an Intel Xeon 7 and 14). A small W lies in a cache, and rows of 4,096 are read as fast by the plain product.
    """
    by_halves = mkl_is_slow()

    def __init__(self, inputs: int, outputs: int, bias: bool = True, device=None):
        super().__init__(inputs, outputs, bias, device)
        self.in_halves = self.by_halves and inputs <= 2048 and inputs * outputs >= 2 ** 18 and outputs % 2 == 0

    def forward(self, x):
        W, b = self.weight, self.bias
        if torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == W.shape[1]:
            # one loop, once compiled, that reads W at four places at once: as fast as the memory gives it
            y = torch.cat([(rows * x.flatten()).sum(-1) for rows in W.chunk(4)])
            return (y if b is None else y + b).view(*x.shape[:-1], -1)
        if not self.in_halves or x.device.type != "cpu" or W.dtype != torch.float32 or x.numel() > 4 * W.shape[1] \
                or torch.is_grad_enabled():
            return F.linear(x, W, b)
        columns = x.flatten(0, -2).t().expand(2, -1, -1)  # [2, in, rows]
        W = W.view(2, -1, W.shape[1])
        y = torch.bmm(W, columns) if b is None else torch.baddbmm(b.view(2, -1, 1), W, columns)  # [2, out / 2, rows]
        return y.flatten(0, 1).t().view(*x.shape[:-1], -1)


def rope_table(positions: torch.Tensor, D: int, theta: float) -> torch.Tensor:
    """positions [..., T] -> e^(i angle) [..., T, 1, D/2], complex64"""
    freq = theta ** (-torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D)
    angle = positions[..., None, None].float() * freq
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, D]: turn each pair (2i, 2i+1), Meta's layout, a complex number, by its position's angle"""
    pairs = x.float().unflatten(-1, (-1, 2))  # [B, T, H, D/2, 2]
    if rope.is_complex():
        return torch.view_as_real(torch.view_as_complex(pairs) * rope).flatten(-2).type_as(x)
    cos, sin = rope.unbind(-3)  # see without_complex: (a, b) -> (a cos - b sin, b cos + a sin)
    return (pairs * cos + pairs.flip(-1) * sin).flatten(-2).type_as(x)


def attend(q, k, v):
    """softmax(q k^T / sqrt(D)) v written out, for compilers: q [B, H, 1, D] of one token, k, v [B, H, S, D] that it sees"""
    scores = (q.float() * q.shape[-1] ** -0.5 * k).sum(-1)  # [B, H, S]
    return (scores.softmax(-1)[..., None] * v).sum(-2, keepdim=True).type_as(v)  # [B, H, 1, D]


class KVCache(NamedTuple):
    """Keys and values of the tokens so far: L tensors [B, H, S, D] each, slot = position in the sequence.

    Rows of a batch may have different lengths: a prompt fills slots 0.., padding after a shorter prompt
    fills slots that its own next tokens overwrite, and no query looks past its own position.
    """
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    rows: torch.Tensor  # [B, 1]
    slots: torch.Tensor  # [S]
    rope: torch.Tensor  # of every slot: once, not at every step

    @classmethod
    def empty(cls, cfg: LLaMAConfig, B: int, S: int, device=None, dtype=None) -> "KVCache":
        D = cfg.dim // cfg.n_heads
        k, v = ([torch.zeros(B, cfg.n_heads, S, D, device=device, dtype=dtype) for _ in range(cfg.n_layers)]
                for _ in range(2))
        slots = torch.arange(S, device=device)
        return cls(k, v, torch.arange(B, device=device)[:, None], slots, rope_table(slots, D, cfg.rope_theta))


def without_complex(cache: KVCache) -> KVCache:
    """for compilers, which have no complex numbers: rope [S, 1, D/2] -> [S, 1, 2, D/2, 2], (cos, cos) and (-sin, sin)"""
    cos, sin = cache.rope.real, cache.rope.imag
    return cache._replace(rope=torch.stack([torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)], dim=-3))


class Attention(nn.Module):
    def __init__(self, cfg: LLaMAConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.wq, self.wk, self.wv, self.wo = (Linear(cfg.dim, cfg.dim, bias=False) for _ in range(4))
        self.wqkv = None  # once LaVIN folds the adapter: the three side by side, which are then gone

    def forward(self, z, rope, lengths=None, past=None, mask=None):
        B, T, C = z.shape  # past: this layer's k and v in the cache, where the new ones go, and how many slots to read
        qkv = (self.wq(z), self.wk(z), self.wv(z)) if self.wqkv is None else self.wqkv(z).chunk(3, dim=-1)
        q, k, v = (x.view(B, T, self.n_heads, -1) for x in qkv)  # [B, T, H, D]
        q, k = rotate(q, rope), rotate(k, rope)
        if past is None:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
            # packed: one call a sequence, so that none sees another; each is large enough to fill the device
            y = [F.scaled_dot_product_attention(*qkv, is_causal=True)
                 for qkv in zip(*(x.split(lengths or T, dim=2) for x in (q, k, v)))]
            return self.wo(torch.cat([x.transpose(1, 2) for x in y], dim=1).reshape(B, T, C))
        keys, values, at, filled = past
        keys[at], values[at] = k, v
        k, v = keys[:, :, :filled], values[:, :, :filled]  # [B, H, S, D]
        q = q.transpose(1, 2)  # [B, H, T, D]
        if torch.compiler.is_compiling() and T == 1 and mask is None:
            y = attend(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        return self.wo(y.transpose(1, 2).reshape(B, T, C))

    def alone(self, z):
        """z [..., C] of a token that sees only itself: its softmax is 1, so what it reads is its own value"""
        return self.wo(self.wv(z))


class FeedForward(nn.Module):
    def __init__(self, cfg: LLaMAConfig):
        super().__init__()
        self.w1 = Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.w2 = Linear(cfg.ffn_dim, cfg.dim, bias=False)
        self.w3 = Linear(cfg.dim, cfg.ffn_dim, bias=False)

    def forward(self, x):
        return self.w2(recompute(swiglu, self.w1(x), self.w3(x)))


def swiglu(gate, up):
    return F.silu(gate) * up


class Block(nn.Module):
    def __init__(self, cfg: LLaMAConfig):
        super().__init__()
        self.attention = Attention(cfg)
        self.feed_forward = FeedForward(cfg)
        self.attention_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.adapter_attn = None  # an MMAdapter or a RepAdapter, once LaVIN puts it here

    def adapted(self, x, w, keep):
        z = self.attention_norm(x)
        return z if self.adapter_attn is None else self.adapter_attn(z, w, keep)  # Eq. (2); the residual x is untouched

    def forward(self, x, w, rope, keep=None, lengths=None, past=None, mask=None):
        # frozen products keep nothing for the backward, and what `recompute` covers is cheap to work out again; so a
        # training step keeps x, q, k, v, attention's output and log-sums, x again, gate and up
        x = x + self.attention(recompute(self.adapted, x, w, keep), rope, lengths, past, mask)
        return x + self.feed_forward(recompute(self.ffn_norm, x))


class LLaMA(nn.Module):
    def __init__(self, cfg: LLaMAConfig):
        super().__init__()
        self.cfg, self.checkpoint = cfg, False  # checkpoint: keep only a block's input, work the block out again
        self.tok_embeddings = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.output = Linear(cfg.dim, cfg.vocab_size, bias=False)

    def forward(self, x: torch.Tensor, routing: torch.Tensor | None = None, positions: torch.Tensor | None = None,
                lengths: list[int] | None = None, cache: KVCache | None = None, seeds: torch.Tensor | None = None,
                filled: int | None = None) -> torch.Tensor:
        """Hidden states after the last norm [B, T, C]; `output` turns those you need into logits.

        x          token ids [B, T], or embeddings [B, T, C]
        routing    w of every layer's adapter, [L, B or 1, T or 1, 2]; None for a bare LLaMA or plain RepAdapters
        positions  [B, T], each token's place in its own sequence; None: 0, 1, ..
        lengths    of the sequences packed into the one row of x; None: every row is one sequence
        cache      where keys and values go; with positions, also where those of earlier calls are
        seeds      [B, T], of the sample that each token belongs to: for the adapters' dropout; None: no dropout
        filled     how many slots of the cache are in use after this call, where that is known: no others are read
        """
        if not x.is_floating_point():
            x = self.tok_embeddings(x)
        B, T, C = x.shape
        mask, at = None, None
        if cache is not None and positions is None:  # the prompt, into an empty cache
            filled = T
        elif cache is not None and not (B == T == 1 and filled):  # a query sees the slots up to its own position
            mask = (cache.slots[:filled] <= positions[..., None])[:, None]  # [B, 1, T, S]
        if positions is None:
            positions = torch.arange(T, device=x.device).expand(B, T)
        if cache is None:
            rope = rope_table(positions, C // self.cfg.n_heads, self.cfg.rope_theta)
        else:
            rope, at = cache.rope[positions], (cache.rows, slice(None), positions)
        keep = [None] * len(self.layers)
        if seeds is not None:
            keep = survivors(seeds, positions, self.layers[0].adapter_attn.cfg, 0, len(self.layers))
        again = self.checkpoint and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            w = None if routing is None else routing[i]
            past = None if cache is None else (cache.k[i], cache.v[i], at, filled)
            args = x, w, rope, keep[i], lengths, past, mask
            x = checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False) if again else layer(*args)
        return self.norm(x)

    def route(self, t: torch.Tensor) -> torch.Tensor:
        """Routing weights [L, M, 2] of M modality tokens t [M, C], each going through the layers by itself.

        A modality token sees only itself and no other token sees it. So what the router of layer l reads, its
        normalised state at that layer, is a function of the modality alone: two constants per layer, worked out
        here once for a whole batch instead of at the head of every sequence. No dropout on this path.
        """
        routing = []
        for layer in self.layers:
            z = layer.attention_norm(t)
            w = layer.adapter_attn.route(z)  # [M, 2]
            routing.append(w)
            z = layer.adapter_attn(z[:, None], w[:, None])[:, 0]
            t = t + layer.attention.alone(z)
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
            raise FileNotFoundError(f"{path}: no such tokenizer; it comes with the LLaMA weights as tokenizer.model")
        try:
            self.sp = SentencePieceProcessor(model_file=str(path))
        except Exception:
            raise ValueError(f"{path}: not a sentencepiece model") from None
        self.bos, self.eos, self.vocab_size = self.sp.bos_id(), self.sp.eos_id(), self.sp.vocab_size()

    @classmethod
    def from_pretrained(cls, path: str | Path, vocab_size: int) -> "Tokenizer":
        """The tokenizer of a folder of LLaMA weights; ValueError if those have another vocabulary."""
        file = weights.tokenizer_path(path)
        tokenizer = cls(file)
        if tokenizer.vocab_size != vocab_size:
            raise ValueError(f"{file}: {tokenizer.vocab_size} pieces, but the LLaMA has embeddings for {vocab_size}; "
                             "put the tokenizer.model of this LLaMA there")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """ids without BOS and EOS"""
        return self.sp.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode(ids)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Ids as they come -> the same text as `decode` of all, piece by piece.

        A character may be several byte tokens. Until its last has come, decoding ends in U+FFFD: that is held back.
        """
        seen, text, shown = [], "", ""
        for id in ids:
            seen.append(id)
            text = self.decode(seen)
            if not text.endswith("\ufffd"):
                yield text[len(shown):]
                shown = text
        if text != shown:  # the text does end inside a character
            yield text[len(shown):]
