"""Pretraining text of the tiny LLaMA: documents of words only, without any picture.

A document is a list of parts (prompt, response). Only the responses count in the loss. Each part is
tokenised by itself, as data.py does with a sample. Most documents are problems of world.py; several questions
may follow one scene, each with its own answer.

The caption of the scene fills the image slot. It is a sentence, a telegram (bare words) or a stack. In a
stack, several words share one position and their embeddings are summed. Later, six visual tokens replace
about twenty words, so each visual token must carry several facts at once. A model of this size that has only
read one word per position is slow to learn that. A stack still holds only words: it uses no picture, no
image feature and no neck.

Other documents are drills. They train the one step that is hard to discover: finding a word among lettered
options and giving its letter. If "The answer is" stands between word and letter from the start, a small model
stays at chance for more than a thousand steps. If the letter directly follows the word, the model learns it
in 200 steps, and keeps it while the number of words and the distance grow.
"""
import random

from tiny import scenes, world

DRILLED_WORDS = sorted({*scenes.COLORS, *scenes.SHAPES, *scenes.SIZES, *scenes.NUMBERS, *scenes.POSITIONS,
                        *scenes.RELATIONS, *scenes.PLURAL.values(), *world.PEOPLE, *world.OBJECTS,
                        *(value for facts in world.FACTS for _, value in facts.pairs())})
random.Random(0).shuffle(DRILLED_WORDS)
BETWEEN = ("", ".", ". The", ". The answer", ". The answer is")  # between word and letter, easiest first

N_SLOTS = 6  # positions of a stack: the number of visual tokens of a picture

Stack = list[dict[str, float]]  # for each position: the words that share it, each with a weight
Document = list[tuple[str | Stack, str]]
Tokens = tuple[list[int], list[bool], list[tuple[int, int, float]]]


def tokens(document: Document, encode, bos: int, eos: int) -> Tokens:
    """Token ids, whether each belongs to a response, and (position, id, weight) of each stacked word.

    Positions of a stack have the id 0. Every response to a question ends in EOS.
    """
    ids, target, stacked = [bos], [False], []
    for prompt, answer in document:
        if not isinstance(prompt, str):
            ids += encode("Image: ")
            for words in prompt:
                stacked += [(len(ids), encode(word)[0], weight) for word, weight in words.items()]
                ids.append(0)
            target += [False] * (len(ids) - len(target))
            continue
        if prompt.startswith("Image: ") and prompt != "Image: N/A":  # tokenise the caption by itself
            head = encode("Image: ")
            ids, target, prompt = ids + head, target + [False] * len(head), prompt[7:]
        n = len(encode(prompt))
        new = encode(prompt + answer) + ([eos] if answer and prompt.startswith("Question:") else [])
        ids += new
        target += [False] * n + [True] * (len(new) - n)
    return ids, target, stacked


def response(p: dict, with_letter: bool = True) -> str:
    """The response in format EA, or without the letter: the solution alone."""
    return p["solution"] + (f" The answer is {world.LETTERS[p['answer']]}." if with_letter else "")


def telegram(rng: random.Random, scene: scenes.Scene, sizes: bool = True, colors: bool = True) -> str:
    """The scene in bare words. One thing or a crowd: in any order. Two things: each after its place."""
    scene = scenes.ordered(scene)
    first = scene.things[0]
    if scene.kind == "many":
        words = [scenes.NUMBERS[len(scene.things) - 1], first.color, scenes.PLURAL[first.shape]]
        words += ["small"] * rng.randint(0, 1)
        return " ".join(rng.sample(words, len(words)))
    if scene.kind == "one":
        words = [first.size, first.color, first.shape, scenes.position(scene)]
        return " ".join(rng.sample(words, len(words)))
    things = [" ".join(f"{where} {t.size * sizes} {t.color * colors} {t.shape}".split())
              for t, where in zip(scene.things, scenes.places(scene))]
    return " ".join(things)  # keep the order: it shows which words belong to which thing


def stack(rng: random.Random, scene: scenes.Scene, sizes: bool = True, colors: bool = True) -> Stack:
    """The scene as stacked words: all words of a thing share one position.

    The other positions are empty, or hold the words of all things with small weights.
    """
    scene = scenes.ordered(scene)
    first = scene.things[0]
    if scene.kind == "two":
        said = [[t.size] * sizes + [t.color] * colors + [t.shape, where]
                for t, where in zip(scene.things, scenes.places(scene))]
    elif scene.kind == "many":
        number = scenes.NUMBERS[len(scene.things) - 1]
        said = [[number, "small", first.color, scenes.PLURAL[first.shape]]] * rng.randint(1, 2)
    else:
        said = [[first.size, first.color, first.shape, scenes.position(scene)]] * rng.randint(1, 2)
    slots = [{word: rng.uniform(0, 0.4) for words in said for word in words} if rng.random() < 0.5 else {}
             for _ in range(N_SLOTS)]
    for i, words in zip(sorted(rng.sample(range(N_SLOTS), len(said))), said):
        slots[i] = {word: rng.uniform(0.6, 1.4) for word in words}
    return slots


