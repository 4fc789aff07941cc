"""Measure training and decoding: time, memory, FLOPs; compare them with the predictions of price.py.

    python -m speed.bench train                       optimizer steps on ScienceQA's sequence lengths
    python -m speed.bench train --vs hf               the same, in turn with Hugging Face + PEFT (LoRA)
    python -m speed.bench decode                      greedy decoding: bare, unfolded, folded in turn
    python -m speed.bench decode --vs hf              the same, in turn with Hugging Face's generate
    python -m speed.bench memory --preset 7B --layers 2 --dtype bf16
                                                      memory of one step: parameters, activations, peak
    python -m speed.bench memory --bits 4             with LLaMA's matrices in 4 bits; train and decode, too

Weights and tokens are random and made on the device. stdout gets one JSON line, stderr everything else.
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

import cli

import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

import clip
import data
import llama
from adapters import AdapterConfig, MMAdapter, trainable
from clip import CLIPConfig, VisionTransformer
from lavin import LaVIN, LaVINConfig, negative_log_likelihood
from llama import LLaMA, LLaMAConfig
from prompts import Sample
from speed import decoding, nf4, price
from speed.chunked_loss import in_chunks
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
    """python -m speed.bench train|decode|memory: measure, and compare with predictions."""
    preset: str = "small"  # sizes: tiny, small (7B with an eighth of its width), 7B, 13B
    layers: int = 0  # use only this many LLaMA layers, so that a large width fits; 0: all [0, inf)
    batch_size: int = 32  # train: samples per optimizer step [1, inf)
    micro_batch: int = 4  # train, memory: samples per forward pass [1, inf)
    burn_in: int = 2  # steps or answers before the timed ones [0, inf)
    steps: int = 5  # timed steps or answers; the median is reported [1, inf)
    new_tokens: int = 64  # decode: length of an answer [2, inf)
    vs: str = ""  # hf: Hugging Face in turn; train: with PEFT's LoRA, text only; decode: same folded weights
    compile: bool = False  # decode: time the compiled step, too; needs g++
    seed: int = 0  # of weights, lengths and tokens [0, inf)
    device: str = "auto"  # cuda, cpu, ..
    dtype: str = "auto"  # of the frozen base: bf16 or fp32
    bits: int = 16  # 4: LLaMA's matrices in 4 bits; 16: in --dtype


# ---------------------------------------------------------------------------------------------------
# measuring a step

def counted_flops(f: Callable) -> int:
    """The FLOPs of f() by torch's counter. It has no formula for attention on the CPU; use that of CUDA."""
    counter, aten = FlopCounterMode(display=False), torch.ops.aten
    for name in ("_scaled_dot_product_flash_attention{}", "_scaled_dot_product_flash_attention{}_backward"):
        cpu, cuda = (getattr(aten, name.format(x)) for x in ("_for_cpu", ""))
        counter.flop_registry[cpu] = counter.flop_registry[cuda]
    with counter:
        f()
    return counter.get_total_flops()


def saved_bytes(f: Callable, model: nn.Module) -> int:
    """Bytes that autograd keeps from f() for its backward pass, without parameters. A storage counts once."""
    packed = []

    def pack(x):
        packed.append(weakref.ref(x))  # a weak reference: tensors that f() frees do not count
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = f()  # holds the graph
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for x in (ref() for ref in packed) if x is not None}
    for p in model.parameters():
        storages.pop(p.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values())


