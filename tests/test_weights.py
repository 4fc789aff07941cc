"""Files of weights: every layout gives the same tensors, no file is loaded in part, a mistake is one line."""
import argparse
import ctypes.util
import dataclasses
import json
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import make_random_7b
import pytest
import torch
from conftest import LLAMA, REAL, ROOT, ROWS, close, make_batch, make_lavin, one_line, randomize, run_main
from safetensors.torch import load_file, save_file
from weights_on_disk import released_state, write_meta, write_openai

import adapters
import lavin
import sample
import weights
from clip import CLIPConfig, VisionTransformer
from lavin import LaVIN
from llama import LLaMA, LLaMAConfig
from official import adapter_files, clip_layouts, configs, llama_layouts, tensorfiles, torchscript
from official.tokenizer import Tokenizer

TOKENIZER = ROOT / "tiny" / "llama" / "tokenizer.model"
LLAMA_TOKENIZER = REAL / "llama_tokenizer.model"
SETTINGS = dict(format="QCM-A", captions=False, max_new_tokens=8)  # what an adapter file records of a run


def make_llama(cfg: LLaMAConfig = LLAMA) -> LLaMA:
    torch.manual_seed(0)
    model = LLaMA(cfg)
    randomize(model)
    return model


def make_vit() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(CLIPConfig(image_size=16, patch_size=4, width=64, layers=4, heads=1)).eval()
    randomize(model)
    return model


def lazy(model) -> tensorfiles.Tensors:
    return {n: tensorfiles.Lazy(tuple(p.shape), p.dtype, lambda p=p: p.detach())
            for n, p in model.named_parameters()}


def write_hf(folder: Path, model, **how) -> Path:
    to_hf = llama_layouts.to_hf if isinstance(model, LLaMA) else clip_layouts.to_hf
    tensorfiles.write_folder(folder, *to_hf(dataclasses.asdict(model.cfg), lazy(model)), **how)
    if isinstance(model, LLaMA):
        shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
    return folder


def same(a, b) -> bool:
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(file: Path, edit) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


# ---------------------------------------------------------------------------------------------------
# layouts (against transformers' own files: test_oracle.py)

@pytest.mark.parametrize("shards", [1, 2])
def test_meta_layout_and_back_from_hugging_face(tmp_path, shards):
    model = make_llama()
    folder = write_meta(tmp_path / "7B", model, shards)
    shutil.copyfile(TOKENIZER, tmp_path / "tokenizer.model")  # one folder up
    read = LLaMA.from_pretrained(folder)
    assert same(model, read) and dataclasses.asdict(read.cfg) == dataclasses.asdict(model.cfg)
    assert not any(p.requires_grad for p in read.parameters())
    weights.convert(folder, tmp_path / "hf")
    assert same(model, LLaMA.from_pretrained(tmp_path / "hf"))
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
    header = int.from_bytes((tmp_path / "hf" / "model.safetensors").read_bytes()[:8], "little")
    assert (8 + header) % 64 == 0  # the tensors are aligned for memory mapping
    # safetensors itself reads the file; up_proj is w3, and q_proj is a permuted wq
    names, layer = load_file(tmp_path / "hf" / "model.safetensors"), model.layers[1]
    assert torch.equal(names["model.layers.1.mlp.up_proj.weight"], layer.feed_forward.w3.weight)
    assert not torch.equal(names["model.layers.1.self_attn.q_proj.weight"], layer.attention.wq.weight)


def test_sizes_that_params_json_lacks(tmp_path):
    folder = write_meta(tmp_path / "7B", make_llama())
    params = json.loads((folder / "params.json").read_text())
    for key in ("max_seq_len", "rope_theta"):
        del params[key]
    (folder / "params.json").write_text(json.dumps(params))
    sizes, _ = weights.read_llama(folder)
    # params.json holds -1 and a formula, so these come from the tensors
    assert (sizes["vocab_size"], sizes["ffn_dim"]) == (61, 48)
    assert (sizes["max_seq_len"], sizes["rope_theta"]) == (2048, 10000.0)


@pytest.mark.parametrize("half", [False, True])
def test_openai_archive(tmp_path, half):
    model = make_vit()
    file = write_openai(tmp_path / "ViT-L-14.pt", model, half)
    with zipfile.ZipFile(file) as archive:
        assert any("/code/" in name for name in archive.namelist())
    read = VisionTransformer.from_pretrained(file)
    assert dataclasses.asdict(read.cfg) == dataclasses.asdict(model.cfg)
    expected = make_vit()
    if half:
        expected.half().float()
    assert same(expected, read)
    assert same(expected, VisionTransformer.from_pretrained(tmp_path))  # the folder that holds the file
    weights.convert(file, tmp_path / "hf")
    assert same(expected, VisionTransformer.from_pretrained(tmp_path / "hf"))
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(t.dtype == (torch.float16 if half else torch.float32) for t in stored.values())
    # the same state as a plain pickle
    state = {f"visual.{n}": p for n, p in expected.state_dict().items()}
    torch.save(state | {"logit_scale": torch.ones(())}, tmp_path / "plain.pt")
    assert same(expected, VisionTransformer.from_pretrained(tmp_path / "plain.pt"))


def test_an_openai_vit_whose_width_is_not_a_multiple_of_64_is_refused(tmp_path):
    for width, heads in ((96, 2), (24, 3)):  # an earlier version read both with one head
        vit = VisionTransformer(CLIPConfig(image_size=16, patch_size=4, width=width, layers=4, heads=heads))
        file = write_openai(tmp_path / "ViT.pt", vit)
        vit_fails(file, f"ViT.pt: the ViT is {width} wide",
                  "expected a multiple of 64", "use a folder in Hugging Face's layout")


