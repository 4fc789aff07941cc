"""What do the answers rest on? One table of checks for adapters trained on the small world.

    python tiny/audit.py                                          the stored adapters
    python tiny/audit.py --adapters out/adapters.safetensors      those that train.py wrote

    the picture    the same questions with another problem's picture, a black one, none: near chance if the
                   model looks at the picture
    baselines      what the options and the question alone give away: for each problem, the option that was
                   right most often in the training problems, over all questions or for this question
    untrained      the same models with adapters as they are before training
    changes        pictures, questions and hints that differ from those of the training in one respect

Problems are drawn as tiny/world.py draws them, from seeds that no split uses. A problem without a picture
that also occurs in training is skipped. `±` is the standard error of an accuracy.
"""
import json
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import cli  # noqa: E402

import evaluate  # noqa: E402
import lavin  # noqa: E402
import prompts  # noqa: E402
from evaluation import answering, scores  # noqa: E402
from prompts import Sample  # noqa: E402
from tiny import scenes, world  # noqa: E402

Problem = tuple[dict, Image.Image | None]  # the record, as world.record makes it, and its picture


@dataclass
class Config(evaluate.ModelFlags):
    """Check what the answers of adapters trained on the small world rest on."""
    limit: int = 200  # problems of each check [2, inf)
    data: str = "tiny/data"  # folder of the training problems, in ScienceQA's layout
    seed: int = 0  # seed of the problems and of the untrained adapters [0, inf)


class Change(NamedTuple):
    """How problems with a picture differ from those of the training. The defaults change nothing."""
    kinds: tuple = scenes.KINDS  # of scenes
    asked: tuple = tuple(world.SCENE_KINDS)  # kinds of questions
    keep: Callable = lambda scene: True
    seen: bool = True  # False: scenes with a pair of scenes.UNSEEN
    look: dict = {}  # arguments of scenes.draw
    reworded: bool = False
    contradicted: bool = False  # the hint gives every thing another size and color


CHANGES = {
    "grey background (128)": Change(look={"background": 128}),
    "dark background (40)": Change(look={"background": 40},  # where black things would be invisible
                                   keep=lambda s: all(t.color != "black" for t in s.things)),
    "outlines": Change(look={"outline": True}),
    "three things": Change(kinds=("three",)),
    "how many: one": Change(kinds=("one",), asked=("count",)),
    "how many: six": Change(kinds=("many",), asked=("count",), keep=lambda s: len(s.things) == 6),
    "unseen pairs": Change(seen=False),
    "an unseen pair alone": Change(kinds=("one",), asked=("color", "shape"), seen=False),
    "other wordings": Change(reworded=True),
    "contradicting hint": Change(asked=("color", "size"), contradicted=True),
}


def contradiction(scene: scenes.Scene) -> str:
    """A description of the scene that is wrong about the size and the color of everything."""
    size = dict(zip(scenes.SIZES, scenes.SIZES[::-1]))
    color = dict(zip(scenes.COLORS, scenes.COLORS[1:] + scenes.COLORS[:1]))
    return scenes.sentence(scenes.Scene(scene.kind, tuple(
        scenes.Thing(size[t.size], color[t.color], t.shape, t.x, t.y) for t in scene.things)))


def with_pictures(n: int, seed: str, change: Change = Change()) -> list[Problem]:
    """n problems that need their picture."""
    rng, found = random.Random(seed), []
    asker, letters = world.Asker(rng, change.reworded), world.Letters(rng)
    while len(found) < n:
        kind = rng.choice(change.asked)
        fitting = [k for k in world.FITTING.get(kind, scenes.KINDS) if k in change.kinds]
        if not fitting:
            continue
        scene = scenes.random_scene(rng, rng.choice(fitting), change.seen)
        q = asker.about(scene, kind) if change.keep(scene) else None
        if q is None:
            continue
        hint = contradiction(scene) if change.contradicted else ""
        record = world.record(rng, letters, q, hint, *world.SCENE_KINDS[kind])
        found.append((record, scenes.draw(scene, rng, 96, **change.look)))
    return found


def without_pictures(n: int, seed: str, closed: set[str]) -> list[Problem]:
    """n problems of the test split's kind without a picture. closed: prompts that are skipped."""
    rng, found = random.Random(seed), []
    asker, letters = world.Asker(rng), world.Letters(rng)
    while len(found) < n:
        record, scene = world.problem(asker, letters, "test")
        if scene is None and world.prompt(record) not in closed:
            closed.add(world.prompt(record))
            found.append((record, None))
    return found


