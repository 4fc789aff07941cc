"""Our own files: adapters, and the checkpoints of a training run.

An adapter file is safetensors in fp32. Its metadata rebuild the model around its base: configuration, sizes
and fingerprint of the base, prompt format. The checkpoints that the authors released are in released.py.
"""
import hashlib
import io
import json
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from official.mistakes import BadFile, damaged
from official.saving import write_atomically
from official.tensorfiles import check_tensors, load_torch, unusable

FORMAT = "lavin-adapters"
FLAG = str | int | float  # what the description of a run holds
AGAIN = "run without --resume to start again"


def write_adapters(path: str | Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Atomic; ValueError if a value is not finite, because such adapters are useless."""
    tensors = {name: t.detach().float().contiguous().cpu() for name, t in tensors.items()}
    check_finite(path, tensors)
    write_atomically(Path(path), save(tensors, {"format": FORMAT, "config": json.dumps(meta)}))


def read_adapters(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors by name, metadata); ValueError if the file is something else, or its metadata are not JSON."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such adapter file; `python train.py` writes one")
    try:
        with safe_open(path, "pt") as f:
            meta = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}
    except Exception as e:  # safetensors raises its own type
        raise BadFile(f"{path}: not a readable safetensors file ({e})") from None
    if meta.get("format") != FORMAT:
        raise BadFile(f"{path}: a safetensors file without LaVIN adapters; expected one that train.py wrote")
    try:
        return tensors, json.loads(meta["config"])
    except (KeyError, RecursionError, ValueError):
        raise BadFile(f"{path}: its metadata are not valid JSON; restore the original file") from None


def check_finite(path: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """ValueError if a value is NaN, infinite or absurd (1e6 and more): the training run has diverged."""
    for name, t in tensors.items():
        if not (t.abs() < 1e6).all():
            raise BadFile(f"{path}: {name} holds huge or infinite values; the training run diverged, "
                          "start it again with a lower --lr or with --clip_grad 1")


def fill(params: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """Copy `tensors` into `params`; ValueError unless names and shapes match and all values are finite."""
    shapes = [f"{n} {list(tensors[n].shape)}, the model has {list(params[n].shape)}"
              for n in params.keys() & tensors.keys() if params[n].shape != tensors[n].shape]
    for problem, names in (("lacks", sorted(params.keys() - tensors.keys())),
                           ("has unknown", sorted(tensors.keys() - params.keys())),
                           ("is for a base of another size:", shapes)):
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise BadFile(f"{path}: {problem} {names[0]}{more}")
    check_finite(path, tensors)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(tensors[name])


MUST_MATCH = ("vision vit_adapters adapter adapter_dim scale tau dropout normalize format captions max_len "
              "epochs warmup batch_size lr weight_decay beta2 clip_grad seed bits").split()


def run_settings(cfg, dtype: torch.dtype, base: str, examples: list) -> dict[str, FLAG]:
    """What a run must share with the run that it resumes; folders, machine and logging may change.

    cfg: train.Config; base: fingerprint of the frozen weights; examples: of the training, data.Example
    """
    tokens = hashlib.sha256()
    for e in examples:
        image = e.sample.image.name if e.sample.image else ""
        tokens.update(f"{e.head} {e.n_prompt} {image}".encode() + e.rest.tobytes())
    return {name: getattr(cfg, name) for name in MUST_MATCH} | {
        "data": tokens.hexdigest()[:16], "base": base, "dtype": str(dtype)}


def write_checkpoint(path: Path, state: dict) -> None:
    """Atomic. ValueError before anything is written if the adapters in `state` are not finite."""
    check_finite(path, state["adapters"])
    file = io.BytesIO()
    torch.save(state, file)
    write_atomically(path, file.getvalue())


def read_checkpoint(path: Path) -> dict:
    """ValueError if the file is damaged or holds something else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: nothing to resume from; run without --resume first")
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()  # torch does not compare the checksums
    except (zipfile.BadZipFile, NotImplementedError, OSError) as e:
        raise damaged(path, e, AGAIN) from None
    if bad:
        raise damaged(path, f"wrong checksum of {bad}", AGAIN)
    state = load_torch(path)
    kinds = {"step": int, "run": dict, "optimizer": dict, "adapters": dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kinds[key]) for key in kinds) \
            or not 0 <= state["step"] < 2**53 or not all(isinstance(x, FLAG) for x in state["run"].values()):
        raise BadFile(f"{path}: not a checkpoint that train.py wrote; {AGAIN}")
    check_tensors(path, state["adapters"])
    return state


def load_checkpoint(path: Path, params: dict, optimizer: torch.optim.Optimizer, settings: dict) -> int:
    """Restore `params` and the optimizer; return the number of steps done. ValueError if it is another run's.

    settings: `run_settings` of this run, which the run that wrote the file must share
    """
    state = read_checkpoint(path)
    for name, value in settings.items():
        if state["run"].get(name) != value:
            before = state["run"].get(name)
            raise BadFile(f"{path}: --resume continues a run with {name} {before}, not {value}")
    fill(params, state["adapters"], path)
    restore(optimizer, state["optimizer"], path)
    return state["step"]


def restore(optimizer: torch.optim.Optimizer, state: dict, path: Path) -> None:
    """Give AdamW the moments in `state`, its state_dict() in a checkpoint; ValueError if they do not fit.

    The options, such as weight decay, stay those of `optimizer`: they come from the flags of the run.
    """
    params, saved = [p for group in optimizer.param_groups for p in group["params"]], state.get("state")
    expected = {i: {"step": [], "exp_avg": list(p.shape), "exp_avg_sq": list(p.shape)}
                for i, p in enumerate(params)}
    shape = lambda t: list(t.shape) if unusable(t) is None and t.dtype == torch.float32 else None
    found = {i: {name: shape(t) for name, t in moments.items()} for i, moments in saved.items()
             if isinstance(moments, dict)} if isinstance(saved, dict) else None
    if found != expected:
        raise BadFile(f"{path}: the optimizer's state is not that of this model; {AGAIN}")
    optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
