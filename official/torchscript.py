"""The tensors of a TorchScript archive (OpenAI's ViT-L-14.pt), read without running its code.

An archive is a zip file: data.pkl describes the modules, data/N are the bytes of the tensors, code/ is source
code. `torch.jit.load` would compile that code. This reader unpickles data.pkl with a stand-in for every class
and never opens code/.
"""
import pickle
import zipfile
from functools import partial
from math import prod
from pathlib import Path
from typing import Iterator

import torch

from official.mistakes import BadFile, check_file, damaged, refused, shown
from official.tensorfiles import Lazy, Tensors, check_archive

STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
            "LongStorage": torch.int64, "IntStorage": torch.int32, "DoubleStorage": torch.float64}
LONGEST_NAME = 500  # characters of a state-dict name; also bounds how deep modules may be nested


class Module:
    """The stand-in for every class of an archive. It keeps its state and does nothing else."""
    state: dict = {}

    def __setstate__(self, state):
        self.state = state


class ArchiveUnpickler(pickle._Unpickler):
    """Unpickle data.pkl. A module becomes a `Module`, a tensor a `Lazy`; all other objects are refused.

    The base class is the unpickler in Python. The one in C allocates a memo of whatever size the file says.
    """
    dispatch = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]  # allocates whatever size the file says; no archive needs it

    def __init__(self, file: Path, archive: zipfile.ZipFile):
        self.file, self.archive = file, archive
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise damaged(file, f"{len(pickles)} members are named data.pkl, expected 1")
        self.root = pickles[0].removesuffix(".pkl")
        super().__init__(archive.open(pickles[0]))

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "__torch__":
            return Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return lambda *_: []  # typed lists, which hold no parameters
        known = {("torch._utils", "_rebuild_tensor_v2"): lambda *args: self.tensor(*args),
                 ("collections", "OrderedDict"): lambda *_: {}}  # the hooks of a tensor
        if (module, name) not in known:
            called = shown(f"{module}.{name}")
            raise refused(self.file, f"opening it would call {called}, which no weights need")
        return known[module, name]

    def persistent_load(self, pid):
        _, dtype, key, _, _ = pid
        return dtype, self.archive.getinfo(f"{self.root}/{key}")

    def tensor(self, storage, offset, size, stride, *_) -> Lazy:
        dtype, member = storage
        numbers = (offset, *size, *stride)
        if len(size) > 8 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise damaged(self.file, f"{member.filename} has an impossible shape")
        if prod(size) * dtype.itemsize > member.file_size:
            raise damaged(self.file, f"{member.filename} is too small for its shape")
        read = partial(read_storage, self.file, dtype, member.filename, offset, size, stride)
        return Lazy(tuple(size), dtype, read)


def read_storage(file: Path, dtype: torch.dtype, member: str, offset: int, size, stride) -> torch.Tensor:
    try:
        with zipfile.ZipFile(file) as archive:
            values = torch.frombuffer(bytearray(archive.read(member)), dtype=dtype)
        return values.as_strided(size, stride, offset).contiguous()
    except Exception as e:
        raise damaged(file, e) from None


def open_torchscript(file: Path) -> Tensors:
    """The parameters and buffers of a scripted or traced model, under their state-dict names."""
    try:
        check_archive(file)
        with zipfile.ZipFile(file) as archive:
            return dict(walk(file, ArchiveUnpickler(file, archive).load(), "", set()))
    except BadFile:
        raise
    except Exception as e:
        raise damaged(file, e) from None


def walk(file: Path, module: Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, Lazy]]:
    """The tensors of a module and its submodules. Each state is visited once; it may be repeated often."""
    if id(module.state) in seen:
        return
    seen.add(id(module.state))
    for name, value in module.state.items():
        if not isinstance(name, str) or len(prefix) + len(name) > LONGEST_NAME:
            raise damaged(file, f"a parameter's name is not text, or longer than {LONGEST_NAME} characters")
        if isinstance(value, Lazy):
            yield prefix + name, value
        elif isinstance(value, Module):
            yield from walk(file, value, f"{prefix}{name}.", seen)


def is_torchscript(file: Path) -> bool:
    check_file(file)
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # a damaged zip file can raise almost anything; open_torch then says what is wrong
        return False
