"""The small world: problems about coloured shapes and everyday facts, in ScienceQA's own layout.

    python tiny/world.py --out data/world

writes problems.json, pid_splits.json and images/<split>/<id>/image.png. The output depends only on the seed.

Three in four problems need their picture: the question and the options say nothing about the answer, so a
text-only model stays at chance. The other problems describe the scene in their hint, or ask who owns what,
or ask for a fact of FACTS, which the language model must have memorised.

Every solution ends in the text of the right option. In the answer format "EA" ("The circle is red. The answer
is B.") a model therefore finds the word first and then looks it up among the options. The solution of a
picture problem begins with a description of the picture, as in ScienceQA. The model learns from these dozen
words, not only from the one that answers the question.
"""
import argparse
import hashlib
import io
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from tiny import scenes  # noqa: E402
from tiny.scenes import COLORS, NUMBERS, OPPOSITE, PLURAL, POSITIONS, RELATIONS, SHAPES, SIZES  # noqa: E402

LETTERS = "ABCDE"
SPLITS = {"test": 1200, "val": 400, "train": 10000}  # test first: no later split repeats one of its problems
PEOPLE = ("Tom", "Ann", "Ben", "Eva", "Sam", "Mia", "Max", "Zoe")
OBJECTS = ("ball", "kite", "book", "cup", "hat", "box", "doll", "bag")
GENERIC_HINTS = ("The picture shows some shapes.", "Look at the picture.", "Use the picture to answer.")


class Facts(NamedTuple):
    """A table of key -> value for one kind of question. {k}: key; {ak}, {Ak}: with article; {v}: value."""
    topic: str
    subject: str
    questions: tuple[str, ...]
    solution: str
    lecture: str
    table: str  # "value: key key key; ..."

    def pairs(self) -> list[tuple[str, str]]:
        rows = (row.split(":") for row in self.table.split(";"))
        return [(key, value.strip()) for value, keys in rows for key in keys.split()]


FACTS = (
    Facts("categories", "natural science",
          ("What kind of thing is {ak}?", "Which group does {ak} belong to?"),
          "{Ak} is a kind of {v}.", "Things that are alike can be sorted into groups.",
          "animal: dog cat horse cow lion bear; fruit: apple banana lemon grape cherry;"
          "tool: hammer saw drill wrench; vehicle: car bus train truck bike; drink: milk tea juice coffee;"
          "bird: eagle owl parrot; clothing: shirt coat sock dress; furniture: chair table bed desk;"
          "instrument: piano drum flute violin"),
    Facts("opposites", "language science",
          ("What is the opposite of {k}?", "Which word means the opposite of {k}?"),
          "The opposite of {k} is {v}.", "Opposites, or antonyms, are words whose meanings are contrary.",
          "cold: hot; slow: fast; old: new; dark: light; sad: happy; weak: strong; wet: dry; soft: hard;"
          "low: high; empty: full; poor: rich; late: early; closed: open; quiet: loud; dirty: clean;"
          "night: day; down: up; out: in; short: long; bad: good"),
    Facts("verbs", "language science", ("What is the past tense of {k}?", "How do you say {k} in the past?"),
          "The past tense of {k} is {v}.",
          "The past tense of a verb tells that something has already happened.",
          "went: go; saw: see; ate: eat; ran: run; came: come; gave: give; took: take; made: make;"
          "sang: sing; wrote: write; drank: drink; knew: know; told: tell; found: find; slept: sleep;"
          "swam: swim"),
    Facts("plurals", "language science",
          ("What is the plural of {k}?", "Which word means more than one {k}?"),
          "The plural of {k} is {v}.", "A plural noun names more than one thing.",
          "mice: mouse; feet: foot; teeth: tooth; men: man; geese: goose; children: child; leaves: leaf;"
          "knives: knife"),
    Facts("life cycles", "natural science", ("What is a young {k} called?", "What is the baby of {ak}?"),
          "A young {k} is a {v}.", "Many young animals have a name of their own.",
          "puppy: dog; kitten: cat; calf: cow; foal: horse; cub: bear; lamb: sheep; chick: hen; piglet: pig;"
          "tadpole: frog; duckling: duck"),
    Facts("body plans", "natural science",
          ("How many legs does {ak} have?", "What is the number of legs of {ak}?"),
          "The number of legs of {ak} is {v}.", "Insects have six legs, spiders eight and most mammals four.",
          "two: hen duck owl; four: dog cat cow horse frog; six: ant bee fly beetle; eight: spider scorpion;"
          "zero: snake worm"),
    Facts("habitats", "natural science", ("Where does {ak} live?", "What is the home of {ak}?"),
          "The home of {ak} is the {v}.", "A habitat is a place that gives a living thing what it needs.",
          "ocean: whale shark; desert: camel scorpion; forest: bear deer; farm: cow hen pig;"
          "jungle: monkey tiger; pond: frog duck; hive: bee; nest: robin"),
    Facts("materials", "natural science", ("What color is {ak}?", "Which color does {ak} have?"),
          "The color of {ak} is {v}.", "Color is a property of matter that we can see.",
          "red: tomato cherry; yellow: banana lemon; green: frog leaf; blue: sky ocean; white: snow milk;"
          "black: coal; brown: chocolate; orange: carrot; pink: pig; gray: elephant"),
    Facts("economics", "social science", ("Who works in {ak}?", "Who has a job in {ak}?"),
          "The one who works in {ak} is the {v}.", "People do different jobs and so depend on each other.",
          "teacher: school; doctor: hospital; baker: bakery; farmer: farm; cook: kitchen; judge: court;"
          "actor: theater; sailor: ship; pilot: plane; clerk: shop"),
    Facts("geography", "social science", ("What is the capital of {k}?", "Which city is the capital of {k}?"),
          "The capital of {k} is {v}.", "The capital of a country is the city where its government sits.",
          "Paris: France; Rome: Italy; Madrid: Spain; London: England; Berlin: Germany; Cairo: Egypt;"
          "Tokyo: Japan; Athens: Greece; Lima: Peru; Oslo: Norway; Delhi: India; Moscow: Russia"),
)
UNCOUNTED = {"snow", "milk", "coal", "chocolate", "tea", "juice", "coffee"}  # "milk", not "a milk"
UNIQUE = {"sky", "ocean"}                                                    # "the sky"

