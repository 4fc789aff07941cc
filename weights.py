"""Official files -> our tensors: the only file that knows other people's names.

    LLaMA, Hugging Face   config.json, model.safetensors or pytorch_model.bin, or shards of either and their index
    LLaMA, Meta           params.json, consolidated.NN.pth
    CLIP, Hugging Face    as LLaMA's; the image tower alone or in a full CLIP, with or without `vision_model.`
    CLIP, OpenAI          ViT-L-14.pt, a TorchScript archive
    adapters, released    the authors' .pth checkpoints

    python weights.py show PATH                                what a path holds; reads no tensor
    python weights.py convert SRC DST                          any of them -> Hugging Face's layout, or our adapter file
    python weights.py export adapters.safetensors NEW.pth      our adapters -> the released code's names

A reader returns (sizes, tensors): keyword arguments of our config, and for every parameter of ours a `Lazy` that reads
it. `assign` then fills a model tensor by tensor, so the memory needed beyond the model is about one tensor.
"""
import argparse
import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

import adapters
import cli
from official import tensorfiles
from official.tensorfiles import Lazy, open_folder, read_json, write_folder

Tensors = dict[str, Lazy]


# ---------------------------------------------------------------------------------------------------
# what lies where

def identify(path: Path, wanted: str = "") -> str:
    """"LLaMA" or "CLIP", a comma, and whose layout. `wanted`: which of the two it has to be.

    ValueError or FileNotFoundError says what was expected.
    """
    layout = look(path, wanted)
    if not layout.startswith(wanted):
        raise ValueError(f"{path}: holds a {layout.partition(',')[0]}, expected a {wanted}; "
                         "did you swap --llama and --clip?")
    return layout


def look(path: Path, wanted: str) -> str:
    if path.suffix == ".pt" and path.is_file():
        return "CLIP, OpenAI"
    here = {f.name for f in path.iterdir()} if path.is_dir() else set()
    meta = sorted(name for name in here if re.fullmatch(r"consolidated\.\d\d\.pth", name))
    hf = sorted(name for name in here if re.match(r"(pytorch_)?model\b.*\.(safetensors|bin)", name))
    if "params.json" in here and meta:
        return "LLaMA, Meta"
    if "config.json" in here and (hf or not meta):
        kind = read_json(path / "config.json").get("model_type")
        known = {"llama": "LLaMA", "clip": "CLIP", "clip_vision_model": "CLIP"}
        if kind not in known:
            raise ValueError(f"{path / 'config.json'}: model_type {kind!r}; known: {', '.join(known)}")
        return f"{known[kind]}, Hugging Face"
    if meta:
        raise FileNotFoundError(f"{path}: {meta[0]} is Meta's layout; put the params.json that came with it beside it")
    if hf:
        raise FileNotFoundError(f"{path}: {hf[0]} is Hugging Face's layout; put the config.json that came with it "
                                "beside it")
    if len([name for name in here if name.endswith(".pt")]) == 1:
        return "CLIP, OpenAI"
    raise FileNotFoundError(f"{path}: no such folder of {wanted or 'LLaMA or CLIP'} weights; expected config.json with "
                            "model.safetensors (Hugging Face), params.json with consolidated.00.pth (Meta) or "
                            "ViT-L-14.pt (OpenAI's CLIP)")


def tokenizer_path(path: str | Path) -> Path:
    """tokenizer.model in a folder of LLaMA weights or, as Meta has it, one folder up"""
    for folder in (Path(path), Path(path).resolve().parent):
        if (folder / "tokenizer.model").is_file():
            return folder / "tokenizer.model"
    raise FileNotFoundError(f"{Path(path) / 'tokenizer.model'}: not there, nor one folder up; it comes with the LLaMA "
                            "weights")


# ---------------------------------------------------------------------------------------------------
# names and shapes

def join(parts: list[Lazy], dim: int = 0) -> Lazy:
    """what torch.cat would give, once it is read"""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[dim] = sum(t.shape[dim] for t in parts)
    return Lazy(tuple(shape), parts[0].dtype, lambda: torch.cat([t() for t in parts], dim))


