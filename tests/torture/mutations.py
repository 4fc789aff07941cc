"""Damaged, hostile and merely odd files for every reader. Each must be read, or refused in one line.

A forked process reads the mutated files, one after the other. It may use 1 GiB beyond what it starts with,
and a file may take LIMIT seconds. An input is lost if its reader ends in a traceback, in a line without the
file's folder, in a crash, late, or out of memory.
"""
import io
import json
import os
import random
import select
import shutil
import zipfile
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import published
import torch
from conftest import ROWS, make_batch, make_lavin
from PIL import Image
from test_weights import make_base, make_llama, make_vit, released_file, write_hf
from weights_on_disk import released_state, write_meta, write_openai

import data
import lavin
import prompts
import train
from adapters import trainable
from clip import VisionTransformer, preprocess
from evaluation import answering, benchmarks, ending, scores
from evaluation.log import Log
from llama import PRESETS, LLaMA
from official import llama_layouts
from official.adapter_files import MUST_MATCH, load_checkpoint, write_checkpoint
from official.images import open_image
from official.tokenizer import Tokenizer

from . import ROOT, Row, checkpoint_of, more_memory

FULL = 250  # for each target
LIMIT = 20
TOKENIZER = ROOT / "tiny/llama/tokenizer.model"
NUMBERS = (-1, 0, 1, 2, 3.5, 2**31, 2**63, -2**63, 10**400, 1e308, float("nan"), float("inf"), -0.0)
TEXTS = ("", " ", "x", "\0", "\ud800", "\u2028", "../../x", "/dev/zero", "a\nb", "é" * 300, "9" * 5000, "%s")
ODD = (*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [None], {"": None}, ["x"] * 999)


# --- how a file is changed -------------------------------------------------------------------------

def change_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut, insert or repeat bytes, one to four times."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, n = rng.randrange(len(raw) + 1), rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(7)
        if kind == 0 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at:at + n] = rng.randbytes(n)
        elif kind == 2:
            del raw[at:at + n]
        elif kind == 3:
            raw[at:at] = rng.randbytes(n)
        elif kind == 4:
            raw[at:at] = raw[at:at + n] * rng.choice((1, 2, 100))
        elif kind == 5:
            raw[at:at + n] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * n
        else:
            del raw[at:]
    return bytes(raw)


def change_value(value, rng: random.Random, odd=ODD, depth: int = 0):
    """Replace, remove, add or exchange one value somewhere inside nested dicts and lists."""
    inner = isinstance(value, (dict, list)) and value
    if inner and (depth == 0 or rng.random() < 0.75):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, kind = rng.choice(keys), rng.randrange(8)
        value = value.copy()
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[rng.choice(("x", "", "id", "__metadata__"))] = rng.choice(odd)
        elif kind == 1:
            value.insert(key, rng.choice(odd))
        elif kind == 2:
            value[key] = value[rng.choice(keys)]
        else:
            value[key] = change_value(value[key], rng, odd, depth + 1)
        return value
    return rng.choice(odd)


def change_json(raw: bytes, rng: random.Random) -> bytes:
    """Change a value, and sometimes the text around it. A .jsonl file is changed in one of its lines."""
    if rng.random() < 0.2:
        return change_bytes(raw, rng)
    if rng.random() < 0.1:  # deep, long or doubled
        deep = rng.choice((b"[", b'{"a":')) * 10**5
        return rng.choice((deep, raw + raw, raw.replace(b":", b":" + deep, 1), b"\xef\xbb\xbf" + raw, b""))
    lines = raw.split(b"\n") if b"\n{" in raw else [raw]
    k = rng.randrange(len(lines))
    try:
        lines[k] = json.dumps(change_value(json.loads(lines[k]), rng)).encode()
    except ValueError:
        lines[k] = change_bytes(lines[k], rng)
    return b"\n".join(lines)


def change_safetensors(raw: bytes, rng: random.Random) -> bytes:
    """Change the header as JSON, the metadata inside it, or any bytes."""
    n, kind = int.from_bytes(raw[:8], "little"), rng.randrange(4)
    if kind == 0:
        return change_bytes(raw[:2000], rng) + raw[2000:]
    header = json.loads(raw[8:8 + n])
    config = header.get("__metadata__", {}).get("config")
    if config and kind > 1:
        text = change_json(config.encode(), rng).decode("utf-8", "replace")
        header["__metadata__"] = {**header["__metadata__"], "config": text}
    else:
        header = change_value(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + n:]


