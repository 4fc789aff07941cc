"""The small world: problems about coloured shapes, everyday facts and made-up words, in ScienceQA's layout.

    python tiny/world.py --out data/world

writes problems.json, pid_splits.json and images/<split>/<id>/image.png. The output depends only on the seed.

Three in four problems need their picture: the question and the options say nothing about the answer, so a
text-only model stays at chance. The other problems are text. A quarter of these the frozen language model
solves already: it finds the answer in the hint, or knows it as one of FACTS. The rest use the made-up words
of MADE_UP. "Wug" means "first", but no text that the language model has read says so: without trained
adapters it guesses. The words of these lists and tables, and the sums, differ between train and test.

Every solution ends in the text of the right option. In the answer format "EA" ("The circle is red. The answer
is B.") a model therefore finds the word first and then looks it up among the options. The solution of a
picture problem begins with a description of the picture, as in ScienceQA. The model learns from these dozen
words, not only from the one that answers the question.

Two more splits ask what the training never showed:

    unseen     pictures with a pair of color and shape (scenes.UNSEEN) that no other split has
    reworded   pictures as in test, but each question in a wording that no other split has
"""
import argparse
import hashlib
import io
import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from tiny import scenes  # noqa: E402
from tiny.scenes import COLORS, NUMBERS, PLURAL, POSITION_PHRASE, SHAPES, SIZES  # noqa: E402

LETTERS = "ABCDE"
# in this order, so that no later split repeats a problem of an earlier one
SPLITS = {"test": 1200, "val": 400, "unseen": 300, "reworded": 300, "train": 10000}
# of people and things; the first third only in val and test, the rest only in train
PEOPLE = ("Leo", "Amy", "Dan", "Kim", "Tim", "Sue", "Tom", "Ann", "Ben", "Eva", "Sam", "Mia", "Max", "Zoe",
          "Bob", "Jim", "Joe", "Liz")
OBJECTS = ("lamp", "key", "shoe", "drum", "cake", "ring", "clock", "spoon", "bell", "coat", "ball", "kite",
           "book", "cup", "hat", "box", "doll", "bag", "pen", "bike", "chair", "plate", "rope", "coin",
           "glove", "phone", "flag", "brush", "ticket", "pillow")
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

# kind of question about a picture -> subject, topic, lecture; the subjects vary, so that every column fills
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
    "yes or no": ("language science", "reading",
                  "A sentence is true if things are as it says."),
}
FITTING = {"position": ("one", "two", "three"), "size": ("one", "two", "three"), "relation": ("two", "three"),
           "count": ("many", "many", "one", "two", "three"), "compare": ("two", "three")}
# the wordings of each question; the last one is only for the split "reworded"
WORDINGS = {
    "color": ("What color {are} the {s}?", "Which color {do} the {s} have?", "What is the color of the {s}?",
              "The {s} {have} which color?", "Can you tell me the color of the {s}?"),
    "shape": ("What shape {are} the {s}?", "Which shape {do} the {s} have?", "What is the shape of the {s}?",
              "The {s} {have} which shape?", "Can you name the shape of the {s}?"),
    "size": ("What size is the {s}?", "Is the {s} big or small?", "What is the size of the {s}?",
             "How big is the {s}?", "Can you tell me the size of the {s}?"),
    "count": ("How many {s} are there?", "What is the number of {s}?", "How many {s} do you see?",
              "How many {s} are here?", "Can you count the {s}?"),
    "where": ("Where is the {s}?", "In which place is the {s}?", "Where do you see the {s}?",
              "Where is the {s} in the picture?", "Can you tell me where the {s} is?"),
    "what": ("What is {where}?", "Which shape is {where}?", "What do you see {where}?",
             "Which thing is {where}?", "Can you name the shape {where}?"),
    "relation": ("Seen from the {o}, where is the {s}?", "Where is the {s}, seen from the {o}?",
                 "From the {o}, where is the {s}?", "If you stand at the {o}, where is the {s}?",
                 "Can you tell me where the {s} is, seen from the {o}?"),
    "compare": ("Which is {more}, the {s} or the {o}?", "Which one is {more}, the {s} or the {o}?",
                "Is the {s} {more} or the {o}?", "The {s} and the {o}: which one is {more}?",
                "Can you tell me which is {more}, the {s} or the {o}?"),
    "is": ("Is the {s} {w}?", "Is it true that the {s} is {w}?", "The {s} is {w}, yes or no?",
           "Would you say the {s} is {w}?", "Can you say if the {s} is {w}?"),
    "there": ("{Are} there {w}?", "Is it true that there {are} {w}?", "There {are} {w}, yes or no?",
              "Do you see {w}?", "Can you say if there {are} {w}?"),
}
ONE, MANY = {"are": "is", "do": "does", "have": "has"}, {"are": "are", "do": "do", "have": "have"}
# word that nothing but the adapters' training explains -> the English word that it stands for
MADE_UP = {"wug": "first", "dax": "last", "blick": "after", "fep": "before", "glim": "most", "snib": "fewest",
           "zum": "plus", "mib": "minus"}
