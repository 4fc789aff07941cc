"""Samples (prompts.py) -> token ids -> batches -> the order of training, and dropout's masks.

    with an image    [BOS] "Image: " X' prompt response [EOS]
    without          [BOS] "Image: N/A" prompt response [EOS]

LaVIN inserts the visual tokens X'. The modality token is not in the sequence, see adapters.py. The targets
are the response and EOS.

Everything random here depends only on (seed, epoch) or (seed, step, sample). So neither splitting a batch
over processes or micro-batches nor resuming a run changes the result.
"""
import hashlib
from dataclasses import dataclass
from typing import Iterator, NamedTuple

import numpy as np
import torch

from clip import open_image, preprocess
from prompts import Sample


@dataclass
class Example:
    """A sample as token ids: head, then n_image visual tokens, then rest = prompt, response, EOS."""
    sample: Sample
    head: list[int]
    n_image: int
    rest: list[int] | np.ndarray
    n_prompt: int  # how many ids of `rest` are prompt

    @property
    def length(self) -> int:
        return len(self.head) + self.n_image + len(self.rest)

    @property
    def start(self) -> int:
        """Position of the first target, t_m not counted."""
        return len(self.head) + self.n_image + self.n_prompt


def encode(sample: Sample, tokenizer, n_cls: int) -> Example:
    """Token ids of prompt + response + EOS, or of the prompt alone if the response is empty."""
    head = [tokenizer.bos] + tokenizer.encode("Image: " if sample.image else "Image: N/A")
    prompt = rest = tokenizer.encode(sample.prompt)
    if sample.response:  # tokenised together: the tokens at the border may differ
        rest = tokenizer.encode(sample.prompt + sample.response) + [tokenizer.eos]
    return Example(sample, head, n_cls if sample.image else 0, rest, len(prompt))


def encode_all(samples: list[Sample], tokenizer, n_cls: int, max_len: int) -> tuple[list[Example], dict]:
    """Training examples of at most max_len tokens, and how many were kept, cut and dropped.

    Dropped: an empty response (Alpaca-52k has some), and a prompt that fills max_len. Both leave no target;
    in the released code the loss then turns NaN. Released code: t_m counts, so our max_len 512 is its 513.
    """
    examples, count = [], {"kept": 0, "cut": 0, "dropped": 0}
    for sample in samples:
        e = encode(sample, tokenizer, n_cls)
        if e.start >= max_len or not sample.response:
            count["dropped"] += 1
            continue
        count["kept"] += 1
        count["cut"] += e.length > max_len
        # int32 arrays: a list of ints takes 9 times the memory, and LLaVA has 350,000 samples
        e.rest = np.array(e.rest[:max_len - len(e.head) - e.n_image], dtype=np.int32)
        examples.append(e)
    return examples, count


def fingerprint(examples: list[Example]) -> str:
    """A hash of all token ids and image names."""
    digest = hashlib.sha256()
    for e in examples:
        image = e.sample.image.name if e.sample.image else ""
        digest.update(f"{e.head} {e.n_prompt} {image}".encode() + e.rest.tobytes())
    return digest.hexdigest()[:16]


class Batch(NamedTuple):
    """B samples. Positions count through all sequences laid end to end, visual tokens included."""
    tokens: torch.Tensor  # ids of heads and rests, sample after sample, without visual tokens
    pieces: list[int]  # their lengths: head, rest, head, rest, ..
    lengths: list[int]  # [B], of the sequences
    modality: list[int]  # [B], 1 with an image
    predict_at: torch.Tensor  # [targets], positions whose next token is a target
    targets: torch.Tensor  # [targets]
    images: torch.Tensor | None = None  # [N, 3, H, W], each distinct image once
    image_index: torch.Tensor | None = None  # [samples with an image], which of `images` it is
    image_embeds: torch.Tensor | None = None  # [samples with an image, n_cls, C]: X', in place of `images`
    keep_llama: torch.Tensor | None = None  # [L, 1, T, r], dropout's survivors; None: no dropout
    keep_vit: torch.Tensor | None = None  # [ViT blocks, samples with an image, ViT tokens, r]

    def to(self, device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in self))


def collate(examples: list[Example], image_size: int, normalize: str,
            image_embeds: torch.Tensor | None = None) -> Batch:
    """Examples -> Batch. Images are decoded here, so in training a DataLoader's worker does it."""
    tokens = np.concatenate([ids for e in examples for ids in (e.head, e.rest)])
    pieces = [len(ids) for e in examples for ids in (e.head, e.rest)]
    predict_at, targets, begin = [], [], 0
    for e in examples:
        predict_at.append(np.arange(begin + e.start - 1, begin + e.length - 1))
        targets.append(e.rest[e.n_prompt:])
        begin += e.length
    predict_at, targets = np.concatenate(predict_at), np.concatenate(targets)
    tokens, predict_at, targets = (torch.tensor(x, dtype=torch.long) for x in (tokens, predict_at, targets))
    lengths, modality = [e.length for e in examples], [int(e.n_image > 0) for e in examples]
    batch = Batch(tokens, pieces, lengths, modality, predict_at, targets, image_embeds=image_embeds)
    files = [e.sample.image for e in examples if e.n_image]
    if not files or image_embeds is not None:
        return batch
    distinct = list(dict.fromkeys(files))
    images = torch.stack([preprocess(open_image(file), image_size, normalize) for file in distinct])
    return batch._replace(images=images, image_index=torch.tensor([distinct.index(file) for file in files]))


