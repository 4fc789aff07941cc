"""LaVIN: a frozen LLaMA and a frozen CLIP ViT, joined by adapters, a visual neck and a modality embedding.

    Luo et al., "Cheap and Quick: Efficient Vision-Language Instruction Tuning for LLMs", NeurIPS 2023.

What is here: the modality token, the neck, how text and picture become one sequence, the loss, generation.
The same forward serves training, prefill and decoding.

Shapes: B samples, T tokens, C LLM width, N pictures among the B samples, n [cls] tokens a picture, v ViT width,
L LLaMA layers, V vocabulary.
"""
import hashlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F

import adapters
from speed import compiling
import weights
from adapters import AdapterConfig, MMAdapter
from clip import VisionTransformer
from llama import KVCache, LLaMA
from speed.machine import need_compiler

TEXT, IMAGE = 0, 1  # rows of the modality embedding


@dataclass
class LaVINConfig:
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    vision: bool = True  # False: the text-only row of Table 2, no image encoder at all
    vit_adapters: bool = True  # "joint optimisation" in Table 2
    vit_routing: str = "cls"  # "token" for adapters released by the authors, see clip.Block
    neck_dim: int = 128  # h
    normalize: str = "imagenet"  # the pictures' mean/std, a key of clip.MEAN_STD


