"""Pretraining text of the tiny LLaMA: documents of words only, without any picture.

A document is a list of parts (prompt, response). Only the responses count in the loss. Each part is
tokenised by itself, as data.py does with a sample. Half of the documents are problems about the small world
of world.py; several questions may follow one scene, each with its own answer. The other half is everyday
English from words.py: short descriptions, stories, lists and tables with questions, in the format of
ScienceQA and in that of instructions ("Instruction: ..").

The caption of a scene fills the image slot. It is a sentence, a telegram (bare words) or a stack. In a
stack, several words share one position and their embeddings are summed. Later, six visual tokens replace
about twenty words, so each visual token must carry several facts at once. A model of this size that has only
read one word per position is slow to learn that. A stack still holds only words: it uses no picture, no
image feature and no neck.

Other documents are drills. They train the one step that is hard to discover: finding a word among lettered
options and giving its letter. If "The answer is" stands between word and letter from the start, a small model
stays at chance for more than a thousand steps. If the letter directly follows the word, the model learns it
in 200 steps, and keeps it while the number of words and the distance grow.

No document gives a made-up word of world.MADE_UP a meaning. They occur only among random words.
"""
import random

from tiny import scenes, words, world

DRILLED_WORDS = sorted({*scenes.COLORS, *scenes.SHAPES, *scenes.SIZES, *scenes.NUMBERS,
                        *scenes.PLURAL.values(), *scenes.POSITION_PHRASE.values(),
                        *world.RELATION_OPTION.values(), "yes", "no", *world.PEOPLE, *world.OBJECTS,
                        *world.DIGITS, *(value for facts in world.FACTS for _, value in facts.pairs())})
FACT_WORDS = {word for facts in world.FACTS for pair in facts.pairs() for word in pair}
random.Random(0).shuffle(DRILLED_WORDS)
ALL_WORDS = sorted({*words.CONTENT, *words.FUNCTION, *FACT_WORDS, *world.MADE_UP, *world.DIGITS,
                    *scenes.PLURAL.values(), *world.PEOPLE, *world.OBJECTS})
LOWER = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = LOWER + LOWER.upper() + "0123456789" + ".,?!'\"-:;()/%$&+="
# words that a response may begin with; after "Response:" there is no space
FIRST_WORDS = sorted({*words.COLORS, *words.SHAPES, *words.SIZES, *words.NUMBERS, *words.NOUNS, *words.PLACES,
                      *words.ADJECTIVES, *words.DOING, *words.NAMES, *words.BODY, *words.PLACED, *FACT_WORDS,
                      *scenes.PLURAL.values(), *world.PEOPLE, *world.OBJECTS, *words.STARTS,
                      *"a an the it to yes no with from is there some behind near under".split()})
BETWEEN = ("", ".", ". The", ". The answer", ". The answer is")  # between word and letter, easiest first
ASKING = "Question:", "Instruction:"
DESCRIBE = ("Describe the picture in one sentence.", "Describe the picture.", "What do you see?",
            "What does the picture show?", "Write a sentence about the picture.", "Tell me about this image.")
SHORT = ("What is in the picture?", "What is this?", "What do you see in the image?", "Name the thing.",
         "What is shown here?", "What can you see?", "Which thing is this?")

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
        new = encode(prompt + answer) + ([eos] if answer and prompt.startswith(ASKING) else [])
        ids += new
        target += [False] * n + [True] * (len(new) - n)
    return ids, target, stacked


def response(p: dict, with_letter: bool = True) -> str:
    """The response in format EA, or without the letter: the solution alone."""
    return p["solution"] + (f" The answer is {world.LETTERS[p['answer']]}." if with_letter else "")


def article(noun: str) -> str:
    """The noun phrase with its article: "an old book", but "milk"."""
    if noun.split()[-1] in words.UNCOUNTED:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def said(scene: scenes.Scene, sizes: bool = True, colors: bool = True) -> list[list[str]]:
    """For each thing of the scene, in reading order, the words that a visual token may carry."""
    scene = scenes.ordered(scene)
    first = scene.things[0]
    if scene.kind == "many":
        number = scenes.NUMBERS[len(scene.things) - 1]
        return [[number, "small", first.color, scenes.PLURAL[first.shape]]]
    return [[t.size] * sizes + [t.color] * colors + [t.shape, where.split()[-1]]
            for t, where in zip(scene.things, world.places(scene))]


