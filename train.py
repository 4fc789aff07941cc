"""Train LaVIN's adapters on ScienceQA (mixture-of-modality training, section 3.1 of the paper).

    python train.py                                                      the embedded small world, on any laptop
    python train.py --recipe paper --llama 7B --clip ViT-L-14 --data ScienceQA                  one GPU
    torchrun --nproc_per_node 8 train.py --recipe paper --llama 7B --clip ViT-L-14 --data ScienceQA       eight

The global batch is the same whatever it is spread over: ranks x accumulation steps x micro-batch. Data parallelism
is written out: each rank adds up the gradients of its samples, one all-reduce sums the few million adapter gradients
over the ranks, every rank takes the same step. The run's folder (--out) holds adapters.safetensors, checkpoint.pt
(--resume continues from it, bit for bit) and log.jsonl.
"""
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist

import adapters
from evaluation import answering
import cli
import data
from speed import price
import prompts
from evaluation import scores
from adapters import AdapterConfig, trainable
from clip import MEAN_STD, VisionTransformer
from lavin import LaVIN, LaVINConfig
from llama import LLaMA, Tokenizer
from speed.machine import need_compiler


@dataclass
class Config:
    """Train LaVIN's adapters. Without arguments: the embedded small world, a few minutes on a laptop."""
    recipe: str = "tiny"  # defaults of the others: tiny, or paper (LLaMA-7B on ScienceQA)
    llama: str = "tiny/llama"  # folder of LLaMA weights, with tokenizer.model
    clip: str = "tiny/clip"  # folder of CLIP weights
    data: str = "tiny/data"  # folder in ScienceQA's layout, or a mixture alpaca:FILE,llava:PATH,coco:DIR,.. (see prompts.py)
    out: str = "out"  # folder of the run
    resume: bool = False  # continue from OUT/checkpoint.pt
    # model: the choices of Table 2
    vision: bool = True  # no-vision: text only, without image encoder
    vit_adapters: bool = True  # adapters in the image encoder too ("joint optimisation")
    adapter: str = "mm"  # in LLaMA: mm (with router) or rep (plain RepAdapter)
    adapter_dim: int = 8  # hidden width r
    scale: float = 1.0  # s of Eq. (2)
    tau: float = 10.0  # router temperature; the paper: 10 for 7B, 5 for 13B
    dropout: float = 0.1  # inside the adapters
    normalize: str = "imagenet"  # mean/std of the pictures: imagenet or clip
    # data
    format: str = "QCM-ALE"  # prompt - response, see prompts.py
    captions: bool = False  # append captions.json to the hints
    max_len: int = 512  # tokens; longer samples are cut
    # optimisation
    epochs: float = 20.0  # passes over the train split
    warmup: float = 2.0  # epochs of linear warm-up
    batch_size: int = 32  # samples of a step, over all ranks and accumulation steps
    micro_batch: int = 4  # samples of one forward
    lr: float = 9e-3  # base rate: the rate used is lr x batch_size / 256
    weight_decay: float = 0.02  # on matrices only
    beta2: float = 0.95  # of AdamW; beta1 is 0.9
    clip_grad: float = 0.0  # largest gradient norm; 0: no clipping, as in the paper
    seed: int = 0  # of initial adapters, data order and dropout
    steps: int = 0  # stop after so many steps in all; 0: at the end
    # machine
    dry_run: bool = False  # price the run before loading anything, and stop; --llama and --clip may be names: 7B, ViT-L/14
    checkpoint: bool = False  # keep only each LLaMA block's input: a fifth of the memory beside the weights, 1.4 x the work
    compile: bool = False  # torch.compile the norms, adapters and activations into few kernels; the first step takes minutes
    device: str = "auto"  # cuda, cpu, ...
    dtype: str = "auto"  # of the frozen base: bf16 or fp32
    workers: int = -1  # processes that decode pictures; -1: 4 beside a GPU, none on a CPU
    log_every: int = 10  # steps between log lines
    save_every: int = 100  # steps between checkpoints
    # evaluation
    split: str = "test"  # answered at the end, "" for none
    max_new_tokens: int = 256  # longest answer


