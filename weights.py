"""Official files -> our tensors: the only file that knows other people's names.

A reader returns (sizes, tensors): the sizes as keyword arguments of our config, and for every parameter name of
ours a function that reads that one tensor. Nothing is read before `assign` puts it where it belongs, so the memory
needed beyond the model itself is one tensor.

    LLaMA, Hugging Face layout    config.json, model.safetensors (or shards + model.safetensors.index.json)
    CLIP, Hugging Face layout     config.json, model.safetensors; keys with or without `vision_model.`
"""
import json
from functools import partial
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
from safetensors import safe_open

Tensors = dict[str, Callable[[], torch.Tensor]]


def read_json(path: Path) -> dict:
    """a JSON file, or one line about why not"""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None


def open_safetensors(folder: Path) -> Tensors:
    """Every tensor of model.safetensors, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif index.is_file():
        files = sorted(set(read_json(index)["weight_map"].values()))
    else:
        raise FileNotFoundError(f"{folder}: no weights here (expected model.safetensors or its shards)")
    tensors: Tensors = {}
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: missing shard; download it again")
        try:
            f = safe_open(folder / file, "pt")
        except Exception as e:
            raise ValueError(f"{folder / file}: not a readable safetensors file ({e}); download it again") from None
        for name in f.keys():
            tensors[name] = partial(f.get_tensor, name)
    return tensors


# ---------------------------------------------------------------------------------------------------
# LLaMA

LLAMA_HF = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}


def unpermute(read: Callable[[], torch.Tensor], n_heads: int) -> torch.Tensor:
    """Rows of q or k from the half-split rotary layout (i, i + D/2) to Meta's pairs (2i, 2i + 1)."""
    w = read()
    return w.view(n_heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)


def read_llama(path: str | Path) -> tuple[dict, Tensors]:
    """A LLaMA folder -> (sizes for LLaMAConfig, tensors under Meta's names)."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder of LLaMA weights")
    cfg = read_json(path / "config.json")
    if cfg.get("model_type") != "llama":
        raise ValueError(f"{path / 'config.json'}: model_type {cfg.get('model_type')!r}, expected 'llama'")
    if cfg.get("num_key_value_heads", cfg["num_attention_heads"]) != cfg["num_attention_heads"]:
        raise ValueError(f"{path / 'config.json'}: grouped-query attention is not LLaMA 7B or 13B")
    sizes = dict(
        dim=cfg["hidden_size"], n_layers=cfg["num_hidden_layers"], n_heads=cfg["num_attention_heads"],
        ffn_dim=cfg["intermediate_size"], vocab_size=cfg["vocab_size"], norm_eps=cfg["rms_norm_eps"],
        rope_theta=cfg.get("rope_theta") or cfg.get("rope_parameters", {}).get("rope_theta", 10000.0),
        max_seq_len=cfg.get("max_position_embeddings", 2048))
    tensors: Tensors = {}
    for name, read in open_safetensors(path).items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        stem, _, leaf = name.rpartition(".")
        layer = ""
        if stem.startswith("model.layers."):
            n, stem = stem.removeprefix("model.layers.").split(".", 1)
            layer = f"layers.{n}."
        if stem in ("self_attn.q_proj", "self_attn.k_proj"):
            read = partial(unpermute, read, sizes["n_heads"])
        tensors[f"{layer}{LLAMA_HF.get(stem, stem)}.{leaf}"] = read
    return sizes, tensors


# ---------------------------------------------------------------------------------------------------
# CLIP's image tower

CLIP_HF = {
    "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}


def concat(reads: list[Callable[[], torch.Tensor]]) -> torch.Tensor:
    return torch.cat([read() for read in reads])


def read_clip(path: str | Path) -> tuple[dict, Tensors]:
    """A CLIP folder -> (sizes for CLIPConfig, tensors of the image tower under OpenAI's names)."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder of CLIP weights")
    cfg = read_json(path / "config.json")
    cfg = cfg.get("vision_config", cfg)
    if "patch_size" not in cfg:
        raise ValueError(f"{path / 'config.json'}: not a CLIP image encoder (no patch_size)")
    sizes = dict(image_size=cfg["image_size"], patch_size=cfg["patch_size"], width=cfg["hidden_size"],
                 layers=cfg["num_hidden_layers"], heads=cfg["num_attention_heads"],
                 cls_every=cfg.get("cls_every", 4))  # our own key; CLIP knows nothing of it
    theirs = {name.removeprefix("vision_model."): read for name, read in open_safetensors(path).items()
              if not name.startswith(("text_model.", "text_projection", "visual_projection", "logit_scale"))
              and not name.endswith("position_ids")}
    tensors: Tensors = {}
    for name, read in theirs.items():
        if name in CLIP_HF:
            tensors[CLIP_HF[name]] = read
            continue
        stem, _, leaf = name.rpartition(".")
        block = ""
        if stem.startswith("encoder.layers."):
            n, stem = stem.removeprefix("encoder.layers.").split(".", 1)
            block = f"transformer.resblocks.{n}."
        if stem in ("self_attn.k_proj", "self_attn.v_proj"):
            continue  # read together with q
        if stem == "self_attn.q_proj":
            qkv = [theirs.get(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
            if None in qkv:
                raise ValueError(f"{path}: {name} without its k_proj or v_proj")
            tensors[f"{block}attn.in_proj_{leaf}"] = partial(concat, qkv)
        else:
            tensors[f"{block}{CLIP_HF.get(stem, stem)}.{leaf}"] = read
    return sizes, tensors


# ---------------------------------------------------------------------------------------------------

def assign(model: nn.Module, tensors: Tensors, path: str | Path, device, dtype) -> None:
    """Fill a model built on the meta device, one tensor at a time; every name and shape must match."""
    ours = dict(model.named_parameters())
    for what, names in (("lacks", ours.keys() - tensors.keys()), ("has unexpected", tensors.keys() - ours.keys())):
        if names:
            names = sorted(names)
            raise ValueError(f"{path}: {what} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else ""))
    for name, p in ours.items():
        t = tensors[name]()
        if t.shape != p.shape:
            raise ValueError(f"{path}: {name} is {list(t.shape)}, its config says {list(p.shape)}")
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(t.to(device, dtype), requires_grad=False))
