"""Files of tensors, opened without reading the tensors and without running code that a file brings along.

    safetensors      a JSON header, then the bytes of the tensors
    torch pickles    .bin and .pth, through torch's weights-only unpickler
    folders          as Hugging Face lays them out: one file, or shards and their index

The `open_*` functions return {name: Lazy}. A Lazy knows its shape and dtype; calling it reads the bytes.
"""
import json
import pickle
import re
from functools import partial
from math import prod
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import safe_open

from official.configs import read_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # safetensors' names
WINDOW = 256 * 2**20  # bytes read from mapped files before all mappings are renewed


class Lazy(NamedTuple):
    """A tensor that is still in its file. Calling it reads the tensor."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    def __call__(self) -> torch.Tensor:
        return self.read()

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


Tensors = dict[str, Lazy]


class Mapped:
    """Memory-mapped files.

    A page that was read stays resident for as long as its mapping lives, so all mappings are renewed after
    every WINDOW bytes. Copying tensors out then needs WINDOW bytes beyond the copies, not the whole file.
    """

    def __init__(self):
        self.files, self.left = {}, WINDOW

    def read(self, open_file: Callable, file: Path, name: str) -> torch.Tensor:
        """open_file(file)(name) is the tensor"""
        if self.left <= 0:
            self.files.clear()
            self.left = WINDOW
        if file not in self.files:
            self.files[file] = open_file(file)
        t = self.files[file](name)
        self.left -= t.nbytes
        return t


def damaged(file: Path, reason: object) -> ValueError:
    reason = str(reason).strip().partition("\n")[0].partition(". ")[0][:100]
    return ValueError(f"{file}: damaged or cut short ({reason}); download it again")


def refused(file: Path, name: str) -> ValueError:
    return ValueError(f"{file}: refused, because opening it would call {name}, which no weights need; "
                      "download it from its official source")


# ---------------------------------------------------------------------------------------------------
# safetensors

def open_safetensors(file: Path, mapped: Mapped) -> Tensors:
    try:
        f = safe_open(file, "pt")
        slices = {name: f.get_slice(name) for name in f.keys()}
        read = partial(mapped.read, lambda file: safe_open(file, "pt").get_tensor, file)
        return {name: Lazy(tuple(s.get_shape()), DTYPES[s.get_dtype()], partial(read, name))
                for name, s in slices.items()}
    except Exception as e:  # safetensors raises its own exception type
        raise damaged(file, e) from None


def write_safetensors(file: Path, tensors: Tensors) -> None:
    """Write a temporary file, then rename it. One tensor is in memory at a time; save_file needs all."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        start, end = end, end + t.nbytes
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the bytes of the tensors begin at a multiple of 64
    part = file.with_name(file.name + ".part")
    with open(part, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(t().contiguous().flatten().view(torch.uint8).numpy())
    part.replace(file)


# ---------------------------------------------------------------------------------------------------
# torch pickles

def load_torch(file: Path, mmap: bool = False, allow: tuple[type, ...] = ()):
    """What torch.save wrote: tensors in plain containers, and instances of the classes in `allow`."""
    try:
        with torch.serialization.safe_globals(list(allow)):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as e:
        found = re.search(r"GLOBAL:? ([\w.]+)", str(e))
        raise refused(file, found[1]) if found else ValueError(
            f"{file}: refused, because it is damaged or holds more than tensors; "
            "download it from its official source") from None
    except Exception as e:  # a file that is cut short raises RuntimeError, EOFError, OSError, ...
        raise damaged(file, e) from None


def open_torch(file: Path, mapped: Mapped) -> Tensors:
    state = load_torch(file, mmap=True)
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(f"{file}: holds more than tensors by name; expected the weights alone")
    read = partial(mapped.read, lambda file: load_torch(file, mmap=True).__getitem__, file)
    return {name: Lazy(tuple(t.shape), t.dtype, partial(read, name)) for name, t in state.items()}


# ---------------------------------------------------------------------------------------------------
# folders as Hugging Face lays them out

def open_folder(folder: Path) -> Tensors:
    """All tensors of the single file or, without one, of the shards that the index names."""
    openers = {"model.safetensors": open_safetensors, "pytorch_model.bin": open_torch}
    for single, open_file in openers.items():
        index, files = folder / f"{single}.index.json", [single]
        if not (folder / single).is_file():
            if not index.is_file():
                continue
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder / missing[0]}: missing shard ({len(missing)} of {len(files)}); "
                                    "download it again")
        mapped = Mapped()
        return {name: t for file in files for name, t in open_file(folder / file, mapped).items()}
    raise FileNotFoundError(f"{folder}: has config.json, but no weights; download model.safetensors "
                            "or pytorch_model.bin, or all shards and their .index.json")


def write_folder(folder: Path, config: dict, tensors: Tensors, limit: int = 5 * 10**9) -> None:
    """Write config.json and shards of at most `limit` bytes. One tensor is in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, t in tensors.items():
        if size + t.nbytes > limit and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += t.nbytes
    n = len(shards)
    files = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    files = files if n > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards):
        write_safetensors(folder / file, shard)
    if n > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                 "weight_map": {name: file for file, shard in zip(files, shards) for name in shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}, indent=2) + "\n")
