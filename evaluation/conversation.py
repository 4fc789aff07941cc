"""A conversation about one image or none: prompts in the trained format, earlier turns, streamed answers."""
import re
import sys
from pathlib import Path
from typing import Callable, Iterator

import torch

import data
import prompts
from clip import open_image
from lavin import LaVIN
from official.tokenizer import Tokenizer
from speed.machine import Meter


class Conversation:
    """One image or none, the turns so far, and the next answer."""

    def __init__(self, model: LaVIN, meta: dict, tokenizer: Tokenizer, step: Callable | None = None):
        self.model, self.meta, self.tokenizer, self.step = model, meta, tokenizer, step
        self.show(None)

    def show(self, image: str | None) -> None:
        """Start a new conversation about this image or none. ValueError or OSError if it is unusable."""
        if image and self.model.vit is None:
            raise ValueError("these adapters are text-only (trained with --no-vision); leave out --image")
        if image:
            open_image(image)
        self.image, self.image_embeds, self.turns = Path(image) if image else None, None, []

    def wrap(self, text: str, context: str) -> str:
        """The user's words in the format that the adapters were trained on; "(A) .. (B) .." are options."""
        if not text.strip():
            raise ValueError('the prompt is empty; give --prompt "your question"')
        trained_on = self.meta.get("train", {}).get("data", "")
        if trained_on and all(source.kind != "scienceqa" for source in prompts.mixture(trained_on)):
            return prompts.instruct(text.strip(), context)
        question, *options = re.split(r"\s*\([A-E]\)\s*", text.strip())
        return prompts.build_prompt(question, context, options, self.meta["format"])

    def example(self, prompt: str, max_new_tokens: int) -> data.Example:
        """[BOS] "Image: .." earlier turns, prompt. If the context is full, the oldest turns are dropped."""
        e = data.encode(prompts.Sample("prompt", prompt, "", self.image, {}), self.tokenizer,
                        self.model.vit.n_cls if self.image else 0)
        context, kept = self.model.llama.cfg.max_seq_len, len(self.turns)
        if e.length >= context:
            raise ValueError(f"the prompt has {e.length} tokens; "
                             f"this LLaMA's context holds {context}, answer included")
        while self.turns and e.length + sum(map(len, self.turns)) + max_new_tokens > context:
            self.turns.pop(0)
        if len(self.turns) < kept:
            print(f"[the context is full: the {kept - len(self.turns)} oldest turns are forgotten]",
                  file=sys.stderr)
        self.asked = e.rest
        e.rest = [id for turn in self.turns for id in turn] + self.asked
        e.n_prompt = len(e.rest)
        return e

    def ask(self, text: str, context: str, max_new_tokens: int, **sampling) -> Iterator[str]:
        """Yield the answer piece by piece; a piece never ends inside a character."""
        e = self.example(self.wrap(text, context), max_new_tokens)
        size = self.model.vit.cfg.image_size if self.image else 0
        batch = data.collate([e], size, self.model.cfg.normalize, self.image_embeds).to(self.model.device)
        if self.image and self.image_embeds is None:  # the ViT runs once per image, not once per turn
            with torch.inference_mode(), self.model.autocast():
                self.image_embeds = self.model.encode_images(batch)
            batch = batch._replace(image_embeds=self.image_embeds)
        answer, self.meter = [], Meter(self.model, e.length)

        def tokens():
            stream = self.model.stream(batch, max_new_tokens, self.tokenizer.eos, step=self.step, **sampling)
            for (token,) in stream:
                answer.append(token)
                self.meter.tick()
                yield token

        try:
            yield from self.tokenizer.stream(tokens())
        finally:  # also if Ctrl-C cut the answer short
            if answer:
                self.turns.append(self.asked + answer + [self.tokenizer.eos])