# kind of scene question -> subject, topic, lecture; the subjects vary, so every column of the table fills
SCENE_KINDS = {
    "color": ("natural science", "materials",
              "Color is a property of matter that we can see."),
    "shape": ("language science", "vocabulary",
              "Every shape has a name. A circle is round, a square has four corners."),
    "size": ("natural science", "measurement",
             "Size tells how much room a thing takes up."),
    "count": ("natural science", "measurement",
              "To count is to say a number for each thing, one after the other."),
    "position": ("social science", "maps",
                 "A map is read by the place of things on it: left, right, top or bottom."),
    "relation": ("social science", "maps",
                 "Directions tell where one thing is when it is seen from another."),
    "compare": ("natural science", "measurement",
                "To compare is to say which of two things has more of a property."),
}


class Question(NamedTuple):
    """A question before its options are drawn. They are the answer, then `must`, then any words of `pool`."""
    kind: str
    text: str
    answer: str
    solution: str
    pool: tuple[str, ...]
    must: tuple[str, ...] = ()


def with_article(noun: str) -> str:
    if noun in UNCOUNTED:
        return noun
    return f"the {noun}" if noun in UNIQUE else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def scene_questions(scene: scenes.Scene) -> list[Question]:
    """Everything that can be asked about a scene."""
    first = scene.things[0]
    if scene.kind == "many":
        s, c, n = PLURAL[first.shape], first.color, NUMBERS[len(scene.things) - 1]
        return [Question("color", f"What color are the {s}?", c, f"The {s} are {c}.", COLORS),
                Question("shape", f"What shape are the {c} things?", s, f"The {c} things are {s}.",
                         tuple(PLURAL.values())),
                Question("count", f"How many {s} are there?", n, f"The number of {s} is {n}.", NUMBERS[1:])]
    asked = []
    for thing, other in zip(scene.things, scene.things[::-1]):
        s, c = thing.shape, thing.color
        binds = scene.kind == "two"  # offer the other thing's word too, so that color and shape must be bound
        asked += [Question("color", f"What color is the {s}?", c, f"The {s} is {c}.", COLORS,
                           (other.color,) * binds),
                  Question("shape", f"What shape is the {c} thing?", s, f"The {c} thing is a {s}.", SHAPES,
                           (other.shape,) * binds),
                  Question("size", f"What size is the {s}?", thing.size, f"The {s} is {thing.size}.", SIZES)]
    if scene.kind == "one":
        where = scenes.position(scene)
        return asked[:3] + [Question("position", f"Where is the {first.shape}?", where,
                                     f"The {first.shape} is at the {where}.", POSITIONS)]
    seen = scenes.relation(scene)
    for thing, other, where in ((*scene.things, seen), (*scene.things[::-1], OPPOSITE[seen])):
        asked.append(Question("relation", f"Seen from the {other.shape}, where is the {thing.shape}?", where,
                              f"Seen from there, the {thing.shape} is {where}.", RELATIONS))
        more = {"left": "further left", "right": "further right", "above": "higher", "below": "lower"}
        words = {more[where]: where}
        if thing.size != other.size:
            words[{"big": "bigger", "small": "smaller"}[thing.size]] = thing.size
        asked += [Question("compare", f"Which shape is {word}?", thing.shape,
                           f"The shape that is {key} is the {thing.shape}.", SHAPES, (other.shape,))
                  for word, key in words.items()]
    return asked