def telegram(rng: random.Random, scene: scenes.Scene, sizes: bool = True, colors: bool = True) -> str:
    """The scene in bare words. One thing or a crowd: in any order. A few things: each after its place."""
    things = said(scene, sizes, colors)
    if len(things) == 1:
        return " ".join(rng.sample(things[0], len(things[0])))
    return " ".join(" ".join(t[-1:] + t[:-1]) for t in things)  # the order shows which words belong together


def stack(rng: random.Random, scene: scenes.Scene, sizes: bool = True, colors: bool = True) -> Stack:
    """The scene as stacked words: all words of a thing share one position."""
    things = said(scene, sizes, colors)
    return piled(rng, things * rng.randint(1, 2) if len(things) == 1 else things)


def piled(rng: random.Random, things: list[list[str]]) -> Stack:
    """Give each thing one of the N_SLOTS positions, in order; all its words share this position.

    The other positions are empty, or hold the words of all things, each with a small weight.
    """
    slots = [{word: rng.uniform(0, 0.4) for said in things for word in said} if rng.random() < 0.5 else {}
             for _ in range(N_SLOTS)]
    for i, said in zip(sorted(rng.sample(range(N_SLOTS), len(things))), things):
        slots[i] = {word: rng.uniform(0.6, 1.4) for word in said}
    return slots


