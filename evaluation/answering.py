"""Questions -> the model's answers, on one process or several.

`answer` generates texts and `log_likelihoods` scores given ones. `predict` runs either of them for
evaluate.py: it splits the questions over the processes of torchrun and writes each prediction to a file, from
which a run that was stopped can resume.
"""
import dataclasses
import hashlib
import json
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable

import cli

import torch
import torch.distributed as dist

import data
import lavin
import prompts
import weights
from evaluation import scores
from evaluation.log import clock
from official.records import read_text
from official.saving import append, lock_folder, named, write_atomically
from official.tokenizer import Tokenizer
from prompts import Sample
from speed import nf4
from speed.step import folded


def answer(model, tokenizer, samples: list[Sample], max_new_tokens: int, temperature: float = 0.0,
           top_p: float = 0.75, seed: int = 0, batch_size: int = 64, progress: bool = True,
           until: re.Pattern | None = None, write: Callable[[dict], None] | None = None) -> dict[str, str]:
    """{id: generated text}. Ignores the responses of the samples. Folds the model's adapters if it can.

    until  a text ends once this pattern matches
    write  receives the texts of each batch as soon as they are complete
    """
    if not samples:
        return {}
    model = folded(model, *sorted({int(s.image is not None) for s in samples}))
    n_visual, image_size = (model.vit.n_visual, model.vit.cfg.image_size) if model.vit else (0, 0)
    questions = [data.encode(dataclasses.replace(s, response=""), tokenizer, n_visual) for s in samples]
    longest = max(e.length for e in questions) + max_new_tokens
    batch_size = min(batch_size, rows_that_fit(model, longest))
    complete = completeness(tokenizer, until)
    sampling = dict(temperature=temperature, top_p=top_p, seed=seed)
    texts, started = {}, time.time()
    for rows in batches(questions, batch_size):
        batch = collate(model, rows, image_size)
        answers = generate(model, batch, max_new_tokens, tokenizer.eos, complete, **sampling)
        new = {e.sample.id: tokenizer.decode(ids) for e, ids in zip(rows, answers)}
        texts.update(new)
        if write:
            write(new)
        if progress:
            show_progress(len(texts), len(samples), started)
    return texts


def batches(questions: list[data.Example], batch_size: int) -> list[list[data.Example]]:
    """Batches of one modality and similar lengths. Questions about the same picture stay together."""
    with_picture = [e for e in questions if e.n_visual]
    longest = {}  # {picture: length of the longest question about it}
    for e in with_picture:
        longest[e.sample.image] = max(e.length, longest.get(e.sample.image, 0))
    with_picture.sort(key=lambda e: (longest[e.sample.image], str(e.sample.image)))
    text = sorted((e for e in questions if not e.n_visual), key=lambda e: e.length)
    return [group[i: i + batch_size]
            for group in (text, with_picture) for i in range(0, len(group), batch_size)]


def collate(model, rows: list[data.Example], image_size: int) -> data.Batch:
    """A batch on the model's device. If questions share a picture, it is encoded once for all of them."""
    asking = {e.sample.image: e for e in rows if e.n_visual}  # {picture: one question about it}
    image_embeds = None
    if asking:
        distinct = data.collate(list(asking.values()), image_size, model.cfg.normalize).to(model.device)
        with torch.inference_mode(), model.autocast():
            X_prime = model.encode_images(distinct)
        image_embeds = X_prime[[list(asking).index(e.sample.image) for e in rows if e.n_visual]]
    return data.collate(rows, image_size, model.cfg.normalize, image_embeds).to(model.device)


def rows_that_fit(model, tokens: int) -> int:
    """How many rows of this length fit into a cache of at most half the free memory. At least one."""
    c = model.llama.cfg
    row = 2 * c.n_layers * c.n_kv_heads * c.dim // c.n_heads * model.llama.norm.weight.itemsize * tokens
    free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else 8e9
    return max(1, int(free / 2 / row))


