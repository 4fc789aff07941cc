"""Turns samples (prompts.py) into token ids and batches, shuffles them, and draws dropout's masks.

A ScienceQA problem with an image, in the format QCM-ALE (Question, Context, Multiple choice - Answer,
Lecture, Explanation):

    head      [BOS] "Image: "
    X'        the visual tokens, which LaVIN inserts: six with ViT-L/14
    prompt    "Question: Which of these .. ?\nContext: N/A\nOptions: (A) copper (B) glass\nResponse:"
    response  "The answer is A. BECAUSE: .." [EOS]

Without an image the head is [BOS] "Image: N/A". As in the released code, no space separates prompt and
response. The targets are the response and EOS. The modality token is not in the sequence (see adapters.py).

Everything random depends only on (seed, epoch) or (seed, step, sample), not on how a batch is split.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from clip import preprocess
from official.images import open_image
from prompts import Sample


@dataclass
class Example:
    """A sample as token ids: head, n_visual visual tokens, rest (prompt, response, EOS)."""
    sample: Sample  # of prompts.py: id, prompt, response, image (path or None), problem (for scoring)
    head: list[int]
    n_visual: int
    rest: list[int] | np.ndarray  # encode_all makes it an array, which takes less memory
    n_prompt: int  # how many ids of `rest` are prompt

    @property
    def length(self) -> int:
        return len(self.head) + self.n_visual + len(self.rest)

    @property
    def n_targets(self) -> int:
        return len(self.rest) - self.n_prompt


def encode(sample: Sample, tokenizer, n_visual: int) -> Example:
    """Token ids of head, prompt, response and EOS; without a response, of head and prompt."""
    head = [tokenizer.bos] + tokenizer.encode("Image: " if sample.image else "Image: N/A")
    rest = tokenizer.encode(sample.prompt + sample.response) + ([tokenizer.eos] if sample.response else [])
    # as in the released code, we count the prompt's tokens by encoding it alone. This would be wrong if the
    # tokenizer merged the prompt's last character with the response's first. LLaMA's tokenizer did so in
    # none of the 1,773 problems of ScienceQA that we tried
    n_prompt = len(tokenizer.encode(sample.prompt))
    return Example(sample, head, n_visual if sample.image else 0, rest, n_prompt)


def encode_all(samples: list[Sample], tokenizer, n_visual: int, max_len: int) -> tuple[list[Example], dict]:
    """Training examples of at most max_len tokens; counts of samples kept, cut (they lose EOS), dropped, ..

    Dropped: an empty response (Alpaca-52k has some), and a prompt that fills max_len, so that no target is
    left. In the released code, max_len counts t_m, too, and a micro-batch without targets has loss NaN.
    """
    examples, count = [], {"kept": 0, "cut": 0, "dropped": 0, "with an image": 0}
    for sample in samples:
        e = encode(sample, tokenizer, n_visual)
        if e.length - e.n_targets >= max_len or not sample.response:
            count["dropped"] += 1
            continue
        count["kept"] += 1
        count["cut"] += e.length > max_len
        count["with an image"] += e.n_visual > 0
        e.rest = np.array(e.rest[:max_len - len(e.head) - e.n_visual], dtype=np.int32)
        examples.append(e)
    return examples, count


class Batch(NamedTuple):
    """A micro-batch: the B samples of a forward pass. `tokens` and `part_lengths` are without X', which
    LaVIN.embed inserts; `lengths` and `predict_at` include X'.
    For instance, one sample has a head of 3 tokens, an X' of 6 and a rest of 31; the other has a head of 3
    and a rest of 27. Then part_lengths is [3, 31, 3, 27] and lengths is [40, 30]. Packed (laid end to end,
    without padding), they are a row of T = 70 tokens."""
    tokens: torch.Tensor  # ids of heads and rests, sample after sample
    part_lengths: list[int]  # of head, rest, head, rest, .. in `tokens`
    lengths: list[int]  # [B], of the sequences
    modality: list[int]  # [B], 1 with an image
    predict_at: torch.Tensor  # [targets], positions in the packed row whose next token is a target
    targets: torch.Tensor  # [targets]
    images: torch.Tensor | None = None  # [N, 3, H, W]; N: samples with an image
    image_embeds: torch.Tensor | None = None  # X' [N, n_visual, C], if the ViT has run already
    llama_dropout_mask: torch.Tensor | None = None  # [layers, 1, T, r], True: unit survives; None: no dropout
    vit_dropout_mask: torch.Tensor | None = None  # [ViT blocks, N, ViT tokens, r]

    def to(self, device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in self))


def collate(examples: list[Example], image_size: int, normalize: str, image_embeds=None) -> Batch:
    """Examples -> Batch. Images are decoded here, so in training a DataLoader's worker does it."""
    ends = np.cumsum([e.length for e in examples])
    # the last n_targets tokens of a sample are its targets; each is predicted one position earlier
    predict_at = [np.arange(end - e.n_targets, end) - 1 for e, end in zip(examples, ends)]
    joined = lambda parts: torch.from_numpy(np.concatenate(parts).astype(np.int64))
    batch = Batch(tokens=joined([ids for e in examples for ids in (e.head, e.rest)]),
                  part_lengths=[len(ids) for e in examples for ids in (e.head, e.rest)],
                  lengths=[e.length for e in examples], modality=[int(e.n_visual > 0) for e in examples],
                  predict_at=joined(predict_at), targets=joined([e.rest[e.n_prompt:] for e in examples]),
                  image_embeds=image_embeds)
    files = [e.sample.image for e in examples if e.n_visual]
    if not files or image_embeds is not None:
        return batch
    images = [preprocess(open_image(file), image_size, normalize) for file in files]
    return batch._replace(images=torch.stack(images))


