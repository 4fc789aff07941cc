"""The experiments' tools: worlds, the training loop, LoRA, resuming, statistics, charts and the report."""
import json
from pathlib import Path

import pytest
import torch
from conftest import CLIP, LLAMA, ROOT, ROWS, all_logits, close, hidden_of, make_batch, one_line, run_main
from PIL import Image, ImageChops
from safetensors.torch import load_file

import data
import prompts
import train
from adapters import AdapterConfig, trainable
from clip import VisionTransformer
from evaluation import chart
from experiments import cost, mixture, report, routing, runs, table2, worlds
from experiments.lora import LoRALaVIN, count_of_peft
from experiments.runs import Options, Run
from lavin import LaVINConfig
from llama import LLaMA
from speed.step import FoldedLaVIN
from tiny import world

CPU = torch.device("cpu"), torch.float32
SCRIPTS = {"table2": table2, "routing": routing, "mixture": mixture, "cost": cost}
has_rules = pytest.mark.skipif(not hasattr(world, "random_rule"), reason="this world has no made-up words")


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Options:
    """Small worlds, made from a small small world."""
    folder = tmp_path_factory.mktemp("experiments")
    with pytest.MonkeyPatch.context() as patch:
        world.write(folder / "small", seed=5, sizes={"test": 60, "val": 16, "train": 300})
        (folder / "small/recipe.sha256").write_text("a test's")
        patch.setattr(worlds, "SMALL", folder / "small")
        patch.setattr(world, "ensure", lambda out: None)
        yield Options(seeds=2, problems=64, limit=16, workers=1, work=str(folder / "work"),
                      results=str(folder / "results"))


def samples(options: Options, name: str, split: str = "train") -> list[prompts.Sample]:
    folder = Path(options.work, name)
    worlds.ensure(name, folder, options.problems, options.limit)
    return prompts.read_scienceqa(folder, split, "QCM-EA")


def test_negatives_are_the_same_problems_with_inverted_pictures(options):
    before = prompts.read_scienceqa(worlds.SMALL, "train", "QCM-EA")[:64]
    after = samples(options, "negatives")
    assert [s.prompt + s.response for s in after] == [s.prompt + s.response for s in before]
    for a, b in zip(before, after):
        assert bool(a.image) == bool(b.image)
        if a.image:
            total = ImageChops.add(Image.open(a.image).convert("RGB"), Image.open(b.image))
            assert total.getextrema() == ((255, 255),) * 3


def test_balanced_has_as_many_with_a_picture_as_without(options):
    for split, n in ("train", 64), ("test", 16):
        with_picture = [s.image is not None for s in samples(options, "balanced", split)]
        assert len(with_picture) == n and sum(with_picture) == n // 2


@has_rules
def test_flipped_asks_the_same_words_for_another_answer(options):
    asked = samples(options, "flipped")
    for without, shown in zip(asked[::2], asked[1::2]):
        words = without.problem["hint"].removeprefix("List: ").rstrip(".").split(", ")
        assert without.image is None and shown.image.is_file() and without.prompt == shown.prompt
        right = [s.problem["choices"][s.problem["answer"]] for s in (without, shown)]
        assert right[0] != right[1] and set(right) <= set(words)
        assert all(s.problem["solution"].endswith(f" is {word}.") for s, word in zip((without, shown), right))
        if "wug" in without.prompt:
            assert right == [words[0], words[-1]]


def test_the_loop_makes_the_updates_of_train_py(options, tmp_path):
    samples(options, "balanced")
    model, _, examples, cfg = runs.build(Run(3, "balanced"), options)
    runs.learn(cfg, model, examples)
    cfg.out = str(tmp_path)
    train.train(cfg, *CPU)
    theirs = load_file(tmp_path / "adapters.safetensors")
    assert theirs.keys() == trainable(model).keys()
    assert all(torch.equal(p, theirs[name]) for name, p in trainable(model).items())


def test_text_first_sees_the_same_samples_text_first(options):
    samples(options, "balanced")
    examples = runs.build(Run(0, "balanced"), options)[2]
    mixed, text_first = (kind(examples, 32, 32, 0, 1, 7, 64, "clip") for kind in (data.Steps, runs.TextFirst))
    orders = [[i for step in range(2) for i in steps.chosen(step)] for steps in (mixed, text_first)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(64))
    with_picture = [examples[i].n_visual > 0 for i in orders[1]]
    assert with_picture == [False] * 32 + [True] * 32
    assert [i for i in orders[0] if not examples[i].n_visual] == orders[1][:32]


