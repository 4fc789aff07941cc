"""What a training run must cost: FLOPs, memory, hours. Arithmetic only; bench.py holds it against what is measured.

    python train.py --dry_run --llama 13B --clip ViT-L/14 --recipe paper        prices a run, needs no weights

Shapes: d, L, H LLaMA's width, layers, heads; C, t width and tokens of the ViT; r adapter width; T tokens of a micro-batch,
packed; S tokens of one sequence; R targets; N pictures; e bytes of a frozen value.
"""
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

import clip
import data
import llama
import prompts
import weights
from adapters import AdapterConfig, trainable
from clip import CLIPConfig, VisionTransformer
from lavin import LOSS_ROWS, LaVIN, LaVINConfig
from llama import LLaMA, LLaMAConfig
from official.tokenizer import Tokenizer

PROBLEMS, EPOCHS = 12_726, 20  # the paper's recipe: ScienceQA's train split, 20 times

# tokens/prompt tokens of ScienceQA as trained (LLaMA's tokenizer, QCM-ALE, cut at 512, six slots a picture), measured on
# 1,773 problems: 40 equally frequent kinds without a picture and 40 with one. Twenty steps of length, a short and a long
# prompt each. Mean 303, of them 215 response.
KINDS = """
77/46 112/75 172/41 169/57 194/46 195/76 204/47 205/65 216/47 214/62 229/52 232/76 246/57 247/98 261/52 260/85 271/55
271/105 281/56 280/94 287/56 287/73 296/50 294/72 317/62 322/96 355/59 355/123 388/56 386/105 424/75 428/107 458/78
461/137 486/101 486/187 512/78 510/162 512/77 512/135

68/50 70/53 80/51 78/56 155/48 132/62 189/49 187/61 214/48 216/60 230/49 231/57 243/51 245/84 257/51 257/91 270/50 270/86
282/60 281/114 294/59 296/114 309/67 309/112 324/70 327/104 343/74 346/122 368/84 366/131 391/76 390/133 428/92 429/184
463/105 473/233 507/149 510/279 512/177 512/282
"""


class Kind(NamedTuple):
    """A problem, as far as the machine can tell."""
    length: int
    prompt: int
    picture: bool


def kinds(max_len: int = 512) -> list[Kind]:
    """The 80 kinds of ScienceQA problems that were measured, cut at max_len."""
    found = []
    for picture, table in enumerate(KINDS.strip().split("\n\n")):
        found += [Kind(min(int(length), max_len), int(prompt), bool(picture))
                  for length, prompt in (kind.split("/") for kind in table.split()) if int(prompt) < max_len]
    return found


def draw(n: int, seed: int) -> list[Kind]:
    known = kinds()
    return [known[i] for i in np.random.default_rng(seed).integers(0, len(known), n)]


class Load(NamedTuple):
    """What some problems add up to."""
    tokens: float  # T
    squares: float  # of every sequence's length, for attention
    targets: float  # R
    pictures: float  # N
    forwards: float = 1  # micro-batches it is spread over

    @classmethod
    def of(cls, problems: list[Kind], forwards: float = 1) -> "Load":
        return cls(sum(p.length for p in problems), sum(p.length ** 2 for p in problems),
                   sum(p.length - p.prompt for p in problems), sum(p.picture for p in problems), forwards)

    def times(self, x: float) -> "Load":
        return Load(*(x * field for field in self))


def balance(ranks: int = 8, batch_size: int = 32, steps: int = 500) -> float:
    """tokens of the slowest rank / tokens of the mean rank, over many global batches"""
    ratios = []
    for step in range(steps):
        lengths = [p.length for p in draw(batch_size, step)]
        hands = data.deal(list(range(batch_size)), lengths, ranks, batch_size)
        loads = [sum(lengths[i] for micro in hand for i in micro) for hand in hands]
        ratios.append(max(loads) * ranks / sum(loads))
    return sum(ratios) / steps


# ---------------------------------------------------------------------------------------------------
# FLOPs

USEFUL = "LLaMA", "vocabulary", "attention", "pictures"  # what nobody can leave out; the rest is the adapters' price


