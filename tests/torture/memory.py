"""A long training run must not grow, and nothing may talk to a network.

The long run trains a small LaVIN of random weights: what could grow is the loop, the log and the data, not
the model. The slope of its resident memory is fitted over the second half.
"""
import os
import shutil
import sys
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from conftest import randomize
from test_weights import TOKENIZER, write_hf

import evaluate
import sample
import train
from clip import CLIPConfig, VisionTransformer
from evaluation.log import Log
from llama import LLaMA, LLaMAConfig
from tiny import world

from . import ROOT, TINY, Row, ended, forked

FULL = 20_000  # steps
SLOPE = 1.0  # KB a step


def record_memory(file: Path) -> None:
    """From here on, every line of the log also notes the step and the resident memory in KB."""
    flush = Log.flush

    def noted(self, step, *args):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        with open(file, "a") as f:
            f.write(f"{step} {pages * os.sysconf('SC_PAGE_SIZE') // 1024}\n")
        return flush(self, step, *args)

    Log.flush = noted


def long_run(folder: Path, steps: int) -> Row:
    cfg = LLaMAConfig(16, 1, 2, ffn_dim=32, vocab_size=2057, norm_eps=1e-5, max_seq_len=256)
    models = LLaMA(cfg), VisionTransformer(CLIPConfig(16, 8, 16, 1, 2, 1))
    for name, model in zip(("llama", "clip"), models):
        randomize(model)
        write_hf(folder / name, model)
    shutil.copyfile(TOKENIZER, folder / "llama/tokenizer.model")
    argv = [x for name, at in (("llama", "llama"), ("clip", "clip"), ("data", "w"), ("out", "out"))
            for x in (f"--{name}", folder / at)]
    argv += ["--steps", steps, "--log_every", max(1, steps // 200), "--save_every", max(1, steps // 20)]
    argv += "--split= --batch_size 2 --micro_batch 2 --epochs 1000000 --dropout 0.1 --device cpu".split()
    status = ended(forked(train.main, argv, folder / "log", lambda: record_memory(folder / "memory")), 3000)
    row = Row(f"{steps:,} steps of training", tried=1)
    if status:
        row.lost.append(f"status {status}: {(folder / 'log').read_text()[-300:]}")
        return row
    step, kb = np.loadtxt(folder / "memory").T
    half = len(step) // 2
    slope = np.polyfit(step[half:], kb[half:], 1)[0]
    row.note = f"{slope:+.4f} KB a step, {kb[half] / 1024:.0f} to {kb[-1] / 1024:.0f} MB"
    if slope >= SLOPE and steps == FULL:
        row.lost.append(row.note)
    return row


def no_network() -> None:
    """From here on, a socket that is connected, bound or looked up ends the process with status 99."""
    def audit(event: str, args: tuple) -> None:
        if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname"):
            os.write(2, f"{event} {args[1:]}\n".encode())
            os._exit(99)
    sys.addaudithook(audit)


def silent(folder: Path) -> Iterator[Row]:
    """Each command, in a process that may not open a connection."""
    def command(name: str, main, argv: list) -> Row:
        row = Row(f"no network: {name}", tried=1)
        status = ended(forked(main, argv, folder / "log", no_network))
        if status:
            row.lost.append(f"status {status}: {(folder / 'log').read_text()[-300:]}")
        return row

    data, adapters = ["--data", folder / "w"], ["--adapters", folder / "trained/adapters.safetensors", *TINY]
    yield command("train.py", train.main, [*TINY, *data, "--out", folder / "trained", "--steps", 1])
    yield command("evaluate.py", evaluate.main, [*data, *adapters, "--out", folder / "p.jsonl"])
    image = ["--image", ROOT / "tiny/demo.png", "--prompt", "What?"]
    yield command("sample.py", sample.main, [*adapters, *image])
    yield command("evaluate.py --predictions", evaluate.main, [*data, "--predictions", folder / "p.jsonl"])


def run(folder: Path, seed: int, count: int) -> Iterator[Row]:
    torch.set_num_threads(1)  # threads do not survive a fork
    shutil.rmtree(folder, ignore_errors=True)
    world.write(folder / "w", seed=5, sizes={"test": 4, "val": 1, "train": 24})
    yield from silent(folder)
    yield long_run(folder, count)
