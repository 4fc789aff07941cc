"""Talking to the embedded model: answers go to stdout, all else to stderr, and a mistake is one line."""
import io
import sys

import pytest
from conftest import ROOT, run_main
from PIL import Image, ImageDraw

import lavin
import prompts
import sample
from evaluation import conversation
from official import tokenizer
from speed import machine


@pytest.fixture
def ask(monkeypatch, capsys):
    """run sample.py in its folder -> (stdout, stderr)"""
    def call(*argv, stdin=""):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        run_main(monkeypatch, sample.main, *argv)
        return capsys.readouterr()
    return call


OPPOSITE = "What is the opposite of hot? (A) wet (B) old (C) cold"


def test_demo(ask):
    out, err = ask()
    assert out.endswith(" The circle is red. The answer is C.\n")
    assert "tokens/s" in err and "tiny/demo.png" in err


def test_bandwidth_is_reported_for_the_tokens_after_the_first(ask, monkeypatch):
    ticks = iter(range(10 ** 6))
    err = ask("--max_new_tokens", 1)[1]
    assert "[1 tokens in" in err and "GB/s" not in err
    monkeypatch.setattr(machine, "bandwidth", lambda device, tries: (1e7, 2e7))
    monkeypatch.setattr(machine.Meter, "limits", {})
    monkeypatch.setattr(machine.time, "perf_counter", lambda: float(next(ticks)))  # one second per token
    err = ask()[1]
    told = "after the first token 0.01 GB/s of weights and cache, 26% of the memory bandwidth"
    assert told in err  # 5.2 of 20 MB/s


def test_routing_in_bf16(ask):
    """as on every GPU; the routers are stored in fp32"""
    assert "layer" in ask("--routing", "--dtype", "bf16")[0]
    (ROOT / "routing.png").unlink()


def test_text_with_and_without_options(ask):
    assert ask("--prompt", OPPOSITE)[0] == "The opposite of hot is cold. The answer is C.\n"
    assert ask("--prompt", "What is the capital of France?")[0].startswith("The capital of France is Paris.")


def test_own_picture(ask, tmp_path):
    image = Image.new("RGB", (200, 160), (250, 250, 245))
    ImageDraw.Draw(image).rectangle((20, 40, 90, 110), fill=(40, 80, 220))
    image.save(tmp_path / "x.jpg")
    out, _ = ask("--image", tmp_path / "x.jpg", "--prompt", "What color is the square?")
    assert out.endswith(" The square is blue.\n")


def test_five_options_are_recognised():
    talk = object.__new__(conversation.Conversation)  # without a model
    talk.meta = {"format": "QCM-A"}
    prompt = talk.wrap("Which one? (A) a (B) b (C) c (D) d(E)e", "a hint")
    assert prompt == prompts.build_prompt("Which one?", "a hint", list("abcde"), "QCM-A")


def test_chat_keeps_picture_and_history(ask, monkeypatch):
    batches, batch = [], conversation.Conversation.batch

    def spy(*args):
        batches.append(batch(*args))
        return batches[-1]

    monkeypatch.setattr(conversation.Conversation, "batch", spy)
    out, _ = ask("--chat", "--image", "tiny/demo.png",
                 stdin="What color is the circle?\nSeen from the circle, where is the square?\n\n")
    first, second = (b.tokens.tolist() for b in batches)
    assert second[:len(first)] == first
    answered = second[len(first):]
    assert out.splitlines()[0].endswith(" The circle is red.")
    assert len(answered) > 10 and 2 in answered  # the first answer with its EOS
    assert len(out.splitlines()) == 2


