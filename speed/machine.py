"""The limits of this machine, and how close an answer comes to them."""
import ctypes
import sys
import time
from typing import Callable, Iterator

import torch

from lavin import LaVIN
from llama import LLaMA


def seconds(f: Callable, device: torch.device) -> float:
    """How long f() takes. A GPU runs in the background, so wait for it before and after."""
    wait = torch.get_device_module(device).synchronize
    wait()
    started = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - started


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the fastest of ten. Data sheets promise more."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n ** 3 / min(seconds(lambda: a @ b, device) for _ in range(10))


def bandwidth(device: torch.device, tries: int = 10) -> tuple[float, float]:
    """Bytes/s of a large copy (reads and writes) and of a large sum (only reads), the fastest of `tries`.

    Decoding only reads, like the sum. But a sum also adds, and on some machines it is slower than a copy. The
    memory bandwidth is the better of the two.
    """
    n = 2 ** (26 if device.type == "cuda" else 25)  # 256 or 128 MB: no cache holds it
    a = torch.zeros(n, device=device)
    b = torch.ones_like(a)
    return (2 * a.nbytes / min(seconds(lambda: a.copy_(b), device) for _ in range(tries)),
            b.nbytes / min(seconds(b.sum, device) for _ in range(tries)))


def bytes_per_token(llama: LLaMA, slots: float) -> float:
    """Bytes that a decoding step reads for one row: all weights but the embeddings, and the cache in use.

    Of a matrix in 4 bits these are the codes, which are buffers. Its decoded copy, which is written and read
    again, is not counted.
    """
    named = llama.named_parameters(remove_duplicate=False)  # tied embeddings are read as the output matrix
    weights = sum(x.nbytes for n, x in [*named, *llama.named_buffers()] if not n.startswith("tok_embeddings"))
    c = llama.cfg
    return weights + 2 * slots * c.n_layers * c.n_kv_heads * c.dim // c.n_heads * llama.norm.weight.itemsize


class Meter:
    """Pass on the tokens of one answer, and keep the time of each for `report`."""
    limits = {}  # {type of a device: its bandwidth}; "mps" and "mps:0" are one device

    def __init__(self, model: LaVIN, prompt: int, steps: Iterator[list[int]]):
        """prompt: its length in tokens; steps: LaVIN.stream of a single prompt"""
        self.model, self.prompt, self.steps, self.started = model, prompt, steps, time.perf_counter()
        self.times = []

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            self.times.append(time.perf_counter())
            yield step

    @classmethod
    def prepare(cls, device: torch.device) -> None:
        """Measure the bandwidth. Takes 0.3 s and 0.27 GB, so do it before the model is loaded."""
        cls.limits[device.type] = max(bandwidth(device, tries=3))

    def report(self) -> str:
        """Tokens per second; for two tokens or more, also bytes per second and the share of the bandwidth."""
        n, seconds = len(self.times), time.perf_counter() - self.started
        text = f"{n} tokens in {seconds:.2f} s, {n / seconds:.3g} tokens/s"
        if n < 2:
            return text
        step = (self.times[-1] - self.times[0]) / (n - 1)
        rate = bytes_per_token(self.model.llama, self.prompt + n / 2) / step
        return (f"{text}; after the first token {rate / 1e9:.2f} GB/s of weights and cache, "
                f"{rate / self.limits[self.model.device.type]:.0%} of the memory bandwidth")


def glibc(function: str, *args: int) -> None:
    """Call a function of glibc, the C library of most Linux systems. Do nothing on others."""
    found = getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
    if found:
        found(*args)


def release_freed_memory() -> None:
    """Hand what is free back to the system. glibc keeps pieces that are too small for the next tensor."""
    glibc("malloc_trim", 0)


def keep_no_freed_tensor() -> None:
    """From now on, hand each tensor of 256 KB or more back when it is freed. Costs page faults, so time."""
    M_MMAP_THRESHOLD = -3
    glibc("mallopt", M_MMAP_THRESHOLD, 2 ** 18)
