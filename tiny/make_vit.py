"""Make the tiny image encoder: a CLIP ViT, trained like CLIP, on pictures of the small world.

CLIP contrasts each picture with the captions of the other pictures of a batch. Here the captions are few, so
each picture is contrasted with all of them: with a phrase for every possible thing ("a big red circle on the
left") and every crowd ("three small red circles"). One phrase says which color, shape, size and place belong
to one thing, so the tower has to bind them; a bag of the picture's words would not be enough. The other half
of CLIP's loss goes from the phrase to the pictures of the batch.

CLIP reads only the last [cls] token. LaVIN reads [cls] after every `cls_every`-th block, here after each of
the six. So we train all six. The last three stand for the first, second and third thing, from left to right
or from top to bottom; with fewer things the last one is repeated. One token for one thing is easy to read for
the language model. The first three tokens get the same three phrases with a small weight, as a draft.

The text tower adds up the vectors of a phrase's words. It and the projection are discarded; a vision tower in
Hugging Face's CLIP layout remains. Neither tower meets the pairs of color and shape in `scenes.UNSEEN`: no
picture shows them, and no phrase names them.

    python tiny/make_vit.py                          trains, prints linear probes, writes tiny/clip/
    python tiny/make_vit.py --steps 0                probes the tower in tiny/clip/

An interrupted run resumes from its checkpoint. Batches are a function of (seed, step).

The stored tower is one run of this file: 4,000 steps, 256,000 pictures, 71 minutes on one shared core. It was
stopped once and resumed at step 1,400 with --steps 4000 instead of 7500, which changes only the steps after
the plateau. At the end, each of the last three [cls] tokens ranks its own phrase first for 98 in 100 images.
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
    steps: int = 4000  # optimizer steps; 0 only probes the stored tower
    batch: int = 64  # pictures a step
    lr: float = 2e-3  # warm-up over 200 steps, constant, then linear to 0
    decay: float = 0.35  # share of the steps in which the learning rate falls
    early: float = 0.1  # weight of the loss at each of the first three [cls]; the last three have weight 1
    seed: int = 1  # seed of initialisation, scenes and pictures
    threads: int = 1  # CPU threads
    save_every: int = 200  # steps between checkpoints
    out: str = str(HERE / "clip")  # folder for config.json and model.safetensors
    checkpoint: str = str(HERE / "clip_training.pt")  # file to resume from; may be deleted at the end


# ----------------------------------------------------------------------------------------------
# data

MIX = {"one": 0.15, "two": 0.25, "three": 0.35, "many": 0.25}

# every phrase that describes a thing or a crowd, without the pairs held out: the captions of CLIP's contrast
PAIRS = [(color, shape) for color in S.COLORS for shape in S.SHAPES if (color, shape) not in S.UNSEEN]
PHRASES = tuple(f"a {size} {color} {shape} {where}" for size in S.SIZES for color, shape in PAIRS
                for where in S.POSITION_PHRASE.values())
PHRASES += tuple(f"{number} small {color} {S.PLURAL[shape]}" for number in S.NUMBERS[1:]
                 for color, shape in PAIRS)
WORDS = ("<pad>", *sorted({word for phrase in PHRASES for word in phrase.split()}))
INDEX = {phrase: i for i, phrase in enumerate(PHRASES)}


def three_phrases(scene: S.Scene) -> tuple:
    """What the last three [cls] tokens should say: a phrase each, the last repeated if there are fewer."""
    said = S.phrases(S.ordered(scene))
    return said + said[-1:] * (3 - len(said))


def pixels(batch: list, rng: random.Random, size: int, **look) -> torch.Tensor:
    """Scenes -> fresh pictures [B, 3, size, size], preprocessed as in LaVIN. look: background, outline."""
    return torch.stack([clip.preprocess(S.draw(scene, rng, **look), size, "clip") for scene in batch])


def make_batch(cfg: Config, step: int, size: int) -> tuple:
    """Pictures [B, 3, H, W] and the three phrases of each, as indices into PHRASES, [B, 3]."""
    rng = random.Random(f"{cfg.seed}/{step}")
    batch = [S.random_scene(rng, kind) for kind in rng.choices(list(MIX), list(MIX.values()), k=cfg.batch)]
    right = torch.tensor([[INDEX[phrase] for phrase in three_phrases(scene)] for scene in batch])
    return pixels(batch, rng, size), right


# ----------------------------------------------------------------------------------------------
# the model

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
    """The vision tower, with the text tower, the projection and the loss of its pretraining."""

    def __init__(self, cfg: Config, dim: int = 128):
        super().__init__()
        self.vit = VisionTransformer(clip.PRESETS["tiny"])
        size = self.vit.cfg
        self.vit.positional_embedding.data.copy_(waves((size.image_size // size.patch_size) ** 2, size.width))
        # The text tower: a phrase is the sum of its words. Color and shape then have directions of their own,
        # whatever the pair. A transformer could learn each pair by heart, and would say nothing of a new one.
        self.words = nn.Embedding(len(WORDS), dim, padding_idx=0)
        rows = [[WORDS.index(word) for word in phrase.split()] for phrase in PHRASES]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        self.register_buffer("phrases", ids, persistent=False)           # [N, words]
        self.head = nn.Sequential(nn.LayerNorm(size.width), nn.Linear(size.width, dim, bias=False))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's learned temperature
        self.early = cfg.early

    def forward(self, images: torch.Tensor, right: torch.Tensor) -> tuple:
        """Loss; share of pictures for which the last three [cls] each rank their own phrase first, [3].

        images [B, 3, H, W]; right [B, 3]: indices into PHRASES.
        """
        view = F.normalize(self.head(self.vit(images)).float(), dim=-1)              # [B, 6, dim]
        text = F.normalize(self.words(self.phrases).sum(1).float(), dim=-1)          # [N, dim]
        logits = self.log_scale.exp() * (view @ text.T).unflatten(1, (2, 3))         # [B, 2, 3, N]
        index = right[:, None, :, None].expand(-1, 2, -1, 1)                         # [B, 2, 3, 1]
        per_picture = -logits.log_softmax(-1).gather(-1, index)[..., 0]              # [B, 2, 3]
        # the other way round: of the pictures of the batch, those with this phrase at this place
        index = right.T[None, :, None, :].expand(2, -1, len(view), -1)               # [2, 3, B, B]
        by_phrase = logits.permute(1, 2, 0, 3).gather(3, index)                      # [2, 3, B pictures, B]
        same = (right.T[:, :, None] == right.T[:, None, :]).float()                  # [3, B, B]
        per_phrase = -(by_phrase.log_softmax(2) * same).sum(2) / same.sum(1)         # [2, 3, B]
        loss = (per_picture.mean(0) + per_phrase.mean(-1)) / 2                       # [2, 3]
        loss = (self.early * loss[0] + loss[1]).sum()
        return loss, (logits[:, 1].argmax(-1) == right).float().mean(0)


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
            loss, found = model(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.log_scale.data.clamp_(max=math.log(100))                   # as CLIP does
        now = (loss.item(), *found.tolist())
        running = [0.97 * r + 0.03 * n for r, n in zip(running or now, now)]
        if (step + 1) % 25 == 0:
            seconds = time.time() - clock
            print(f"step {step + 1:5d}/{cfg.steps}  loss {running[0]:.3f}  "
                  f"own phrase first {running[1]:.3f} {running[2]:.3f} {running[3]:.3f}  "
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
    for t, where in zip(scene.things, S.where_each(scene)):
        if all(getattr(t, k) == v for k, v in wanted.items()):
            return getattr(t, what) if what != "place" else where


# kind -> question -> the answer in an ordered scene, or None if the scene has no such thing
PROBES = {
    "one": {"color": lambda s: s.things[0].color, "shape": lambda s: s.things[0].shape,
            "size": lambda s: s.things[0].size, "position": S.position},
    "two": {"beside or above": S.relation,
            "color of the first": lambda s: s.things[0].color,
            "shape of the first": lambda s: s.things[0].shape,
            "size of the first": lambda s: s.things[0].size,
            "shape of the second": lambda s: s.things[1].shape,
            "color of the circle": lambda s: find(s, "color", shape="circle"),
            "size of the star": lambda s: find(s, "size", shape="star"),
            "place of the blue one": lambda s: find(s, "place", color="blue")},
    "three": {"beside or above": S.relation,
              "shape of the first": lambda s: s.things[0].shape,
              "color of the second": lambda s: s.things[1].color,
              "shape of the second": lambda s: s.things[1].shape,
              "size of the second": lambda s: s.things[1].size,
              "shape of the third": lambda s: s.things[2].shape,
              "place of the square": lambda s: find(s, "place", shape="square")},
    "many": {"number": lambda s: len(s.things), "color": lambda s: s.things[0].color,
             "shape": lambda s: s.things[0].shape},
}
# test set -> how it differs from the pictures that the probes are fitted to
TESTS = {"as fitted": {}, "unseen pairs": {"seen": False}, "grey 128": {"background": 128},
         "dark 40": {"background": 40}, "outlines": {"outline": True}}


def probe_scenes(rng: random.Random, kind: str, n: int, seen: bool = True, background: int = 255,
                 **_) -> list:
    """n ordered scenes of a kind; on a dark background without black things, which would not be visible."""
    found = []
    while len(found) < n:
        scene = S.random_scene(rng, kind, seen)
        if background > 70 or all(t.color != "black" for t in scene.things):
            found.append(S.ordered(scene))
    return found


@torch.no_grad()
def features(vit: VisionTransformer, batch: list, rng: random.Random, **look) -> torch.Tensor:
    """Draw each scene anew; concatenate all [cls] tokens of its picture: [B, layers * width]."""
    return torch.cat([vit(pixels(batch[i:i + 64], rng, vit.cfg.image_size, **look)).flatten(1)
                      for i in range(0, len(batch), 64)])


def linear_probe(x: torch.Tensor, y: torch.Tensor, decay: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [features, classes] and bias of a multinomial logistic regression, fitted with L-BFGS."""
    W = torch.zeros(x.shape[1] + 1, int(y.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ W[:-1] + W[-1], y) + decay * W[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return W[:-1].detach(), W[-1].detach()


def probe(vit: VisionTransformer, seed: int = 0, sizes: tuple = (4000, 500)) -> dict:
    """Fit linear probes to the concatenated [cls] tokens -> {"kind: question": {test set: accuracy}}.

    A probe is not tested on an answer that it was not fitted to: no circle is black among seen pairs.

    sizes: pictures of a kind that the probes are fitted to, and pictures of a kind in each test set
    """
    rng, report = random.Random(f"probe/{seed}"), {}
    print(f"{'':28s}" + "".join(f"{name:>14s}" for name in TESTS), flush=True)
    for kind, questions in PROBES.items():
        fitted = probe_scenes(rng, kind, sizes[0] * (1 if kind in ("one", "many") else 2))
        x = features(vit.eval(), fitted, rng)
        mean, std = x.mean(0), x.std(0)
        tests = {}
        for name, change in TESTS.items():
            batch = probe_scenes(rng, kind, sizes[1], **change)
            look = {k: v for k, v in change.items() if k != "seen"}
            tests[name] = batch, (features(vit, batch, rng, **look) - mean) / std
        x = (x - mean) / std
        for question, ask in questions.items():
            answers = [ask(s) for s in fitted]
            asked = [i for i, a in enumerate(answers) if a is not None]
            names = sorted({answers[i] for i in asked})
            W, bias = linear_probe(x[asked], torch.tensor([names.index(answers[i]) for i in asked]))
            row = report[f"{kind}: {question}"] = {}
            for name, (batch, tokens) in tests.items():
                said = [names[i] for i in (tokens @ W + bias).argmax(-1)]
                right = [s == a for s, a in zip(said, map(ask, batch)) if a in names]
                row[name] = sum(right) / len(right)
            print(f"{kind + ': ' + question:28s}" + "".join(f"{v:14.3f}" for v in row.values()), flush=True)
    return report


def main():
    cfg = cli.parse(Config)
    torch.set_num_threads(cfg.threads)
    if cfg.steps:
        train(cfg)
    report = probe(VisionTransformer.from_pretrained(cfg.out))           # as stored: bf16
    columns = {name: [row[name] for row in report.values()] for name in TESTS}
    print(json.dumps({name: {"mean": sum(c) / len(c), "worst": min(c)} for name, c in columns.items()}))


if __name__ == "__main__":
    cli.run(main)