def test_half_of_an_image_encoder_gives_the_first_half_of_its_tokens(tmp_path):
    runs.half_of(ROOT / "tiny/clip", tmp_path)
    whole, half = (VisionTransformer.from_pretrained(f).eval() for f in (ROOT / "tiny/clip", tmp_path))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert half.n_visual == whole.n_visual // 2 == 3
    assert close(half(images), whole(images)[:, :3])


def test_rerouting_changes_only_the_weights_that_it_names(lavin):
    w, batch = lavin.routing_weights(), make_batch(ROWS)
    before = all_logits(lavin, batch)
    for name, expected in {"learned": w, "other modality": w[:, [1, 0]], "exchanged": w[..., [1, 0]],
                           "half": w * 0 + 0.5}.items():
        other = runs.rerouted(lavin, name)
        assert torch.equal(other.routing_weights(), expected)
        changed = [not close(a, b) for a, b in zip(all_logits(other, batch), before)]
        assert changed == [name != "learned"] * len(ROWS), name
        folded = FoldedLaVIN(other, 0, 1)  # as answering does
        assert folded.routing_weights() is None
        answers = [m.prefill(make_batch(ROWS[:1]), 1)[0] for m in (folded, runs.rerouted(lavin, name))]
        assert close(*answers)


def lora(r: int = 4) -> LoRALaVIN:
    torch.manual_seed(0)
    return LoRALaVIN(LLaMA(LLAMA), VisionTransformer(CLIP), LaVINConfig(AdapterConfig("rep")), r).eval()


def test_lora_starts_as_the_identity_trains_nothing_frozen_and_merges():
    model, batch = lora(), make_batch(ROWS)
    names = {name for name in trainable(model) if name.startswith("llama.")}
    assert len(names) == 2 * 2 * LLAMA.n_layers and all(name.endswith(("_A", "_B")) for name in names)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trainable(model))
    before = all_logits(model, batch)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).add_(0.1 if name.endswith("_B") else 0.0)
    after = all_logits(model, batch)
    assert not close(before[1], after[1])
    merged = runs.rerouted(model, "learned")
    for model in (merged, FoldedLaVIN(merged, 0)):
        assert close(all_logits(model, make_batch([ROWS[1]]))[0], after[1])  # a row without an image


def test_lora_equals_peft():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    ours, r = lora(), 4
    theirs = LLaMA(LLAMA)
    theirs.load_state_dict({name: p for name, p in ours.llama.state_dict().items() if "adapter" not in name})
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=["wq", "wv"], init_lora_weights=False)
    theirs = peft.inject_adapter_in_model(config, theirs).eval()
    with torch.no_grad():
        for a, b in zip(ours.llama.layers, theirs.layers):
            for x, y in (a.attention.wq, b.attention.wq), (a.attention.wv, b.attention.wv):
                x.adapter_A.copy_(y.lora_A["default"].weight), x.adapter_B.copy_(y.lora_B["default"].weight)
    tokens = torch.tensor([[1, 7, 5, 9, 11]])
    assert close(hidden_of(ours.llama, tokens), hidden_of(theirs, tokens))
    tiny = LLaMA.from_pretrained(ROOT / "tiny/llama")
    assert count_of_peft(r, ROOT / "tiny/llama") == len(tiny.layers) * 2 * 2 * r * tiny.cfg.dim


def test_a_finished_run_is_not_repeated(options, capsys):
    run = Run(world="balanced", order="text first")
    first, = runs.run_all({"a": run}, options, range(1))["a"]
    assert "1 runs, 1 of them to make" in capsys.readouterr().err
    both = runs.run_all({"a": run, "b": run._replace(flags={"tau": 5.0})}, options, range(2))
    assert "4 runs, 3 of them to make" in capsys.readouterr().err
    zero, one = both["a"]
    assert zero == first and zero["trace"] != one["trace"] and zero["trace"] != both["b"][0]["trace"]
    assert [row["step"] for row in first["trace"]] == [1, 2] and len(first["halfway"]) == 1
    assert all(0 <= x <= 100 for x in first["accuracy"]["learned"].values())


def test_paired_differences():
    assert runs.paired([3.0, 5.0, 10.0], [1.0, 2.0, 3.0]) == pytest.approx([4.0, 7 ** 0.5 / 3 ** 0.5])
    assert runs.paired([70.0, 90.0], [69.0, 89.0]) == [1.0, 0.0]  # large spread, the same difference
    with pytest.raises(AssertionError):
        runs.paired([1.0], [1.0, 2.0])