@pytest.mark.parametrize("layout", ["hf", "bin", "meta"])
def test_loading_needs_little_more_memory_than_the_weights(tmp_path, monkeypatch, layout):
    status = Path("/proc/self/status")
    libc = ctypes.util.find_library("c")
    if not status.is_file() or not hasattr(ctypes.CDLL(libc), "malloc_trim"):
        pytest.skip("resident memory is read from Linux's /proc, with glibc")
    monkeypatch.setattr(tensorfiles, "WINDOW", 4 * 2**20)

    def resident(key: str) -> int:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    model = LLaMA(LLaMAConfig(dim=512, n_layers=8, n_heads=8, ffn_dim=1408, vocab_size=1000)).bfloat16()
    size = sum(p.numel() for p in model.parameters())
    if layout == "meta":
        write_meta(tmp_path / "meta", model, 2)
    else:
        folder = write_hf(tmp_path / layout, model, limit=20 * 10**6)
        if layout == "bin":
            state = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
            for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
                file.unlink()
            torch.save(state, folder / "pytorch_model.bin")
            del state
    del model
    # load a small model first, so that torch's own memory is not counted
    LLaMA.from_pretrained(write_meta(tmp_path / "small", make_llama()), dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        ctypes.CDLL(libc).malloc_trim(0)  # otherwise the model could reuse memory freed by earlier ones
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = resident("VmRSS")
        read = LLaMA.from_pretrained(tmp_path / layout, dtype=dtype)
        n_bytes = size * dtype.itemsize
        extra = resident("VmHWM") - before - n_bytes
        assert next(read.parameters()).dtype == dtype
        assert extra < 36e6, f"{extra / 1e6:.0f} MB beyond the {n_bytes / 1e6:.0f} MB of weights"
        del read


# ---------------------------------------------------------------------------------------------------
# mistakes

def fails(call, *pieces: str) -> None:
    """`call` raises an error of one short line that contains all of `pieces`"""
    message = one_line(call)
    assert len(message) < 500, message
    for piece in pieces:
        assert piece in message, f"{piece!r} is not in {message!r}"


def llama_fails(path: Path, *pieces: str) -> None:
    fails(lambda: LLaMA.from_pretrained(path), *pieces)


def vit_fails(path: Path, *pieces: str) -> None:
    fails(lambda: VisionTransformer.from_pretrained(path), *pieces)


def adapters_fail(path: Path, *pieces: str) -> None:
    fails(lambda: weights.read_adapters(path), *pieces)


def test_damaged_and_incomplete_files(tmp_path):
    model, vit = make_llama(), make_vit()
    hf = write_hf(tmp_path / "hf", model)
    whole = (hf / "model.safetensors").read_bytes()
    for size in (0, 5, 300, len(whole) // 2, len(whole) - 1):
        (hf / "model.safetensors").write_bytes(whole[:size])
        llama_fails(hf, "hf/model.safetensors: damaged or cut short", "download it again")

    shards = write_hf(tmp_path / "shards", model, limit=20_000)
    last = sorted(shards.glob("*.safetensors"))[-1]
    last.unlink()
    llama_fails(shards, f"shards/{last.name}: missing shard", "download")

    meta = write_meta(tmp_path / "meta", model, 2)
    (meta / "consolidated.01.pth").rename(meta / "consolidated.02.pth")
    llama_fails(meta, "missing shard consolidated.01.pth", "unexpected consolidated.02.pth", "has 2")
    (meta / "consolidated.02.pth").rename(meta / "consolidated.01.pth")
    whole = (meta / "consolidated.01.pth").read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        (meta / "consolidated.01.pth").write_bytes(whole[:size])
        llama_fails(meta, "consolidated.01.pth: damaged or cut short", "download it again")

    whole = write_openai(tmp_path / "vit.pt", vit).read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "vit.pt").write_bytes(whole[:size])
        vit_fails(tmp_path / "vit.pt", "vit.pt: damaged or cut short", "download it again")
    flipped = bytearray(whole)
    at = whole.index(vit.class_embedding.detach().numpy().tobytes()[:16])
    flipped[at] ^= 1  # a zip file stores a checksum of every entry
    (tmp_path / "vit.pt").write_bytes(flipped)
    vit_fails(tmp_path / "vit.pt", "vit.pt: damaged")


def test_every_tensor_is_accounted_for(tmp_path):
    folder, file = write_hf(tmp_path / "hf", make_llama()), tmp_path / "hf" / "model.safetensors"

    def edit(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
        tensors["model.layers.1.mlp.extra.weight"] = torch.ones(3)
        tensors["layers.1.feed_forward.w3.weight"] = torch.ones(48, 32)  # our name instead of theirs

    whole = file.read_bytes()
    edit_tensors(file, edit)
    llama_fails(folder, "hf: missing lm_head.weight, model.layers.1.mlp.up_proj.weight",
                "unexpected layers.1.feed_forward.w3.weight, model.layers.1.mlp.extra.weight", "complete")
    fails(lambda: weights.convert(folder, tmp_path / "out"), "missing lm_head.weight")
    assert not (tmp_path / "out").exists()
    file.write_bytes(whole)
    odd = {"model.norm.weight": torch.ones(31), "lm_head.weight": torch.ones(62, 32)}
    edit_tensors(file, lambda tensors: tensors.update(odd))
    llama_fails(folder, "norm.weight [31] instead of [32]", "output.weight [62, 32] instead of [61, 32]")
    file.write_bytes(whole)
    edit_json(folder / "config.json", num_hidden_layers=2)
    llama_fails(folder, "unexpected model.layers.2", "and 6 more")

    folder = write_meta(tmp_path / "meta", make_llama(), 2)
    state = torch.load(folder / "consolidated.01.pth")
    state["layers.0.attention.bias"] = state.pop("norm.weight")
    torch.save(state, folder / "consolidated.01.pth")
    llama_fails(folder, "consolidated.01.pth: missing norm.weight; unexpected layers.0.attention.bias")

    folder = write_hf(tmp_path / "clip", make_vit())
    name = "encoder.layers.0.self_attn.k_proj.bias"
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(f"vision_model.{name}"))
    vit_fails(folder, f"missing {name}")


def test_the_wrong_folder(tmp_path):
    llama, vit = write_hf(tmp_path / "llama", make_llama()), write_hf(tmp_path / "vit", make_vit())
    meta = write_meta(tmp_path / "meta", make_llama())
    openai = write_openai(tmp_path / "ViT.pt", make_vit())
    for path in (llama, meta):
        vit_fails(path, str(path), "holds a LLaMA, expected a CLIP", "swap --llama and --clip")
    for path in (vit, openai):
        llama_fails(path, str(path), "holds a CLIP, expected a LLaMA", "swap --llama and --clip")
    llama_fails(tmp_path / "none", "none: no such folder of LLaMA weights")
    llama_fails(llama / "model.safetensors", "model.safetensors: no such folder")
    (tmp_path / "empty").mkdir()
    llama_fails(tmp_path / "empty", "no such folder of LLaMA weights; expected config.json", "params.json",
                "ViT-L-14.pt")
    torch.save({"logit_scale": torch.ones(())}, tmp_path / "text.pt")
    vit_fails(tmp_path / "text.pt", "text.pt: no vision transformer in it")

    # files of one layout under the names of the other
    (meta / "params.json").rename(meta / "away")
    llama_fails(meta, "consolidated.00.pth is in Meta's layout, but params.json is missing")
    shutil.copyfile(llama / "config.json", meta / "config.json")
    llama_fails(meta, "consolidated.00.pth is in Meta's layout, but params.json is missing")
    (meta / "consolidated.00.pth").rename(meta / "pytorch_model.bin")
    llama_fails(meta, "the tensors have Meta's names, config.json is Hugging Face's", "consolidated.00.pth")
    (llama / "config.json").rename(llama / "params.json")
    llama_fails(llama, "model.safetensors is in Hugging Face's layout, but config.json is missing")
    shutil.copyfile(meta / "away", llama / "params.json")
    torch.save(load_file(llama / "model.safetensors"), llama / "consolidated.00.pth")
    llama_fails(llama, "so it is not in Meta's layout", "config.json")


@pytest.mark.parametrize("change,message", [
    (dict(rope_scaling={"factor": 8.0, "type": "dynamic"}), "rope_scaling.rope_type is 'dynamic', expected"),
    (dict(rope_parameters={"rope_theta": 1e4, "rope_type": "linear"}),
     "rope_parameters.rope_type is 'linear', expected default or llama3"),
    (dict(attention_bias=True), "attention_bias is True"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"), (dict(head_dim=16), "head_dim is 16, expected 8"),
    (dict(model_type="qwen2"), "model_type is 'qwen2' (its q, k and v have biases), expected llama"),
    (dict(model_type="gemma2"), "model_type is 'gemma2' (its embeddings are scaled"),
    (dict(model_type="gpt2"), "model_type is 'gpt2' (it has learned positions"),
    (dict(model_type="phi3"), "model_type is 'phi3' (it stores q, k and v as one)"),
    (dict(model_type="siglip"), "model_type is 'siglip' (it has no [cls] token)"),
    (dict(model_type="dinov2"), "model_type is 'dinov2' (it scales its residuals)"),
    (dict(model_type="bert"), "model_type is 'bert', expected llama or mistral or clip"),
])
def test_models_that_are_refused_by_name(tmp_path, change, message):
    folder = write_hf(tmp_path / "hf", make_llama())
    edit_json(folder / "config.json", **change)
    llama_fails(folder, "config.json", message)


def test_other_broken_configurations(tmp_path):
    folder = write_hf(tmp_path / "clip", make_vit())
    edit_json(folder / "config.json", hidden_act="gelu_new")
    vit_fails(folder, "hidden_act is 'gelu_new', expected quick_gelu or gelu")
    edit_json(folder / "config.json", hidden_act="gelu", intermediate_size=100)
    vit_fails(folder, "intermediate_size is 100, expected 256", "official/MODELS.md")
    (folder / "config.json").write_text('{"model_type": "clip"')
    vit_fails(folder, "config.json: not valid JSON")
    (folder / "config.json").write_text('{"model_type": "clip"}')
    vit_fails(folder, "config.json: image_size is missing")
    folder = write_meta(tmp_path / "meta", make_llama(), n_kv_heads=3)
    llama_fails(folder, "params.json: n_heads is 4, expected a multiple of 3, for 3 n_kv_heads")
    folder = write_meta(tmp_path / "meta 3.1", make_llama(), use_scaled_rope=True)
    llama_fails(folder, "params.json: use_scaled_rope is True, expected False", "in the other layout")


# ---------------------------------------------------------------------------------------------------
# pickles that run code

class Bomb:
    """runs a command when it is unpickled"""

    def __init__(self, fuse: Path):
        self.fuse = fuse

    def __reduce__(self):
        return os.system, (f"touch '{self.fuse}'",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_runs_code_is_refused_before_it_runs(tmp_path, protocol):
    fuse = tmp_path / "ran"
    pickle.loads(pickle.dumps(Bomb(fuse), protocol))
    assert fuse.exists()  # plain unpickling runs the command
    fuse.unlink()

    meta = write_meta(tmp_path / "meta", make_llama())
    hf = write_hf(tmp_path / "hf", make_llama())
    (hf / "model.safetensors").unlink()
    files = {meta / "consolidated.00.pth": lambda: LLaMA.from_pretrained(meta),
             hf / "pytorch_model.bin": lambda: LLaMA.from_pretrained(hf),
             tmp_path / "adapters.pth": lambda: weights.read_adapters(tmp_path / "adapters.pth"),
             tmp_path / "plain.pt": lambda: VisionTransformer.from_pretrained(tmp_path / "plain.pt")}
    for file, load in files.items():
        torch.save({"norm.weight": torch.ones(3), "bomb": Bomb(fuse)}, file, pickle_protocol=protocol)
        fails(load, str(file), *(["refused", "posix.system"] if protocol == 2 else []))
        file.write_bytes(pickle.dumps(Bomb(fuse), protocol))  # a bare pickle, as early torch versions wrote
        fails(load, str(file))

    # inside a TorchScript archive
    whole = write_openai(tmp_path / "whole.pt", make_vit())
    with zipfile.ZipFile(whole) as src, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as dst:
        for name in src.namelist():
            bomb = name.endswith("/data.pkl")
            dst.writestr(name, pickle.dumps(Bomb(fuse), protocol) if bomb else src.read(name))
    vit_fails(tmp_path / "bomb.pt", "bomb.pt: refused", "posix.system", "official")
    assert not fuse.exists()


# ---------------------------------------------------------------------------------------------------
# hostile files are refused in one line, before much memory or time is spent

HUGE = 10**12


@pytest.mark.parametrize("weight_map,message", [
    ({"norm.weight": "../outside.safetensors"}, "weight_map names '../outside.safetensors', expected"),
    ({"norm.weight": "/etc/hostname"}, "weight_map names '/etc/hostname'"),
    ({"norm.weight": ".."}, "weight_map names '..'"),
    ({"norm.weight": "sub/model.safetensors"}, "weight_map names 'sub/"),
    ({"norm.weight": ""}, "weight_map names ''"),
    ({"norm.weight": "a\0b\nc"}, "missing shard"),
    *((wrong, "weight_map is not") for wrong in ({"norm.weight": 3}, {"norm.weight": ["a"]}, [], None)),
])
def test_an_index_that_names_other_files(tmp_path, weight_map, message):
    folder = write_hf(tmp_path / "hf", make_llama())
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    fails(lambda: weights.read_llama(folder), str(folder), message, "download it")


WRONG_SIZES = ["32", -1, 0, 2.5, True, [32], {"a": 1}, float("nan"), float("inf"), HUGE, 10**4000]


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads",
                                 "intermediate_size", "vocab_size", "max_position_embeddings"])
def test_wrong_sizes_in_a_llama_config(tmp_path, key):
    folder = write_hf(tmp_path / "hf", make_llama())
    for value in WRONG_SIZES:
        edit_json(folder / "config.json", **{key: value})
        fails(lambda: weights.read_llama(folder), f"hf/config.json: {key} is ", "expected a whole number")


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "max_seq_len"])
def test_wrong_sizes_in_params_json(tmp_path, key):
    folder = write_meta(tmp_path / "meta", make_llama())
    for value in WRONG_SIZES:
        edit_json(folder / "params.json", **{key: value})
        fails(lambda: weights.read_llama(folder), f"meta/params.json: {key} is ", "expected a whole number")


