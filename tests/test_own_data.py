"""Your own data end to end: photos unlike all that this repository draws, and answers in one's own words."""
import json
import math
import random

import published
from conftest import ROOT, run_main
from PIL import Image, ImageDraw, ImageFilter

import evaluate
import sample
import train

QUESTION = "What is this a photo of?"
ANSWERS = {"stripes": "The old garden fence behind our house.",
           "checks": "The kitchen floor of my sister.",
           "waves": "The water near the beach."}
TEXTS = {"Who took the photos?": "My sister did, last summer.", "Where is our house?": "It is near the sea."}


def photo(kind: str, rng: random.Random) -> Image.Image:
    """two gradients, one seen through a mask of stripes, checks or waves; blurred, with a film's grain"""
    w, h = rng.randint(90, 160), rng.randint(90, 160)
    mask = Image.new("L", (w, h))
    draw, n = ImageDraw.Draw(mask), rng.randint(3, 6)
    step = w / n
    if kind == "waves":
        high, long, phase = rng.uniform(0.1, 0.25) * step, rng.uniform(0.25, 0.5) * w, rng.uniform(0, 6)
        wave = [high * math.sin(math.tau * x / long + phase) for x in range(w + 1)]
        for y in range(int(h / step) + 1):
            line = [(x, (y + 0.5) * step + up) for x, up in enumerate(wave)]
            draw.line(line, fill=255, width=int(0.3 * step))
    for x in range(n if kind != "waves" else 0):
        for y in range(int(2 * h / step) + 1):
            left, top = (x + 0.5 * (kind == "checks" and y % 2)) * step, y * step / 2
            draw.rectangle((left, top, left + step / 2, top + step / 2), fill=255)
    ranges = (0, 90), (40, 110), (150, 255), (130, 200)
    tones = [tuple(rng.randint(*bounds) for _ in "rgb") for bounds in ranges]
    if rng.random() < 0.5:
        tones.reverse()
    ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((w, h))
    a, b, c, d = (Image.new("RGB", (w, h), tone) for tone in tones)
    mixed = Image.composite(Image.composite(a, b, ramp), Image.composite(c, d, ramp), mask)
    grain = Image.frombytes("L", (w, h), rng.randbytes(w * h)).convert("RGB")
    return Image.blend(mixed.filter(ImageFilter.GaussianBlur(0.7)), grain, 0.15)


def records(folder, name: str, each: int, seed: int) -> list[dict]:
    """`each` photos of every kind, and the texts"""
    rng, rows = random.Random(seed), []
    for kind, answer in ANSWERS.items():
        for k in range(each):
            file = f"{name} {kind} {k}.{'jpg' if k % 2 else 'png'}"
            photo(kind, rng).save(folder / file)
            rows.append({"instruction": QUESTION, "image": file, "output": answer})
    return rows + [{"instruction": q, "output": a} for q, a in TEXTS.items()]


def test_photos_and_a_json_file_become_adapters_an_answer_and_a_score(tmp_path, monkeypatch, capsys):
    """The scored photos are not among those of the training. Guessing is right on a third of them."""
    monkeypatch.chdir(ROOT)
    photos = tmp_path / "photos"
    photos.mkdir()
    mine = published.put(tmp_path / "mine.json", records(photos, "train", each=12, seed=0))
    test = published.put(tmp_path / "test.json", records(photos, "test", each=5, seed=1))
    run_main(monkeypatch, train.main, "--data", f"json:{mine}:{photos}", "--out", tmp_path / "out",
             "--epochs", 40, "--batch_size", 16, "--micro_batch", 16, "--lr", 0.2)
    told = capsys.readouterr().err
    assert "38 kept, 0 cut, 0 dropped, 36 with an image" in told
    assert "120 steps, 3 an epoch, 0 for warm-up" in told
    model = "--adapters", tmp_path / "out/adapters.safetensors"
    run_main(monkeypatch, evaluate.main, "json", "--data", test, "--images", photos, *model, "--json")
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert counts["without"][1:] == [2, 2] and counts["with a picture"][1:] == [15, 15], counts
    assert counts["with a picture"][0] >= 12
    run_main(monkeypatch, sample.main, *model, "--image", photos / "test waves 0.png", "--prompt", QUESTION)
    assert capsys.readouterr().out.strip() in ANSWERS.values()
