"""LaVIN (https://arxiv.org/abs/2305.15023): a frozen LLaMA and a frozen CLIP ViT, and what joins them.

The adapters come from adapters.py. The name of every module that is trained begins with `adapter_`.

Precision with CUDA: the frozen models (the base) are stored in bf16, and matrix products and attention run in
bf16 (`autocast`). Norms, rotary embedding, the softmax of f_w and the loss are computed in fp32. What is
trained is stored in fp32, because bf16 would round small updates away.

Shapes: B samples, T tokens, C LLaMA's width, n visual tokens per image, V vocabulary.
"""
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F

import adapters
import weights
from adapters import AdapterConfig, MMAdapter, RepAdapter, xavier
from clip import VisionTransformer
from data import Batch
from llama import KVCache, LLaMA
from official.adapter_files import fill, write_adapters

TEXT, IMAGE = 0, 1  # rows of the modality embedding


@dataclass
class LaVINConfig:  # the defaults are those of --recipe paper; train.py passes its flags
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    vision: bool = True  # False: text only, no image encoder (first row of Table 2)
    vit_adapters: bool = True  # adapters in the ViT too; Table 2 calls it "joint optimisation"
    vit_routing: str = "cls"  # "token" for adapters released by the authors, see clip.Block
    neck_dim: int = 128  # width between W_d and W_u of Eq. (6)
    normalize: str = "imagenet"  # mean and std of the images, a key of clip.MEAN_STD


class Neck(nn.Module):
    """Map the ViT's [cls] tokens to visual tokens of LLaMA's width."""

    def __init__(self, vit_width: int, neck_dim: int, llama_width: int):
        super().__init__()
        self.W_d, self.W_u = nn.Linear(vit_width, neck_dim), nn.Linear(neck_dim, llama_width)
        xavier(self.W_d), xavier(self.W_u)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """X [images, n, ViT width] -> X' [images, n, C]"""
        # the paper's text says SwiGLU, but its formula has no gate; the released code uses SiLU, and so do we
        return self.W_u(F.silu(self.W_d(X)))  # Eq. (6): X' = SiLU(X W_d + b_d) W_u + b_u