LIST_WORDINGS = {
    "first": ("Which is the {m} word of the list?", "What is the {m} word of the list?",
              "Which word of the list is the {m} one?", "Can you tell me the {m} word of the list?"),
    "after": ("Which word comes {m} {w}?", "What comes {m} {w} in the list?", "Which word is {m} {w}?",
              "Can you tell me which word comes {m} {w}?"),
    "most": ("Who has the {m}?", "Which of them has the {m}?", "Who of them has the {m}?",
             "Can you tell me who has the {m}?"),
    "plus": ("What is {a} {m} {b}?", "How much is {a} {m} {b}?", "{a} {m} {b} makes what?",
             "Can you tell me what {a} {m} {b} is?"),
}
LIST_WORDINGS |= {"last": LIST_WORDINGS["first"], "second": LIST_WORDINGS["first"],
                  "before": LIST_WORDINGS["after"], "fewest": LIST_WORDINGS["most"],
                  "minus": LIST_WORDINGS["plus"]}
DIGITS = tuple(map(str, range(19)))


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


class Asker:
    """Words questions. reworded: use the wording that no other split has."""

    def __init__(self, rng: random.Random, reworded: bool = False):
        self.rng, self.reworded = rng, reworded

    def word(self, wordings: tuple[str, ...], **words: str) -> str:
        text = wordings[-1] if self.reworded else self.rng.choice(wordings[:-1])
        text = text.format(**words)
        return text[0].upper() + text[1:]

    def scene(self, scene: scenes.Scene) -> list[Question]:
        """Everything that can be asked about a scene, each question in a wording drawn at random."""
        first = scene.things[0]
        if scene.kind == "many":
            s, c, n = PLURAL[first.shape], first.color, NUMBERS[len(scene.things) - 1]
            color = self.word(WORDINGS["color"], s=s, **MANY)
            shape = self.word(WORDINGS["shape"], s=f"{c} things", **MANY)
            asked = [Question("color", color, c, f"The {s} are {c}.", COLORS),
                     Question("shape", shape, s, f"The {c} things are {s}.", tuple(PLURAL.values()))]
            return asked + [self.count(s, n, NUMBERS[1:]), self.claim_number(n, c, s)]
        asked = []
        if len({thing.shape for thing in scene.things}) == len(scene.things):
            asked += [q for thing in scene.things for q in self.thing(scene, thing)]
            asked += [q for pair in itertools.permutations(scene.things, 2) for q in self.pair(*pair)]
        return asked + [self.count("things", NUMBERS[len(scene.things) - 1], NUMBERS[:3])]

    def count(self, what: str, n: str, possible: tuple[str, ...]) -> Question:
        text = self.word(WORDINGS["count"], s=what)
        return Question("count", text, n, f"The number of {what} is {n}.", possible)

    def thing(self, scene: scenes.Scene, thing: scenes.Thing) -> list[Question]:
        """Questions about one thing of a scene of one to three. No two things share a shape or a color."""
        s, c, rest = thing.shape, thing.color, [t for t in scene.things if t is not thing]
        self.rng.shuffle(rest)
        [where] = places(scene, [thing])
        other_places = tuple(places(scene, rest)) if rest else ()
        # offer the other things' words too, so that color, shape and place must be bound
        return [Question("color", self.word(WORDINGS["color"], s=s, **ONE), c, f"The {s} is {c}.", COLORS,
                         tuple(t.color for t in rest)),
                Question("shape", self.word(WORDINGS["shape"], s=f"{c} thing", **ONE), s,
                         f"The {c} thing is a {s}.", SHAPES, tuple(t.shape for t in rest)),
                Question("size", self.word(WORDINGS["size"], s=s), thing.size, f"The {s} is {thing.size}.",
                         SIZES),
                Question("position", self.word(WORDINGS["where"], s=s), where, f"The {s} is {where}.",
                         tuple(POSITION_PHRASE.values()), other_places),
                Question("position", self.word(WORDINGS["what"], where=where), s,
                         f"{where[0].upper()}{where[1:]} is the {s}.", SHAPES, tuple(t.shape for t in rest)),
                *self.claims(thing, rest)]

    def claims(self, thing: scenes.Thing, rest: list[scenes.Thing]) -> list[Question]:
        """Yes or no: is the thing of this color or size, and is there a thing of this color and shape?"""
        s, asked = thing.shape, []
        for right, words in ((thing.color, [t.color for t in rest] + [self.rng.choice(COLORS)]),
                             (thing.size, SIZES)):
            said = right if self.rng.random() < 0.5 else next((w for w in words if w != right), right)
            yes = "yes" if said == right else "no"
            asked.append(Question("yes or no", self.word(WORDINGS["is"], s=s, w=said), yes,
                                  f"The {s} is {right}, so {yes}.", ("yes", "no")))
        pairs = [(t.color, t.shape) for t in (thing, *rest)]
        color, shape = pairs[0]
        if self.rng.random() < 0.5:
            wrong = [(c, t.shape) for t in (thing, *rest) for c in COLORS if (c, t.shape) not in pairs]
            near = [(c, x) for c, x in wrong if c in {t.color for t in rest}]
            wrong = near if near and self.rng.random() < 0.5 else wrong
            color, shape = self.rng.choice([pair for pair in wrong if pair not in scenes.UNSEEN] or pairs)
        phrase = f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape}"
        yes = "yes" if (color, shape) in pairs else "no"
        said = f"There is {phrase}, so yes." if yes == "yes" else f"There is no {color} {shape}, so no."
        asked.append(Question("yes or no", self.word(WORDINGS["there"], Are="Is", are="is", w=phrase), yes,
                              said, ("yes", "no")))
        return asked

    def claim_number(self, n: str, color: str, shapes: str) -> Question:
        said = n if self.rng.random() < 0.5 else self.rng.choice(NUMBERS[1:])
        yes = "yes" if said == n else "no"
        text = self.word(WORDINGS["there"], Are="Are", are="are", w=f"{said} {shapes}")
        return Question("yes or no", text, yes, f"There are {n} {shapes}, so {yes}.", ("yes", "no"))

    def pair(self, thing: scenes.Thing, other: scenes.Thing) -> list[Question]:
        """Questions about two things: where is the first, seen from the other, and which is bigger?"""
        s, o = thing.shape, other.shape
        where = RELATION_OPTION[direction(thing, other)]
        asked = [Question("relation", self.word(WORDINGS["relation"], s=s, o=o), where,
                          f"Seen from the {o}, the {s} is {where}.", tuple(RELATION_OPTION.values()))]
        if thing.size != other.size:
            more = {"big": "bigger", "small": "smaller"}[thing.size]
            a, b = self.rng.sample((s, o), 2)  # in random order: else the one named first would be right
            asked.append(Question("compare", self.word(WORDINGS["compare"], s=a, o=b, more=more), s,
                                  f"The {more} one is the {s}.", (s, o)))
        return asked

    def about(self, scene: scenes.Scene, kind: str = "") -> Question | None:
        """One question about the scene, of this kind or of a random one; None if the kind does not fit."""
        asked = self.scene(scene)
        kind = kind or self.rng.choice(sorted({q.kind for q in asked}))
        return self.rng.choice([q for q in asked if q.kind == kind] or [None])