def checks(cfg: Config, trained_on: list[dict]) -> dict[str, list[Problem]]:
    """{name: problems}"""
    def seed(name):
        return f"audit {cfg.seed} {name}"

    shown = with_pictures(cfg.limit, seed("pictures"))
    records, pictures = [r for r, _ in shown], [picture for _, picture in shown]
    black = [Image.new("RGB", picture.size) for picture in pictures]
    text = without_pictures(cfg.limit, seed("text"), {world.prompt(p) for p in trained_on if not p["image"]})
    return {"pictures": shown, "text": text,
            "pictures exchanged": list(zip(records, pictures[1:] + pictures[:1])),
            "pictures black": list(zip(records, black)), "pictures left out": [(r, None) for r in records],
            **{name: with_pictures(cfg.limit, seed(name), change) for name, change in CHANGES.items()}}


def guesses(problems: list[Problem], trained_on: list[dict], by_question: bool) -> list[bool]:
    """Whether the option that was right most often in training is right here, over all or by question."""
    right = Counter(key for p in trained_on for word in [p["choices"][p["answer"]]]
                    for key in (word, (p["question"], word)))
    offered = Counter(word for p in trained_on for word in p["choices"])

    def worth(p: dict, word: str) -> tuple:
        overall = right[word] / max(1, offered[word])
        return by_question * right[p["question"], word], overall

    best = [max(p["choices"], key=lambda word: worth(p, word)) for p, _ in problems]
    return [word == p["choices"][p["answer"]] for word, (p, _) in zip(best, problems)]


def answers(model, tokenizer, checks: dict[str, list[Problem]], meta: dict) -> dict[str, list[bool]]:
    """Let the model answer all problems -> {name: whether each answer is right}"""
    with tempfile.TemporaryDirectory() as folder:
        samples = {}
        for name, problems in checks.items():
            for i, (p, picture) in enumerate(problems):
                file = Path(folder, f"{len(samples)}.png") if picture else None
                if picture:
                    picture.save(file)
                prompt = prompts.build_prompt(p["question"], p["hint"], p["choices"], meta["format"])
                samples[name, i] = Sample(f"{name} {i}", prompt, "", file, p)
        texts = answering.answer(model, tokenizer, list(samples.values()), meta["max_new_tokens"],
                                 until=scores.ANSWER)
    right = {key: scores.read_answer(texts[s.id], len(s.problem["choices"])) == s.problem["answer"]
             for key, s in samples.items()}
    return {name: [right[name, i] for i in range(len(problems))] for name, problems in checks.items()}


def audit(cfg: Config) -> dict[str, tuple[float, int]]:
    """{name: (accuracy in per cent, number of problems)}"""
    meta = answering.adapter_metadata(cfg, needs_pictures=True)
    device, dtype = cli.pick_device(cfg.device, cfg.dtype)
    if cfg.data == Config.data:
        world.ensure(cfg.data)
    trained_on = [s.problem for s in prompts.read_scienceqa(cfg.data, "train")]
    model, tokenizer = answering.load(cfg, device, dtype)
    asked = checks(cfg, trained_on)
    right = answers(model, tokenizer, asked, meta)
    plain = {name: asked[name] for name in ("pictures", "text")}
    torch.manual_seed(cfg.seed)
    base, _ = answering.load(cfg, device, dtype)  # again: answering has folded the adapters into the first
    untrained = lavin.LaVIN(base.llama, base.vit, base.cfg).to(device).eval()  # gives the base new adapters
    new = answers(untrained, tokenizer, plain, meta)
    for name, problems in plain.items():
        right[f"{name}: untrained adapters"] = new[name]
        right[f"{name}: best option"] = guesses(problems, trained_on, by_question=False)
        right[f"{name}: best option for the question"] = guesses(problems, trained_on, by_question=True)
        right[f"{name}: chance"] = [1 / len(p["choices"]) for p, _ in problems]
    return {name: (100 * sum(row) / len(row), len(row)) for name, row in right.items()}


def main() -> None:
    cfg = cli.parse(Config)
    rows = audit(cfg)
    if cfg.json:
        print(json.dumps({name: {"accuracy": round(a, 2), "problems": n} for name, (a, n) in rows.items()}))
        return
    print(f"{'':44}{'accuracy':>8}{'±':>6}{'problems':>10}")
    for name, (accuracy, n) in rows.items():
        error = "" if name.endswith("chance") else f"{(accuracy * (100 - accuracy) / n) ** 0.5:.1f}"
        print(f"{name:44}{accuracy:8.1f}{error:>6}{n:10}")


if __name__ == "__main__":
    cli.run(main)
