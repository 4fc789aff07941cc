"""Make the tiny image encoder: a CLIP ViT, trained like CLIP, on pictures of the small world.

The loss is CLIP's symmetric contrastive loss with a learned temperature. Two changes make the task hard
enough to be useful. Each picture is also contrasted with wrong captions that differ in one attribute (two
colours swapped, a mirrored relation, one star more). Half the pictures are such edits of the other half.
[cls] therefore has to bind attributes to things; a bag of words is not enough.

CLIP reads only the last [cls] token. LaVIN reads [cls] at several depths (after every `cls_every`-th block),
so we train the earlier ones too. The two before the last are contrasted, through one projection, with the
first and the second half of the caption, because one token per thing is easier to read than one token for
both things. The [cls] tokens before those are contrasted with the whole caption, with a small weight.
The projections and the text tower are discarded; a vision tower in Hugging Face's CLIP layout remains.

    python tiny/make_vit.py                          trains, prints linear probes, writes tiny/clip/
    python tiny/make_vit.py --steps 0                probes the tower in tiny/clip/

An interrupted run resumes from its checkpoint. Batches are a function of (seed, step).

The stored tower is one run of this file: 2,600 steps, 166,400 pictures, 80 minutes on one shared core.
Linear probes on its six [cls] tokens have an accuracy of 0.98 to 1.00. The exception is 0.92 for "color of
the circle" of two things, where a linear probe must find one attribute by another.
"""

import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import cli  # noqa: E402
import clip  # noqa: E402
from clip import VisionTransformer  # noqa: E402
from official.clip_layouts import hf_names  # noqa: E402
from tiny import scenes as S  # noqa: E402


@dataclass
class Config:
    """Train the tiny CLIP image encoder on pictures of the small world."""
    steps: int = 2600  # optimizer steps; 0 only probes the stored tower
    batch: int = 64  # pictures a step, half of them edits of the other half
    rivals: int = 6  # wrong captions for each picture, each one attribute away from the right one
    lr: float = 2e-3  # warm-up over 200 steps, constant, then linear to 0
    decay: float = 0.35  # share of the steps in which the learning rate falls
    early: float = 0.1  # weight of the loss at each early [cls]; the last one has weight 1
    seed: int = 1  # seed of initialisation, scenes and pictures
    threads: int = 1  # CPU threads
    save_every: int = 50  # steps between checkpoints
    out: str = str(HERE / "clip")  # folder for config.json and model.safetensors
    checkpoint: str = str(HERE / "clip_training.pt")  # file to resume from; may be deleted at the end


# ----------------------------------------------------------------------------------------------
# data

MIX = {"one": 0.2, "two": 0.55, "many": 0.25}


def told(scene: S.Scene) -> str:
    return S.caption(S.ordered(scene))


def parts(scene: S.Scene) -> tuple[str, str]:
    """The caption of each of two things, with its place. One thing or a crowd: the whole caption twice."""
    scene = S.ordered(scene)
    if scene.kind != "two":
        return told(scene), told(scene)
    one, other = (f"a {t.size} {t.color} {t.shape} {where}"
                  for t, where in zip(scene.things, S.places(scene)))
    return one, other


# what an edit may change; mostly the shape, because the tower learns to tell a star from a heart last
EDITS = {"one": ("shape", "shape", "shape", "size", "color", "where"),
         "many": ("number", "number", "shape", "shape", "color"),
         "two": ("shape", "shape", "shape", "shape", "swap shapes", "swap colors", "size", "mirror", "color",
                 "turn")}
ATTRIBUTES = {"size": (0, S.SIZES), "color": (1, S.COLORS), "shape": (2, S.SHAPES)}


def edit(scene: S.Scene, rng: random.Random) -> S.Scene:
    """A scene whose caption differs from this one's in one respect. Details outside the caption vary."""
    def other(options, *taken):
        return rng.choice([o for o in options if o not in taken])

    looks = [[t.size, t.color, t.shape] for t in scene.things]
    n, what = len(looks), rng.choice(EDITS[scene.kind])
    it = rng.choice(looks) if scene.kind == "two" else looks[0]         # the thing that changes
    if what in ATTRIBUTES:
        i, options = ATTRIBUTES[what]
        it[i] = other(options, it[i], *(look[i] for look in looks if what != "size"))
    if scene.kind == "many":
        if what == "number":
            n = rng.choice([m for m in (n - 1, n + 1) if 2 <= m <= 5])
        return S.crowd(n, *it[1:], rng)
    if scene.kind == "one":
        where = S.position(scene)
        return S.Scene("one", (S.place(*it, other(S.POSITIONS, where) if what == "where" else where, rng),))
    a, b, rel = *looks, S.relation(scene)
    if what.startswith("swap"):
        i = 1 if what == "swap colors" else 2
        a[i], b[i] = b[i], a[i]
    elif what == "mirror":
        rel = S.OPPOSITE[rel]
    elif what == "turn":
        rel = other(S.RELATIONS, rel, S.OPPOSITE[rel])
    return S.pair(a, b, rel, rng)


