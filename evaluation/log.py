"""The log and the checkpoints of a training run."""
import json
import sys
import time
from pathlib import Path

import cli

import torch

import weights
from adapters import trainable
from data import Steps
from lavin import LaVIN
from official.adapter_files import load_checkpoint, run_settings, write_checkpoint
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


class Record:
    """log.jsonl and checkpoint.pt of a run."""

    def __init__(self, cfg, dtype: torch.dtype, model: LaVIN, optimizer: torch.optim.Optimizer,
                 dataset: Steps, stop: int):
        """cfg: train.Config; stop: number of steps of the whole run. Only rank 0 writes."""
        self.cfg, self.theta_a, self.optimizer = cfg, trainable(model), optimizer
        self.dataset, self.stop, self.writes = dataset, stop, cli.is_main()
        self.file = Path(cfg.out) / "checkpoint.pt"
        self.settings = run_settings(cfg, dtype, weights.fingerprint(model), dataset.examples)

    def start(self) -> int:
        """With --resume, restore adapters and optimizer from checkpoint.pt. Return the steps done so far."""
        resume = self.cfg.resume
        first = load_checkpoint(self.file, self.theta_a, self.optimizer, self.settings) if resume else 0
        self.log = Log(self.file.with_name("log.jsonl"), self.stop, first) if self.writes else None
        return first

    def step(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Log step number `step`, with its loss and gradient norm; now and then write a checkpoint."""
        if not self.writes:
            return
        tokens = sum(self.dataset.lengths[i] for i in self.dataset.chosen(step))
        self.log.step(torch.stack([loss, norm]), tokens)
        done = step + 1
        to_save = done % self.cfg.save_every == 0 or done == self.stop
        if to_save or done % self.cfg.log_every == 0:
            losses = self.log.flush(done, self.optimizer.param_groups[0]["lr"], loss.device)
            stop_if_not_finite(losses, done, self.dataset)
        if to_save:
            adapters = {name: p.detach() for name, p in self.theta_a.items()}
            write_checkpoint(self.file, {"step": done, "run": self.settings, "adapters": adapters,
                                         "optimizer": self.optimizer.state_dict()})