def pretend(settings: dict[str, Run], options: Options, seeds: range = range(2)) -> dict[str, list[dict]]:
    """Results as run_all returns them; the accuracies follow from the seed and the setting's place."""
    point = {"loss": 1.0, "w": [[[0.6, 0.4], [0.3, 0.7]]] * 4, "cosine": [0.9, 0.8, 0.7, 0.6]}

    def result(run: Run, place: int, seed: int) -> dict:
        columns = {"with picture": 50.0 + place, "without": 60.0 + 2 * seed, "all": 55.0 + place * (1 + seed)}
        return {"accuracy": dict.fromkeys(run.routings, columns), "halfway": [columns], "bytes": 9,
                "trained": 10 + place, "trained in LLaMA": 5,
                "trace": [{"step": step, **point} for step in (1, 2)]}

    return {name: [result(run, place, seed) for seed in seeds]
            for place, (name, run) in enumerate(settings.items())}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_writes_a_table_and_a_picture(options, name, monkeypatch):
    script = SCRIPTS[name]
    monkeypatch.setattr(script, "run_all", pretend)
    if script is cost:
        monkeypatch.setattr(cost, "count_of_peft", lambda r: None)
        monkeypatch.setattr(cost, "step_times", lambda runs, options: dict.fromkeys(runs, 1.0))
    run_main(monkeypatch, script.main, "--results", options.results, "--seeds", "2")
    result = json.loads(Path(options.results, f"{name}.json").read_text())
    assert result["setting"]["seeds"] == 2
    assert Image.open(Path(options.results, f"{name}.png")).size[0] == chart.WIDTH
    text = report.filled(f"<!-- {name} -->\nold\n<!-- end -->\n", Path(options.results))
    assert "old" not in text and all(title in text for title in result["tables"])
    assert f"](results/{name}.png)" in text
    if name == "table2":
        assert "| + vision | 86.32 | 11 | 51.0 ± 0.0 | 61.0 ± 1.0 | 56.5 ± 0.5 | 1.50 ± 0.50 |" in text
    if name == "routing":
        table = result["tables"]["negatives, by temperature"]
        assert table["tau 5"]["w_0 apart"] == pytest.approx([0.3, 0.0])


def test_cost_measures_steps(options):
    samples(options, "negatives")
    times = cost.step_times({cost.MMA: Run(0), "LoRA": cost.lora(2, 0.01)}, options, repeats=1)
    assert times.keys() == {cost.MMA, "LoRA"} and all(t > 0 for t in times.values())


def test_the_settings_were_written_before_the_outcome():
    for script in SCRIPTS.values():
        for heading in ("Claim:", "Setting, chosen before any run:", "- Expected:"):
            assert heading in script.__doc__, script.__name__


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_readme_holds_the_results(name):
    if not (ROOT / f"experiments/results/{name}.json").is_file():
        pytest.skip(f"experiments/results/{name}.json is not there; `make experiments` makes it")
    text = (ROOT / "experiments/README.md").read_text()
    block = next(match for match in report.BLOCK.finditer(text) if match[2] == name)
    assert report.filled(block[0]) == block[0], "run python -m experiments.report"
    assert (ROOT / f"experiments/results/{name}.png").is_file()


def test_a_chart_of_lines(tmp_path):
    file = tmp_path / "lines.png"
    nan = float("nan")
    chart.lines(file, {"up": [(0, 0.0), (10, 1.0)], "down": [(0, 1.0), (5, nan), (10, 0.0)]}, "title")
    pixels = Image.open(file).load()
    middle = {pixels[x, y] for x in range(200, 300) for y in range(100, 220)}
    assert {chart.COLORS[0], chart.COLORS[1]} <= middle
    chart.lines(file, {"a point": [(3, 2.0)]}, "one point, and no span to draw it in")
    assert "nothing to draw" in one_line(chart.lines, file, {"nan": [(1, nan)]}, "")


def test_a_chart_of_bars_is_to_scale(tmp_path):
    chart.bars(tmp_path / "bars.png", {"half": (50.0, 0.0), "all": (100.0, 0.0)}, "title")
    image = Image.open(tmp_path / "bars.png")
    blue = [sum(image.getpixel((x, y)) == chart.COLORS[0] for x in range(image.width)) for y in (34, 54)]
    assert blue[1] > 300 and abs(blue[0] - blue[1] / 2) <= 1


def test_a_curve_beside_a_log(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"step": {step}, "loss": {3 - step / 10}}}\n' for step in range(10, 30, 5)))
    chart.curve(log)
    assert chart.COLORS[0] in {color for _, color in Image.open(tmp_path / "curve.png").getcolors(10 ** 6)}


def test_no_curve_of_an_empty_log(tmp_path):
    """A finished run that is resumed takes no step; its log may have been deleted."""
    (tmp_path / "log.jsonl").touch()
    assert not chart.curve(tmp_path / "log.jsonl").exists()
