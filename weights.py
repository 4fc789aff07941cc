"""Official files -> our tensors. The layouts, one module each, are in official/.

    LLaMA, Hugging Face   config.json, model.safetensors or pytorch_model.bin, or shards of either
    LLaMA, Meta           params.json, consolidated.NN.pth
    CLIP, Hugging Face    the same files as LLaMA's; the image encoder alone or in a full CLIP
    CLIP, OpenAI          ViT-L-14.pt, a TorchScript archive
    adapters              our adapters.safetensors, or a .pth checkpoint that the authors released

    python weights.py show PATH                              list what a path holds; reads only the headers
    python weights.py convert SRC DST                        any layout -> Hugging Face's, or our adapter file
    python weights.py export adapters.safetensors NEW.pth    our adapters -> the names of the released code

A reader returns (sizes, tensors): the keyword arguments of our config, and one `Lazy` for each parameter.
A Lazy reads its tensor when it is called. `load` fills a model tensor by tensor, so loading needs the memory
of the model and of about one tensor more.
"""
import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Callable
from weakref import WeakValueDictionary

import cli

import torch
import torch.nn as nn

from official import adapter_files, clip_layouts, llama_layouts, released
from official.configs import check_metadata
from official.layouts import identify
from official.mistakes import complain
from official.saving import write_atomically
from official.tensorfiles import Tensors, write_folder
from official.tokenizer import special_ids, tokenizer_files, tokenizer_path


def read_llama(path: str | Path) -> tuple[dict, Tensors]:
    """A folder of LLaMA weights -> (sizes for LLaMAConfig, tensors under Meta's names)."""
    meta = identify(Path(path), "LLaMA") == "LLaMA, Meta"
    return (llama_layouts.read_meta if meta else llama_layouts.read_hf)(Path(path))


def read_clip(path: str | Path) -> tuple[dict, Tensors]:
    """A folder of CLIP weights or OpenAI's file -> (sizes for CLIPConfig, tensors under OpenAI's names)."""
    openai = identify(Path(path), "CLIP") == "CLIP, OpenAI"
    return (clip_layouts.read_openai if openai else clip_layouts.read_hf)(Path(path))


def read_adapters(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Our adapter file or a released .pth checkpoint -> (tensors under our names, metadata)."""
    path = Path(path)
    if path.suffix == ".pth" and path.is_file():
        tensors, meta = released.read_released(path)
    else:
        tensors, meta = adapter_files.read_adapters(path)
    check_metadata(path, meta)
    return tensors, meta


def sketch(p: torch.Tensor) -> bytes:
    """The shape of a tensor and 64 of its values; the same for copies in fp32 and bf16."""
    values = p.detach().flatten()[:: max(1, p.numel() // 64)][:64]
    return f"{list(p.shape)}".encode() + values.to(torch.bfloat16).float().cpu().numpy().tobytes()


def fingerprint(model: nn.Module) -> str:
    """A hash of the sketches of all frozen tensors. A matrix in 4 bits, or sharded, has its original's."""
    sketches = {f"{name}.weight": m.sketch for name, m in model.named_modules() if hasattr(m, "sketch")}
    sketches |= {name: sketch(p) for name, p in model.named_parameters()
                 if "adapter_" not in name and name not in sketches}
    text = b"".join(name.encode() + sketches[name] for name in sorted(sketches))
    return hashlib.sha256(text).hexdigest()[:16]


def check_base(path: str | Path, meta: dict, model: nn.Module, base: str, any_base: bool) -> None:
    """ValueError unless `model` has the base on which the adapters of `path` were trained."""
    wanted = meta["llama"]["dim"], meta["llama"]["n_layers"]
    found = model.llama.cfg.dim, model.llama.cfg.n_layers
    if wanted != found:
        raise ValueError(f"{path}: trained on a LLaMA of (width, layers) {wanted}, but {base} has {found}; "
                         "point --llama at that LLaMA")
    if meta["base"] not in (None, fingerprint(model)) and not any_base:  # released files have no fingerprint
        raise ValueError(f"{path}: trained on another base than {base} (fingerprint {meta['base']}, here "
                         f"{fingerprint(model)}); point --llama and --clip at that base, or pass --any_base")


def load(model: Callable, config: Callable, read: Callable, path: str | Path, device, dtype,
         after_read: Callable | None = None) -> nn.Module:
    """Build model(config(**sizes)) from what read(path) returns, on `device`, as `dtype`.

    Only one tensor is read at a time. Then after_read(model, name of its module) may keep it in another form,
    such as 4 bits. ValueError if a shape differs or a value is not finite.
    """
    sizes, tensors = read(path)
    with torch.device("meta"):  # names and shapes, no memory
        model = model(config(**sizes))
    ours = dict(model.named_parameters())
    assert ours.keys() == tensors.keys(), f"readers and model differ in {ours.keys() ^ tensors.keys()}"
    wrong = [f"{name} {list(tensors[name].shape)} instead of {list(p.shape)}"
             for name, p in ours.items() if tensors[name].shape != p.shape]
    complain(path, {"wrong shapes": wrong}, "the configuration is of another model, download both again")
    kept = WeakValueDictionary()  # {Lazy: parameter}; tied embeddings have one Lazy, and are stored once
    for name, t in tensors.items():
        owner, _, leaf = name.rpartition(".")
        p = kept.get(t)
        if p is None:
            kept[t] = p = nn.Parameter(t().to(device, dtype, copy=True), requires_grad=False)
            if not all(x.isfinite() for x in p.aminmax()):
                raise ValueError(f"{path}: {name} holds values that are not finite; download it again")
        setattr(model.get_submodule(owner), leaf, p)
        if after_read:
            after_read(model, owner)
    return model


# ---------------------------------------------------------------------------------------------------
# the command

def convert(src: Path, dst: Path) -> None:
    """Any layout -> Hugging Face's, with the same bits and dtypes; a released .pth -> our adapter file."""
    if src.is_file() and src.suffix == ".pth":
        return adapter_files.write_adapters(dst, *read_adapters(src))
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst}: exists and is not an empty folder; choose another")
    if identify(src).startswith("CLIP"):
        return write_folder(dst, *clip_layouts.to_hf(*read_clip(src)))
    tokenizer = tokenizer_path(src)
    config, tensors = llama_layouts.to_hf(*read_llama(src))
    write_folder(dst, config | special_ids(tokenizer), tensors)
    for file in tokenizer_files(tokenizer):
        write_atomically(dst / file.name, file.read_bytes())


def show(path: Path) -> str:
    """What a path holds, one property a line. Of weights, only the headers are read."""
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
    tensors = set(tensors.values())  # tied embeddings are one tensor
    numbers = sum(t.nbytes // t.dtype.itemsize for t in tensors)
    size = sum(t.nbytes for t in tensors) / 1e6
    rows["parameters"] = f"{numbers:,} in {len(tensors)} tensors, {dtypes}, {size:,.1f} MB"
    return "\n".join(f"{key:<14} {value}" for key, value in rows.items())


def export_adapters(src: Path, dst: Path) -> None:
    """Our adapter file -> a checkpoint under the names of the released code."""
    released.write_released(dst, *read_adapters(src), src)


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="show | convert | export")
    commands.add_parser("show", help="list what a path holds").add_argument("path", type=Path)
    for name, text in (("convert", "to Hugging Face's layout"), ("export", "to the released code's names")):
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
