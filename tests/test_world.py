"""The small world: no problem repeats, words alone do not give a picture's answer, no column is empty."""
import json
import random
import re
from collections import Counter

import pytest
import torch
from conftest import ROOT, run_main
from sentencepiece import SentencePieceProcessor

import clip
import llama
import prompts
import weights
from evaluation import scores
from llama import LLaMA, LLaMAConfig
from official.tokenizer import Tokenizer
from tiny import audit, corpus, make_llm, scenes, world

SIZES = {"test": 300, "val": 60, "unseen": 80, "reworded": 80, "train": 900}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    world.write(out, seed=3, sizes=SIZES)
    return out


@pytest.fixture(scope="module")
def splits(folder):
    return {split: prompts.read_scienceqa(folder, split, "QCM-EA") for split in SIZES}


def after_the_lessons(seed: int) -> corpus.Corpus:
    stream = corpus.Corpus(seed, set())
    while not stream.mastered():
        stream.harder()
    return stream


def scene_of(p: dict) -> str:
    """The description with which the solution of a picture problem begins."""
    return p["solution"][:p["solution"].index(". ") + 1]


def pairs_in(text: str) -> set[tuple[str, str]]:
    """The pairs of color and shape that stand side by side in a text."""
    singular = {plural: shape for shape, plural in scenes.PLURAL.items()}
    words = re.findall(r"[a-z]+", text)
    pairs = {(c, singular.get(s, s)) for c, s in zip(words, words[1:])}
    return {(c, s) for c, s in pairs if c in scenes.COLORS and s in scenes.SHAPES}


def test_verbs_agree_with_one_thing_or_many(splits):
    """The wordings serve both: "The circle has which color?", "The circles have which color?"."""
    asked = " ".join(s.problem["question"] for samples in splits.values() for s in samples)
    one, many = "|".join([*scenes.SHAPES, "thing"]), "|".join([*scenes.PLURAL.values(), "things"])
    for nouns, right, wrong in (one, "is does has", "are do have"), (many, "are do have", "is does has"):
        for be, do, have, expected in (*right.split(), True), (*wrong.split(), False):
            for pattern in (rf"(color|shape) {be} the (\w+ )*({nouns})\?",
                            rf"(color|shape) {do} the (\w+ )*({nouns}) have",
                            rf"The (\w+ )*({nouns}) {have} which"):
                assert bool(re.search(pattern, asked)) == expected, pattern


def test_no_problem_repeats(splits):
    problems = [(s.prompt, s.image and s.image.read_bytes()) for samples in splits.values() for s in samples]
    assert len(problems) == sum(SIZES.values()) and len(set(problems)) == len(problems)


def test_no_column_is_empty(splits):
    counts = scores.scienceqa(splits["test"], {s.id: "" for s in splits["test"]})["columns"]
    assert all(n >= 20 for _, n in counts.values()), counts
    assert 0.65 < counts["IMG"][1] / 300 < 0.85
    kinds = Counter(s.problem["kind"] for s in splits["train"] if s.image)
    assert kinds.keys() == world.SCENE_KINDS.keys() and min(kinds.values()) > 40
    made_up = Counter(s.problem["kind"] for s in splits["train"] if "made-up" in s.problem["kind"])
    assert len(made_up) == len(world.MADE_UP) and min(made_up.values()) > 8


def test_solutions_end_in_the_right_option(splits):
    for s in splits["train"]:
        p = s.problem
        assert p["solution"].endswith(f" {p['choices'][p['answer']]}.")
        assert len(set(p["choices"])) == len(p["choices"]) and 2 <= len(p["choices"]) <= 5
        assert s.response == f"{p['solution']} The answer is {'ABCDE'[p['answer']]}."


def test_solutions_of_picture_problems_begin_with_a_description(splits):
    starts = ("There are ", *(f"{phrase[0].upper()}{phrase[1:]} is a" for phrase in
                              scenes.POSITION_PHRASE.values()))
    for s in splits["train"]:
        described = s.problem["solution"].startswith(starts) and s.problem["solution"].count(".") == 2
        assert described == (s.image is not None), s.problem["solution"]


def test_the_pairs_held_out_are_only_in_their_split(splits):
    """Not in a picture, nor in any text that the adapters read: else "unseen" would be a false claim."""
    for split, samples in splits.items():
        for s in samples:
            said = pairs_in(f"{s.prompt} {s.response}")
            if split == "unseen":
                assert s.image and pairs_in(scene_of(s.problem)) & scenes.UNSEEN
            else:
                assert not said & scenes.UNSEEN, s.problem


def patterns(wordings: tuple[str, ...]) -> list[re.Pattern]:
    """For each wording a pattern that matches its questions, whatever words fill it."""
    anything = [re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(wording)) for wording in wordings]
    return [re.compile(pattern, re.IGNORECASE) for pattern in anything]


