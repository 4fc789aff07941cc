"""Load a trained LaVIN, and make it faster for answering, as the flags of sample.py say."""
import sys
import time
from typing import Callable

import cli

import torch

import lavin
from speed import nf4, shard
from speed.machine import Meter
from speed.step import folded


def after_read(cfg, device: torch.device) -> Callable | None:
    """What --shard or --bits 4 do to a module as soon as its weights are read; cfg: the flags of train.py"""
    return shard.after_read(device.type, cfg.bits) if cfg.shard else nf4.after_read(cfg.bits)


def load_model(cfg) -> tuple[lavin.LaVIN, dict]:
    """The model and the metadata of its adapter file. cfg: the flags of sample.py"""
    device, dtype = cli.pick_device(cfg.device, cfg.dtype)
    Meter.prepare(device)  # measures the memory's bandwidth, before the model fills the memory
    started = time.time()
    after_read = nf4.after_read(cfg.bits)  # a function that quantises, or None if --bits is 16
    model, meta = lavin.load(cfg.adapters, cfg.llama, cfg.clip, device, dtype, cfg.any_base, after_read)
    print(f"{cfg.llama} + {cfg.clip} + {cfg.adapters} on {device} in {str(dtype).removeprefix('torch.')}, "
          f"loaded in {time.time() - started:.1f} s", file=sys.stderr)
    return model, meta


def fold_adapters(model: lavin.LaVIN, cfg) -> lavin.LaVIN:
    """A model with the same answers: LLaMA's adapters are merged ("folded") into wq, wk and wv.

    adapters.fold shows how. It is possible because w is constant for a modality. A chat needs two copies,
    because an image may be shown later. FoldedLaVIN, a subclass of LaVIN in speed/step.py, holds them and
    overrides `pack` and `decode`. With --bits 4 nothing is folded: the adapters run as in training.
    """
    modalities = [lavin.IMAGE if cfg.image else lavin.TEXT]
    if cfg.chat:
        modalities = [lavin.TEXT, lavin.IMAGE] if model.vit else [lavin.TEXT]
    model = folded(model, *modalities)
    if cfg.compile:
        from speed.compiling import compile_step
        compile_step(model)
    return model
