"""Adapters as the authors released them: pickled checkpoints under the names of their code.

phi_d and phi_u are 1x1 convolutions there, with weights [out, in, 1].
"""
import argparse
import io
import re
import sys
from pathlib import Path

import torch

from official.configs import Config
from official.mistakes import BadFile, described
from official.names import check_shapes, take
from official.saving import write_atomically
from official.tensorfiles import check_tensors, load_torch

ADAPTER = {"phi_d": "conv_A", "phi_u1": "conv_B", "phi_u2": "conv_D", "f_w": "expert_weights"}
EMBEDDING = "adapter_modality_embedding.weight"


def released_names(n_layers: int, vit_layers: int) -> dict[str, str]:
    """{our name: the released code's name}"""
    names = {"adapter_proj.W_d": "adapter_proj.conv_A", "adapter_proj.W_u": "adapter_proj.conv_B"}
    blocks = {f"llama.layers.{i}": f"layers.{i}" for i in range(n_layers)}
    blocks |= {f"vit.transformer.resblocks.{i}": f"backbone.visual.transformer.resblocks.{i}"
               for i in range(vit_layers)}
    for ours, theirs in blocks.items():
        names |= {f"{ours}.adapter_attn.{a}": f"{theirs}.adapter_attn.{b}" for a, b in ADAPTER.items()}
    names = {f"{a}.{leaf}": f"{b}.{leaf}" for a, b in names.items() for leaf in ("weight", "bias")}
    return {EMBEDDING: EMBEDDING, **names}


def count(names, pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)


def read_released(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """A released checkpoint -> (tensors under our names, metadata of our adapter file).

    The file does not name the base model that it was trained on, so `base` is None. Nor does it store two
    choices that all released files share: each token of the ViT routes by itself (see clip.Block), and
    pictures are normalised with ImageNet's mean and std.
    """
    state = load_torch(path, allow=(argparse.Namespace,))
    whole = state if isinstance(state, dict) and "model" in state else {"model": state}
    args = whole.get("args", argparse.Namespace())
    if not isinstance(args, argparse.Namespace):
        raise BadFile(f"{path}: args is {described(args)}, expected a Namespace of training flags; "
                      "download it again")
    flags = Config(path, vars(args), "args.")
    found = {name.removeprefix("module."): t for name, t in check_tensors(path, whole["model"]).items()}
    n_layers = count(found, r"layers\.\d+\.adapter_attn\.conv_A\.bias")
    vit_layers = count(found, r"backbone\..*\.adapter_attn\.conv_A\.bias")
    if not n_layers:
        raise BadFile(f"{path}: no adapters in it (layers.0.adapter_attn.conv_A.bias); expected a LaVIN "
                      "checkpoint that the authors released")
    wanted = {ours: [theirs] for ours, theirs in released_names(n_layers, vit_layers).items()}
    tensors = {name: (t.squeeze(-1) if t.ndim == 3 else t).float().contiguous()
               for name, t in take(path, wanted, found).items()}
    check_shapes(path, tensors, lambda name, shape: len(shape) == (1 if name.endswith("bias") else 2),
                 "vectors for biases and matrices for the rest")

    dim = tensors[EMBEDDING].shape[1]
    adapter = {"kind": "mm", "dim": tensors["llama.layers.0.adapter_attn.phi_d.bias"].shape[0],
               "scale": flags.number("adapter_scale", 1.0), "dropout": 0.1,
               "tau": flags.number("temperature", 5.0 if dim == 5120 else 10.0)}
    cfg = {"adapter": adapter, "vision": True, "vit_adapters": vit_layers > 0, "vit_routing": "token",
           "neck_dim": tensors["adapter_proj.W_d.bias"].shape[0], "normalize": "imagenet"}
    return tensors, {"lavin": cfg, "llama": {"dim": dim, "n_layers": n_layers}, "base": None,
                     "format": flags.text("prompt_format", "QCM-ALE"),
                     "captions": flags.flag("use_caption", False), "max_new_tokens": 256}


def write_released(dst: Path, tensors: dict[str, torch.Tensor], meta: dict, src: Path) -> None:
    """Write our adapters as a checkpoint that the released code reads. `src` is their file, for messages."""
    cfg, adapter = meta["lavin"], meta["lavin"]["adapter"]
    if adapter["kind"] != "mm" or not cfg["vision"]:
        raise BadFile(f"{src}: text-only adapters or plain RepAdapters, for which the released code has "
                      "no names; expected adapters with a router and a neck")
    n_layers = count(tensors, r"llama\..*\.adapter_attn\.phi_d\.bias")
    vit_layers = count(tensors, r"vit\..*\.adapter_attn\.phi_d\.bias")
    names = released_names(n_layers, vit_layers)
    model = take(src, {theirs: [ours] for ours, theirs in names.items()}, tensors)
    if cfg["vit_routing"] != "token":
        print("note: these adapters were trained with each picture routed by its own [cls]; the released "
              "code routes each token by that token of the batch's first picture, so its answers will differ",
              file=sys.stderr)
    convolution = re.compile(r"adapter_attn\.conv_.\.weight")
    model = {name: t[..., None] if convolution.search(name) else t for name, t in model.items()}
    args = argparse.Namespace(adapter_dim=adapter["dim"], adapter_scale=adapter["scale"],
                              temperature=adapter["tau"], prompt_format=meta["format"],
                              use_caption=meta["captions"])
    file = io.BytesIO()
    torch.save({"model": model, "args": args}, file)
    write_atomically(dst, file.getvalue())
