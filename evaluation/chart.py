"""Line and bar charts, drawn with Pillow: enough for a training curve and for the experiments."""
import io
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw

from official.saving import write_atomically

# blue, orange, green, red, each followed by a light shade of it
COLORS = ((66, 99, 180), (160, 180, 225), (226, 150, 66), (244, 205, 160), (70, 140, 80), (165, 210, 170),
          (190, 60, 60), (230, 165, 165))
WIDTH, HEIGHT, MARGIN, ROW, GREY = 560, 320, 50, 20, (210, 210, 210)


def save(image: Image.Image, path: str | Path) -> None:
    """Write a PNG, whole or not at all."""
    content = io.BytesIO()
    image.save(content, "PNG")
    write_atomically(Path(path), content.getvalue())


def canvas(height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 6), title, fill="black")
    return image, draw


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(step * k for k in (1, 2, 5, 10, 20) if (high - low) / (step * k) <= 5.5)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def lines(path: Path, series: dict[str, list[tuple[float, float]]], title: str, x: str = "step",
          span: tuple[float, float] | None = None) -> None:
    """Write a PNG with one line per series, {name: [(x, y), ..]}, x increasing.

    span: lowest and highest y; by default those of the points. ValueError if there is no finite point.
    """
    series = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    points = [p for line in series.values() for p in line]
    if not points:
        raise ValueError(f"{path}: nothing to draw; expected at least one finite point")
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    low, high = span or (min(p[1] for p in points), max(p[1] for p in points))
    right, high = max(right, left + 1e-9), max(high, low + 1e-9)  # a single point, or a constant
    legend = 8 + max(ImageDraw.Draw(Image.new("1", (1, 1))).textlength(name) for name in series)
    width, height = WIDTH - MARGIN - legend - 8, HEIGHT - 2 * MARGIN

    def pixel(p: tuple[float, float]) -> tuple[float, float]:
        up = (min(max(p[1], low), high) - low) / (high - low)
        return MARGIN + width * (p[0] - left) / (right - left), MARGIN + height * (1 - up)

    image, draw = canvas(HEIGHT, title)
    for y in ticks(low, high):
        draw.line((pixel((left, y)), pixel((right, y))), fill=GREY)
        draw.text((MARGIN - 6, pixel((left, y))[1]), f"{y:g}", fill="black", anchor="rm")
    for value in ticks(left, right):
        draw.text((pixel((value, low))[0], HEIGHT - MARGIN + 4), f"{value:g}", fill="black", anchor="ma")
    draw.text((MARGIN + width / 2, HEIGHT - MARGIN + 20), x, fill="black", anchor="ma")
    names, free = sorted((n for n in series if series[n]), key=lambda n: -series[n][-1][1]), MARGIN - ROW
    for name in names:  # from top to bottom; a name moves down if it would cover the one above
        color = COLORS[list(series).index(name) % len(COLORS)]
        draw.line([pixel(p) for p in series[name]], fill=color, width=2, joint="curve")
        free = max(free + 13, pixel(series[name][-1])[1])
        draw.text((MARGIN + width + 8, free), name, fill=color, anchor="lm")
    save(image, path)


def bars(path: Path, rows: dict[str, tuple[float, float]], title: str, top: float = 100.0) -> None:
    """Write a PNG with one horizontal bar per row, {label: (value, standard error)}. top: a full bar."""
    image, draw = canvas(ROW * (len(rows) + 2), title)
    left = 16 + max(draw.textlength(label) for label in rows)
    width = WIDTH - left - 90
    for i, (label, (value, error)) in enumerate(rows.items()):
        y, end = ROW * (i + 1.5), left + width * max(0.0, value) / top
        draw.text((8, y + 4), label, fill="black")
        draw.rectangle((left, y + 2, end, y + ROW - 4), fill=COLORS[0])
        draw.line((end - width * error / top, y + 8, end + width * error / top, y + 8), fill="black", width=2)
        draw.text((left + width + 12, y + 4), f"{value:.1f} ± {error:.1f}", fill="black")
    save(image, path)


def curve(log: Path) -> Path:
    """Read a run's log.jsonl; write its losses as curve.png into the same folder. Return the file."""
    file = log.with_name("curve.png")
    rows = [json.loads(row) for row in log.read_text().splitlines()]
    points = [(row["step"], row["loss"]) for row in rows]
    if points:  # not if the log was deleted and a finished run is resumed
        lines(file, {"loss": points}, "loss, mean of each interval of the log")
    return file