def flops(model: LaVIN, load: Load, checkpoint: bool = False, in_full: bool = False) -> dict[str, float]:
    """Forward and backward of `load`, by line; a multiplication and its addition are 2.

    in_full: count attention as torch's FlopCounterMode does, which takes no notice of a causal mask
    """
    c, r = model.llama.cfg, model.cfg.adapter.dim
    d, L = c.dim, c.n_layers
    block = 4 * d * d + 3 * d * c.ffn_dim  # weights of a block's seven products
    mm = model.cfg.adapter.kind == "mm"
    down, both = r, 2 * r  # an adapter's products, per unit of width: phi_d, and both phi_u
    up = both if mm else r
    lines = {
        # a frozen product: 2 a weight and token forward, 2 for the gradient of its input, none for the weights'
        "LLaMA": 4 * L * block * load.tokens,
        # only rows with a target; the loss makes their gradient in the forward
        "vocabulary": 4 * c.vocab_size * d * load.targets,
        # forward Q K' and P V; backward Q K' again, then the gradients of P, V, Q, K: seven products of 2 S^2 d, of which
        # half lies under the causal mask
        "attention": (14 if in_full else 7) * L * d * load.squares,
        # forward, once more in the backward, and the gradients of input and weights. Without a picture nothing before the
        # first block trains, so its input needs no gradient
        "adapters": d * load.tokens * (L * 8 * (down + up) - 2 * down * (not load.pictures)),
        # t_m, both of them, once a forward through all but the attention matrix (v, o, the FFN; kept for the backward), and
        # the routers' [d, 2] products. Behind the last router nothing has a gradient
        "modality tokens": mm * load.forwards * 2 * (12 * L * d + 2 * (3 * L - 2) * d * (down + up) +
                                                2 * (2 * L - 1) * (block - 2 * d * d)),
    }
    if checkpoint:  # the blocks' forward once more, up to what enters the last product, f to d
        lines["blocks again"] = 2 * L * (block - d * c.ffn_dim + d * (down + up)) * load.tokens + \
            (4 if in_full else 2) * L * d * load.squares
    if model.vit is not None:
        v, joint = model.vit.cfg, model.cfg.vit_adapters  # not joint: nothing in the ViT trains, so no backward either
        C, patches = v.width, (v.image_size // v.patch_size) ** 2
        t, n = patches + 1, model.vit.n_cls
        # patches; 12 C^2 weights a block; two or seven products of 2 t^2 C, without a mask
        lines["pictures"] = load.pictures * (2 * 3 * v.patch_size ** 2 * C * patches + v.layers * (
            (4 if joint else 2) * 12 * C * C * t + (14 if joint else 4) * t * t * C))
        # the neck trains, too: three products, though none for the gradient of an input that needs none
        h = model.cfg.neck_dim
        lines["adapters"] += load.pictures * n * (6 * h * d + (6 if joint else 4) * C * h)
        if joint:  # as in LLaMA, and a router on [cls]; before the first block there is nothing to send a gradient to
            lines["adapters"] += load.pictures * C * (v.layers * (8 * (down + both) * t + 16) - 2 * down * t - 4)
    return lines


def useful(lines: dict[str, float]) -> float:
    return sum(lines[name] for name in USEFUL if name in lines)


# ---------------------------------------------------------------------------------------------------
# memory

def memory(model: LaVIN, dtype: torch.dtype, load: Load, checkpoint: bool = False) -> dict[str, float]:
    """Bytes at the peak of one micro-batch, by line. The model may lie on the meta device."""
    c, e, T = model.llama.cfg, dtype.itemsize, load.tokens
    n_trained = sum(p.numel() for p in trainable(model).values())
    # x, q, k, v, attention's output, x again (d each), gate, up (f each); attention's log-sums in fp32. Norms, adapters and
    # silu(gate) up are worked out again, and frozen products keep nothing
    block = T * (e * (6 * c.dim + 2 * c.ffn_dim) + 4 * c.n_heads)
    # what the last norm reads, in fp32, and the gradient of the rows with targets
    loss = T * 4 * c.dim + load.targets * e * c.dim
    # what comes and goes on top of all that is kept. In the loss: a chunk of logits, as such, as log-softmax and as
    # gradient, all fp32. In the last block's backward, when the loss is gone: silu(gate), three gradients beside it, and x's
    chunk = 12 * min(LOSS_ROWS, load.targets) * c.vocab_size
    backward = e * T * (4 * c.ffn_dim + c.dim) + checkpoint * block
    lines = {
        "frozen weights": e * (sum(p.numel() for p in model.parameters()) - n_trained),
        "adapters": 4 * n_trained,
        "gradients": 4 * n_trained,
        "AdamW": 8 * n_trained,
        "LLaMA activations": c.n_layers * (e * T * c.dim if checkpoint else block),
        "ViT activations": 0,
        "loss and tables": loss + T * 4 * (c.dim // c.n_heads + 2 * c.n_layers),  # rotary, and routing weights
        "workspace": max(chunk, backward - loss),
    }
    if model.vit is not None and model.cfg.vit_adapters:
        v = model.vit.cfg
        t = (v.image_size // v.patch_size) ** 2 + 1
        # a block keeps x, qkv, attention's output, x again and the MLP's hidden: 10 C a token
        lines["ViT activations"] = load.pictures * v.layers * t * (10 * v.width * e + 4 * v.heads)
    return lines


# ---------------------------------------------------------------------------------------------------
# the price of a run (train.py --dry_run)

A100 = 312e12  # bf16 FLOP/s on paper
STATED = 0.7  # share of it that a price assumes


def sizes(name: str, presets: dict, config: type, read: Callable):
    """of a preset, or of a folder of weights, whose tensors stay where they are"""
    if name in presets:
        return presets[name]
    if not Path(name).exists():
        raise ValueError(f"{name}: neither a folder of weights nor one of {', '.join(presets)}")
    return config(**read(name)[0])


def problems_of(cfg, model: LaVIN) -> tuple[list[Kind], str]:
    """What is in --data, by the tokenizer beside --llama. If either is not here: as many problems as ScienceQA has."""
    sources = list(prompts.mixture(cfg.data))
    if not all(Path(path).exists() for path in (cfg.llama, *(source.path for source in sources))):
        known = [kind._replace(picture=kind.picture and cfg.vision) for kind in kinds(cfg.max_len)]
        return [known[i % len(known)] for i in range(PROBLEMS)], "ScienceQA"
    tokenizer = Tokenizer(cfg.llama, model.llama.cfg.vocab_size)
    found = []
    for source in sources:
        samples = source.read("train", cfg.format, cfg.captions, cfg.vision)
        examples, _ = data.encode_all(samples, tokenizer, model.vit.n_cls if model.vit else 0, cfg.max_len)
        found += [Kind(e.length, e.start, e.n_image > 0) for e in examples]
    return found, cfg.data


def table(lines: dict[str, float], units: dict[str, float]) -> list[str]:
    """right-aligned lines, in the first unit that the largest of them fills"""
    unit = next((unit for unit, size in units.items() if max(lines.values()) >= size), [*units][-1])
    return [f"  {name:20}{x / units[unit]:10.2f} {unit}" for name, x in lines.items()]


def quote(cfg) -> str:
    """What train.py would need with its flags `cfg`: parameters, memory, FLOPs, time. Reads no weights."""
    c = sizes(cfg.llama, llama.PRESETS, LLaMAConfig, weights.read_llama)
    v = sizes(cfg.clip, clip.PRESETS, CLIPConfig, weights.read_clip) if cfg.vision else None
    with torch.device("meta"):
        model = LaVIN(LLaMA(c), VisionTransformer(v) if v else None, LaVINConfig(
            AdapterConfig(cfg.adapter, cfg.adapter_dim), cfg.vision, cfg.vit_adapters))
    n, trained = (sum(p.numel() for p in ps) for ps in (model.parameters(), trainable(model).values()))
    dtype = torch.float32 if cfg.dtype == "fp32" else torch.bfloat16
    problems, source = problems_of(cfg, model)
    load = Load.of(problems, len(problems) / cfg.micro_batch)
    longest = Kind(max(p.length for p in problems), 0, cfg.vision)
    peak = memory(model, dtype, Load.of([longest] * cfg.micro_batch), cfg.checkpoint)
    work = flops(model, load.times(cfg.epochs), cfg.checkpoint)
    time = sum(work.values()) / (STATED * A100)
    bases, base = " + ".join([cfg.llama, cfg.clip][:1 + cfg.vision]), str(dtype).removeprefix("torch.")
    return "\n".join([
        f"{bases}, recipe {cfg.recipe}: {n:,} parameters, of which {trained:,} train",
        f"memory of one GPU, base in {base}, micro-batch {cfg.micro_batch} x {longest.length} tokens",
        *table({**peak, "peak": sum(peak.values())}, {"GB": 1e9, "MB": 1e6}),
        f"work, {cfg.epochs:g} x {len(problems):,} problems as in {source}, {load.tokens / len(problems):.0f} tokens each",
        *table({**work, "all": sum(work.values())}, {"PFLOP": 1e15, "TFLOP": 1e12}),
        f"time at {STATED:.0%} of an A100's {A100 / 1e12:.0f} TFLOP/s: stated, not measured",
        *table({"1 GPU": time, "8 GPUs": time / 8 * balance(8, cfg.batch_size)}, {"h": 3600, "min": 60, "s": 1})])
