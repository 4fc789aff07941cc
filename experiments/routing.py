"""Does the router route? Its weights over training, its temperature, and what happens if they are changed.

Claim: the router shifts LLaMA between text and images, with a temperature tau of 10 (5 for LaVIN-13B). The
paper gives no number for tau or for the weights themselves. Its Table 2 credits the MM-Adapter with 1.1
points: 88.33 without, 89.41 with it.

Setting, chosen before any run:
- World 1: negatives, 80 steps, five seeds, the full model at tau 0.1, 1, 5, 10 and 100.
- World 2: flipped, 80 steps, five seeds, RepAdapter and MM-Adapter at tau 10. The same words ask for
  different answers with and without a picture. If a router pays anywhere, then here.
- Recorded every fourth step: w of every layer, and the cosine between the two experts' phi_u.
- After training at tau 10, the same model answers with other w: each modality with the w of the other one;
  w_0 and w_1 exchanged; both 1/2. The ViT's routers keep theirs.
- Reported: accuracy on 400 test problems, paired differences, at the end of training the mean cosine and
  |w_0(text) - w_0(image)|, averaged over layers.
- Expected: the experts start equal, with w near 1/2, and get nearly the same updates. So in world 1 their
  cosine ends near 1 and no change of w matters. The smaller tau, the further w and the experts part; accuracy
  does not follow. In world 2 w parts, and with the other modality's w the accuracy falls. But "Image: N/A"
  in the prompt also tells the modality, so a RepAdapter may learn the flip without a router.
"""
from statistics import fmean

import cli

from evaluation import chart
from experiments.runs import Options, Run, accuracies, mean, paired, row, run_all, write
from experiments.table2 import ROWS

TAUS = (0.1, 1.0, 5.0, 10.0, 100.0)
MM = ROWS["+ MM-Adapter"]
ROUTINGS = MM.routings
RUNS = {f"tau {tau:g}": MM if tau == 10 else Run(flags={"tau": tau}) for tau in TAUS}
RUNS["flipped, RepAdapter"] = Run(world="flipped", flags={"adapter": "rep"})
RUNS["flipped, MM-Adapter"] = Run(world="flipped", routings=ROUTINGS)


def apart(results: list[dict]) -> dict[str, list[float]]:
    """How far the two modalities and the two experts of LLaMA's layers are apart after training."""
    ends = [result["trace"][-1] for result in results]
    gap = [fmean(abs(text[0] - image[0]) for text, image in end["w"]) for end in ends]
    return {"w_0 apart": mean(gap), "experts' cosine": mean([fmean(end["cosine"]) for end in ends])}


def rerouted_rows(results: list[dict]) -> dict[str, dict]:
    """The same models, answering with other w."""
    learned = accuracies(results)
    return {name: row(results, name) | {"minus learned": paired(accuracies(results, name), learned)}
            for name in ROUTINGS}


def draw(results: list[dict], path: str, title: str) -> None:
    """w_0 of every layer over the training of the first seed: a mean would hide which expert each took."""
    trace, series = results[0]["trace"], {}
    for layer in range(len(trace[0]["w"])):
        for m, modality in enumerate(("text", "image")):
            series[f"layer {layer} {modality}"] = [(row["step"], row["w"][layer][m][0]) for row in trace]
    chart.lines(path, series, title, span=(0.0, 1.0))


def main() -> None:
    options = cli.parse(Options)
    of = run_all(RUNS, options)
    learned, rep, mm = (of[name] for name in ("tau 10", "flipped, RepAdapter", "flipped, MM-Adapter"))
    temperatures = {}
    for name in (f"tau {tau:g}" for tau in TAUS):
        difference = paired(accuracies(of[name]), accuracies(learned))
        temperatures[name] = row(of[name]) | {"minus tau 10": difference} | apart(of[name])
    difference = paired(accuracies(mm), accuracies(rep))
    kinds = {"RepAdapter": row(rep) | {"minus RepAdapter": "–"},
             "MM-Adapter": row(mm) | {"minus RepAdapter": difference} | apart(mm)}
    traces = {name: of[name][0]["trace"] for name in ("tau 10", "flipped, MM-Adapter")}
    write("routing", options, {
        "negatives, by temperature": temperatures,
        "negatives at tau 10, with other w": rerouted_rows(learned),
        "flipped": kinds, "flipped, MM-Adapter with other w": rerouted_rows(mm)}, first_seed=traces)
    draw(learned, f"{options.results}/routing.png", "w_0 of each layer: negatives, tau 10, seed 0")
    draw(mm, f"{options.results}/routing_flipped.png", "w_0 of each layer: flipped, tau 10, seed 0")


if __name__ == "__main__":
    cli.run(main)
