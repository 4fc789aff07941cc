"""Mixture-of-modality training: are mixed batches better than text first and pictures afterwards?

Claim: one training on mixed batches of text and image-text samples serves both and keeps the language model's
abilities, without a separate stage for the images. The paper gives no number for another order.

Setting, chosen before any run:
- World: balanced, 1,280 training problems with a picture and 1,280 without. 80 steps, five seeds, full model.
- Mixed: all problems shuffled, as in train.py. Text first: the same problems, those without a picture in the
  first 40 steps, the others in the last 40. Both see every problem once, under one learning-rate schedule.
- Reported: accuracy on 200 test problems with and 200 without a picture, paired differences to mixed, and of
  the text-first runs what they know halfway and forget until the end.
- Expected: text first forgets some of the made-up words, which only the text problems use. It does not lose
  the facts, which are in the frozen LLaMA. On pictures it is no worse than mixed: all its picture problems
  are the latest it saw, though at a falling learning rate. The routers could shield text from the images'
  updates, but the two experts are nearly equal (see routing), so they do not.
"""
import cli

from evaluation import chart
from experiments.runs import COLUMNS, Options, Run, accuracies, mean, paired, row, run_all, write


def main() -> None:
    options = cli.parse(Options)
    orders = {order: Run(world="balanced", order=order) for order in ("mixed", "text first")}
    mixed, end = run_all(orders, options).values()
    half = [result["halfway"][0] for result in end]
    table = {"mixed": row(mixed), "text first, halfway": {}, "text first, at the end": row(end),
             "text first minus mixed": {}, "at the end minus halfway": {}}
    for column in COLUMNS:
        before, after = [scores[column] for scores in half], accuracies(end, column=column)
        table["text first, halfway"][column] = mean(before)
        table["text first minus mixed"][column] = paired(after, accuracies(mixed, column=column))
        table["at the end minus halfway"][column] = paired(after, before)
    write("mixture", options, {f"accuracy on {options.limit} problems": table})
    chart.bars(f"{options.results}/mixture.png",
               {f"{name}: {label}": table[name][column] for name in list(table)[:3]
                for column, label in (("without", "text"), ("with picture", "pictures"))},
               "accuracy in per cent; black: standard error over seeds")


if __name__ == "__main__":
    cli.run(main)
