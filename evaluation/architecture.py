"""Draw LaVIN's architecture. Names, shapes, counts and colors come from the modules themselves.

    python -m evaluation.architecture            # writes tiny/architecture.png
    python -m evaluation.architecture --llama 13B --out 13B.png

The model is built on torch's `meta` device. There a tensor has a shape but no values, so 7B needs no memory.
The PNG also holds its texts, as metadata: a test compares them with those that the present modules give.
Positions and sizes are in units of SCALE pixels, so that the picture is sharp; y grows downwards.
"""
import io
import json
from dataclasses import dataclass
from pathlib import Path

import cli

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

import clip
import llama
from adapters import MMAdapter
from lavin import LaVIN, LaVINConfig
from official.saving import write_atomically

WIDTH, HEIGHT, SCALE = 1200, 940, 2
LABELS = {"f_w": "W_m, b_m"}  # what the module f_w holds
INK, LINE, WHITE, PALE, EQUATION = (36, 40, 48), (120, 128, 142), (255,) * 3, (249, 250, 253), (160, 40, 80)
# fill and outline of a box
FROZEN, TRAINED, OTHER = ((226, 235, 248), (96, 130, 190)), ((255, 230, 197), (222, 132, 30)), (WHITE, LINE)
LLAMA, VIT = "llama.layers", "vit.transformer.resblocks"


@dataclass
class Config:
    """Draw LaVIN's architecture from its modules."""
    llama: str = "7B"  # size of LLaMA: 7B, 13B or tiny
    clip: str = "ViT-L/14"  # size of the ViT: ViT-L/14, ViT-B/16 or tiny
    out: str = "tiny/architecture.png"  # the PNG


def build(cfg: Config) -> LaVIN:
    """The model, without values; ValueError lists the known sizes."""
    for flag, size, known in ("llama", cfg.llama, llama.PRESETS), ("clip", cfg.clip, clip.PRESETS):
        if size not in known:
            raise ValueError(f"unknown --{flag} {size!r}; known: {', '.join(known)}")
    with torch.device("meta"):
        language, vit = llama.LLaMA(llama.PRESETS[cfg.llama]), clip.VisionTransformer(clip.PRESETS[cfg.clip])
        return LaVIN(language, vit, LaVINConfig())


