"""Train the tiny model in bf16 and in fp32, three seeds each. The scores must agree within the seeds' noise.

Noise is the largest difference between two seeds of one dtype, at least one point: bf16 may move the mean by
no more than that. The environment variable TORTURE_CURVES names a PNG for the curves of the losses.
"""
import json
import os
import shutil
from pathlib import Path
from typing import Iterator

import numpy as np
import torch

import train
from evaluation import chart
from tiny import world

from . import TINY, Row, ended, forked

FULL = 100  # steps of 8 samples: a CPU without instructions for bf16 takes ten times as long as in fp32
SEEDS = 3


def run(folder: Path, seed: int, count: int) -> Iterator[Row]:
    torch.set_num_threads(1)  # threads do not survive a fork
    shutil.rmtree(folder, ignore_errors=True)
    world.write(folder / "w", seed=5, sizes={"test": min(200, 10 * count), "val": 1, "train": 8 * count})
    curves, scores = {}, {}
    flags = [*TINY, "--data", folder / "w", "--batch_size", 8, "--micro_batch", 8, "--lr", 0.2,
             "--log_every", 5, "--epochs", 1]
    for s in range(seed, seed + SEEDS):
        for dtype in ("fp32", "bf16"):
            out = folder / f"{dtype}-{s}"
            argv = [*flags, "--out", out, "--dtype", dtype, "--seed", s]
            status = ended(forked(train.main, argv, folder / "log"), 1500)
            assert status == 0, (folder / "log").read_text()[-400:]
            curves[dtype, s] = {r["step"]: r["loss"] for r in map(json.loads, open(out / "log.jsonl"))}
            scores[dtype, s] = json.loads((out / "scores.json").read_text())["accuracy"]["Avg"]
    if png := os.environ.get("TORTURE_CURVES"):
        of_run = {f"{dtype}, seed {s}": [*c.items()] for (dtype, s), c in curves.items()}
        chart.lines(Path(png), of_run, "loss")
    last = {run: 100 * curve[max(curve)] for run, curve in curves.items()}
    for what, value in (("accuracy", scores), ("last loss x 100", last)):
        of = lambda dtype, value=value: np.array([x for run, x in value.items() if run[0] == dtype])
        fp32, bf16 = of("fp32"), of("bf16")
        noise = max(1.0, np.ptp(fp32), np.ptp(bf16))
        row = Row(f"bf16 and fp32, {count} steps: {what}", tried=2 * SEEDS)
        row.note = f"fp32 {fp32.round(2).tolist()}, bf16 {bf16.round(2).tolist()}, noise {noise:.2f}"
        if abs(fp32.mean() - bf16.mean()) > noise:
            row.lost.append(row.note)
        yield row