def test_chat_encodes_a_picture_once(ask, monkeypatch):
    calls, encode = [], lavin.VisionTransformer.forward
    monkeypatch.setattr(lavin.VisionTransformer, "forward", lambda *a: calls.append(1) or encode(*a))
    questions = "What color is the circle?\n" * 3
    out, _ = ask("--chat", "--image", "tiny/demo.png",
                 stdin=f"{questions}/reset\n{questions}/image tiny/demo.png\n{questions}")
    lines = out.splitlines()
    assert len(calls) == 2  # once for each time the picture is given
    assert lines[0].endswith(" The circle is red.") and lines[:3] == lines[3:6] == lines[6:]


def test_chat_commands(ask, tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "blank.png")
    typed = ("What is the capital of France?", f"/image {tmp_path / 'none.png'}",
             f"/image {tmp_path / 'blank.png'}", "/jump", "/reset", "/image tiny/demo.png",
             "What color is the circle?", "")
    out, err = ask("--chat", stdin="\n".join(typed))
    assert out.splitlines()[0].startswith("The capital of France is Paris.")
    assert out.splitlines()[1].endswith(" The circle is red.")
    assert "none.png: no such image file" in err
    assert "unknown command /jump; known: /image PATH, /reset" in err


def test_a_question_that_is_too_long_does_not_enter_the_history(ask):
    out, err = ask("--chat", stdin=f"{OPPOSITE}\n{'word ' * 300}\n{OPPOSITE}\n")
    assert len(out.splitlines()) == 2
    assert "the context holds 256, answer included" in err and "forgotten" not in err


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(ask):
    out, err = ask("--chat", stdin=(OPPOSITE + "\n") * 14)
    lines = out.splitlines()
    assert len(lines) == 14 and lines[0] == "The opposite of hot is cold. The answer is C."
    assert "oldest turns are forgotten" in err


def test_ctrl_c_stops_the_answer_not_the_chat(ask, monkeypatch):
    stream, calls = tokenizer.Tokenizer.stream, []

    def interrupted(self, ids):
        calls.append(1)
        for i, piece in enumerate(stream(self, ids)):
            if len(calls) == 1 and i == 3:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(tokenizer.Tokenizer, "stream", interrupted)
    out, _ = ask("--chat", stdin="What is the capital of France?\nWhat is the capital of Italy?\n")
    lines = out.splitlines()
    assert lines[0] == "The capital of" and lines[1].startswith("The capital of Italy is Rome.")


def test_routing_weights_are_printed_and_plotted(ask):
    out, err = ask("--routing")
    rows = out.splitlines()[1:]
    assert len(rows) == 5 and "wrote routing.png" in err
    numbers = [[float(x) for x in row.split() if x[0] in "01" and "." in x] for row in rows]
    assert all(abs(n[0] + n[1] - 1) < 2e-3 and abs(n[2] + n[3] - 1) < 2e-3 for n in numbers)
    assert Image.open(ROOT / "routing.png").size[1] == 7 * 18
    (ROOT / "routing.png").unlink()


def test_mistakes_are_one_line(ask, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "text.jpg").write_text("no picture")

    def message(*argv):
        with pytest.raises(SystemExit) as e:
            ask(*argv)
        text = str(e.value.code)
        assert "\n" not in text and text not in ("0", "None")
        return text

    what = "--prompt", "What?"
    assert "none.png: no such image file" in message(*what, "--image", tmp_path / "none.png")
    assert "broken.png: not a readable image" in message(*what, "--image", tmp_path / "broken.png")
    assert "text.jpg: not a readable image" in message(*what, "--image", tmp_path / "text.jpg")
    assert message("--prompt", "  ") == message("--prompt", "") == "2"
    assert "no question; give --prompt" in message("--image", "tiny/demo.png")
    assert "context holds" in message("--prompt", "What color is the circle? " * 100)
    assert "no such adapter file" in message(*what, "--adapters", tmp_path / "none.safetensors")
    assert "without LaVIN adapters" in message(*what, "--adapters", "tiny/llama/model.safetensors")
    assert "no such folder of LLaMA weights" in message(*what, "--llama", tmp_path)
    assert message("--promt", "What?") == "2"