class Steps(torch.utils.data.Dataset):
    """Item k holds what optimizer step k needs: this rank's micro-batches, and the number of targets over all
    ranks.

    Each epoch shuffles all samples, with and without an image: the paper's mixture-of-modality training.
    """

    def __init__(self, examples: list[Example], batch_size: int, micro_batch: int, rank: int, ranks: int,
                 seed: int, image_size: int, normalize: str, masks: "MaskSampler | None" = None):
        self.examples, self.batch_size, self.micro_batch = examples, batch_size, micro_batch
        self.rank, self.ranks, self.seed = rank, ranks, seed
        self.image_size, self.normalize, self.masks = image_size, normalize, masks
        self.lengths = [e.length for e in examples]
        self.per_epoch = math.ceil(len(examples) / batch_size)

    def chosen(self, step: int) -> list[int]:
        """Indices of the samples of the global batch. Every epoch has its own order."""
        epoch, k = divmod(step, self.per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
        return order[k * self.batch_size: (k + 1) * self.batch_size].tolist()

    def __getitem__(self, step: int) -> tuple[list[Batch], int]:
        chosen = self.chosen(step)
        n_targets = sum(self.examples[i].n_targets for i in chosen)
        batches = []
        for indices in split_batch(chosen, self.lengths, self.ranks, self.micro_batch)[self.rank]:
            examples = [self.examples[i] for i in indices]
            batch = collate(examples, self.image_size, self.normalize)
            if self.masks:
                batch = self.masks.add(batch, examples, [[self.seed, step, i] for i in indices])
            batches.append(batch)
        return batches, n_targets


def split_batch(chosen: list[int], lengths: list[int], ranks: int, micro_batch: int) -> list[list[list[int]]]:
    """Split the samples of a global batch: for each rank its micro-batches of at most `micro_batch` samples.

    The ranks get nearly equal numbers of tokens, because all wait for the slowest. The micro-batches of a
    rank are nearly equal, too, because the largest one decides the peak memory.
    """
    shares = balanced_groups(chosen, lengths, ranks)
    return [balanced_groups(share, lengths, math.ceil(len(share) / micro_batch)) for share in shares]


def balanced_groups(samples: list[int], lengths: list[int], n: int) -> list[list[int]]:
    """n groups of nearly equal length: deal the longest first, to groups 0 .. n-1, n-1 .. 0, and so on"""
    groups = [[] for _ in range(n)]
    for k, i in enumerate(sorted(samples, key=lambda i: (-lengths[i], i))):
        turn, place = divmod(k, n)
        groups[place if turn % 2 == 0 else -1 - place].append(i)
    return groups


class MaskSampler(NamedTuple):
    """Dropout with probability p. Unlike nn.Dropout, it draws each sample's mask from a seed of its own, so
    masks do not depend on how a batch is split over GPUs. A batch without masks has no dropout."""
    p: float
    r: int  # hidden units of an adapter
    layers: int  # of LLaMA
    vit_blocks: int  # those with adapters
    vit_tokens: int

    @classmethod
    def of(cls, model) -> "MaskSampler | None":
        cfg = model.cfg.adapter
        vit = model.vit if model.cfg.vit_adapters else None
        blocks, tokens = (vit.cfg.layers, len(vit.positional_embedding)) if vit else (0, 0)
        return cls(cfg.dropout, cfg.dim, len(model.llama.layers), blocks, tokens) if cfg.dropout else None

    def add(self, batch: Batch, examples: list[Example], seeds: list[list[int]]) -> Batch:
        """The batch with masks; one seed per sample."""
        llama, vit = [], []
        for e, seed in zip(examples, seeds):
            random = np.random.default_rng(seed)
            survive = lambda *shape: torch.from_numpy(random.random(shape, np.float32) >= self.p)
            llama.append(survive(self.layers, 1, e.length, self.r))
            if e.n_visual and self.vit_blocks:
                vit.append(survive(self.vit_blocks, 1, self.vit_tokens, self.r))
        return batch._replace(llama_dropout_mask=torch.cat(llama, dim=2),
                              vit_dropout_mask=torch.cat(vit, dim=1) if vit else None)