def test_the_last_wording_of_each_question_is_only_in_the_split_reworded(splits):
    every = [patterns(wordings) for wordings in (*world.WORDINGS.values(), *world.LIST_WORDINGS.values())]
    asked = lambda split, many: [any(p.fullmatch(s.problem["question"]) for p in many) for s in splits[split]]
    kept = [ps[-1] for ps in every]
    assert all(asked("reworded", kept)) and not any(asked("train", kept)) and not any(asked("test", kept))
    colors = [s.problem["question"] for s in splits["train"] if s.problem["kind"] == "color"]
    assert len({question.split(" the ")[0] for question in colors}) >= 4


def test_yes_and_no_are_right_equally_often(splits):
    said = Counter(s.problem["choices"][s.problem["answer"]] for split in ("train", "test", "unseen")
                   for s in splits[split] if s.problem["kind"] == "yes or no")
    assert said.keys() == {"yes", "no"} and 0.35 < said["yes"] / said.total() < 0.65, said


def test_made_up_words_are_solved_by_their_meaning():
    """Recompute every answer from the problem's text alone."""
    rng = random.Random(0)
    asker, letters = world.Asker(rng), world.Letters(rng)
    for m in list(world.MADE_UP) * 30:
        rule = world.random_rule(rng, world.MADE_UP[m])
        p = world.record(rng, letters, world.ask_rule(asker, rule, m), rule.hint, "", "", "")
        listed = re.findall(r"\w+", p["hint"].partition(":")[2])
        table = {name: int(n) for name, n in zip(listed[::2], listed[1::2])} if m in ("glim", "snib") else {}
        numbers = [int(n) for n in re.findall(r"\d+", p["question"])]
        named = next((w for w in re.findall(r"\w+", p["question"]) if w in listed), None)
        at = lambda step: listed[listed.index(named) + step]
        right = {"wug": lambda: listed[0], "dax": lambda: listed[-1], "blick": lambda: at(1),
                 "fep": lambda: at(-1), "glim": lambda: max(table, key=table.get),
                 "snib": lambda: min(table, key=table.get), "zum": lambda: str(sum(numbers)),
                 "mib": lambda: str(numbers[0] - numbers[1])}[m]()
        assert p["choices"][p["answer"]] == right and m in p["question"] and 3 <= len(p["choices"]) <= 5, p


def test_made_up_words_are_tested_on_words_and_sums_that_training_never_has(splits):
    def material(split: str) -> set:
        """The options of lists and tables, and the two numbers of each sum."""
        made_up = [s.problem for s in splits[split] if s.problem["kind"].startswith("made-up")]
        sums = [p for p in made_up if p["kind"].endswith((" zum", " mib"))]
        words = {word for p in made_up if p not in sums for word in p["choices"]}
        return words | {tuple(re.findall(r"\d+", p["question"])) for p in sums}

    assert len(material("test")) > 20 and not material("train") & material("test")


def test_no_text_of_the_llama_explains_a_made_up_word():
    """They occur only between other random words, never in a question or a hint with options."""
    stream = after_the_lessons(5)
    for _ in range(3000):
        for prompt, _ in stream.document(2):
            if isinstance(prompt, str) and "Options:" in prompt:
                assert not set(re.findall(r"\w+", prompt)) & world.MADE_UP.keys(), prompt


def test_letters_are_balanced(splits):
    for n in range(2, 6):
        letters = Counter(s.problem["answer"] for s in splits["train"] if len(s.problem["choices"]) == n)
        assert max(letters.values()) - min(letters.values()) <= n


def test_the_words_of_a_picture_problem_do_not_give_its_answer(splits):
    """Choosing the option that was most often right for the same question in training stays near chance."""
    answer = lambda p: p["choices"][p["answer"]]
    often = Counter((s.problem["question"], answer(s.problem)) for s in splits["train"] if s.image)
    asked = [s.problem for s in splits["test"] if s.image]
    right = sum(max(p["choices"], key=lambda c: often[p["question"], c]) == answer(p) for p in asked)
    chance = sum(1 / len(p["choices"]) for p in asked)
    assert abs(right - chance) / len(asked) < 0.10  # 160 problems: two and a half standard deviations


def test_the_thing_named_first_is_not_always_the_one_that_is_bigger(splits):
    """It once was, in all wordings but one, so "compare" was solved without the picture."""
    right = Counter()
    for split in ("train", "test", "unseen", "reworded"):
        for p in (s.problem for s in splits[split] if s.problem["kind"] == "compare"):
            named = re.findall("|".join(scenes.SHAPES), p["question"])
            assert sorted(named) == sorted(p["choices"])
            right[named[0] == p["choices"][p["answer"]]] += 1
    assert right.total() > 80 and 0.35 < right[True] / right.total() < 0.65, right


