"""The small world: no problem repeats, words alone do not give a picture's answer, no column is empty."""
import json
import random
from collections import Counter

import pytest
import torch
from conftest import ROOT

import clip
import llama
import prompts
import weights
from evaluation import scores
from llama import LLaMA, LLaMAConfig
from official.tokenizer import Tokenizer
from tiny import corpus, make_llm, scenes, world


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    world.write(out, seed=3, sizes={"test": 300, "val": 60, "train": 900})
    return out


@pytest.fixture(scope="module")
def splits(folder):
    return {split: prompts.read_scienceqa(folder, split, "QCM-EA") for split in ("train", "val", "test")}


def test_no_problem_repeats(splits):
    problems = [(s.prompt, s.image and s.image.read_bytes()) for samples in splits.values() for s in samples]
    assert len(problems) == 1260 and len(set(problems)) == len(problems)


def test_no_column_is_empty(splits):
    counts = scores.scienceqa(splits["test"], {s.id: "" for s in splits["test"]})["columns"]
    assert all(n >= 20 for _, n in counts.values()), counts
    assert 0.6 < counts["IMG"][1] / 300 < 0.85
    kinds = Counter(s.problem["kind"] for s in splits["train"] if s.image)
    assert kinds.keys() == {"color", "shape", "count", "position", "size", "relation", "compare"}
    assert min(kinds.values()) > 40


def test_solutions_end_in_the_right_option(splits):
    for s in splits["train"]:
        p = s.problem
        assert p["solution"].split()[-1] == p["choices"][p["answer"]] + "."
        assert len(set(p["choices"])) == len(p["choices"]) and 2 <= len(p["choices"]) <= 5
        assert s.response == f"{p['solution']} The answer is {'ABCDE'[p['answer']]}."


def test_solutions_of_picture_problems_begin_with_a_description(splits):
    for s in splits["train"]:
        assert s.problem["solution"].startswith(("There is ", "There are ")) == (s.image is not None)


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


def test_the_same_seed_gives_the_same_world(folder, tmp_path):
    world.write(tmp_path, seed=3, sizes={"test": 300, "val": 60, "train": 900})
    for name in ("problems.json", "pid_splits.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    id = next(i for i, p in json.loads((folder / "problems.json").read_text()).items() if p["image"])
    for split in ("train", "val", "test"):
        image = folder / "images" / split / id / "image.png"
        if image.is_file():
            assert image.read_bytes() == (tmp_path / "images" / split / id / "image.png").read_bytes()


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