class Figure:
    """A picture of a model, and the few shapes that it needs. A path is the name of a module or parameter."""

    def __init__(self, model: LaVIN):
        self.model, self.texts = model, []
        self.image = Image.new("RGB", (SCALE * WIDTH, SCALE * HEIGHT), WHITE)
        self.draw = ImageDraw.Draw(self.image)

    def parameters(self, path: str) -> list[torch.nn.Parameter]:
        """The parameters at or below a path; "" is the whole model."""
        named = self.model.named_parameters()
        return [p for name, p in named if not path or f"{name}.".startswith(f"{path}.")]

    def count(self, path: str, trained: bool | None = None) -> int:
        """The number of all parameters, of those that train, or of those that do not."""
        return sum(p.numel() for p in self.parameters(path) if trained in (None, p.requires_grad))

    def shapes(self, path: str) -> str:
        shapes = [list(p.shape) for p in self.parameters(path)]
        if isinstance(self.model.get_submodule(path.rpartition(".")[0]), MMAdapter) and "phi_u" in path:
            d, r = shapes[0]  # GroupedLinear: two matrices
            return f"2 x {[d // 2, r]} + {shapes[1]}"
        return " + ".join(map(str, shapes))

    def colors(self, path: str) -> tuple:
        """By requires_grad; OTHER if there is no parameter."""
        parameters = self.parameters(path)
        trained = all(p.requires_grad for p in parameters)
        return (TRAINED if trained else FROZEN) if parameters else OTHER

    def text(self, x, y, text: str, anchor="mm", size=15, bold=False):
        font, color = ImageFont.load_default(SCALE * size), EQUATION if text.startswith("Eq.") else INK
        for shift in range(1 + bold):  # Pillow brings no bold font: draw twice, one pixel apart
            self.draw.text((SCALE * x + shift, SCALE * y), text, color, font, anchor)
        self.texts.append(text)

    def row(self, y, left: str, right: str, middle="", bold=False, title=False):
        """A row of the middle column."""
        self.text(330, y, left, "lm", 18 if title else 15, bold or title)
        if middle:
            self.text(650, y, middle, "rm", bold=bold)
        self.text(870, y, right, "rm", bold=bold)

    def box(self, x, y, width, height, *lines: str, colors=OTHER, radius=6):
        """A box with its upper left corner at (x, y). The first of several lines is bold."""
        corners = [SCALE * v for v in (x, y, x + width, y + height)]
        self.draw.rounded_rectangle(corners, SCALE * radius, *colors, width=3)
        for i, line in enumerate(lines):
            shift = 18 * (i - (len(lines) - 1) / 2)
            self.text(x + width / 2, y + height / 2 + shift, line, bold=i == 0 and len(lines) > 1)

    def part(self, x, y, width, height, path: str):
        """The box of a module or parameter: name, shapes and count, as far as the height allows."""
        name, count = path.split(".")[-1], f"{self.count(path):,}"
        lines = [name, self.shapes(path), count] if height > 50 else [name, count]
        lines = lines if height > 40 else [f"{name}  {count}"]
        self.box(x, y, width, height, *lines, colors=self.colors(path))

    def arrow(self, *points, color=LINE, head=True):
        """A line through these points. Its last piece, horizontal or vertical, ends in an arrowhead."""
        self.draw.line([(SCALE * x, SCALE * y) for x, y in points], color, width=4, joint="curve")
        (x0, y0), (x, y) = points[-2:]
        a, b = 8 * ((x > x0) - (x < x0)), 8 * ((y > y0) - (y < y0))  # the direction of the last piece
        if head:
            tip = (x, y), (x - a + b / 2, y - b + a / 2), (x - a - b / 2, y - b - a / 2)
            self.draw.polygon([(SCALE * v, SCALE * w) for v, w in tip], color)

    def stack(self, x, y, down: int, paths: list[str], height=46) -> float:
        """Arrows to boxes, downwards (down = 1) or upwards (-1), from (x, y); return the y where they end."""
        for path in paths:
            h = 28 if "norm" in path or "ln_" in path else height
            self.arrow((x, y), (x, y + 14 * down))
            y += (14 + h) * down
            self.part(x - 88, min(y, y - h * down), 176, h, path)
        return y

    def chain(self, x, y, path: str, *names: str, gap=24) -> float:
        """Arrows to boxes, to the right from (x, y): modules of `path`, and operations; return the last x."""
        for name in names:
            label = LABELS.get(name, name)
            width = max(28, 20 + self.draw.textlength(label, ImageFont.load_default(15)))
            colors = self.colors(f"{path}.{name}")
            self.arrow((x, y), (x + gap, y))
            self.box(x + gap, y - 14, width, 28, label, colors=colors, radius=14 if colors == OTHER else 6)
            x += gap + width
        return x

    def png(self) -> bytes:
        """The picture in 64 colours, with its texts."""
        info, content = PngImagePlugin.PngInfo(), io.BytesIO()
        info.add_text("texts", json.dumps(self.texts))
        self.image.quantize(64, dither=Image.Dither.NONE).save(content, "PNG", optimize=True, pnginfo=info)
        return content.getvalue()


def draw_block(fig: Figure, blocks: str, halves: list[str], x, y, down: int) -> float:
    """One transformer block from y downwards or upwards: twice some modules, then the residual is added."""
    fig.box(x - 120, min(y, y + 350 * down), 240, 350, radius=10)
    fig.text(x + 98 * down, y + 332 * down, f"x {len(fig.model.get_submodule(blocks))}", size=18, bold=True)
    for half in halves:
        branch, side = y + 7 * down, x - 106 * down
        y = fig.stack(x, y, down, [f"{blocks}.0.{name}" for name in half.split()])
        plus = y + 25 * down
        fig.arrow((x, y), (x, plus - 11 * down))
        fig.arrow((x, branch), (side, branch), (side, plus), (x - 11 * down, plus))
        fig.box(x - 11, plus - 11, 22, 22, "+", radius=11)
        y = plus + 11 * down
    return y