@pytest.mark.parametrize("key", ["image_size", "patch_size", "hidden_size", "num_hidden_layers",
                                 "num_attention_heads", "cls_every"])
def test_wrong_sizes_in_a_clip_config(tmp_path, key):
    folder = write_hf(tmp_path / "clip", make_vit())
    cfg = json.loads((folder / "config.json").read_text())
    for value in WRONG_SIZES:
        edit_json(folder / "config.json", **{**cfg, key: value})
        fails(lambda: weights.read_clip(folder), f"clip/config.json: {key} is ", "expected a whole number")
    edit_json(folder / "config.json", model_type="clip", vision_config={**cfg, key: "a"})
    fails(lambda: weights.read_clip(folder), f"clip/config.json: vision_config.{key} is 'a'")


@pytest.mark.parametrize("change,message", [
    (dict(num_key_value_heads=3), "num_attention_heads is 4, expected a multiple of 3, for 3 num_key_value"),
    (dict(num_key_value_heads=8), "num_attention_heads is 4, expected a multiple of 8"),
    (dict(num_key_value_heads="4"), "num_key_value_heads is '4', expected a whole number"),
    (dict(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes', expected true or false"),
    (dict(rope_scaling="llama3"), "rope_scaling is 'llama3', expected an object"),
    (dict(rope_scaling={"rope_type": 3}), "rope_scaling.rope_type is 3, expected text"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope_scaling.low_freq_factor is missing"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 0}), "rope_scaling.factor is 0, expected a number"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 8192}), "high_freq_factor is 4.0, expected more"),
    (dict(sliding_window=-1), "sliding_window is -1, expected a whole number"),
    (dict(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6', expected a number above 0, at most 1"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    (dict(rms_norm_eps=-1e-6), "rms_norm_eps is -1e-06"),
    (dict(rms_norm_eps=None), "rms_norm_eps is missing"),
    (dict(rope_theta=float("inf")), "rope_theta is inf"),
    (dict(rope_theta=[1]), "rope_theta is a list"),
    (dict(rope_parameters=[1]), "rope_parameters is a list, expected an object"),
    (dict(rope_parameters={"rope_theta": "x"}), "rope_parameters.rope_theta is 'x'"),
    (dict(num_attention_heads=3), "hidden_size is 32, expected a multiple of 6, for 3 num_attention_heads"),
    (dict(num_attention_heads=32, num_key_value_heads=32), "expected a multiple of 64"),  # heads of odd width
    (dict(model_type=["llama"]), "model_type is a list"),
    (dict(hidden_act="a\nb" * 1000), "hidden_act is 'a\\nb"),
])
def test_wrong_values_in_a_llama_config(tmp_path, change, message):
    folder = write_hf(tmp_path / "hf", make_llama())
    edit_json(folder / "config.json", **change)
    fails(lambda: weights.read_llama(folder), "hf/config.json: ", message)


def test_json_that_is_not_a_configuration(tmp_path, monkeypatch):
    folder = write_hf(tmp_path / "hf", make_llama())
    deep, long = (b"[" * 10**5, b'{"model_type": ' * 10**5), b'{"a": ' + b"9" * 5000 + b"}"
    for text in (*deep, b"\xff", b"", b"[1]", b"null", long):
        (folder / "config.json").write_bytes(text)
        fails(lambda: weights.read_llama(folder), "hf/config.json: ", "download it again")
    monkeypatch.setattr(configs, "LARGEST", 10)
    fails(lambda: weights.read_llama(folder), "hf/config.json: 5007 bytes, expected at most 10")
    clip = write_hf(tmp_path / "clip", make_vit())
    monkeypatch.undo()
    edit_json(clip / "config.json", num_attention_heads=3)
    fails(lambda: weights.read_clip(clip), "hidden_size is 64, expected a multiple of 3, for 3 num_attention")


def odd_values() -> dict:
    """{message: a value that is not a tensor of floats}"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors are deprecated
        return {
            "is stored as torch.sparse_coo": torch.eye(32).to_sparse(),
            "is stored as torch.sparse_csr": torch.eye(32).to_sparse_csr(),
            "is a meta tensor": torch.ones(32, device="meta"),
            "is quantised": torch.quantize_per_tensor(torch.ones(32), 0.1, 0, torch.qint8),
            "repeats the few values": torch.ones(1).expand(32),
            "wrong dtypes norm.weight torch.int64": torch.ones(32, dtype=torch.long),
            "wrong dtypes norm.weight torch.complex64": torch.ones(32, dtype=torch.complex64),
            "wrong dtypes norm.weight torch.float8_e4m3fn": torch.ones(32).to(torch.float8_e4m3fn),
            "is 'text'": "text", "is 3": 3, "is None": None, "is a list": [], "is a dict": {}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("message", odd_values())
def test_pickles_of_values_that_are_not_tensors_of_floats(tmp_path, message):
    folder = write_meta(tmp_path / "meta", make_llama())
    state = torch.load(folder / "consolidated.00.pth")
    torch.save({**state, "norm.weight": odd_values()[message]}, folder / "consolidated.00.pth")
    fails(lambda: weights.read_llama(folder), "consolidated.00.pth: ", "norm.weight", message)


@pytest.mark.parametrize("state,message", [
    ([torch.ones(3)], "holds a list"), (torch.ones(3), "holds a Tensor"),
    ({3: torch.ones(3)}, "has the key 3"), ({b"norm.weight": torch.ones(3)}, "has the key a bytes"),
    ({}, "has no tok_embeddings.weight"),
    ({"tok_embeddings.weight": torch.ones(3)}, "does not fit dim 32 in params.json"),
    ({"tok_embeddings.weight": torch.ones(61, 0)}, "does not fit dim 32 in params.json"),
    ({"tok_embeddings.weight": torch.ones(61, 32), "a\nb" * 999: torch.ones(3)}, "missing layers.0"),
])
def test_pickles_that_are_not_tensors_by_name(tmp_path, state, message):
    folder = write_meta(tmp_path / "meta", make_llama())
    torch.save(state, folder / "consolidated.00.pth")
    fails(lambda: weights.read_llama(folder), "consolidated.00.pth", message)


@pytest.mark.parametrize("name,t,message", [
    ("layers.0.attention.wq.weight", torch.ones(3), "wrong shapes layers.0.attention.wq.weight [3]"),
    ("layers.0.attention.wq.weight", torch.ones(16, 31), "cannot concatenate layers.0.attention.wq.weight"),
    ("layers.0.attention.wq.weight", torch.ones(16, 32).half(), "torch.float16"),
    ("layers.0.attention.wq.weight", torch.ones(15, 32), "wrong shapes layers.0.attention.wq.weight [31"),
    ("norm.weight", torch.ones(()), "wrong shapes norm.weight []"),
])
def test_shards_that_do_not_fit_together(tmp_path, name, t, message):
    folder = write_meta(tmp_path / "meta", make_llama(), 2)
    state = torch.load(folder / "consolidated.01.pth")
    torch.save({**state, name: t}, folder / "consolidated.01.pth")
    fails(lambda: weights.read_llama(folder), "meta", message)


@pytest.mark.parametrize("shape", [(), (64, 63)])
def test_q_k_and_v_that_do_not_fit_together(tmp_path, shape):
    folder, name = write_hf(tmp_path / "clip", make_vit()), "encoder.layers.0.self_attn.k_proj.weight"
    odd = {f"vision_model.{name}": torch.ones(shape)}
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update(odd))
    fails(lambda: weights.read_clip(folder), "cannot concatenate encoder.layers.0.self_attn.q_proj", name)


@pytest.mark.parametrize("name,t,message", [
    ("visual.conv1.weight", torch.ones(64), "are not those of a vision transformer"),
    ("visual.conv1.weight", torch.ones(64, 3, 0, 0), "are not those of a vision transformer"),
    ("visual.positional_embedding", torch.ones(()), "are not those of a vision transformer"),
    ("visual.positional_embedding", torch.ones(0, 64), "are not those of a vision transformer"),
    ("visual.transformer.resblocks.0.attn.in_proj_weight", torch.ones(191, 64), "expected 192 rows for q, k"),
])
def test_shapes_that_are_not_openais(tmp_path, name, t, message):
    state = {f"visual.{n}": p.detach() for n, p in make_vit().named_parameters()}
    torch.save({**state, name: t}, tmp_path / "ViT.pt")
    fails(lambda: weights.read_clip(tmp_path / "ViT.pt"), "ViT.pt: ", message)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "C64", "X9"])
def test_a_safetensors_dtype_that_we_do_not_know(tmp_path, dtype):
    folder = write_hf(tmp_path / "hf", make_llama())
    size = {"C64": 8}.get(dtype, 1) * 32
    entry = {"dtype": dtype, "shape": [32], "data_offsets": [0, size]}
    header = json.dumps({"model.norm.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    fails(lambda: weights.read_llama(folder), "model.safetensors: ", dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["hf/model.safetensors", "hf/config.json", "meta/consolidated.00.pth",
                                  "meta/params.json", "ViT.pt", "a.pth", "a.safetensors"])
def test_flipped_bytes_end_in_one_line(tmp_path, name):
    """Bytes are flipped anywhere in the file. A flip that only changes a number may go unnoticed."""
    write_hf(tmp_path / "hf", make_llama()), write_meta(tmp_path / "meta", make_llama())
    write_openai(tmp_path / "ViT.pt", make_vit())
    released_file(tmp_path / "a.pth", released_state(make_lavin()), True, temperature=5.0)
    make_lavin().save(tmp_path / "a.safetensors", **SETTINGS)
    file, random = tmp_path / name, torch.Generator().manual_seed(0)
    if name.startswith("a."):
        read = lambda: weights.read_adapters(file)
    else:
        read = lambda: weights.read_clip(file) if name == "ViT.pt" else weights.read_llama(file.parent)
    whole, failed = file.read_bytes(), 0
    head = max(0, whole.find(b"data.pkl"))  # the structured part of the file
    for i in range(60):
        at = head if i % 2 or len(whole) < 20_000 else len(whole) - 9000  # a zip file ends with its directory
        at += torch.randint(min(9000, len(whole) - at), (1,), generator=random).item()
        changed = bytearray(whole)
        changed[at] ^= 1 << torch.randint(8, (1,), generator=random).item()
        file.write_bytes(changed)
        try:
            read()
        except (ValueError, OSError) as e:
            failed += 1
            assert str(tmp_path) in str(e) and "\n" not in str(e), e
    assert failed


NOT_FILES = {"pipe": os.mkfifo, "folder": Path.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("layout,name", [
    ("hf", "config.json"), ("hf", "model.safetensors"), ("hf", "model.safetensors.index.json"),
    ("hf", "pytorch_model.bin"), ("meta", "params.json"), ("meta", "consolidated.00.pth"),
    ("meta", "consolidated.01.pth"), ("openai", "ViT-L-14.pt"),
])
def test_a_pipe_folder_or_device_is_not_opened(tmp_path, layout, name, kind):
    folder = tmp_path / layout
    if layout == "hf":
        write_hf(folder, make_llama())
        if name != "config.json":
            (folder / "model.safetensors").unlink()
    elif layout == "meta":
        write_meta(folder, make_llama(), 2)
    else:
        folder.mkdir()
    (folder / name).unlink(missing_ok=True)
    NOT_FILES[kind](folder / name)
    read = weights.read_clip if layout == "openai" else weights.read_llama
    fails(lambda: read(folder), f"{folder / name}: a folder, pipe or device, expected a regular file")


@pytest.mark.parametrize("kind", NOT_FILES)
def test_a_path_to_a_pipe_folder_or_device_is_refused(tmp_path, kind):
    for name in ("a.pt", "a.pth", "a.safetensors"):
        NOT_FILES[kind](tmp_path / name)
        fails(lambda: weights.read_clip(tmp_path / name), f"{name}: no such folder of CLIP weights")
        adapters_fail(tmp_path / name, f"{name}: no such adapter file")


# The tests write TorchScript's data.pkl opcode by opcode. ) pushes an empty tuple and } an empty dict. \x81
# makes an object, b sets its state, s and u set items, ( is a mark, t makes a tuple, R calls, q writes to the
# memo, h reads from it, 0 drops the top of the stack, X is text, K and J are numbers.

MODULE = b"c__torch__\nM\n)\x81"  # without submodules
BIG = b"J\xff\xff\xff\x7f"  # 2^31 - 1


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def tensor(size: bytes, stride: bytes, key: str = "0", storage: bytes = b"FloatStorage") -> bytes:
    pid = b"(" + text("storage") + b"ctorch\n" + storage + b"\n" + text(key) + text("cpu") + b"K\4tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"K\0" + size + stride + b"\x89" + hooks + b"tR"


def module(name: str, value: bytes) -> bytes:
    """a module with a single parameter or submodule"""
    return MODULE + b"}" + text(name) + value + b"sb"


def write_archive(file: Path, pkl: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    members = {"data.pkl": b"\x80\2" + pkl + b".", "constants.pkl": b"", "data/0": bytes(16), **members}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"v/{name}", content)
    return file


def nested(name: str, depth: int) -> bytes:
    """`depth` nested modules that all use one copy of the name"""
    levels = b"".join(MODULE + b"}h\0" for _ in range(depth))
    return text(name) + b"q\x000" + levels + MODULE + b"sb" * depth


@pytest.mark.parametrize("pkl,message", [
    (nested("n" * 10, 600), "longer than 500 characters"),
    (nested("n" * 10**6, 1), "longer than 500 characters"),
    (module("a", tensor(BIG + b"\x85", b"K\0\x85")), "v/data/0 is too small for its shape"),  # stride 0
    (module("a", tensor(BIG + BIG + b"\x86", b"K\0K\0\x86")), "v/data/0 is too small for its shape"),
    (module("a", tensor(b"J\xff\xff\xff\xff\x85", b"K\1\x85")), "v/data/0 has an impossible shape"),  # -1
    (module("a", tensor(text("a") + b"\x85", b"K\1\x85")), "v/data/0 has an impossible shape"),
    (module("a", tensor(b"K\4\x85", b"K\1\x85", key="7")), "no item named 'v/data/7'"),
    (module("a", tensor(b"K\4\x85", b"K\1\x85", storage=b"X")), "refused, because opening it would call"),
    (MODULE + b"}K\1K\2sb", "name is not text"),
    (MODULE + b"r\xff\xff\xff\x7f", "no vision transformer"),  # C's unpickler allocates 32 GB for this memo
    (b"\x96\0\0\0\0\0\x10\0\0", "damaged"),  # a bytearray of 2^44 bytes
    *((pkl, "damaged") for pkl in (MODULE + b"K\1b", b"]", b"", b"\x82\1", b"]Q")),
    (b"ccopyreg\n_reconstructor\n", "copyreg._reconstructor"), (b"cos\nsystem\n", "os.system"),
])
def test_a_hostile_torchscript_archive(tmp_path, pkl, message):
    fails(lambda: weights.read_clip(write_archive(tmp_path / "v.pt", pkl)), "v.pt: ", message)


def test_repeated_modules_are_visited_once(tmp_path):
    def read(pkl: bytes) -> dict:
        found = torchscript.open_torchscript(write_archive(tmp_path / "v.pt", pkl))
        return {name: t().tolist() for name, t in found.items()}

    four = tensor(b"K\4\x85", b"K\1\x85")
    pkl = module("t", four) + b"q\0"
    for i in range(200):  # each module holds the previous one twice: 2^200 paths lead to the first
        pkl += MODULE + b"}(" + text("a") + b"h%c" % i + text("b") + b"h%cub" % i + b"q%c" % (i + 1)
    assert read(pkl) == {"a." * 200 + "t": [0.0] * 4}
    assert read(MODULE + b"q\0}" + text("a") + b"h\0sb") == {}  # a module that holds itself
    state = b"}" + text("t") + four + b"sq\x000"  # one state that fifty modules share
    modules = b"".join(text(f"{i}") + MODULE + b"h\0b" for i in range(50))
    assert read(state + MODULE + b"}(" + modules + b"ub") == {"0.t": [0.0] * 4}


def test_archives_that_expand_are_refused(tmp_path):
    def write(name: str, member: str) -> Path:
        return write_archive(tmp_path / name, MODULE, zipfile.ZIP_DEFLATED, **{member: bytes(2 * 10**6)})

    fails(lambda: weights.read_clip(write("v.pt", "data/1")), "v.pt: refused", "would expand to 2,")
    fails(lambda: weights.read_adapters(write("a.pth", "data/1")), "a.pth: refused", "would expand to 2,")
    assert torchscript.open_torchscript(write("code.pt", "code/x.py")) == {}  # code is never read


# ---------------------------------------------------------------------------------------------------
# adapters

def released_file(path: Path, state: dict, wrapped: bool, **args) -> Path:
    """a checkpoint like those of the authors' training script; not `wrapped`: only its tensors"""
    adam = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}},
            "param_groups": [{"lr": 0.1}]}
    flags = argparse.Namespace(output_dir="out", blr=9e-3, betas=(0.9, 0.95), **args)
    whole = {"model": state, "optimizer": adam, "epoch": 19, "scaler": {"scale": 65536.0}, "args": flags}
    torch.save(whole if wrapped else state, path)
    return path


@pytest.mark.parametrize("prefix,wrapped", [("", True), ("module.", True), ("", False)])
def test_released_adapters_round_trip(tmp_path, prefix, wrapped):
    model = make_lavin(vit_routing="token", tau=5.0, scale=0.5)
    state = released_state(model, prefix)
    flags = dict(adapter_scale=0.5, temperature=5.0, prompt_format="CQM-A", use_caption=True)
    tensors, meta = weights.read_adapters(released_file(tmp_path / "a.pth", state, wrapped, **flags))
    ours = adapters.trainable(model)
    assert tensors.keys() == ours.keys() and all(torch.equal(tensors[n], ours[n]) for n in ours)
    cfg, adapter = meta["lavin"], meta["lavin"]["adapter"]
    assert (cfg["vit_routing"], cfg["normalize"], cfg["neck_dim"]) == ("token", "imagenet", 128)
    assert meta["llama"] == {"dim": 32, "n_layers": 3} and meta["base"] is None and adapter["dim"] == 8
    found = adapter["tau"], adapter["scale"], meta["format"], meta["captions"]
    assert found == ((5.0, 0.5, "CQM-A", True) if wrapped else (10.0, 1.0, "QCM-ALE", False))

    weights.convert(tmp_path / "a.pth", tmp_path / "a.safetensors")
    assert weights.read_adapters(tmp_path / "a.safetensors")[1] == meta
    weights.export_adapters(tmp_path / "a.safetensors", tmp_path / "b.pth")
    exported = torch.load(tmp_path / "b.pth", weights_only=False)["model"]
    state = {name.removeprefix(prefix): t for name, t in state.items()}
    assert exported.keys() == state.keys()
    for name, t in state.items():
        assert exported[name].shape == t.shape and torch.equal(exported[name], t), name
    again, meta_again = weights.read_adapters(tmp_path / "b.pth")
    assert meta_again == meta and all(torch.equal(again[n], ours[n]) for n in ours)


def test_imported_adapters_give_the_loss_of_the_original_model(tmp_path):
    model = make_lavin(vit_routing="token")
    base = make_lavin(trained=False)
    for name, tower in zip(("llama", "clip"), make_base(base)):
        write_hf(tmp_path / name, tower)
    released_file(tmp_path / "a.pth", released_state(model), True)
    loaded, meta = lavin.load(tmp_path / "a.pth", tmp_path / "llama", tmp_path / "clip")
    batch = make_batch(ROWS)
    assert close(loaded(batch), model(batch)) and not close(loaded(batch), base(batch), 1e-3)


def make_base(model: LaVIN) -> tuple[LLaMA, VisionTransformer]:
    """the frozen LLaMA and ViT inside a LaVIN, on their own"""
    towers = LLaMA(model.llama.cfg), VisionTransformer(model.vit.cfg)
    for bare, tower in zip(towers, (model.llama, model.vit)):
        bare.load_state_dict({n: p for n, p in tower.state_dict().items() if "adapter_" not in n})
    return towers


def test_files_that_do_not_hold_all_released_adapters(tmp_path):
    state = released_state(make_lavin())
    torch.save({"model": {"norm.weight": torch.ones(3)}}, tmp_path / "other.pth")
    adapters_fail(tmp_path / "other.pth", "other.pth: no adapters in it", "LaVIN checkpoint")
    gone = state.pop("layers.1.adapter_attn.conv_D.weight")
    state["layers.1.adapter_attn.conv_E.weight"] = gone
    torch.save(state, tmp_path / "half.pth")
    adapters_fail(tmp_path / "half.pth", "missing layers.1.adapter_attn.conv_D.weight",
                  "unexpected layers.1.adapter_attn.conv_E.weight")
    adapters_fail(tmp_path / "none.pth", "none.pth: no such adapter file")
    make_lavin(kind="rep").save(tmp_path / "rep.safetensors", **SETTINGS)
    fails(lambda: weights.export_adapters(tmp_path / "rep.safetensors", tmp_path / "rep.pth"),
          "rep.safetensors: text-only adapters or plain")
    assert not (tmp_path / "rep.pth").exists()


@pytest.mark.parametrize("args,message", [
    (dict(adapter_scale="big"), "args.adapter_scale is 'big', expected a number above 0"),
    (dict(adapter_scale=True), "args.adapter_scale is True"),
    (dict(adapter_scale=10**30), "args.adapter_scale is an int"),
    (dict(temperature=0), "args.temperature is 0"),
    (dict(temperature=float("nan")), "args.temperature is nan"),
    (dict(temperature=[1]), "args.temperature is a list"),
    (dict(temperature=argparse.Namespace(a=[[]])), "args.temperature is a Namespace"),
    (dict(prompt_format=3), "args.prompt_format is 3, expected text"),
    (dict(use_caption="no"), "args.use_caption is 'no', expected true or false"),
])
def test_released_flags_of_the_wrong_type(tmp_path, args, message):
    file = released_file(tmp_path / "a.pth", released_state(make_lavin()), True, **args)
    adapters_fail(file, "a.pth: ", message, "restore the original file")


@pytest.mark.parametrize("whole,message", [
    ([1], "holds a list, expected tensors by name"), ({"model": 3}, "holds 3, expected tensors by name"),
    ({"model": [torch.ones(3)]}, "holds a list"), ({"model": {}, "args": [1]}, "args is a list, expected"),
])
def test_released_checkpoints_of_the_wrong_type(tmp_path, whole, message):
    torch.save(whole, tmp_path / "a.pth")
    adapters_fail(tmp_path / "a.pth", "a.pth: ", message)


@pytest.mark.parametrize("name,value,message", [
    (3, torch.ones(3), "has the key 3"), ("a", "b", "a is 'b', expected a dense tensor"),
    ("a", torch.eye(3).to_sparse(), "a is stored as torch.sparse_coo"),
    ("adapter_modality_embedding.weight", torch.ones(3), "wrong shapes adapter_modality_embedding"),
    ("adapter_proj.conv_A.bias", torch.ones(()), "wrong shapes adapter_proj.W_d.bias []"),
    ("adapter_proj.conv_A.bias", torch.ones(8).int(), "wrong dtypes adapter_proj.conv_A.bias torch.int32"),
    ("layers.0.adapter_attn.conv_A.bias", torch.ones(3), "lavin.adapter.dim is 3, expected an even number"),
])
def test_released_tensors_of_the_wrong_type(tmp_path, name, value, message):
    torch.save({"model": {**released_state(make_lavin()), name: value}}, tmp_path / "a.pth")
    adapters_fail(tmp_path / "a.pth", "a.pth: ", message)


@pytest.mark.parametrize("section,key,value,message", [
    ("lavin adapter", "dim", "8", "metadata lavin.adapter.dim is '8', expected an even number"),
    ("lavin adapter", "dim", HUGE, "lavin.adapter.dim is 1000000000000"),
    ("lavin adapter", "dim", 7, "lavin.adapter.dim is 7"),
    ("lavin adapter", "dim", None, "lavin.adapter.dim is missing"),
    ("lavin adapter", "tau", 0, "lavin.adapter.tau is 0"),
    ("lavin adapter", "scale", float("nan"), "lavin.adapter.scale is nan"),
    ("lavin adapter", "dropout", 1.0, "lavin.adapter.dropout is 1.0"),
    ("lavin adapter", "kind", ["mm"], "lavin.adapter.kind is a list"),
    ("lavin", "adapter", 3, "lavin.adapter is 3, expected an object"),
    ("lavin", "neck_dim", HUGE, "lavin.neck_dim is 1000000000000"),
    ("lavin", "vision", "yes", "lavin.vision is 'yes'"),
    ("lavin", "vit_routing", 3, "lavin.vit_routing is 3"),
    ("lavin", "vit_routing", "tokens", "lavin.vit_routing is 'tokens', expected cls or token"),
    ("lavin", "normalize", "none", "lavin.normalize is 'none', expected imagenet or clip"),
    ("lavin adapter", "kind", "lora", "lavin.adapter.kind is 'lora', expected mm or rep"),
    ("", "format", "QCM-X", "metadata: unknown prompt format 'QCM-X'"),
    ("", "train", [1], "metadata train is a list"), ("", "train", {"data": 3}, "metadata train.data is 3"),
    ("", "train", {"data": "soup:x"}, "metadata: --data soup:x: unknown kind"),
    ("llama", "dim", -32, "llama.dim is -32"), ("llama", "n_layers", [3], "llama.n_layers is a list"),
    ("", "llama", None, "llama.dim is missing"), ("", "lavin", [1], "lavin is a list"),
    ("", "base", 3, "metadata base is 3"), ("", "format", 3, "metadata format is 3"),
    ("", "captions", 1, "metadata captions is 1"),
    ("", "max_new_tokens", -1, "metadata max_new_tokens is -1"),
])
def test_adapter_metadata_of_the_wrong_type(tmp_path, section, key, value, message):
    adapters_fail(with_metadata(tmp_path, section, key, value), "a.safetensors: ", message,
                  "restore the original file")


def with_metadata(folder: Path, section: str, key: str, value) -> Path:
    """An adapter file in whose metadata section[key] is `value`. section: keys on the way there"""
    file = folder / "a.safetensors"
    make_lavin().save(file, **SETTINGS)
    tensors, meta = adapter_files.read_adapters(file)
    place = meta
    for name in section.split():
        place = place[name]
    place[key] = value
    adapter_files.write_adapters(file, tensors, meta)
    return file


def test_adapter_metadata_without_a_base(tmp_path):
    """An earlier version ended in a KeyError."""
    file = with_metadata(tmp_path, "", "base", "x")
    tensors, meta = adapter_files.read_adapters(file)
    del meta["base"]
    adapter_files.write_adapters(file, tensors, meta)
    adapters_fail(file, "a.safetensors: metadata base is missing", "restore the original file")


@pytest.mark.parametrize("section", ["lavin", "lavin adapter"])
def test_adapter_metadata_with_an_unknown_key(tmp_path, section):
    """An earlier version passed the key on to a dataclass, which raised a TypeError."""
    file = with_metadata(tmp_path, section, "rank", 4)
    adapters_fail(file, f"metadata {section.replace(' ', '.')}.rank is unknown, expected ", "use the version")


@pytest.mark.parametrize("config", ["[1]", "3", "{", "[" * 10**5, None])
def test_adapter_metadata_that_is_not_an_object(tmp_path, config):
    meta = {"format": adapter_files.FORMAT} | ({} if config is None else {"config": config})
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors", metadata=meta)
    adapters_fail(tmp_path / "a.safetensors", "a.safetensors: ", "metadata", "restore")


def test_adapters_and_base_must_fit(tmp_path):
    model = make_lavin()
    towers = make_base(model)
    llama, clip = write_hf(tmp_path / "llama", towers[0]), write_hf(tmp_path / "clip", towers[1])
    path = tmp_path / "a.safetensors"
    model.save(path, **SETTINGS)
    lavin.load(path, llama, clip)
    # the same base from another layout, in another precision, is the same base
    meta = write_meta(tmp_path / "meta", towers[0], 2)
    lavin.load(path, meta, clip, dtype=torch.bfloat16)

    other = write_hf(tmp_path / "other", make_base(make_lavin(seed=1))[0])
    fails(lambda: lavin.load(path, other, clip), "a.safetensors: trained on another base", "--any_base")
    lavin.load(path, other, clip, any_base=True)
    wide = write_hf(tmp_path / "wide", make_llama(dataclasses.replace(LLAMA, dim=64)))
    fails(lambda: lavin.load(path, wide, clip),
          "a.safetensors: trained on a LLaMA of (width, layers) (32, 3)", "(64, 3)", "--llama")
    # weights are not accepted as adapters, nor adapters as weights
    fails(lambda: lavin.load(llama / "model.safetensors", llama, clip), "without LaVIN adapters")
    fails(lambda: lavin.load(path, path, clip), "a.safetensors: no such folder of LLaMA weights")
    (tmp_path / "adapters").mkdir()
    shutil.copyfile(path, tmp_path / "adapters" / "model.safetensors")
    fails(lambda: lavin.load(path, tmp_path / "adapters", clip), "config.json is missing")


# ---------------------------------------------------------------------------------------------------
# tokenizer

needs_real = pytest.mark.skipif(not LLAMA_TOKENIZER.is_file(),
                                reason="LLaMA's tokenizer is not in ../shared/data")


def test_tokenizer_of_a_folder(tmp_path):
    tokenizer = Tokenizer(TOKENIZER)
    (tmp_path / "7B").mkdir()
    fails(lambda: Tokenizer(tmp_path / "7B", 61),
          "7B/tokenizer.model: not found, neither here nor one folder up")
    shutil.copyfile(TOKENIZER, tmp_path / "tokenizer.model")
    assert Tokenizer(tmp_path / "7B", tokenizer.vocab_size).encode("a b") == tokenizer.encode("a b")
    fails(lambda: Tokenizer(tmp_path / "7B", 32000),
          f"tokenizer.model: {tokenizer.vocab_size} pieces, but the LLaMA has 32000 embeddings",
          "the tokenizer that came with this LLaMA")
    fails(lambda: Tokenizer(tmp_path / "7B", 60), "pieces, but the LLaMA has 60 embeddings")


@needs_real
def test_token_ids_of_llamas_own_tokenizer():
    tokenizer = Tokenizer(LLAMA_TOKENIZER)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (1, 2, 32000)
    assert tokenizer.encode("Image: ") == [7084, 29901, 29871]
    assert tokenizer.encode("Image: N/A") == [7084, 29901, 405, 29914, 29909]


@pytest.mark.parametrize("file", [TOKENIZER, pytest.param(LLAMA_TOKENIZER, marks=needs_real)])
def test_streaming_never_yields_half_a_character(file):
    tokenizer = Tokenizer(file)
    text = "The sun ☀ is hot, naïve 世界 🙂🙃 — ok"
    ids = tokenizer.encode(text)
    halves = sum(tokenizer.decode(ids[:i]).endswith("\ufffd") for i in range(len(ids)))
    assert halves > 5  # some characters take several tokens
    pieces = list(tokenizer.stream(ids))
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces) and len(pieces) > len(text.split())
    # for any ids, the streamed text is the decoded text
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, tokenizer.vocab_size, (30,), generator=generator)
        ids = ids % (300 if seed % 2 else 10**6)
        assert "".join(tokenizer.stream(ids.tolist())) == tokenizer.decode(ids.tolist())
    assert list(tokenizer.stream([])) == []


