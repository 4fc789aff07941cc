"""Run the parts and print the table: tried, survived, lost."""
import argparse
import importlib
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

PARTS = "mutations", "flags", "kills", "disk", "memory", "precision", "environments"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="|".join(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=0, help="how much of each part; 0: the full run")
    parser.add_argument("--out", type=Path, help="folder for what was lost; default: a temporary one")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
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
