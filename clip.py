"""CLIP's vision transformer: the frozen image encoder, and the preprocessing of images.

    Radford et al. 2021: https://arxiv.org/abs/2103.00020

Official weights come from OpenAI (`ViT-L-14.pt`) or the Hugging Face hub; weights.py reads both. Parameters
have OpenAI's names. LaVIN takes the [cls] token after every fourth block, the last one included: six for
ViT-L/14. CLIP's own image embedding (the last [cls], after ln_post and a projection) is not used.

Shapes: N images, T = 1 + (image_size / patch_size)^2 tokens with [cls] first, C = width, n visual tokens of
an image, r hidden units of an adapter.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import weights
from llama import recomputed


@dataclass
class CLIPConfig:
    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    cls_every: int = 4  # LaVIN takes the [cls] token after every so many blocks
    activation: str = "quick_gelu"  # a key of ACTIVATIONS


PRESETS = {
    "ViT-L/14": CLIPConfig(),
    "ViT-B/16": CLIPConfig(patch_size=16, width=768, layers=12, heads=12),
    "tiny": CLIPConfig(image_size=64, patch_size=8, width=128, layers=6, heads=4, cls_every=1),
}
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}  # gelu: LAION's CLIPs


class LayerNorm(nn.LayerNorm):
    """Under autocast, CUDA's LayerNorm returns fp32. ln_pre's output starts the residual stream, so without
    the cast, this stream would be fp32 in all blocks."""

    def forward(self, x):
        return super().forward(x).type_as(x)


class Attention(nn.Module):
    """q, k and v in one matrix, with the names of torch's MultiheadAttention, which OpenAI used"""

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
        self.c_fc, self.c_proj = nn.Linear(cfg.width, 4 * cfg.width), nn.Linear(4 * cfg.width, cfg.width)
        self.activation = recomputed(ACTIVATIONS[cfg.activation])

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """x + attention(adapter(norm(x))), then x + mlp(norm(x)). The norms are LayerNorm.

    For the backward pass, autograd keeps for each token: x before each norm; q, k, v; attention's output;
    c_fc(x); and a number per head, the log-sum-exp of its scores (see llama.Block). The rest is recomputed.
    """

    def __init__(self, cfg: CLIPConfig):
        super().__init__()
        self.ln_1 = LayerNorm(cfg.width)
        self.attn = Attention(cfg)
        self.ln_2 = LayerNorm(cfg.width)
        self.mlp = MLP(cfg)
        self.adapter_attn = None  # an MMAdapter, once LaVIN adds it
        self.vit_routing = "cls"  # or "token"

    @recomputed
    def attention_input(self, x, dropout_mask):
        """Normalise, then Eq. (2). Each image is routed by its own [cls].

        In the released code, f_w reads z[:, 0], and z is [T, N, C] there. So z[:, 0] is not the [cls] token,
        but all tokens of the batch's first image: token i of every image is routed by token i of the first.
        The authors' adapters were trained with this. If we did the same, an answer would depend on the other
        images of the batch. So with their files, vit_routing is "token": each token is routed by its own
        state, as in the released code when a batch has a single image.
        """
        z = self.ln_1(x)
        if self.adapter_attn is None:
            return z
        t = z[:, :1] if self.vit_routing == "cls" else z  # [N, 1 or T, C]
        return self.adapter_attn(z, self.adapter_attn.f_w(t), dropout_mask)

    @recomputed
    def mlp_input(self, x):
        return self.ln_2(x)

    def forward(self, x, dropout_mask=None):
        """x [N, T, C]; dropout_mask of the adapter's hidden units, [N, T, r]"""
        x = x + self.attn(self.attention_input(x, dropout_mask))
        return x + self.mlp(self.mlp_input(x))


class VisionTransformer(nn.Module):
    def __init__(self, cfg: CLIPConfig):
        super().__init__()
        self.cfg = cfg
        patches = (cfg.image_size // cfg.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, cfg.width, cfg.patch_size, cfg.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(cfg.width) * cfg.width ** -0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + patches, cfg.width) * cfg.width ** -0.5)
        self.ln_pre = LayerNorm(cfg.width)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block(cfg) for _ in range(cfg.layers))})
        self.ln_post = LayerNorm(cfg.width)  # not used by LaVIN; here so that CLIP's weights load whole

    @property
    def n_visual(self) -> int:
        """n, the number of visual tokens of an image: one [cls] after every cls_every blocks."""
        return self.cfg.layers // self.cfg.cls_every

    def forward(self, images: torch.Tensor, dropout_mask: torch.Tensor | None = None) -> torch.Tensor:
        """X [N, n, C] of images [N, 3, image_size, image_size]: the [cls] tokens of n blocks.

        dropout_mask: of the hidden units of every block's adapter, [layers, N, T, r]; None: no dropout.
        """
        x = self.conv1(images.type_as(self.conv1.weight)).flatten(2).transpose(1, 2)  # [N, T - 1, C]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # [N, T, C]
        x = self.ln_pre(x + self.positional_embedding)
        cls = []
        for i, block in enumerate(self.transformer.resblocks):
            x = block(x, None if dropout_mask is None else dropout_mask[i])
            if (i + 1) % self.cfg.cls_every == 0:
                cls.append(x[:, 0])  # without ln_post and the output projection
        return torch.stack(cls, dim=1)

    @classmethod
    def from_pretrained(cls, path: str | Path, device="cpu", dtype=torch.float32) -> "VisionTransformer":
        """Read official weights; ValueError or FileNotFoundError if something is wrong."""
        return weights.load(cls, CLIPConfig, weights.read_clip, path, device, dtype)


# CLIP was trained with its own mean and std. The released code uses ImageNet's, and so does --recipe paper.
MEAN_STD = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def preprocess(image: Image.Image, size: int, normalize: str) -> torch.Tensor:
    """RGB image -> [3, size, size]: bicubic to a square (aspect ratio not kept, no crop), then mean/std."""
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mean, std = (np.array(x, dtype=np.float32) for x in MEAN_STD[normalize])
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1).contiguous()
