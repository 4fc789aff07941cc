"""CLIP's two layouts; of the model, only the image encoder is read.

    Hugging Face    config.json, model.safetensors or pytorch_model.bin; the image encoder alone or in a
                    full CLIP, with or without the prefix `vision_model.`
    OpenAI          ViT-L-14.pt, a TorchScript archive, or the same tensors as a torch pickle

Our parameter names are OpenAI's. OpenAI has q, k and v in one matrix, Hugging Face has three.
"""
import re
from math import isqrt
from pathlib import Path

from official.configs import read_config
from official.mistakes import BadFile
from official.names import check_shapes, take
from official.tensorfiles import Lazy, Mapped, Tensors, open_folder, open_torch
from official.torchscript import is_torchscript, open_torchscript

MODEL = {
    "class_embedding": "embeddings.class_embedding", "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight", "ln_pre.bias": "pre_layrnorm.bias",  # Hugging Face's spelling
    "ln_post.weight": "post_layernorm.weight", "ln_post.bias": "post_layernorm.bias",
}
BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
         "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}

ACTIVATIONS = "quick_gelu", "gelu"  # OpenAI's, LAION's
VIT_B_32 = {"image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 12}  # what Hugging Face leaves out of the section of a full CLIP


def hf_names(layers: int) -> dict[str, list[str]]:
    """{our name: Hugging Face's names, whose tensors are concatenated along their rows}"""
    names = {a: [b] for a, b in MODEL.items()}
    for i in range(layers):
        for leaf in ("weight", "bias"):
            names |= {f"transformer.resblocks.{i}.{a}.{leaf}": [f"encoder.layers.{i}.{b}.{leaf}"]
                      for a, b in BLOCK.items()}
            names[f"transformer.resblocks.{i}.attn.in_proj_{leaf}"] = [
                f"encoder.layers.{i}.self_attn.{x}_proj.{leaf}" for x in "qkv"]
    return names


# ---------------------------------------------------------------------------------------------------
# Hugging Face

def read_hf(folder: Path) -> tuple[dict, Tensors]:
    """A folder in Hugging Face's layout -> (sizes for CLIPConfig, tensors under our names)."""
    cfg = read_config(folder / "config.json")
    if cfg.values.get("vision_config"):  # a full CLIP has one section for each encoder
        cfg = cfg.section("vision_config")
        cfg.values = {**VIT_B_32, **cfg.values}
    image_size, layers = cfg.whole("image_size", most=2**13), cfg.whole("num_hidden_layers", most=1000)
    sizes = dict(
        image_size=image_size, patch_size=cfg.whole("patch_size", most=image_size),
        width=cfg.whole("hidden_size"), layers=layers, heads=cfg.whole("num_attention_heads"),
        cls_every=cfg.whole("cls_every", min(4, layers), most=layers),  # LaVIN's own key
        activation=cfg.value("hidden_act", ACTIVATIONS.__contains__, " or ".join(ACTIVATIONS), "quick_gelu"))
    cfg.multiple("hidden_size", "num_attention_heads")
    cfg.expect({"intermediate_size": 4 * sizes["width"], "layer_norm_eps": 1e-5},
               "the CLIP models of official/MODELS.md")
    found = {name.removeprefix("vision_model."): t for name, t in open_folder(folder).items()}
    ignored = r"^text_model\.|^(text|visual)_projection\.weight$|^logit_scale$|\.position_ids$"
    return sizes, take(folder, hf_names(sizes["layers"]), found, ignored)


def to_hf(sizes: dict, tensors: Tensors) -> tuple[dict, Tensors]:
    """The way back: (values for config.json, tensors under Hugging Face's names).

    The names have the prefix `vision_model.`, because old and new versions of transformers read them with it.
    """
    config = {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model",
        "hidden_act": sizes.get("activation", "quick_gelu"),
        "hidden_size": sizes["width"], "intermediate_size": 4 * sizes["width"],
        "num_hidden_layers": sizes["layers"], "num_attention_heads": sizes["heads"],
        "image_size": sizes["image_size"], "patch_size": sizes["patch_size"], "layer_norm_eps": 1e-5}
    if "cls_every" in sizes:
        config["cls_every"] = sizes["cls_every"]
    out = {}
    for ours, theirs in hf_names(sizes["layers"]).items():
        t = tensors[ours]
        for i, name in enumerate(theirs):
            n, shape = len(theirs), (t.shape[0] // len(theirs), *t.shape[1:])
            out[f"vision_model.{name}"] = Lazy(shape, t.dtype, lambda t=t, i=i, n=n: t().chunk(n)[i])
    return config, out


# ---------------------------------------------------------------------------------------------------
# OpenAI

def read_openai(path: Path) -> tuple[dict, Tensors]:
    """An OpenAI file, or a folder with one -> (sizes for CLIPConfig, tensors under our names)."""
    if path.is_dir():
        (path,) = path.glob("*.pt")
    found = open_torchscript(path) if is_torchscript(path) else open_torch(path, Mapped())
    conv, positions = found.get("visual.conv1.weight"), found.get("visual.positional_embedding")
    if conv is None or positions is None:
        raise BadFile(f"{path}: no vision transformer in it (visual.conv1.weight, "
                      "visual.positional_embedding); expected OpenAI's ViT-L-14.pt or another of its ViTs")
    if len(conv.shape) != 4 or len(positions.shape) != 2 or min(conv.shape + positions.shape) < 1:
        raise BadFile(f"{path}: visual.conv1.weight {list(conv.shape)} and visual.positional_embedding "
                      f"{list(positions.shape)} are not those of a vision transformer; download it again")
    width, patch_size, patches = conv.shape[0], conv.shape[-1], positions.shape[0] - 1
    if width % 64:
        raise BadFile(f"{path}: the ViT is {width} wide, expected a multiple of 64, because OpenAI's heads "
                      "are 64 wide and no number of heads is stored; use a folder in Hugging Face's layout")
    layers = len([name for name in found if re.fullmatch(r"visual\..*\.ln_1\.weight", name)])
    sizes = dict(image_size=isqrt(patches) * patch_size, patch_size=patch_size, width=width,
                 layers=layers, heads=width // 64)
    wanted = {name: [f"visual.{name}"] for name in hf_names(layers)}
    tensors = take(path, wanted, found, ignored=r"^(?!visual\.)|^visual\.proj$")
    check_shapes(path, tensors, lambda name, shape: "in_proj" not in name or shape[:1] == (3 * width,),
                 f"{3 * width} rows for q, k and v")
    return sizes, tensors
