"""The problems that the experiments train on and ask, in ScienceQA's layout: variants of the small world.

    negatives   its first problems, every picture as a photographic negative: black on white becomes white on
                black, red becomes cyan. The ViT was pretrained on no such picture, the words stay true of the
                scene ("red"), and nothing that tells one scene from another is lost
    balanced    its first problems with a picture and as many of its first without one; pictures unchanged
    flipped     lists and two pairs of made-up words. Without a picture "wug" asks for the first word of a
                list and "dax" for the last, "blick" for the word after another and "fep" for the one before
                it. With a picture each word asks for what its partner asks without. The picture shows a
                random scene and says nothing. Every prompt occurs once with and once without one
"""
import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Iterator

from PIL import Image, ImageOps

from tiny import scenes, world

SMALL = Path(__file__).parent.parent / "tiny/data"
WORDS, PARTNER = ("wug", "dax", "blick", "fep"), {"first": "last", "last": "first",
                                                  "after": "before", "before": "after"}


def negatives(split: str, n: int) -> Iterator[tuple[dict, Image.Image | None]]:
    for problem, picture in small(split)[:n]:
        yield problem, picture and ImageOps.invert(Image.open(picture).convert("RGB"))


def balanced(split: str, n: int) -> Iterator[tuple[dict, Image.Image | None]]:
    problems = small(split)
    for kind in ([p for p in problems if p[1]], [p for p in problems if not p[1]]):
        if len(kind) < n // 2:
            raise ValueError(f"{SMALL}: split {split} has {len(kind)} problems of one kind; need {n // 2}")
        for problem, picture in kind[:n // 2]:
            yield problem, picture and Image.open(picture)


def flipped(split: str, n: int) -> Iterator[tuple[dict, Image.Image | None]]:
    rng, part = random.Random(f"flipped {split}"), "train" if split == "train" else "test"
    asker, letters = world.Asker(rng), world.Letters(rng)
    for _ in range(n // 2):
        m = rng.choice(WORDS)
        rule = world.random_rule(rng, world.MADE_UP[m], part)
        q, other = world.ask_rule(asker, rule, m), answer_of(rule, PARTNER[rule.meaning])
        q, subject = q._replace(must=(other,)), world.RULE_SUBJECTS[rule.meaning]
        p = world.record(rng, letters, q, rule.hint, *subject)
        yield p, None
        solution = p["solution"].removesuffix(f"{rule.answer}.") + f"{other}."
        picture = scenes.draw(scenes.random_scene(rng, rng.choice(scenes.KINDS)), rng, 96)
        yield {**p, "answer": p["choices"].index(other), "solution": solution, "image": "image.png"}, picture


def answer_of(rule: "world.Rule", meaning: str) -> str:
    """What a rule about a list answers if its made-up word had this meaning."""
    words = rule.hint.removeprefix("List: ").removesuffix(".").split(", ")
    if meaning in ("first", "last"):
        return words[0 if meaning == "first" else -1]
    return words[words.index(rule.words["w"]) + (1 if meaning == "after" else -1)]


def small(split: str) -> list[tuple[dict, Path | None]]:
    """The problems of the small world's split, each with the file of its picture or None."""
    problems = json.loads((SMALL / "problems.json").read_text())
    ids = json.loads((SMALL / "pid_splits.json").read_text())[split]
    files = [SMALL / "images" / split / id / "image.png" if problems[id]["image"] else None for id in ids]
    return [(problems[id], file) for id, file in zip(ids, files)]


WORLDS = {"negatives": negatives, "balanced": balanced, "flipped": flipped}


def ensure(name: str, folder: Path, train: int, test: int) -> str:
    """Write a world to `folder` unless it is there; return the hash of its recipe.

    train, test: problems of these splits. Only negatives have a val split, as large as test: for cost.py
    """
    world.ensure(SMALL)
    recipe = f"{name} {train} {test} {(SMALL / 'recipe.sha256').read_text()}".encode()
    recipe = hashlib.sha256(recipe + Path(__file__).read_bytes()).hexdigest()
    mark = folder / "recipe.sha256"
    if mark.is_file() and mark.read_text() == recipe:
        return recipe
    shutil.rmtree(folder, ignore_errors=True)
    problems, ids = {}, {}
    for split, n in {"train": train, "val": test * (name == "negatives"), "test": test}.items():
        ids[split] = []
        for problem, picture in WORLDS[name](split, n):
            id = str(len(problems) + 1)
            problems[id] = problem
            ids[split].append(id)
            if picture:
                file = folder / "images" / split / id / "image.png"
                file.parent.mkdir(parents=True)
                picture.save(file)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(ids))
    mark.write_text(recipe)  # last, so that an interrupted run starts over
    return recipe