def ask_scene(rng: random.Random, scene: scenes.Scene, kind: str = "") -> Question:
    """One question about the scene, of the given kind or of a random one; all kinds are equally likely."""
    asked = scene_questions(scene)
    kind = kind or rng.choice(sorted({q.kind for q in asked}))
    return rng.choice([q for q in asked if q.kind == kind])


class Cast(NamedTuple):
    """Who has what."""
    people: list[str]
    things: list[str]

    def told(self) -> str:
        return "Who has what: " + ", ".join(f"{person} {thing}" for person, thing in zip(*self)) + "."


def random_cast(rng: random.Random) -> Cast:
    n = rng.choice((2, 3))
    return Cast(rng.sample(PEOPLE, n), rng.sample(OBJECTS, n))


def ask_people(rng: random.Random, cast: Cast) -> Question:
    i, j = rng.sample(range(len(cast.people)), 2)  # i: whom we ask about; j: whose words are a wrong option
    p, t = (words[i] for words in cast)
    other_p, other_t = ((words[j],) for words in cast)
    return rng.choice([
        Question("owner", f"Who has the {t}?", p, f"The one who has the {t} is {p}.", PEOPLE, other_p),
        Question("owned", f"What does {p} have?", t, f"The thing {p} has is the {t}.", OBJECTS, other_t)])


def ask_fact(rng: random.Random, facts: Facts, key: str, value: str) -> Question:
    words = {"k": key, "ak": with_article(key), "Ak": with_article(key).capitalize(), "v": value}
    pool = tuple(dict.fromkeys(v for _, v in facts.pairs()))
    question, solution = rng.choice(facts.questions).format(**words), facts.solution.format(**words)
    return Question(facts.topic, question, value, solution, pool)


class Letters:
    """Draw the index of the right option; for each number of options, all letters are right equally often."""

    def __init__(self, rng: random.Random):
        self.rng, self.bags = rng, {}

    def deal(self, n: int) -> int:
        bag = self.bags.setdefault(n, [])
        if not bag:
            bag.extend(self.rng.sample(range(n), n))
        return bag.pop()


def record(rng: random.Random, letters: Letters, q: Question, hint: str, subject: str, topic: str,
           lecture: str) -> dict:
    """A question with options, as ScienceQA stores a problem."""
    n = rng.randint(2, min(5, len(q.pool)))
    others = [word for word in q.pool if word != q.answer and word not in q.must]
    wrong = (list(q.must) + rng.sample(others, len(others)))[:n - 1]
    rng.shuffle(wrong)
    answer = letters.deal(n)
    choices = wrong[:answer] + [q.answer] + wrong[answer:]
    return {"question": q.text, "choices": choices, "answer": answer, "hint": hint, "image": None,
            "grade": f"grade{rng.randint(1, 12)}", "subject": subject, "topic": topic, "lecture": lecture,
            "solution": q.solution, "kind": q.kind}


def scene_in_words(scene: scenes.Scene, rng: random.Random | None = None) -> str:
    return f"There {'are' if scene.kind == 'many' else 'is'} {scenes.in_words(scene, rng)}."


