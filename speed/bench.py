"""What training and answering do cost: time, memory, FLOPs, beside what price.py says they must.

    python -m speed.bench train --preset small                           optimizer steps on ScienceQA's real lengths
    python -m speed.bench train --preset small --vs hf                   the same in turn with Hugging Face + PEFT (LoRA)
    python -m speed.bench decode --preset small                          greedy decoding: bare, folded, unfolded LLaMA in turn
    python -m speed.bench decode --preset small --vs hf                  the same in turn with Hugging Face's generate
    python -m speed.bench memory --preset 7B --layers 2 --dtype bf16     what is held, kept for the backward, and the peak

Weights and tokens are random, made on the device. The last line on stdout is one JSON object, all else goes
to stderr.
"""
import json
import os
import sys
import weakref
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Callable

import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

import cli
import clip
import data
import llama
from adapters import AdapterConfig, MMAdapter, trainable
from clip import CLIPConfig, VisionTransformer
from lavin import LaVIN, LaVINConfig
from llama import LLaMA, LLaMAConfig
from prompts import Sample
from speed import decoding
from speed.machine import matmul_peak, seconds
from speed.price import A100, EPOCHS, PROBLEMS, Kind, Load, balance, draw, flops, kinds, memory, useful

PRESETS = {
    "tiny": (llama.PRESETS["tiny"], clip.PRESETS["tiny"]),
    "small": (LLaMAConfig(dim=512, n_layers=8, n_heads=8, ffn_dim=1376),
              CLIPConfig(width=128, layers=6, heads=2, cls_every=1)),
    "7B": (llama.PRESETS["7B"], clip.PRESETS["ViT-L/14"]),
    "13B": (llama.PRESETS["13B"], clip.PRESETS["ViT-L/14"]),
}


@dataclass
class Config:
    """python -m speed.bench train|decode|memory: measure, and compare with what was predicted."""
    preset: str = "small"  # sizes: tiny, small (7B with an eighth of the width), 7B, 13B
    layers: int = 0  # [0, inf) keep only so many LLaMA layers, so that a large width fits; 0: all
    batch_size: int = 32  # [1, inf) train: samples of a step
    micro_batch: int = 4  # [1, inf) train, memory: samples of one forward
    burn_in: int = 2  # [0, inf) steps or answers before the clock runs
    steps: int = 5  # [1, inf) steps or answers timed; the median counts
    new_tokens: int = 64  # [2, inf) decode: length of an answer
    vs: str = ""  # hf = Hugging Face in turn with us; train: with PEFT's LoRA, text only; decode: the folded weights
    compile: bool = False  # decode: the compiled step too; needs g++
    seed: int = 0  # [0, inf) of weights, lengths and tokens
    device: str = "auto"  # cuda, cpu, ...
    dtype: str = "auto"  # of the frozen base: bf16 or fp32


# ---------------------------------------------------------------------------------------------------
# what a step takes

def counted_flops(f: Callable) -> int:
    """torch's own count; its table lacks the CPU's attention"""
    counter, aten = FlopCounterMode(display=False), torch.ops.aten
    for name in ("_scaled_dot_product_flash_attention{}", "_scaled_dot_product_flash_attention{}_backward"):
        cpu, cuda = (getattr(aten, name.format(x)) for x in ("_for_cpu", ""))
        counter.flop_registry[cpu] = counter.flop_registry[cuda]
    with counter:
        f()
    return counter.get_total_flops()


def saved_bytes(f: Callable, model: nn.Module) -> int:
    """What autograd keeps of f() for its backward: each storage once, parameters not counted."""
    packed = []

    def pack(x):
        packed.append(weakref.ref(x))  # weak: what f() frees again is not kept for the backward
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = f()  # holds the graph
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for x in (ref() for ref in packed) if x is not None}
    for p in model.parameters():
        storages.pop(p.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values())