def block_bytes(c: LLaMAConfig, dtype: torch.dtype, device: torch.device,
                lengths: tuple[int, ...] = (300, 212)) -> float:
    """Bytes that one LLaMA block with its adapter keeps per token for the backward pass."""
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
    """Bytes that stay allocated between steps: weights, gradients and AdamW's moments."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    moments = [x for state in optimizer.state.values() for x in state.values()]
    return sum(x.nbytes for x in [*model.parameters(), *model.buffers(), *grads, *moments])


def peak_bytes(runner, problems: list[Kind], device: torch.device) -> int:
    """The largest number of allocated bytes during a step of one micro-batch."""
    nf4.BUFFERS.clear()  # the step allocates them again, so they count
    held, batches = held_bytes(runner.model, runner.optimizer), runner.prepare(problems)
    assert len(batches) == 1, "these problems need more than one micro-batch"
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        runner.step(batches)
        return held + torch.cuda.max_memory_allocated() - before
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        runner.step(batches)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return held + max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


# ---------------------------------------------------------------------------------------------------
# models and batches

def materialise(model: nn.Module, device: torch.device, dtype: torch.dtype,
                after_read: Callable | None = None) -> None:
    """Give a model on the meta device random weights: trained ones in fp32, frozen ones in `dtype`.

    after_read: as for weights.load
    """
    trained = trainable(model)
    for name, p in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        x = torch.empty(p.shape, device=device, dtype=torch.float32 if name in trained else dtype)
        x = x.normal_(std=0.02) if p.ndim > 1 else x.fill_(leaf == "weight")  # 1 for norms, 0 for biases
        setattr(model.get_submodule(owner), leaf, nn.Parameter(x, requires_grad=name in trained))
        if after_read:
            after_read(model, owner)


def build(cfg: Config, device: torch.device, dtype: torch.dtype, vision: bool = True) -> LaVIN:
    """The preset with random weights; ValueError if the preset is unknown or does not fit into memory."""
    if cfg.preset not in PRESETS:
        raise ValueError(f"unknown --preset {cfg.preset!r}; known: {', '.join(PRESETS)}")
    c, v = PRESETS[cfg.preset]
    c = replace(c, n_layers=cfg.layers or c.n_layers)
    with torch.device("meta"):
        model = LaVIN(LLaMA(c), VisionTransformer(v) if vision else None, LaVINConfig(vision=vision))
    after_read, needed = nf4.after_read(cfg.bits), price.frozen_bytes(model, dtype, cfg.bits)
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise ValueError(f"--preset {cfg.preset}: the weights need {needed / 1e9:.1f} GB, but {device} has "
                         f"{available / 1e9:.1f}; give --dtype bf16 or fewer --layers, or --bits 4")
    torch.manual_seed(cfg.seed)
    materialise(model, device, dtype, after_read)
    return model


def examples_of(problems: list[Kind], vocab_size: int, per_image: int) -> list[data.Example]:
    """Problems of these lengths, with random tokens. All pictures are the same file."""
    picture = Sample("", "", "", Path(__file__).parents[1] / "tiny/demo.png", {})
    examples = []
    for p in problems:
        n_visual = per_image * p.picture
        head, rest = (torch.randint(3, vocab_size, (n,)).tolist() for n in (4, p.length - n_visual - 4))
        examples.append(data.Example(picture, head, n_visual, rest, p.prompt - n_visual - 4))
    return examples


def micro_batches(problems: list[Kind], size: int) -> list[list[Kind]]:
    """Split problems into micro-batches as train.py does on a single rank."""
    (hand,) = data.split_batch(list(range(len(problems))), [p.length for p in problems], 1, size)
    return [[problems[i] for i in micro] for micro in hand]


class Ours:
    """Optimizer steps as in train.py."""

    def __init__(self, cfg: Config, model: LaVIN):
        self.cfg, self.model = cfg, model.train()
        model.loss = in_chunks(negative_log_likelihood)
        self.optimizer = torch.optim.AdamW(trainable(model).values(), fused=True)

    def batch(self, problems: list[Kind]) -> data.Batch:
        vit = self.model.vit
        n_visual, size = (vit.n_visual, vit.cfg.image_size) if vit else (0, 0)
        examples = examples_of(problems, self.model.llama.cfg.vocab_size, n_visual)
        batch, dropout = data.collate(examples, size, "clip"), data.MaskSampler.of(self.model)
        if dropout:
            batch = dropout.add(batch, examples, [[i] for i in range(len(problems))])
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
    """Optimizer steps of Hugging Face's LLaMA with PEFT's LoRA on q and v, as it is commonly trained.

    Micro-batches are taken in order and padded to their longest sequence. Attention is sdpa, the loss is
    Hugging Face's own. Ours has dropout, this one has none.
    """

    def __init__(self, cfg: Config, c: LLaMAConfig, device: torch.device, dtype: torch.dtype):
        try:
            import peft
            import transformers
        except ImportError as e:
            raise ValueError(f"--vs hf: the package {e.name} is missing; "
                             "pip install transformers peft") from None
        config = transformers.LlamaConfig(
            hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, vocab_size=c.vocab_size,
            rms_norm_eps=c.norm_eps, use_cache=False, attn_implementation="sdpa")
        with torch.device(device):
            base = transformers.LlamaForCausalLM(config).to(dtype)
        lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.cfg, self.model = cfg, peft.get_peft_model(base, lora).train()
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, fused=True)

    def batch(self, problems: list[Kind]) -> dict[str, torch.Tensor]:
        examples = examples_of(problems, self.model.config.vocab_size, 0)
        batch = data.collate(examples, 0, "clip").to(self.model.device)
        labels = torch.full_like(batch.tokens, -100)  # -100: no target
        labels[batch.predict_at + 1] = batch.targets  # Hugging Face's loss shifts the labels by one
        packed = {"input_ids": (batch.tokens, 0), "attention_mask": (torch.ones_like(labels), 0),
                  "labels": (labels, -100)}
        return {name: pad_sequence(x.split(batch.lengths), batch_first=True, padding_value=padding)
                for name, (x, padding) in packed.items()}

    def prepare(self, problems: list[Kind]) -> list[dict]:
        n = self.cfg.micro_batch
        return [self.batch(problems[i: i + n]) for i in range(0, len(problems), n)]

    def step(self, batches: list[dict]) -> None:
        for batch in batches:
            with self.autocast:
                loss = self.model(**batch).loss / len(batches)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


# ---------------------------------------------------------------------------------------------------
# commands: each returns the results for the JSON line

def time_steps(runners: dict, cfg: Config,
               device: torch.device) -> tuple[dict[str, list[float]], list[list[Kind]]]:
    """Seconds of each runner's timed steps, and the problems of these steps."""
    times, timed = {name: [] for name in runners}, []
    for k in range(cfg.burn_in + cfg.steps):
        problems = [p._replace(picture=p.picture and not cfg.vs) for p in draw(cfg.batch_size, cfg.seed + k)]
        for name, runner in runners.items():  # in turn, so a slow moment of the machine hits both
            batches = runner.prepare(problems)
            t = seconds(lambda: runner.step(batches), device)
            say(f"step {k + 1} {name}: {t:.3f} s" + ", burn-in" * (k < cfg.burn_in))
            times[name] += [t] * (k >= cfg.burn_in)
        timed += [problems] * (k >= cfg.burn_in)
    return times, timed


