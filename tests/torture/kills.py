"""SIGKILL at random moments and inside every write, train and evaluate, one process and two.

After each kill the same command runs again, train.py with --resume. The end must have the bits of a run that
was never killed: adapters, log, predictions and scores. When one of two processes is killed, the other must
end by itself and say which one ended.
"""
import json
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Callable, Iterator

import torch
from safetensors.torch import load_file

import evaluate
import train
from official import saving
from tiny import world

from . import TINY, Row, ended, forked

FULL = 40  # random kills, over all rows; each write is killed as well
RANDOM, WRITES = "at random moments", "inside every write"


# --- killing a process inside a write --------------------------------------------------------------

def die_at(event: int, counted: Path) -> Callable[[], None]:
    """A function that makes this process kill itself at the n-th moment of its writes; -1: it counts them.

    The moments of an atomic write: half written, not yet renamed, renamed. Of a line: half written, written.
    """
    def patch() -> None:
        seen, replace, append = [0], Path.replace, saving.append

        def moment() -> None:
            if seen[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1
            if event < 0:
                counted.write_text(str(seen[0]))

        class Half:
            """A file that is written in two halves."""
            def __init__(self, file):
                self.file = file

            def write(self, content: bytes) -> int:
                self.file.write(content[:len(content) // 2])
                self.file.flush()
                moment()
                self.file.write(content[len(content) // 2:])
                return len(content)

            def __getattr__(self, name):
                return getattr(self.file, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

        def renamed(self, target):
            moment()
            replace(self, target)
            moment()

        def appended(file, text):
            append(Half(file), text)
            moment()

        saving.open, Path.replace = lambda *args: Half(open(*args)), renamed
        for module in ("evaluation.log", "evaluation.answering"):
            __import__(module, fromlist=["append"]).append = appended

    return patch


# --- the runs --------------------------------------------------------------------------------------

class Runs:
    """One command on one process or two, the state it must end in, and how long it takes."""

    def __init__(self, name: str, folder: Path, ranks: int):
        self.name, self.folder, self.ranks = name, folder, ranks
        self.at, self.counted = folder / f"{name}-{ranks}", folder / "moments"
        self.main = (train if name == "train" else evaluate).main

    def command(self) -> list[str]:
        both = [*TINY, "--data", self.folder / "w", "--max_new_tokens", "12"]
        if self.name == "evaluate":
            return ["scienceqa", *both, "--adapters", self.folder / "base/adapters.safetensors",
                    *"--batch_size 2 --json --out".split(), self.at / "p.jsonl"]
        resume = ["--resume"] if (self.at / "checkpoint.pt").exists() else []
        return [*both, *resume, *"--batch_size 8 --micro_batch 4 --dropout 0.1 --epochs 9 --steps 6".split(),
                *"--save_every 2 --log_every 1 --out".split(), self.at]

    def start(self, moments: dict[int, int] | None = None) -> list[int]:
        """The process ids. moments {rank: the moment of its death}"""
        env = {}
        if self.ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.at.mkdir(exist_ok=True)
        nothing = lambda: None
        return [forked(self.main, self.command(), self.folder / f"log{rank}",
                       die_at(moments[rank], self.counted) if rank in (moments or {}) else nothing,
                       RANK=str(rank), **env)
                for rank in range(self.ranks)]

    def end(self, pids: list[int]) -> list[int | str]:
        return [ended(pid, limit=600) for pid in pids]  # the machine may be busy

    def state(self) -> dict:
        """All that must be the same after a kill."""
        state = {"part": [file.name for file in self.at.glob("*.part")]}
        if self.name == "evaluate":
            return {**state, "lines": sorted((self.at / "p.jsonl").read_text().splitlines())}
        rows = [json.loads(line) for line in open(self.at / "log.jsonl")]
        keys = "step", "loss", "lr", "grad_norm"
        checkpoint = torch.load(self.at / "checkpoint.pt", weights_only=True)
        tensors = [*load_file(self.at / "adapters.safetensors").items(), *checkpoint["adapters"].items()]
        tensors += [(f"{i} {name}", t) for i, moments in checkpoint["optimizer"]["state"].items()
                    for name, t in moments.items()]
        return {**state, "log": [[row[key] for key in keys] for row in rows],
                "bits": {name: t.numpy().tobytes() for name, t in tensors},
                **{name: (self.at / name).read_text() for name in ("predictions.json", "scores.json")}}

    def whole(self) -> str:
        """Finish the run; what differs from a run without a kill, or "". """
        if any(self.end(self.start())):
            return "cannot go on: " + " ".join((self.folder / "log0").read_text().split())[-400:]
        found = self.state()
        return ", ".join(key for key in found if found[key] != self.expected[key])

    def reference(self) -> int:
        """Run without a kill; return how many moments its writes have."""
        started = time.time()
        assert self.end(self.start()) == [0] * self.ranks, (self.folder / "log0").read_text()
        self.seconds, self.expected = time.time() - started, self.state()
        shutil.rmtree(self.at)
        self.end(self.start({0: -1}))
        shutil.rmtree(self.at)
        return int(self.counted.read_text())

    def survivor(self, status: list[int | str]) -> str:
        """What is wrong with how the other process of two ended, or "". """
        if self.ranks == 1 or -9 not in status:
            return ""
        other = 1 - status.index(-9)
        said = (self.folder / f"log{other}").read_text()
        known = f"rank {1 - other} ended before the others" in said
        ok = status[other] == 0 or status[other] == 1 and known
        return "" if ok else f"the other process: {status[other]} {said[-300:]}"

    def kill_randomly(self, rng: random.Random) -> tuple[int, str]:
        """(kills, what was lost): up to three kills of one run, each during the run that continues it."""
        shutil.rmtree(self.at, ignore_errors=True)
        kills, wrong = 0, ""
        for _ in range(rng.choice((1, 2, 3))):
            pids = self.start()
            time.sleep(rng.uniform(0, 0.95) * self.seconds)
            victim = rng.randrange(self.ranks)
            os.kill(pids[victim], signal.SIGKILL)
            time.sleep(0.05)
            training = "step" in (self.folder / "log0").read_text()
            if self.ranks > 1 and not training:
                os.kill(pids[1 - victim], signal.SIGTERM)  # as torchrun does; there may be no group yet
            status = self.end(pids)
            kills += status[victim] == -9
            if training:
                wrong = wrong or self.survivor(status)
            elif "hang" in status:
                wrong = "the other process hangs"
        return kills, wrong or self.whole()

    def kill_in_write(self, moment: int) -> str:
        shutil.rmtree(self.at, ignore_errors=True)
        status = self.end(self.start({0: moment}))
        if -9 not in status:
            return f"was not killed: {status}"
        return self.survivor(status) or self.whole()


def prepare(folder: Path) -> None:
    """A small data set, and adapters to evaluate."""
    torch.set_num_threads(1)  # threads do not survive a fork
    shutil.rmtree(folder / "w", ignore_errors=True)
    world.write(folder / "w", seed=5, sizes={"test": 9, "val": 1, "train": 24})
    flags = [*TINY, "--data", folder / "w", "--out", folder / "base", "--split", ""]
    assert ended(forked(train.main, [*flags, "--steps", "2", "--batch_size", "8"], folder / "log0")) == 0


def run(folder: Path, seed: int, count: int) -> Iterator[Row]:
    prepare(folder)
    rng = random.Random(seed)
    for name in ("train", "evaluate"):
        for ranks in (1, 2):
            runs, row = Runs(name, folder, ranks), Row(f"{name}, {ranks} process(es), {RANDOM}")
            moments = runs.reference()
            while row.tried < count / 4:
                kills, wrong = runs.kill_randomly(rng)
                row.tried += kills
                row.lost += [wrong] * bool(wrong)
            yield row
            row = Row(f"{name}, {ranks} process(es), {WRITES}")
            for moment in range(0, moments, max(1, 40 // count) * ranks):
                wrong = runs.kill_in_write(moment)
                row.tried += 1
                row.lost += [f"moment {moment} of {moments}: {wrong}"] * bool(wrong)
            yield row
