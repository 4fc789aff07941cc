"""The layout of tokens, the batches and their order."""
from collections import Counter

import pytest
import torch
from conftest import REAL, real_problems
from PIL import Image

import data
from official.tokenizer import Tokenizer
from prompts import Sample
from speed import shard


class Words:
    """a tokenizer that a reader can follow: one id per word"""
    bos, eos = 1, 2

    def __init__(self):
        self.known = {}

    def encode(self, text):
        return [self.known.setdefault(word, 3 + len(self.known)) for word in text.split()]


def sample(prompt="one two", response="three four", image=None):
    return Sample("1", prompt, response, image, {})


def test_tokens_targets_and_slots(tmp_path):
    Image.new("RGB", (9, 5), "red").save(tmp_path / "x.png")
    words = Words()
    with_picture = data.encode(sample(" one two", " three four", tmp_path / "x.png"), words, 3)
    text = data.encode(sample(" one two", " three"), words, 3)
    one, two, three, four = words.encode("one two three four")
    (label,), na = words.encode("Image:"), words.encode("Image: N/A")
    assert (with_picture.head, with_picture.n_visual) == ([1, label], 3)
    assert with_picture.rest == [one, two, three, four, 2]
    assert (text.head, text.n_visual, text.rest) == ([1, *na], 0, [one, two, three, 2])
    assert [(e.length, e.n_targets) for e in (with_picture, text)] == [(10, 3), (7, 2)]
    batch = data.collate([with_picture, text], 4, "clip")
    assert batch.tokens.tolist() == with_picture.head + with_picture.rest + text.head + text.rest
    assert batch.part_lengths == [2, 5, 3, 4] and batch.lengths == [10, 7] and batch.modality == [1, 0]
    assert batch.predict_at.tolist() == [6, 7, 8, 14, 15]
    assert batch.targets.tolist() == [three, four, 2, three, 2]
    assert batch.images.shape == (1, 3, 4, 4)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's own
    red = (torch.tensor([1.0, 0, 0]) - torch.tensor(mean)) / torch.tensor(std)
    assert torch.allclose(batch.images[0, :, 2, 2], red)
    prompt = data.encode(sample(" one two", "", tmp_path / "x.png"), words, 3)
    assert prompt.rest == [one, two] and data.collate([prompt], 4, "clip").targets.tolist() == []


def test_known_image_embeds_need_no_images(tmp_path, monkeypatch):
    for color in ("red", "blue"):
        Image.new("RGB", (5, 5), color).save(tmp_path / f"{color}.png")
    opened, open_image = [], data.open_image
    monkeypatch.setattr(data, "open_image", lambda file: opened.append(file.stem) or open_image(file))
    rows = [data.encode(sample(image=color and tmp_path / f"{color}.png"), Words(), 3)
            for color in ("red", "blue", None, "red")]
    batch = data.collate(rows, 4, "clip")
    assert opened == ["red", "blue", "red"] and batch.images.shape == (3, 3, 4, 4)
    batch = data.collate(rows, 4, "clip", image_embeds=torch.zeros(3, 3, 8))
    assert batch.images is None and len(opened) == 3


def test_an_empty_response_is_dropped_and_counted():
    """Alpaca-52k has such samples."""
    examples, count = data.encode_all([sample(response=""), sample()], Words(), 0, max_len=20)
    assert count == {"kept": 1, "cut": 0, "dropped": 1, "with an image": 0} and len(examples) == 1


def test_a_prompt_that_fills_the_length_is_dropped_and_counted():
    """The released code divides by the number of targets, which is zero there, so its loss becomes NaN."""
    words = Words()
    samples = [sample("a b c", " d"), sample("a b c d", " e f"), sample("a b c d e f", " g")]
    lengths = [data.encode(s, words, 0).length for s in samples]
    assert lengths == [8, 10, 11]
    examples, count = data.encode_all(samples, words, 0, max_len=8)
    assert count == {"kept": 2, "cut": 1, "dropped": 1, "with an image": 0}
    assert [e.length for e in examples] == [8, 8]
    assert all(len(data.collate([e], 4, "clip").targets) for e in examples)


