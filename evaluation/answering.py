"""Prompts -> the model's answers, on one process or several, and through interruptions.

`answer` generates text, `log_likelihoods` weighs given answers; `predict` runs either for evaluate.py: every process of
torchrun does a share, and what is done lies in a file from which a run that was killed goes on.
"""
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist

import cli
import data
import lavin
from evaluation import scores
from official.tokenizer import Tokenizer
from prompts import Sample


def answer(model, tokenizer, samples: list[Sample], max_new_tokens: int, temperature: float = 0.0, top_p: float = 0.75,
           seed: int = 0, batch_size: int = 64, progress: bool = True, until: re.Pattern | None = None,
           write: Callable[[dict], None] | None = None) -> dict[str, str]:
    """{id: generated text} for samples whose response is ignored. Folds the model's adapters.

    until: a text is complete once this is found in it. write: called with every batch's texts as they come.
    """
    if samples and not model.folded:
        model.fold(*sorted({int(s.image is not None) for s in samples}))
    asked = [data.encode(Sample(s.id, s.prompt, "", s.image, s.problem), tokenizer, model.vit.n_cls if model.vit else 0)
             for s in samples]
    longest = {}  # question about each picture
    for e in asked:
        longest[e.sample.image] = max(e.length, longest.get(e.sample.image, 0))

    def order(e: data.Example) -> tuple:  # one modality a batch, a picture's questions together, neighbours in length
        return (True, longest[e.sample.image], str(e.sample.image)) if e.n_image else (False, e.length)

    asked.sort(key=order)
    first = sum(e.n_image == 0 for e in asked)
    # the cache of a batch takes half of what is free at most
    slot = 2 * model.llama.cfg.n_layers * model.llama.cfg.dim * model.llama.norm.weight.itemsize
    free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else 8e9
    most = max((e.length for e in asked), default=0) + max_new_tokens
    batch_size = max(1, min(batch_size, int(free / 2 / (slot * most))))
    starts = [*range(0, first, batch_size), *range(first, len(asked), batch_size)]
    size, texts, started = model.vit.cfg.image_size if model.vit else 0, {}, time.time()

    ends = {id for id in range(tokenizer.vocab_size) if "." in tokenizer.decode([id])} if until else set()

    def complete(ids: list[int]) -> bool:  # decoding it all is worth it only where a sentence ends
        return ids[-1] in ends and until.search(tokenizer.decode(ids)) is not None

    for k, end in zip(starts, [*starts[1:], len(asked)]):
        rows = asked[k: end]
        batch = data.collate(rows, size, model.cfg.normalize).to(model.device)
        sampling = dict(temperature=temperature, top_p=top_p, seed=seed)
        ids = generate(model, batch, max_new_tokens, tokenizer.eos, complete if until else lambda ids: False, **sampling)
        new = {e.sample.id: tokenizer.decode(i) for e, i in zip(rows, ids)}
        texts.update(new)
        if write:
            write(new)
        if progress:
            show_progress(len(texts), len(asked), started)
    return texts


def generate(model, batch, max_new_tokens: int, eos: int, complete: Callable, **sampling) -> list[list[int]]:
    """The answers of all rows. A row's answer ends at EOS, or once complete(ids so far) holds."""
    answers, done = [[] for _ in batch.lengths], [False] * len(batch.lengths)
    for tokens in model.stream(batch, max_new_tokens, eos, **sampling):
        for b, token in enumerate(tokens):
            if token is not None and not done[b]:
                answers[b].append(token)
                done[b] = complete(answers[b])
        if all(d or token is None for d, token in zip(done, tokens)):
            break
    return answers


def log_likelihoods(model, tokenizer, sample: Sample, answers: list[str]) -> dict[str, float]:
    """{answer: log p(answer | prompt)} of text answers: the sum over its tokens, EOS left out. One packed forward."""
    examples = [data.encode(Sample(sample.id, sample.prompt, a, None, {}), tokenizer, 0) for a in answers]
    for e in examples:
        e.rest = e.rest[:-1]
    batch = data.collate(examples, 0, model.cfg.normalize).to(model.device)
    with torch.inference_mode(), model.autocast():
        log_p = torch.log_softmax(model.llama.output(model.hidden(batch)).float(), -1)  # [targets, V]
        log_p = log_p.gather(1, batch.targets[:, None])[:, 0]
    return {a: x.sum().item() for a, x in zip(answers, log_p.split([e.length - e.start for e in examples]))}


def weigh(model, tokenizer, samples: list[Sample], write: Callable[[dict], None]) -> None:
    """write({id: {answer: log p}}) of TruthfulQA's questions, one after the other"""
    model.fold(lavin.TEXT)
    started = time.time()
    for k, s in enumerate(samples, start=1):
        given = {**s.problem["mc1_targets"], **s.problem["mc2_targets"]}
        write({s.id: log_likelihoods(model, tokenizer, s, list(given))})
        if cli.processes()[0] == 0:
            show_progress(k, len(samples), started)


