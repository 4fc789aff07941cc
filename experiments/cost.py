"""What do MM-Adapters cost, against LoRA on q and v, at the accuracy that each reaches?

Claim: MM-Adapters are cheap. LaVIN-7B trains 3.8M parameters in 1.4 hours on eight A100, and saves 15 MB.
The paper does not compare them with LoRA. Both merge into the frozen weights, so answering costs the same.

Setting, chosen before any run:
- World: negatives, 80 steps, five seeds. Neck and MM-Adapters in the ViT in all rows; only LLaMA's part
  differs: MM-Adapters of width 8, or LoRA of rank 2 or 8 in wq and wv. Rank 2 trains fewer parameters than
  the MM-Adapters, rank 8 more.
- LoRA's learning rate: the demo's was chosen for adapters. So rank 8 is first trained with the demo's and
  with a third of it, on seed 100, which is used nowhere else. The better one on 400 val problems is taken for
  both ranks; the demo's if they are equal.
- Equal accuracy: the smallest rank whose mean is not more than two standard errors below the MM-Adapters'.
- Step time: median of 20 forward and backward passes of 32 problems, one thread, the models in turn, after
  all runs, with nothing else running. The optimizer is left out.
- Expected: LoRA reaches the same accuracy. MM-Adapters of width 8 and LoRA of rank 5 have the same size. A
  step costs the same within a few per cent, because the frozen weights take nearly all of its time.

If PEFT is installed, the parameters of its LoRA are counted beside ours; a test compares the outputs.
"""
import sys
import time
from statistics import median

import cli

import torch

import data
from evaluation import chart
from experiments.lora import count_of_peft
from experiments.runs import Options, Run, accuracies, build, paired, row, run_all, write
from experiments.table2 import ROWS

RANKS, RATES = (2, 8), (0.048, 0.016)
MMA = "MM-Adapters, width 8"


def lora(r: int, lr: float, split: str = "test") -> Run:
    return Run(flags={"adapter": "rep", "lr": lr}, lora=r, split=split)


def step_times(runs: dict[str, Run], options: Options, repeats: int = 20) -> dict[str, float]:
    """{name: milliseconds of forward and backward of one batch}, the models in turn on the same batches"""
    torch.set_num_threads(1)
    models, taken = {}, {name: [] for name in runs}
    for name, run in runs.items():
        models[name], _, examples, cfg = build(run, options)  # the examples are the same for all
    steps = data.Steps(examples, cfg.batch_size, cfg.batch_size, 0, 1, 0, models[name].vit.cfg.image_size,
                       cfg.normalize)
    for step in range(repeats + 2):  # the first two warm up
        [batch], n = steps[step % steps.per_epoch]
        for name, model in models.items():
            started = time.perf_counter()
            (model(batch) / n).backward()
            taken[name].append(1000 * (time.perf_counter() - started))
    return {name: round(median(times[2:]), 1) for name, times in taken.items()}


def main() -> None:
    options = cli.parse(Options)
    tried = run_all({f"{lr:g}": lora(8, lr, "val") for lr in RATES}, options, range(100, 101))
    tried = {float(lr): accuracies(results)[0] for lr, results in tried.items()}
    lr = max(RATES, key=tried.get)  # the first of equals
    runs = {MMA: ROWS["+ MM-Adapter"], **{f"LoRA, rank {r}": lora(r, lr) for r in RANKS}}
    results = run_all(runs, options)
    ours, theirs = results["LoRA, rank 8"][0]["trained in LLaMA"], count_of_peft(8)
    peft = "PEFT is not installed, so LoRA's parameters were counted only once"
    if theirs is not None:
        peft = f"PEFT's LoRA of rank 8 has {theirs:,} parameters, ours {ours:,}"
    print(peft, file=sys.stderr)
    times, table, equal = step_times(runs, options), {}, None
    for name, here in results.items():
        difference, error = paired(accuracies(here), accuracies(results[MMA]))
        if name != MMA and equal is None and difference >= -2 * error:
            equal = name
        table[name] = {"trained in LLaMA": here[0]["trained in LLaMA"], "trained": here[0]["trained"],
                       "file, bytes": here[0]["bytes"], "step, ms": times[name], **row(here),
                       "minus MM-Adapters": "–" if name == MMA else [difference, error]}
    write("cost", options, {f"accuracy on {options.limit} problems": table}, peft=peft, learning_rates=tried,
          learning_rate_of_LoRA=lr, equal_accuracy=equal or "neither rank")
    chart.bars(f"{options.results}/cost.png",
               {f"{name}: {table[name]['trained in LLaMA']:,}": table[name]["all"] for name in runs},
               "accuracy in per cent, by the number of parameters trained in LLaMA")


if __name__ == "__main__":
    cli.run(main)