def take(path: Path, wanted: dict[str, list[str]], found: Tensors, ignored: str = "(?!)") -> Tensors:
    """wanted: {our name: their names, joined by rows}. Whatever else is there must match the pattern `ignored`."""
    used = {name for names in wanted.values() for name in names}
    missing = sorted(used - found.keys())
    unexpected = sorted(name for name in found.keys() - used if not re.search(ignored, name))
    complain(path, {"missing": missing, "unexpected": unexpected}, "is the download complete, and of this model?")
    return {ours: join([found[name] for name in theirs]) for ours, theirs in wanted.items()}


def complain(path, problems: dict[str, list[str]], hint: str) -> None:
    """ValueError with all problems in one line, three names each"""
    texts = [f"{what} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
             for what, names in problems.items() if names]
    if texts:
        raise ValueError(f"{path}: {'; '.join(texts)}; {hint}")


def assign(model: nn.Module, tensors: Tensors, path: str | Path, device, dtype) -> None:
    """Fill a model built on the meta device, one tensor at a time, each in its own memory on `device`, as `dtype`."""
    ours = dict(model.named_parameters())
    assert ours.keys() == tensors.keys(), f"readers and model differ in {ours.keys() ^ tensors.keys()}"
    wrong = [f"{name} {list(tensors[name].shape)} instead of {list(p.shape)}"
             for name, p in ours.items() if tensors[name].shape != p.shape]
    complain(path, {"wrong shapes": wrong}, "the weights and the configuration beside them are of different models")
    for name in ours:
        owner, _, leaf = name.rpartition(".")
        p = nn.Parameter(tensors[name]().to(device, dtype, copy=True), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, p)


# ---------------------------------------------------------------------------------------------------
# LLaMA

LLAMA_HF = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
LLAMA_HF_BLOCK = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}
ROTARY = re.compile(r"attention\.w[qk]\.weight$")  # their rows are ordered differently in the two layouts