class Neck(nn.Module):
    def __init__(self, v: int, h: int, d: int):
        super().__init__()
        self.W_d, self.W_u = nn.Linear(v, h), nn.Linear(h, d)
        for w in (self.W_d, self.W_u):
            nn.init.xavier_uniform_(w.weight)
            nn.init.zeros_(w.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [N, n, v] -> X' [N, n, C]"""
        return self.W_u(F.silu(self.W_d(x)))  # Eq. (6): X' = SiLU(X W_d + b_d) W_u + b_u


class NegativeLogLikelihood(torch.autograd.Function):
    """Sum of -log softmax(h W^T)[target] over n rows, some rows at a time: [n, V] logits never exist at once.

    W is frozen and the loss a plain sum, so the gradient of h is known as soon as a chunk's logits are, and is all
    that is kept. h [n, C], W [V, C], targets [n] -> fp32 scalar.
    """
    ROWS = 256  # 32,000 logits in fp32 are 128 KB a row

    @staticmethod
    def forward(ctx, h, W, targets):
        loss, grad = h.new_zeros((), dtype=torch.float32), torch.empty_like(h)
        for i in range(0, len(h), NegativeLogLikelihood.ROWS):
            rows = slice(i, i + NegativeLogLikelihood.ROWS)
            logp = F.log_softmax(F.linear(h[rows], W).float(), dim=-1)  # [rows, V]
            loss -= logp.gather(1, targets[rows, None]).sum()
            p = logp.exp_()
            p.scatter_add_(1, targets[rows, None], -torch.ones_like(p[:, :1]))  # softmax - one-hot
            grad[rows] = p.to(W.dtype) @ W
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        (grad,) = ctx.saved_tensors
        return (grad.float() * d_loss).to(grad.dtype), None, None


class LaVIN(nn.Module):
    """Everything trainable lies under a name that starts with `adapter_`; the rest is frozen here."""

    def __init__(self, llama: LLaMA, vit: VisionTransformer | None, cfg: LaVINConfig):
        super().__init__()
        self.cfg, self.llama, self.vit = cfg, llama, vit if cfg.vision else None
        d = llama.cfg.dim
        for layer in llama.layers:
            layer.adapter_attn = adapters.new_adapter(d, cfg.adapter)
        if cfg.adapter.kind == "mm":
            self.adapter_modality_embedding = nn.Embedding(2, d)  # E_m, N(0, 1)
        if cfg.vision:
            self.adapter_proj = Neck(vit.cfg.width, cfg.neck_dim, d)
            for block in vit.transformer.resblocks if cfg.vit_adapters else ():
                block.adapter_attn = MMAdapter(vit.cfg.width, cfg.adapter)
                block.routing = cfg.vit_routing
        self.folded = {}  # modality -> wqkv of every layer, see fold
        self.compiled = None  # see compile_step
        adapters.freeze_base(self)

    @property
    def device(self) -> torch.device:
        return self.llama.norm.weight.device

    def autocast(self):
        """bf16 products where the base is bf16; adapters keep fp32 masters, norms, softmax and loss are fp32"""
        if self.llama.norm.weight.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    # -----------------------------------------------------------------------------------------------
    # input

    def routing(self, modality: torch.Tensor) -> torch.Tensor | None:
        """modality [..] of TEXT or IMAGE -> w [L, .., 2]; None if the adapters have no router"""
        if self.cfg.adapter.kind != "mm" or self.folded:
            return None
        t_m = self.adapter_modality_embedding.weight  # Eq. (1): t_m = m E_m, for both one-hot m at once: [2, C]
        return self.llama.route(t_m.to(self.llama.norm.weight.dtype))[:, modality]

    def embed(self, batch) -> torch.Tensor:
        """Z [B, T, C]: word embeddings, with X' in the slots that the collation left for it.

        The ViT sees only the pictures that exist (the released code runs a black one for every text sample).
        """
        z = self.llama.tok_embeddings(batch.tokens)
        if not len(batch.slots):
            return z
        x = self.look(batch) if batch.seen is None else batch.seen
        # Eq. (7): Z = [t_m, X', Y] with a picture, [t_m, Y] without; t_m runs beside it, see LLaMA.route
        return z.flatten(0, 1).index_copy(0, batch.slots, x.flatten(0, 1).to(z.dtype)).view_as(z)

    def look(self, batch) -> torch.Tensor:
        """X' of each sample that shows a picture [.., n, C]. What several samples show, is encoded once; in training
        for each of them, because dropout is the sample's own."""
        seeds = self.seeds(batch, batch.slots.view(len(batch.shows), -1)[:, 0])
        if seeds is not None:
            return self.adapter_proj(self.vit(batch.images[batch.shows], seeds))
        return self.adapter_proj(self.vit(batch.images))[batch.shows]

    def seeds(self, batch, where=slice(None)) -> torch.Tensor | None:
        """for dropout, the seed of the sample that each of these tokens belongs to; None where there is no dropout"""
        dropout = self.training and self.cfg.adapter.dropout > 0 and batch.seeds is not None
        return batch.seeds.flatten()[where] if dropout else None

    # -----------------------------------------------------------------------------------------------
    # training

    def forward(self, batch) -> torch.Tensor:
        """Sum of the negative log-likelihoods of the batch's target tokens (fp32 scalar).

        The sum, not the mean: divided by the number of targets in the *global* batch it is the same loss for every
        split into ranks and accumulation steps. (The released code averages per-micro-batch means.)
        """
        with self.autocast():
            seeds = self.seeds(batch)
            h = self.llama(self.embed(batch), self.routing(batch.modality), batch.positions, batch.packed,
                           seeds=None if seeds is None else seeds.view_as(batch.tokens))
            h = h.flatten(0, 1)[batch.where]  # [targets, C]: no logits where nothing is asked
            # Eq. (5): L = - sum_i sum_s log p(R_s^i | Z^i, R_{0:s-1}^i; theta_a); s runs to S + 1, the EOS
            return NegativeLogLikelihood.apply(h, self.llama.output.weight, batch.targets)

    # -----------------------------------------------------------------------------------------------
    # generation

    @torch.no_grad()
    def fold(self, *modalities: int) -> "LaVIN":
        """Fold LLaMA's adapters into the projections after them, for answering in these modalities only.

        In LLaMA the routing weights are constants of the modality, so an adapter is one affine map for each, and costs
        nothing any more; a second modality costs a second set of those. The ViT's adapters are routed by each
        picture's own [cls]: no constant map to fold there. Not to be trained or saved afterwards.
        """
        with self.autocast():
            w = self.routing(torch.tensor(modalities, device=self.device))  # [L, modalities, 2] or None
        self.folded.update({m: [] for m in modalities})
        for i, layer in enumerate(self.llama.layers):
            a = layer.attention
            for k, m in enumerate(modalities):
                self.folded[m].append(adapters.fold([a.wq, a.wk, a.wv], layer.adapter_attn, None if w is None else w[i, k]))
            layer.adapter_attn = a.wq = a.wk = a.wv = None  # layer by layer, or both sets would fill the memory at once
        self.enter(modalities[0])
        return self

    def enter(self, modality: int) -> None:
        """put one modality's folded projections to work"""
        if modality not in self.folded:
            raise ValueError(f"folded for modalities {list(self.folded)}, asked in {modality}; fold for both")
        for layer, wqkv in zip(self.llama.layers, self.folded[modality]):
            layer.attention.wqkv = wqkv

    def compile_step(self) -> "LaVIN":
        """Have torch compile the step of one token, as compiling.py tells; to be called after `fold`. ValueError without a
        compiler."""
        need_compiler()
        self.compiled = compiling.Program(self) if self.device.type == "cpu" else compiling.Graph(self)
        return self

    def cache(self, B: int, S: int) -> KVCache:
        return KVCache.empty(self.llama.cfg, B, S, self.device, self.llama.norm.weight.dtype)

    def step(self, token, w, positions, cache, filled=None) -> torch.Tensor:
        """tokens [B] and their positions [B] -> logits [B, V] of what comes next"""
        return self.llama.output(self.llama(token[:, None], w, positions[:, None], cache=cache, filled=filled)[:, 0]).float()

    def stream(self, batch, max_new_tokens: int, eos: int, temperature: float = 0.1, top_p: float = 0.75,
               seed: int = 0, complete: Callable[[list[int]], bool] | None = None) -> Iterator[list[int | None]]:
        """Yield, step by step, the next token of each row of `batch`, None for rows that are done.

        A row ends at its own EOS (which is not yielded), or once `complete` says so of its answer's ids so far. Rows
        may differ in length and modality. A row's answer depends on its prompt and the seed alone: every row takes the
        same random number at a step, so it does not matter who its neighbours are. temperature 0 is greedy. ValueError
        if a prompt does not fit the context.
        """
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"--temperature {temperature} --top_p {top_p}: expected at least 0, and a share above 0")
        longest = int(batch.lengths.max())
        room = self.llama.cfg.max_seq_len - longest
        if room < 1:
            raise ValueError(f"the prompt has {longest} tokens; this LLaMA's context holds "
                             f"{self.llama.cfg.max_seq_len}, answer included")
        max_new_tokens = min(max_new_tokens, room)
        if self.folded:
            modalities = batch.modality.unique().tolist()
            assert len(modalities) == 1, "a folded model answers one modality at a time"
            self.enter(modalities[0])
        B, T = batch.tokens.shape
        random = torch.Generator().manual_seed(seed)
        done, answers = [False] * B, [[] for _ in range(B)]
        with torch.inference_mode(), self.autocast():
            w = self.routing(batch.modality)
            cache = (self.compiled or self).cache(B, T + max_new_tokens)
            h = self.llama(self.embed(batch), w, cache=cache)
            logits = self.llama.output(h[torch.arange(B, device=h.device), batch.lengths - 1]).float()  # [B, V]
        step = self.compiled or self.step
        autocast = nullcontext if self.folded else self.autocast  # folded, all is of one dtype; looking takes 4% of a step
        for i in range(max_new_tokens):
            with torch.inference_mode(), autocast():  # never across a yield: both are states of the whole thread
                if i:
                    logits = step(token, w, batch.lengths + i - 1, cache, longest + i)
                # Eq. (8): p(R | Z) = prod_s p(R_s | Z, R_{0:s-1}; theta_l, theta_a)
                token = pick(logits, temperature, top_p, random)  # [B]
            ids = token.tolist()
            done = [d or t == eos for d, t in zip(done, ids)]
            if all(done):
                return
            yield [None if d else t for d, t in zip(done, ids)]
            if complete:
                for b in (b for b in range(B) if not done[b]):
                    answers[b].append(ids[b])
                    done[b] = complete(answers[b])
                if all(done):
                    return

    def generate(self, batch, max_new_tokens: int, eos: int, **sampling) -> list[list[int]]:
        """The answers of all rows, without EOS; arguments as for `stream`."""
        answers = [[] for _ in range(len(batch.tokens))]
        for step in self.stream(batch, max_new_tokens, eos, **sampling):
            for answer, token in zip(answers, step):
                if token is not None:
                    answer.append(token)
        return answers

    # -----------------------------------------------------------------------------------------------
    # files

    def fingerprint(self) -> str:
        """A hash of the frozen base: 64 spread values of every frozen tensor, the same for fp32 and bf16 copies."""
        digest = hashlib.sha256()
        for name, p in sorted(self.named_parameters()):
            if "adapter_" not in name:
                values = p.detach().flatten()[:: max(1, p.numel() // 64)][:64]
                digest.update(f"{name}{list(p.shape)}".encode())
                digest.update(values.to(torch.bfloat16).float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path, **meta) -> None:
        """Write the adapters with everything needed to rebuild this model around the same base."""
        adapters.save_adapters(path, self, {"lavin": asdict(self.cfg), "llama": asdict(self.llama.cfg),
                                            "base": self.fingerprint(), **meta})


def pick(logits: torch.Tensor, temperature: float, top_p: float, random: torch.Generator) -> torch.Tensor:
    """logits [B, V] -> tokens [B]: greedy at temperature 0, else top-p (nucleus) sampling."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = torch.softmax(logits / temperature, -1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the fewest tokens whose mass reaches top_p
    c = p.cumsum(-1)
    u = torch.rand((), generator=random).item()  # one draw for all rows
    i = (c <= u * c[:, -1:]).sum(-1, keepdim=True).clamp(max=c.shape[1] - 1)
    return order.gather(-1, i)[:, 0]


def load(path: str | Path, llama_path: str | Path, clip_path: str | Path, device="cpu", dtype=torch.float32,
         any_base: bool = False) -> tuple[LaVIN, dict]:
    """(model, metadata) from an adapter file, ours or a released .pth, and the base it was trained on.

    ValueError if the base has other sizes, or other weights unless `any_base`.
    """
    tensors, meta = weights.read_adapters(path)
    cfg = LaVINConfig(**{**meta["lavin"], "adapter": AdapterConfig(**meta["lavin"]["adapter"])})
    llama = LLaMA.from_pretrained(llama_path, device, dtype)
    sizes = [(size["dim"], size["n_layers"]) for size in (meta["llama"], asdict(llama.cfg))]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{path}: for a LLaMA of (width, layers) {sizes[0]}, {llama_path} has {sizes[1]}; "
                         "point --llama at the one it was trained on")
    vit = VisionTransformer.from_pretrained(clip_path, device, dtype) if cfg.vision else None
    model = LaVIN(llama, vit, cfg)
    adapters.load_adapters(model, tensors, str(path))
    if meta["base"] not in (None, model.fingerprint()) and not any_base:  # None: released files do not tell
        raise ValueError(f"{path}: trained on another base than {llama_path} + {clip_path} (fingerprint {meta['base']}, "
                         f"here {model.fingerprint()}); point --llama and --clip at that one, or pass --any_base")
    return model.to(device).eval(), meta