class Dropout(NamedTuple):
    """Sizes of dropout's masks. They are made with the batch, so the model itself uses no random numbers."""
    p: float
    r: int  # adapter width
    layers: int  # of LLaMA
    vit_blocks: int  # with adapters
    vit_tokens: int

    @classmethod
    def of(cls, model) -> "Dropout | None":
        """The masks that a LaVIN needs in training."""
        cfg, vit = model.cfg.adapter, model.vit if model.cfg.vit_adapters else None
        blocks, tokens = (vit.cfg.layers, len(vit.positional_embedding)) if vit else (0, 0)
        return cls(cfg.dropout, cfg.dim, len(model.llama.layers), blocks, tokens) if cfg.dropout else None

    def masks(self, examples: list[Example], seeds: list[list[int]]) -> dict[str, torch.Tensor]:
        """keep_llama and keep_vit of a Batch. One seed per sample: batch-mates do not change its masks."""
        llama, vit = [], []
        for e, seed in zip(examples, seeds):
            random = np.random.default_rng(seed)
            llama.append(random.random((self.layers, e.length, self.r), np.float32) >= self.p)
            if e.n_image:
                vit.append(random.random((self.vit_blocks, self.vit_tokens, self.r), np.float32) >= self.p)
        masks = {"keep_llama": torch.from_numpy(np.concatenate(llama, axis=1)[:, None])}
        if vit and self.vit_blocks:
            masks["keep_vit"] = torch.from_numpy(np.stack(vit, axis=1))
        return masks


def deal(chosen: list[int], lengths: list[int], ranks: int, micro: int) -> list[list[list[int]]]:
    """Split the samples of a global batch: for each rank its micro-batches of at most `micro` samples.

    Samples are sorted by length and dealt like cards, forth and back, so all ranks carry nearly the same
    number of tokens. Each rank deals its share to its micro-batches in the same way, since the largest sets
    the peak memory.
    """
    def dealt(cards: list[int], players: int) -> list[list[int]]:
        hands = [[] for _ in range(players)]
        for k, i in enumerate(sorted(cards, key=lambda i: (-lengths[i], i))):
            lap, seat = divmod(k, players)
            hands[seat if lap % 2 == 0 else players - 1 - seat].append(i)
        return hands

    return [dealt(hand, -(-len(hand) // micro)) for hand in dealt(chosen, ranks)]


class Steps(torch.utils.data.Dataset):
    """Item k: this rank's micro-batches of optimizer step k, and the number of targets over all ranks."""

    def __init__(self, examples: list[Example], batch_size: int, micro: int, rank: int, ranks: int, seed: int,
                 image_size: int, normalize: str, dropout: Dropout | None = None):
        self.examples, self.batch_size, self.micro = examples, batch_size, micro
        self.rank, self.ranks, self.seed = rank, ranks, seed
        self.image_size, self.normalize, self.dropout = image_size, normalize, dropout
        self.lengths = [e.length for e in examples]
        self.per_epoch = -(-len(examples) // batch_size)
        self.epoch, self.order = None, None

    def chosen(self, step: int) -> list[int]:
        """Indices of the samples of the global batch."""
        epoch, k = divmod(step, self.per_epoch)
        if self.epoch != epoch:  # shuffling a million samples takes 20 ms: once per epoch
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
            self.epoch, self.order = epoch, order
        return self.order[k * self.batch_size: (k + 1) * self.batch_size].tolist()

    def __getitem__(self, step: int) -> tuple[list[Batch], int]:
        chosen = self.chosen(step)
        n_targets = sum(self.examples[i].length - self.examples[i].start for i in chosen)
        batches = []
        for micro in deal(chosen, self.lengths, self.ranks, self.micro)[self.rank]:
            examples = [self.examples[i] for i in micro]
            batch = collate(examples, self.image_size, self.normalize)
            if self.dropout:
                batch = batch._replace(**self.dropout.masks(examples, [[self.seed, step, i] for i in micro]))
            batches.append(batch)
        return batches, n_targets


def load(steps: Steps, which: range, workers: int, pin_memory: bool) -> Iterator[tuple[list[Batch], int]]:
    """Items of `steps`, prepared by worker processes. A worker's error is reduced to its own line."""
    try:
        yield from torch.utils.data.DataLoader(steps, batch_size=None, sampler=which, num_workers=workers,
                                               pin_memory=pin_memory)
    except (ValueError, OSError) as e:
        raise ValueError(str(e).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
