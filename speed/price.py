"""Predict what a training run needs: FLOPs, memory, hours. Tests and bench.py compare this with measurements.

    python train.py --dry_run --llama 13B --clip ViT-L/14 --recipe paper     print it; needs no weights
    python -m speed.price                              print the computed columns of official/MODELS.md

Shapes: d LLaMA's width, L its layers; C and t the ViT's width and tokens; r adapter width; T tokens of a
micro-batch. All sequences of a micro-batch are packed end to end.
"""
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

import data
import prompts
import weights
from adapters import AdapterConfig, trainable
from clip import CLIPConfig, VisionTransformer
from lavin import LaVIN, LaVINConfig
from llama import LLaMA, LLaMAConfig
from official.tokenizer import Tokenizer
from speed import chunked_loss, nf4, shard
from speed.shapes import LLAMAS, TIED, VITS

PROBLEMS, EPOCHS = 12_726, 20  # the paper's recipe: ScienceQA's train split, 20 times

# Lengths of ScienceQA's problems: tokens/prompt tokens, with LLaMA's tokenizer, format QCM-ALE, cut at 512,
# six visual tokens per image. The first table is for problems without an image, the second for those with
# one. Each table has 40 equally frequent kinds of problems: twenty steps of the length, each with a short and
# a long prompt. They summarise 1,773 problems, whose mean length is 303, of which 215 are response.
KINDS = """
77/46 112/75 172/41 169/57 194/46 195/76 204/47 205/65 216/47 214/62 229/52 232/76 246/57 247/98
261/52 260/85 271/55 271/105 281/56 280/94 287/56 287/73 296/50 294/72 317/62 322/96 355/59 355/123
388/56 386/105 424/75 428/107 458/78 461/137 486/101 486/187 512/78 510/162 512/77 512/135

68/50 70/53 80/51 78/56 155/48 132/62 189/49 187/61 214/48 216/60 230/49 231/57 243/51 245/84
257/51 257/91 270/50 270/86 282/60 281/114 294/59 296/114 309/67 309/112 324/70 327/104 343/74 346/122
368/84 366/131 391/76 390/133 428/92 429/184 463/105 473/233 507/149 510/279 512/177 512/282
"""


class Kind(NamedTuple):
    """What determines the cost of a problem."""
    length: int  # tokens of the whole sequence
    prompt: int  # of these, tokens before the first target
    picture: bool


def kinds(max_len: int = 512) -> list[Kind]:
    """The kinds of ScienceQA's problems, cut at max_len. A kind whose prompt fills max_len is left out."""
    found = []
    for picture, table in enumerate(KINDS.strip().split("\n\n")):
        found += [Kind(min(int(length), max_len), int(prompt), bool(picture))
                  for length, prompt in (kind.split("/") for kind in table.split()) if int(prompt) < max_len]
    return found


def draw(n: int, seed: int) -> list[Kind]:
    """n random problems with the lengths of ScienceQA."""
    known = kinds()
    return [known[i] for i in np.random.default_rng(seed).integers(0, len(known), n)]


class Load(NamedTuple):
    """What determines the cost of a number of problems."""
    tokens: float
    squares: float  # sum of the squared sequence lengths, for attention
    targets: float
    pictures: float
    forwards: float = 1  # number of micro-batches

    @classmethod
    def of(cls, problems: list[Kind], forwards: float = 1) -> "Load":
        return cls(sum(p.length for p in problems), sum(p.length ** 2 for p in problems),
                   sum(p.length - p.prompt for p in problems), sum(p.picture for p in problems), forwards)

    def times(self, x: float) -> "Load":
        """The load of x times as many problems."""
        return Load(*(x * field for field in self))


def balance(ranks: int = 8, batch_size: int = 32, steps: int = 500) -> float:
    """Tokens of the slowest rank / tokens of the mean rank, averaged over many global batches."""
    ratios = []
    for step in range(steps):
        lengths = [p.length for p in draw(batch_size, step)]
        hands = data.split_batch(list(range(batch_size)), lengths, ranks, batch_size)
        loads = [sum(lengths[i] for micro in hand for i in micro) for hand in hands]
        ratios.append(max(loads) * ranks / sum(loads))
    return sum(ratios) / steps


