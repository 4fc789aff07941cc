"""Files full of tensors, opened without reading them and without running what strangers put inside.

    safetensors                   a JSON header and bytes
    torch pickles (.bin, .pth)    through torch's weights-only unpickler, which knows tensors and nothing else
    TorchScript archives (.pt)    a zip with pickled modules beside their code; ours reads the one, never the other

`open_..` returns {name: Lazy}: shape and dtype are known at once, the bytes are read by calling it.
"""
import json
import pickle
import re
import zipfile
from functools import partial
from math import prod
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
from safetensors import safe_open

CODES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # safetensors' names
WINDOW = 256 * 2**20  # bytes read from mapped files before they are mapped anew


class Lazy(NamedTuple):
    """A tensor that is still in its file."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    def __call__(self) -> torch.Tensor:
        return self.read()

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Mapped:
    """Files in memory by mmap. Pages that were read count as ours for as long as their mapping lives, so all are given
    up every WINDOW bytes: whoever copies tensors out needs that much beside the copies, never a whole file."""

    def __init__(self):
        self.files, self.left = {}, WINDOW

    def read(self, open_file: Callable[[Path], Callable[[str], torch.Tensor]], file: Path, name: str) -> torch.Tensor:
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
    return ValueError(f"{file}: refused, opening it would call {name}, and weights need no such thing; "
                      "get it from its official source")


# ---------------------------------------------------------------------------------------------------
# safetensors

def open_safetensors(file: Path, mapped: Mapped) -> dict[str, Lazy]:
    try:
        f = safe_open(file, "pt")
        slices = {name: f.get_slice(name) for name in f.keys()}
        read = partial(mapped.read, lambda file: safe_open(file, "pt").get_tensor, file)
        return {name: Lazy(tuple(s.get_shape()), CODES[s.get_dtype()], partial(read, name))
                for name, s in slices.items()}
    except Exception as e:  # safetensors raises its own type
        raise damaged(file, e) from None


def write_safetensors(file: Path, tensors: dict[str, Lazy]) -> None:
    """One tensor in memory at a time, which safetensors' own save_file cannot do. Written beside, then renamed."""
    codes = {dtype: code for code, dtype in CODES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the data begin at a multiple of 64
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
            f"{file}: refused, it is damaged or made of more than tensors; get it from its official source") from None
    except Exception as e:  # cut files end in RuntimeError, EOFError, OSError, ...
        raise damaged(file, e) from None


def open_torch(file: Path, mapped: Mapped) -> dict[str, Lazy]:
    state = load_torch(file, mmap=True)
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(f"{file}: holds more than tensors by name; expected the weights alone")
    read = partial(mapped.read, lambda file: load_torch(file, mmap=True).__getitem__, file)
    return {name: Lazy(tuple(t.shape), t.dtype, partial(read, name)) for name, t in state.items()}


# ---------------------------------------------------------------------------------------------------
# TorchScript archives

class Module:
    """What stands in for every class of an archive: it takes its state, and does nothing."""
    state: dict = {}

    def __setstate__(self, state):
        self.state = state


class ArchiveUnpickler(pickle.Unpickler):
    """data.pkl of an archive: its modules become `Module`s, their tensors `Lazy`s, and nothing else is let in."""

    def __init__(self, file: Path, archive: zipfile.ZipFile):
        self.file, (pkl,) = file, [name for name in archive.namelist() if name.endswith("/data.pkl")]
        self.root = pkl.removesuffix(".pkl")
        super().__init__(archive.open(pkl))

    def find_class(self, module: str, name: str):
        storages = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
                    "LongStorage": torch.int64, "IntStorage": torch.int32, "DoubleStorage": torch.float64}
        if module.split(".")[0] == "__torch__":
            return Module
        if module == "torch" and name in storages:
            return storages[name]
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list  # typed lists
        known = {("torch._utils", "_rebuild_tensor_v2"): self.tensor, ("collections", "OrderedDict"): dict}
        if (module, name) not in known:
            raise refused(self.file, f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, pid):
        _, dtype, key, _, _ = pid
        return dtype, f"{self.root}/{key}"

    def tensor(self, storage, offset, size, stride, *_) -> Lazy:
        return Lazy(tuple(size), storage[0], partial(read_storage, self.file, storage, offset, size, stride))


def read_storage(file: Path, storage: tuple[torch.dtype, str], offset: int, size, stride) -> torch.Tensor:
    dtype, member = storage
    try:
        with zipfile.ZipFile(file) as archive:
            values = torch.frombuffer(bytearray(archive.read(member)), dtype=dtype)
        return values.as_strided(size, stride, offset).contiguous()
    except (zipfile.BadZipFile, KeyError, RuntimeError, ValueError) as e:
        raise damaged(file, e) from None


def open_torchscript(file: Path) -> dict[str, Lazy]:
    """The parameters and buffers of a scripted or traced model, under their state-dict names."""
    def walk(module: Module, prefix: str) -> Iterator[tuple[str, Lazy]]:
        for name, value in module.state.items():
            if isinstance(value, Lazy):
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from walk(value, f"{prefix}{name}.")

    try:
        with zipfile.ZipFile(file) as archive:
            return dict(walk(ArchiveUnpickler(file, archive).load(), ""))
    except ValueError:
        raise
    except Exception as e:
        raise damaged(file, e) from None


def is_torchscript(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


# ---------------------------------------------------------------------------------------------------
# a folder as Hugging Face lays it out

def read_json(path: Path) -> dict:
    """a JSON file, or one line about why not"""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e}); download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a JSON {type(values).__name__}, expected an object")
    return values


def open_folder(folder: Path) -> dict[str, Lazy]:
    """Every tensor of Hugging Face's single file, or of the shards that its index names."""
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
    raise FileNotFoundError(f"{folder}: no weights beside config.json; expected model.safetensors or pytorch_model.bin, "
                            "or the .index.json of their shards")


def write_folder(folder: Path, config: dict, tensors: dict[str, Lazy], limit: int = 5 * 10**9) -> None:
    """config.json and safetensors as Hugging Face lays them out, in shards of at most `limit` bytes; tensors stream."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, t in tensors.items():
        if size + t.nbytes > limit and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += t.nbytes
    n = len(shards)
    files = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)] if n > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards):
        write_safetensors(folder / file, shard)
    if n > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                 "weight_map": {name: file for file, shard in zip(files, shards) for name in shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}, indent=2) + "\n")
