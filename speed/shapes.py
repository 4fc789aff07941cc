"""Sizes of published models, by name: train.py --dry_run then predicts their memory without their files.

    python train.py --dry_run --recipe paper --llama TinyLlama-1.1B --clip ViT-L/14
"""
import clip
import llama
from clip import CLIPConfig
from llama import LLaMAConfig

SLOWED = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
LLAMA3 = dict(n_kv_heads=8, vocab_size=128256, norm_eps=1e-5, rope_theta=5e5, max_seq_len=131072)
SMOL = dict(vocab_size=49152, norm_eps=1e-5, max_seq_len=8192)

LLAMAS = {**llama.PRESETS,
    "30B": LLaMAConfig(6656, 60, 52, 17920),  # the paper of LLaMA calls it 33B
    "65B": LLaMAConfig(8192, 80, 64, 22016),
    "SmolLM2-135M": LLaMAConfig(576, 30, 9, 1536, n_kv_heads=3, rope_theta=1e5, **SMOL),
    "SmolLM2-360M": LLaMAConfig(960, 32, 15, 2560, n_kv_heads=5, rope_theta=1e5, **SMOL),
    "SmolLM2-1.7B": LLaMAConfig(2048, 24, 32, 8192, rope_theta=1.3e5, **SMOL),
    "TinyLlama-1.1B": LLaMAConfig(2048, 22, 32, 5632, n_kv_heads=4, norm_eps=1e-5),
    "Llama-3.2-1B": LLaMAConfig(2048, 16, 32, 8192, rope_scaling={"factor": 32.0, **SLOWED}, **LLAMA3),
    "Llama-3.2-3B": LLaMAConfig(3072, 28, 24, 8192, rope_scaling={"factor": 32.0, **SLOWED}, **LLAMA3),
    "Llama-3.1-8B": LLaMAConfig(4096, 32, 32, 14336, rope_scaling={"factor": 8.0, **SLOWED}, **LLAMA3),
    "Sheared-LLaMA-1.3B": LLaMAConfig(2048, 24, 16, 5504, norm_eps=1e-5, max_seq_len=4096),
    "Sheared-LLaMA-2.7B": LLaMAConfig(2560, 32, 20, 6912, norm_eps=1e-5, max_seq_len=4096),
    "OpenLLaMA-3B": LLaMAConfig(3200, 26, 32, 8640),
    "Mistral-7B-v0.1": LLaMAConfig(4096, 32, 32, 14336, n_kv_heads=8, norm_eps=1e-5, max_seq_len=4096),
}
TIED = {name for name in LLAMAS if name.startswith(("SmolLM2", "Llama-3.2"))}  # one matrix of embeddings

VITS = {**clip.PRESETS,
    "ViT-B/32": CLIPConfig(patch_size=32, width=768, layers=12, heads=12),
    "ViT-L/14@336": CLIPConfig(image_size=336),
    "ViT-H/14": CLIPConfig(width=1280, layers=32, activation="gelu"),
}