RECIPES = {
    "tiny": dict(format="QCM-EA", normalize="clip", epochs=1.0, warmup=0.06, micro_batch=32, lr=0.048, dropout=0.0,
                 max_len=192, max_new_tokens=40),
    "paper": {},
}


def schedule(step: int, warmup: int, total: int) -> float:
    """share of the full rate at a step: linear up, cosine down to 0 (per step; the first one is not 0)"""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def optimizer_for(params: dict[str, torch.nn.Parameter], cfg: Config) -> torch.optim.AdamW:
    groups = [{"params": [p for p in params.values() if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in params.values() if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, cfg.beta2), fused=True)


def save_checkpoint(path: Path, model: LaVIN, optimizer, step: int, cfg: Config, given: dict) -> None:
    """Whole or not at all: written beside, flushed to disk, renamed. given: what the run was given to work on."""
    state = {"step": step, "config": dataclasses.asdict(cfg), "given": given, "optimizer": optimizer.state_dict(),
             "adapters": {n: p.detach() for n, p in trainable(model).items()}}
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)


# what a resumed run must share with the run it continues; the rest (folders, machine, logging) may change
FIXED = ("vision", "vit_adapters", "adapter", "adapter_dim", "scale", "tau", "dropout", "normalize", "format",
         "captions", "max_len", "epochs", "warmup", "batch_size", "lr", "weight_decay", "beta2", "clip_grad", "seed")