# ---------------------------------------------------------------------------------------------------
# FLOPs

USEFUL = "LLaMA", "vocabulary", "attention", "pictures"  # the rest is what the adapters cost


def flops(model: LaVIN, load: Load, checkpoint: bool = False, in_full: bool = False) -> dict[str, float]:
    """FLOPs of a forward and backward pass over `load`, by line. Every formula counts a multiply-add as 2.

    in_full: count attention as torch's FlopCounterMode does, which ignores the causal mask
    """
    c, r = model.llama.cfg, model.cfg.adapter.dim
    d, L = c.dim, c.n_layers
    d_kv = d * c.n_kv_heads // c.n_heads  # width of all key heads together; d without grouped queries
    block = 2 * d * (d + d_kv) + 3 * d * c.ffn_dim  # weights of a block's seven matrices
    mm = model.cfg.adapter.kind == "mm"
    phi_d, phi_u = r, 2 * r if mm else r  # multiply-adds per token, divided by d; an MM-Adapter has two phi_u
    lines = {
        # a frozen matrix: forward and the gradient of its input, but no gradient of its weights
        "LLaMA": 4 * L * block * load.tokens,
        # only for targets; the loss computes this gradient in the forward pass
        "vocabulary": 4 * c.vocab_size * d * load.targets,
        # forward Q K^T and P V; backward Q K^T again and the gradients of P, V, Q and K. Each of these seven
        # products takes 2 S^2 d for a sequence of S tokens. The causal mask needs half of that.
        "attention": (14 if in_full else 7) * L * d * load.squares,
        # forward, recomputed forward, gradients of input and weights. The phi_u of a plain RepAdapter is not
        # recomputed, because the gradient needs its input only. Without an image nothing before the first
        # adapter trains, so its input needs no gradient.
        "adapters": d * load.tokens * (L * (8 * phi_d + (8 if mm else 6) * phi_u)
                                       - 2 * phi_d * (not load.pictures)),
        "modality tokens": mm and modality_token_flops(d, L, block, phi_d + phi_u) * load.forwards,
    }
    if checkpoint:  # forward of each block again, up to the input of its last matrix, w2 [d, ffn_dim]
        lines["recomputed blocks"] = 2 * L * (block - d * c.ffn_dim + d * (phi_d + phi_u)) * load.tokens + \
            (4 if in_full else 2) * L * d * load.squares
    if model.vit is not None:
        lines["pictures"], of_adapters = (x * load.pictures for x in picture_flops(model))
        lines["adapters"] += of_adapters
    return lines


def modality_token_flops(d: int, L: int, block: int, phi: int) -> int:
    """Both modality tokens, once per forward pass. Nothing after the last router needs a gradient."""
    routers = 3 * L * 2 * d  # a router is a [d, 2] matrix: forward, gradients of input and weights
    adapters = (4 * L - 3) * phi * d  # forward, recomputed forward, gradients of input and weights
    frozen = (2 * L - 1) * block  # forward, gradient of the input
    attention = (14 * L - 10) * d  # of a token to itself; as in `flops`, but the last layer has no backward
    return 2 * (2 * (routers + adapters + frozen) + attention)


