"""The figure of the architecture says what the modules are."""
import json
import re

import pytest
from conftest import ROOT
from PIL import Image, ImageFont

import adapters
from evaluation import architecture
from evaluation.architecture import FROZEN, SCALE, TRAINED, Config, Figure

SIZES = [("7B", "ViT-L/14"), ("13B", "ViT-B/16"), ("tiny", "tiny")]


def texts_of(llama: str, clip: str) -> list[str]:
    cfg = Config(llama, clip)
    return architecture.draw(architecture.build(cfg), cfg).texts


def test_it_shows_the_paper_s_counts():
    texts = texts_of("7B", "ViT-L/14")
    for text in ("32 x 81,930", "24 x 20,490", "659,584", "8,192", "3,781,296", "6,738,415,616 frozen",
                 "[2, 4096]", "X [6, 1024]", "4", "24", *(f"Eq. ({n})" for n in range(1, 9))):
        assert text in texts, text
    assert texts.count("X'") == 6


def test_it_shows_what_another_model_has():
    model = architecture.build(Config("tiny", "tiny"))
    texts = texts_of("tiny", "tiny")
    trained = sum(p.numel() for p in adapters.trainable(model).values())
    everything = sum(p.numel() for p in model.parameters())
    assert f"{trained:,}" in texts and f"{100 * trained / everything:.3f}% of {everything:,}" in texts
    assert f"5 x {sum(p.numel() for p in model.llama.layers[0].adapter_attn.parameters()):,}" in texts
    assert "0" not in texts  # what a path without parameters would show
    assert not re.search(r"\d,\d{3}", (ROOT / "evaluation/architecture.py").read_text()), "a typed count"


def test_colours_follow_requires_grad():
    fig = Figure(architecture.build(Config("tiny", "tiny")))
    path, trained = "llama.layers.0.attention", fig.count("", trained=True)
    assert fig.colors(path) == FROZEN and fig.colors("llama.layers.0.adapter_attn") == TRAINED
    fig.model.get_submodule(path).requires_grad_(True)
    assert fig.colors(path) == TRAINED
    assert fig.count("", trained=True) == trained + fig.count(path)


def test_the_stored_picture_is_of_this_model():
    """Its texts are equal; its pixels may differ between versions of Pillow."""
    file = ROOT / "tiny/architecture.png"
    assert file.stat().st_size <= 150_000
    with Image.open(file) as image:
        texts = json.loads(image.text["texts"])
    assert texts == texts_of("7B", "ViT-L/14"), "run python -m evaluation.architecture"


@pytest.mark.parametrize("sizes", SIZES, ids="+".join)
def test_no_text_covers_another_or_leaves_the_picture(monkeypatch, sizes):
    drawn, text = [], Figure.text

    def noted(self, x, y, words, anchor="mm", size=15, bold=False):
        font = ImageFont.load_default(SCALE * size)
        left, top, right, bottom = self.draw.textbbox((SCALE * x, SCALE * y), words, font, anchor)
        assert 0 <= left < right < self.image.width and 0 <= top < bottom < self.image.height, words
        for other, (l, t, r, b) in drawn:
            assert right < l or r < left or bottom < t or b < top, f"{words} covers {other}"
        drawn.append((words, (left, top, right, bottom)))
        text(self, x, y, words, anchor, size, bold)

    monkeypatch.setattr(Figure, "text", noted)
    texts_of(*sizes)
    assert len(drawn) > 100
