"""LLaMA's frozen matrices in 4 bits, so that a small GPU holds 7B or 13B: what --bits 4 does.

    Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs": https://arxiv.org/abs/2305.14314

The weights of a trained matrix look like samples of a normal distribution. So the 16 values that 4 bits can
name are quantiles of that distribution (NormalFloat, NF4): each of them stands for about as many weights.

1. 64 neighbouring weights form a block. Each weight is divided by the largest absolute value of its block
   (absmax), and the nearest of the 16 levels in [-1, 1] replaces it.
2. The absmax values get 8 bits each ("double quantisation"). 256 of them form a group and become
   low + step * code. The paper uses 8-bit floats instead.

A weight takes 4 + 8 / 64 + 64 / (64 * 256) = 4.129 bits. Its error is 9% of the weights' standard deviation.

A product decodes the whole matrix, and the backward pass decodes it again, because keeping decoded matrices
would cost the memory that was saved. Only frozen matrices can be stored like this: the update of a step is
far smaller than the distance of two levels. For the same reason, adapters cannot be folded into them.
"""
from functools import cache
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import weights
from speed.machine import keep_no_freed_tensor

BLOCK, GROUP = 64, 256  # weights per absmax; absmax values per low and step
BITS = 4 + 8 / BLOCK + 64 / (BLOCK * GROUP)
CHUNK = 2 ** 14  # blocks that are coded or decoded at a time: a million weights, a few MB of memory
MATRICES = {"wq", "wk", "wv", "wo", "w1", "w2", "w3"}  # of LLaMA's blocks; all other modules stay

# The levels: 7 quantiles below 0, then 0, and 8 above it. Probability 1 has an infinite quantile, so the
# outermost ones lie END before it: the mean of half a step of 1/16 and half a step of 1/15, which gives the
# table in the paper's appendix.
END = (1 / 32 + 1 / 30) / 2
BELOW = torch.special.ndtri(torch.linspace(END, 0.5, 8, dtype=torch.float64))  # ends with 0
ABOVE = torch.special.ndtri(torch.linspace(0.5, 1 - END, 9, dtype=torch.float64))  # begins with 0
LEVELS = (torch.cat([BELOW, ABOVE[1:]]) / ABOVE[-1]).float()  # [16], from -1 to 1


@cache
def pairs(device: torch.device) -> torch.Tensor:
    """[256]: the two levels of each byte of codes, as one int64, because that is gathered twice as fast."""
    byte = torch.arange(256)
    return torch.stack([LEVELS[byte // 16], LEVELS[byte % 16]], dim=1).view(torch.int64)[:, 0].to(device)


class Quantised(NamedTuple):
    codes: torch.Tensor  # uint8 [blocks, 32], two weights per byte; the last block is padded with zeros
    absmax: torch.Tensor  # uint8 [groups, 256]; the last group is padded with its last value
    low: torch.Tensor  # fp32 [groups, 1]
    step: torch.Tensor  # fp32 [groups, 1]

    def scales(self) -> torch.Tensor:
        """The absmax of each block as the codes have it, fp32 [blocks, 1]"""
        return (self.low + self.step * self.absmax).view(-1, 1)[: len(self.codes)]


def quantise(W: torch.Tensor) -> Quantised:
    blocks = F.pad(W.detach().flatten(), (0, -W.numel() % BLOCK)).view(-1, BLOCK)
    absmax = torch.linalg.vector_norm(blocks, float("inf"), dim=1).float()  # [blocks]
    groups = torch.cat([absmax, absmax[-1:].expand(-len(absmax) % GROUP)]).view(-1, GROUP)
    low, high = groups.aminmax(dim=1, keepdim=True)
    step = (high - low) / 255
    absmax = ((groups - low) / step).round().to(torch.uint8)  # 0 / 0: any code will do, it is multiplied by 0
    q = Quantised(blocks.new_empty(len(blocks), BLOCK // 2, dtype=torch.uint8), absmax, low, step)
    borders = ((LEVELS[1:] + LEVELS[:-1]) / 2).to(W.device)
    for out, x, scale in zip(*(t.split(CHUNK) for t in (q.codes, blocks, q.scales()))):
        code = torch.bucketize(x / scale, borders, out_int32=True)  # of the nearest level
        out.copy_(16 * code[:, ::2] + code[:, 1::2])
    return q


BUFFERS = {}  # {(device, dtype): memory that every matrix is decoded into}


def buffer(n: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Room for n numbers, the same each time: a matrix is used up before the next one is decoded."""
    shared = BUFFERS.get((device, dtype))
    if shared is None or len(shared) < n:
        with torch.inference_mode(False):  # or training could not write to it later
            shared = BUFFERS[device, dtype] = torch.empty(n, device=device, dtype=dtype)
    return shared[:n]


def dequantise(q: Quantised, shape: torch.Size, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix of this shape, in memory that the next call overwrites. Other memory: that of one chunk."""
    device = q.codes.device
    W = buffer(2 * q.codes.numel(), device, dtype).view(-1, BLOCK)
    for out, codes, scale in zip(*(t.split(CHUNK) for t in (W, q.codes, q.scales()))):
        index = buffer(codes.numel(), device, torch.int32).copy_(codes.flatten())
        decoded = torch.index_select(pairs(device), 0, index, out=buffer(len(index), device, torch.int64))
        out.copy_(decoded.view(torch.float32).view(-1, BLOCK).mul_(scale))
    return W.flatten()[: shape.numel()].view(shape)


class Product(torch.autograd.Function):
    """x W^T for a frozen W. Keeps neither x nor W: the gradient of x is dy W, with W decoded again."""

    @staticmethod
    def forward(x, layer):
        return F.linear(x, layer.decoded(x.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.layer.decoded(dy.dtype), None


class NF4Linear(nn.Module):
    """Replaces an nn.Linear that has no bias and whose weight W [out, in] is frozen."""

    def __init__(self, W: torch.Tensor):
        super().__init__()
        self.shape = W.shape
        self.sketch = weights.sketch(W)  # of the original: base and adapters are matched by it
        for name, x in quantise(W)._asdict().items():
            self.register_buffer(name, x)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantise(Quantised(self.codes, self.absmax, self.low, self.step), self.shape, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):  # as for nn.Linear: W is decoded in bf16
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return Product.apply(x, self)


def pack(model: nn.Module, name: str) -> None:
    """Replace the module of this name if it is one of MATRICES. `weights.load` calls it after each tensor."""
    if name.rpartition(".")[2] in MATRICES:
        model.set_submodule(name, NF4Linear(model.get_submodule(name).weight))


def check(bits: int) -> None:
    """ValueError for a number of bits that --bits does not know."""
    if bits not in (4, 16):
        raise ValueError(f"unknown --bits {bits}; known: 4, 16")


def after_read(bits: int) -> Callable | None:
    """What --bits hands to `weights.load`; None: keep the tensors as they are."""
    check(bits)
    if bits == 16:
        return None
    keep_no_freed_tensor()  # 4 bits are for saving memory, also a CPU's
    return pack