def llama_names(n_layers: int) -> dict[str, str]:
    """{our name: Hugging Face's}; ours are Meta's"""
    names = {f"{a}.weight": f"{b}.weight" for a, b in LLAMA_HF.items()}
    for i in range(n_layers):
        names |= {f"layers.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in LLAMA_HF_BLOCK.items()}
    return names


def to_pairs(read, n_heads: int) -> torch.Tensor:
    """Rows of q or k from the half-split rotary layout (i, i + D/2) to Meta's pairs (2i, 2i + 1)."""
    w = read()
    return w.view(n_heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)


def to_halves(read, n_heads: int) -> torch.Tensor:
    """the way back"""
    w = read()
    return w.view(n_heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def read_llama(path: str | Path) -> tuple[dict, Tensors]:
    """A LLaMA folder -> (sizes for LLaMAConfig, tensors under Meta's names)."""
    path = Path(path)
    return read_llama_meta(path) if identify(path, "LLaMA") == "LLaMA, Meta" else read_llama_hf(path)


def read_llama_hf(path: Path) -> tuple[dict, Tensors]:
    cfg = read_json(path / "config.json")
    rope = cfg.get("rope_parameters") or {}
    try:
        sizes = dict(dim=cfg["hidden_size"], n_layers=cfg["num_hidden_layers"], n_heads=cfg["num_attention_heads"],
                     ffn_dim=cfg["intermediate_size"], vocab_size=cfg["vocab_size"], norm_eps=cfg["rms_norm_eps"],
                     rope_theta=cfg.get("rope_theta") or rope.get("rope_theta", 10000.0),
                     max_seq_len=cfg.get("max_position_embeddings", 2048))
    except KeyError as e:
        raise ValueError(f"{path / 'config.json'}: {e.args[0]} is missing; download it again") from None
    like_llama1 = {"num_key_value_heads": sizes["n_heads"], "head_dim": sizes["dim"] // sizes["n_heads"],
                   "hidden_act": "silu", "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
                   "tie_word_embeddings": False}
    check_config(path, {**cfg, **({"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {})},
                 like_llama1, "LLaMA-1 and LLaMA-2, 7B and 13B,")
    found = open_folder(path)
    if "tok_embeddings.weight" in found:
        raise ValueError(f"{path}: the tensors are in Meta's layout, config.json is Hugging Face's; their rotary rows "
                         "differ, so name the file consolidated.00.pth and put Meta's params.json beside it")
    wanted = {ours: [theirs] for ours, theirs in llama_names(sizes["n_layers"]).items()}
    tensors = take(path, wanted, found, r"rotary_emb\.inv_freq$")
    return sizes, {name: t._replace(read=partial(to_pairs, t, sizes["n_heads"])) if ROTARY.search(name) else t
                   for name, t in tensors.items()}


def check_config(path: Path, cfg: dict, expected: dict, what: str) -> None:
    """ValueError if config.json asks for something that our model does not compute; an absent key is its default"""
    for key, value in expected.items():
        if cfg.get(key, value) not in (value, None):
            raise ValueError(f"{path / 'config.json'}: {key} {cfg[key]!r}, expected {value!r}; only {what} work here")


def read_llama_meta(path: Path) -> tuple[dict, Tensors]:
    params = read_json(path / "params.json")
    try:
        dim, n_layers, n_heads, eps = (params[key] for key in ("dim", "n_layers", "n_heads", "norm_eps"))
    except KeyError as e:
        raise ValueError(f"{path / 'params.json'}: {e.args[0]} is missing; download it again") from None
    if params.get("n_kv_heads", n_heads) != n_heads:
        raise ValueError(f"{path / 'params.json'}: n_kv_heads {params['n_kv_heads']}; only 7B and 13B, which have none, "
                         "work here")
    mapped = tensorfiles.Mapped()
    shards = [tensorfiles.open_torch(path / "consolidated.00.pth", mapped)]
    first = shards[0].get("tok_embeddings.weight")
    if first is None:
        raise ValueError(f"{path}: consolidated.00.pth has no tok_embeddings.weight, so it is not in Meta's layout as "
                         "params.json says; if it is Hugging Face's, name it pytorch_model.bin and put its config.json "
                         "in place of params.json")
    here = {f.name for f in path.glob("consolidated.*.pth")}
    files = [f"consolidated.{i:02}.pth" for i in range(max(1, dim // first.shape[1]))]
    complain(path, {"missing shard": sorted(set(files) - here), "unexpected": sorted(here - set(files))},
             f"this model has {len(files)}; download it again")
    shards += [tensorfiles.open_torch(path / file, mapped) for file in files[1:]]

    names, tensors = llama_names(n_layers), {}
    for file, shard in zip(files, shards):
        take(path / file, {name: [name] for name in names}, shard, r"rope\.freqs$")
    for name in names:
        parts = [shard[name] for shard in shards]
        if "norm" in name:  # whole in every shard
            tensors[name] = parts[0]
        else:
            tensors[name] = join(parts, dim=1 if re.search(r"wo|w2|tok_embeddings", name) else 0)
    # vocab_size is -1 there and the FFN's width a formula, so both are read off the tensors. The context's length is
    # not told: 2048 is LLaMA-1's; LLaMA-2 allows 4096, add max_seq_len to params.json to use it.
    sizes = dict(dim=dim, n_layers=n_layers, n_heads=n_heads, norm_eps=eps,
                 ffn_dim=tensors["layers.0.feed_forward.w1.weight"].shape[0],
                 vocab_size=tensors["tok_embeddings.weight"].shape[0],
                 rope_theta=params.get("rope_theta", 10000.0), max_seq_len=params.get("max_seq_len", 2048))
    return sizes, tensors


def llama_to_hf(sizes: dict, tensors: Tensors) -> tuple[dict, Tensors]:
    """-> (config.json, tensors under Hugging Face's names)"""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": sizes["dim"],
        "intermediate_size": sizes["ffn_dim"], "num_hidden_layers": sizes["n_layers"],
        "num_attention_heads": sizes["n_heads"], "num_key_value_heads": sizes["n_heads"],
        "rms_norm_eps": sizes["norm_eps"], "rope_theta": sizes["rope_theta"], "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": sizes["max_seq_len"], "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False, "attention_bias": False}
    names = llama_names(sizes["n_layers"])
    tensors = {name: t._replace(read=partial(to_halves, t, sizes["n_heads"])) if ROTARY.search(name) else t
               for name, t in tensors.items()}
    return config, {theirs: tensors[ours] for ours, theirs in names.items()}


# ---------------------------------------------------------------------------------------------------
# CLIP's image tower

CLIP_HF = {
    "class_embedding": "embeddings.class_embedding", "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight", "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight", "ln_post.bias": "post_layernorm.bias",
}
CLIP_HF_BLOCK = {"ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.", "attn.out_proj.": "self_attn.out_proj.",
                 "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2."}


def clip_names(layers: int) -> dict[str, list[str]]:
    """{our name: Hugging Face's, joined by rows}; ours are OpenAI's, where q, k and v are one matrix"""
    names = {a: [b] for a, b in CLIP_HF.items()}
    for i in range(layers):
        for leaf in ("weight", "bias"):
            names |= {f"transformer.resblocks.{i}.{a}{leaf}": [f"encoder.layers.{i}.{b}{leaf}"]
                      for a, b in CLIP_HF_BLOCK.items()}
            names[f"transformer.resblocks.{i}.attn.in_proj_{leaf}"] = [
                f"encoder.layers.{i}.self_attn.{x}_proj.{leaf}" for x in "qkv"]
    return names


def read_clip(path: str | Path) -> tuple[dict, Tensors]:
    """A CLIP folder or OpenAI file -> (sizes for CLIPConfig, tensors of the image tower under OpenAI's names)."""
    path = Path(path)
    return read_clip_openai(path) if identify(path, "CLIP") == "CLIP, OpenAI" else read_clip_hf(path)


def read_clip_hf(path: Path) -> tuple[dict, Tensors]:
    cfg = read_json(path / "config.json")
    cfg = cfg.get("vision_config") or cfg
    try:
        sizes = dict(image_size=cfg["image_size"], patch_size=cfg["patch_size"], width=cfg["hidden_size"],
                     layers=cfg["num_hidden_layers"], heads=cfg["num_attention_heads"],
                     cls_every=cfg.get("cls_every", 4))  # our own key; CLIP knows nothing of it
    except KeyError as e:
        raise ValueError(f"{path / 'config.json'}: {e.args[0]} is missing; expected a CLIP's image encoder") from None
    check_config(path, cfg, {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}, "the CLIPs that OpenAI trained")
    found = {name.removeprefix("vision_model."): t for name, t in open_folder(path).items()}
    ignored = r"^text_model\.|^(text|visual)_projection\.weight$|^logit_scale$|\.position_ids$"
    return sizes, take(path, clip_names(sizes["layers"]), found, ignored)


def read_clip_openai(path: Path) -> tuple[dict, Tensors]:
    if path.is_dir():
        (path,) = path.glob("*.pt")
    if tensorfiles.is_torchscript(path):
        found = tensorfiles.open_torchscript(path)
    else:
        found = tensorfiles.open_torch(path, tensorfiles.Mapped())
    conv, pos = found.get("visual.conv1.weight"), found.get("visual.positional_embedding")
    if conv is None or pos is None:
        raise ValueError(f"{path}: no vision transformer in it (visual.conv1.weight, visual.positional_embedding); "
                         "expected OpenAI's ViT-L-14.pt or another of its ViTs")
    width, layers = conv.shape[0], len([name for name in found if re.fullmatch(r"visual\..*\.ln_1\.weight", name)])
    sizes = dict(image_size=round((pos.shape[0] - 1) ** 0.5) * conv.shape[-1], patch_size=conv.shape[-1], width=width,
                 layers=layers, heads=max(1, width // 64))  # OpenAI's heads are 64 wide; nothing in the file says so
    wanted = {name: [f"visual.{name}"] for name in clip_names(layers)}
    return sizes, take(path, wanted, found, r"^(?!visual\.)|^visual\.proj$")


def clip_to_hf(sizes: dict, tensors: Tensors) -> tuple[dict, Tensors]:
    """-> (config.json, tensors under Hugging Face's names, with the prefix that old and new transformers read)"""
    config = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "quick_gelu",
              "hidden_size": sizes["width"], "intermediate_size": 4 * sizes["width"], "num_hidden_layers": sizes["layers"],
              "num_attention_heads": sizes["heads"], "image_size": sizes["image_size"], "patch_size": sizes["patch_size"],
              "layer_norm_eps": 1e-5, **({"cls_every": sizes["cls_every"]} if "cls_every" in sizes else {})}
    out = {}
    for ours, theirs in clip_names(sizes["layers"]).items():
        t = tensors[ours]
        for i, name in enumerate(theirs):
            shape = (t.shape[0] // len(theirs), *t.shape[1:])
            out[f"vision_model.{name}"] = Lazy(shape, t.dtype, lambda t=t, i=i, n=len(theirs): t().chunk(n)[i])
    return config, out


# ---------------------------------------------------------------------------------------------------
# adapters as the authors released them

RELEASED = {"phi_d": "conv_A", "phi_u1": "conv_B", "phi_u2": "conv_D", "f_w": "expert_weights"}
EMBEDDING = "adapter_modality_embedding.weight"


def released_names(n_layers: int, vit_layers: int) -> dict[str, str]:
    """{our name: the released code's}"""
    names = {"adapter_proj.W_d": "adapter_proj.conv_A", "adapter_proj.W_u": "adapter_proj.conv_B"}
    blocks = [(f"llama.layers.{i}", f"layers.{i}") for i in range(n_layers)]
    blocks += [(f"vit.{x}", f"backbone.visual.{x}") for x in (f"transformer.resblocks.{i}" for i in range(vit_layers))]
    for ours, theirs in blocks:
        names |= {f"{ours}.adapter_attn.{a}": f"{theirs}.adapter_attn.{b}" for a, b in RELEASED.items()}
    names = {f"{a}.{leaf}": f"{b}.{leaf}" for a, b in names.items() for leaf in ("weight", "bias")}
    return {EMBEDDING: EMBEDDING, **names}


def count(names, pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)


def read_adapters(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors by our names, metadata) of our adapter file, or of a .pth checkpoint that the authors released.

    A released file does not tell the base it was trained on, so `base` is None; it does not tell either what is the
    same in all of them: routing token by token (see clip.Block) and ImageNet's mean and std.
    """
    path = Path(path)
    if path.suffix != ".pth" or not path.is_file():
        return adapters.read_adapters(path)
    state = tensorfiles.load_torch(path, mmap=True, allow=(argparse.Namespace,))
    state = state if isinstance(state, dict) else {}
    args, model = state.get("args"), state.get("model", state)
    args = vars(args) if isinstance(args, argparse.Namespace) else {}  # the flags it was trained with
    found = {str(name).removeprefix("module."): t for name, t in dict(model).items() if isinstance(t, torch.Tensor)}
    n_layers = count(found, r"layers\.\d+\.adapter_attn\.conv_A\.bias")
    vit_layers = count(found, r"backbone\..*\.adapter_attn\.conv_A\.bias")
    if not n_layers:
        raise ValueError(f"{path}: no adapters in it (layers.0.adapter_attn.conv_A.bias); expected a LaVIN checkpoint "
                         "that the authors released")
    tensors = take(path, {ours: [theirs] for ours, theirs in released_names(n_layers, vit_layers).items()}, found)
    # phi_d and phi_u are 1x1 convolutions there, [.., .., 1]
    tensors = {name: (t.squeeze(-1) if t.ndim == 3 else t).float().contiguous() for name, t in tensors.items()}

    dim = tensors[EMBEDDING].shape[1]
    adapter = {"kind": "mm", "dim": tensors["llama.layers.0.adapter_attn.phi_d.bias"].shape[0],
               "scale": float(args.get("adapter_scale", 1.0)), "dropout": 0.1,
               "tau": float(args.get("temperature", 5.0 if dim == 5120 else 10.0))}
    cfg = {"adapter": adapter, "vision": True, "vit_adapters": vit_layers > 0, "vit_routing": "token",
           "neck_dim": tensors["adapter_proj.W_d.bias"].shape[0], "normalize": "imagenet"}
    return tensors, {"lavin": cfg, "llama": {"dim": dim, "n_layers": n_layers}, "base": None, "max_new_tokens": 256,
                     "format": args.get("prompt_format", "QCM-ALE"), "captions": bool(args.get("use_caption", False))}


def export_adapters(src: Path, dst: Path) -> None:
    """Our adapter file -> a checkpoint under the released code's names."""
    tensors, meta = read_adapters(src)
    cfg, adapter = meta["lavin"], meta["lavin"]["adapter"]
    if adapter["kind"] != "mm" or not cfg["vision"]:
        raise ValueError(f"{src}: text-only or plain adapters; the released code has no names for them")
    names = released_names(*(count(tensors, rf"{tower}\..*\.adapter_attn\.phi_d\.bias") for tower in ("llama", "vit")))
    model = take(src, {theirs: [ours] for ours, theirs in names.items()}, tensors)
    if cfg["vit_routing"] != "token":
        print("note: trained with each picture routed by its own [cls]; the released code routes token by token, after "
              "the first picture of a batch, so its answers will differ", file=sys.stderr)
    model = {name: t[..., None] if re.search(r"adapter_attn\.conv_.\.weight", name) else t for name, t in model.items()}
    args = argparse.Namespace(adapter_dim=adapter["dim"], adapter_scale=adapter["scale"], temperature=adapter["tau"],
                              prompt_format=meta["format"], use_caption=meta["captions"])
    torch.save({"model": model, "args": args}, dst)


# ---------------------------------------------------------------------------------------------------
# commands

def convert(src: Path, dst: Path) -> None:
    """Any layout -> Hugging Face's, bit for bit and in the same dtype; a released .pth -> our adapter file."""
    if src.is_file() and src.suffix == ".pth":
        return adapters.write_adapters(dst, *read_adapters(src))
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst}: exists and is not an empty folder; choose another")
    if identify(src).startswith("CLIP"):
        return write_folder(dst, *clip_to_hf(*read_clip(src)))
    tokenizer = tokenizer_path(src)
    write_folder(dst, *llama_to_hf(*read_llama(src)))
    shutil.copyfile(tokenizer, dst / "tokenizer.model")


def show(path: Path) -> str:
    """What lies at a path; of weights only the headers are read."""
    if path.is_file() and path.suffix != ".pt":
        tensors, meta = read_adapters(path)
        rows = {"holds": "LaVIN adapters", **{key: json.dumps(value) for key, value in meta.items()}}
    else:
        layout = identify(path)
        sizes, tensors = (read_llama if layout.startswith("LLaMA") else read_clip)(path)
        rows = {"holds": layout, "sizes": ", ".join(f"{key} {value}" for key, value in sizes.items())}
        if layout.startswith("LLaMA"):
            try:
                rows["tokenizer"] = tokenizer_path(path)
            except FileNotFoundError as e:
                rows["tokenizer"] = f"none: {e}"
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    rows["parameters"] = (f"{sum(t.nbytes // t.dtype.itemsize for t in tensors.values()):,} in {len(tensors)} tensors, "
                          f"{dtypes}, {sum(t.nbytes for t in tensors.values()) / 1e6:,.1f} MB")
    return "\n".join(f"{key:<14} {value}" for key, value in rows.items())


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="show | convert | export")
    commands.add_parser("show", help="what a path holds").add_argument("path", type=Path)
    for name, text in (("convert", "to Hugging Face's layout"), ("export", "adapters to the released code's names")):
        command = commands.add_parser(name, help=text)
        command.add_argument("src", type=Path)
        command.add_argument("dst", type=Path)
    args = parser.parse_args()
    if args.command == "show":
        print(show(args.path))
    else:
        {"convert": convert, "export": export_adapters}[args.command](args.src, args.dst)
        print(f"wrote {args.dst}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