def block_bytes(c: LLaMAConfig, dtype: torch.dtype, device: torch.device, lengths: tuple[int, ...] = (300, 212)) -> float:
    """Bytes that one LLaMA block with its adapter keeps of a token, measured."""
    with torch.device("meta"):
        model = LLaMA(replace(c, n_layers=1, vocab_size=1))
        model.layers[0].adapter_attn = MMAdapter(c.dim, AdapterConfig())
    materialise(model, device, dtype)
    model.norm = nn.Identity()
    x = torch.randn(1, sum(lengths), c.dim, device=device).to(dtype).requires_grad_()
    w = torch.full((1, 1, sum(lengths), 2), 0.5, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        return saved_bytes(lambda: model(x, w, list(lengths)), model) / sum(lengths)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What stays between steps: parameters, gradients, AdamW's moments."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    moments = [x for state in optimizer.state.values() for x in state.values()]
    return sum(x.nbytes for x in [*model.parameters(), *grads, *moments])


def peak_bytes(runner, problems: list[Kind], device: torch.device) -> int:
    """The most that is allocated while the runner takes a step of one micro-batch, with what it holds all the time."""
    held, batches = held_bytes(runner.model, runner.optimizer), runner.prepare(problems)
    assert len(batches) == 1, "a step of one micro-batch"
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        runner.step(batches)
        return held + torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        runner.step(batches)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return held + max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


# ---------------------------------------------------------------------------------------------------
# models and batches

def materialise(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Random weights for a model on the meta device, made where and as what they are used."""
    trained = trainable(model)
    for name, p in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        x = torch.empty(p.shape, device=device, dtype=torch.float32 if name in trained else dtype)
        x = x.normal_(std=0.02) if p.ndim > 1 else x.fill_(leaf == "weight")  # vectors: norms, and biases
        setattr(model.get_submodule(owner), leaf, nn.Parameter(x, requires_grad=name in trained))


def build(cfg: Config, device: torch.device, dtype: torch.dtype, vision: bool = True) -> LaVIN:
    """A preset with random weights; ValueError if it is unknown or does not fit."""
    if cfg.preset not in PRESETS:
        raise ValueError(f"unknown --preset {cfg.preset!r}; known: {', '.join(PRESETS)}")
    c, v = PRESETS[cfg.preset]
    c = replace(c, n_layers=cfg.layers or c.n_layers)
    with torch.device("meta"):
        model = LaVIN(LLaMA(c), VisionTransformer(v) if vision else None, LaVINConfig(vision=vision))
    need = dtype.itemsize * sum(p.numel() for p in model.parameters())
    have = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else \
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise ValueError(f"--preset {cfg.preset}: the weights are {need / 1e9:.1f} GB, {device} has {have / 1e9:.1f}; "
                         "give --dtype bf16 or fewer --layers")
    torch.manual_seed(cfg.seed)
    materialise(model, device, dtype)
    return model


def examples_of(problems: list[Kind], vocab_size: int, n_cls: int) -> list[data.Example]:
    """random tokens; any picture will do"""
    picture = Sample("", "", "", Path(__file__).parents[1] / "tiny/demo.png", {})
    examples = []
    for p in problems:
        n_image = n_cls * p.picture
        head, rest = (torch.randint(3, vocab_size, (n,)).tolist() for n in (4, p.length - n_image - 4))
        examples.append(data.Example(picture, head, n_image, rest, p.prompt - n_image - 4))
    return examples


def micro_batches(problems: list[Kind], size: int) -> list[list[Kind]]:
    (hand,) = data.deal(list(range(len(problems))), [p.length for p in problems], 1, size)
    return [[problems[i] for i in micro] for micro in hand]


class Ours:
    """An optimizer step as train.py takes it."""

    def __init__(self, cfg: Config, model: LaVIN):
        self.cfg, self.model = cfg, model.train()
        self.optimizer = torch.optim.AdamW(trainable(model).values(), fused=True)

    def batch(self, problems: list[Kind]) -> data.Batch:
        n_cls, size = (self.model.vit.n_cls, self.model.vit.cfg.image_size) if self.model.vit else (0, 0)
        examples = examples_of(problems, self.model.llama.cfg.vocab_size, n_cls)
        batch, dropout = data.collate(examples, size, "clip"), data.Dropout.of(self.model)
        if dropout:  # as in training
            batch = batch._replace(**dropout.masks(examples, [[i] for i in range(len(problems))]))
        return batch.to(self.model.device)

    def loss(self, batch: data.Batch) -> torch.Tensor:
        with self.model.autocast():
            return self.model(batch)

    def prepare(self, problems: list[Kind]) -> list[data.Batch]:
        return [self.batch(micro) for micro in micro_batches(problems, self.cfg.micro_batch)]

    def step(self, batches: list[data.Batch]) -> None:
        n_targets = sum(len(batch.targets) for batch in batches)
        for batch in batches:
            self.loss(batch).div(n_targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


class HuggingFace:
    """The same step of Hugging Face's LLaMA with PEFT's LoRA on q and v, the way it is commonly trained: micro-batches as
    they come, padded to the longest, sdpa attention, its own loss. Without dropout, which ours has."""

    def __init__(self, cfg: Config, c: LLaMAConfig, device: torch.device, dtype: torch.dtype):
        try:
            import peft
            import transformers
        except ImportError as e:
            raise ValueError(f"--vs hf: the package {e.name} is not here; pip install transformers peft") from None
        config = transformers.LlamaConfig(
            hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
            vocab_size=c.vocab_size, rms_norm_eps=c.norm_eps, use_cache=False, attn_implementation="sdpa")
        with torch.device(device):
            base = transformers.LlamaForCausalLM(config).to(dtype)
        lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.cfg, self.model = cfg, peft.get_peft_model(base, lora).train()
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], fused=True)

    def prepare(self, problems: list[Kind]) -> list[dict]:
        batches, n, device = [], self.cfg.micro_batch, self.model.device
        for i in range(0, len(problems), n):
            batch = data.collate(examples_of(problems[i: i + n], self.model.config.vocab_size, 0), 0, "clip").to(device)
            labels = torch.full_like(batch.tokens, -100)
            labels[batch.predict_at + 1] = batch.targets  # it shifts them itself
            padded = [pad_sequence(x.split(batch.lengths), batch_first=True, padding_value=p)
                      for x, p in ((batch.tokens, 0), (torch.ones_like(labels), 0), (labels, -100))]
            batches.append(dict(zip(("input_ids", "attention_mask", "labels"), padded)))
        return batches

    def step(self, batches: list[dict]) -> None:
        for batch in batches:
            with self.autocast:
                loss = self.model(**batch).loss / len(batches)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


# ---------------------------------------------------------------------------------------------------
# commands: each returns what goes into the last line

def train(cfg: Config, device: torch.device, dtype: torch.dtype) -> dict:
    model = build(cfg, device, dtype, vision=not cfg.vs)  # beside Hugging Face: text only on both sides
    runners = {"ours": Ours(cfg, model)}
    if cfg.vs:
        runners["hf"] = HuggingFace(cfg, model.llama.cfg, device, dtype)
    peak, times, steps = matmul_peak(device, dtype), {name: [] for name in runners}, []
    for k in range(cfg.burn_in + cfg.steps):
        problems = [p._replace(picture=p.picture and not cfg.vs) for p in draw(cfg.batch_size, cfg.seed + k)]
        for name, runner in runners.items():  # in turn: what else slows the machine, slows both
            batches = runner.prepare(problems)
            t = seconds(lambda: runner.step(batches), device)
            say(f"step {k + 1} {name}: {t:.3f} s" + ", burn-in" * (k < cfg.burn_in))
            times[name] += [t] * (k >= cfg.burn_in)
        steps += [Load.of(problems, -(-cfg.batch_size // cfg.micro_batch))] * (k >= cfg.burn_in)
    peak = max(peak, matmul_peak(device, dtype))  # the better of before and after: utilisation is not to be flattered

    largest = max(micro_batches(problems, cfg.micro_batch), key=lambda micro: Load.of(micro).tokens)
    load, batch = Load.of(largest), runners["ours"].batch(largest)
    rate = median(useful(flops(model, s)) / t for s, t in zip(steps, times["ours"]))
    recipe = useful(flops(model, Load.of(kinds()).times(PROBLEMS * EPOCHS / len(kinds()))))
    result = {
        "step_s": median(times["ours"]),
        "samples_per_s": cfg.batch_size / median(times["ours"]),
        "tokens_per_s": median(s.tokens / t for s, t in zip(steps, times["ours"])),  # real ones; there are no others
        "useful_tflop_per_s": rate / 1e12, "matmul_tflop_per_s": peak / 1e12, "utilisation": rate / peak,
        "flops_over_useful": median(sum(flops(model, s).values()) / useful(flops(model, s)) for s in steps),
        "micro_batch_flops": sum(flops(model, load, in_full=True).values()),
        "micro_batch_flops_torch": counted_flops(lambda: runners["ours"].loss(batch).backward()),
        "peak_gb": peak_bytes(runners["ours"], largest, device) / 1e9,
        "predicted_peak_gb": sum(memory(model, dtype, load).values()) / 1e9,
        "slowest_over_mean_rank": balance(),
        "recipe_hours_here": recipe / rate / 3600,
        # at the utilisation seen here, on the slowest of eight ranks: a projection, nobody ran it
        "recipe_hours_8_a100_projected": recipe / (rate / peak * 8 * A100) * balance() / 3600,
    }
    if cfg.vs:
        result |= {"hf_step_s": median(times["hf"]), "hf_over_ours": median(times["hf"]) / median(times["ours"]),
                   "hf_peak_gb": peak_bytes(runners["hf"], largest, device) / 1e9}
    return result


def decode(cfg: Config, device: torch.device, dtype: torch.dtype) -> dict:
    model, prompt = build(cfg, device, dtype).eval(), Kind(94, 94, True)
    (example,), size = examples_of([prompt], model.llama.cfg.vocab_size, model.vit.n_cls), model.vit.cfg.image_size
    batch = data.collate([example], size, "clip").to(device)
    return decoding.measure(model, batch, cfg.new_tokens, cfg.burn_in, cfg.steps, cfg.vs, cfg.compile, say)


def predicted_and_measured(cfg: Config, device: torch.device, dtype: torch.dtype) -> dict:
    ours = Ours(cfg, build(cfg, device, dtype))
    model = ours.model
    problems = max(micro_batches(draw(cfg.batch_size, cfg.seed), cfg.micro_batch), key=lambda micro: Load.of(micro).tokens)
    load, batch = Load.of(problems), ours.batch(problems)
    ours.step([batch])
    lines, held = memory(model, dtype, load), held_bytes(model, ours.optimizer)
    kept, peak = saved_bytes(lambda: ours.loss(batch), model), peak_bytes(ours, problems, device)
    say(f"{len(problems)} sequences, {load.tokens} tokens, {load.pictures} pictures; predicted:")
    for line, x in lines.items():
        say(f"  {line:20}{x / 1e6:12.2f} MB")
    predicted = list(lines.values())
    return {"block_kb_per_token": block_bytes(model.llama.cfg, dtype, device) / 1e3,
            "held_mb": held / 1e6, "predicted_held_mb": sum(predicted[:4]) / 1e6,
            "saved_mb": kept / 1e6, "predicted_saved_mb": sum(predicted[4:7]) / 1e6,
            "peak_mb": peak / 1e6, "predicted_peak_mb": sum(predicted) / 1e6}


COMMANDS = {"train": train, "decode": decode, "memory": predicted_and_measured}


def say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    flags = sys.argv[1:]
    command = flags.pop(0) if flags and not flags[0].startswith("-") else "train"
    if command not in COMMANDS:
        raise ValueError(f"unknown command {command!r}; known: {', '.join(COMMANDS)}")
    cfg = cli.parse(Config, argv=flags)
    if cfg.vs not in ("", "hf"):
        raise ValueError(f"unknown --vs {cfg.vs!r}; known: hf")
    device, dtype = cli.pick_device(cfg.device, cfg.dtype)
    name = str(dtype).removeprefix("torch.")
    say(f"{command} {cfg.preset} on {device} in {name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    result = COMMANDS[command](cfg, device, dtype)
    result = {key: float(f"{x:.5g}") if isinstance(x, float) else x for key, x in result.items()}
    for key, x in result.items():
        say(f"  {key:32}{x:>16,}")
    print(json.dumps({"command": command, **asdict(cfg), "device": str(device), "dtype": name,
                      "threads": torch.get_num_threads(), "torch": torch.__version__, **result}))


if __name__ == "__main__":
    cli.run(main)
