"""Table 2 in miniature: what does each part of LaVIN add?

Claim: on ScienceQA the parts add up. Text only 82.65, + vision 86.32, + joint optimisation (adapters in the
image encoder too) 87.34, + stronger image encoder 88.33, + MM-Adapter 89.41, + larger LLM 90.50.

Setting, chosen before any run:
- World: negatives. On the pictures that the ViT knows, the first row with vision leaves the others no room.
  On pictures that it does not know, adapters in the ViT have something to do.
- Length: 80 steps, a quarter of the demo's (now a sixth), so that the rows end below the ceiling. Five seeds.
- Weak encoder: the first three of the ViT's six blocks, with their three [cls] tokens. The paper's ViT-B/16
  has half the blocks and half the [cls] tokens of its ViT-L/14. Ours is weaker in one more respect: its
  blocks were pretrained to serve the blocks after them.
- Rows: as in the paper, each adds one part to the row before. Larger LLM: not run, tiny/ holds only one.
- Reported: accuracy on 400 test problems, and the paired difference to the row before over all of them.
- Expected: vision and the stronger encoder add most. Joint optimisation adds less. The MM-Adapter adds
  nothing that five seeds can tell from zero: nothing in this world asks text and pictures to be treated
  differently, and a RepAdapter also sees in the prompt whether there is a picture.
"""
import cli

from evaluation import chart
from experiments.runs import Options, Run, accuracies, paired, row, run_all, write

WEAK, REP = {"encoder": "half"}, {"adapter": "rep"}
ROWS = {
    "text only": Run(flags=REP | {"vision": False}),
    "+ vision": Run(flags=REP | {"vit_adapters": False}, **WEAK),
    "+ joint optimisation": Run(flags=REP, **WEAK),
    "+ stronger image encoder": Run(flags=REP),
    "+ MM-Adapter": Run(routings=("learned", "other modality", "exchanged", "half")),  # for routing.py
}
PAPER = dict(zip([*ROWS, "+ larger LLM"], "82.65 86.32 87.34 88.33 89.41 90.50".split()))


def main() -> None:
    options = cli.parse(Options)
    table, before = {}, None
    for name, here in run_all(ROWS, options).items():
        table[name] = {"paper": PAPER[name], "trained": here[0]["trained"], **row(here)}
        table[name]["minus row before"] = paired(accuracies(here), accuracies(before)) if before else "–"
        before = here
    table["+ larger LLM"] = {"paper": PAPER["+ larger LLM"], "trained": "not run"}
    write("table2", options, {f"accuracy on {options.limit} problems": table})
    chart.bars(f"{options.results}/table2.png", {name: table[name]["all"] for name in ROWS},
               "accuracy in per cent, all problems; black: standard error over seeds")


if __name__ == "__main__":
    cli.run(main)