# ---------------------------------------------------------------------------------------------------
# commands

@pytest.fixture
def command(monkeypatch, capsys):
    """run weights.py, or another command -> (stdout, stderr)"""
    def call(*argv, main=weights.main):
        run_main(monkeypatch, main, *argv)
        return capsys.readouterr()
    return call


def test_commands(tmp_path, command, monkeypatch):
    meta = write_meta(tmp_path / "7B", make_llama(), 2)
    assert "tokenizer      none: " in command("show", meta)[0]
    shutil.copyfile(TOKENIZER, tmp_path / "tokenizer.model")
    with monkeypatch.context() as m:
        m.setattr(tensorfiles.Mapped, "read", lambda *args: pytest.fail("show reads a tensor"))
        out = command("show", meta)[0]
    assert "LLaMA, Meta" in out and "dim 32, n_layers 3" in out and f"{tmp_path / 'tokenizer.model'}" in out
    assert f"{sum(p.numel() for p in make_llama().parameters()):,} in 30 tensors, float32" in out
    assert command("convert", meta, tmp_path / "hf")[1] == f"wrote {tmp_path / 'hf'}\n"
    assert "LLaMA, Hugging Face" in command("show", tmp_path / "hf")[0]
    with pytest.raises(SystemExit, match="hf: exists and is not an empty folder"):
        command("convert", meta, tmp_path / "hf")

    assert "CLIP, OpenAI" in command("show", write_openai(tmp_path / "ViT.pt", make_vit()))[0]
    command("convert", tmp_path / "ViT.pt", tmp_path / "vit")
    out = command("show", tmp_path / "vit")[0]
    assert "CLIP, Hugging Face" in out and "patch_size 4, width 64, layers 4" in out

    make_lavin().save(tmp_path / "a.safetensors", **SETTINGS)
    assert "routed by its own [cls]" in command("export", tmp_path / "a.safetensors", tmp_path / "a.pth")[1]
    out = command("show", tmp_path / "a.pth")[0]
    assert "LaVIN adapters" in out and '"vit_routing": "token"' in out
    with pytest.raises(SystemExit, match="no such folder of LLaMA or CLIP weights"):
        command("show", tmp_path / "none")


def test_random_weights_answer(tmp_path, command):
    """make_random_7b.py shows how to try 7B without official weights; this test runs it with a tiny model."""
    out = tmp_path / "random"
    command(out, "--llm", "tiny", "--vit", "tiny", "--tokenizer", TOKENIZER, "--shard", 10**6,
            main=make_random_7b.main)
    assert len(list((out / "llama").glob("model-*-of-*.safetensors"))) > 2
    answer, err = command("--llama", out / "llama", "--clip", out / "clip",
                          "--adapters", out / "adapters.safetensors", "--dtype", "bf16",
                          "--image", ROOT / "tiny" / "demo.png", "--prompt", "What is this?",
                          "--max_new_tokens", 6, main=sample.main)
    assert answer.strip() and "bfloat16" in err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("folder, model", [("tiny/llama", LLaMA), ("tiny/clip", VisionTransformer)])
def test_a_base_with_values_that_are_not_finite_is_refused(tmp_path, folder, model, value):
    shutil.copytree(ROOT / folder, tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file)
    with pytest.raises(ValueError, match="holds values that are not finite") as e:
        model.from_pretrained(tmp_path / "base")
    assert str(tmp_path / "base") in str(e.value)
