"""The paper's tables: for now Table 1, ScienceQA accuracy in its nine columns.

    python evaluate.py                             the embedded adapters on the embedded test split
    python evaluate.py --llama 7B --clip ViT-L-14 --adapters out/adapters.safetensors --data ScienceQA

The answer is the letter in "The answer is X." of the generated text; a text without one counts as wrong.
"""
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import cli
import data
import lavin
from llama import Tokenizer

COLUMNS = {  # of Table 1, in its order
    "NAT": lambda p: p["subject"] == "natural science",
    "SOC": lambda p: p["subject"] == "social science",
    "LAN": lambda p: p["subject"] == "language science",
    "TXT": lambda p: bool(p["hint"]),
    "IMG": lambda p: bool(p["image"]),
    "NO": lambda p: not p["hint"] and not p["image"],
    "G1-6": lambda p: int(p["grade"].removeprefix("grade")) <= 6,
    "G7-12": lambda p: int(p["grade"].removeprefix("grade")) >= 7,
    "Avg": lambda p: True,
}


def answer(model, tokenizer, samples: list[data.Sample], max_new_tokens: int, temperature: float = 0.0,
           top_p: float = 0.75, seed: int = 0, batch_size: int = 64, progress: bool = True) -> dict[str, str]:
    """{id: generated text} for samples whose response is ignored. Folds the model's adapters."""
    if not model.folded:
        model.fold(lavin.TEXT, lavin.IMAGE)
    prompts = [data.encode(data.Sample(s.id, s.prompt, "", s.image, s.problem), tokenizer,
                           model.vit.n_cls if model.vit else 0) for s in samples]
    prompts.sort(key=lambda e: (e.n_slots > 0, len(e.ids)))  # one modality a batch, neighbours in length: little padding
    first = sum(e.n_slots == 0 for e in prompts)
    starts = [*range(0, first, batch_size), *range(first, len(prompts), batch_size)]
    size, texts, started = model.vit.cfg.image_size if model.vit else 0, {}, time.time()
    for k, end in zip(starts, [*starts[1:], len(prompts)]):
        rows = prompts[k: end]
        batch = data.collate(rows, size, model.cfg.normalize).to(model.device)
        ids = model.generate(batch, max_new_tokens, tokenizer.eos, temperature=temperature, top_p=top_p, seed=seed)
        texts.update({e.sample.id: tokenizer.decode(i) for e, i in zip(rows, ids)})
        if progress:
            left = (time.time() - started) / len(texts) * (len(prompts) - len(texts))
            print(f"\ranswered {len(texts)} of {len(prompts)}, ETA {cli.clock(left)} ", end="", file=sys.stderr, flush=True)
    if progress:
        print(file=sys.stderr)
    return texts


def score(samples: list[data.Sample], texts: dict[str, str]) -> dict:
    """{columns: {name: [right, all]}, unparsable: n}, plus the text problems (no picture) that Table 1 leaves out"""
    chosen = {s.id: data.read_answer(texts[s.id], len(s.problem["choices"])) for s in samples}
    columns = {**COLUMNS, "no IMG": lambda p: not p["image"]}
    counts = {}
    for name, belongs in columns.items():
        rows = [s for s in samples if belongs(s.problem)]
        counts[name] = [sum(chosen[s.id] == s.problem["answer"] for s in rows), len(rows)]
    return {"columns": counts, "unparsable": sum(c is None for c in chosen.values())}


def percent(right: int, total: int) -> str:
    return f"{100 * right / total:.2f}" if total else "-"


def table(scores: dict) -> str:
    """the nine columns as the paper prints them, and how many problems each one has"""
    names = list(COLUMNS)
    lines = ["".join(f"{x:>8}" for x in names),
             "".join(f"{percent(*scores['columns'][x]):>8}" for x in names),
             "".join(f"{'n=' + str(scores['columns'][x][1]):>8}" for x in names)]
    return "\n".join([*lines, f"{scores['unparsable']} answers without a letter, counted as wrong"])


@dataclass
class Config:
    """Answer a ScienceQA split and print the nine columns of Table 1."""
    data: str = "tiny/data"  # folder in ScienceQA's layout
    split: str = "test"  # a key of pid_splits.json
    adapters: str = "tiny/adapters.safetensors"  # what train.py wrote
    llama: str = "tiny/llama"  # folder of LLaMA weights
    clip: str = "tiny/clip"  # folder of CLIP weights
    any_base: bool = False  # accept a base with another fingerprint than the one trained on
    max_new_tokens: int = 0  # longest answer; 0: as trained
    temperature: float = 0.0  # the paper decodes at 0.1; 0 is greedy and repeatable
    top_p: float = 0.75  # nucleus, as in the paper
    seed: int = 0  # of the sampling
    batch_size: int = 64  # problems answered together
    limit: int = 0  # only the first so many problems; 0: all
    predictions: str = ""  # write {id: generated text} to this file
    json: bool = False  # scores as one JSON line on stdout instead of the table
    device: str = "auto"  # cuda, cpu, ...
    dtype: str = "auto"  # bf16 or fp32


def main() -> None:
    cfg = cli.parse(Config)
    device, dtype = cli.pick_device(cfg.device, cfg.dtype)
    model, meta = lavin.load(cfg.adapters, cfg.llama, cfg.clip, device, dtype, cfg.any_base)
    tokenizer = Tokenizer(Path(cfg.llama) / "tokenizer.model")
    samples = data.read_scienceqa(cfg.data, cfg.split, meta["format"], meta["captions"], model.cfg.vision)
    samples = samples[: cfg.limit or None]
    texts = answer(model, tokenizer, samples, cfg.max_new_tokens or meta["max_new_tokens"], cfg.temperature, cfg.top_p,
                   cfg.seed, cfg.batch_size)
    if cfg.predictions:
        Path(cfg.predictions).write_text(json.dumps(texts, indent=0))
    scores = score(samples, texts)
    print(json.dumps(scores) if cfg.json else table(scores))


if __name__ == "__main__":
    cli.run(main)