def load_checkpoint(path: Path, model: LaVIN, optimizer, cfg: Config, given: dict) -> int:
    """-> the number of steps done"""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: nothing to resume from; run without --resume first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(f"{path}: not a readable checkpoint ({type(e).__name__})") from None
    for name in FIXED:
        if state["config"][name] != getattr(cfg, name):
            raise ValueError(f"--resume: the checkpoint was trained with --{name} {state['config'][name]}, "
                             f"not {getattr(cfg, name)}")
    for name, value in given.items():
        if state["given"][name] != value:
            raise ValueError(f"--resume: the checkpoint was trained with {name} {state['given'][name]}, not {value}")
    with torch.no_grad():
        for name, p in trainable(model).items():
            p.copy_(state["adapters"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


class Log:
    """One line an interval on stderr, the same in log.jsonl. Steps leave their sums on the device until then."""

    def __init__(self, path: Path, total: int, first: int):
        rows = path.read_text().splitlines(keepends=True) if path.is_file() else []
        path.write_text("".join(r for r in rows if r.endswith("\n") and json.loads(r)["step"] <= first))
        self.file = open(path, "a", buffering=1)  # steps that a killed run took after its checkpoint are told once more
        self.total, self.first, self.started, self.sums, self.tokens = total, first, time.time(), [], 0
        self.since = self.started

    def step(self, sums: torch.Tensor, tokens: int) -> None:
        """sums [2]: the step's loss (mean over its targets) and the squared norm of its gradient"""
        self.sums.append(sums)
        self.tokens += tokens

    def line(self, step: int, lr: float, device: torch.device) -> torch.Tensor:
        """print the interval that ends with `step` steps done; -> its losses [steps]"""
        losses, norms = torch.stack(self.sums).cpu().unbind(1)
        now = time.time()
        row = {"step": step, "loss": round(losses.mean().item(), 4), "lr": round(lr, 6),
               "grad_norm": round(norms[-1].sqrt().item(), 4), "tokens_per_s": round(self.tokens / (now - self.since)),
               "eta": cli.clock((now - self.started) / (step - self.first) * (self.total - step))}
        if device.type == "cuda":
            row["memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
        print(f"step {step}/{self.total} | loss {row['loss']:.4f} | lr {lr:.2e} | grad norm {row['grad_norm']:.3f} | "
              f"{row['tokens_per_s']} tokens/s | " + (f"{row['memory_gb']} GB | " if "memory_gb" in row else "") +
              f"ETA {row['eta']}", file=sys.stderr)
        self.file.write(json.dumps(row) + "\n")
        self.sums, self.tokens, self.since = [], 0, now
        return losses


def build(cfg: Config, device, dtype) -> tuple[LaVIN, Tokenizer]:
    if cfg.normalize not in MEAN_STD:
        raise ValueError(f"unknown --normalize {cfg.normalize!r}; known: {', '.join(MEAN_STD)}")
    llama = LLaMA.from_pretrained(cfg.llama, device, dtype)
    llama.checkpoint, adapters.recompute.fused = cfg.checkpoint, cfg.compile
    vit = VisionTransformer.from_pretrained(cfg.clip, device, dtype) if cfg.vision else None
    tokenizer = Tokenizer.from_pretrained(cfg.llama, llama.cfg.vocab_size)
    if cfg.max_len > llama.cfg.max_seq_len:
        raise ValueError(f"--max_len {cfg.max_len} is more than this LLaMA's context of {llama.cfg.max_seq_len}")
    torch.manual_seed(cfg.seed)  # every rank starts from the same adapters
    adapter = AdapterConfig(cfg.adapter, cfg.adapter_dim, cfg.scale, cfg.tau, cfg.dropout)
    model = LaVIN(llama, vit, LaVINConfig(adapter, cfg.vision, cfg.vit_adapters, normalize=cfg.normalize))
    return model.to(device), tokenizer


def report_bad_loss(losses: torch.Tensor, last: int, steps: data.Steps) -> None:
    """ValueError with step and samples if one of the steps that end before step `last` had no finite loss"""
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        step = last - len(losses) + bad[0]
        ids = [steps.examples[i].sample.id for i in steps.chosen(step)]
        raise ValueError(f"the loss of step {step} is not finite; its samples: {' '.join(ids)}. Nothing was saved since the "
                         "last checkpoint: --resume with a lower --lr (a new run) or --clip_grad 1, or look at these samples")


def read(loader: torch.utils.data.DataLoader):
    """what it yields; a mistake in the data that a worker found, without the worker's traceback around it"""
    try:
        yield from loader
    except (ValueError, OSError) as e:
        raise ValueError(str(e).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


def test(cfg: Config, model: LaVIN, tokenizer: Tokenizer, samples: list, rank: int, ranks: int) -> None:
    """Answer the problems, each rank a share; write predictions.json and scores.json, print the nine columns."""
    texts = answering.answer(model.eval(), tokenizer, samples[rank::ranks], cfg.max_new_tokens, progress=rank == 0,
                           until=scores.ANSWER)  # after the letter the score is decided
    parts = [texts]
    if ranks > 1:
        parts = [None] * ranks
        dist.all_gather_object(parts, texts)
    if rank == 0:
        texts = {id: text for part in parts for id, text in part.items()}
        (Path(cfg.out) / "predictions.json").write_text(json.dumps(texts, indent=0))
        result = scores.scienceqa(samples, texts)
        (Path(cfg.out) / "scores.json").write_text(json.dumps(result))
        print(scores.scienceqa_table(result))


def prepare(cfg: Config, device, dtype, say: Callable) -> tuple[LaVIN, Tokenizer, list[data.Example], list]:
    """model, tokenizer, what to train on, the problems to answer at the end"""
    mixture = [(source, source.read("train", cfg.format, cfg.captions, cfg.vision)) for source in prompts.mixture(cfg.data)]
    tested = next((source for source, _ in mixture if source.kind == "scienceqa" and cfg.split), None)
    tests = tested.read(cfg.split, cfg.format, cfg.captions, cfg.vision) if tested else []
    if tests:
        say(f"{len(tests)} problems of the {cfg.split} split of {tested.path} will be answered at the end")
    model, tokenizer = build(cfg, device, dtype)
    examples = []
    for source, samples in mixture:
        kept, count = data.encode_all(samples, tokenizer, model.vit.n_cls if model.vit else 0, cfg.max_len)
        say(f"data {source}: " + ", ".join(f"{n} {what}" for what, n in count.items()))
        examples += kept
    if not examples:
        raise ValueError(f"{cfg.data}: no sample of the train split has a response within {cfg.max_len} tokens")
    return model, tokenizer, examples, tests


def train(cfg: Config, rank: int, ranks: int, device, dtype) -> None:
    main = rank == 0
    say = (lambda *a: print(*a, file=sys.stderr)) if main else (lambda *a: None)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer, examples, tests = prepare(cfg, device, dtype, say)
    params = trainable(model)
    steps = data.Steps(examples, cfg.batch_size, cfg.micro_batch, rank, ranks, cfg.seed,
                       model.vit.cfg.image_size if model.vit else 0, cfg.normalize)
    total = max(1, round(cfg.epochs * steps.per_epoch))
    stop = min(cfg.steps or total, total)
    warmup = round(cfg.warmup * steps.per_epoch)
    peak = cfg.lr * cfg.batch_size / 256
    accumulation = -(-cfg.batch_size // (cfg.micro_batch * ranks))
    say(f"{sum(p.numel() for p in params.values()):,} trainable parameters on {device} in {dtype}; {total} steps of "
        f"{cfg.batch_size} = {accumulation} accumulation x {ranks} processes x {cfg.micro_batch}; peak lr {peak:.2e}")

    # one flat buffer holds every gradient, and the loss after them: one all-reduce a step
    flat = torch.zeros(sum(p.numel() for p in params.values()) + 1, device=device)
    for p, g in zip(params.values(), flat[:-1].split([p.numel() for p in params.values()])):
        p.grad = g.view_as(p)
    optimizer = optimizer_for(params, cfg)
    given = {"samples": len(examples), "base": model.fingerprint()}
    first = load_checkpoint(out / "checkpoint.pt", model, optimizer, cfg, given) if cfg.resume else 0
    workers = cfg.workers if cfg.workers >= 0 else 4 * (device.type == "cuda")
    loader = torch.utils.data.DataLoader(steps, batch_size=None, sampler=range(first, stop), num_workers=workers,
                                         pin_memory=device.type == "cuda")
    log = Log(out / "log.jsonl", stop, first) if main else None

    model.train()
    for step, (micro_batches, n_targets) in enumerate(read(loader), start=first):
        flat.zero_()
        for batch in micro_batches:
            batch = batch.to(device)
            loss = model(batch) / n_targets
            loss.backward()
            flat[-1] += loss.detach()
        if ranks > 1:
            dist.all_reduce(flat)
        norm2 = flat[:-1].square().sum()
        if cfg.clip_grad:
            flat[:-1].mul_((cfg.clip_grad / norm2.sqrt()).clamp(max=1))
        lr = peak * schedule(step, warmup, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

        done = step + 1
        if main:
            log.step(torch.stack([flat[-1], norm2]), sum(steps.lengths[i] for i in steps.chosen(step)))
        if main and (done % cfg.log_every == 0 or done % cfg.save_every == 0 or done == stop):
            report_bad_loss(log.line(done, lr, device), done, steps)
        if main and (done % cfg.save_every == 0 or done == stop):
            save_checkpoint(out / "checkpoint.pt", model, optimizer, done, cfg, given)
    if main:
        model.save(out / "adapters.safetensors", format=cfg.format, captions=cfg.captions,
                   max_new_tokens=cfg.max_new_tokens, train=dataclasses.asdict(cfg))
        say(f"wrote {out / 'adapters.safetensors'}")

    if tests:
        say(f"answering {len(tests)} problems")
        test(cfg, model, tokenizer, tests, rank, ranks)


def main() -> None:
    cfg = cli.parse(Config, RECIPES)
    cli.at_least(cfg, batch_size=1, micro_batch=1, log_every=1, save_every=1, epochs=0, warmup=0, lr=0, steps=0,
                 max_new_tokens=1)
    if cfg.dry_run:
        print(price.quote(cfg))
        return
    rank, ranks, local = (int(os.environ.get(x, d)) for x, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device, dtype = cli.pick_device(cfg.device, cfg.dtype)
    if device.type == "cuda":
        here = torch.cuda.device_count()
        if device.index is None and local >= here:
            raise ValueError(f"more processes than GPUs; --nproc_per_node {here}, or --device cpu")
        device = torch.device("cuda", local if device.index is None else device.index)
        torch.cuda.set_device(device)
    if cfg.compile:
        need_compiler()
    if rank == 0 and Config.data in (source.path for source in prompts.mixture(cfg.data)):
        from tiny import world
        world.ensure(Config.data)
    with cli.process_group("nccl" if device.type == "cuda" else "gloo"):
        train(cfg, rank, ranks, device, dtype)


if __name__ == "__main__":
    cli.run(main)
