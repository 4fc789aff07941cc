"""A conversation about one image or none: prompts in the format of the training, and the turns so far."""
import re
import sys
from pathlib import Path
from typing import Iterator

import torch

import data
import prompts
from lavin import LaVIN
from official.images import open_image
from official.tokenizer import Tokenizer


class Conversation:
    """In each turn, `batch` makes the input of `LaVIN.stream`; `reply` decodes and keeps what it yields."""

    def __init__(self, model: LaVIN, meta: dict, tokenizer: Tokenizer):
        """meta: the metadata of the adapter file"""
        self.model, self.meta, self.tokenizer = model, meta, tokenizer
        self.start(None)

    def start(self, image: str | None) -> None:
        """Start anew with this image, or with none. ValueError or FileNotFoundError if it cannot be used."""
        if image and self.model.vit is None:
            raise ValueError("these adapters are text-only (trained with --no-vision); leave out --image")
        if image:
            open_image(image)  # an error if it cannot be read
        self.image, self.image_embeds = Path(image) if image else None, None
        self.turns = []

    def wrap(self, text: str, context: str) -> str:
        """Put the user's words into the prompt format of the training; "(A) .. (B) .." are options."""
        if not text.strip():
            raise ValueError('the prompt is empty; give --prompt "your question"')
        # adapters trained on at least one data set in ScienceQA's layout expect "Question: ..", all others
        # "Instruction: ..". The authors' files do not name their data; we assume ScienceQA
        trained_on = self.meta.get("train", {}).get("data", "")
        if trained_on and all(source.kind != "scienceqa" for source in prompts.mixture(trained_on)):
            return prompts.instruct(text.strip(), context)
        question, *options = re.split(r"\s*\([A-E]\)\s*", text.strip())
        return prompts.build_prompt(question, context, options, self.meta["format"])

    def batch(self, text: str, context: str, max_new_tokens: int) -> data.Batch:
        """Image, earlier turns and the new prompt, as a batch of one row. If it is too long for the context,
        the oldest turns are left out."""
        sample = prompts.Sample("", self.wrap(text, context), response="", image=self.image, problem={})
        e = data.encode(sample, self.tokenizer, self.model.vit.n_visual if self.image else 0)
        limit, n_turns = self.model.llama.cfg.max_seq_len, len(self.turns)
        if e.length >= limit:
            raise ValueError(f"the prompt has {e.length} tokens; the context holds {limit}, answer included; "
                             "shorten --prompt or --context")
        while self.turns and e.length + sum(map(len, self.turns)) + max_new_tokens > limit:
            self.turns.pop(0)
        if len(self.turns) < n_turns:
            dropped = n_turns - len(self.turns)
            print(f"[the context is full: the {dropped} oldest turns are forgotten]", file=sys.stderr)
        self.new_prompt = e.rest  # `reply` will add the answer, and keep both as a turn
        e.rest = [id for turn in self.turns for id in turn] + self.new_prompt
        e.n_prompt = len(e.rest)  # all of it, earlier answers too, is prompt: there are no targets
        size = self.model.vit.cfg.image_size if self.image else 0
        batch = data.collate([e], size, self.model.cfg.normalize, self.image_embeds).to(self.model.device)
        if self.image and self.image_embeds is None:  # the ViT runs once per image, not once per turn
            with torch.inference_mode(), self.model.autocast():
                self.image_embeds = self.model.encode_images(batch)
            batch = batch._replace(image_embeds=self.image_embeds, images=None)
        return batch

    def reply(self, tokens: Iterator[list[int]]) -> Iterator[str]:
        """Decode the tokens that `LaVIN.stream` yields for one prompt. A token may end in the middle of a
        character, so each piece of text waits until its last character is complete. The prompt and the answer
        so far are kept as a turn, even if this is stopped early."""
        answer = []

        def ids() -> Iterator[int]:
            for (id,) in tokens:  # one prompt, so one id in each step
                answer.append(id)
                yield id

        try:
            yield from self.tokenizer.stream(ids())
        finally:
            if answer:
                # EOS ends the answer, as it ends a response in training
                self.turns.append(self.new_prompt + answer + [self.tokenizer.eos])
