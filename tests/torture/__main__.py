"""Run the parts and print the table: tried, survived, lost."""
import argparse
import importlib
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

LANES = ("mutations", "flags", "kills", "disk", "memory"), ("precision", "environments")  # one per core
PARTS = [part for lane in LANES for part in lane]


def both_lanes(args) -> None:
    """Run the parts of the two lanes at the same time, each lane in a process; exit with 1 if one lost."""
    command = [sys.executable, "-m", __package__, "--seed", str(args.seed), "--count", str(args.count)]
    lanes = [subprocess.Popen([*command, *lane, *(["--out", str(args.out)] if args.out else [])])
             for lane in LANES]
    sys.exit(max(abs(lane.wait()) for lane in lanes) > 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="default: all, in two processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=0, help="how much of each part; 0: the full run")
    parser.add_argument("--out", type=Path, help="folder for what was lost; default: a temporary one")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    if not args.parts:
        return both_lanes(args)
    out = args.out or Path(tempfile.mkdtemp(prefix="torture-"))
    print(f"seed {args.seed}, Python {platform.python_version()}, torch {torch.__version__}, {out}")
    print(f"{'part':<13}{'what':<38}{'tried':>7}{'survived':>10}{'lost':>6}  note")
    tried = lost = 0
    for part in args.parts:
        module, started = importlib.import_module(f".{part}", __package__), time.time()
        (out / part).mkdir(parents=True, exist_ok=True)
        for row in module.run(out / part, args.seed, args.count or module.FULL):
            n = len(row.lost)
            print(f"{part:<13}{row.what:<38}{row.tried:>7}{row.tried - n:>10}{n:>6}  {row.note}", flush=True)
            for line in row.lost:
                print(f"    LOST {line}", flush=True)
            tried, lost = tried + row.tried, lost + n
        print(f"{part:<13}{'':<38}{'':>23}  {time.time() - started:.0f} s")
    print(f"{'all':<51}{tried:>7}{tried - lost:>10}{lost:>6}")
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
