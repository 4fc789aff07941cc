"""Every flag of every command at, below and beyond its range, and with words that are no value for it.

The flags come from the dataclasses. A value must be refused by the parser (exit status 2, one line with the
flag), or the command must run with it: to its end, or to one line (exit status 1) that names a flag, a file
or the value.
"""
import dataclasses
import inspect
import os
import re
from pathlib import Path
from typing import Iterator

import cli

import published
import torch
from conftest import make_lavin

import evaluate
import sample
import train
from tiny import world

from . import TINY, Row, ended, forked, more_memory

FULL = 10**9  # command lines of each command; there are fewer
LIMIT = 60
WORDS = ("", " ", "x", "-1", "--", "1,2", "é\udcff", "../x", "/dev/null", "/", "x" * 300)


def values(f: dataclasses.Field, comment: str) -> list[str]:
    """At, below and beyond the range of a flag, and what is no value for it."""
    if isinstance(f.default, bool):
        return ["", "1", "no"]
    if isinstance(f.default, str | None):
        return list(WORDS)
    found, low, high = cli.RANGE.search(comment), "0", "inf"
    if found:
        low, high = found[2], found[3]
    whole = isinstance(f.default, int)
    step = 1 if whole else 1e-6
    bounds = [type(f.default)(float(x)) for x in (low, high) if "inf" not in x]
    return [*(str(x + d) for x in bounds for d in (-step, 0, step)), "nan", "inf", "-inf", "1e308", "1e-300",
            "9" * 400, str(10**14), "", "x", "1.5", "0x10", "1_0"]


def in_range(value: int | float, comment: str) -> bool:
    """Written anew, to check the parser's own."""
    opening, low, high, closing = re.search(r"(?:([\[(])([^\s\[(]+), (\S+)([\])]))?$", comment).groups()
    if type(value) is int and abs(value) >= 10**15 or value != value:
        return False
    if opening is None:
        return abs(value) != float("inf")
    return (value > float(low) or opening == "[" and value == float(low)) and \
        (value < float(high) or closing == "]" and value == float(high))


def outcome(main, argv: list[str], folder: Path) -> tuple[int | str, str]:
    """(exit status, stderr) of a command in a forked process; a negative status for a crash or a hang."""
    log = folder / "log"
    status = ended(forked(main, argv, log, lambda: (os.chdir(folder), more_memory(2**31))), LIMIT)
    return status, log.read_text("utf-8", "replace")


def wrong(main, config: type, base: list[str], f: dataclasses.Field, text: str, folder: Path) -> str:
    """What is wrong with how a command takes a flag, or "". """
    comment, flag = comment_of(config, f), f"--{f.name}"
    kind = str if f.default is None else type(f.default)
    status, err = outcome(main, [*base, f"{flag}={text}"], folder)
    lines = [line for line in err.splitlines() if line.startswith("command.py: ")]
    told = lines[-1] if lines else ""
    if kind in (int, float):
        try:
            fits = in_range(kind(text), comment)
        except ValueError:
            fits = False
        if not fits:
            ok = status == 2 and flag in told and len(lines) == 1
            return "" if ok else f"expected 2: {status} {err[-300:]}"
    if kind is bool:
        return "" if status == 2 and flag in told else f"expected 2: {status} {err[-300:]}"
    if status == 0 and not lines:
        return ""
    shown = text.partition(",")[0][:9].encode(errors="backslashreplace").decode()
    names = any(name in told for name in ("--", str(folder), "tiny/", shown or "--"))
    return "" if status in (1, 2) and len(lines) == 1 and names else f"{status} {err[-300:]}"


def commands(folder: Path) -> dict[str, tuple]:
    """{name: (main, the dataclass, flags that make the run short)}"""
    world.write(folder / "w", seed=5, sizes={"test": 2, "val": 1, "train": 4})
    published.coco(folder / "coco", ("test", "test"))
    published.mme(folder / "mme", {"existence": 1})
    published.truthfulqa(folder / "mc_task.json")
    w, adapters = str(folder / "w"), ["--adapters", str(folder / "trained/adapters.safetensors"), *TINY]
    start = [*TINY, "--data", w, "--batch_size", "4", "--split", "", "--steps", "1"]
    assert outcome(train.main, [*start, "--out", "trained"], folder)[0] == 0
    found = {"train.py": (train.main, train.Config, [*start, "--out", "o"])}
    for name, data in (("scienceqa", w), ("coco", folder / "coco"), ("mme", folder / "mme"),
                       ("truthfulqa", folder / "mc_task.json")):
        config = evaluate.COMMANDS[name][0]
        short = ["--max_new_tokens", "2"] if name != "truthfulqa" else []
        found[f"evaluate.py {name}"] = evaluate.main, config, [name, *adapters, "--data", str(data), *short]
    found["sample.py"] = sample.main, sample.Config, [*adapters, "--prompt", "What?", "--max_new_tokens", "2"]
    return found


def run(folder: Path, seed: int, count: int) -> Iterator[Row]:
    torch.set_num_threads(1)  # threads do not survive a fork
    make_lavin()
    tested = set()  # evaluate.py's commands share most of their flags
    for name, (main, config, base) in commands(folder).items():
        row = Row(name)
        fields = [f for f in dataclasses.fields(config) if f.name not in tested or "evaluate" not in name]
        if "evaluate" in name:
            tested |= {f.name for f in fields} - {"data", "out", "predictions"}
        lines = [(f, text) for f in fields for text in values(f, comment_of(config, f))]
        for f, text in lines[:: max(1, len(lines) // count)]:
            if f.name == "workers" and text in ("255", "256"):
                continue  # this many processes
            row.tried += 1
            for out in (folder / "o/train.lock", folder / "o/checkpoint.pt"):
                out.unlink(missing_ok=True)
            if found := wrong(main, config, base, f, text, folder):
                row.lost.append(f"--{f.name}={ascii(text)[:60]}: {' '.join(found.split())}")
        yield row


def comment_of(config: type, f: dataclasses.Field) -> str:
    source = "".join(inspect.getsource(c) for c in config.__mro__[-2::-1])  # base classes first
    return dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", source, re.M)).get(f.name, "")
