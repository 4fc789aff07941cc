"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) in LLaMA's wq and wv, in place of the MM-Adapters.

W z becomes W z + (alpha / r) B A z, with A [r, C] random and B [C, r] zero at the start. W stays frozen. The
rest of LaVIN is as it was: neck, and MM-Adapters in the ViT. After training, B A is added to W.
"""
import importlib.util
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import RepAdapter
from lavin import LaVIN
from llama import LLaMA


class LoRALinear(nn.Module):
    def __init__(self, linear: nn.Linear, r: int, scale: float = 1.0):
        super().__init__()
        self.weight, self.scale = linear.weight, scale  # scale: alpha / r
        out, C = linear.weight.shape
        self.adapter_A = nn.Parameter(torch.empty(r, C))
        self.adapter_B = nn.Parameter(torch.zeros(out, r))
        nn.init.kaiming_uniform_(self.adapter_A, a=math.sqrt(5))  # as in the authors' code

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return F.linear(z, self.weight) + self.scale * F.linear(F.linear(z, self.adapter_A), self.adapter_B)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        out, C = self.weight.shape
        linear = nn.Linear(C, out, bias=False)
        linear.weight = nn.Parameter(self.weight + self.scale * self.adapter_B @ self.adapter_A, False)
        return linear


class LoRALaVIN(LaVIN):
    """LaVIN with LoRA of rank r in LLaMA. Needs a configuration of kind "rep", which has no router.

    alpha is r, so B A is not scaled, like f_a(z) at s = 1.
    """

    def __init__(self, llama, vit, cfg, r: int):
        super().__init__(llama, vit, cfg)
        for layer in llama.layers:
            layer.adapter_attn, a = None, layer.attention
            a.wq, a.wv = LoRALinear(a.wq, r), LoRALinear(a.wv, r)

    def merge(self) -> None:
        """Merge LoRA into wq and wv, for answering. RepAdapters that were never trained change nothing."""
        for layer in self.llama.layers:
            a = layer.attention
            a.wq, a.wv = a.wq.merged(), a.wv.merged()
            layer.adapter_attn = RepAdapter(self.llama.cfg.dim, self.cfg.adapter)


def count_of_peft(r: int, folder: str = "tiny/llama") -> int | None:
    """The number of parameters that PEFT's LoRA of rank r has in the LLaMA of a folder; None without PEFT."""
    if importlib.util.find_spec("peft") is None:
        return None
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=r, lora_alpha=r, target_modules=["wq", "wv"])
    llama = inject_adapter_in_model(config, LLaMA.from_pretrained(folder))
    return sum(p.numel() for name, p in llama.named_parameters() if "lora_" in name)