def scene_problem(rng: random.Random, letters: Letters,
                  told: bool = False) -> tuple[dict, scenes.Scene | None]:
    """A problem about a random scene, shown in a picture or, if `told`, described in the hint."""
    kind = rng.choice(list(SCENE_KINDS))
    fitting = {"position": ("one",), "size": ("one", "two"), "count": ("many",), "relation": ("two",),
               "compare": ("two",)}.get(kind, ("one", "two", "two", "many"))
    scene = scenes.random_scene(rng, rng.choice(fitting))
    q = ask_scene(rng, scene, kind)
    hint = scene_in_words(scene, rng) if told else rng.choice(GENERIC_HINTS) if rng.random() < 0.25 else ""
    problem = record(rng, letters, q, hint, *SCENE_KINDS[kind])
    if told:
        problem["kind"] += " told"
        return problem, None
    problem["image"] = "image.png"
    problem["solution"] = f"{scene_in_words(scene)} {q.solution}"
    return problem, scene


def problem(rng: random.Random, letters: Letters) -> tuple[dict, scenes.Scene | None]:
    """One random problem -> (record, the scene to draw or None)."""
    dice = rng.random()
    if dice < 0.75:
        return scene_problem(rng, letters)
    if dice < 0.82:
        return scene_problem(rng, letters, told=True)
    if dice < 0.89:
        cast = random_cast(rng)
        return record(rng, letters, ask_people(rng, cast), cast.told(), "social science", "culture",
                      "People can own things."), None
    facts = rng.choice(FACTS)
    q = ask_fact(rng, facts, *rng.choice(facts.pairs()))
    return record(rng, letters, q, "", facts.subject, facts.topic, facts.lecture), None


def prompt(p: dict) -> str:
    """The prompt in format QCM, up to and with "Response:"."""
    options = " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, p["choices"]))
    return f"Question: {p['question']}\nContext: {p['hint'] or 'N/A'}\nOptions: {options}\nResponse:"


def split_problems(seed: int, split: str, n: int, closed: set):
    """Yield n problems of a split as (record, PNG bytes or None).

    Skip every problem whose (prompt, picture) is in `closed`. Add each yielded one to it, so none repeats.
    """
    rng = random.Random(f"{seed} {split}")
    letters = Letters(rng)
    while n:
        p, scene = problem(rng, letters)
        picture = None
        if scene:
            file = io.BytesIO()
            scenes.draw(scene, rng, 96).save(file, "PNG")
            picture = file.getvalue()
        if (prompt(p), picture) in closed:
            continue
        closed.add((prompt(p), picture))
        yield {**p, "split": split}, picture
        n -= 1


def write(out: Path, seed: int = 0, sizes: dict[str, int] = SPLITS) -> dict[str, dict]:
    """Write the world to a folder and return its problems by id."""
    problems, pids, closed = {}, {split: [] for split in ("train", "val", "test")}, set()
    for split, n in sizes.items():
        for p, picture in split_problems(seed, split, n, closed):
            pid = str(len(problems) + 1)
            problems[pid] = p
            pids[split].append(pid)
            if picture:
                file = out / "images" / split / pid / "image.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(picture)
    assert len(closed) == len(problems), "a prompt (and picture) occurs twice"
    out.mkdir(parents=True, exist_ok=True)
    (out / "problems.json").write_text(json.dumps(problems, indent=1))
    (out / "pid_splits.json").write_text(json.dumps(pids))
    return problems


def ensure(out: str | Path) -> None:
    """Write the world to a folder (ten seconds), unless it is there and was written by these same sources."""
    sources = b"".join((HERE / name).read_bytes() for name in ("world.py", "scenes.py"))
    recipe = hashlib.sha256(sources).hexdigest()
    mark = Path(out) / "recipe.sha256"
    if not mark.is_file() or mark.read_text() != recipe:
        print(f"writing the small world to {out} ...", file=sys.stderr)
        write(Path(out))
        mark.write_text(recipe)  # last, so that an interrupted run starts over


def main() -> None:
    parser = argparse.ArgumentParser(description="write the small world in ScienceQA's layout")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    problems = write(args.out, args.seed).values()
    seen = sum(bool(p["image"]) for p in problems)
    print(f"{len(problems)} problems, {seen} with a picture, in {args.out}",
          Counter(p["kind"] for p in problems))


if __name__ == "__main__":
    main()