RELATION_OPTION = {"left": "on the left", "right": "on the right", "above": "above", "below": "below"}


def direction(thing: scenes.Thing, other: scenes.Thing) -> str:
    """Where a thing is, seen from another."""
    return scenes.relation(scenes.Scene("two", (thing, other)))


def places(scene: scenes.Scene, things: tuple | list = ()) -> list[str]:
    """Where each of the scene's things is, or each of `things`: for example "on the left"."""
    where = dict(zip(scene.things, scenes.where_each(scene)))
    return [POSITION_PHRASE[where[thing]] for thing in things or scene.things]


class Cast(NamedTuple):
    """Who has what, or how many: things are words or digits."""
    people: list[str]
    things: list[str]

    def told(self) -> str:
        return "Who has what: " + ", ".join(f"{person} {thing}" for person, thing in zip(*self)) + "."

    def counted(self) -> str:
        return "How many each has: " + ", ".join(f"{person} {n}" for person, n in zip(*self)) + "."


def random_cast(rng: random.Random, people: tuple = PEOPLE, things: tuple = OBJECTS) -> Cast:
    n = rng.choice((2, 3))
    return Cast(rng.sample(people, n), rng.sample(things, n))


def ask_people(rng: random.Random, cast: Cast) -> Question:
    i, j = rng.sample(range(len(cast.people)), 2)  # i: whom we ask about; j: whose words are a wrong option
    p, t = (words[i] for words in cast)
    other_p, other_t = ((words[j],) for words in cast)
    return rng.choice([
        Question("owner", f"Who has the {t}?", p, f"The one who has the {t} is {p}.", PEOPLE, other_p),
        Question("owned", f"What does {p} have?", t, f"The thing {p} has is the {t}.", OBJECTS, other_t)])


