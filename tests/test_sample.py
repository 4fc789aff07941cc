"""Talking to the embedded model: answers on stdout, everything else on stderr, a mistake is one line."""
import io
import sys

import pytest
from PIL import Image

import cli
import evaluate
import sample
from conftest import ROOT


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
    assert out == "The circle is red. The answer is C.\n"
    assert "tokens/s" in err and "tiny/demo.png" in err


def test_text_with_and_without_options(ask):
    assert ask("--prompt", "What is the opposite of cold? (A) wet (B) old (C) hot")[0] == "The opposite of cold is hot. The answer is C.\n"
    assert ask("--prompt", "What is the capital of France?")[0].startswith("The capital of France is Paris.")


def test_own_picture(ask, tmp_path):
    from PIL import ImageDraw
    image = Image.new("RGB", (200, 160), (250, 250, 245))
    ImageDraw.Draw(image).rectangle((20, 40, 90, 110), fill=(40, 80, 220))
    image.save(tmp_path / "x.jpg")
    assert ask("--image", tmp_path / "x.jpg", "--prompt", "What color is the square?")[0].startswith("The square is blue.")


def test_chat_keeps_the_picture(ask):
    out, _ = ask("--chat", "--image", "tiny/demo.png", stdin="What color is the circle?\nWhat color is the square?\n\n")
    first, second = out.splitlines()
    assert first.startswith("The circle is red.") and second.startswith("The square is blue.")


def test_mistakes_are_one_line(ask, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "text.jpg").write_text("no picture")

    def message(*argv):
        with pytest.raises(SystemExit) as e:
            ask(*argv)
        text = str(e.value.code)
        assert "\n" not in text and text not in ("0", "None")
        return text

    assert "none.png: no such picture" in message("--image", tmp_path / "none.png", "--prompt", "What?")
    assert "broken.png: not a readable picture" in message("--image", tmp_path / "broken.png", "--prompt", "What?")
    assert "text.jpg: not a readable picture" in message("--image", tmp_path / "text.jpg", "--prompt", "What?")
    assert "the prompt is empty" in message("--prompt", "  ")
    assert "the prompt is empty" in message("--image", "tiny/demo.png")
    assert "context holds" in message("--prompt", "What color is the circle? " * 100)
    assert "no such adapter file" in message("--prompt", "What?", "--adapters", tmp_path / "none.safetensors")
    assert "not LaVIN adapters" in message("--prompt", "What?", "--adapters", "tiny/llama/model.safetensors")
    assert "no such folder of LLaMA weights" in message("--prompt", "What?", "--llama", tmp_path)
    assert message("--promt", "What?") == "2"


def test_evaluate_writes_predictions_and_scores(ask, tmp_path):
    from tiny import world
    world.write(tmp_path, seed=7, sizes={"test": 24, "val": 2, "train": 2})
    out, _ = ask("--data", tmp_path, "--predictions", tmp_path / "p.json", main=evaluate.main)
    assert out.split()[:9] == list(evaluate.COLUMNS) and (tmp_path / "p.json").is_file()
