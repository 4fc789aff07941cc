"""Talk to LaVIN.

    python sample.py                                                         a demo question about a demo picture
    python sample.py --image x.jpg --prompt "What color is the circle?"      about a picture of yours
    python sample.py --prompt "What is the opposite of hot? (A) wet (B) cold"        text alone, with options
    python sample.py --chat --image x.jpg                                    several turns about one picture
    python sample.py --routing                               which expert each layer uses, for text and for pictures

The answer goes to stdout, everything else to stderr.
"""
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch
from PIL import Image, ImageDraw

import cli
import data
import lavin
import prompts
from speed.decoding import bytes_per_token
from llama import Tokenizer
from speed.machine import bandwidth

DEMO = "tiny/demo.png", "What color is the circle? (A) green (B) blue (C) red"


@dataclass
class Config:
    """Ask LaVIN one question, or chat. Without arguments: a demo question about a demo picture."""
    prompt: str = ""  # the question; options may follow it as "(A) red (B) blue"
    image: str = ""  # picture file; without it the input is text only
    context: str = ""  # hint that goes with the question
    chat: bool = False  # several turns: history and picture are kept
    routing: bool = False  # show the routing weights instead of answering, and write them to routing.png
    adapters: str = "tiny/adapters.safetensors"  # what train.py wrote
    llama: str = "tiny/llama"  # folder of LLaMA weights
    clip: str = "tiny/clip"  # folder of CLIP weights
    any_base: bool = False  # accept a base with another fingerprint than the one trained on
    max_new_tokens: int = 0  # longest answer; 0: as trained
    temperature: float = 0.1  # 0: greedy
    top_p: float = 0.75  # nucleus
    seed: int = 0  # of the sampling
    compile: bool = False  # compile the decoding step: 10 s to a minute, then tokens come faster; needs g++
    device: str = "auto"  # cuda, cpu, ...
    dtype: str = "auto"  # bf16 or fp32


class Conversation:
    """A picture or none, the turns so far, and the next answer."""

    def __init__(self, model: lavin.LaVIN, meta: dict, tokenizer: Tokenizer):
        self.model, self.meta, self.tokenizer, self.limit = model, meta, tokenizer, None
        self.look(None)

    def look(self, image: str | None) -> None:
        """Begin anew, with this picture or with none; ValueError or FileNotFoundError if it can't be used."""
        if image and self.model.vit is None:
            raise ValueError("these adapters are text-only (trained with --no-vision); leave out the picture")
        if image:
            data.open_image(image)
        self.image, self.seen, self.turns, self.marks = Path(image) if image else None, None, [], []

    def wrap(self, text: str, context: str) -> str:
        """The user's words in the format that the adapters were trained on; "(A) .. (B) .." in them are options."""
        if not text.strip():
            raise ValueError('the prompt is empty; give --prompt "your question"')
        trained_on = self.meta.get("train", {}).get("data", "")
        if trained_on and all(source.kind != "scienceqa" for source in prompts.mixture(trained_on)):
            return prompts.instruct(text.strip(), context)
        question, *options = re.split(r"\s*\([A-E]\)\s*", text.strip())
        return prompts.build_prompt(question, context, options, self.meta["format"])

    def example(self, prompt: str, max_new_tokens: int) -> data.Example:
        """[BOS] "Image: .." [earlier turns] prompt; the oldest turns go when the context is full."""
        sample = data.Sample("prompt", prompt, "", self.image, {})
        e = data.encode(sample, self.tokenizer, self.model.vit.n_cls if self.image else 0)
        n, dropped, context = e.slot + e.n_slots, 0, self.model.llama.cfg.max_seq_len
        if len(e.ids) >= context:
            raise ValueError(f"the prompt has {len(e.ids)} tokens; this LLaMA's context holds {context}, answer included")
        while self.turns and len(e.ids) + sum(map(len, self.turns)) + max_new_tokens > context:
            self.turns.pop(0)
            dropped += 1
        if dropped:
            print(f"[the context is full: {dropped} of the oldest turns forgotten]", file=sys.stderr)
        self.asked = e.ids[n:]
        e.ids = e.ids[:n] + [id for turn in self.turns for id in turn] + self.asked
        e.start = len(e.ids)  # nothing here is a target
        return e

    def ask(self, text: str, context: str, max_new_tokens: int, **sampling) -> Iterator[str]:
        """Yield the answer piece by piece; a piece never ends inside a multi-byte character."""
        e = self.example(self.wrap(text, context), max_new_tokens)
        size = self.model.vit.cfg.image_size if self.image else 0
        batch = data.collate([e], size, self.model.cfg.normalize, seen=self.seen).to(self.model.device)
        if self.image and self.seen is None:  # the ViT runs once a picture, not once a turn
            with torch.inference_mode(), self.model.autocast():
                self.seen = self.model.look(batch)
            batch = batch._replace(seen=self.seen)
        answer, self.marks = [], []

        def tokens():
            for (token,) in self.model.stream(batch, max_new_tokens, self.tokenizer.eos, **sampling):
                answer.append(token)
                self.marks.append(time.perf_counter())
                yield token

        try:
            yield from self.tokenizer.stream(tokens())
        finally:  # also when Ctrl-C cut it short
            if answer:  # a mistake is no turn
                self.turns.append(self.asked + answer + [self.tokenizer.eos])
            self.slots = len(e.ids) + len(answer) / 2  # of the cache, that a step read on average

    def rate(self) -> str:
        """bytes/s of the last answer beside what the machine can do; empty if there was but one token"""
        if len(self.marks) < 2:
            return ""
        size, steps = bytes_per_token(self.model.llama, self.slots), len(self.marks) - 1
        if self.limit is None:
            self.limit = max(bandwidth(self.model.device, tries=3))  # a third of a second, once
        rate = size * steps / (self.marks[-1] - self.marks[0])
        return f"; after the first, {rate / 1e9:.2f} GB/s of weights and cache, {rate / self.limit:.0%} of the memory's"


