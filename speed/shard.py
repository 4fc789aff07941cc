"""Spread a frozen LLaMA over the GPUs of a run, when one GPU cannot hold it: what --shard does.

    Zhao et al. 2023, "PyTorch FSDP": https://arxiv.org/abs/2304.11277

Each rank keeps its share of every block's weights. When a block runs, forward or backward, the ranks gather
its weights from each other, and free them afterwards. Adapters, neck, embeddings and ViT stay whole on every
rank, and train.py sums the adapters' gradients as before. Every rank takes part in each gathering, so all
ranks must run the same number of forward passes: data.split_batch takes care of that.
"""
from typing import Callable

import cli

import torch.nn as nn

import weights
from speed import nf4


def check(bits: int) -> None:
    """ValueError unless weights of so many bits can be sharded."""
    nf4.check(bits)
    if bits == 4:
        raise ValueError("--shard cannot spread matrices in 4 bits; leave out --shard or --bits")


def after_read(device: str, bits: int) -> Callable:
    """What --shard hands to `weights.load`: it shards a block once the block's last tensor has been read."""
    check(bits)
    ranks = cli.processes()[1]
    if ranks == 1:
        raise ValueError("--shard needs several processes; start with torchrun --nproc_per_node N")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # slow to import
    mesh = init_device_mesh(device, (ranks,))

    def spread(model: nn.Module, name: str) -> None:
        module = model.get_submodule(name)
        module.sketch = weights.sketch(module.weight)  # of the whole tensor: base and adapters match by it
        if name.startswith("layers."):
            block = model.layers[int(name.split(".")[1])]
            if not any(p.is_meta for p in block.parameters()):
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
                register_fsdp_forward_method(block, "route")  # it gathers the weights, too

    return spread