class Rule(NamedTuple):
    """The material of one question that a word of LIST_WORDINGS asks, and its answer."""
    meaning: str
    hint: str  # holds the list or table; "" for a sum
    words: dict[str, str]  # of the wording
    answer: str
    solution: str  # {m}: the word asked with
    options: tuple[str, ...]


def random_rule(rng: random.Random, meaning: str, part: str = "") -> Rule:
    """part: "train" or "test" for their own words and sums; "" for all."""
    mine = {"train": lambda words: words[len(words) // 3:], "test": lambda words: words[:len(words) // 3]}
    mine = mine.get(part, lambda words: words)
    if meaning in ("first", "last", "second", "after", "before"):
        words = rng.sample(mine(OBJECTS), rng.randint(4, 5))
        hint = f"List: {', '.join(words)}."
        if meaning in ("first", "last", "second"):
            answer = words[{"first": 0, "last": -1, "second": 1}[meaning]]
            return Rule(meaning, hint, {}, answer, f"The {{m}} word is {answer}.", tuple(words))
        i = rng.randrange(1, len(words) - 1)
        answer, asked = words[i + (1 if meaning == "after" else -1)], words[i]
        others = [w for w in words if w != asked]
        solution = f"The word {{m}} {asked} is {answer}."
        return Rule(meaning, hint, {"w": asked}, answer, solution, tuple(others))
    if meaning in ("most", "fewest"):
        n = rng.randint(3, 4)
        cast = Cast(rng.sample(mine(PEOPLE), n), [str(x) for x in rng.sample(range(1, 10), n)])
        number, answer = (max if meaning == "most" else min)(zip(cast.things, cast.people))
        return Rule(meaning, cast.counted(), {}, answer,
                    f"The {{m}} is {number}, and the one who has it is {answer}.", tuple(cast.people))
    while True:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        if a >= b and part in ("", "test" if (3 * a + b) % 4 == 0 else "train"):
            break
    answer, other = (a + b, a - b) if meaning == "plus" else (a - b, a + b)
    near = (other, answer + 1, answer - 1, answer + 2, other + 1)
    wrong = dict.fromkeys(str(x) for x in near if 0 <= x <= 18 and x != answer)
    return Rule(meaning, "", {"a": str(a), "b": str(b)}, str(answer), f"{a} {{m}} {b} is {answer}.",
                (str(answer), *wrong))


def ask_rule(asker: Asker, rule: Rule, m: str) -> Question:
    """The question of a rule, asked with the word m."""
    text = asker.word(LIST_WORDINGS[rule.meaning], m=m, **rule.words)
    return Question(f"made-up {m}", text, rule.answer, rule.solution.format(m=m), rule.options)


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
    most = min(5, len(q.pool))
    n = rng.randint(min(3 if q.kind.startswith("made-up") else 2, most), most)
    others = [word for word in q.pool if word != q.answer and word not in q.must]
    wrong = (list(q.must) + rng.sample(others, len(others)))[:n - 1]
    rng.shuffle(wrong)
    answer = letters.deal(n)
    choices = wrong[:answer] + [q.answer] + wrong[answer:]
    return {"question": q.text, "choices": choices, "answer": answer, "hint": hint, "image": None,
            "grade": f"grade{rng.randint(1, 12)}", "subject": subject, "topic": topic, "lecture": lecture,
            "solution": q.solution, "kind": q.kind}


def scene_problem(asker: Asker, letters: Letters, told: bool = False,
                  unseen: bool = False) -> tuple[dict, scenes.Scene | None]:
    """A problem about a random scene, shown in a picture or, if `told`, described in the hint.

    unseen: a scene with one of the pairs scenes.UNSEEN, and otherwise a scene without them
    """
    rng, q = asker.rng, None
    kind = rng.choice(list(SCENE_KINDS))
    while q is None:
        scene = scenes.random_scene(rng, rng.choice(FITTING.get(kind, scenes.KINDS)), seen=not unseen)
        q = asker.about(scene, kind)
    if told:
        hint = scenes.sentence(scene, rng)
    else:  # a hint about another picture says nothing of this one
        other = f"Another picture: {scenes.sentence(scenes.random_scene(rng, rng.choice(scenes.KINDS)))}"
        hint = rng.choice((*GENERIC_HINTS, other)) if rng.random() < 0.25 else ""
    problem = record(rng, letters, q, hint, *SCENE_KINDS[kind])
    if told:
        problem["kind"] += " told"
        return problem, None
    problem["image"] = "image.png"
    problem["solution"] = f"{scenes.sentence(scene)} {q.solution}"
    return problem, scene


def problem(asker: Asker, letters: Letters, part: str = "train") -> tuple[dict, scenes.Scene | None]:
    """A random problem, and its scene if it needs a picture. part: "train" or "test", for made-up words."""
    rng, dice = asker.rng, asker.rng.random()
    if dice < 0.74:
        return scene_problem(asker, letters)
    if dice < 0.93:
        m = rng.choice(list(MADE_UP))
        rule = random_rule(rng, MADE_UP[m], part)
        q, hint = ask_rule(asker, rule, m), rule.hint
        if hint and rng.random() < 0.4:  # the list belongs to the question: a problem without a hint
            q, hint = q._replace(text=f"{hint} {q.text}"), ""
        return record(rng, letters, q, hint, *RULE_SUBJECTS[rule.meaning]), None
    if dice < 0.95:
        return scene_problem(asker, letters, told=True)
    if dice < 0.97:
        cast = random_cast(rng)
        return record(rng, letters, ask_people(rng, cast), cast.told(), "social science", "culture",
                      "People can own things."), None
    facts = rng.choice(FACTS)
    q = ask_fact(rng, facts, *rng.choice(facts.pairs()))
    return record(rng, letters, q, "", facts.subject, facts.topic, facts.lecture), None


RULE_SUBJECTS = {
    **dict.fromkeys(("first", "last"), ("language science", "word order",
                                        "The wug word of a list is its first, the dax word its last.")),
    **dict.fromkeys(("after", "before"), ("language science", "word order",
                                          "Blick means after, and fep means before.")),
    **dict.fromkeys(("most", "fewest"), ("social science", "tables",
                                         "Who has the glim has the most, who has the snib the fewest.")),
    **dict.fromkeys(("plus", "minus"), ("natural science", "sums",
                                        "Zum adds two numbers, mib subtracts them.")),
}


def prompt(p: dict) -> str:
    """The prompt in format QCM, up to and with "Response:"."""
    options = " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, p["choices"]))
    return f"Question: {p['question']}\nContext: {p['hint'] or 'N/A'}\nOptions: {options}\nResponse:"


def split_problems(seed: int, split: str, n: int, closed: set):
    """Yield n problems of a split as (record, PNG bytes or None).

    Skip every problem whose (prompt, picture) is in `closed`. Add each yielded one to it, so none repeats.
    """
    rng = random.Random(f"{seed} {split}")
    asker, letters = Asker(rng, split == "reworded"), Letters(rng)
    while n:
        if split in ("unseen", "reworded"):
            p, scene = scene_problem(asker, letters, unseen=split == "unseen")
        else:
            p, scene = problem(asker, letters, "train" if split == "train" else "test")
        picture = None
        if scene:
            file = io.BytesIO()
            scenes.draw(scene, random.Random(rng.getrandbits(64)), 96).save(file, "PNG")
            picture = file.getvalue()
        if (prompt(p), picture) in closed:
            continue
        closed.add((prompt(p), picture))
        yield {**p, "split": split}, picture
        n -= 1


def write(out: Path, seed: int = 0, sizes: dict[str, int] = SPLITS) -> dict[str, dict]:
    """Write the world to a folder and return its problems by id."""
    problems, pids, closed = {}, {split: [] for split in sizes}, set()
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
