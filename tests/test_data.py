"""The ScienceQA reader, prompts, token layout, batches and their order."""
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
from data import Sample, build_prompt, build_response
from conftest import ROOT

REAL = ROOT.parent / "shared/data"
PROBLEM = {"question": "Which is  red?", "choices": ["sky", "a  rose"], "answer": 1, "hint": "Look.", "image": "image.png",
           "grade": "grade7", "subject": "natural science", "topic": "color", "lecture": "Some things\nare red.",
           "solution": "A rose is red.", "split": "train"}


def write(folder: Path, problems: dict, splits: dict) -> Path:
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder


class Words:
    """a tokenizer that a reader can follow: one id per word"""
    bos, eos = 1, 2

    def __init__(self):
        self.known = {}

    def encode(self, text):
        return [self.known.setdefault(word, 3 + len(self.known)) for word in text.split()]


def test_prompt_and_response_formats(tmp_path):
    write(tmp_path, {"5": PROBLEM}, {"train": ["5"]})
    (sample,) = data.read_scienceqa(tmp_path, "train", "QCM-ALE")
    assert sample.prompt == "Question: Which is red?\nContext: Look.\nOptions: (A) sky (B) a rose\nResponse:"
    assert sample.response == "The answer is B. BECAUSE: Some things\\nare red. A rose is red."
    assert sample.image == tmp_path / "images/train/5/image.png" and sample.problem["subject"] == "natural science"
    assert build_prompt("Q?", "", ["x", "y"], "CQM-A") == "Context: N/A\nQuestion: Q?\nOptions: (A) x (B) y\nResponse:"
    assert build_prompt("Q?", "", [], "QCM-A") == "Question: Q?\nContext: N/A\nResponse:"
    bare = {**PROBLEM, "lecture": "", "solution": ""}
    assert build_response(bare, "QCM-ALE") == "The answer is B."
    lecture, solution = "Some things\\nare red.", "A rose is red."
    for form, text in {"A": "The answer is B.", "AL": f"The answer is B. BECAUSE: {solution}",
                       "AE": f"The answer is B. BECAUSE: {lecture}", "AEL": f"The answer is B. BECAUSE: {solution} {lecture}",
                       "LA": f"{lecture} The answer is B.", "EA": f"{solution} The answer is B.",
                       "LEA": f"{lecture} {solution} The answer is B.", "ELA": f"{solution} {lecture} The answer is B."}.items():
        assert build_response(PROBLEM, f"QCM-{form}") == text
    for form in ("QXM-A", "QCM", "QCM-Z", "QQ-A", "-A"):
        with pytest.raises(ValueError, match="unknown prompt format"):
            data.check_format(form)


def test_captions_join_the_hint(tmp_path):
    write(tmp_path, {"5": PROBLEM, "6": {**PROBLEM, "hint": "", "image": None}}, {"train": ["5", "6"]})
    (tmp_path / "captions.json").write_text(json.dumps({"captions": {"5": "A rose."}}))
    with_picture, without = data.read_scienceqa(tmp_path, "train", captions=True)
    assert "Context: Look. A rose.\n" in with_picture.prompt and "Context: N/A\n" in without.prompt


@pytest.mark.parametrize("change, message", [
    ({"answer": 2}, "problem 5: answer 2 does not fit its 2 choices"), ({"choices": ["x"], "answer": 0}, "problem 5: answer 0"),
    ({"question": None}, "problem 5: 'question' is missing or not str"), ({"answer": "B"}, "problem 5: 'answer'"),
    ({"choices": "ab"}, "problem 5: 'choices'"), (None, "problem 5: 'question'")])
def test_malformed_problem_is_named(tmp_path, change, message):
    write(tmp_path, {"5": change and {**PROBLEM, **change}}, {"train": ["5"]})
    with pytest.raises(ValueError, match=message):
        data.read_scienceqa(tmp_path, "train")


def test_malformed_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="problems.json: no such file"):
        data.read_scienceqa(tmp_path, "train")
    write(tmp_path, {}, {"train": [7]})
    with pytest.raises(ValueError, match="problem 7 of split train is missing"):
        data.read_scienceqa(tmp_path, "train")
    with pytest.raises(ValueError, match="no split 'dev'; it has train"):
        data.read_scienceqa(tmp_path, "dev")
    (tmp_path / "problems.json").write_text('{"5": ')
    with pytest.raises(ValueError, match="problems.json: not valid JSON"):
        data.read_scienceqa(tmp_path, "train")


def sample(prompt="one two", response="three four", image=None):
    return Sample("1", prompt, response, image, {})


