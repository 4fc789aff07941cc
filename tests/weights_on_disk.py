"""Write weights in the layouts of Meta, OpenAI and the LaVIN authors, for the code under test to read."""
import json
import re
import shutil
import warnings
from pathlib import Path

import torch


def copy_folder(src: Path, dst: Path, without: str) -> Path:
    shutil.copytree(src, dst, ignore=shutil.ignore_patterns(without))
    return dst


def write_meta(folder: Path, model, shards: int = 1, **params) -> Path:
    """params.json and consolidated.NN.pth of a LLaMA.

    wq wk wv w1 w3 output are split by rows, wo w2 tok_embeddings by columns; every shard has whole norms.
    """
    folder.mkdir(parents=True)
    c = model.cfg
    (folder / "params.json").write_text(json.dumps({
        "dim": c.dim, "n_layers": c.n_layers, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads,
        "multiple_of": 16, "norm_eps": c.norm_eps,
        "vocab_size": -1, "rope_theta": c.rope_theta, "max_seq_len": c.max_seq_len, **params}))
    for i in range(shards):
        state = {"rope.freqs": torch.ones(c.dim // c.n_heads // 2)}
        for name, p in model.named_parameters():
            part = p.detach()
            if re.search(r"\.(wq|wk|wv|w1|w3)\.|^output\.", name):
                part = part.chunk(shards, 0)[i]
            elif re.search(r"\.(wo|w2)\.|^tok_embeddings\.", name):
                part = part.chunk(shards, 1)[i]
            state[name] = part.clone()
        torch.save(state, folder / f"consolidated.{i:02}.pth")
    return folder


class WithText(torch.nn.Module):
    """a ViT together with the other tensors of OpenAI's archive"""

    def __init__(self, vit):
        super().__init__()
        self.visual = vit
        self.visual.proj = torch.nn.Parameter(torch.randn(vit.cfg.width, 8))
        self.positional_embedding = torch.nn.Parameter(torch.randn(7, 8))
        self.token_embedding = torch.nn.Embedding(50, 8)
        self.ln_final = torch.nn.LayerNorm(8)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, images, tokens):
        text = self.ln_final(self.token_embedding(tokens) + self.positional_embedding).sum((0, 1))
        return self.logit_scale.exp() * (self.visual(images) @ self.visual.proj) @ text


def write_openai(file: Path, vit, half: bool = False) -> Path:
    """a TorchScript archive; OpenAI's are in fp16"""
    size = vit.cfg.image_size
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing fixes the batch size, but the archive is never run
        inputs = torch.zeros(1, 3, size, size), torch.zeros(1, 7, dtype=torch.long)
        model = torch.jit.trace(WithText(vit), inputs, check_trace=False)
    torch.jit.save(model.half() if half else model, file)
    del vit.proj
    return file


def released_state(lavin, prefix: str = "") -> dict[str, torch.Tensor]:
    """the adapters of a LaVIN under the names of the authors' files, where "conv" is a 1x1 convolution"""
    state = {"adapter_modality_embedding.weight": lavin.adapter_modality_embedding.weight}
    neck = lavin.adapter_proj
    blocks = [(f"layers.{i}", layer) for i, layer in enumerate(lavin.llama.layers)]
    blocks += [(f"backbone.visual.transformer.resblocks.{i}", block)
               for i, block in enumerate(lavin.vit.transformer.resblocks)]
    for leaf in ("weight", "bias"):
        state[f"adapter_proj.conv_A.{leaf}"] = getattr(neck.W_d, leaf)
        state[f"adapter_proj.conv_B.{leaf}"] = getattr(neck.W_u, leaf)
        for place, block in blocks:
            a = block.adapter_attn
            for name, part in (("conv_A", a.phi_d), ("conv_B", a.phi_u1), ("conv_D", a.phi_u2)):
                t = getattr(part, leaf)
                state[f"{place}.adapter_attn.{name}.{leaf}"] = t[:, :, None] if leaf == "weight" else t
            state[f"{place}.adapter_attn.expert_weights.{leaf}"] = getattr(a.f_w, leaf)
    return {prefix + name: t.detach().clone() for name, t in state.items()}