def test_the_same_seed_gives_the_same_world(folder, tmp_path):
    world.write(tmp_path, seed=3, sizes=SIZES)
    for name in ("problems.json", "pid_splits.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    id = next(i for i, p in json.loads((folder / "problems.json").read_text()).items() if p["image"])
    for split in SIZES:
        image = folder / "images" / split / id / "image.png"
        if image.is_file():
            assert image.read_bytes() == (tmp_path / "images" / split / id / "image.png").read_bytes()


def test_every_word_is_one_piece_and_every_piece_is_read():
    """A piece that the LLaMA never read is noise: data of a user's own that needs it would teach nothing."""
    tokenizer = Tokenizer(ROOT / "tiny/llama/tokenizer.model")
    assert not [word for word in corpus.ALL_WORDS if len(tokenizer.encode(word)) > 1]
    stream, read = after_the_lessons(7), set()
    for _ in range(40000):
        ids, _, stacked = corpus.tokens(stream.document(2), tokenizer.encode, tokenizer.bos, tokenizer.eos)
        read |= {*ids, *(word for _, word, _ in stacked)}
    sp = SentencePieceProcessor(model_file=str(ROOT / "tiny/llama/tokenizer.model"))
    pieces = [i for i in range(3, tokenizer.vocab_size) if not sp.is_byte(i)]
    assert len(pieces) > 1500 and len(read & set(pieces)) >= 0.95 * len(pieces)


def test_a_scene_in_the_image_slot_is_told_in_the_solution():
    """The stack of a scene holds the words of its description, those of one thing at one position."""
    rng = random.Random(2)
    for kind in scenes.KINDS * 20:
        scene = scenes.random_scene(rng, kind)
        slots = corpus.stack(rng, scene)
        strong = [{word for word, weight in slot.items() if weight > 0.5} for slot in slots]
        strong = [words for words in strong if words]
        assert len(strong) == {"two": 2, "three": 3}.get(kind, len(strong)) and 1 <= len(strong) <= 3
        described = set(re.findall(r"\w+", scenes.sentence(scene)))
        assert all(words <= described for words in strong)


def test_the_embedded_files_are_small():
    files = [f for f in (ROOT / "tiny").rglob("*")
             if f.suffix in (".safetensors", ".model", ".json", ".png") and "data" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 12e6


def test_the_embeddings_of_stacked_words_are_summed_at_their_position():
    tokenizer = Tokenizer(ROOT / "tiny/llama/tokenizer.model")
    scene = scenes.random_scene(random.Random(0), "two")
    document = [(corpus.stack(random.Random(1), scene), ""), ("Question: Which?\nResponse:", "It.")]
    ids, target, stacked = corpus.tokens(document, tokenizer.encode, tokenizer.bos, tokenizer.eos)
    start = 1 + len(tokenizer.encode("Image: "))
    assert ids[start:start + 6] == [0] * 6 and len(ids) == len(target) and not any(target[:start + 6])
    model = LLaMA(LLaMAConfig(dim=8, n_layers=1, n_heads=2, ffn_dim=16, vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        x = make_llm.embed(model, make_llm.pad([(ids, target, stacked)] * 2))  # [2, T, 8]
    words = model.tok_embeddings.weight
    for i, said in enumerate(document[0][0]):
        total = torch.zeros(8)
        for word, weight in said.items():
            total = total + weight * words[tokenizer.encode(word)[0]]
        assert torch.allclose(x[1, start + i], total, atol=1e-6)
    assert torch.equal(x[0, start + 6:], words[ids[start + 6:]])


def test_the_tiny_presets_fit_the_embedded_models():
    assert LLaMAConfig(**weights.read_llama(ROOT / "tiny/llama")[0]) == llama.PRESETS["tiny"]
    assert clip.CLIPConfig(**weights.read_clip(ROOT / "tiny/clip")[0]) == clip.PRESETS["tiny"]


def test_the_audit_runs_and_has_the_rows_of_its_table(folder, monkeypatch, capsys):
    """Two problems of each check. tiny/README.md shows every row."""
    run_main(monkeypatch, audit.main, "--data", folder, "--limit", 2, "--device", "cpu", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert {row["problems"] for row in rows.values()} == {2}
    assert all(0 <= row["accuracy"] <= 100 for row in rows.values())
    assert len(rows) == 5 + len(audit.CHANGES) + 2 * 4  # of two: untrained, two baselines, chance
    table = (ROOT / "tiny/README.md").read_text().partition("## Where it breaks")[2]
    shown = re.findall(r"\| ([a-z][^|]*) \| [\d.]+ ", table.partition("## Data")[0])
    assert len(shown) == len(rows)
