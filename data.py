"""Files of questions and pictures -> samples -> batches.

ScienceQA (Lu et al., "Learn to Explain", NeurIPS 2022) in its published layout:

    DIR/problems.json      {id: {question, choices, answer, hint, image, grade, subject, lecture, solution, ...}}
    DIR/pid_splits.json    {train: [id, ..], val: [..], test: [..]}
    DIR/captions.json      {captions: {id: text}}, optional
    DIR/images/<split>/<id>/image.png

A sequence is [BOS] "Image: " X' rest, or [BOS] "Image: N/A" rest (t_m is not in it, see lavin.py). Its pieces are
tokenised apart, and targets are the response and EOS.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from clip import open_image, preprocess

LETTERS = "ABCDE"


@dataclass
class Sample:
    id: str
    prompt: str
    response: str  # "" where only the prompt is wanted
    image: Path | None
    problem: dict  # the record it came from, with the fields that scoring needs


# ---------------------------------------------------------------------------------------------------
# ScienceQA

FIELDS = {"question": str, "choices": list, "answer": int, "hint": str, "grade": str, "subject": str,
          "lecture": str, "solution": str}
ANSWERS = {  # L lecture, E explanation; that "AL" carries the solution and "AE" the lecture is the data set's own slip
    "A": "The answer is {answer}.", "AL": "The answer is {answer}. BECAUSE: {solution}",
    "AE": "The answer is {answer}. BECAUSE: {lecture}", "ALE": "The answer is {answer}. BECAUSE: {lecture} {solution}",
    "AEL": "The answer is {answer}. BECAUSE: {solution} {lecture}", "LA": "{lecture} The answer is {answer}.",
    "EA": "{solution} The answer is {answer}.", "LEA": "{lecture} {solution} The answer is {answer}.",
    "ELA": "{solution} {lecture} The answer is {answer}.",
}


def check_format(form: str) -> None:
    """ValueError unless `form` is letters of Q, C, M in any order, a dash, and a known answer."""
    asked, _, answered = form.partition("-")
    if not asked or set(asked) - set("QCM") or len(set(asked)) < len(asked) or answered not in ANSWERS:
        raise ValueError(f"unknown prompt format {form!r}; expected Q, C, M in any order, a dash and one of "
                         f"{', '.join(ANSWERS)}: for example QCM-ALE")


def tidy(text: str) -> str:
    return text.replace("  ", " ").strip()


def build_prompt(question: str, context: str, choices: list[str], form: str = "QCM-ALE") -> str:
    """What stands before the response. Without choices the options line is left out."""
    options = " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(choices))
    lines = {"Q": f"Question: {question}", "C": f"Context: {context or 'N/A'}", "M": f"Options: {options}"}
    asked = [lines[x] for x in form.partition("-")[0] if x != "M" or choices]
    return tidy("\n".join([*asked, "Response:"]))


def build_response(problem: dict, form: str = "QCM-ALE") -> str:
    lecture, solution = (problem[x].replace("\n", "\\n") for x in ("lecture", "solution"))
    text = ANSWERS[form.partition("-")[2]].format(answer=LETTERS[problem["answer"]], lecture=lecture, solution=solution)
    return tidy(text).removesuffix("BECAUSE:").strip()


def check_problem(path: Path, id: str, p: dict) -> None:
    for name, kind in FIELDS.items():
        if not isinstance(p, dict) or not isinstance(p.get(name), kind):
            raise ValueError(f"{path}: problem {id}: {name!r} is missing or not {kind.__name__}")
    if not 2 <= len(p["choices"]) <= len(LETTERS) or not 0 <= p["answer"] < len(p["choices"]):
        raise ValueError(f"{path}: problem {id}: answer {p['answer']} does not fit its {len(p['choices'])} choices "
                         f"(2 to {len(LETTERS)} are possible)")


def read_json(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --data wants a folder in ScienceQA's layout")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None


def read_scienceqa(folder: str | Path, split: str, form: str = "QCM-ALE", captions: bool = False,
                   vision: bool = True) -> list[Sample]:
    """The problems of one split. captions: append each picture's to the hint. vision False: drop the pictures.

    FileNotFoundError or ValueError in one line, with the problem's id.
    """
    folder = Path(folder)
    check_format(form)
    problems, splits = read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
    if split not in splits:
        raise ValueError(f"{folder / 'pid_splits.json'}: no split {split!r}; it has {', '.join(splits)}")
    texts = read_json(folder / "captions.json")["captions"] if captions else {}
    samples = []
    for id in map(str, splits[split]):
        if id not in problems:
            raise ValueError(f"{folder / 'problems.json'}: problem {id} of split {split} is missing")
        p = problems[id]
        check_problem(folder / "problems.json", id, p)
        context = f"{p['hint']} {texts.get(id, '')}".strip()
        image = folder / "images" / split / id / p["image"] if p.get("image") and vision else None
        samples.append(Sample(id, build_prompt(p["question"], context, p["choices"], form), build_response(p, form),
                              image, p))
    return samples


def read_answer(text: str, n_choices: int) -> int | None:
    """Option index in "The answer is X." of a generated text; None if there is none (counted as wrong)."""
    found = re.search(r"The answer is ([A-Z])\.", text)
    index = LETTERS.find(found[1]) if found else -1
    return index if 0 <= index < n_choices else None


# ---------------------------------------------------------------------------------------------------
# tokens

@dataclass
class Example:
    """A sample as token ids: `n_slots` placeholders from `slot` on, response from `start` on."""
    sample: Sample
    ids: list[int]
    start: int
    slot: int
    n_slots: int


def encode(sample: Sample, tokenizer, n_cls: int) -> Example:
    """Token ids of prompt + response + EOS, or of the prompt alone where the response is empty."""
    head = [tokenizer.bos] + tokenizer.encode("Image: " if sample.image else "Image: N/A")
    slot, n_slots = len(head), n_cls if sample.image else 0
    head += [0] * n_slots
    start = len(head) + len(tokenizer.encode(sample.prompt))
    if not sample.response:
        return Example(sample, head + tokenizer.encode(sample.prompt), start, slot, n_slots)
    rest = tokenizer.encode(sample.prompt + sample.response) + [tokenizer.eos]
    return Example(sample, head + rest, start, slot, n_slots)


def encode_all(samples: list[Sample], tokenizer, n_cls: int, max_len: int) -> tuple[list[Example], dict[str, int]]:
    """Training examples of at most max_len tokens, and how many were kept, cut short, dropped.

    A prompt that fills the whole length leaves nothing to learn from; the released code trains on it and divides by
    zero targets.
    """
    examples, count = [], {"kept": 0, "cut": 0, "dropped": 0}
    for sample in samples:
        e = encode(sample, tokenizer, n_cls)
        if e.start >= max_len:
            count["dropped"] += 1
            continue
        count["kept"] += 1
        count["cut"] += len(e.ids) > max_len
        e.ids = e.ids[:max_len]
        examples.append(e)
    return examples, count


class Batch(NamedTuple):
    """Samples side by side, one a row, padded behind its end where causal attention never looks (B rows); or packed end
    to end into one row without any padding (B = 1). Indices count through tokens.flatten()."""
    tokens: torch.Tensor  # [B, T]
    where: torch.Tensor  # [targets], positions that must predict a token of a response
    targets: torch.Tensor  # [targets], that token
    modality: torch.Tensor  # 1 with a picture: [B, 1], packed [1, T]
    slots: torch.Tensor  # [N n_cls], where the tokens of the pictures go
    images: torch.Tensor | None  # [N, 3, H, W] of the samples that have one, in their order
    lengths: torch.Tensor  # [samples]
    positions: torch.Tensor | None = None  # packed: [1, T], place of each token in its own sequence
    packed: list[int] | None = None  # packed: the lengths once more, known without asking the device

    def to(self, device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in self))


def collate(examples: list[Example], image_size: int, normalize: str, pack: bool = False) -> Batch:
    """Pictures are decoded here: in a DataLoader that is a worker's work."""
    lengths = [len(e.ids) for e in examples]
    B, T = (1, sum(lengths)) if pack else (len(examples), max(lengths))
    starts = np.cumsum([0, *lengths[:-1]]) if pack else range(0, B * T, T)
    tokens = torch.zeros(B * T, dtype=torch.long)
    where, slots = [], []
    for e, at in zip(examples, map(int, starts)):
        tokens[at: at + len(e.ids)] = torch.tensor(e.ids)
        where += range(at + e.start - 1, at + len(e.ids) - 1)
        slots += range(at + e.slot, at + e.slot + e.n_slots)
    where = torch.tensor(where, dtype=torch.long)
    images = [preprocess(open_image(e.sample.image), image_size, normalize) for e in examples if e.n_slots]
    modality, sizes = torch.tensor([int(e.n_slots > 0) for e in examples]), torch.tensor(lengths)
    batch = Batch(tokens.view(B, T), where, tokens[where + 1], modality[:, None], torch.tensor(slots, dtype=torch.long),
                  torch.stack(images) if images else None, sizes)
    if pack:
        batch = batch._replace(modality=modality.repeat_interleave(sizes)[None], packed=lengths,
                               positions=torch.cat([torch.arange(n) for n in lengths])[None])
    return batch


