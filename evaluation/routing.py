"""Draw LLaMA's routing weights: one pair of bars per layer, for text input and for image input."""
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from evaluation import chart
from lavin import IMAGE, TEXT, LaVIN

BLUE, ORANGE = chart.COLORS[0], chart.COLORS[2]


def table(w: torch.Tensor) -> str:
    """w [L, 2, 2] of `LaVIN.routing_weights` -> one line per layer"""
    lines = ["layer   text: w_0 w_1                        image: w_0 w_1"]
    for i, layer in enumerate(w.tolist()):
        bars = [f"{w0:.3f} {'#' * round(20 * w0):.<20} {w1:.3f}" for w0, w1 in layer]
        lines.append(f"{i:>5}   " + "    ".join(bars))
    return "\n".join(lines)


def picture(w: torch.Tensor, file: Path, modalities: tuple[int, ...] = (TEXT, IMAGE)) -> None:
    """Write the same as a PNG, or the half of one modality."""
    row, left, width = 18, 60, 200
    image = Image.new("RGB", (left + len(modalities) * (width + 20), (len(w) + 2) * row), "white")
    draw = ImageDraw.Draw(image)
    for column, k in enumerate(modalities):
        x = left + column * (width + 20)
        draw.text((x, 4), f"{'image' if k == IMAGE else 'text'} input: w_0 | w_1", fill="black")
        for i, (w0, _) in enumerate(w[:, k].tolist()):
            y = (i + 1) * row
            draw.text((4, y + 2), f"layer {i}", fill="black")
            draw.rectangle((x, y + 2, x + width * w0, y + row - 3), fill=BLUE)
            draw.rectangle((x + width * w0, y + 2, x + width, y + row - 3), fill=ORANGE)
    chart.save(image, file)


def show_routing(model: LaVIN, file: Path) -> None:
    """Print the weights and draw them; ValueError if the adapters have no router."""
    with model.autocast():
        w = model.routing_weights()
    if w is None:
        raise ValueError("these adapters have no router (trained with --adapter rep)")
    w = w.detach().float().cpu()
    print(table(w))
    picture(w, file)
    print(f"wrote {file}", file=sys.stderr)


def pictures(model: LaVIN, folder: Path) -> dict[int, Path]:
    """Draw the weights of TEXT and of IMAGE into a file each; {} if the adapters have no router."""
    with model.autocast():
        w = model.routing_weights()
    if w is None:
        return {}
    files = {modality: folder / f"routing_{modality}.png" for modality in (TEXT, IMAGE)}
    for modality, file in files.items():
        picture(w, file, (modality,))
    return files
