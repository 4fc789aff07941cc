"""The step of one token, compiled: as hundreds of small operations, most of them take longer to call than to do.

On a CPU the step becomes one C++ program (torch.export and AOTInductor), each matrix a loop that reads it as fast as the
memory gives it; on a GPU a CUDA graph (torch.compile). Both are made from the one forward in llama.py.
"""
import tempfile
import warnings

import torch
import torch.nn as nn

from llama import KVCache, without_complex

OPTIONS = {
    "aot_inductor.package_constants_in_so": False,  # the weights stay where they are
    "realize_opcount_threshold": 8,  # a norm is worked out once, not again in every row of the matrix after it
}


class Step(nn.Module):
    """What is exported: LaVIN.step of one row, without routing weights. The weights are LLaMA's, all else is an argument."""

    def __init__(self, model):
        super().__init__()
        self.llama, self.step = model.llama, model.step

    def forward(self, token, position, *cache):
        cache = KVCache(*cache)  # a tuple, since export takes no class of ours
        return self.step(token, None, position, cache, filled=cache.slots.shape[0])


class Program:
    """LaVIN.step in C++ for one row of a folded model, whatever its length. Several rows are not compiled."""

    def __init__(self, model):
        self.model, self.weights, self.loaded = model, Step(model), None
        S, filled, layers = torch.export.Dim("S"), torch.export.Dim("filled"), model.llama.cfg.n_layers
        shapes = [{2: S}] * layers, [{2: S}] * layers, None, {0: filled}, {0: S}
        example = torch.tensor([1]), torch.tensor([15]), *self.in_use(self.cache(1, 32), 16)
        with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")  # torch's, about itself
            program = torch.export.export(self.weights, example, dynamic_shapes=(None, None, shapes))
            file = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/step.pt2",
                                                            inductor_configs=OPTIONS)
            self.run = torch._inductor.aoti_load_package(file)

    def cache(self, B: int, S: int) -> KVCache:
        return without_complex(self.model.cache(B, S))

    @staticmethod
    def in_use(cache: KVCache, filled: int) -> KVCache:
        return cache._replace(slots=cache.slots[:filled])

    def __call__(self, token, w, position, cache, filled):
        if len(token) > 1:
            return self.model.step(token, w, position, cache, filled)
        wqkv = self.model.llama.layers[0].attention.wqkv
        if self.loaded is not wqkv:  # the first step, or the first in another modality
            self.run.load_constants(dict(self.weights.named_parameters()), check_full_update=True, user_managed=True)
            self.loaded = wqkv
        return self.run(token, position, *self.in_use(cache, filled))


class Graph:
    """LaVIN.step as a CUDA graph. It is called with the very same tensors: caches are kept, and read as a whole."""

    def __init__(self, model):
        self.model, self.caches = model, {}
        self.step = torch.compile(model.step, mode="reduce-overhead", dynamic=False, fullgraph=True)

    def cache(self, B: int, S: int) -> KVCache:
        S = max(256, 1 << (S - 1).bit_length())  # a power of two, so that little is compiled, and the last one only
        if (B, S) not in self.caches:
            self.caches = {(B, S): without_complex(self.model.cache(B, S))}
            for x in self.caches[B, S].k + self.caches[B, S].v:
                torch._dynamo.mark_static_address(x)  # a CUDA graph writes to it in place
        return self.caches[B, S]

    def __call__(self, token, w, position, cache, filled):
        return self.step(token, w, position, cache)
