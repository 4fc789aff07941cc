"""Talk to LaVIN.

    python sample.py                                                         a demo question about a demo picture
    python sample.py --image x.jpg --prompt "What color is the circle?"      about a picture of yours
    python sample.py --prompt "What is the opposite of hot? (A) red (B) cold"        text alone, with options
    python sample.py --chat --image x.jpg                                    several turns about one picture

The answer goes to stdout, everything else to stderr.
"""
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import cli
import data
import lavin
from llama import Tokenizer

DEMO = "tiny/demo.png", "What color is the circle? (A) green (B) blue (C) red"


@dataclass
class Config:
    """Ask LaVIN one question, or chat. Without arguments: a demo question about a demo picture."""
    prompt: str = ""  # the question; options may follow it as "(A) red (B) blue"
    image: str = ""  # picture file; without it the input is text only
    context: str = ""  # hint that goes with the question
    chat: bool = False  # several turns: history and picture are kept
    adapters: str = "tiny/adapters.safetensors"  # what train.py wrote
    llama: str = "tiny/llama"  # folder of LLaMA weights
    clip: str = "tiny/clip"  # folder of CLIP weights
    any_base: bool = False  # accept a base with another fingerprint than the one trained on
    max_new_tokens: int = 0  # longest answer; 0: as trained
    temperature: float = 0.1  # 0: greedy
    top_p: float = 0.75  # nucleus
    seed: int = 0  # of the sampling
    device: str = "auto"  # cuda, cpu, ...
    dtype: str = "auto"  # bf16 or fp32


class Conversation:
    """The token ids so far, and the picture they are about."""

    def __init__(self, model: lavin.LaVIN, meta: dict, tokenizer: Tokenizer, image: str):
        self.model, self.meta, self.tokenizer = model, meta, tokenizer
        self.image = Path(image) if image else None
        if self.image and model.vit is None:
            raise ValueError("these adapters are text-only (trained with --no-vision); leave out --image")
        self.example = None

    def wrap(self, text: str, context: str = "") -> str:
        """The user's words in the format that the adapters were trained on; "(A) .. (B) .." in them are options."""
        question, *options = re.split(r"\s*\([A-E]\)\s*", text.strip())
        return data.build_prompt(question, context, options, self.meta["format"])

    def ask(self, text: str, context: str = "", **sampling) -> Iterator[str]:
        """Yield the answer piece by piece; a piece never ends inside a multi-byte character."""
        sample = data.Sample("prompt", self.wrap(text, context), "", self.image, {})
        if self.example is None:
            e = data.encode(sample, self.tokenizer, self.model.vit.n_cls if self.image else 0)
        else:
            past = self.example
            e = data.Example(sample, past.ids + self.tokenizer.encode(sample.prompt), 0, past.slot, past.n_slots)
        e.start = len(e.ids)  # nothing here is a target
        size = self.model.vit.cfg.image_size if self.image else 0
        batch = data.collate([e], size, self.model.cfg.normalize).to(self.model.device)
        answer = []

        def tokens():
            for (token,) in self.model.stream(batch, eos=self.tokenizer.eos, **sampling):
                answer.append(token)
                yield token

        yield from self.tokenizer.stream(tokens())
        e.ids += answer + [self.tokenizer.eos]
        self.example, self.n_tokens = e, len(answer)


def say(conversation: Conversation, prompt: str, cfg: Config) -> None:
    started = time.time()
    for piece in conversation.ask(prompt, cfg.context, max_new_tokens=cfg.max_new_tokens or conversation.meta["max_new_tokens"],
                                  temperature=cfg.temperature, top_p=cfg.top_p, seed=cfg.seed):
        print(piece, end="", flush=True)
    print(flush=True)
    seconds = time.time() - started
    print(f"[{conversation.n_tokens} tokens in {seconds:.2f} s, {conversation.n_tokens / seconds:.0f} tokens/s]", file=sys.stderr)


def chat(conversation: Conversation, cfg: Config) -> None:
    print("Type a question; an empty line or Ctrl-D ends the chat.", file=sys.stderr)
    prompt = cfg.prompt
    while True:
        if not prompt:
            print("> ", end="", file=sys.stderr, flush=True)
            prompt = sys.stdin.readline().strip()
            if not prompt:
                return
        say(conversation, prompt, cfg)
        prompt = ""


def main() -> None:
    cfg = cli.parse(Config)
    if not any(flag in " ".join(sys.argv) for flag in ("--prompt", "--image", "--chat")):
        cfg.image, cfg.prompt = DEMO
        print(f"{cfg.image}: {cfg.prompt}", file=sys.stderr)
    if not cfg.chat and not cfg.prompt.strip():
        raise ValueError('the prompt is empty; give --prompt "your question"')
    if cfg.image:
        data.open_image(cfg.image)  # a bad picture is found before the weights are read
    device, dtype = cli.pick_device(cfg.device, cfg.dtype)
    model, meta = lavin.load(cfg.adapters, cfg.llama, cfg.clip, device, dtype, cfg.any_base)
    print(f"{cfg.llama} + {cfg.clip} + {cfg.adapters} on {device} in {str(dtype).removeprefix('torch.')}", file=sys.stderr)
    model.fold(lavin.IMAGE if cfg.image else lavin.TEXT)
    conversation = Conversation(model, meta, Tokenizer.from_pretrained(cfg.llama, model.llama.cfg.vocab_size), cfg.image)
    if cfg.chat:
        chat(conversation, cfg)
    else:
        say(conversation, cfg.prompt, cfg)


if __name__ == "__main__":
    cli.run(main)