@pytest.mark.parametrize("kind", [data.Steps, shard.Steps])
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks(kind):
    words = Words()
    examples = [data.encode(sample("a " * (i % 7 + 1), " b" * (i % 3 + 1)), words, 0) for i in range(50)]
    seen = Counter()
    for step in range(8):
        sets = []
        for ranks, micro in ((1, 8), (2, 4), (4, 1), (3, 2)):
            rows, targets, counts = [], set(), set()
            for rank in range(ranks):
                steps = kind(examples, 8, micro, rank, ranks, seed=3, image_size=4, normalize="clip")
                batches, n = steps[step]
                assert all(len(b.lengths) <= micro and len(b.tokens) == sum(b.lengths) for b in batches)
                assert kind is shard.Steps or all(len(b.targets) for b in batches)  # none is empty
                rows += [tuple(ids.tolist()) for b in batches if len(b.targets)  # one without keeps step
                         for ids in b.tokens.split(b.lengths)]
                targets.add(n)
                counts.add(len(batches))
            if kind is shard.Steps:
                assert len(counts) == 1  # --shard needs equally many forward passes
            sets.append((sorted(rows), targets))
            assert targets == {sum(len(b.targets) for rank in range(ranks) for b in
                                   kind(examples, 8, micro, rank, ranks, 3, 4, "clip")[step][0])}
        assert all(s == sets[0] for s in sets)
        if step < steps.per_epoch:
            seen.update(steps.chosen(step))
    assert steps.per_epoch == 7 and set(seen) == set(range(50)) and set(seen.values()) == {1}
    assert steps.chosen(0) != steps.chosen(7)  # another order in the next epoch


def test_dropout_masks_depend_on_the_step():
    examples = [data.encode(sample(), Words(), 0)]  # one sample, so each step has the same
    sampler = data.MaskSampler(p=0.5, r=8, layers=4, vit_blocks=0, vit_tokens=0)

    def mask(seed, step):
        (batch,), _ = data.Steps(examples, 1, 1, 0, 1, seed, 0, "clip", sampler)[step]
        return batch.llama_dropout_mask

    assert torch.equal(mask(0, 1), mask(0, 1))
    assert not torch.equal(mask(0, 1), mask(0, 2)) and not torch.equal(mask(0, 1), mask(1, 1))


def test_ranks_carry_nearly_equal_loads():
    lengths = [30 + (37 * i) % 400 for i in range(32)]
    hands = data.split_batch(list(range(32)), lengths, ranks=8, micro_batch=4)
    loads = [sum(lengths[i] for micro in hand for i in micro) for hand in hands]
    assert max(loads) / (sum(loads) / 8) < 1.05
    assert sorted(i for hand in hands for micro in hand for i in micro) == list(range(32))


needs_real = pytest.mark.skipif(not (REAL / "scienceqa").is_dir(),
                                reason="the real ScienceQA problems are not in ../shared/data")


@needs_real
def test_real_problems_with_the_real_tokenizer():
    """Reference for the 1,773 real problems in QCM-ALE: mean 300 tokens, median 277, 7% longer than 512."""
    tokenizer, samples = Tokenizer(REAL / "llama_tokenizer.model"), real_problems()
    assert len(samples) == 1773
    examples = [data.encode(s, tokenizer, 6) for s in samples]
    assert all(e.rest[:e.n_prompt] == tokenizer.encode(e.sample.prompt) for e in examples)
    # the reference counts include BOS, but not "Image: .."
    lengths = torch.tensor([1 + len(e.rest) for e in examples], dtype=torch.float)
    assert 299 < lengths.mean() < 302 and 275 < lengths.median() < 279
    assert 0.065 < (lengths > 512).float().mean() < 0.08
    assert 215 < sum(e.n_targets for e in examples) / len(examples) < 225
    assert 0.4 < sum(s.image is not None for s in samples) / len(samples) < 0.6
    with_picture = next(e for e in examples if e.n_visual)
    assert with_picture.head == [1, 7084, 29901, 29871] and with_picture.n_visual == 6
    assert next(e for e in examples if not e.n_visual).head == [1, 7084, 29901, 405, 29914, 29909]
