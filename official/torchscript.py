"""The tensors of a TorchScript archive (OpenAI's ViT-L-14.pt), read without running its code.

An archive is a zip file: data.pkl describes the modules, data/N are the bytes of the tensors, code/ is source
code. `torch.jit.load` would compile that code. This reader unpickles data.pkl with a stand-in for every class
and never opens code/.
"""
import pickle
import zipfile
from functools import partial
from pathlib import Path
from typing import Iterator

import torch

from official.tensorfiles import Lazy, Tensors, damaged, refused

STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
            "LongStorage": torch.int64, "IntStorage": torch.int32, "DoubleStorage": torch.float64}


class Module:
    """The stand-in for every class of an archive. It keeps its state and does nothing else."""
    state: dict = {}

    def __setstate__(self, state):
        self.state = state


class ArchiveUnpickler(pickle.Unpickler):
    """Unpickle data.pkl. A module becomes a `Module`, a tensor a `Lazy`; all other objects are refused."""

    def __init__(self, file: Path, archive: zipfile.ZipFile):
        self.file, (pkl,) = file, [name for name in archive.namelist() if name.endswith("/data.pkl")]
        self.root = pkl.removesuffix(".pkl")
        super().__init__(archive.open(pkl))

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "__torch__":
            return Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
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


def open_torchscript(file: Path) -> Tensors:
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