def draw_models(fig: Figure, cfg: Config) -> None:
    """At the left the ViT, from top to bottom; at the right LLaMA, from bottom to top."""
    vit, n = fig.model.vit.cfg, fig.model.vit.n_visual
    for x, name, path in (150, f"CLIP {cfg.clip}", "vit"), (1050, f"LLaMA {cfg.llama}", "llama"):
        fig.box(x - 130, 60, 260, 684, colors=(PALE, FROZEN[1]), radius=12)
        fig.text(x, 84, name, size=18, bold=True)
        fig.text(x, 107, f"{fig.count(path, trained=False):,} frozen")
    fig.text(150, 138, f"image [3, {vit.image_size}, {vit.image_size}]")
    y = fig.stack(150, 149, 1, ["vit.conv1", "vit.positional_embedding"], height=58)
    fig.arrow((150, y), (150, y + 14), head=False)
    y = draw_block(fig, VIT, ["ln_1 adapter_attn attn", "ln_2 mlp"], 150, y + 14, 1)
    fig.arrow((150, y), (150, 680))
    for i in range(n):
        fig.box(153 + 37 * (i - n / 2), 680, 31, 26, f"{(i + 1) * vit.cls_every}", radius=4)
    fig.text(150, 725, "[cls] after these blocks")

    halves = ["attention_norm adapter_attn attention", "ffn_norm feed_forward"]
    y = draw_block(fig, LLAMA, halves, 1050, 714, -1)
    y = fig.stack(1050, y - 14, -1, ["llama.norm", "llama.output"], height=58)
    fig.arrow((1050, y), (1050, y - 14))
    fig.text(1050, y - 28, "log p(R_s | Z, R_0:s-1)")
    for y, n, use in (158, 5, "training: the loss"), (180, 8, "answering: the next R_s"):
        fig.text(940, y, use, "lm")
        fig.text(1160, y, f"Eq. ({n})", "rm")


def draw_sum(fig: Figure) -> None:
    """The middle, first panel: what trains."""
    fig.box(310, 60, 580, 162, colors=(WHITE, TRAINED[1]), radius=12)
    fig.row(84, "Only these parameters train", "Eq. (4)", title=True)
    y = 111
    for name, blocks in ("MM-Adapters in LLaMA", LLAMA), ("MM-Adapters in the ViT", VIT):
        layers, n = len(fig.model.get_submodule(blocks)), fig.count(f"{blocks}.0.adapter_attn")
        fig.row(y, name, f"{layers * n:,}", f"{layers} x {n:,}")
        y += 22
    fig.row(y, "neck", f"{fig.count('adapter_proj'):,}")
    fig.row(y + 22, "modality embedding E_m", f"{fig.count('adapter_modality_embedding'):,}")
    fig.arrow((330, y + 35), (870, y + 35), head=False)
    trained, frozen = fig.count("", trained=True), fig.count("", trained=False)
    share = f"{100 * trained / (trained + frozen):.3f}% of {trained + frozen:,}"
    fig.row(y + 50, share, f"{trained:,}", bold=True)


def draw_adapter(fig: Figure) -> None:
    """The middle, second panel: what an MM-Adapter computes, and the sizes of its parts in both models."""
    fig.arrow((238, 390), (310, 390), color=TRAINED[1], head=False)
    fig.arrow((890, 622), (962, 622), color=TRAINED[1], head=False)
    fig.box(310, 236, 580, 412, colors=(WHITE, TRAINED[1]), radius=12)
    fig.row(260, "MM-Adapter: adapter_attn, before every attention", "Eq. (2)", title=True)
    y, adapter = 350, f"{LLAMA}.0.adapter_attn"
    fig.text(340, y, "z")
    x = fig.chain(354, y, adapter, "phi_d")
    for k, row in enumerate((y - 26, y + 26)):
        fig.arrow((x, y), (x + 24, y), (x + 24, row), (x + 32, row), head=False)
        end = fig.chain(x + 32, row, adapter, f"phi_u{k + 1}", f"x w_{k}")
        fig.arrow((end, row), (700, row), (700, y - 14 + 28 * k))
    fig.box(686, y - 14, 28, 28, "+", radius=14)
    x = fig.chain(714, y, adapter, "x s", "+")
    fig.arrow((366, y), (366, 290), (x - 14, 290), (x - 14, y - 14))  # the residual
    fig.arrow((x, y), (x + 24, y))
    fig.text(x + 34, y, "z'")
    y = 430
    fig.row(y, "LLaMA: t_m, ViT: [cls]", "Eq. (3)")
    x = fig.chain(478, y, adapter, "f_w", "/ tau", "softmax", gap=16)
    fig.arrow((x, y), (x + 16, y))
    fig.text(x + 22, y, "w_0, w_1", "lm")
    columns = (LLAMA, "LLaMA", 430, 650), (VIT, "ViT", 676, 870)
    for blocks, title, left, right in columns:
        fig.text(left, 490, title, "lm", bold=True)
        fig.text(right, 626, f"{fig.count(f'{blocks}.0.adapter_attn'):,}", "rm", bold=True)
    fig.text(330, 626, "sum", "lm", bold=True)
    for i, (name, _) in enumerate(fig.model.get_submodule(adapter).named_children()):
        y = 515 + 25 * i
        fig.text(330, y, LABELS.get(name, name), "lm", bold=True)
        for blocks, _, left, right in columns:
            path = f"{blocks}.0.adapter_attn.{name}"
            fig.text(left, y, fig.shapes(path), "lm")
            fig.text(right, y, f"{fig.count(path):,}", "rm")
    fig.arrow((330, 609), (870, 609), head=False)