class Corpus:
    """An endless, seeded stream of documents. closed: text prompts that no document may contain."""

    def __init__(self, seed: int, closed: set[str]):
        self.rng = random.Random(f"corpus {seed}")
        self.letters = world.Letters(self.rng)
        self.closed = closed
        self.n_words, self.n_between = 6, 1  # lesson of the lookup drill: words and entries of BETWEEN in use

    def document(self, turns: int) -> Document:
        """The next document: a drill until drills are mastered, then rarely; else up to `turns` questions."""
        if not self.mastered() or self.rng.random() < 0.05:
            return self.lookup()
        return self.retrieval() if self.rng.random() < 0.4 else self.questions(turns)

    def questions(self, turns: int) -> Document:
        dice, n = self.rng.random(), self.rng.randint(1, turns)
        if dice < 0.40:
            return self.scene(n, told=False)
        if dice < 0.55:
            return self.scene(n, told=True)
        return self.people(n) if dice < 0.75 else self.facts(n)

    def lookup(self) -> Document:
        """Options, then six lookups: a letter and its word, or a word, some text and the word's letter."""
        words = DRILLED_WORDS[:self.n_words]
        options = self.rng.sample(words, self.rng.randint(2, 5))
        parts = [("Image: N/A", ""), ("\nOptions:", "")]
        for letter, word in zip(world.LETTERS, options):
            parts += [("", f"({letter})"), (word, "")]  # predicting the next letter needs this word's
        for _ in range(6):
            i = self.rng.randrange(len(options))
            between = BETWEEN[self.rng.choice((self.n_between - 1, self.rng.randrange(self.n_between)))]
            parts.append((f"({world.LETTERS[i]})", f" {options[i]}") if self.rng.random() < 0.3 else
                         (f"{options[i]}{between}", f" {world.LETTERS[i]}."))
        return parts

    def mastered(self) -> bool:
        return (self.n_words, self.n_between) == (len(DRILLED_WORDS), len(BETWEEN))

    def harder(self) -> None:
        """Go to the next lesson of the lookup drill: first more words, then more text before the letter."""
        if self.n_words < len(DRILLED_WORDS):
            self.n_words = min(len(DRILLED_WORDS), int(self.n_words * 1.6))
        else:
            self.n_between = min(len(BETWEEN), self.n_between + 1)

    def retrieval(self) -> Document:
        """Two things, or a few people, in bare words or sentences; then the last words of two solutions."""
        rng, style = self.rng, self.rng.randrange(3)  # bare words are easier: related words are closer
        if rng.random() < 0.4:
            cast = world.random_cast(rng)
            told = cast.told() if style else " ".join(f"{p} {t}" for p, t in zip(*cast))
            asked, hidden = [world.ask_people(rng, cast) for _ in range(6)], ()
        else:
            scene = scenes.random_scene(rng, "two")
            sizes, colors = True, True
            if style != 2:
                sizes, colors = rng.choice(((False, False), (True, False), (False, True)))
            if style == 2 and rng.random() < 0.5:
                told = scenes.in_words(scene, rng)
            else:
                told = telegram(rng, scene, sizes, colors)
            if rng.random() < 0.4:
                told = stack(rng, scene, sizes, colors)
            asked = world.scene_questions(scene)
            hidden = ("bigger", "smaller", "size") * (not sizes) + ("color", "shape is the") * (not colors)
        solutions = sorted({q.solution for q in asked if not any(word in q.text for word in hidden)})
        parts = [(f"Image: {told}" if isinstance(told, str) else told, "")]
        for solution in rng.sample(solutions, min(2, len(solutions))):  # with more, one would reveal another
            start, _, answer = solution.rpartition(" ")
            parts.append((start, f" {answer}"))
        return parts

    def turn(self, q: world.Question, hint: str, seen: scenes.Scene | None = None) -> tuple[str, str]:
        """One question with its answer; one in six has no options. seen: the scene in the image slot."""
        for _ in range(8):
            p = world.record(self.rng, self.letters, q, hint, "", "", "")
            if seen:
                p["solution"] = f"{world.scene_in_words(seen)} {q.solution}"
            text = world.prompt(p)
            if seen or text not in self.closed:
                break
        else:
            return "", ""  # every prompt drawn for this question is closed
        if self.rng.random() < 1 / 6:
            text = text[:text.index("\nOptions:")] + "\nResponse:"
            return text, response(p, with_letter=False)
        return text, response(p)

    def scene(self, n: int, told: bool) -> Document:
        """A scene in words, in the image slot or (if `told`) in the context, and n questions about it."""
        rng = self.rng
        scene = scenes.random_scene(rng, rng.choice(("one", "two", "two", "two", "many")))
        if told:
            hint, slot = world.scene_in_words(scene, rng), "N/A"
        else:
            hint = rng.choice(world.GENERIC_HINTS) if rng.random() < 0.25 else ""
            slot = rng.choice((scenes.in_words(scene), telegram(rng, scene),
                               stack(rng, scene), stack(rng, scene)))
        parts = [(f"Image: {slot}" if isinstance(slot, str) else slot, "")]
        seen = None if told else scene
        return parts + [self.turn(world.ask_scene(rng, scene), hint, seen) for _ in range(n)]

    def people(self, n: int) -> Document:
        parts = [("Image: N/A", "")]
        cast = world.random_cast(self.rng)
        return parts + [self.turn(world.ask_people(self.rng, cast), cast.told()) for _ in range(n)]

    def facts(self, n: int) -> Document:
        parts = [("Image: N/A", "")]
        for _ in range(n):
            facts = self.rng.choice(world.FACTS)
            q = world.ask_fact(self.rng, facts, *self.rng.choice(facts.pairs()))
            parts.append(self.turn(q, ""))
        return parts
