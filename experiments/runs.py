"""Train small LaVINs, let them answer, keep every result: what the experiments share.

Two processes of one thread each train one model each. A finished run is a JSON file under --work, named by a
hash of its settings, its problems and the weights in tiny/. So a stopped experiment goes on where it was, and
experiments that need the same run share it.

Every run sees each of the 2,560 training problems of its world once: 80 steps of 32, a sixth of the demo's
length, with the demo's other flags. Seeds differ in the new adapters and the order of the problems, not in
the problems. A standard error here is over seeds: a difference says nothing of other problems.
"""
import contextlib
import copy
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Callable, NamedTuple

import torch
from safetensors.torch import load_file, save, save_file

import data
import prompts
import train
from adapters import trainable
from evaluation import answering, scores
from evaluation.log import clock
from experiments import worlds
from experiments.lora import LoRALaVIN
from lavin import LaVIN, negative_log_likelihood
from official.adapter_files import write_atomically
from speed.chunked_loss import in_chunks

TINY = Path(__file__).parent.parent / "tiny"
COLUMNS = {"with picture": "IMG", "without": "no IMG", "all": "Avg"}  # names in evaluation/scores.py


@dataclass
class Options:
    """Run one experiment: write its results as JSON, and its picture."""
    seeds: int = 5  # seeds of each setting: 0, 1, .. [2, inf)
    problems: int = 2560  # training problems; the README's tables need the default [64, inf)
    limit: int = 400  # test problems that each run answers [8, inf)
    workers: int = 2  # runs at a time, one core each [1, inf)
    work: str = "out/experiments"  # folder of worlds and finished runs
    results: str = "experiments/results"  # folder to write NAME.json and NAME.png to


class Run(NamedTuple):
    """One training run and the questions after it."""
    seed: int = 0
    world: str = "negatives"  # a key of worlds.WORLDS
    flags: dict = {}  # of train.py
    encoder: str = "whole"  # the ViT in tiny/clip; "half": its first half of the blocks and [cls] tokens
    order: str = "mixed"  # "text first": all problems without a picture, then all with one
    lora: int = 0  # rank of LoRA in LLaMA instead of adapters; 0: adapters
    routings: tuple = ("learned",)  # how LLaMA is routed when it answers, see `rerouted`
    split: str = "test"


# --- one run ---------------------------------------------------------------------------------------

class TextFirst(data.Steps):
    """The samples of the mixed epoch, those without a picture first; otherwise in the same order."""

    @cached_property
    def order(self) -> list[int]:
        mixed = [i for step in range(self.per_epoch) for i in super(TextFirst, self).chosen(step)]
        return sorted(mixed, key=lambda i: self.examples[i].n_visual > 0)

    def chosen(self, step: int) -> list[int]:
        k = step % self.per_epoch
        return self.order[k * self.batch_size: (k + 1) * self.batch_size]


def learn(cfg: train.Config, model: LaVIN, examples: list[data.Example], order: str = "mixed",
          watch: Callable[[int, int, float], None] = lambda step, total, loss: None) -> None:
    """The loop of train.py without its machinery, with the same updates: it calls watch after every step."""
    size = model.vit.cfg.image_size if model.vit else 0
    kind = {"mixed": data.Steps, "text first": TextFirst}[order]
    steps = kind(examples, cfg.batch_size, cfg.batch_size, 0, 1, cfg.seed, size, cfg.normalize)
    total, warmup = max(1, round(cfg.epochs * steps.per_epoch)), round(cfg.warmup * steps.per_epoch)
    params = trainable(model)
    model.loss = in_chunks(negative_log_likelihood)
    optimizer = train.optimizer_for(params, cfg)
    for step in range(total):
        [batch], n_targets = steps[step]
        optimizer.zero_grad(set_to_none=False)
        loss = model(batch) / n_targets
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * cfg.batch_size / 256 * train.schedule(step, warmup, total)
        optimizer.step()
        watch(step + 1, total, loss.item())