def answer_split(model, tokenizer, samples: list[Sample], out: Path, max_new_tokens: int) -> None:
    """Answer problems after training: write predictions.json and scores.json to `out`, print the nine columns."""
    rank, ranks = cli.processes()
    if rank == 0:
        print(f"answering {len(samples)} problems", file=sys.stderr)
    texts = answer(model.eval(), tokenizer, samples[rank::ranks], max_new_tokens, progress=rank == 0,
                   until=scores.ANSWER)  # once the letter is there, the score is decided
    parts = gather(texts)
    if rank == 0:
        texts = {id: text for part in parts for id, text in part.items()}
        (out / "predictions.json").write_text(json.dumps(texts, indent=0))
        result = scores.scienceqa(samples, texts)
        (out / "scores.json").write_text(json.dumps(result))
        print(scores.scienceqa_table(result))


def show_progress(done: int, total: int, started: float) -> None:
    left = (time.time() - started) / done * (total - done)
    end = "" if done < total else "\n"
    print(f"\ranswered {done} of {total}, ETA {cli.clock(left)} ", end=end, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------
# predictions, over processes and over interruptions

def resume(path: Path, run: dict) -> dict:
    """{id: prediction} that an earlier run left; ValueError unless it was the same `run`. A line cut short is dropped."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if "\n" not in text and '{"run": '.startswith(text[:8]):  # nothing yet
        return {}
    head, *rows = text.split("\n")
    try:
        before = json.loads(head)["run"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: exists, and is not the predictions of an earlier run; give another --out") from None
    for name, value in run.items():
        if before.get(name) != value:
            raise ValueError(f"{path}: holds the predictions of another run ({name} {before.get(name)}, now {value}); "
                             "give another --out, or delete it")
    done = {}
    for row in rows:
        try:
            row = json.loads(row)
            done[row["id"]] = row["prediction"]
        except ValueError:  # cut short, or empty: after the last line
            pass
    return done


def predict(cfg, samples: list[Sample], out: str, run: dict, work: Callable) -> dict | None:
    """{id: prediction} of all samples, on the first process; None on the others.

    What `out` holds is kept. Of the rest every process does a share with work(model, tokenizer, samples, write), and
    appends to `out` as write({id: prediction}) is called: one line a sample, after a line that tells what made them.
    """
    if not samples:
        raise ValueError(f"{cfg.data}: there is nothing to answer in it")
    if out and Path(out).suffix != ".jsonl":
        raise ValueError(f"--out {out}: predictions are written line by line; give it a name that ends in .jsonl")
    rank, ranks = cli.processes()
    run = {**run, "adapters": hashlib.sha256(Path(cfg.adapters).read_bytes()).hexdigest()[:16]}
    done = resume(Path(out), run) if out else {}
    left = [s for s in samples if s.id not in done]
    if done and rank == 0:
        print(f"{out}: {len(done)} predictions are there, {len(left)} to go", file=sys.stderr)
    if left:
        model, tokenizer = load(cfg)
        meet()  # everybody has read `out`
        if out and rank == 0:
            begin(Path(out), run, done)
        meet()
        file, mine = os.open(out, os.O_WRONLY | os.O_APPEND) if out else None, {}

        def write(new: dict) -> None:
            mine.update(new)
            if file is not None:  # in one piece, so that processes don't write into each other's lines
                os.write(file, lines(new).encode())

        work(model, tokenizer, left[rank::ranks], write)
        for part in gather(mine):
            done.update(part)
    return {s.id: done[s.id] for s in samples} if rank == 0 else None


def lines(predictions: dict) -> str:
    return "".join(json.dumps({"id": id, "prediction": p}) + "\n" for id, p in predictions.items())


def begin(path: Path, run: dict, done: dict) -> None:
    """write the file anew, without a last line that was cut short"""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"run": run}) + "\n" + lines(done), encoding="utf-8")
    part.replace(path)


def meet() -> None:
    if cli.processes()[1] > 1:
        dist.barrier()


def gather(mine: dict) -> list[dict]:
    """everybody's, on the first process; nothing on the others"""
    rank, ranks = cli.processes()
    if ranks == 1:
        return [mine]
    parts = [None] * ranks if rank == 0 else None
    dist.gather_object(mine, parts)
    return parts or []


def load(cfg):
    """-> model, tokenizer"""
    device, dtype = cli.pick_device(cfg.device, cfg.dtype)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    model, _ = lavin.load(cfg.adapters, cfg.llama, cfg.clip, device, dtype, cfg.any_base)
    return model, Tokenizer(cfg.llama, model.llama.cfg.vocab_size)