# ---------------------------------------------------------------------------------------------------
# order

def deal(chosen: list[int], lengths: list[int], ranks: int, micro: int) -> list[list[list[int]]]:
    """One global batch -> for every rank its micro-batches of at most `micro` samples.

    Sorted by length and dealt out to and fro, ranks carry nearly equal loads, and so do a rank's own micro-batches,
    dealt out again: memory peaks at the largest. Which samples form the batch does not change.
    """
    def dealt(cards: list[int], players: int) -> list[list[int]]:
        hands = [[] for _ in range(players)]
        for k, i in enumerate(sorted(cards, key=lambda i: (-lengths[i], i))):
            lap, seat = divmod(k, players)
            hands[seat if lap % 2 == 0 else players - 1 - seat].append(i)
        return hands

    return [dealt(hand, -(-len(hand) // micro)) for hand in dealt(chosen, ranks)]


class Steps(torch.utils.data.Dataset):
    """Item k is what this rank computes at optimizer step k: its micro-batches, and the global number of targets.

    The order is a function of (seed, epoch) alone: neither resuming nor the number of ranks changes which samples
    meet in a step.
    """

    def __init__(self, examples: list[Example], batch_size: int, micro: int, rank: int, ranks: int, seed: int,
                 image_size: int, normalize: str):
        self.examples, self.batch_size, self.micro, self.rank, self.ranks = examples, batch_size, micro, rank, ranks
        self.seed, self.image_size, self.normalize = seed, image_size, normalize
        self.lengths = [len(e.ids) for e in examples]
        self.per_epoch = -(-len(examples) // batch_size)

    def chosen(self, step: int) -> list[int]:
        """indices of the samples of the global batch"""
        epoch, k = divmod(step, self.per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
        return order[k * self.batch_size: (k + 1) * self.batch_size].tolist()

    def __getitem__(self, step: int) -> tuple[list[Batch], int]:
        chosen = self.chosen(step)
        n_targets = sum(len(self.examples[i].ids) - self.examples[i].start for i in chosen)
        mine = deal(chosen, self.lengths, self.ranks, self.micro)[self.rank]
        return [collate([self.examples[i] for i in m], self.image_size, self.normalize, pack=True)
                for m in mine], n_targets
