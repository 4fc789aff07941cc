"""A disk that is full after n bytes: every save must end in one line, with the old file as it was.

RLIMIT_FSIZE makes the system refuse to let a file grow beyond n bytes. For small files n takes every value,
for large ones FULL values. At last whole training runs hit such a disk, and then go on with more room.
"""
import io
import resource
import shutil
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import torch
from conftest import make_lavin
from test_weights import make_llama, released_file, write_hf
from weights_on_disk import released_state

import train
import weights
from adapters import trainable
from evaluation import answering, ending, scores
from evaluation.log import Log
from evaluation.routing import show_routing
from official.adapter_files import write_checkpoint
from official.saving import append
from prompts import Sample
from tiny import world

from . import Row, checkpoint_of, ended, forked

FULL = 400  # sizes of a disk for each large file, and a 20th of it whole runs


def limit(n: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def on_a_full_disk(save: Callable[[], None], n: int) -> str:
    """The line in which `save` ends, if files cannot grow beyond n bytes; "" if it does not fail."""
    limit(n)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            save()
    except Exception as e:
        return ending.message(e) or f"traceback {type(e).__name__}: {e}"
    finally:
        limit(resource.RLIM_INFINITY)
    return ""


def saves(folder: Path) -> dict[str, tuple[Path, Callable]]:
    """{what is saved: (file, save it)}; every file exists already"""
    folder.mkdir(parents=True)
    model, state = make_lavin(), {}
    optimizer = train.optimizer_for(trainable(model), train.Config())
    released_file(folder / "old.pth", released_state(model), True, temperature=5.0)
    hf = write_hf(folder / "hf", make_llama())
    sample = Sample("a", "", "", None, {"task": "OCR", "picture": "x", "question": "q", "answer": "Yes"})
    copy = folder / "copy"

    def converted():
        shutil.rmtree(copy, ignore_errors=True)
        weights.convert(hf, copy)

    found = {
        "checkpoint": ("checkpoint.pt", lambda file: write_checkpoint(
            file, checkpoint_of(model, optimizer, state))),
        "adapters": ("a.safetensors", lambda file: model.save(
            file, format="QCM-A", captions=False, max_new_tokens=8)),
        "exported adapters": ("a.pth", lambda file: weights.export_adapters(folder / "a.safetensors", file)),
        "converted adapters": ("b.safetensors", lambda file: weights.convert(folder / "old.pth", file)),
        "converted LLaMA": ("copy/model.safetensors", lambda file: converted()),
        "log": ("log.jsonl", lambda file: Log(file, 9, 2)),
        "start of predictions": ("p.jsonl", lambda file: answering.start_file(file, {"seed": 0}, {"a": "b"})),
        "MME's results": ("OCR.txt", lambda file: scores.write_mme(folder, [sample], {"a": "Yes"})),
        "picture of the routing": ("routing.png", lambda file: show_routing(model, file))}
    (folder / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    for name, save in found.values():
        on_a_full_disk(lambda: save(folder / name), resource.RLIM_INFINITY)
    return {what: (folder / name, partial(save, folder / name)) for what, (name, save) in found.items()}


def appended(folder: Path) -> Row:
    """Lines of predictions and of the log, written byte by byte up to where the disk is full."""
    row, file = Row("a line of predictions"), folder / "lines.jsonl"
    line = answering.json_lines({"a": "The answer is A."})
    for n in range(len(line)):
        file.write_text(line)
        with open(file, "ab", buffering=0) as f:
            told = on_a_full_disk(lambda f=f: append(f, line), len(line) + n)
        row.tried += 1
        if str(file) not in told or not file.read_text().startswith(line):
            row.lost.append(f"{n} bytes: {told}")
    return row


def whole_runs(folder: Path, count: int) -> Row:
    """Train until the disk is full; with room again, the run must end in the bits of one without trouble."""
    from .kills import Runs

    row, runs = Row("whole training runs"), Runs("train", folder, 1)
    world.write(folder / "w", seed=5, sizes={"test": 9, "val": 1, "train": 24})
    runs.reference()
    for n in range(4096, 10**6, 10**6 // count):  # less would cut what the run says, too
        shutil.rmtree(runs.at, ignore_errors=True)
        runs.at.mkdir()
        log = folder / "log-of-a-full-disk"
        status = ended(forked(runs.main, runs.command(), log, lambda n=n: limit(n)))
        told = [line for line in log.read_text().splitlines() if line.startswith("command.py: ")]
        row.tried += 1
        if status == 0:
            break
        if status != 1 or len(told) != 1 or str(runs.at) not in told[0]:
            row.lost.append(f"{n} bytes: {status} {told}")
        elif wrong := runs.whole():
            row.lost.append(f"{n} bytes: {wrong}")
    return row


def run(folder: Path, seed: int, count: int) -> Iterator[Row]:
    torch.set_num_threads(1)  # threads do not survive a fork
    shutil.rmtree(folder, ignore_errors=True)
    for what, (file, save) in saves(folder / "files").items():
        row, old = Row(what), file.read_bytes()
        for n in range(0, len(old), max(1, len(old) // count)):
            told = on_a_full_disk(save, n)
            row.tried += 1
            intact = what == "converted LLaMA" or file.read_bytes() == old  # that one is written anew
            left = [f.name for f in (folder / "files").rglob("*.part")]
            if str(folder) not in told or not intact or left:
                row.lost.append(f"{n} bytes: {told!r}{'' if intact else ', the old file is lost'}{left}")
        row.note = f"{len(old):,} bytes"
        yield row
    yield appended(folder)
    yield whole_runs(folder, max(1, count // 20))
