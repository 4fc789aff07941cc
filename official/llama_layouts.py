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

from official.configs import check_config, read_json
from official.names import complain, join, take
from official.tensorfiles import Lazy, Mapped, Tensors, open_folder, open_torch

MODEL = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}
ROTARY = re.compile(r"attention\.w[qk]\.weight$")  # the parameters whose rows are permuted
COLUMNS = re.compile(r"wo|w2|tok_embeddings")  # Meta's shards split these by columns, other matrices by rows


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


def reorder(tensors: Tensors, how: Callable, n_heads: int) -> Tensors:
    return {name: t._replace(read=partial(how, t, n_heads)) if ROTARY.search(name) else t
            for name, t in tensors.items()}


# ---------------------------------------------------------------------------------------------------
# Hugging Face

def read_hf(folder: Path) -> tuple[dict, Tensors]:
    """A folder in Hugging Face's layout -> (sizes for LLaMAConfig, tensors under our names)."""
    file = folder / "config.json"
    cfg = read_json(file)
    rope = cfg.get("rope_parameters") or {}  # recent files; older ones have rope_theta at the top level
    try:
        sizes = dict(dim=cfg["hidden_size"], n_layers=cfg["num_hidden_layers"],
                     n_heads=cfg["num_attention_heads"], ffn_dim=cfg["intermediate_size"],
                     vocab_size=cfg["vocab_size"], norm_eps=cfg["rms_norm_eps"],
                     rope_theta=cfg.get("rope_theta") or rope.get("rope_theta", 10000.0),
                     max_seq_len=cfg.get("max_position_embeddings", 2048))
    except KeyError as e:
        raise ValueError(f"{file}: {e.args[0]} is missing; download it again") from None
    supported = {"num_key_value_heads": sizes["n_heads"], "head_dim": sizes["dim"] // sizes["n_heads"],
                 "hidden_act": "silu", "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
                 "tie_word_embeddings": False}
    scaling = {"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {}
    check_config(file, {**cfg, **scaling}, supported, "LLaMA-1 and LLaMA-2 of 7B and 13B")
    found = open_folder(folder)
    if "tok_embeddings.weight" in found:
        raise ValueError(f"{folder}: the tensors have Meta's names, config.json is Hugging Face's; rename "
                         "the file to consolidated.00.pth and copy Meta's params.json into the folder")
    wanted = {ours: [theirs] for ours, theirs in hf_names(sizes["n_layers"]).items()}
    tensors = take(folder, wanted, found, ignored=r"rotary_emb\.inv_freq$")
    return sizes, reorder(tensors, halves_to_pairs, sizes["n_heads"])


def to_hf(sizes: dict, tensors: Tensors) -> tuple[dict, Tensors]:
    """The way back: (values for config.json, tensors under Hugging Face's names)."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": sizes["dim"], "intermediate_size": sizes["ffn_dim"],
        "num_hidden_layers": sizes["n_layers"], "num_attention_heads": sizes["n_heads"],
        "num_key_value_heads": sizes["n_heads"], "rms_norm_eps": sizes["norm_eps"],
        "rope_theta": sizes["rope_theta"], "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": sizes["max_seq_len"], "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False, "attention_bias": False}
    tensors = reorder(tensors, pairs_to_halves, sizes["n_heads"])
    return config, {theirs: tensors[ours] for ours, theirs in hf_names(sizes["n_layers"]).items()}


# ---------------------------------------------------------------------------------------------------
# Meta

def read_meta(folder: Path) -> tuple[dict, Tensors]:
    """A folder in Meta's layout -> (sizes for LLaMAConfig, tensors under our names)."""
    file = folder / "params.json"
    params = read_json(file)
    try:
        dim, n_layers, n_heads, norm_eps = (params[key] for key in ("dim", "n_layers", "n_heads", "norm_eps"))
    except KeyError as e:
        raise ValueError(f"{file}: {e.args[0]} is missing; download it again") from None
    check_config(file, params, {"n_kv_heads": n_heads}, "LLaMA-1 and LLaMA-2 of 7B and 13B")
    names, shards = hf_names(n_layers), open_shards(folder, dim)
    for path, shard in shards.items():
        take(path, {name: [name] for name in names}, shard, ignored=r"rope\.freqs$")
    tensors = {name: join_shards(name, [shard[name] for shard in shards.values()]) for name in names}
    # params.json has vocab_size -1 and no width of the FFN, so the tensors tell both. It does not tell the
    # longest sequence either. 2048 is LLaMA-1's; for LLaMA-2's 4096, add max_seq_len to params.json.
    sizes = dict(dim=dim, n_layers=n_layers, n_heads=n_heads, norm_eps=norm_eps,
                 ffn_dim=tensors["layers.0.feed_forward.w1.weight"].shape[0],
                 vocab_size=tensors["tok_embeddings.weight"].shape[0],
                 rope_theta=params.get("rope_theta", 10000.0), max_seq_len=params.get("max_seq_len", 2048))
    return sizes, tensors


def open_shards(folder: Path, dim: int) -> dict[Path, Tensors]:
    """Every consolidated.NN.pth. Each of n shards has dim / n columns of the embedding; the first tells n."""
    mapped = Mapped()
    first = open_torch(folder / "consolidated.00.pth", mapped)
    embedding = first.get("tok_embeddings.weight")
    if embedding is None:
        raise ValueError(f"{folder}: consolidated.00.pth has no tok_embeddings.weight, so it is not in "
                         "Meta's layout; if it is in Hugging Face's, rename it to pytorch_model.bin and "
                         "replace params.json by Hugging Face's config.json")
    files = [f"consolidated.{i:02}.pth" for i in range(max(1, dim // embedding.shape[1]))]
    here = {f.name for f in folder.glob("consolidated.*.pth")}
    complain(folder, {"missing shard": sorted(set(files) - here), "unexpected": sorted(here - set(files))},
             f"this model has {len(files)}; download it again")
    rest = {folder / file: open_torch(folder / file, mapped) for file in files[1:]}
    return {folder / files[0]: first, **rest}


def join_shards(name: str, parts: list[Lazy]) -> Lazy:
    if "norm" in name:  # every shard has the whole vector
        return parts[0]
    return join(parts, dim=1 if COLUMNS.search(name) else 0)