class Corpus:
    """An endless, seeded stream of documents. closed: text prompts that no document may contain."""

    def __init__(self, seed: int, closed: set[str]):
        self.rng = random.Random(f"corpus {seed}")
        self.letters = world.Letters(self.rng)
        self.asker = world.Asker(self.rng)
        self.closed = closed
        self.n_words, self.n_between = 6, 1  # lesson of the lookup drill: words and entries of BETWEEN in use
        self.paired = False  # whether the drill of pairs is mastered too

    def document(self, turns: int) -> Document:
        """The next document: a drill until drills are mastered, then rarely; else up to `turns` questions."""
        dice = self.rng.random()
        if not self.letters_mastered() or dice < 0.03:
            return self.lookup()
        if not self.paired or dice < 0.10:
            return self.pairs()
        if dice < 0.38:
            return self.retrieval()
        return self.questions(turns)

    def questions(self, turns: int) -> Document:
        dice, n = self.rng.random(), self.rng.randint(1, turns)
        if dice < 0.36:
            return self.scene(n, told=False)
        if dice < 0.44:
            return self.scene(n, told=True)
        if dice < 0.60:
            return self.rules(n)
        if dice < 0.65:
            return self.people(n)
        if dice < 0.73:
            return self.facts(n)
        if dice < 0.85:
            return self.photo(n)
        if dice < 0.96:
            return self.echo()
        return self.story(n)

    # --- drills ------------------------------------------------------------------------------------

    def lookup(self) -> Document:
        """Options, then six lookups: a letter and its word, or a word, some text and the word's letter."""
        rng = self.rng
        drilled = DRILLED_WORDS[:self.n_words]
        if self.mastered() and rng.random() < 0.5:
            drilled = rng.sample(ALL_WORDS, 5)
        options = rng.sample(drilled, rng.randint(2, 5))
        parts = [("Image: N/A", ""), ("\nOptions:", "")]
        for letter, word in zip(world.LETTERS, options):
            parts += [("", f"({letter})"), (word, "")]  # predicting the next letter needs this word's
        for _ in range(6):
            i = rng.randrange(len(options))
            between = BETWEEN[rng.choice((self.n_between - 1, rng.randrange(self.n_between)))]
            parts.append((f"({world.LETTERS[i]})", f" {options[i]}") if rng.random() < 0.3 else
                         (f"{options[i]}{between}", f" {world.LETTERS[i]}."))
        return parts

    def pairs(self) -> Document:
        """List two to four pairs of words; then ask six times for the partner of a word.

        The first words of all pairs are of one kind and the second of another, so that the word asked with
        tells on which side the answer stands.
        """
        rng = self.rng
        firsts, seconds, fillers = rng.choice((
            (scenes.COLORS, scenes.SHAPES, (" thing is a", " is")),
            (scenes.SIZES, scenes.SHAPES, ("", " is")),
            (words.COLORS, words.NOUNS, (" one is the", " is")),
            (words.ADJECTIVES, words.NOUNS, (" one is the", " is")),
            (words.NAMES, words.NOUNS, (" has is the", " is")),
            (world.PEOPLE, world.OBJECTS, (" has is the", " is")),
            (words.NAMES, world.DIGITS[1:10], (" has", ", and the one who has it is"))))
        n = min(rng.randint(2, 4), len(firsts), len(seconds))
        first, second = rng.sample(firsts, n), rng.sample(seconds, n)
        told = rng.choice((" ", " ", ", ")).join(f"{a} {b}" for a, b in zip(first, second))
        parts = [(f"Image: N/A {told}.", "")]
        for _ in range(6):
            i, side = rng.randrange(n), rng.random() < 0.4 and firsts is not scenes.SIZES
            key, value = (first[i], second[i]) if side else (second[i], first[i])
            parts.append((key + (fillers[not side] if rng.random() < 0.5 else ""), f" {value}"))
        return parts

    def mastered(self) -> bool:
        return self.letters_mastered() and self.paired

    def letters_mastered(self) -> bool:
        return (self.n_words, self.n_between) == (len(DRILLED_WORDS), len(BETWEEN))

    def harder(self) -> None:
        """Go to the next lesson: more words, then more text before the letter, then pairs, then the end."""
        if self.letters_mastered():
            self.paired = True
        elif self.n_words < len(DRILLED_WORDS):
            self.n_words = min(len(DRILLED_WORDS), int(self.n_words * 1.6))
        else:
            self.n_between = min(len(BETWEEN), self.n_between + 1)

    def retrieval(self) -> Document:
        """A few things or people, in bare words or sentences; then the last words of two solutions."""
        rng, style = self.rng, self.rng.randrange(3)  # bare words are easier: related words are closer
        dice = rng.random()
        if dice < 0.25:
            cast = world.random_cast(rng)
            told = cast.told() if style else " ".join(f"{p} {t}" for p, t in zip(*cast))
            asked, hidden = [world.ask_people(rng, cast) for _ in range(6)], ()
        elif dice < 0.5:
            return self.ranks()
        else:
            scene = self.random_scene("two", "two", "three")
            sizes, colors = True, True
            if style != 2:
                sizes, colors = rng.choice(((False, False), (True, False), (False, True)))
            if style == 2 and rng.random() < 0.5:
                told = scenes.sentence(scene, rng)
            else:
                told = telegram(rng, scene, sizes, colors)
            if rng.random() < 0.4:
                told = stack(rng, scene, sizes, colors)
            asked = [q for q in self.asker.scene(scene) if q.kind != "yes or no"]
            hidden = ("bigger", "smaller", "is big", "is small") * (not sizes)
            hidden += (*scenes.COLORS,) * (not colors)
        solutions = sorted({q.solution for q in asked if not any(word in q.solution for word in hidden)})
        parts = [(f"Image: {told}" if isinstance(told, str) else told, "")]
        for solution in rng.sample(solutions, min(2, len(solutions))):  # with more, one would reveal another
            start, _, answer = solution.rpartition(" ")
            parts.append((start, f" {answer}"))
        return parts

    def ranks(self) -> Document:
        """A list or table of any words or digits, and the ends of sentences about places in it."""
        rng = self.rng
        dice = rng.random()
        if dice < 0.15:
            rules = [world.random_rule(rng, rng.choice(("plus", "minus"))) for _ in range(3)]
            sums = [rule.solution.format(m=rule.meaning) for rule in rules]
            return [("Image: N/A", ""), *((s.rpartition(" ")[0], " " + s.rpartition(" ")[2]) for s in sums)]
        if dice < 0.6:
            people = rng.sample(words.NAMES, rng.randint(2, 4))
            numbers = rng.sample(range(1, 10), len(people))
            ranked = [person for _, person in sorted(zip(numbers, people))]
            told = " ".join(f"{p} {n}" for p, n in zip(people, numbers))
            ends = [("the most is", f"{max(numbers)}, and the one who has it is {ranked[-1]}"),
                    ("the fewest is", f"{min(numbers)}, and the one who has it is {ranked[0]}")] * 2
            ends += [(f"{p} has", str(n)) for p, n in zip(people, numbers)]
        else:
            listed = rng.sample(words.CONTENT, rng.randint(3, 5))
            told = ", ".join(listed)
            i = rng.randrange(1, len(listed))
            ends = [("the first word is", listed[0]), ("the last word is", listed[-1]),
                    ("the second word is", listed[1]), (f"after {listed[i - 1]} is", listed[i]),
                    (f"before {listed[i]} is", listed[i - 1])]
        return [(f"Image: N/A{rng.choice((' ', ' List: '))}{told}.", ""),
                *((f"{start[0].upper()}{start[1:]}", f" {end}.") for start, end in rng.sample(ends, 2))]

    def echo(self) -> Document:
        """Random words in the image slot or in the instruction; the response says them again."""
        rng, n = self.rng, self.rng.randint(1, 5)
        pool = ALL_WORDS if rng.random() < 0.9 else words.STARTS
        wanted = [rng.choice(FIRST_WORDS), *(rng.choice(pool) for _ in range(n - 1))]
        invented = self.invented()
        if rng.random() < 0.2:
            wanted.insert(rng.randint(0, n), invented)
        text, dice = " ".join(wanted), rng.random()
        if dice < 0.45 and invented not in wanted:
            return [(piled(rng, [[word] for word in wanted]), ""), self.asked(rng.choice(SHORT), text)]
        if dice < 0.6:
            return [(f"Image: {text}", ""), self.asked(rng.choice(SHORT), text)]
        if dice < 0.8:
            ask = rng.choice(("Say this:", "Say again:", "Write this:", "Read this:", "Please say:"))
            return [("Image: N/A", ""), self.asked(f"{ask} {text}", text)]
        twice = " ".join(rng.choice(pool) for _ in range(rng.randint(4, 9)))
        return [("Image: N/A", ""), ("", f"{twice}."), ("", f"{twice}.")]

    def invented(self) -> str:
        """A word of random letters, or anything else that can stand in a text."""
        letters = self.rng.choice((LOWER, LOWER, LOWER + LOWER.upper() + world.LETTERS, CHARACTERS))
        return "".join(self.rng.choice(letters) for _ in range(self.rng.randint(2, 6)))

    # --- problems of the small world ---------------------------------------------------------------

    def asked(self, question: str, answer: str) -> tuple[str, str]:
        """A question without options and its answer, as an instruction or in ScienceQA's format."""
        if self.rng.random() < 0.7:
            return f"Instruction: {question}\nResponse:", answer
        return f"Question: {question}\nContext: N/A\nResponse:", answer

    def turn(self, q: world.Question, hint: str, before: str = "") -> tuple[str, str]:
        """One question with its answer. Some have no options; some of these are instructions.

        before: the description of the scene in the image slot, with which the solution begins
        """
        for _ in range(8):
            p = world.record(self.rng, self.letters, q, hint, "", "", "")
            p["solution"] = f"{before} {q.solution}".strip()
            text = world.prompt(p)
            if before or text not in self.closed:
                break
        else:
            return "", ""  # every prompt drawn for this question is closed
        dice = self.rng.random()
        if dice < 0.10:
            answer = self.rng.choice((q.answer, q.solution, p["solution"]))
            return f"Instruction: {f'{q.text} {hint}'.strip()}\nResponse:", answer
        if dice < 0.20:
            text = text[:text.index("\nOptions:")] + "\nResponse:"
            return text, response(p, with_letter=False)
        if dice < 0.24:
            return text, f"The answer is {world.LETTERS[p['answer']]}."
        return text, response(p)

    def random_scene(self, *kinds: str) -> scenes.Scene:
        """Any scene: scenes.UNSEEN is kept from the image encoder and the adapters, not from here."""
        return scenes.random_scene(self.rng, self.rng.choice(kinds), seen=self.rng.random() < 0.75)

    def scene(self, n: int, told: bool) -> Document:
        """A scene in words, in the image slot or (if `told`) in the context, and n questions about it."""
        rng = self.rng
        scene = self.random_scene("one", "two", "two", "three", "three", "many")
        if told:
            hint, slot, before = scenes.sentence(scene, rng), "N/A", ""
        else:
            hint = rng.choice(world.GENERIC_HINTS) if rng.random() < 0.2 else ""
            if rng.random() < 0.05:
                other = self.random_scene(*scenes.KINDS)
                hint = f"Another picture: {scenes.sentence(other)}"
            slot = rng.choice((scenes.sentence(scene), telegram(rng, scene),
                               stack(rng, scene), stack(rng, scene), stack(rng, scene)))
            before = scenes.sentence(scene)
        parts = [(f"Image: {slot}" if isinstance(slot, str) else slot, "")]
        if not told and rng.random() < 0.1:
            return parts + [self.asked(rng.choice(DESCRIBE), before)]
        kinds = sorted({q.kind for q in self.asker.scene(scene)})
        return parts + [self.turn(self.asker.about(scene, rng.choice(kinds)), hint, before) for _ in range(n)]

    def people(self, n: int) -> Document:
        parts = [("Image: N/A", "")]
        cast = world.random_cast(self.rng)
        return parts + [self.turn(world.ask_people(self.rng, cast), cast.told()) for _ in range(n)]

    def rules(self, n: int) -> Document:
        """Lists, tables and sums, asked about in English: "first", not "wug"."""
        parts, rng = [("Image: N/A", "")], self.rng
        for _ in range(n):
            rule = world.random_rule(rng, rng.choice(("first", "last", "second", "after", "before", "most",
                                                      "most", "fewest", "fewest", "plus", "minus")))
            if rule.hint.startswith("List:") and rng.random() < 0.3:
                rule = self.any_words(rule)
            q, hint = world.ask_rule(self.asker, rule, rule.meaning), rule.hint
            if hint and rng.random() < 0.4:
                q, hint = q._replace(text=f"{hint} {q.text}"), ""
            parts.append(self.turn(q, hint))
        return parts

    def any_words(self, rule: world.Rule) -> world.Rule:
        """The same list with other words, from all of words.CONTENT."""
        old = rule.hint.removeprefix("List: ").removesuffix(".").split(", ")
        new = dict(zip(old, self.rng.sample(words.CONTENT, len(old))))
        replace = lambda text: " ".join(new.get(w.strip(".,"), w.strip(".,")) + w[len(w.rstrip(".,")):]
                                        for w in text.split())
        return world.Rule(rule.meaning, replace(rule.hint), {k: new[w] for k, w in rule.words.items()},
                          new[rule.answer], replace(rule.solution), tuple(new[w] for w in rule.options))

    def facts(self, n: int) -> Document:
        parts = [("Image: N/A", "")]
        for _ in range(n):
            facts = self.rng.choice(world.FACTS)
            q = world.ask_fact(self.rng, facts, *self.rng.choice(facts.pairs()))
            if self.rng.random() < 0.1:
                q = q._replace(text=f"Can you tell me: {q.text[0].lower()}{q.text[1:]}")
            parts.append(self.turn(q, ""))
        return parts

    # --- everyday English --------------------------------------------------------------------------

    def photo(self, n: int) -> Document:
        """An everyday scene in the image slot, and n questions with short or long answers."""
        rng = self.rng
        noun, doing, place = rng.choice(words.NOUNS), rng.choice(words.DOING), rng.choice(words.PLACES)
        look = rng.choice(words.COLORS if rng.random() < 0.6 else words.ADJECTIVES + words.SIZES)
        thing = " ".join((look, noun)) if rng.random() < 0.8 else noun
        on = rng.choice(("in", "in", "on", "near", "behind", "under"))
        use = rng.sample(("look", "doing", "place", "other"), rng.randint(1, 3))
        where = f"{on} the {place}" if "place" in use else ""
        slots = [thing.split() + [doing] * ("doing" in use)]
        other = ""
        if "other" in use:
            other = rng.choice(words.NOUNS)
            color = rng.choice(words.COLORS) if rng.random() < 0.5 else ""
            slots.append([w for w in (color, other) if w])
            other = f"{color} {other}".strip()
        if where:
            slots.append([on, place] if rng.random() < 0.5 else [place])
            where = where if on in slots[-1] else f"in the {place}"
        whole = article(thing) + (f" {doing}" if "doing" in use else "") + (f" {where}" if where else "")
        whole = whole + (f" and {article(other)}" if other else "")
        bare = " ".join(word for slot in slots for word in slot)
        slot = rng.choice((piled(rng, slots), piled(rng, slots), piled(rng, slots), bare, whole))
        capital = lambda text: text[0].upper() + text[1:]
        asked = [(rng.choice(SHORT), rng.choice((whole, article(thing), thing, noun,
                                                 f"It is {article(thing)}.", f"{capital(article(thing))}."))),
                 (rng.choice(DESCRIBE), rng.choice((f"{capital(whole)}.", f"There is {whole}.",
                                                    f"The picture shows {whole}.", whole)))]
        asked.append((f"Is there {article(noun)}?",
                      rng.choice(("yes", "Yes.", f"Yes, there is {article(noun)}."))))
        if (wrong := rng.choice(words.NOUNS)) not in bare.split():
            asked.append((f"Is there {article(wrong)}?",
                          rng.choice(("no", "No.", f"No, there is no {wrong}."))))
        if thing != noun:
            kind = "color" if look in words.COLORS else "kind"
            ask = {"color": f"What color is the {noun}?", "kind": f"How does the {noun} look?"}[kind]
            asked.append((ask, rng.choice((look, f"It is {look}.", f"The {noun} is {look}."))))
        if "doing" in use:
            asked.append((rng.choice((f"What is the {noun} doing?", f"What does the {noun} do?")),
                          rng.choice((doing, f"It is {doing}.", f"The {noun} is {doing}."))))
            asked.append((f"Who is {doing}?", rng.choice((noun, f"The {noun}.", f"The {noun} is {doing}."))))
        if where:
            asked.append((f"Where is the {noun}?", rng.choice((where, f"It is {where}.", place,
                                                               f"The {noun} is {where}."))))
        if other:
            asked.append(("What else is in the picture?",
                          rng.choice((article(other), other, f"{article(other)}."))))
        parts = [(f"Image: {slot}" if isinstance(slot, str) else slot, "")]
        for question, answer in rng.sample(asked, min(n, len(asked))):
            parts.append(self.choice(question, noun, words.NOUNS) if answer == noun and rng.random() < 0.5
                         else self.asked(question, answer))
        return parts

    def choice(self, question: str, answer: str, pool: list[str]) -> tuple[str, str]:
        """A question with options. The solution is the answer in a short sentence: "It is a dog."."""
        q = world.Question("", question, answer, f"It is {article(answer)}.", tuple({answer, *pool}))
        q = q._replace(pool=tuple(sorted(q.pool)))
        p = world.record(self.rng, self.letters, q, "", "", "", "")
        return world.prompt(p), response(p)

    def story(self, n: int) -> Document:
        """Two sentences of everyday English, and n questions about them."""
        rng = self.rng
        a, b = rng.sample(words.NAMES, 2)
        x, y = rng.sample(words.NOUNS, 2)
        look, place, time = rng.choice(words.ADJECTIVES), rng.choice(words.PLACES), rng.choice(words.TIME)
        past, verb = rng.choice(words.PAST), rng.choice(words.VERBS)
        said = [f"{a} saw {article(f'{look} {x}')}.", f"{a} {past} the {x} in the {place}.",
                f"{a} gave {b} {article(x)}.", f"{time} {a} went to the {place} with {b}.",
                f"{a} likes to {verb} with {b}.", f"The {x} is {look}, but the {y} is not.",
                f"{a} wants to {verb} the {y} before {time}.", f"My {x} has {article(f'{look} {y}')}.",
                f"The {rng.choice(words.BODY)} of the {x} is {look}.", f"Can you {verb} this {x}?",
                f"There is {article(y)} {rng.choice(words.PLACED)} the {x}.",
                f"{a} is {rng.choice(words.DOING)} because {b} has the {y}.",
                f"We {past} {rng.choice(words.NUMBERS)} {x}s.", f"Some {x}s are {look}."]
        if rng.random() < 0.4:  # all words count
            text = " ".join(s[0].upper() + s[1:] for s in rng.sample(said, 3))
            return [("Image: N/A", ""), ("", text)]
        asked = [(said[0], f"What did {a} see?", article(f"{look} {x}")),
                 (said[1], f"Where is the {x}?", f"in the {place}"), (said[1], f"Who {past} the {x}?", a),
                 (said[2], f"Who has the {x}?", b), (said[2], f"Who gave {b} {article(x)}?", a),
                 (said[3], f"Where did {a} go?", f"to the {place}"), (said[3], f"Who was with {a}?", b),
                 (said[5], f"What is {look}?", f"the {x}"),
                 (said[4], f"What does {a} like?", f"to {verb} with {b}")]
        parts = [("Image: N/A", "")]
        for told, question, answer in rng.sample(asked, n):
            parts.append(self.asked(f"{told[0].upper()}{told[1:]} {question}", answer))
        return parts


