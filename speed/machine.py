"""What this machine has and can do at its best: the ceilings that bench.py and sample.py put their own speed beside."""
import os
import shutil
import time
from typing import Callable

import torch


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


def need_compiler() -> None:
    """ValueError where torch.compile would fail half a page long"""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ValueError("--compile: there is no C++ compiler here; install g++, or leave --compile out")
