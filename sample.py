"""Talk to LaVIN.

    python sample.py                                                   a demo question about a demo image
    python sample.py --image x.jpg --prompt "What color is the circle?"             about an image of yours
    python sample.py --prompt "What is the opposite of hot? (A) wet (B) cold"       text alone, with options
    python sample.py --chat --image x.jpg                              several turns about one image
    python sample.py --routing                                         how each layer weighs its two adapters

The answer goes to stdout, everything else to stderr. A Conversation (evaluation/conversation.py) keeps the
image and the turns. In each turn, the model reads the whole chat again, as one sequence: head, X', prompt,
answer, prompt, answer, prompt. If this is too long for the context, the oldest turns are left out. A prompt
is "Question: .. Context: .. Options: .. Response:" if the adapters were trained on ScienceQA's format, else
"Instruction: ..".
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import cli  # first: from here on, Ctrl-C prints one line, not a traceback, even while torch is imported

from evaluation.conversation import Conversation
from evaluation.routing import show_routing
from official.images import open_image
from official.tokenizer import Tokenizer
from speed.loading import fold_adapters, load_model
from speed.machine import Meter

DEMO = "tiny/demo.png", "What color is the circle? (A) green (B) blue (C) red"


@dataclass
class Config:
    """Ask LaVIN one question, or chat. Without arguments: a demo question about a demo image."""
    prompt: str | None = None  # the question; options may follow it as "(A) red (B) blue"
    image: str = ""  # image file; without it the input is text alone
    context: str = ""  # hint that goes with the question
    chat: bool = False  # several turns: history and image are kept
    routing: bool = False  # print the routing weights instead of answering, and draw them in routing.png
    adapters: str = "tiny/adapters.safetensors"  # already trained; train.py writes OUT/adapters.safetensors
    llama: str = "tiny/llama"  # folder of LLaMA weights
    clip: str = "tiny/clip"  # folder of CLIP weights
    any_base: bool = False  # accept another base than the one the adapters were trained on
    max_new_tokens: int = 0  # longest answer, in tokens; 0: as in training [0, inf)
    temperature: float = 0.1  # of the sampling; 0: greedy, always the likeliest token [0, inf)
    top_p: float = 0.75  # sample from the likeliest tokens that share this much probability (0, 1]
    seed: int = 0  # seed of the sampling [0, inf)
    compile: bool = False  # compile the decoding step: 10 s to a minute, then faster tokens; needs g++
    device: str = "auto"  # cuda, mps, cpu, ..
    dtype: str = "auto"  # bf16 or fp32
    bits: int = 16  # 4: keep LLaMA's matrices in 4 bits, as in train.py; 16: in --dtype


def answer(conversation: Conversation, prompt: str, cfg: Config) -> None:
    """Print the answer to one prompt as it is generated."""
    model, eos = conversation.model, conversation.tokenizer.eos
    max_new_tokens = cfg.max_new_tokens or conversation.meta["max_new_tokens"]
    batch = conversation.batch(prompt, cfg.context, max_new_tokens)  # head, X', earlier turns, prompt
    tokens = model.stream(batch, max_new_tokens, eos, cfg.temperature, cfg.top_p, cfg.seed)  # Eq. (8)
    timed_tokens = Meter(model, batch.lengths[0], tokens)  # passes them on, and measures their times
    try:
        for text in conversation.reply(timed_tokens):  # decodes the tokens, and keeps them as a turn
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        if not cfg.chat:
            raise
    print(flush=True)
    print(f"[{timed_tokens.report()}]", file=sys.stderr)  # tokens per second


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
                conversation.start(rest.strip() or None)
            elif command == "/reset":
                conversation.turns = []
            elif command.startswith("/"):
                raise ValueError(f"unknown command {command}; known: /image PATH, /reset")
            else:
                answer(conversation, line, cfg)
        except (ValueError, OSError) as e:
            print(e, file=sys.stderr)
        line = ""


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
        raise ValueError("--compile needs folded adapters, and they cannot be folded into 4-bit matrices; "
                         "leave out --compile or --bits 4")
    model, meta = load_model(cfg)  # lavin.load, with the flags
    if cfg.routing:
        return show_routing(model, Path("routing.png"))
    tokenizer = Tokenizer(cfg.llama, model.llama.cfg.vocab_size)
    # merge LLaMA's adapters into wq, wk and wv (adapters.fold): the answers stay the same, up to rounding,
    # but a token costs less. A question needs W' and b' of its own modality; a chat needs both, because
    # /image may change the modality. FoldedLaVIN (speed/step.py) inherits `stream`. Its blocks have no
    # adapters. Its `pack` puts W' and b' of the prompt's modality into wq, wk and wv, and returns w = None.
    # With --bits 4, nothing is merged
    model = fold_adapters(model, cfg)
    conversation = Conversation(model, meta, tokenizer)
    conversation.start(cfg.image or None)
    if cfg.chat:
        chat(conversation, cfg)
    else:
        answer(conversation, cfg.prompt, cfg)


if __name__ == "__main__":
    cli.run(main)
