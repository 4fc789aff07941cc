"""Talking to the embedded model: answers on stdout, everything else on stderr, a mistake is one line."""
import io
import sys

import pytest
from conftest import ROOT
from PIL import Image

import cli
import lavin
import sample
from evaluation import conversation
from official import tokenizer
from speed import machine


@pytest.fixture
def ask(monkeypatch, capsys):
    """call sample.py in its folder -> (stdout, stderr)"""
    def call(*argv, stdin="", main=sample.main):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, argv)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        cli.run(main)
        return capsys.readouterr()
    return call


def test_demo(ask):
    out, err = ask()
    assert out.endswith(" The circle is red. The answer is C.\n")
    assert "tokens/s" in err and "tiny/demo.png" in err


def test_bandwidth_is_told_of_the_tokens_after_the_first(ask, monkeypatch):
    ticks = iter(range(10 ** 6))
    err = ask("--max_new_tokens", 1)[1]
    assert "[1 tokens in" in err and "GB/s" not in err
    monkeypatch.setattr(machine, "bandwidth", lambda device, tries: (1e7, 2e7))
    monkeypatch.setattr(machine.Meter, "limits", {})
    monkeypatch.setattr(machine.time, "perf_counter", lambda: float(next(ticks)))  # a second a token
    err = ask()[1]
    assert "after the first token 0.00 GB/s of weights and cache, 20% of the memory bandwidth" in err  # 4.2 MB of 20


def test_text_with_and_without_options(ask):
    assert ask("--prompt", "What is the opposite of hot? (A) wet (B) old (C) cold")[0] == "The opposite of hot is cold. The answer is C.\n"
    assert ask("--prompt", "What is the capital of France?")[0].startswith("The capital of France is Paris.")


def test_own_picture(ask, tmp_path):
    from PIL import ImageDraw
    image = Image.new("RGB", (200, 160), (250, 250, 245))
    ImageDraw.Draw(image).rectangle((20, 40, 90, 110), fill=(40, 80, 220))
    image.save(tmp_path / "x.jpg")
    assert ask("--image", tmp_path / "x.jpg", "--prompt", "What color is the square?")[0].endswith(" The square is blue.\n")


def test_chat_keeps_picture_and_history(ask, monkeypatch):
    seen = []
    batch = conversation.Conversation.batch
    monkeypatch.setattr(conversation.Conversation, "batch", lambda *a: seen.append(batch(*a)) or seen[-1])
    out, _ = ask("--chat", "--image", "tiny/demo.png", stdin="What color is the circle?\nSeen from the circle, where is the square?\n\n")
    first, second = seen
    first, second = (b.tokens.tolist() for b in (first, second))
    assert second[:len(first)] == first
    answered = second[len(first):]
    assert out.splitlines()[0].endswith(" The circle is red.") and len(answered) > 10 and 2 in answered  # its EOS
    assert len(out.splitlines()) == 2


def test_chat_looks_at_a_picture_once(ask, monkeypatch):
    looked, look = [], lavin.LaVIN.encode_images
    monkeypatch.setattr(lavin.LaVIN, "encode_images", lambda *a: looked.append(1) or look(*a))
    questions = "What color is the circle?\n" * 3
    out, _ = ask("--chat", "--image", "tiny/demo.png", stdin=f"{questions}/reset\n{questions}/image tiny/demo.png\n{questions}")
    lines = out.splitlines()
    assert len(looked) == 2 and lines[0].endswith(" The circle is red.") and lines[:3] == lines[3:6] == lines[6:]


def test_chat_commands(ask, tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "blank.png")
    out, err = ask("--chat", stdin=f"What is the capital of France?\n/image {tmp_path / 'none.png'}\n/image {tmp_path / 'blank.png'}\n"
                   "/jump\n/reset\n/image tiny/demo.png\nWhat color is the circle?\n")
    assert out.splitlines()[0].startswith("The capital of France is Paris.")
    assert out.splitlines()[1].endswith(" The circle is red.")
    assert "none.png: no such image file" in err and "unknown command /jump; known: /image PATH, /reset" in err


def test_a_question_too_long_costs_no_turn(ask):
    question = "What is the opposite of hot? (A) wet (B) old (C) cold"
    out, err = ask("--chat", stdin=f"{question}\n{'word ' * 300}\n{question}\n")
    assert len(out.splitlines()) == 2 and "the context holds 256, answer included" in err and "forgotten" not in err


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(ask):
    question = "What is the opposite of hot? (A) wet (B) old (C) cold"
    out, err = ask("--chat", stdin=(question + "\n") * 14)
    assert len(out.splitlines()) == 14 and out.splitlines()[0] == "The opposite of hot is cold. The answer is C."
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
    assert out.splitlines()[0] == "The capital of" and out.splitlines()[1].startswith("The capital of Italy is Rome.")


def test_routing_is_shown(ask, monkeypatch, tmp_path):
    out, err = ask("--routing")
    rows = out.splitlines()[1:]
    assert len(rows) == 4 and "wrote routing.png" in err
    numbers = [[float(x) for x in row.split() if x[0] in "01" and "." in x] for row in rows]
    assert all(abs(n[0] + n[1] - 1) < 2e-3 and abs(n[2] + n[3] - 1) < 2e-3 for n in numbers)
    assert Image.open(ROOT / "routing.png").size[1] == 6 * 18
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

    assert "none.png: no such image file" in message("--image", tmp_path / "none.png", "--prompt", "What?")
    assert "broken.png: not a readable image" in message("--image", tmp_path / "broken.png", "--prompt", "What?")
    assert "text.jpg: not a readable image" in message("--image", tmp_path / "text.jpg", "--prompt", "What?")
    assert "the prompt is empty" in message("--prompt", "  ")
    assert "the prompt is empty" in message("--image", "tiny/demo.png")
    assert "context holds" in message("--prompt", "What color is the circle? " * 100)
    assert "no such adapter file" in message("--prompt", "What?", "--adapters", tmp_path / "none.safetensors")
    assert "without LaVIN adapters" in message("--prompt", "What?", "--adapters", "tiny/llama/model.safetensors")
    assert "no such folder of LLaMA weights" in message("--prompt", "What?", "--llama", tmp_path)
    assert message("--promt", "What?") == "2"