@torch.no_grad()
def rerouted(model: LaVIN, routing: str) -> LaVIN:
    """A copy of the model, to answer with. The routers of the ViT stay as they are.

    learned           w as trained               other modality    text gets the w of images and vice versa
    half              w = (1/2, 1/2)             exchanged         w_0 and w_1 change places
    """
    model = copy.deepcopy(model).eval()
    if isinstance(model, LoRALaVIN):
        model.merge()
    if routing != "learned":
        w = model.routing_weights()  # [L, 2, 2]: layer, modality, expert
        w = {"other modality": w.flip(1), "exchanged": w.flip(2), "half": torch.full_like(w, 0.5)}[routing]
        model.routing_weights = lambda: w
    return model


@torch.no_grad()
def state(model: LaVIN, step: int, loss: float) -> dict:
    """What is recorded over training: w of every layer, and the cosine between the experts' phi_u."""
    row = {"step": step, "loss": loss}
    if model.cfg.adapter.kind == "mm":
        ups = [(layer.adapter_attn.phi_u1.weight, layer.adapter_attn.phi_u2.weight)
               for layer in model.llama.layers]
        row["w"] = model.routing_weights().tolist()
        row["cosine"] = [torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in ups]
    return row


def ask(model: LaVIN, tokenizer, cfg: train.Config, split: str, limit: int) -> dict[str, float]:
    """Accuracy in per cent on the first problems of a split. Folds the model."""
    samples = prompts.Source("scienceqa", cfg.data, None).read(split, cfg.format, vision=cfg.vision)[:limit]
    texts = answering.answer(model, tokenizer, samples, cfg.max_new_tokens, progress=False,
                             until=scores.ANSWER)
    columns = scores.scienceqa(samples, texts)["columns"]
    return {name: 100 * columns[column][0] / columns[column][1] for name, column in COLUMNS.items()}


def build(run: Run, options: Options) -> tuple[LaVIN, object, list, train.Config]:
    """Model, tokenizer and training examples of a run, and its flags."""
    clip = TINY / "clip" if run.encoder == "whole" else Path(options.work, "half_clip")
    cfg = train.Config(llama=str(TINY / "llama"), clip=str(clip), data=str(Path(options.work, run.world)),
                       seed=run.seed, split="", epochs=1.0, **run.flags)
    with contextlib.redirect_stderr(io.StringIO()):  # without the counts of samples
        model, tokenizer, dataset, _ = train.prepare(cfg, torch.device("cpu"), torch.float32)
    if run.lora:
        torch.manual_seed(run.seed)
        model = LoRALaVIN(model.llama, model.vit, model.cfg, run.lora)
    return model, tokenizer, dataset.examples, cfg