def negative_log_likelihood(hidden: torch.Tensor, W: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """hidden [targets, C]: the output of LLaMA's last norm, at the positions whose next token is a target.
    W [V, C]: LLaMA's output matrix. R [targets]: ids of the targets R_s^i, for all s of sample 1, then of
    sample 2, and so on. A sample's last target is EOS, unless it was cut. Returns L, fp32."""
    log_p = F.log_softmax(F.linear(hidden, W).float(), dim=-1)  # [targets, V], for each possible token
    log_p_R = log_p.gather(1, R[:, None])  # [targets, 1], log p(R_s^i | Z^i, R_{0:s-1}^i; theta_a)
    return -log_p_R.sum()  # Eq. (5): L = - sum_i sum_s log p(R_s^i | Z^i, R_{0:s-1}^i; theta_a)


class LaVIN(nn.Module):
    def __init__(self, llama: LLaMA, vit: VisionTransformer | None, cfg: LaVINConfig):
        super().__init__()
        self.cfg, self.llama = cfg, llama
        self.vit = vit if cfg.vision else None
        self.loss = negative_log_likelihood  # train.py replaces it by a version that needs less memory
        # the new modules are in torch's default dtype, fp32, also when the base is in bf16
        kind = {"mm": MMAdapter, "rep": RepAdapter}[cfg.adapter.kind]
        for layer in llama.layers:
            layer.adapter_attn = kind(llama.cfg.dim, cfg.adapter)
        if cfg.adapter.kind == "mm":
            self.adapter_modality_embedding = nn.Embedding(2, llama.cfg.dim)  # E_m, starts as N(0, 1)
        if cfg.vision:
            self.adapter_proj = Neck(vit.cfg.width, cfg.neck_dim, llama.cfg.dim)  # named as in released files
        if cfg.vision and cfg.vit_adapters:
            # MM-Adapters, even when LLaMA has RepAdapters: this gives the 2.9M of Table 2's fourth row
            for block in vit.transformer.resblocks:
                block.adapter_attn = MMAdapter(vit.cfg.width, cfg.adapter)
                block.vit_routing = cfg.vit_routing
        adapters.freeze_base(self)

    @property
    def device(self) -> torch.device:
        return self.llama.norm.weight.device

    def autocast(self):
        """A context in which matrix products run in bf16 if the base is bf16."""
        bf16 = self.llama.norm.weight.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()

    def modality_tokens(self) -> torch.Tensor:
        m = torch.eye(2, device=self.device)  # one-hot: a row for TEXT, a row for IMAGE
        E_m = self.adapter_modality_embedding.weight
        t_m = m @ E_m  # Eq. (1): t_m = m E_m, for both modalities at once: [2, C]
        return t_m.to(self.llama.norm.weight.dtype)

    def routing_weights(self) -> torch.Tensor | None:
        """w [layers, modality, 2]: each layer's w_0 and w_1, for TEXT and for IMAGE. None without routers."""
        if self.cfg.adapter.kind != "mm":
            return None
        t, w = self.modality_tokens()[:, None], []  # two sequences of one token each, [2, 1, C]
        for block in self.llama.layers:
            w_of_layer, t = block.route(t)
            w.append(w_of_layer[:, 0])
        return torch.stack(w)

    def encode_images(self, batch: Batch) -> torch.Tensor | list:
        """X' of each sample with an image, [.., n, C]. For text, the ViT does not run."""
        if batch.image_embeds is not None:  # the ViT has run already: a chat or an evaluation keeps X'
            return batch.image_embeds
        if batch.images is None:
            return []
        X = self.vit(batch.images, batch.vit_dropout_mask)  # [.., n, ViT width]
        return self.adapter_proj(X)

    def embed(self, batch: Batch) -> list[torch.Tensor]:
        """Z of each sample, [T, C]. Unlike the paper's, it does not hold t_m, which no other token sees, and
        which acts only through the routing weights. As in the released code, X' stands inside Y, after
        Y_head = [BOS] "Image: ". In training, Z also holds R, at the end of Y_rest: attention is causal, so
        one pass gives all terms of Eq. (5)."""
        Y = self.llama.tok_embeddings(batch.tokens).split(batch.part_lengths)  # Y_head, Y_rest, Y_head, ..
        X_primes = iter(self.encode_images(batch))  # [n, C] each
        inputs = []
        for modality, Y_head, Y_rest in zip(batch.modality, Y[::2], Y[1::2]):
            if modality == IMAGE:
                X_prime = next(X_primes)
                Z = torch.cat([Y_head, X_prime, Y_rest])  # Eq. (7): Z = [t_m, X', Y], here without t_m
            else:
                Z = torch.cat([Y_head, Y_rest])  # Z = [t_m, Y], here without t_m
            inputs.append(Z)
        return inputs

    def pack(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x: all Z end to end, [1, T, C]; w of each token in each layer, [layers, 1, T, 2], or None."""
        x, w = torch.cat(self.embed(batch))[None], self.routing_weights()
        if w is None:
            return x, None
        modality_of_token = [m for m, length in zip(batch.modality, batch.lengths) for _ in range(length)]
        return x, w[:, modality_of_token].unsqueeze(1)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """LLaMA's hidden states at the positions that predict a target, [targets, C]."""
        x, w = self.pack(batch)
        return self.llama(x, w, batch.lengths, batch.llama_dropout_mask)[0, batch.predict_at]

    def forward(self, batch: Batch) -> torch.Tensor:
        """L of a micro-batch; to be called under autocast(). train.py divides it by the number of targets in
        the global batch, so the update does not depend on how the batch is split. The released code averages
        the means of micro-batches, so there the update depends on the split."""
        return self.loss(self.hidden(batch), self.llama.output.weight, batch.targets)

    def prefill(self, batch: Batch, room: int) -> tuple[torch.Tensor, KVCache, torch.Tensor | None]:
        """Read the prompts -> logits [B, V] of the next token, a cache with room for more tokens, and
        w [layers, B, 1, 2]"""
        with self.autocast():
            x, w = self.pack(batch)
            cache = KVCache(self.llama.cfg, batch.lengths, room, self.device, x.dtype)
            last = cache.lengths.cumsum(0) - 1  # where each prompt ends in x, [B]
            h = self.llama.prefill(x, w, batch.lengths, cache)[0, last]  # [B, C]
            w = None if w is None else w[:, 0, last].unsqueeze(2)  # all tokens of a prompt have the same w
            return self.llama.output(h).float(), cache, w

    def decode(self, w: torch.Tensor | None, token: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Read one more token of each row, [B] -> logits [B, V] of the next; w [layers, B, 1, 2]"""
        with self.autocast():
            h = self.llama.decode(self.llama.tok_embeddings(token[:, None]), w, cache)
            return self.llama.output(h[:, 0]).float()

    @torch.inference_mode()
    def stream(self, batch: Batch, max_new_tokens: int, eos: int, temperature: float = 0.1,
               top_p: float = 0.75, seed: int = 0) -> Iterator[list[int | None]]:
        """Yield R_1, R_2, ..: each time, a list with a token of each answer, None for one that has ended.
        temperature 0 is greedy. ValueError if a prompt leaves no room in the context."""
        longest, context = max(batch.lengths), self.llama.cfg.max_seq_len
        if longest >= context:  # released code: cuts the prompt silently
            raise ValueError(f"the prompt has {longest} tokens; the context holds {context}, answer included")
        limits = [min(max_new_tokens, context - n) for n in batch.lengths]  # tokens that each answer may have
        ended, random = [False] * len(limits), torch.Generator().manual_seed(seed)
        logits, cache, w = self.prefill(batch, max(limits))  # reads Z
        # the paper writes R_{0:s-1} for the tokens before R_s. Here s starts at 1, so they are R_1 .. R_{s-1}
        # Eq. (8): p(R | Z) = prod_s p(R_s | Z, R_{0:s-1}; theta_l, theta_a)
        for s in range(1, max(limits) + 1):
            p = torch.softmax(logits, -1)  # factor s of the product, for every possible R_s: [B, V]
            R_s = pick(p, temperature, top_p, random)  # [B]
            ids = R_s.tolist()
            # an answer ends at EOS or after `limit` tokens; its row is still computed, its tokens are dropped
            ended = [e or id == eos or s > limit for e, id, limit in zip(ended, ids, limits)]
            if all(ended):
                return
            yield [None if e else id for e, id in zip(ended, ids)]
            if s < max(limits):
                logits = self.decode(w, R_s, cache)  # reads R_s

    def generate(self, batch: Batch, max_new_tokens: int, eos: int, **sampling) -> list[list[int]]:
        """The answers of all rows, without EOS; arguments as for `stream`."""
        rows = zip(*self.stream(batch, max_new_tokens, eos, **sampling))
        answers = [[id for id in row if id is not None] for row in rows]
        return answers or [[] for _ in batch.lengths]  # nothing was yielded if no row has a token

    def save(self, path: str | Path, **meta) -> None:
        """Write the adapters, with everything needed to rebuild this model around the same base."""
        meta |= dict(lavin=asdict(self.cfg), llama=asdict(self.llama.cfg), base=weights.fingerprint(self))
        write_adapters(path, adapters.trainable(self), meta)


def pick(p: torch.Tensor, temperature: float, top_p: float, random: torch.Generator) -> torch.Tensor:
    """p [B, V] -> tokens [B]: greedy at temperature 0, otherwise top-p sampling from p ^ (1 / temperature)"""
    if temperature < 1e-4:  # 0, or so small that 1 / temperature overflows
        return p.argmax(-1)
    p, order = torch.softmax(p.log() / temperature, -1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # keep the fewest tokens whose mass reaches top_p
    cumulative = p.cumsum(-1)
    # inverse transform sampling: take the first token whose cumulative p exceeds u times the total. All rows
    # share the random number u, so a row draws the same token whether it is alone or in a batch
    u = torch.rand((), generator=random).item()
    i = (cumulative <= u * cumulative[:, -1:]).sum(-1, keepdim=True).clamp(max=p.shape[1] - 1)
    return order.gather(-1, i)[:, 0]


def load(path: str | Path, llama_path: str | Path, clip_path: str | Path, device="cpu", dtype=torch.float32,
         any_base: bool = False, after_read: Callable | None = None) -> tuple[LaVIN, dict]:
    """Build the model of an adapter file, ours or a released .pth, around its base; also return the metadata.

    ValueError unless the base has the sizes and the weights that the adapters were trained on. any_base skips
    the check of the weights. after_read: as in llama.py.
    """
    tensors, meta = weights.read_adapters(path)
    cfg = LaVINConfig(**{**meta["lavin"], "adapter": AdapterConfig(**meta["lavin"]["adapter"])})
    llama = LLaMA.from_pretrained(llama_path, device, dtype, after_read)
    vit = VisionTransformer.from_pretrained(clip_path, device, dtype) if cfg.vision else None
    model = LaVIN(llama, vit, cfg)
    weights.check_base(path, meta, model, f"{llama_path} + {clip_path}", any_base)
    fill(adapters.trainable(model), tensors, path)
    return model.to(device), meta
