"""Talk to LaVIN.

    python sample.py                                                   a demo question about a demo image
    python sample.py --image x.jpg --prompt "What color is the circle?"             about an image of yours
    python sample.py --prompt "What is the opposite of hot? (A) wet (B) cold"       text alone, with options
    python sample.py --chat --image x.jpg                              several turns about one image
    python sample.py --routing                                         how each layer weighs its two adapters

The answer goes to stdout, everything else to stderr. A Conversation (evaluation/conversation.py) keeps the
image and the turns. The model reads a chat as one sequence: head, X', prompt, answer, prompt, answer, prompt.
If it is too long for the context, the oldest turns are left out. A prompt is "Question: .. Context: ..
Options: .. Response:" if the adapters were trained on ScienceQA's format, else "Instruction: ..".
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cli

import lavin
from evaluation.conversation import Conversation
from evaluation.routing import show_routing
from official.images import open_image
from official.tokenizer import Tokenizer
from speed import nf4
from speed.machine import Meter
from speed.step import folded

DEMO = "tiny/demo.png", "What color is the circle? (A) green (B) blue (C) red"


@dataclass
class Config:
    """Ask LaVIN one question, or chat. Without arguments: a demo question about a demo image."""
    prompt: str | None = None  # the question; options may follow it as "(A) red (B) blue"
    image: str = ""  # image file; without it the input is text alone
    context: str = ""  # hint that goes with the question
    chat: bool = False  # several turns: history and image are kept
    routing: bool = False  # print the routing weights instead of answering, and draw them in routing.png
    adapters: str = "tiny/adapters.safetensors"  # these are ready; train.py writes OUT/adapters.safetensors
    llama: str = "tiny/llama"  # folder of LLaMA weights
    clip: str = "tiny/clip"  # folder of CLIP weights
    any_base: bool = False  # accept another base than the one the adapters were trained on
    max_new_tokens: int = 0  # [0, inf) longest answer; 0: as trained
    temperature: float = 0.1  # [0, inf) 0: greedy
    top_p: float = 0.75  # (0, 1] nucleus
    seed: int = 0  # [0, inf) of the sampling
    compile: bool = False  # compile the decoding step: 10 s to a minute, then faster tokens; needs g++
    device: str = "auto"  # cuda, mps, cpu, ..
    dtype: str = "auto"  # bf16 or fp32
    bits: int = 16  # 4: keep LLaMA's matrices in 4 bits, as in train.py; 16: in --dtype


def answer(conversation: Conversation, prompt: str, cfg: Config) -> None:
    """Print the answer to one prompt as it is generated, and keep it as a turn."""
    model, tokenizer = conversation.model, conversation.tokenizer
    max_new_tokens = cfg.max_new_tokens or conversation.meta["max_new_tokens"]
    batch = conversation.batch(prompt, cfg.context, max_new_tokens)  # head, X', the turns that fit, prompt
    steps = model.stream(batch, max_new_tokens, tokenizer.eos, cfg.temperature, cfg.top_p, cfg.seed)
    meter = Meter(model, batch.lengths[0], steps)  # yields the token ids of `steps`, and times them
    try:
        for text in tokenizer.stream(meter):  # text of whole characters: a token may end inside one
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        if not cfg.chat:
            raise
    conversation.add(meter.ids)  # after Ctrl-C, the part that was generated
    print(flush=True)
    print(f"[{meter.report()}]", file=sys.stderr)  # tokens per second


def chat(conversation: Conversation, cfg: Config) -> None:
    """Read turns from stdin until Ctrl-D or an empty line. After an error in a turn, the chat goes on."""
    print("Ask a question. /image PATH shows an image, /reset forgets the turns. Ctrl-C stops an answer, "
          "Ctrl-D or an empty line ends the chat.", file=sys.stderr)
    line = cfg.prompt or ""
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
                answer(conversation, line, cfg)
        except (ValueError, OSError) as e:
            print(e, file=sys.stderr)
        line = ""


def load(cfg: Config) -> tuple[lavin.LaVIN, dict]:
    """The model and the metadata of its adapter file."""
    device, dtype = cli.pick_device(cfg.device, cfg.dtype)
    Meter.prepare(device)  # measures the memory's bandwidth for the report after each answer
    started = time.time()
    after_read = nf4.after_read(cfg.bits)  # a function that quantises, or None if --bits is 16
    model, meta = lavin.load(cfg.adapters, cfg.llama, cfg.clip, device, dtype, cfg.any_base, after_read)
    print(f"{cfg.llama} + {cfg.clip} + {cfg.adapters} on {device} in {str(dtype).removeprefix('torch.')}, "
          f"loaded in {time.time() - started:.1f} s", file=sys.stderr)
    return model, meta


def faster(model: lavin.LaVIN, cfg: Config) -> lavin.LaVIN:
    """A model with the same answers: LLaMA's adapters are merged ("folded") into wq, wk and wv.

    adapters.fold shows how. It is possible because w is constant for a modality. A chat needs two copies,
    because an image may be shown later. FoldedLaVIN, a subclass of LaVIN in speed/step.py, holds them and
    overrides `pack` and `decode`. With --bits 4 nothing is folded: the adapters run as in training.
    """
    modalities = [lavin.IMAGE if cfg.image else lavin.TEXT]
    if cfg.chat:
        modalities = [lavin.TEXT, lavin.IMAGE] if model.vit else [lavin.TEXT]
    model = folded(model, *modalities)
    if cfg.compile:
        from speed.compiling import compile_step
        compile_step(model)
    return model


def main() -> None:
    cfg = cli.parse(Config)
    if not (cfg.prompt or cfg.image or cfg.chat or cfg.routing):
        cfg.image, cfg.prompt = DEMO
        print(f"{cfg.image}: {cfg.prompt}", file=sys.stderr)
    if not (cfg.chat or cfg.routing or cfg.prompt):
        raise ValueError('no question; give --prompt "your question"')
    if cfg.image:
        open_image(cfg.image)  # report a bad image before the weights are read
    if cfg.compile and cfg.bits == 4:
        raise ValueError("--compile needs folded adapters, and 4-bit matrices cannot take them in; leave out "
                         "--compile or --bits 4")
    model, meta = load(cfg)
    if cfg.routing:
        return show_routing(model, Path("routing.png"))
    tokenizer = Tokenizer(cfg.llama, model.llama.cfg.vocab_size)
    conversation = Conversation(faster(model, cfg), meta, tokenizer)
    conversation.show(cfg.image or None)
    if cfg.chat:
        chat(conversation, cfg)
    else:
        answer(conversation, cfg.prompt, cfg)


if __name__ == "__main__":
    cli.run(main)
