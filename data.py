"""Samples (see prompts.py) -> token ids -> batches, and their order.

A sequence is [BOS] "Image: " X' rest, or [BOS] "Image: N/A" rest (t_m is not in it, see lavin.py). Its pieces are
tokenised apart, and targets are the response and EOS.
"""
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from clip import open_image, preprocess
from prompts import Sample

# ---------------------------------------------------------------------------------------------------
# tokens

@dataclass
class Example:
    """A sample as token ids: `n_slots` placeholders from `slot` on, response from `start` on."""
    sample: Sample
    ids: list[int] | np.ndarray
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

    An empty response (Alpaca-52k has some) leaves nothing to learn from, nor does a prompt that fills the whole length;
    the released code trains on it and divides by zero targets.
    """
    examples, count = [], {"kept": 0, "cut": 0, "dropped": 0}
    for sample in samples:
        e = encode(sample, tokenizer, n_cls)
        if e.start >= max_len or not sample.response:
            count["dropped"] += 1
            continue
        count["kept"] += 1
        count["cut"] += len(e.ids) > max_len
        e.ids = np.array(e.ids[:max_len], dtype=np.int32)  # a list of ints takes 9 times the memory; LLaVA has 350,000
        examples.append(e)
    return examples, count


class Batch(NamedTuple):
    """Samples side by side, one a row, padded after its end where causal attention never looks (B rows); or packed end
    to end into one row without any padding (B = 1). Indices count through tokens.flatten()."""
    tokens: torch.Tensor  # [B, T]
    where: torch.Tensor  # [targets], positions that must predict a token of a response
    targets: torch.Tensor  # [targets], that token
    modality: torch.Tensor  # 1 with a picture: [B, 1], packed [1, T]
    slots: torch.Tensor  # [N n_cls], where the tokens of the pictures go
    images: torch.Tensor | None  # [N, 3, H, W], each once, however many samples show it
    shows: torch.Tensor  # [samples with a picture], which of the images that is; empty beside `seen`
    lengths: torch.Tensor  # [samples]
    positions: torch.Tensor | None = None  # packed: [1, T], place of each token in its own sequence
    packed: list[int] | None = None  # packed: the lengths once more, known without asking the device
    seeds: torch.Tensor | None = None  # packed: [1, T], seed of each token's sample, for dropout
    seen: torch.Tensor | None = None  # [samples with a picture, n_cls, C], from `LaVIN.look`: instead of images

    def to(self, device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in self))


def collate(examples: list[Example], image_size: int, normalize: str, pack: bool = False,
            seeds: list[int] | None = None, seen: torch.Tensor | None = None) -> Batch:
    """Pictures are decoded here: in a DataLoader that is a worker's work. seeds: one a sample, for dropout. seen: what
    `LaVIN.look` made of the pictures, if it has already; then no file is opened."""
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
    files = [e.sample.image for e in examples if e.n_slots and seen is None]
    distinct = list(dict.fromkeys(files))
    shows = torch.tensor([distinct.index(file) for file in files], dtype=torch.long)
    images = [preprocess(open_image(file), image_size, normalize) for file in distinct]
    modality, sizes = torch.tensor([int(e.n_slots > 0) for e in examples]), torch.tensor(lengths)
    batch = Batch(tokens.view(B, T), where, tokens[where + 1], modality[:, None], torch.tensor(slots, dtype=torch.long),
                  torch.stack(images) if images else None, shows, sizes, seen=seen)
    if pack:
        batch = batch._replace(modality=modality.repeat_interleave(sizes)[None], packed=lengths,
                               positions=torch.cat([torch.arange(n) for n in lengths])[None],
                               seeds=None if seeds is None else torch.tensor(seeds).repeat_interleave(sizes)[None])
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
        self.order = None, None  # an epoch and its order

    def chosen(self, step: int) -> list[int]:
        """indices of the samples of the global batch"""
        epoch, k = divmod(step, self.per_epoch)
        if self.order[0] != epoch:  # kept: a million samples take 20 ms to shuffle
            self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
        return self.order[1][k * self.batch_size: (k + 1) * self.batch_size].tolist()

    def __getitem__(self, step: int) -> tuple[list[Batch], int]:
        chosen = self.chosen(step)
        n_targets = sum(len(self.examples[i].ids) - self.examples[i].start for i in chosen)
        mine = deal(chosen, self.lengths, self.ranks, self.micro)[self.rank]
        # dropout is a function of (seed, step, sample), whatever this step is spread over
        seeds = {i: int(np.random.default_rng([self.seed, step, i]).integers(2 ** 62)) for micro in mine for i in micro}
        return [collate([self.examples[i] for i in m], self.image_size, self.normalize, True, [seeds[i] for i in m])
                for m in mine], n_targets
