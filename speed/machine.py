"""What this machine can do at best, and how close an answer came to it."""
import time
from typing import Callable

import torch

from lavin import LaVIN
from llama import LLaMA


def seconds(f: Callable, device: torch.device) -> float:
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - started


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product at its fastest: what there is to use, whatever the data sheet says"""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n ** 3 / min(seconds(lambda: a @ b, device) for _ in range(10))


def bandwidth(device: torch.device, tries: int = 10) -> tuple[float, float]:
    """bytes/s of a large copy (read and written), and of a sum (read only), each at its fastest.

    Decoding reads; but a sum is arithmetic too, so that on some machines a copy is the faster of the two. What there is
    to use is the better one.
    """
    a = torch.zeros(2 ** (26 if device.type == "cuda" else 25), device=device)  # no cache holds 256 or 128 MB
    b = torch.ones_like(a)
    return (2 * a.nbytes / min(seconds(lambda: a.copy_(b), device) for _ in range(tries)),
            b.nbytes / min(seconds(b.sum, device) for _ in range(tries)))


def bytes_per_token(llama: LLaMA, slots: float) -> float:
    """Bytes that a decoding step reads for one row: every weight but the embeddings, and the cache in use."""
    weights = sum(p.nbytes for n, p in llama.named_parameters() if not n.startswith("tok_embeddings"))
    return weights + 2 * slots * llama.cfg.n_layers * llama.cfg.dim * llama.norm.weight.itemsize


class Meter:
    """Times the tokens of one answer: `tick` after each, then `report`."""
    limits = {}  # bandwidth of each device, measured once: it takes a third of a second

    def __init__(self, model: LaVIN, prompt: int):
        self.model, self.prompt, self.started, self.marks = model, prompt, time.perf_counter(), []

    def tick(self) -> None:
        self.marks.append(time.perf_counter())

    def report(self) -> str:
        """Tokens per second; from the second token on also bytes per second, and their share of the bandwidth."""
        n, seconds = len(self.marks), time.perf_counter() - self.started
        text = f"{n} tokens in {seconds:.2f} s, {n / seconds:.3g} tokens/s"
        if n < 2:
            return text
        device = self.model.device
        if device not in self.limits:
            self.limits[device] = max(bandwidth(device, tries=3))
        step = (self.marks[-1] - self.marks[0]) / (n - 1)
        rate = bytes_per_token(self.model.llama, self.prompt + n / 2) / step
        return (f"{text}; after the first token {rate / 1e9:.2f} GB/s of weights and cache, "
                f"{rate / self.limits[device]:.0%} of the memory bandwidth")
