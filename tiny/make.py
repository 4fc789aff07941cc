"""Train every model stored in tiny/ from scratch: the recipe behind `make demo`.

    python tiny/make.py              all parts; each resumes from its own checkpoint
    python tiny/make.py adapters     only the last part: untrained adapters, three seeds of the demo's
                                     training, and the text-only model

1. tiny/llama     make_llm.py: a tokenizer and a LLaMA, pretrained on generated text alone
2. tiny/clip      make_vit.py: a CLIP ViT, pretrained on generated pairs of picture and caption; its text
                  tower is discarded
3. tiny/adapters.safetensors   train.py: the adapters that `make demo` trains, seed 0

tiny/README.md gives the scores and the training times.
"""
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
FURTHER = "unseen", "reworded"  # splits of the small world that only this table shows


def run(*command: str, **kw) -> subprocess.CompletedProcess:
    print("$ python", *command, file=sys.stderr, flush=True)
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=True, **kw)


def adapters() -> None:
    """Train the demo's adapters with every seed, and a text-only model; print the scores of each.

    A step at the learning rate 0 leaves the adapters untrained: the table's first row.
    """
    rows = [("untrained", "out/untrained", ["--lr", "0", "--steps", "1"])]
    rows += [(f"LaVIN, seed {seed}", f"out/seed{seed}", ["--seed", str(seed)]) for seed in SEEDS]
    rows.append(("text only, seed 0", "out/text", ["--no-vision", "--adapter", "rep"]))
    lines = []
    for name, out, flags in rows:
        run("train.py", "--out", out, *flags)
        columns = json.loads((ROOT / out / "scores.json").read_text())["columns"]
        for split in FURTHER:
            command = ["--adapters", f"{out}/adapters.safetensors", "--split", split, "--json"]
            result = run("evaluate.py", "scienceqa", *command, stdout=subprocess.PIPE, text=True).stdout
            columns[split] = json.loads(result)["columns"]["Avg"]
        cells = [f"{column} {100 * right / n:.2f}" for column, (right, n) in columns.items()]
        lines.append(f"{name:20}" + "  ".join(cells))
    shutil.copy(ROOT / "out/seed0/adapters.safetensors", ROOT / "tiny/adapters.safetensors")
    problems = json.loads((ROOT / "tiny/data/problems.json").read_text()).values()
    print(*lines, sep="\n")
    for name, pictures in ("IMG", True), ("no IMG", False):
        chance = [100 / len(p["choices"]) for p in problems
                  if p["split"] == "test" and (p["image"] is not None) == pictures]
        print(f"chance on {name}: {sum(chance) / len(chance):.2f}")


PARTS = {"llama": lambda: run("tiny/make_llm.py"),
         "clip": lambda: run("tiny/make_vit.py"),
         "adapters": adapters}

if __name__ == "__main__":
    wanted = sys.argv[1:] or list(PARTS)
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        sys.exit(f"make.py: no part {unknown[0]!r}; parts: {', '.join(PARTS)}")
    for part in wanted:
        PARTS[part]()