def completeness(tokenizer, until: re.Pattern | None) -> Callable[[list[int]], bool]:
    """A function that tells whether `until` matches the text of these tokens. Without a pattern: never."""
    if until is None:
        return lambda ids: False
    # decoding the whole text is slow, so do it only after a token with a full stop
    stops = {id for id in range(tokenizer.vocab_size) if "." in tokenizer.decode([id])}
    return lambda ids: ids[-1] in stops and until.search(tokenizer.decode(ids)) is not None


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
    """{answer: log p(answer | prompt)}: the sum over the answer's tokens, without EOS. One forward pass."""
    examples = [data.encode(Sample(sample.id, sample.prompt, a, None, {}), tokenizer, 0) for a in answers]
    for e in examples:
        e.rest = e.rest[:-1]  # without EOS
    batch = data.collate(examples, 0, model.cfg.normalize).to(model.device)
    with torch.inference_mode(), model.autocast():
        log_p = torch.log_softmax(model.llama.output(model.hidden(batch)).float(), -1)  # [targets, V]
        log_p = log_p.gather(1, batch.targets[:, None])[:, 0]
    log_p = log_p.split([e.n_targets for e in examples])
    return {a: x.sum().item() for a, x in zip(answers, log_p)}


def weigh(model, tokenizer, samples: list[Sample], write: Callable[[dict], None]) -> None:
    """Call write({id: {answer: log p}}) for each question of TruthfulQA."""
    model = folded(model, lavin.TEXT)
    rank, _ = cli.processes()
    started = time.time()
    for k, s in enumerate(samples, start=1):
        given = {**s.problem["mc1_targets"], **s.problem["mc2_targets"]}
        write({s.id: log_likelihoods(model, tokenizer, s, list(given))})
        if rank == 0:
            show_progress(k, len(samples), started)


def answer_split(model, tokenizer, samples: list[Sample], out: Path, max_new_tokens: int) -> None:
    """Answer ScienceQA's problems after training: write predictions.json and scores.json, print the table."""
    rank, ranks = cli.processes()
    if rank == 0:
        print(f"answering {len(samples)} problems", file=sys.stderr)
    texts = answer(model.eval(), tokenizer, samples[rank::ranks], max_new_tokens, progress=rank == 0,
                   until=scores.ANSWER)  # the letter decides the score
    parts = gather(texts)
    if rank == 0:
        texts = {id: text for part in parts for id, text in part.items()}
        write_atomically(out / "predictions.json", json.dumps(texts, indent=0).encode())
        result = scores.scienceqa(samples, texts)
        write_atomically(out / "scores.json", json.dumps(result).encode())
        print(scores.scienceqa_table(result))


def show_progress(done: int, total: int, started: float) -> None:
    left = (time.time() - started) / done * (total - done)
    end = "" if done < total else "\n"
    print(f"\ranswered {done} of {total}, ETA {clock(left)} ", end=end, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------
# a file of predictions: one line that describes the run, then one line per prediction

def resume(path: Path, run: dict) -> dict:
    """{id: prediction} in the file of a run that was stopped. ValueError if `run` describes another one.

    The last line may be incomplete. It is ignored.
    """
    text = read_text(path, "predictions") if path.is_file() else ""
    if "\n" not in text and '{"run": '.startswith(text[:8]):  # stopped within the first line, or no file
        return {}
    head, *rows = text.split("\n")
    try:
        before = {"bits": 16} | dict(json.loads(head)["run"])  # older files do not say how many
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path}: exists, but is not a file of predictions; give another --out") from None
    for name, value in run.items():
        if before.get(name) != value:
            raise ValueError(f"{path}: holds the predictions of another run ({name} {before.get(name)}, "
                             f"now {value}); give another --out, or delete it")
    done = {}
    for row in rows:
        try:
            row = json.loads(row)
            done[row["id"]] = row["prediction"]
        except (ValueError, KeyError, TypeError, RecursionError):  # an incomplete line, or the end
            pass
    return done


def fingerprint(samples: list[Sample]) -> str:
    """The number of questions, and a hash of their ids, prompts and image names."""
    questions = [(s.id, s.prompt, s.image and s.image.name) for s in samples]
    return f"{len(samples)}:{hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:16]}"


def adapter_metadata(cfg, needs_pictures: bool = False) -> dict:
    """What the adapter file records about its training."""
    metadata = weights.read_adapters(cfg.adapters)[1]
    if needs_pictures and not metadata["lavin"]["vision"]:
        raise ValueError(f"{cfg.adapters}: text-only adapters; this command needs some trained with pictures")
    return metadata


