"""CLIP's vision transformer: the frozen image encoder, and what is done to a picture before it.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021. Official weights
come from OpenAI (`ViT-L-14.pt`) or the Hugging Face hub; weights.py reads both. Parameter names are OpenAI's.

LaVIN reads no output of the tower but the [cls] token after every fourth block: six for ViT-L/14.

Shapes: N pictures, T = 1 + (image / patch)^2 tokens, [cls] first, C = width.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import weights
from adapters import recompute, survivors


@dataclass
class CLIPConfig:
    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    cls_every: int = 4  # LaVIN keeps the [cls] after every so many blocks


PRESETS = {
    "ViT-L/14": CLIPConfig(),
    "ViT-B/16": CLIPConfig(patch_size=16, width=768, layers=12, heads=12),
    "tiny": CLIPConfig(image_size=64, patch_size=8, width=128, layers=6, heads=4, cls_every=1),
}


def from_name(name: str) -> CLIPConfig:
    if name not in PRESETS:
        raise ValueError(f"unknown image encoder {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


class LayerNorm(nn.LayerNorm):
    """in fp32 under CUDA's autocast, which would leave its result in fp32 too, and with it every x after it"""

    def forward(self, x):
        return super().forward(x).type_as(x)


class Attention(nn.Module):
    """q, k, v fused in one matrix, under the names of torch's MultiheadAttention, which OpenAI used"""

    def __init__(self, cfg: CLIPConfig):
        super().__init__()
        self.heads = cfg.heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * cfg.width, cfg.width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * cfg.width))
        self.out_proj = nn.Linear(cfg.width, cfg.width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, z):
        N, T, C = z.shape
        qkv = F.linear(z, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(N, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [N, heads, T, C / heads] each
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).reshape(N, T, C))


class MLP(nn.Module):
    def __init__(self, cfg: CLIPConfig):
        super().__init__()
        self.c_fc = nn.Linear(cfg.width, 4 * cfg.width)
        self.c_proj = nn.Linear(4 * cfg.width, cfg.width)

    def forward(self, x):
        return self.c_proj(recompute(quick_gelu, self.c_fc(x)))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, cfg: CLIPConfig):
        super().__init__()
        self.ln_1 = LayerNorm(cfg.width)
        self.attn = Attention(cfg)
        self.ln_2 = LayerNorm(cfg.width)
        self.mlp = MLP(cfg)
        self.adapter_attn = None  # an MMAdapter, once LaVIN puts it here
        self.routing = "cls"

    def adapted(self, x, keep):
        z = self.ln_1(x)
        if self.adapter_attn is None:
            return z
        # Eq. (2) as a unimodal adapter, routed by the picture itself instead of a modality token.
        # released code: a layout slip routes every picture of a batch by the *first* one, token by token.
        # here: each picture by its own [cls], which the authors say they meant; "token" equals the released
        # code run one picture at a time, for adapters that were trained with it.
        t = z[:, :1] if self.routing == "cls" else z
        return self.adapter_attn(z, self.adapter_attn.route(t), keep)

    def forward(self, x, keep=None):
        x = x + self.attn(recompute(self.adapted, x, keep))  # what is kept for the backward: see llama.Block
        return x + self.mlp(recompute(self.ln_2, x))


class Transformer(nn.Module):
    def __init__(self, cfg: CLIPConfig):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))


class VisionTransformer(nn.Module):
    def __init__(self, cfg: CLIPConfig):
        super().__init__()
        self.cfg = cfg
        patches = (cfg.image_size // cfg.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, cfg.width, cfg.patch_size, cfg.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(cfg.width) * cfg.width ** -0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + patches, cfg.width) * cfg.width ** -0.5)
        self.ln_pre = LayerNorm(cfg.width)
        self.transformer = Transformer(cfg)
        self.ln_post = LayerNorm(cfg.width)  # CLIP's own head reads it; LaVIN does not

    @property
    def n_cls(self) -> int:
        """how many [cls] tokens a picture becomes"""
        return self.cfg.layers // self.cfg.cls_every

    def forward(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> torch.Tensor:
        """images [N, 3, image_size, image_size], normalised -> X [N, n_cls, C]: [cls] after every cls_every blocks.

        seeds [N]: of the samples, for the adapters' dropout; None: no dropout.
        """
        x = self.conv1(images.type_as(self.conv1.weight)).flatten(2).transpose(1, 2)  # [N, T - 1, C]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # [N, T, C]
        x = self.ln_pre(x + self.positional_embedding)
        blocks, keep = self.transformer.resblocks, [None] * self.cfg.layers
        if seeds is not None and blocks[0].adapter_attn is not None:
            position = torch.arange(x.shape[1], device=x.device)
            keep = survivors(seeds[:, None], position[None], blocks[0].adapter_attn.cfg, 1000, len(blocks))
        cls = []
        for i, block in enumerate(blocks, start=1):
            x = block(x, keep[i - 1])
            if i % self.cfg.cls_every == 0:
                cls.append(x[:, 0])  # before ln_post, without the output projection
        return torch.stack(cls, dim=1)

    @classmethod
    def from_pretrained(cls, path: str | Path, device="cpu", dtype=torch.float32) -> "VisionTransformer":
        """Read official weights; ValueError or FileNotFoundError says in one line what is wrong."""
        sizes, tensors = weights.read_clip(path)
        with torch.device("meta"):
            model = cls(CLIPConfig(**sizes))
        weights.assign(model, tensors, path, device, dtype)
        return model


# ---------------------------------------------------------------------------------------------------
# pictures

# LaVIN's released recipe normalises with ImageNet's statistics, not with CLIP's own (deviation of the release)
MEAN_STD = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def open_image(path: str | Path) -> Image.Image:
    """An RGB picture, transparency on white; FileNotFoundError or ValueError in one line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such picture")
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode in ("RGBA", "LA", "P"):
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path}: not a readable picture ({e})") from None


def preprocess(image: Image.Image, size: int, normalize: str) -> torch.Tensor:
    """RGB picture -> [3, size, size]: bicubic straight to a square (no crop, aspect ratio not kept), mean/std"""
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mean, std = (np.array(x, dtype=np.float32) for x in MEAN_STD[normalize])
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1).contiguous()
