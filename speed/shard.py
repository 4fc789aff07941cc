"""Spread a frozen LLaMA over the GPUs of a run, when one GPU cannot hold it: what --shard does.

    Zhao et al. 2023, "PyTorch FSDP": https://arxiv.org/abs/2304.11277

Each rank keeps its share of every block's weights. When a block runs, forward or backward, the ranks gather
its weights from each other, and free them afterwards. Adapters, neck, embeddings and ViT stay whole on every
rank, and train.py sums the adapters' gradients as before. Every rank takes part in each gathering, so all
ranks must run the same number of forward passes: see Steps.
"""
from typing import Callable

import cli

import torch.nn as nn

import data
import weights
from speed import nf4


class Steps(data.Steps):
    """data.Steps, with the same number of micro-batches on all ranks. A rank that lacks some, because it has
    few samples, runs any sample without its targets: a forward and backward pass that adds 0 to the loss."""

    def __getitem__(self, step: int) -> tuple[list[data.Batch], int]:
        batches, n_targets = super().__getitem__(step)
        chosen = self.chosen(step)
        passes = max(map(len, data.split_batch(chosen, self.lengths, self.ranks, self.micro_batch)))
        for _ in range(passes - len(batches)):
            batch = data.collate([self.examples[chosen[0]]], self.image_size, self.normalize)
            batches.append(batch._replace(predict_at=batch.predict_at[:0], targets=batch.targets[:0]))
        return batches, n_targets


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
