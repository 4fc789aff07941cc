"""Match the parameter names of a file with ours, and report every difference in one line."""
import re

import torch

from official.tensorfiles import Lazy, Tensors


def take(path, wanted: dict[str, list[str]], found: Tensors, ignored: str = "(?!)") -> Tensors:
    """Pick tensors out of `found` by their names in the file, and return them under our names.

    wanted   {our name: the file's names}; several tensors are concatenated along their rows
    ignored  pattern of names that the file may hold in addition; the default matches no name

    ValueError if a name is missing or unexpected.
    """
    used = {name for names in wanted.values() for name in names}
    missing = sorted(used - found.keys())
    unexpected = sorted(name for name in found.keys() - used if not re.search(ignored, name))
    complain(path, {"missing": missing, "unexpected": unexpected},
             "check that the download is complete and of this model")
    return {ours: join([found[name] for name in theirs]) for ours, theirs in wanted.items()}


def join(parts: list[Lazy], dim: int = 0) -> Lazy:
    """Concatenate tensors along `dim` when they are read."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[dim] = sum(t.shape[dim] for t in parts)
    return Lazy(tuple(shape), parts[0].dtype, lambda: torch.cat([t() for t in parts], dim))


def complain(path, problems: dict[str, list[str]], hint: str) -> None:
    """Raise a ValueError that lists all problems, three names each. Without problems, do nothing."""
    texts = [f"{what} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
             for what, names in problems.items() if names]
    if texts:
        raise ValueError(f"{path}: {'; '.join(texts)}; {hint}")