def picture_flops(model: LaVIN) -> tuple[int, int]:
    """One picture: what the frozen ViT takes, and what the neck and the ViT's adapters take."""
    v, h, d, r = model.vit.cfg, model.cfg.neck_dim, model.llama.cfg.dim, model.cfg.adapter.dim
    joint = model.cfg.vit_adapters  # otherwise nothing in the ViT trains, so it needs no backward pass
    C, patches, n = v.width, (v.image_size // v.patch_size) ** 2, model.vit.n_visual
    t = patches + 1
    # the patches; 12 C^2 weights in a block; two attention products forward and five backward, without a mask
    frozen = 2 * 3 * v.patch_size ** 2 * C * patches + v.layers * (
        (4 if joint else 2) * 12 * C * C * t + (14 if joint else 4) * t * t * C)
    # the neck: its input needs a gradient only if the ViT has adapters
    adapters = n * (6 * h * d + (6 if joint else 4) * C * h)
    if joint:  # as in LLaMA; the router reads one token and has 2 C weights
        adapters += C * (v.layers * (8 * (r + 2 * r) * t + 16) - 2 * r * t - 4)
    return frozen, adapters


def useful(lines: dict[str, float]) -> float:
    """The FLOPs of the frozen models, forward and backward. No way of training the adapters avoids them."""
    return sum(lines[name] for name in USEFUL if name in lines)


# ---------------------------------------------------------------------------------------------------
# memory

def frozen_bytes(model: LaVIN, dtype: torch.dtype, bits: int = 16, ranks: int = 1) -> float:
    """Bytes of the frozen weights. The model may be on the meta device; there, its matrices have 16 bits.

    ranks: above 1, LLaMA's blocks are spread over so many (--shard)
    """
    c = model.llama.cfg
    others = sum(p.numel() for name, p in model.named_parameters()
                 if "adapter_" not in name and name.split(".")[-2] not in nf4.MATRICES)
    d_kv = c.dim * c.n_kv_heads // c.n_heads
    block = 2 * c.dim * (c.dim + d_kv) + 3 * c.dim * c.ffn_dim
    matrices = c.n_layers * block / ranks
    if ranks > 1:  # gathered are the block that runs and the one before it, which is not freed yet
        matrices += 2 * block
    return dtype.itemsize * others + matrices * (nf4.BITS / 8 if bits == 4 else dtype.itemsize)


def decoded_bytes(model: LaVIN, dtype: torch.dtype, bits: int) -> int:
    """Bytes that decoding from 4 bits uses: the largest matrix, a chunk of indices and fp32, the scales."""
    n = model.llama.cfg.dim * model.llama.cfg.ffn_dim
    return 0 if bits == 16 else dtype.itemsize * n + 6 * min(n, nf4.BLOCK * nf4.CHUNK) + 4 * n // nf4.BLOCK


def memory(model: LaVIN, dtype: torch.dtype, load: Load, checkpoint: bool = False,
           bits: int = 16, ranks: int = 1) -> dict[str, float]:
    """Bytes in use at the peak of one micro-batch, by line. The model may be on the meta device.

    bits: 4 if LLaMA's matrices are in 4 bits (speed/nf4.py); ranks: as for frozen_bytes
    """
    c, e, T = model.llama.cfg, dtype.itemsize, load.tokens
    n_trained = sum(p.numel() for p in trainable(model).values())
    # A block keeps x, q, the attention's output and x after the attention (d values each), k and v (d_kv
    # each), gate and up (ffn_dim each), and the attention's log-sums in fp32. See llama.py for the rest.
    d_kv = c.dim * c.n_kv_heads // c.n_heads
    block = T * (e * (4 * c.dim + 2 * d_kv + 2 * c.ffn_dim) + 4 * c.n_heads)
    # The loss keeps the input of the last norm in fp32, and the gradient of the hidden states at targets.
    loss = T * 4 * c.dim + load.targets * e * c.dim
    # Two peaks come on top of what is kept. In the loss, three tensors of a chunk's size exist in fp32:
    # log p, its gradient, and the gradient of the logits. In the backward pass of the last block, the loss is
    # already freed; alive are silu(gate), three gradients of its size, and the gradient of x.
    chunk = 12 * min(chunked_loss.ROWS, load.targets) * c.vocab_size
    backward = e * T * (4 * c.ffn_dim + c.dim)
    backward += checkpoint * block
    lines = {
        "frozen weights": frozen_bytes(model, dtype, bits, ranks),
        "adapters": 4 * n_trained,
        "gradients": 4 * n_trained,
        "AdamW": 8 * n_trained,
        "LLaMA activations": c.n_layers * (e * T * c.dim if checkpoint else block),
        "ViT activations": 0,
        "loss and tables": loss + T * 4 * (c.dim // c.n_heads + 2 * c.n_layers),  # rotary, routing
        "workspace": max(chunk, backward - loss) + decoded_bytes(model, dtype, bits),
    }
    if model.vit is not None and model.cfg.vit_adapters:
        v = model.vit.cfg
        t = (v.image_size // v.patch_size) ** 2 + 1
        # a block keeps x, q, k, v, the attention's output, x after the attention (C each), the MLP's hidden
        # units (4 C)
        lines["ViT activations"] = load.pictures * v.layers * t * (10 * v.width * e + 4 * v.heads)
    return lines


def answering(model: LaVIN, dtype: torch.dtype, slots: int, bits: int = 16) -> dict[str, float]:
    """Bytes in use while one row of `slots` tokens is answered, by line. 16 bits: the adapters are folded."""
    c, e, D = model.llama.cfg, dtype.itemsize, model.llama.cfg.dim // model.llama.cfg.n_heads
    kept = {name: p for name, p in trainable(model).items() if bits == 4 or not name.startswith("llama.")}
    return {"frozen weights": frozen_bytes(model, dtype, bits),
            "adapters": 4 * sum(p.numel() for p in kept.values()),
            "cache": 2 * e * c.n_layers * c.n_kv_heads * D * slots,
            "rotary table": 4 * 2 * D * c.max_seq_len * (bits == 16),  # of FastStep, for the whole context
            "a decoded matrix": decoded_bytes(model, dtype, bits)}


# ---------------------------------------------------------------------------------------------------
# train.py --dry_run

A100 = 312e12  # bf16 FLOP/s in its data sheet
ASSUMED_UTILISATION = 0.7


def sizes(name: str, presets: dict, config: type, read: Callable) -> tuple:
    """The config of a preset, or of a folder of weights, with its tensors. No tensor is read."""
    if name in presets:
        return presets[name], {}
    if not Path(name).exists():
        raise ValueError(f"{name}: neither a folder of weights nor one of {', '.join(presets)}")
    found, tensors = read(name)
    return config(**found), tensors


def on_meta(c: LLaMAConfig, tied: bool, v: CLIPConfig | None, cfg: LaVINConfig) -> LaVIN:
    """The model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        language = LLaMA(c)
        if tied:
            language.output.weight = language.tok_embeddings.weight
        return LaVIN(language, VisionTransformer(v) if v else None, cfg)


def build(cfg) -> LaVIN:
    """The model that train.py would build from its flags, on the meta device."""
    c, tensors = sizes(cfg.llama, LLAMAS, LLaMAConfig, weights.read_llama)
    v, _ = sizes(cfg.clip, VITS, CLIPConfig, weights.read_clip) if cfg.vision else (None, {})
    tied = tensors["output.weight"] is tensors["tok_embeddings.weight"] if tensors else cfg.llama in TIED
    adapter = AdapterConfig(cfg.adapter, cfg.adapter_dim)
    return on_meta(c, tied, v, LaVINConfig(adapter, cfg.vision, cfg.vit_adapters))


def problems_of(cfg, model: LaVIN) -> tuple[list[Kind], str]:
    """The problems of --data and their name. If --data or --llama is not on this disk: those of ScienceQA."""
    sources = list(prompts.mixture(cfg.data))
    if not all(Path(path).exists() for path in (cfg.llama, *(source.path for source in sources))):
        known = [kind._replace(picture=kind.picture and cfg.vision) for kind in kinds(cfg.max_len)]
        return [known[i % len(known)] for i in range(PROBLEMS)], "ScienceQA"
    tokenizer = Tokenizer(cfg.llama, model.llama.cfg.vocab_size)
    found = []
    for source in sources:
        samples = source.read("train", cfg.format, cfg.captions, cfg.vision)
        examples, _ = data.encode_all(samples, tokenizer, model.vit.n_visual if model.vit else 0, cfg.max_len)
        found += [Kind(e.length, e.length - e.n_targets, e.n_visual > 0) for e in examples]
    return found, cfg.data


def table(lines: dict[str, float], units: dict[str, float]) -> list[str]:
    """One line of text per entry. All have the same unit: the first one that the largest entry reaches."""
    unit = next((unit for unit, size in units.items() if max(lines.values()) >= size), [*units][-1])
    return [f"  {name:20}{x / units[unit]:10.2f} {unit}" for name, x in lines.items()]


def quote(cfg) -> str:
    """What train.py would need with the flags `cfg`: parameters, memory, FLOPs, time. Reads no weights."""
    nf4.check(cfg.bits)  # refuses an unknown number
    if cfg.shard:
        shard.check(cfg.bits)
    model = build(cfg)
    n = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in trainable(model).values())
    dtype = torch.float32 if cfg.dtype == "fp32" else torch.bfloat16
    problems, source = problems_of(cfg, model)
    load = Load.of(problems, len(problems) / cfg.micro_batch)
    longest = Kind(max(p.length for p in problems), 0, cfg.vision)
    ranks = 8 if cfg.shard else 1
    peak = memory(model, dtype, Load.of([longest] * cfg.micro_batch), cfg.recompute_blocks, cfg.bits, ranks)
    answer = sum(answering(model, dtype, longest.length, cfg.bits).values())
    stored = str(dtype).removeprefix("torch.") + " and LLaMA's matrices in 4 bits" * (cfg.bits == 4)
    work = flops(model, load.times(cfg.epochs), cfg.recompute_blocks)
    seconds = sum(work.values()) / (ASSUMED_UTILISATION * A100)
    times = {"1 GPU": seconds, "8 GPUs": seconds / 8 * balance(8, cfg.batch_size)}
    base = f"{cfg.llama} + {cfg.clip}" if cfg.vision else cfg.llama
    return "\n".join([
        f"{base}, recipe {cfg.recipe}: {n:,} parameters, of which {n_trained:,} train",
        f"memory of one GPU{' of 8' * cfg.shard}, base in {stored}, micro-batch {cfg.micro_batch} x "
        f"{longest.length} tokens",
        *table({**peak, "peak": sum(peak.values())}, {"GB": 1e9, "MB": 1e6}),
        f"memory to answer, one row of {longest.length} tokens",
        *table({"to answer": answer}, {"GB": 1e9, "MB": 1e6}),
        f"work, {cfg.epochs:g} x {len(problems):,} problems as in {source}, "
        f"{load.tokens / len(problems):.0f} tokens each on average",
        *table({**work, "all": sum(work.values())}, {"PFLOP": 1e15, "TFLOP": 1e12}),
        f"time at {ASSUMED_UTILISATION:.0%} of an A100's {A100 / 1e12:.0f} TFLOP/s: stated, not measured"
        + "; decoding the 4-bit matrices comes on top" * (cfg.bits == 4),
        *table(times, {"h": 3600, "min": 60, "s": 1})])


def row(name: str) -> str:
    """A model with ViT-L/14: LLaMA's parameters, those that train, GB to train (checkpointed), to answer.

    bf16; 4 samples of 512 tokens in training, 512 tokens of question and answer.
    """
    model = on_meta(LLAMAS[name], name in TIED, VITS["ViT-L/14"], LaVINConfig())
    n_trained = sum(p.numel() for n, p in model.named_parameters() if "adapter_" in n)
    n = sum(p.numel() for n, p in model.llama.named_parameters() if "adapter_" not in n)
    load = Load.of([Kind(512, 0, True)] * 4)
    train, saving = (sum(memory(model, torch.bfloat16, load, checkpoint).values())
                     for checkpoint in (False, True))
    answer = sum(answering(model, torch.bfloat16, 512).values())
    return f"| {name} | {n:,} | {n_trained:,} | {train / 1e9:.1f} / {saving / 1e9:.1f} | {answer / 1e9:.1f} |"


if __name__ == "__main__":
    print(*map(row, [name for name in LLAMAS if name != "tiny"]), sep="\n")
