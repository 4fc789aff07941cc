"""Talk to LaVIN on a web page: questions, pictures, several turns.

    pip install -r requirements-web.txt       gradio, which makes the page
    python web.py                             then open http://127.0.0.1:7860; most flags of sample.py

The server keeps nothing between two requests: each brings the history that the page shows, and a new
Conversation takes it in. The same question after the same history gets the same answer, even on "retry".
"""
import os
import re
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cli

import lavin
from evaluation import routing
from evaluation.conversation import Conversation
from official.tokenizer import Tokenizer
from sample import DEMO
from speed.step import folded

NO_SHARE_BUTTON = ".download-link + button {display: none}"  # below a picture; it uploads to Hugging Face


@dataclass
class Config:
    """Open a web page to chat with LaVIN. It answers one question at a time, whoever asks."""
    adapters: str = "tiny/adapters.safetensors"  # already trained; train.py writes OUT/adapters.safetensors
    llama: str = "tiny/llama"  # folder of LLaMA weights
    clip: str = "tiny/clip"  # folder of CLIP weights
    any_base: bool = False  # accept another base than the one the adapters were trained on
    max_new_tokens: int = 0  # longest answer, in tokens; 0: as in training [0, inf)
    temperature: float = 0.1  # of the sampling; 0: greedy, always the likeliest token [0, inf)
    top_p: float = 0.75  # sample from the likeliest tokens that share this much probability (0, 1]
    seed: int = 0  # seed of the sampling [0, inf)
    device: str = "auto"  # cuda, cpu, ...
    dtype: str = "auto"  # bf16 or fp32
    host: str = "127.0.0.1"  # the default lets nobody else in; 0.0.0.0: everyone on your network, no password
    port: int = 7860  # where the page is [1, 65535]


def read_content(content: str | list) -> tuple[str, list[str]]:
    """The words and the picture files of one message of `replay`."""
    words, images = [], []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            words.append(part)
        elif "text" in part:
            words.append(part["text"])
        else:
            images.append(part.get("file", part)["path"])
    return "\n".join(words), images


def replay(conversation: Conversation, history: list[dict]) -> None:
    """Take in the pictures and turns of a chat page, {"role": "user" or "assistant", "content": parts}.

    gradio's page gives the parts {"type": "text", "text": ..} and {"type": "file", "file": {"path": ..}},
    its Python client a text and {"path": ..}, or one text without a list. A question without an answer
    was an error and is no turn. A picture that cannot be used was an error, too: the one before stays.
    """
    question = ""
    for message in history:
        words, images = read_content(message["content"])
        for image in images:
            with suppress(ValueError, OSError):
                conversation.start(image)
        if message["role"] == "user":
            question = words
        elif question and words:  # as token ids of one text, as in training
            ids = conversation.tokenizer.encode(conversation.wrap(question, "") + words)
            conversation.turns.append(ids + [conversation.tokenizer.eos])
            question = ""


def build_page(model: lavin.LaVIN, meta: dict, cfg: Config, folder: Path):
    """The page of a loaded model. folder: where the charts of its routing weights are written."""
    import gradio as gr
    from gradio.events import Dependency

    charts = routing.pictures(model, folder)  # first, because a folded model has no routing weights
    modalities = [lavin.TEXT, lavin.IMAGE] if model.vit else [lavin.TEXT]
    model = folded(model, *modalities)
    tokenizer = Tokenizer(cfg.llama, model.llama.cfg.vocab_size)
    max_new_tokens = cfg.max_new_tokens or meta["max_new_tokens"]
    lock = threading.Lock()  # an answer puts its modality's projections into LLaMA, so the next must wait

    def chat(message: dict, history: list[dict]):
        """Yield the answer so far and the chart of the routing weights that it uses."""
        try:
            with lock:
                conversation, text = Conversation(model, meta, tokenizer), ""
                replay(conversation, history)
                for file in message["files"]:  # paths, but {"path": ..} on "retry"
                    conversation.start(file if isinstance(file, str) else file["path"])
                batch = conversation.batch(message["text"], "", max_new_tokens)
                tokens = model.stream(batch, max_new_tokens, tokenizer.eos, cfg.temperature, cfg.top_p,
                                      cfg.seed)
                for piece in conversation.reply(tokens):
                    text += piece
                    yield text, charts.get(batch.modality[0])
        except (ValueError, OSError) as e:  # leave out the advice on flags and the folder of the upload
            raise gr.Error(re.sub(r";[^;]*--.*|/\S+/", "", str(e)), print_exception=False) from None

    with gr.Blocks(title="LaVIN", fill_width=True) as page, gr.Row():
        chart = gr.Image(charts.get(lavin.TEXT), show_label=False, buttons=[], render=False)
        with gr.Column(scale=3):
            turns = gr.Chatbot(label="LaVIN", height="70vh", buttons=["copy"], render_markdown=False)
            box = gr.MultimodalTextbox(file_types=["image"], stop_btn=True, max_plain_text_length=10**6)
            demo = model.vit and Path(DEMO[0]).is_file()  # not from every folder
            examples = [{"text": DEMO[1], "files": [DEMO[0]]}] if demo else None
            ui = gr.ChatInterface(chat, multimodal=True, chatbot=turns, textbox=box, examples=examples,
                                  cache_examples=False, additional_outputs=chart, concurrency_limit=1)
            # gradio 6 takes these steps only after an answer. After an error, too, the history must hold what
            # the page shows, and the box must take the next question.
            unlock = gr.update(interactive=True, submit_btn=True, stop_btn=False)
            for event in [event for event in page.fns.values() if event.name == "_submit_fn"]:
                Dependency(box, {}, event._id, None).failure(
                    lambda shown: (shown, unlock), turns, [ui.chatbot_state, box], api_visibility="private")
        with gr.Column(scale=1, min_width=290, visible=bool(charts)):
            gr.Markdown("Routing weights of LLaMA's layers: w_0 in blue, w_1 in orange. They depend only on "
                        "whether there is an image.")
            chart.render()
    return page


def main() -> None:
    cfg = cli.parse(Config)
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False", no_proxy="*")
    try:
        import gradio  # noqa: F401
    except ImportError:
        sys.exit("web.py needs gradio: pip install -r requirements-web.txt")
    try:
        socket.create_server((cfg.host, cfg.port)).close()  # before the weights are read
    except OSError as e:
        why = (e.strerror or str(e)).partition(" (")[0]
        raise ValueError(f"--host {cfg.host} --port {cfg.port}: {why}; choose another") from None
    device, dtype = cli.pick_device(cfg.device, cfg.dtype)
    model, meta = lavin.load(cfg.adapters, cfg.llama, cfg.clip, device, dtype, cfg.any_base)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # of the uploads, which disappear with it
        page = build_page(model, meta, cfg, Path(folder))
        page.launch(server_name=cfg.host, server_port=cfg.port, share=False, quiet=True, show_error=True,
                    prevent_thread_lock=True, css=NO_SHARE_BUTTON)
        base, dtype = f"{cfg.llama} + {cfg.clip} + {cfg.adapters}", str(dtype).removeprefix("torch.")
        print(f"{base} on {device} in {dtype}; open {page.local_url}, Ctrl-C ends it", file=sys.stderr)
        threading.Event().wait()  # the server runs in other threads


if __name__ == "__main__":
    cli.run(main)
