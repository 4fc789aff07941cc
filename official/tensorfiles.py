"""Files of tensors, opened without reading the tensors and without running code that a file brings along.

    safetensors      a JSON header, then the bytes of the tensors
    torch pickles    .bin and .pth, through torch's weights-only unpickler
    folders          as Hugging Face lays them out: one file, or shards and their index

The `open_*` functions return {name: Lazy}. A Lazy knows its shape and dtype; calling it reads the bytes.
"""
import json
import pickle
import re
import zipfile
from functools import partial
from math import prod
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import safe_open

from official.configs import read_json
from official.mistakes import BadFile, check_file, complain, damaged, described, refused, shown
from official.saving import atomic, write_atomically

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


# ---------------------------------------------------------------------------------------------------
# safetensors

def open_safetensors(file: Path, mapped: Mapped) -> Tensors:
    check_file(file)
    try:
        f = safe_open(file, "pt")
        slices = {name: f.get_slice(name) for name in f.keys()}
        header = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except Exception as e:  # safetensors raises its own exception type
        raise damaged(file, e) from None
    unknown = [f"{name} {dtype}" for name, (_, dtype) in header.items() if dtype not in DTYPES]
    complain(file, {"unknown dtypes": unknown},
             f"expected {', '.join(DTYPES)}; download weights that are not quantised")
    read = partial(mapped.read, lambda file: safe_open(file, "pt").get_tensor, file)
    return {name: Lazy(shape, DTYPES[dtype], partial(read, name)) for name, (shape, dtype) in header.items()}


def write_safetensors(file: Path, tensors: Tensors) -> None:
    """Atomic. One tensor is in memory at a time; safetensors' own save_file needs all."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        start, end = end, end + t.nbytes
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the bytes of the tensors begin at a multiple of 64
    with atomic(file) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(t().contiguous().flatten().view(torch.uint8).numpy())


# ---------------------------------------------------------------------------------------------------
# torch pickles

def check_archive(file: Path) -> None:
    """Refuse a zip file that would expand to much more than its own size.

    torch compresses only source code, which is never read here, so an honest archive does not expand at all.
    """
    with zipfile.ZipFile(file) as archive:
        size = sum(member.file_size for member in archive.infolist() if "/code/" not in member.filename)
    if size > 10 * file.stat().st_size:
        raise refused(file, f"its {file.stat().st_size:,} bytes would expand to {size:,}")


def load_torch(file: Path, allow: tuple[type, ...] = ()):
    """What torch.save wrote: tensors in plain containers, and instances of the classes in `allow`."""
    check_file(file)
    try:
        if zipfile.is_zipfile(file):
            check_archive(file)
        with torch.serialization.safe_globals(list(allow)):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except BadFile:
        raise
    except pickle.UnpicklingError as e:
        found = re.search(r"GLOBAL:? ([\w.]+)", str(e))
        call = f"opening it would call {shown(found[1])}, which no weights need" if found else ""
        raise refused(file, call or "it is damaged or holds more than tensors") from None
    except Exception as e:  # a file that is cut short raises RuntimeError, EOFError, OSError, ...
        raise damaged(file, e) from None


def unusable(t: object) -> str | None:
    """Why a value of a pickle is no ordinary tensor, or None if it is one."""
    if not isinstance(t, torch.Tensor):
        return described(t)
    if t.is_meta:
        return "a meta tensor, which has no values"
    if t.is_quantized or t.is_nested or t.layout != torch.strided:
        return "quantised" if t.is_quantized else "nested" if t.is_nested else f"stored as {t.layout}"
    if prod(t.shape) * t.itemsize > t.untyped_storage().nbytes():
        return f"of shape {list(t.shape)}, which repeats the few values in the file"
    return None


def check_tensors(file: Path, state: object) -> dict[str, torch.Tensor]:
    """Return `state` if it is {name: ordinary tensor}. ValueError names the first entry that is not."""
    if not isinstance(state, dict):
        raise BadFile(f"{file}: holds {described(state)}, expected tensors by name; download it again")
    for name, t in state.items():
        if not isinstance(name, str):
            raise BadFile(f"{file}: has the key {described(name)}, expected names; download it again")
        if problem := unusable(t):
            raise BadFile(f"{file}: {shown(name)} is {problem}, expected a dense tensor; "
                          "download the original weights")
    return state


def open_torch(file: Path, mapped: Mapped) -> Tensors:
    state = check_tensors(file, load_torch(file))
    read = partial(mapped.read, lambda file: load_torch(file).__getitem__, file)
    return {name: Lazy(tuple(t.shape), t.dtype, partial(read, name)) for name, t in state.items()}


# ---------------------------------------------------------------------------------------------------
# folders as Hugging Face lays them out

def open_folder(folder: Path) -> Tensors:
    """All tensors of the single file or, without one, of the shards that the index names."""
    openers = {"model.safetensors": open_safetensors, "pytorch_model.bin": open_torch}
    for single, open_file in openers.items():
        index, files = folder / f"{single}.index.json", [single]
        if not (folder / single).exists():
            if not index.exists():
                continue
            files = read_index(index)
        missing = [file for file in files if not (folder / file).exists()]
        if missing:
            raise FileNotFoundError(f"{folder / shown(missing[0])}: missing shard ({len(missing)} of "
                                    f"{len(files)}); download it again")
        mapped = Mapped()
        return {name: t for file in files for name, t in open_file(folder / file, mapped).items()}
    raise FileNotFoundError(f"{folder}: has config.json, but no weights; download model.safetensors "
                            "or pytorch_model.bin, or all shards and their .index.json")


def read_index(index: Path) -> list[str]:
    """The names of the shards. ValueError if one is not a file of the index's own folder."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise BadFile(f"{index}: weight_map is not an object of tensor and file names; download it again")
    for file in shards.values():
        if file in ("", "..") or Path(file).name != file:
            raise BadFile(f"{index}: weight_map names {described(file)}, expected a file of the same folder; "
                          "download it from its official source")
    return sorted(set(shards.values()))


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
        write_atomically(folder / "model.safetensors.index.json", f"{json.dumps(index, indent=2)}\n".encode())
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = json.dumps({**config, "torch_dtype": dtype}, indent=2)
    write_atomically(folder / "config.json", f"{config}\n".encode())