def draw_input(fig: Figure) -> None:
    """Below: the sequence that LLaMA reads, and where its tokens come from."""
    n, y, embeddings = fig.model.vit.n_visual, 790, "llama.tok_embeddings"
    fig.part(310, 664, 260, 58, "adapter_modality_embedding")
    fig.text(584, 682, "t_m = m E_m; routers read its state", "lm")
    fig.text(870, 682, "Eq. (1)", "rm")
    fig.arrow((340, 722), (340, y))
    fig.arrow((570, 700), (905, 700), (905, 638), (962, 638))
    fig.arrow((1050, y), (1050, 714), head=False)
    fig.text(360, y - 17, "Z = [t_m, X', Y] or [t_m, Y]; t_m passes through LLaMA on its own", "lm")
    fig.text(870, y - 17, "Eq. (7)", "rm")
    half, x = (662 - 40 * n) / 2, 310  # prompt and response share what the others leave
    widths = [("t_m", 44), ("BOS Image:", 130), *[("X'", 34)] * n, ("prompt", half), ("response", half)]
    for name, width in widths:
        source = {"t_m": "adapter_modality_embedding", "X'": "adapter_proj"}.get(name, embeddings)
        fig.box(x, y, width, 32, name, colors=(fig.colors(source)[0], LINE), radius=4)
        x += width + (22 if name == "t_m" else 6)  # t_m stands apart
    fig.text(230, 864, f"X [{n}, {fig.model.vit.cfg.width}]")
    fig.arrow((150, 744), (150, 879), (310, 879))
    fig.part(310, 850, 190, 58, "adapter_proj.W_d")
    x = fig.chain(500, 879, "adapter_proj", "SiLU")
    fig.arrow((x, 879), (x + 24, 879))
    fig.part(x + 24, 850, 190, 58, "adapter_proj.W_u")
    fig.arrow((512 + 20 * n, 850), (512 + 20 * n, y + 32))  # to the middle of X'
    fig.text(310, 924, "neck: X' = SiLU(X W_d + b_d) W_u + b_u", "lm")
    fig.text(x + 214, 924, "Eq. (6)", "rm")
    fig.part(870, 850, 240, 58, embeddings)
    for x in (890, 1090):  # to prompt and response
        fig.arrow((x, 850), (x, y + 32))


def draw(model: LaVIN, cfg: Config) -> Figure:
    """The figure; cfg gives the names of the sizes."""
    fig = Figure(model)
    title = "LaVIN: a frozen ViT and a frozen LLaMA, joined by small modules that train"
    fig.text(20, 32, title, "lm", size=20, bold=True)
    for x, colors, text in (920, FROZEN, "frozen"), (1000, TRAINED, "trained"):
        fig.box(x, 24, 16, 16, colors=colors, radius=4)
        fig.text(x + 22, 32, text, "lm")
    draw_models(fig, cfg)
    draw_sum(fig)
    draw_adapter(fig)
    draw_input(fig)
    return fig


def main() -> None:
    cfg = cli.parse(Config)
    write_atomically(Path(cfg.out), draw(build(cfg), cfg).png())
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    cli.run(main)
