"""LLaMA's two layouts: names, rotary permutation, sharding.

    Hugging Face    config.json, model.safetensors or pytorch_model.bin, or shards of either
    Meta            params.json, consolidated.NN.pth

Our parameter names are Meta's. The two layouts order the rows of wq and wk differently: in a head of width D,
Meta rotates the pairs (2i, 2i + 1) and Hugging Face rotates the pairs (i, i + D/2).
"""
import re
from functools import partial
from pathlib import Path
from typing import Callable

import torch

from official.configs import Config, read_config
from official.mistakes import BadFile, complain
from official.names import check_shapes, join, take
from official.rope import read_scaling
from official.tensorfiles import Lazy, Mapped, Tensors, open_folder, open_torch

MODEL = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}
ROTARY = re.compile(r"attention\.w([qk])\.weight$")  # the parameters whose rows are permuted
COLUMNS = re.compile(r"wo|w2|tok_embeddings")  # Meta's shards split these by columns, other matrices by rows
SUPPORTED = "the models of official/MODELS.md"


def hf_names(n_layers: int) -> dict[str, str]:
    """{our name: Hugging Face's name}"""
    names = {f"{a}.weight": f"{b}.weight" for a, b in MODEL.items()}
    for i in range(n_layers):
        names |= {f"layers.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in BLOCK.items()}
    return names


def halves_to_pairs(read: Callable[[], torch.Tensor], n_heads: int) -> torch.Tensor:
    """Reorder the rows of wq or wk from Hugging Face's layout to Meta's."""
    w = read()
    return w.view(n_heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)


def pairs_to_halves(read: Callable[[], torch.Tensor], n_heads: int) -> torch.Tensor:
    """Reorder the rows of wq or wk from Meta's layout to Hugging Face's."""
    w = read()
    return w.view(n_heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def reorder(tensors: Tensors, how: Callable, sizes: dict) -> Tensors:
    heads = {"q": sizes["n_heads"], "k": sizes["n_kv_heads"]}
    return {name: t._replace(read=partial(how, t, heads[found[1]])) if (found := ROTARY.search(name)) else t
            for name, t in tensors.items()}


def kv_heads(cfg: Config, heads: str, kv: str) -> int:
    """The number of key/value heads. In grouped-query attention, several heads share one."""
    if cfg.values.get(kv) is not None:
        cfg.multiple(heads, kv)
    return cfg.whole(kv, cfg.whole(heads))


# ---------------------------------------------------------------------------------------------------
# Hugging Face

def read_hf(folder: Path) -> tuple[dict, Tensors]:
    """A folder in Hugging Face's layout -> (sizes for LLaMAConfig, tensors under our names)."""
    cfg = read_config(folder / "config.json")
    rope = cfg.section("rope_parameters")  # recent files; older ones have rope_theta at the top level
    sizes = dict(
        dim=cfg.whole("hidden_size"), n_layers=cfg.whole("num_hidden_layers", most=1000),
        n_heads=cfg.whole("num_attention_heads"), ffn_dim=cfg.whole("intermediate_size"),
        vocab_size=cfg.whole("vocab_size"), norm_eps=cfg.number("rms_norm_eps", most=1),
        rope_theta=cfg.number("rope_theta", rope.number("rope_theta", 10000.0)),
        rope_scaling=read_scaling(cfg), max_seq_len=cfg.whole("max_position_embeddings", 2048))
    if cfg.values.get("sliding_window") is not None:  # Mistral: up to its window, it is full attention
        sizes["max_seq_len"] = min(sizes["max_seq_len"], cfg.whole("sliding_window"))
    cfg.multiple("hidden_size", "num_attention_heads", times=2)  # rotary pairs: the width of a head is even
    sizes["n_kv_heads"] = kv_heads(cfg, "num_attention_heads", "num_key_value_heads")
    cfg.expect({"head_dim": sizes["dim"] // sizes["n_heads"], "hidden_act": "silu",
                "attention_bias": False, "mlp_bias": False}, SUPPORTED)
    found = open_folder(folder)
    if "tok_embeddings.weight" in found:
        raise BadFile(f"{folder}: the tensors have Meta's names, config.json is Hugging Face's; rename "
                      "the file to consolidated.00.pth and copy Meta's params.json into the folder")
    wanted = {ours: [theirs] for ours, theirs in hf_names(sizes["n_layers"]).items()}
    ignored = r"rotary_emb\.inv_freq$"
    if cfg.flag("tie_word_embeddings", "lm_head.weight" not in found):  # one matrix under both of our names
        wanted["output.weight"], ignored = wanted["tok_embeddings.weight"], rf"{ignored}|^lm_head\.weight$"
    tensors = take(folder, wanted, found, ignored)
    check_dimensions(folder, tensors)
    check_rotary(folder, tensors, sizes)
    return sizes, reorder(tensors, halves_to_pairs, sizes)


def to_hf(sizes: dict, tensors: Tensors) -> tuple[dict, Tensors]:
    """The way back: (values for config.json, tensors under Hugging Face's names)."""
    names, tied = hf_names(sizes["n_layers"]), tensors["output.weight"] is tensors["tok_embeddings.weight"]
    if tied:
        del names["output.weight"]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": sizes["dim"], "intermediate_size": sizes["ffn_dim"],
        "num_hidden_layers": sizes["n_layers"], "num_attention_heads": sizes["n_heads"],
        "num_key_value_heads": sizes["n_kv_heads"], "rms_norm_eps": sizes["norm_eps"],
        "rope_theta": sizes["rope_theta"], "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": sizes["max_seq_len"], "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": tied, "attention_bias": False}
    if sizes.get("rope_scaling"):
        config["rope_scaling"] = {"rope_type": "llama3", **sizes["rope_scaling"]}
    tensors = reorder(tensors, pairs_to_halves, sizes)
    return config, {theirs: tensors[ours] for ours, theirs in names.items()}


# ---------------------------------------------------------------------------------------------------
# Meta

def read_meta(folder: Path) -> tuple[dict, Tensors]:
    """A folder in Meta's layout -> (sizes for LLaMAConfig, tensors under our names)."""
    params = read_config(folder / "params.json")
    sizes = dict(
        dim=params.whole("dim"), n_layers=params.whole("n_layers", most=1000),
        n_heads=params.whole("n_heads"), norm_eps=params.number("norm_eps", most=1),
        rope_theta=params.number("rope_theta", 10000.0),
        max_seq_len=params.whole("max_seq_len", 2048))  # official files lack it; for LLaMA-2, add 4096
    params.multiple("dim", "n_heads", times=2)
    sizes["n_kv_heads"] = kv_heads(params, "n_heads", "n_kv_heads")
    # from LLaMA-3.1 on: params.json says that the frequencies are scaled, but not by how much
    params.expect({"use_scaled_rope": False}, "models before LLaMA-3.1, and later ones in the other layout,")
    names, shards = hf_names(sizes["n_layers"]), open_shards(folder, sizes["dim"])
    for path, shard in shards.items():
        take(path, {name: [name] for name in names}, shard, ignored=r"rope\.freqs$")
        check_dimensions(path, {name: shard[name] for name in names})
    tensors = {name: join_shards(folder, name, {path.name: shard[name] for path, shard in shards.items()})
               for name in names}
    check_rotary(folder, tensors, sizes)
    # the tensors tell two sizes that params.json does not: vocab_size is -1 there, the FFN's width is absent
    sizes["ffn_dim"] = tensors["layers.0.feed_forward.w1.weight"].shape[0]
    sizes["vocab_size"] = tensors["tok_embeddings.weight"].shape[0]
    return sizes, tensors


def check_dimensions(path: Path, tensors: Tensors) -> None:
    check_shapes(path, tensors, lambda name, shape: len(shape) == (1 if "norm" in name else 2),
                 "vectors for norms and matrices for the rest")


def check_rotary(path: Path, tensors: Tensors, sizes: dict) -> None:
    """The rows of other shapes could not be permuted."""
    dim, kv_dim = sizes["dim"], sizes["dim"] // sizes["n_heads"] * sizes["n_kv_heads"]
    rows = {"q": dim, "k": kv_dim}
    check_shapes(path, tensors, lambda name, shape: not (found := ROTARY.search(name)) or
                 shape == (rows[found[1]], dim), f"{[dim, dim]} for wq and {[kv_dim, dim]} for wk")


def open_shards(folder: Path, dim: int) -> dict[Path, Tensors]:
    """Every consolidated.NN.pth. Each of n shards has dim / n columns of the embedding; the first tells n."""
    mapped = Mapped()
    first = open_torch(folder / "consolidated.00.pth", mapped)
    embedding = first.get("tok_embeddings.weight")
    if embedding is None:
        raise BadFile(f"{folder}: consolidated.00.pth has no tok_embeddings.weight, so it is not in "
                      "Meta's layout; if it is in Hugging Face's, rename it to pytorch_model.bin and "
                      "replace params.json by Hugging Face's config.json")
    columns = embedding.shape[-1] if len(embedding.shape) == 2 else 0
    if columns == 0 or dim % columns:
        raise BadFile(f"{folder}: tok_embeddings.weight {list(embedding.shape)} in consolidated.00.pth does "
                      f"not fit dim {dim} in params.json; download both again")
    files = [f"consolidated.{i:02}.pth" for i in range(dim // columns)]
    here = {f.name for f in folder.glob("consolidated.*.pth")}
    complain(folder, {"missing shard": sorted(set(files) - here), "unexpected": sorted(here - set(files))},
             f"this model has {len(files)}; download it again")
    rest = {folder / file: open_torch(folder / file, mapped) for file in files[1:]}
    return {folder / files[0]: first, **rest}


def join_shards(folder: Path, name: str, parts: dict[str, Lazy]) -> Lazy:
    """parts {file: that file's share of the tensor `name`}"""
    if "norm" in name:  # every shard has the whole vector
        return next(iter(parts.values()))
    dim = 1 if COLUMNS.search(name) else 0
    return join(folder, {f"{name} in {file}": t for file, t in parts.items()}, dim)