def test_tokens_targets_and_slots(tmp_path):
    Image.new("RGB", (9, 5), "red").save(tmp_path / "x.png")
    words = Words()
    with_picture = data.encode(sample(" one two", " three four", tmp_path / "x.png"), words, 3)
    text = data.encode(sample(" one two", " three"), words, 3)
    one, two, three, four = words.encode("one two three four")
    (label,), na = words.encode("Image:"), words.encode("Image: N/A")
    assert with_picture.ids == [1, label, 0, 0, 0, one, two, three, four, 2]
    assert text.ids == [1, *na, one, two, three, 2]
    batch = data.collate([with_picture, text], 4, "clip")
    assert batch.tokens.shape == (2, 10) and batch.lengths.tolist() == [10, 7] and batch.modality.tolist() == [[1], [0]]
    assert batch.where.tolist() == [6, 7, 8, 14, 15] and batch.targets.tolist() == [three, four, 2, three, 2]
    assert batch.slots.tolist() == [2, 3, 4]
    assert batch.images.shape == (1, 3, 4, 4)
    red = (torch.tensor([1.0, 0, 0]) - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    assert torch.allclose(batch.images[0, :, 2, 2], red)
    prompt = data.encode(sample(" one two", "", tmp_path / "x.png"), words, 3)
    assert prompt.ids == with_picture.ids[:7] and data.collate([prompt], 4, "clip").targets.tolist() == []
    packed = data.collate([text, with_picture], 4, "clip", pack=True)
    assert packed.tokens.tolist() == [text.ids + with_picture.ids] and packed.packed == [7, 10]
    assert packed.positions.tolist() == [[*range(7), *range(10)]] and packed.modality.tolist() == [[0] * 7 + [1] * 10]
    assert packed.where.tolist() == [4, 5, 13, 14, 15] and packed.targets.tolist() == [three, 2, three, four, 2]
    assert packed.slots.tolist() == [9, 10, 11] and torch.equal(packed.images, batch.images)


def test_a_prompt_that_fills_the_length_is_dropped_and_counted():
    """The released code divides by zero targets there, and the loss turns NaN."""
    words = Words()
    samples = [sample("a b c", " d"), sample("a b c d", " e f"), sample("a b c d e f", " g")]
    lengths = [len(data.encode(s, words, 0).ids) for s in samples]
    assert lengths == [8, 10, 11]
    examples, count = data.encode_all(samples, words, 0, max_len=8)
    assert count == {"kept": 2, "cut": 1, "dropped": 1} and [len(e.ids) for e in examples] == [8, 8]
    assert all(len(data.collate([e], 4, "clip").targets) for e in examples)


def test_answers_are_read_off_the_generated_text():
    assert data.read_answer("Grass is green. The answer is B. BECAUSE: The answer is C.", 3) == 1
    for text in ("", "The answer is", "the answer is B.", "The answer is D.", "The answer is BB."):
        assert data.read_answer(text, 3) is None


def test_a_step_has_the_same_samples_for_any_number_of_ranks():
    words = Words()
    examples = [data.encode(sample("a " * (i % 7 + 1), " b" * (i % 3 + 1)), words, 0) for i in range(50)]
    seen = Counter()
    for step in range(8):
        sets = []
        for ranks, micro in ((1, 8), (2, 4), (4, 1), (3, 2)):
            rows, targets = [], set()
            for rank in range(ranks):
                steps = data.Steps(examples, 8, micro, rank, ranks, seed=3, image_size=4, normalize="clip")
                batches, n = steps[step]
                assert all(len(b.packed) <= micro and b.tokens.shape == (1, sum(b.packed)) for b in batches)
                rows += [tuple(ids.tolist()) for b in batches for ids in b.tokens[0].split(b.packed)]
                targets.add(n)
            sets.append((sorted(rows), targets))
            assert targets == {sum(len(b.targets) for rank in range(ranks) for b in
                                   data.Steps(examples, 8, micro, rank, ranks, 3, 4, "clip")[step][0])}
        assert all(s == sets[0] for s in sets)
        if step < steps.per_epoch:
            seen.update(steps.chosen(step))
    assert steps.per_epoch == 7 and set(seen) == set(range(50)) and set(seen.values()) == {1}
    assert steps.chosen(0) != steps.chosen(7)  # another order in the next epoch


def test_ranks_carry_nearly_equal_loads():
    lengths = [30 + (37 * i) % 400 for i in range(32)]
    hands = data.deal(list(range(32)), lengths, ranks=8, micro=4)
    loads = [sum(lengths[i] for micro in hand for i in micro) for hand in hands]
    assert max(loads) / (sum(loads) / 8) < 1.05
    assert sorted(i for hand in hands for micro in hand for i in micro) == list(range(32))


needs_real = pytest.mark.skipif(not (REAL / "scienceqa").is_dir(), reason="the real ScienceQA problems are not beside the repository")


@needs_real
def test_real_problems_with_the_real_tokenizer():
    """Counted once on the 1,773 real problems: QCM-ALE has 300 tokens on average, median 277, 7% over 512."""
    from llama import Tokenizer
    tokenizer = Tokenizer(REAL / "llama_tokenizer.model")
    samples = [s for split in ("train", "val", "test") for s in data.read_scienceqa(REAL / "scienceqa", split)]
    assert len(samples) == 1773
    examples = [data.encode(s, tokenizer, 6) for s in samples]
    # without "Image: ..." and the slots, as they were counted
    lengths = torch.tensor([len(e.ids) - (e.slot - 1) - e.n_slots for e in examples], dtype=torch.float)
    assert 299 < lengths.mean() < 302 and 275 < lengths.median() < 279
    assert 0.065 < (lengths > 512).float().mean() < 0.08
    assert 215 < sum(len(e.ids) - e.start for e in examples) / len(examples) < 225
    assert 0.4 < sum(s.image is not None for s in samples) / len(samples) < 0.6
    with_picture = next(e for e in examples if e.n_slots)
    assert with_picture.ids[:10] == [1, 7084, 29901, 29871] + [0] * 6
    assert next(e for e in examples if not e.n_slots).ids[:6] == [1, 7084, 29901, 405, 29914, 29909]