def pixels(batch: list, rng: random.Random, size: int) -> torch.Tensor:
    """Scenes -> fresh pictures [B, 3, size, size], with the preprocessing that LaVIN uses."""
    return torch.stack([clip.preprocess(S.draw(scene, rng), size, "clip") for scene in batch])


def make_batch(cfg: Config, step: int, size: int) -> tuple:
    """Pictures [B, 3, H, W], B * (1 + rivals) captions (right ones first), parts of the right captions."""
    rng = random.Random(f"{cfg.seed}/{step}")
    kinds = rng.choices(list(MIX), list(MIX.values()), k=cfg.batch // 2)
    batch = [S.random_scene(rng, k) for k in kinds]
    batch += [edit(s, rng) for s in batch]
    captions = [told(s) for s in batch] + [told(edit(s, rng)) for s in batch for _ in range(cfg.rivals)]
    return pixels(batch, rng, size), captions, list(zip(*map(parts, batch)))


# ----------------------------------------------------------------------------------------------
# the parts that are discarded: the text tower and the projections

WORDS = ("<pad>", "a", *S.SIZES, *S.COLORS, *S.SHAPES, *S.PLURAL.values(), *S.NUMBERS,
         *sorted({w for p in [*S.POSITION_PHRASE.values(), *S.RELATION_PHRASE.values()] for w in p.split()}))
LENGTH = 10     # words in the longest caption: "a big red circle left of a small blue square"


def word_ids(captions: list) -> torch.Tensor:
    rows = [[WORDS.index(w) for w in c.split()] for c in captions]
    return torch.tensor([r + [0] * (LENGTH - len(r)) for r in rows])     # [N, LENGTH]


class TextTower(nn.Module):
    """A two-layer transformer over words; the caption's vector is the mean over its words."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.words = nn.Embedding(len(WORDS), width)
        self.places = nn.Parameter(torch.randn(LENGTH, width) * 0.5)
        block = lambda: nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu",
                                                   batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim, bias=False))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places                                # [N, L, width]
        pad = ids == 0
        for block in self.blocks:
            x = block(x, src_key_padding_mask=pad)
        keep = (~pad).unsqueeze(-1)
        return self.proj((x * keep).sum(1) / keep.sum(1))                # [N, dim]


def waves(patches: int, width: int) -> torch.Tensor:
    """Initial position embedding: sines and cosines of both coordinates, [1 + patches, width].

    CLIP starts from small random numbers. Next to the large, constant embedding of a blank patch they are too
    weak: the tower could not tell left from right for several hundred steps.
    """
    side = math.isqrt(patches)
    frequencies = torch.linspace(0.5, side / 2, width // 4)
    angle = math.pi / side * torch.arange(side)[:, None] * frequencies   # [side, width / 4]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                  # [side, width / 2]
    grid = torch.cat([axis.repeat_interleave(side, 0), axis.repeat(side, 1)], dim=1)
    return torch.cat([torch.zeros(1, width), grid])                      # [cls] has no position


class Contrast(nn.Module):
    """The vision tower, with the text tower, projections and loss of its pretraining."""

    def __init__(self, cfg: Config, dim: int = 128):
        super().__init__()
        self.vit = VisionTransformer(clip.PRESETS["tiny"])
        size = self.vit.cfg
        self.vit.positional_embedding.data.copy_(waves((size.image_size // size.patch_size) ** 2, size.width))
        self.text = TextTower(96, dim)
        head = lambda: nn.Sequential(nn.LayerNorm(size.width), nn.Linear(size.width, dim, bias=False))
        self.early = nn.ModuleList(head() for _ in range(size.layers - 3))
        self.part = head()  # shared by both parts: [cls] must drop the first part to encode the second
        self.proj = nn.Linear(size.width, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's learned temperature
        self.early_weight = cfg.early

    def contrast(self, view: torch.Tensor, captions: list) -> tuple:
        """CLIP's loss, share of pictures matched. view [B, dim]; captions: B right, then wrong ones."""
        B = len(view)
        unique = list(dict.fromkeys(captions))                           # equal captions count once
        index = {c: i for i, c in enumerate(unique)}
        right = torch.tensor([index[c] for c in captions[:B]])           # [B] index of each picture's caption
        text = F.normalize(self.text(word_ids(unique)).float(), dim=-1)  # [N, dim]
        logits = self.log_scale.exp() * F.normalize(view.float(), dim=-1) @ text.T           # [B, N]
        per_caption = logits.T[right].log_softmax(-1)                    # [B, B] over pictures
        same = right[:, None] == right[None, :]                          # [B, B] pictures with equal captions
        both = F.cross_entropy(logits, right) - (per_caption * same).sum(1).div(same.sum(1)).mean()
        return both / 2, (logits.argmax(-1) == right).float().mean().item()

    def forward(self, images: torch.Tensor, captions: list, parts: list) -> tuple:
        """Loss, share of pictures whose own caption has the highest logit, the same share for the parts."""
        cls = self.vit(images)                                           # [B, layers, width]
        loss, found = self.contrast(self.proj(self.vit.ln_post(cls[:, -1])), captions)
        for i, head in enumerate(self.early):
            loss = loss + self.early_weight * self.contrast(head(cls[:, i]), captions)[0]
        shares = []
        for i, (its, others) in enumerate((parts, parts[::-1])):         # the other part is a wrong caption
            more, share = self.contrast(self.part(cls[:, len(self.early) + i]), [*its, *others])
            loss = loss + 0.5 * more
            shares.append(share)
        return loss, found, sum(shares) / 2


# ----------------------------------------------------------------------------------------------
# training

def lr_at(cfg: Config, step: int) -> float:
    """Warm-up, plateau, linear decay. A longer run can resume from a checkpoint of the plateau."""
    down = (cfg.steps - step) / (cfg.decay * cfg.steps)
    return cfg.lr * min(1.0, (step + 1) / 200, down)


def train(cfg: Config) -> VisionTransformer:
    torch.manual_seed(cfg.seed)
    model = Contrast(cfg)
    # Muon on the matrices of the blocks halves the number of steps, compared with AdamW on all parameters
    by_muon = {n: "blocks." in n and p.ndim == 2 for n, p in model.named_parameters()}
    inner = [p for n, p in model.named_parameters() if by_muon[n]]
    rest = [p for n, p in model.named_parameters() if not by_muon[n]]
    optimizers = [torch.optim.Muon(inner, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)]
    start, spent = 0, 0.0
    if os.path.exists(cfg.checkpoint):
        state = torch.load(cfg.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        start, spent = state["step"], state["seconds"]
    print(f"{sum(p.numel() for p in model.vit.parameters()):,} parameters in the ViT; from step {start}",
          file=sys.stderr)
    clock, running = time.time() - spent, None
    for step in range(start, cfg.steps):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr_at(cfg, step)
        batch = make_batch(cfg, step, model.vit.cfg.image_size)
        with torch.autocast("cpu", torch.bfloat16):
            loss, *found = model(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.log_scale.data.clamp_(max=math.log(100))                   # as CLIP does
        now = (loss.item(), *found)
        running = [0.97 * r + 0.03 * n for r, n in zip(running or now, now)]
        if (step + 1) % 25 == 0:
            seconds = time.time() - clock
            print(f"step {step + 1:5d}/{cfg.steps}  loss {running[0]:.3f}  "
                  f"own caption first {running[1]:.3f}, parts {running[2]:.3f}  "
                  f"lr {lr_at(cfg, step):.1e}  {(step + 1) * cfg.batch / seconds:.0f} pictures/s  "
                  f"{seconds / 60:.1f} min", file=sys.stderr, flush=True)
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                     "step": step + 1, "seconds": time.time() - clock}
            torch.save(state, cfg.checkpoint + ".part")
            os.replace(cfg.checkpoint + ".part", cfg.checkpoint)
            export(model.vit, cfg.out)
    return model.vit


# ----------------------------------------------------------------------------------------------
# Hugging Face's CLIP vision layout

def to_hugging_face(vit: VisionTransformer) -> dict:
    """Tensors under Hugging Face's names, in bf16; the fused q, k, v become three tensors."""
    state, out = vit.state_dict(), {}
    for ours, theirs in hf_names(vit.cfg.layers).items():
        for name, part in zip(theirs, state.pop(ours).chunk(len(theirs))):
            out["vision_model." + name] = part.to(torch.bfloat16).contiguous()
    assert not state, f"no name for {', '.join(state)}"
    return out


def export(vit: VisionTransformer, folder: str):
    c = vit.cfg
    config = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_size": c.width,
              "intermediate_size": 4 * c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
              "image_size": c.image_size, "patch_size": c.patch_size, "num_channels": 3,
              "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "torch_dtype": "bfloat16",
              "cls_every": c.cls_every}
    os.makedirs(folder, exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(config, indent=2) + "\n")
    part = Path(folder, "model.safetensors.part")
    save_file(to_hugging_face(vit), part, metadata={"format": "pt"})
    os.replace(part, Path(folder, "model.safetensors"))


# ----------------------------------------------------------------------------------------------
# linear probes of the [cls] tokens

def find(scene: S.Scene, what: str, **wanted) -> str | None:
    """The size, color, shape or place of the thing with the wanted color or shape, if there is one."""
    for i, t in enumerate(scene.things):
        if all(getattr(t, k) == v for k, v in wanted.items()):
            return getattr(t, what) if what != "place" else S.places(scene)[i]


# kind -> question -> the answer in an ordered scene, or None if the scene has no such thing
PROBES = {
    "one": {"color": lambda s: s.things[0].color, "shape": lambda s: s.things[0].shape,
            "size": lambda s: s.things[0].size, "position": S.position},
    "many": {"number": lambda s: len(s.things), "color": lambda s: s.things[0].color,
             "shape": lambda s: s.things[0].shape},
    "two": {"beside or above": S.relation,
            "color of the first": lambda s: s.things[0].color,
            "shape of the first": lambda s: s.things[0].shape,
            "size of the first": lambda s: s.things[0].size,
            "shape of the second": lambda s: s.things[1].shape,
            "color of the circle": lambda s: find(s, "color", shape="circle"),
            "size of the star": lambda s: find(s, "size", shape="star"),
            "shape of the red one": lambda s: find(s, "shape", color="red"),
            "place of the square": lambda s: find(s, "place", shape="square"),
            "place of the blue one": lambda s: find(s, "place", color="blue")},
}


@torch.no_grad()
def features(vit: VisionTransformer, batch: list, rng: random.Random) -> torch.Tensor:
    """Draw each scene anew; concatenate all [cls] tokens of its picture: [B, layers * width]."""
    return torch.cat([vit(pixels(batch[i:i + 64], rng, vit.cfg.image_size)).flatten(1)
                      for i in range(0, len(batch), 64)])


def linear_probe(x: torch.Tensor, y: torch.Tensor, test_x: torch.Tensor, test_y: torch.Tensor,
                 decay: float = 1e-3) -> float:
    """Accuracy on the test pictures of a multinomial logistic regression, fitted with L-BFGS."""
    W = torch.zeros(x.shape[1] + 1, int(y.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ W[:-1] + W[-1], y) + decay * W[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return ((test_x @ W[:-1] + W[-1]).argmax(-1) == test_y).float().mean().item()


def probe(vit: VisionTransformer, seed: int = 0, sizes: tuple = (4000, 1000)) -> dict:
    """Linear probes on the concatenated [cls] tokens -> {"kind: question": accuracy on held-out pictures}."""
    rng, report = random.Random(f"probe/{seed}"), {}
    for kind, questions in PROBES.items():
        n = [m * (2 if kind == "two" else 1) for m in sizes]
        batch = [S.ordered(S.random_scene(rng, kind)) for _ in range(sum(n))]
        x = features(vit.eval(), batch, rng)
        x = (x - x[:n[0]].mean(0)) / x[:n[0]].std(0)
        for question, ask in questions.items():
            answers = [ask(s) for s in batch]
            names = sorted({a for a in answers if a is not None})
            train_ids = [i for i in range(n[0]) if answers[i] is not None]
            test_ids = [i for i in range(n[0], sum(n)) if answers[i] is not None]
            y = torch.tensor([names.index(a) if a is not None else -1 for a in answers])
            report[f"{kind}: {question}"] = linear_probe(x[train_ids], y[train_ids], x[test_ids], y[test_ids])
            print(f"{kind + ': ' + question:28s} {report[f'{kind}: {question}']:.3f}   "
                  f"({len(train_ids)} / {len(test_ids)} pictures, chance {1 / len(names):.2f})", flush=True)
    return report


def main():
    cfg = cli.parse(Config)
    torch.set_num_threads(cfg.threads)
    if cfg.steps:
        train(cfg)
    report = probe(VisionTransformer.from_pretrained(cfg.out))           # as stored: bf16
    print(json.dumps({"mean": sum(report.values()) / len(report), "worst": min(report.values())}))


if __name__ == "__main__":
    cli.run(main)
