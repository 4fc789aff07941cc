"""Match the parameter names of a file with ours."""
import re
from pathlib import Path
from typing import Callable

import torch

from official.mistakes import complain
from official.tensorfiles import Lazy, Tensors

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # what a parameter may be stored as


def take(path: Path, wanted: dict[str, list[str]], found: Tensors, ignored: str = "(?!)") -> Tensors:
    """Pick tensors out of `found` by their names in the file, and return them under our names.

    wanted   {our name: the file's names}; several tensors are concatenated along their rows
    ignored  pattern of names that the file may hold in addition; the default matches no name

    ValueError if a name is missing or unexpected, or if a wanted tensor is not floating point.
    """
    used = {name for names in wanted.values() for name in names}
    missing = sorted(used - found.keys())
    unexpected = sorted(name for name in found.keys() - used if not re.search(ignored, name))
    complain(path, {"missing": missing, "unexpected": unexpected},
             "check that the download is complete and of this model")
    others = [f"{name} {found[name].dtype}" for name in sorted(used) if found[name].dtype not in FLOATS]
    complain(path, {"wrong dtypes": others},
             "expected float32, float16 or bfloat16; download weights that are not quantised")
    return {ours: join(path, {name: found[name] for name in theirs}) for ours, theirs in wanted.items()}


def join(path: Path, parts: dict[str, Lazy], dim: int = 0) -> Lazy:
    """Concatenate tensors along `dim` when they are read. Their names are for the message."""
    first, *others = parts.values()
    if not others:
        return first
    frames = {(t.dtype, len(t.shape), t.shape[:dim], t.shape[dim + 1:]) for t in parts.values()}
    if len(frames) > 1 or len(first.shape) <= dim:
        texts = [f"{name} {list(t.shape)} {t.dtype}" for name, t in parts.items()]
        complain(path, {"cannot concatenate": texts}, "their sizes or dtypes differ; download them again")
    shape = list(first.shape)
    shape[dim] = sum(t.shape[dim] for t in parts.values())
    return Lazy(tuple(shape), first.dtype, lambda: torch.cat([t() for t in parts.values()], dim))


def check_shapes(path: Path, tensors: Tensors, fits: Callable, expected: str) -> None:
    """ValueError that lists the tensors for which fits(name, shape) is false."""
    wrong = [f"{name} {list(t.shape)}" for name, t in tensors.items() if not fits(name, tuple(t.shape))]
    complain(path, {"wrong shapes": wrong}, f"expected {expected}; download it again")