def say(conversation: Conversation, prompt: str, cfg: Config) -> None:
    started = time.time()
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
    seconds, n = time.time() - started, len(conversation.marks)
    print(f"[{n} tokens in {seconds:.2f} s, {n / seconds:.3g} tokens/s{conversation.rate()}]", file=sys.stderr)


def chat(conversation: Conversation, cfg: Config) -> None:
    """Turns from stdin until it ends; a mistake in one of them is told and costs nothing."""
    print("Ask; /image PATH shows another picture, /reset forgets the turns, an empty line or Ctrl-D ends, "
          "Ctrl-C stops an answer.", file=sys.stderr)
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
                conversation.look(rest.strip() or None)
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
    """Routing weights of every LLaMA layer, for text and for picture input: bars on stdout, and as a PNG."""
    w = model.routing(torch.tensor([lavin.TEXT, lavin.IMAGE], device=model.device))
    if w is None:
        raise ValueError("these adapters have no router (trained with --adapter rep)")
    w = w.detach().float().cpu()  # [L, 2, 2]
    L, row, left, width = len(w), 18, 60, 200
    picture = Image.new("RGB", (left + 2 * (width + 20), (L + 2) * row), "white")
    draw = ImageDraw.Draw(picture)
    print("layer   text: w_0 w_1                        picture: w_0 w_1")
    for k, name in enumerate(("text input", "picture input")):
        draw.text((left + k * (width + 20), 4), f"{name}: w_0 | w_1", fill="black")
    for i in range(L):
        bars = []
        draw.text((4, (i + 1) * row + 2), f"layer {i}", fill="black")
        for k in (lavin.TEXT, lavin.IMAGE):
            w0, w1 = w[i, k].tolist()
            n = round(20 * w0)
            bars.append(f"{w0:.3f} {'#' * n}{'.' * (20 - n)} {w1:.3f}")
            x, y = left + k * (width + 20), (i + 1) * row
            draw.rectangle((x, y + 2, x + width * w0, y + row - 3), fill=(66, 99, 180))
            draw.rectangle((x + width * w0, y + 2, x + width, y + row - 3), fill=(226, 150, 66))
        print(f"{i:>5}   " + "    ".join(bars))
    picture.save(file)
    print(f"wrote {file}", file=sys.stderr)


def main() -> None:
    cfg = cli.parse(Config)
    if not (cfg.prompt or cfg.image or cfg.chat or cfg.routing or any(a.startswith("--prompt") for a in sys.argv)):
        cfg.image, cfg.prompt = DEMO
        print(f"{cfg.image}: {cfg.prompt}", file=sys.stderr)
    if not (cfg.chat or cfg.routing or cfg.prompt.strip()):
        raise ValueError('the prompt is empty; give --prompt "your question"')
    if cfg.image:
        data.open_image(cfg.image)  # a bad picture is found before the weights are read
    device, dtype = cli.pick_device(cfg.device, cfg.dtype)
    started = time.time()
    model, meta = lavin.load(cfg.adapters, cfg.llama, cfg.clip, device, dtype, cfg.any_base)
    print(f"{cfg.llama} + {cfg.clip} + {cfg.adapters} on {device} in {str(dtype).removeprefix('torch.')}, "
          f"loaded in {time.time() - started:.1f} s", file=sys.stderr)
    if cfg.routing:
        return show_routing(model, Path("routing.png"))
    conversation = Conversation(model, meta, Tokenizer.from_pretrained(cfg.llama, model.llama.cfg.vocab_size))
    conversation.look(cfg.image or None)
    if cfg.chat:  # a picture may come later
        model.fold(lavin.TEXT, *[lavin.IMAGE] * (model.vit is not None))
    else:
        model.fold(lavin.IMAGE if cfg.image else lavin.TEXT)
    if cfg.compile:
        started = time.time()
        model.compile_step()
        print(f"compiled in {time.time() - started:.0f} s", file=sys.stderr)
    if cfg.chat:
        chat(conversation, cfg)
    else:
        say(conversation, cfg.prompt, cfg)


if __name__ == "__main__":
    cli.run(main)
