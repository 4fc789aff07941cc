"""The log of a training run."""
import json
import sys
import time
from pathlib import Path

import torch

from data import Steps
from official.saving import append, named, write_atomically


def clock(seconds: float) -> str:
    """75 -> 1:15, 3700 -> 1:01:40"""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Log:
    """One line per interval, on stderr and in log.jsonl. Losses stay on the GPU until the interval ends."""

    def __init__(self, path: Path, total: int, first: int):
        """total: steps of the whole run; first: what a resumed run has done. ValueError if first > total."""
        if first > total:
            raise ValueError(f"--steps {total}: {path} belongs to a run that has done {first} steps; "
                             "give more --steps, or another --out")
        rows = path.read_bytes().splitlines(keepends=True) if path.is_file() and first else []
        try:
            rows = [row for row in rows if row.endswith(b"\n") and json.loads(row)["step"] <= first]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path}: a damaged line; delete it, or move the file away") from None
        write_atomically(path, b"".join(rows))  # steps after the checkpoint will be logged again
        with named(path):
            self.file = open(path, "ab", buffering=0)
        self.total, self.first, self.started = total, first, time.time()
        self.since, self.values, self.tokens = self.started, [], 0

    def step(self, values: torch.Tensor, tokens: int) -> None:
        """values [2]: the step's loss and its gradient norm"""
        self.values.append(values)
        self.tokens += tokens

    def flush(self, step: int, lr: float, device: torch.device) -> torch.Tensor:
        """Print the interval that ends with `step`; return its losses."""
        losses, norms = torch.stack(self.values).cpu().unbind(1)
        now = time.time()
        row = {"step": step, "loss": round(losses.mean().item(), 4), "lr": round(lr, 6),
               "grad_norm": round(norms[-1].item(), 4),
               "tokens_per_s": round(self.tokens / (now - self.since)),
               "eta": clock((now - self.started) / (step - self.first) * (self.total - step))}
        if device.type == "cuda":
            row["memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
        print(" | ".join([f"step {step}/{self.total}", *(f"{k} {v}" for k, v in row.items() if k != "step")]),
              file=sys.stderr)
        append(self.file, json.dumps(row) + "\n")
        self.since, self.values, self.tokens = now, [], 0
        return losses


def stop_if_not_finite(losses: torch.Tensor, last: int, dataset: Steps) -> None:
    """Stop if one of these losses, of the steps up to `last`, is NaN or infinite; name its samples."""
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        step = last - len(losses) + bad[0]
        ids = " ".join(dataset.examples[i].sample.id for i in dataset.chosen(step))
        raise ValueError(f"the loss of step {step} is not finite; its samples: {ids}. Nothing was saved "
                         "since the last checkpoint. Look at them, or start again with a lower --lr")