def ask(cfg, samples: list[Sample], out: str, metadata: dict, until: re.Pattern | None = None,
        **run) -> dict[str, str] | None:
    """{id: generated text} on the first process, None on the others.

    cfg: evaluate.py's flags. An answer ends where `until` matches. A text-only model is asked without the
    pictures. run: settings that are recorded in `out`, see predict().
    """
    if not metadata["lavin"]["vision"]:
        samples = [dataclasses.replace(s, image=None) for s in samples]
    prompts.check_pictures(samples)
    sampling = dict(max_new_tokens=cfg.max_new_tokens or metadata["max_new_tokens"],
                    temperature=cfg.temperature, top_p=cfg.top_p, seed=cfg.seed)
    work = partial(answer, **sampling, batch_size=cfg.batch_size, progress=cli.is_main(),
                   until=until)
    return predict(cfg, samples, out, {**run, **sampling}, work)


def predict(cfg, samples: list[Sample], out: str, run: dict, work: Callable) -> dict | None:
    """{id: prediction} of all samples on the first process, None on the others.

    Each process calls work(model, tokenizer, samples, write=write) for its share of the samples that have no
    prediction in `out` yet. work() calls write({id: prediction}), which appends to `out`. `run` holds the
    settings that decide the predictions; the first line of `out` records them, and only a run with the same
    settings may resume.
    """
    if not samples:
        raise ValueError(f"{cfg.data}: there is nothing to answer in it")
    if out and Path(out).suffix != ".jsonl":
        raise ValueError(f"--out {out}: predictions are JSON lines; give a name that ends in .jsonl")
    rank, ranks = cli.processes()
    device, dtype = cli.pick_device(cfg.device, cfg.dtype)
    nf4.check(cfg.bits)  # refuse an unknown number before anything is read or written
    run = {**run, "adapters": hashlib.sha256(Path(cfg.adapters).read_bytes()).hexdigest()[:16],
           "questions": fingerprint(samples), "dtype": str(dtype).removeprefix("torch."), "bits": cfg.bits}
    if out and rank == 0:
        lock_folder(Path(out).parent, f"{Path(out).name}.lock")
    barrier()  # no process reads `out` before it is known that no other run writes to it
    done = resume(Path(out), run) if out else {}
    left = [s for s in samples if s.id not in done]
    if done and rank == 0:
        print(f"{out}: {len(done)} predictions are there, {len(left)} to go", file=sys.stderr)
    if left:
        model, tokenizer = load(cfg, device, dtype)
        barrier()  # every process has read `out`
        if out and rank == 0:
            start_file(Path(out), run, done)
        barrier()
        with named(out):
            file, mine = open(out, "ab", buffering=0) if out else None, {}

        def write(new: dict) -> None:
            mine.update(new)
            if file:
                append(file, json_lines(new))

        work(model, tokenizer, left[rank::ranks], write=write)
        for part in gather(mine):
            done.update(part)
    return {s.id: done[s.id] for s in samples} if rank == 0 else None


def json_lines(predictions: dict) -> str:
    return "".join(json.dumps({"id": id, "prediction": p}) + "\n" for id, p in predictions.items())


def start_file(path: Path, run: dict, done: dict) -> None:
    """Write the line of the run and the predictions so far. This drops an incomplete last line."""
    write_atomically(path, f"{json.dumps({'run': run})}\n{json_lines(done)}".encode())


def barrier() -> None:
    if cli.processes()[1] > 1:
        dist.barrier()


def gather(mine: dict) -> list[dict]:
    """The dicts of all processes on the first process, an empty list on the others."""
    rank, ranks = cli.processes()
    if ranks == 1:
        return [mine]
    parts = [None] * ranks if rank == 0 else None
    dist.gather_object(mine, parts)
    return parts or []


def load(cfg, device: torch.device, dtype: torch.dtype) -> tuple[lavin.LaVIN, Tokenizer]:
    """The model that the flags name, and its tokenizer."""
    after_read = nf4.after_read(cfg.bits)
    model, _ = lavin.load(cfg.adapters, cfg.llama, cfg.clip, device, dtype, cfg.any_base, after_read)
    return model, Tokenizer(cfg.llama, model.llama.cfg.vocab_size)