def change_archive(raw: bytes, rng: random.Random) -> bytes:
    """Change one member of a zip file, so that its checksum is right, or any bytes of the file."""
    if rng.random() < 0.2:
        return change_bytes(raw, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as src, zipfile.ZipFile(out, "w") as dst:
        names = src.namelist()
        chosen = next(x for x in names if x.endswith("data.pkl")) if rng.random() < 0.7 else rng.choice(names)
        for name in names:
            content = src.read(name)
            dst.writestr(name, change_bytes(content, rng) if name == chosen else content)
    return out.getvalue()


def change_saved(raw: bytes, rng: random.Random) -> bytes:
    """Change a value of what torch.save wrote, or the archive."""
    if rng.random() < 0.5:
        return change_archive(raw, rng)
    odd = (*ODD, torch.ones(2), torch.ones(()), torch.ones(0), torch.ones(3, dtype=torch.long), 1j, b"x",
           torch.eye(3).to_sparse(), torch.ones(2, device="meta"), torch.full((2,), float("nan")),
           torch.ones(1).expand(10**6, 10**6), {1: torch.ones(1)})
    state = torch.load(io.BytesIO(raw), weights_only=False)
    out = io.BytesIO()
    torch.save(change_value(state, rng, odd), out)
    return out.getvalue()


# --- which files, and who reads them ---------------------------------------------------------------

class Target(NamedTuple):
    file: Path
    change: Callable[[bytes, random.Random], bytes]
    read: Callable[[], object]


def encode(samples: list[prompts.Sample]) -> None:
    prompts.check_pictures(samples)
    examples, _ = data.encode_all(samples[:9], Tokenizer(TOKENIZER), 6, 200)
    if examples:
        data.collate(examples[:2], 16, "clip")


def targets(folder: Path) -> dict[str, Target]:
    """Every kind of file that the project reads, written into `folder`, with the code that reads it."""
    found = {}

    def add(name: str, change: Callable, read: Callable) -> None:
        found[name] = Target(folder / name, change, read)

    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"):
        Image.effect_noise((40, 20), 90).convert("RGB").save(folder / f"x.{suffix}")
        add(f"x.{suffix}", change_bytes, lambda file=folder / f"x.{suffix}":
            preprocess(open_image(file), 16, "clip"))

    published.scienceqa(folder / "s", {"train": 3, "test": 3})
    whole = lambda: encode(prompts.read_scienceqa(folder / "s", "test", captions=True))
    for name in ("s/problems.json", "s/pid_splits.json", "s/captions.json"):
        add(name, change_json, whole)
    published.alpaca(folder / "alpaca.json", 4)
    add("alpaca.json", change_json, lambda: encode(prompts.read_instructions(folder / "alpaca.json")))
    record = json.dumps({"instruction": "x", "input": "z", "output": "y", "image": ""})
    (folder / "own.jsonl").write_text(f"{record}\n{record}\n")
    add("own.jsonl", change_json, lambda: encode(prompts.read_instructions(folder / "own.jsonl")))
    published.llava_joined(published.llava(folder / "llava"))
    add("llava/llava_instruct_150k.json", change_json, lambda: encode(prompts.read_llava(folder / "llava")))
    published.coco(folder / "coco")
    add("coco/dataset_coco.json", change_json,
        lambda: encode(prompts.read_coco(folder / "coco", split="test")))
    published.truthfulqa(folder / "mc_task.json")
    add("mc_task.json", change_json, lambda: encode(benchmarks.read_truthfulqa(folder / "mc_task.json")))
    published.mme(folder / "mme", {"existence": 1})
    add("mme/existence/0000.txt", change_bytes,
        lambda: encode(benchmarks.read_mme(folder / "mme", ["existence"])))

    samples = prompts.read_scienceqa(folder / "s", "test")
    ids = [s.id for s in samples]
    said = {s.id: f"It is. The answer is {'ABC'[k]}." for k, s in enumerate(samples)}
    run = {"command": "scienceqa", "seed": 0}
    published.put(folder / "said.json", said)
    text = json.dumps({"run": run}) + "\n" + answering.json_lines(said)
    for name in ("said.jsonl", "resumed.jsonl"):
        (folder / name).write_text(text)
    for name in ("said.json", "said.jsonl"):
        add(name, change_json, lambda file=str(folder / name): scores.scienceqa_table(
            scores.scienceqa(samples, scores.predictions_for(file, ids, "problems"), file)))

    def resume():
        file = folder / "resumed.jsonl"
        done = answering.resume(file, run)
        scores.scienceqa(samples, {**said, **{id: done[id] for id in ids if id in done}}, file)

    add("resumed.jsonl", change_json, resume)
    questions = benchmarks.read_truthfulqa(folder / "mc_task.json")
    weighed = {q.id: {a: -1.0 * len(a) for a in {**q.problem["mc1_targets"], **q.problem["mc2_targets"]}}
               for q in questions}
    file = published.put(folder / "weighed.json", weighed)
    add("weighed.json", change_json, lambda: scores.truthfulqa_table(scores.truthfulqa(
        questions, scores.predictions_for(file, ["0", "1"], "questions"), file)))
    annotations = [{"image_id": k, "caption": f"A picture {k}."} for k in (1, 2)]
    said_of, known = (published.put(folder / f"{name}.json", content) for name, content in
                      (("captions", annotations), ("references", {"annotations": annotations})))

    def captions():
        ids = list(scores.read_references(known, {"1", "2"}))
        scores.check_types(said_of, scores.predictions_for(said_of, ids, "pictures"), str, "a text")

    add("captions.json", change_json, captions), add("references.json", change_json, captions)
    (folder / "results").mkdir()
    (folder / "results/OCR.txt").write_text("0.jpg\tIs it?\tYes\tYes.\n0.jpg\tIs it not?\tNo\tYes\n")
    add("results/OCR.txt", change_bytes, lambda: scores.mme_table(scores.mme(folder / "results")))
    (folder / "log.jsonl").write_text("".join(json.dumps({"step": k, "loss": 1.0}) + "\n" for k in (1, 2, 3)))
    add("log.jsonl", change_json, lambda: Log(folder / "log.jsonl", 9, 2))

    model, llama, vit = make_lavin(), make_llama(), make_vit()
    write_hf(folder / "hf", llama), write_hf(folder / "bin", llama), write_hf(folder / "clip", vit)
    write_hf(folder / "shards", llama, limit=20_000), write_meta(folder / "meta", llama, 2)
    write_openai(folder / "ViT.pt", vit)
    (folder / "bin/model.safetensors").unlink()
    state = {theirs: llama.get_parameter(ours).detach() for ours, theirs in llama_layouts.hf_names(3).items()}
    torch.save(state, folder / "bin/pytorch_model.bin")
    for name, change in (("hf/config.json", change_json), ("hf/model.safetensors", change_safetensors),
                         ("bin/pytorch_model.bin", change_saved), ("meta/params.json", change_json),
                         ("meta/consolidated.01.pth", change_saved), ("hf/tokenizer.model", change_bytes),
                         ("shards/model.safetensors.index.json", change_json)):
        add(name, change, lambda path=folder / name.partition("/")[0]: LLaMA.from_pretrained(path))
    add("clip/config.json", change_json, lambda: VisionTransformer.from_pretrained(folder / "clip"))
    add("ViT.pt", change_archive, lambda: VisionTransformer.from_pretrained(folder / "ViT.pt"))

    def tokenize():
        tokenizer = Tokenizer(folder / "hf", PRESETS["tiny"].vocab_size)
        tokenizer.decode(tokenizer.encode("Question: What color is the circle? é"))

    found["hf/tokenizer.model"] = found["hf/tokenizer.model"]._replace(read=tokenize)
    towers = make_base(model)
    base = [write_hf(folder / "base" / name, tower) for name, tower in zip(("llama", "clip"), towers)]
    settings = dict(format="QCM-A", captions=False, max_new_tokens=8, train={"data": "s"})
    model.save(folder / "a.safetensors", **settings)
    released_file(folder / "a.pth", released_state(model), True, temperature=5.0)
    for name, change in (("a.safetensors", change_safetensors), ("a.pth", change_saved)):
        add(name, change, lambda file=folder / name: lavin.load(file, *base)[0](make_batch(ROWS)))

    params = trainable(model)
    cfg = train.Config()
    optimizer = train.optimizer_for(params, cfg)
    model(make_batch(ROWS)).backward()
    optimizer.step()
    flags = {name: getattr(cfg, name) for name in MUST_MATCH}
    write_checkpoint(folder / "checkpoint.pt", checkpoint_of(model, optimizer, flags))

    def checkpoint():
        load_checkpoint(folder / "checkpoint.pt", trainable(model), optimizer, flags)
        optimizer.step()

    add("checkpoint.pt", change_saved, checkpoint)
    return found


# --- reading them ----------------------------------------------------------------------------------

def verdict(read: Callable, folder: Path) -> str:
    """ "" if the input was read, "-" if it was refused as it should be, otherwise what went wrong."""
    try:
        read()
        return ""
    except (Exception, SystemExit) as e:
        line = ending.message(e) if not isinstance(e, SystemExit) else str(e)
        if "memory" in line or "alloc" in line.replace("allocates", ""):
            return f"memory: {line:.300}"
        if not line:
            return f"traceback: {type(e).__name__}: {e!s:.300}"
        ok = str(folder) in line and line.isprintable() and len(line) <= 1000
        return "-" if ok else f"unnamed: {line:.300}"


def mutated(target: Target, name: str, seed: int, i: int) -> bytes:
    rng = random.Random(f"{seed} {name} {i}")
    return target.change(target.file.with_name(target.file.name + ".whole").read_bytes(), rng)


def child(pipe: int, name: str, target: Target, folder: Path, seed: int, inputs: range) -> None:
    """Read the inputs; write one line for each: its number, then, once it is read, the verdict."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
    more_memory(2**30)
    for i in inputs:
        target.file.write_bytes(mutated(target, name, seed, i))
        os.write(pipe, f"{i} ".encode())
        os.write(pipe, " ".join(verdict(target.read, folder).split()).encode() + b"\n")


def read_all(name: str, target: Target, folder: Path, seed: int, count: int) -> Iterator[tuple[int, str]]:
    """(input, verdict) of each; a process that crashes or hangs costs its input, a new one goes on."""
    first = 0
    while first < count:
        ours, theirs = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                child(theirs, name, target, folder, seed, range(first, count))
            finally:
                os._exit(0)
        os.close(theirs)
        text, why = b"", ""
        while not why:
            if not select.select([ours], [], [], LIMIT)[0]:
                os.kill(pid, 9)
                why = f"hang: {LIMIT} s"
            elif not (new := os.read(ours, 2**16)):
                why = "end"
            else:
                *lines, text = (text + new).split(b"\n")
                for line in lines:
                    number, _, found = line.decode().partition(" ")
                    first = int(number) + 1
                    yield int(number), found
        os.close(ours)
        status = os.waitpid(pid, 0)[1]
        if first < count:
            yield first, why if "hang" in why else f"crash: status {status}"
            first += 1


def run(folder: Path, seed: int, count: int) -> Iterator[Row]:
    """A row for each file. A lost input is kept in `folder`/lost."""
    torch.set_num_threads(1)  # threads do not survive a fork
    work, lost = folder / "work", folder / "lost"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    lost.mkdir(exist_ok=True)
    for name, target in targets(work).items():
        whole = target.file.with_name(target.file.name + ".whole")
        shutil.copyfile(target.file, whole)
        row, refused = Row(name), 0
        if wrong := verdict(target.read, work):
            row.lost.append(f"the unchanged file: {wrong}")
        for i, found in read_all(name, target, work, seed, count):
            row.tried += 1
            refused += found == "-"
            if found not in ("", "-"):
                kept = lost / f"{seed}-{i}-{name.replace('/', '-')}"
                kept.write_bytes(mutated(target, name, seed, i))
                row.lost.append(f"{kept}: {found}")
        whole.replace(target.file)
        row.note = f"{row.tried - refused - len(row.lost)} read, {refused} refused"
        yield row