def largest(problems: list[Kind], size: int) -> list[Kind]:
    """The micro-batch with the most tokens."""
    return max(micro_batches(problems, size), key=lambda micro: Load.of(micro).tokens)


def train(cfg: Config, device: torch.device, dtype: torch.dtype) -> dict:
    model = build(cfg, device, dtype, vision=not cfg.vs)  # with --vs, both are text-only
    ours = Ours(cfg, model)
    runners = {"ours": ours}
    if cfg.vs:
        runners["hf"] = HuggingFace(cfg, model.llama.cfg, device, dtype)
    peak = matmul_peak(device, dtype)
    times, problems = time_steps(runners, cfg, device)
    peak = max(peak, matmul_peak(device, dtype))  # the better one gives the lower, stricter utilisation

    steps = [Load.of(step, -(-cfg.batch_size // cfg.micro_batch)) for step in problems]
    micro = largest(problems[-1], cfg.micro_batch)
    load, batch = Load.of(micro), ours.batch(micro)
    rate = median(useful(flops(model, s)) / t for s, t in zip(steps, times["ours"]))
    recipe = useful(flops(model, Load.of(kinds()).times(PROBLEMS * EPOCHS / len(kinds()))))
    result = {
        "step_s": median(times["ours"]),
        "samples_per_s": cfg.batch_size / median(times["ours"]),
        "tokens_per_s": median(s.tokens / t for s, t in zip(steps, times["ours"])),
        "useful_tflop_per_s": rate / 1e12, "matmul_tflop_per_s": peak / 1e12, "utilisation": rate / peak,
        "flops_over_useful": median(sum(flops(model, s).values()) / useful(flops(model, s)) for s in steps),
        "micro_batch_flops": sum(flops(model, load, in_full=True).values()),
        "micro_batch_flops_torch": counted_flops(lambda: ours.loss(batch).backward()),
        "peak_gb": peak_bytes(ours, micro, device) / 1e9,
        "predicted_peak_gb": sum(memory(model, dtype, load, bits=cfg.bits).values()) / 1e9,
        "slowest_over_mean_rank": balance(),
        "recipe_hours_here": recipe / rate / 3600,
        # a projection that nobody ran: the utilisation measured here, on the slowest of eight ranks
        "recipe_hours_8_a100_projected": recipe / (rate / peak * 8 * A100) * balance() / 3600,
    }
    if cfg.vs:
        result |= {"hf_step_s": median(times["hf"]),
                   "hf_over_ours": median(times["hf"]) / median(times["ours"]),
                   "hf_peak_gb": peak_bytes(runners["hf"], micro, device) / 1e9}
    return result


def decode(cfg: Config, device: torch.device, dtype: torch.dtype) -> dict:
    if cfg.bits == 4 and (cfg.vs or cfg.compile):
        raise ValueError("--vs and --compile need folded adapters; leave them out, or --bits 4")
    model, prompt = build(cfg, device, dtype).eval(), Kind(94, 94, True)
    examples = examples_of([prompt], model.llama.cfg.vocab_size, model.vit.n_visual)
    batch = data.collate(examples, model.vit.cfg.image_size, "clip").to(device)
    return decoding.measure(model, batch, cfg.new_tokens, cfg.burn_in, cfg.steps, cfg.vs, cfg.compile, say)


def compare_memory(cfg: Config, device: torch.device, dtype: torch.dtype) -> dict:
    ours = Ours(cfg, build(cfg, device, dtype))
    model, problems = ours.model, largest(draw(cfg.batch_size, cfg.seed), cfg.micro_batch)
    load, batch = Load.of(problems), ours.batch(problems)
    ours.step([batch])
    lines = memory(model, dtype, load, bits=cfg.bits)
    say(f"{len(problems)} sequences, {load.tokens} tokens, {load.pictures} pictures; predicted:")
    for line, x in lines.items():
        say(f"  {line:20}{x / 1e6:12.2f} MB")
    predicted = list(lines.values())  # four lines that stay between steps, three of activations, workspace
    return {"block_kb_per_token": block_bytes(model.llama.cfg, dtype, device) / 1e3,
            "held_mb": held_bytes(model, ours.optimizer) / 1e6, "predicted_held_mb": sum(predicted[:4]) / 1e6,
            "saved_mb": saved_bytes(lambda: ours.loss(batch), model) / 1e6,
            "predicted_saved_mb": sum(predicted[4:7]) / 1e6,
            "peak_mb": peak_bytes(ours, problems, device) / 1e6, "predicted_peak_mb": sum(predicted) / 1e6}


COMMANDS = {"train": train, "decode": decode, "memory": compare_memory}


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
    threads = torch.get_num_threads()
    say(f"{command} {cfg.preset} on {device} in {name}, {threads} threads, torch {torch.__version__}")
    result = COMMANDS[command](cfg, device, dtype)
    result = {key: float(f"{x:.5g}") if isinstance(x, float) else x for key, x in result.items()}
    for key, x in result.items():
        say(f"  {key:32}{x:>16,}")
    print(json.dumps({"command": command, **asdict(cfg), "device": str(device), "dtype": name,
                      "threads": threads, "torch": torch.__version__, **result}))


if __name__ == "__main__":
    cli.run(main)
