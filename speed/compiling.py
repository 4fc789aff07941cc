"""Compile `FastStep`, because most of its many small operations take longer to call than to run.

On a CPU the step becomes one C++ program (torch.export and AOTInductor), on a GPU a CUDA graph
(torch.compile). Both are made from `step.one_token`.
"""
import os
import shutil
import sys
import tempfile
import time
import warnings

import torch
import torch.nn as nn

from llama import KVCache, LLaMA
from speed.step import FastStep, FoldedLaVIN, Layer, Weights, one_token, rope_pairs

OPTIONS = {
    "aot_inductor.package_constants_in_so": False,  # the weights stay where they are
    "realize_opcount_threshold": 8,  # compute a norm once, not once per row of the next matrix
}


def compile_step(model: FoldedLaVIN) -> None:
    """Replace the model's step by the compiled one. ValueError without a C++ compiler."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ValueError("--compile: there is no C++ compiler here; install g++, or leave --compile out")
    started = time.time()
    kind = Program if model.device.type == "cpu" else Graph
    model.step = kind(model.llama, model.projections)
    print(f"compiled in {time.time() - started:.0f} s", file=sys.stderr)


class Exported(nn.Module):
    """`one_token` as a module, as torch.export needs it. The weights are its parameters."""

    def __init__(self, weights: Weights, H: int, eps: float):
        super().__init__()
        self.H, self.eps = H, eps
        # the model's own parameters, not new ones: torch.export must see that tied embeddings are one
        self.embeddings, self.norm, self.output = weights.embeddings, weights.norm, weights.output
        self.layers = nn.ModuleList(nn.Module() for _ in weights.layers)
        for module, layer in zip(self.layers, weights.layers):
            for name, x in layer._asdict().items():
                module.register_parameter(name, nn.Parameter(x, requires_grad=False))

    def forward(self, token, position, rope, keys, values, mask=None):
        layers = [Layer(*(getattr(layer, name) for name in Layer._fields)) for layer in self.layers]
        weights = Weights(self.embeddings, layers, self.norm, self.output)
        return one_token(weights, self.H, self.eps, token, position, rope, keys, values, mask)


class Program(FastStep):
    """One C++ program for every length and every modality."""

    def __init__(self, llama: LLaMA, projections: dict[int, list]):
        super().__init__(llama, projections)
        H, eps, L = self.cfg.n_heads, self.cfg.norm_eps, self.cfg.n_layers
        self.modules = {m: Exported(weights, H, eps) for m, weights in self.weights.items()}
        self.loaded, module = None, next(iter(self.modules.values()))
        cache = KVCache(self.cfg, [0], 32, dtype=llama.norm.weight.dtype)
        slots, filled = torch.export.Dim("slots"), torch.export.Dim("filled")
        example = torch.tensor([1]), torch.tensor([15]), self.rope[:16], cache.k, cache.v
        shapes = None, None, {0: filled}, [{2: slots}] * L, [{2: slots}] * L
        with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")  # torch's warnings about itself
            program = torch.export.export(module, example, dynamic_shapes=shapes)
            file = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/step.pt2",
                                                            inductor_configs=OPTIONS)
            self.program = torch._inductor.aoti_load_package(file)

    def __call__(self, modality: int, token: torch.Tensor, cache: KVCache) -> torch.Tensor:
        if self.loaded != modality:  # the first step, or a change of modality
            module = self.modules[modality]
            parameters = dict(module.named_parameters(remove_duplicate=False))
            wanted = self.program.get_constant_fqns()  # of tied embeddings, torch.export keeps one name
            parameters = {name: parameters[name] for name in wanted}
            self.program.load_constants(parameters, check_full_update=True, user_managed=True)
            self.loaded = modality
        return self.program(token, cache.advance(), self.rope[:cache.filled], cache.k, cache.v)


class Graph(FastStep):
    """A CUDA graph. It always reads and writes the same tensors, so each new cache is copied into them."""

    def __init__(self, llama: LLaMA, projections: dict[int, list]):
        super().__init__(llama, projections)
        H, eps = self.cfg.n_heads, self.cfg.norm_eps
        # the weights are parameters of a module; as arguments, they would be copied in every step
        self.compiled = {m: torch.compile(Exported(weights, H, eps), mode="reduce-overhead", dynamic=False,
                                          fullgraph=True) for m, weights in self.weights.items()}
        self.copied, self.slots = None, 0

    def keep(self, cache: KVCache) -> None:
        """Copy a new cache. Round its slots up to a power of two, so that few sizes are compiled."""
        slots = max(256, 1 << (cache.k[0].shape[2] - 1).bit_length())
        if slots != self.slots:
            c, self.slots, device = self.cfg, slots, self.device
            kept = KVCache(c, [0], slots, device, cache.k[0].dtype)
            self.keys, self.values = kept.k, kept.v
            self.rope = rope_pairs(slots, c, device)
            self.all_slots = torch.arange(slots, device=device)
            for x in (*self.keys, *self.values, self.rope):
                torch._dynamo.mark_static_address(x)  # the graph uses it in place
        for ours, new in zip((*self.keys, *self.values), (*cache.k, *cache.v)):
            ours[:, :, :cache.filled] = new[:, :, :cache.filled]
        self.copied = cache

    def __call__(self, modality: int, token: torch.Tensor, cache: KVCache) -> torch.Tensor:
        if self.copied is not cache:
            self.keep(cache)
        position = cache.advance()
        mask = (self.all_slots <= position)[None]  # read every slot, so that shapes never change
        return self.compiled[modality](token, position, self.rope, self.keys, self.values, mask)