def perform(run: Run, options: Options, file: Path) -> None:
    """Train, answer, and write what came out to `file`."""
    torch.set_num_threads(1)
    model, tokenizer, examples, cfg = build(run, options)
    trace, halfway, started = [], [], time.process_time()

    def watch(step: int, total: int, loss: float) -> None:
        if step % max(1, total // 20) == 0 or step == 1:
            trace.append(state(model, step, loss))
        if step == total // 2 and run.order == "text first":
            halfway.append(ask(rerouted(model, "learned"), tokenizer, cfg, run.split, options.limit))

    learn(cfg, model, examples, run.order, watch)
    params = trainable(model)
    accuracy = {routing: ask(rerouted(model, routing), tokenizer, cfg, run.split, options.limit)
                for routing in run.routings}
    result = {"run": run._asdict(), "accuracy": accuracy, "halfway": halfway, "trace": trace,
              "trained": sum(p.numel() for p in params.values()),
              "trained in LLaMA": sum(p.numel() for name, p in params.items()
                                      if name.startswith(("llama.", "adapter_modality"))),
              "bytes": len(save({name: p.detach() for name, p in params.items()})),  # without metadata
              "cpu_seconds": round(time.process_time() - started)}
    write_atomically(file, json.dumps(result).encode())


# --- many runs -------------------------------------------------------------------------------------

def half_of(clip: Path, to: Path) -> None:
    """Write the first half of an image encoder's blocks, in the same layout (Hugging Face's)."""
    config = json.loads((clip / "config.json").read_text())
    blocks = config["num_hidden_layers"] = config["num_hidden_layers"] // 2
    tensors = load_file(clip / "model.safetensors")
    kept = {name: t for name, t in tensors.items()
            if not (found := re.search(r"layers\.(\d+)\.", name)) or int(found[1]) < blocks}
    to.mkdir(parents=True, exist_ok=True)
    (to / "config.json").write_text(json.dumps(config))
    save_file(kept, to / "model.safetensors", {"format": "pt"})


def run_all(settings: dict[str, Run], options: Options, seeds: range | None = None) -> dict[str, list[dict]]:
    """The results of each setting, one per seed. Those under --work are read, the others are made."""
    seeds = seeds or range(options.seeds)
    runs, work = [run._replace(seed=s) for run in settings.values() for s in seeds], Path(options.work)
    recipes = {name: worlds.ensure(name, work / name, options.problems, options.limit)
               for name in sorted({run.world for run in runs})}
    if any(run.encoder == "half" for run in runs):
        half_of(TINY / "clip", work / "half_clip")
    base = b"".join((TINY / name / "model.safetensors").read_bytes() for name in ("llama", "clip"))
    base = hashlib.sha256(base).hexdigest()
    files = []
    for run in runs:
        key = json.dumps([run._asdict(), recipes[run.world], base], sort_keys=True)
        files.append(work / "runs" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json")
    (work / "runs").mkdir(exist_ok=True)
    todo = {file: run for file, run in zip(files, runs) if not file.is_file()}
    print(f"{len(set(files))} runs, {len(todo)} of them to make", file=sys.stderr)
    os.environ["OMP_NUM_THREADS"] = "1"
    started = time.time()
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(perform, run, options, file) for file, run in todo.items()]
        for n, job in enumerate(as_completed(jobs), start=1):
            try:
                job.result()
            except BaseException:  # the runs that are under way finish, the others are not started
                pool.shutdown(cancel_futures=True)
                raise
            left = (time.time() - started) / n * (len(jobs) - n)
            print(f"run {n} of {len(jobs)}, ETA {clock(left)}", file=sys.stderr)
    results = [json.loads(file.read_text()) for file in files]
    return {name: results[i * len(seeds): (i + 1) * len(seeds)] for i, name in enumerate(settings)}


# --- many numbers ----------------------------------------------------------------------------------

def mean(values: list[float]) -> list[float]:
    """[mean, its standard error] over seeds"""
    return [fmean(values), stdev(values) / math.sqrt(len(values))]


def paired(values: list[float], reference: list[float]) -> list[float]:
    """[mean, its standard error] of the differences, seed by seed; both lists in the order of the seeds"""
    assert len(values) == len(reference), "one value for each seed"
    return mean([a - b for a, b in zip(values, reference)])


def accuracies(results: list[dict], routing: str = "learned", column: str = "all") -> list[float]:
    return [result["accuracy"][routing][column] for result in results]


def row(results: list[dict], routing: str = "learned") -> dict[str, list[float]]:
    """The three accuracies as a row of a table."""
    return {column: mean(accuracies(results, routing, column)) for column in COLUMNS}


def write(name: str, options: Options, tables: dict, **more) -> None:
    """Write NAME.json. tables: {title: {row: {column: [mean, standard error], number or text}}}"""
    folder = Path(options.results)
    folder.mkdir(parents=True, exist_ok=True)
    setting = {"seeds": options.seeds, "problems": options.problems, "limit": options.limit}
    text = json.dumps({"setting": setting, "tables": tables, **more}, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # on one line
    (folder / f"{name}.json").write_text(text + "\n")
    print(f"wrote {folder / name}.json", file=sys.stderr)
