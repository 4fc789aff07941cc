"""Talk to LaVIN.

    python sample.py                                                   a demo question about a demo image
    python sample.py --image x.jpg --prompt "What color is the circle?"             about an image of yours
    python sample.py --prompt "What is the opposite of hot? (A) wet (B) cold"       text alone, with options
    python sample.py --chat --image x.jpg                              several turns about one image
    python sample.py --routing                                         which expert each layer uses

The answer goes to stdout, everything else to stderr.
"""
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

import torch

import cli
import data
import lavin
import prompts
from clip import open_image
from llama import Tokenizer
from speed.machine import Meter
from speed.step import FastStep

DEMO = "tiny/demo.png", "What color is the circle? (A) green (B) blue (C) red"


@dataclass
class Config:
    """Ask LaVIN one question, or chat. Without arguments: a demo question about a demo image."""
    prompt: str = ""  # the question; options may follow it as "(A) red (B) blue"
    image: str = ""  # image file; without it the input is text alone
    context: str = ""  # hint that goes with the question
    chat: bool = False  # several turns: history and image are kept
    routing: bool = False  # print the routing weights instead of answering, and draw them in routing.png
    adapters: str = "tiny/adapters.safetensors"  # what train.py wrote
    llama: str = "tiny/llama"  # folder of LLaMA weights
    clip: str = "tiny/clip"  # folder of CLIP weights
    any_base: bool = False  # accept another base than the one the adapters were trained on
    max_new_tokens: int = 0  # [0, inf) longest answer; 0: as trained
    temperature: float = 0.1  # [0, inf) 0: greedy
    top_p: float = 0.75  # (0, 1] nucleus
    seed: int = 0  # [0, inf) of the sampling
    compile: bool = False  # compile the decoding step: 10 s to a minute, then faster tokens; needs g++
    device: str = "auto"  # cuda, cpu, ...
    dtype: str = "auto"  # bf16 or fp32


class Conversation:
    """One image or none, the turns so far, and the next answer."""

    def __init__(self, model: lavin.LaVIN, meta: dict, tokenizer: Tokenizer, step: Callable | None = None):
        self.model, self.meta, self.tokenizer, self.step = model, meta, tokenizer, step
        self.show(None)

    def show(self, image: str | None) -> None:
        """Start anew with this image, or with none; ValueError or FileNotFoundError if it cannot be used."""
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
        e = data.encode(data.Sample("prompt", prompt, "", self.image, {}), self.tokenizer,
                        self.model.vit.n_cls if self.image else 0)
        context, kept = self.model.llama.cfg.max_seq_len, len(self.turns)
        if e.length >= context:
            raise ValueError(f"the prompt has {e.length} tokens; this LLaMA's context holds {context}, answer included")
        while self.turns and e.length + sum(map(len, self.turns)) + max_new_tokens > context:
            self.turns.pop(0)
        if len(self.turns) < kept:
            print(f"[the context is full: the {kept - len(self.turns)} oldest turns are forgotten]", file=sys.stderr)
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
            for (token,) in self.model.stream(batch, max_new_tokens, self.tokenizer.eos, step=self.step, **sampling):
                answer.append(token)
                self.meter.tick()
                yield token

        try:
            yield from self.tokenizer.stream(tokens())
        finally:  # also if Ctrl-C cut the answer short
            if answer:
                self.turns.append(self.asked + answer + [self.tokenizer.eos])


def say(conversation: Conversation, prompt: str, cfg: Config) -> None:
    pieces = conversation.ask(prompt, cfg.context, cfg.max_new_tokens or conversation.meta["max_new_tokens"],
                              temperature=cfg.temperature, top_p=cfg.top_p, seed=cfg.seed)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not cfg.chat:
            raise
        pieces.close()
    print(flush=True)
    print(f"[{conversation.meter.report()}]", file=sys.stderr)


def chat(conversation: Conversation, cfg: Config) -> None:
    """Turns from stdin until it ends. A mistake in a turn is reported and costs nothing."""
    print("Ask a question. /image PATH shows another image, /reset forgets the turns, Ctrl-C stops an answer; "
          "an empty line or Ctrl-D ends the chat.", file=sys.stderr)
    line = cfg.prompt.strip()
    while True:
        if not line:
            print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline().strip()
            if not line:
                return
        command, _, rest = line.partition(" ")
        try:
            if command == "/image":
                conversation.show(rest.strip() or None)
            elif command == "/reset":
                conversation.turns = []
            elif command.startswith("/"):
                raise ValueError(f"unknown command {command}; known: /image PATH, /reset")
            else:
                say(conversation, line, cfg)
        except (ValueError, OSError) as e:
            print(e, file=sys.stderr)
        line = ""


def show_routing(model: lavin.LaVIN, file: Path) -> None:
    from evaluation import routing
    w = model.routing()
    if w is None:
        raise ValueError("these adapters have no router (trained with --adapter rep)")
    print(routing.table(w.detach().float().cpu()))
    routing.picture(w.detach().float().cpu(), file)
    print(f"wrote {file}", file=sys.stderr)


def main() -> None:
    cfg = cli.parse(Config)
    if not (cfg.prompt or cfg.image or cfg.chat or cfg.routing or any(a.startswith("--prompt") for a in sys.argv)):
        cfg.image, cfg.prompt = DEMO
        print(f"{cfg.image}: {cfg.prompt}", file=sys.stderr)
    if not (cfg.chat or cfg.routing or cfg.prompt.strip()):
        raise ValueError('the prompt is empty; give --prompt "your question"')
    if cfg.image:
        open_image(cfg.image)  # report a bad image before the weights are read
    device, dtype = cli.pick_device(cfg.device, cfg.dtype)
    started = time.time()
    model, meta = lavin.load(cfg.adapters, cfg.llama, cfg.clip, device, dtype, cfg.any_base)
    print(f"{cfg.llama} + {cfg.clip} + {cfg.adapters} on {device} in {str(dtype).removeprefix('torch.')}, "
          f"loaded in {time.time() - started:.1f} s", file=sys.stderr)
    if cfg.routing:
        return show_routing(model, Path("routing.png"))
    both = [lavin.TEXT, lavin.IMAGE] if model.vit else [lavin.TEXT]  # in a chat, an image may come later
    model.fold(*(both if cfg.chat else [lavin.IMAGE if cfg.image else lavin.TEXT]))
    step = FastStep(model)
    if cfg.compile:
        from speed.compiling import compile_step
        started, step = time.time(), compile_step(model)
        print(f"compiled in {time.time() - started:.0f} s", file=sys.stderr)
    conversation = Conversation(model, meta, Tokenizer.from_pretrained(cfg.llama, model.llama.cfg.vocab_size), step)
    conversation.show(cfg.image or None)
    if cfg.chat:
        chat(conversation, cfg)
    else:
        say(conversation, cfg.prompt, cfg)


if __name__ == "__main__":
    cli.run(main)
