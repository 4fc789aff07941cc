"""Random weights of full size, where official ones are not at hand: does 7B load, how much memory, how fast.

    python tests/make_random_7b.py /tmp/random --tokenizer LLaMA/tokenizer.model
    python sample.py --llama /tmp/random/llama --clip /tmp/random/clip --adapters /tmp/random/adapters.safetensors \\
        --dtype bf16 --image tiny/demo.png --prompt "What is this?" --max_new_tokens 8

Writes both models in Hugging Face's layout in bf16, one tensor in memory at a time, and untrained-but-random adapters.
"""
import argparse
import dataclasses
import shutil
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import adapters
import cli
import clip
import llama
import weights
from lavin import LaVIN, LaVINConfig
from official import clip_layouts, llama_layouts
from official.adapter_files import write_adapters
from official.tensorfiles import Lazy, Tensors, write_folder
from official.tokenizer import Tokenizer


def random_tensor(seed: int, shape: torch.Size) -> torch.Tensor:
    """scaled so that activations neither vanish nor explode; vectors near one, as a norm's weight"""
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (t.mul_(shape[-1] ** -0.5) if len(shape) > 1 else t.mul_(0.01).add_(1)).to(torch.bfloat16)


def random_tensors(model: torch.nn.Module) -> Tensors:
    return {name: Lazy(tuple(p.shape), torch.bfloat16, partial(random_tensor, seed, p.shape))
            for seed, (name, p) in enumerate(model.named_parameters())}


def make(folder: Path, llm: str, vit: str, tokenizer: Path, shard: int) -> None:
    vocab_size = Tokenizer(tokenizer).vocab_size
    with torch.device("meta"):  # names and shapes only
        language = llama.LLaMA(dataclasses.replace(llama.PRESETS[llm], vocab_size=vocab_size))
        vision = clip.VisionTransformer(clip.PRESETS[vit])
    for model, to_hf, name in ((language, llama_layouts.to_hf, "llama"), (vision, clip_layouts.to_hf, "clip")):
        write_folder(folder / name, *to_hf(dataclasses.asdict(model.cfg), random_tensors(model)), limit=shard)
        print(weights.show(folder / name), end="\n\n")
    shutil.copyfile(tokenizer, folder / "llama" / "tokenizer.model")

    torch.manual_seed(0)
    model = LaVIN(language, vision, LaVINConfig())  # adapters are real, the base under them is not
    with torch.no_grad():
        for p in adapters.trainable(model).values():
            p.add_(torch.randn_like(p) * 0.01)
    write_adapters(folder / "adapters.safetensors", adapters.trainable(model), {
        "lavin": dataclasses.asdict(model.cfg), "llama": dataclasses.asdict(language.cfg), "base": None,
        "format": "QCM-ALE", "captions": False, "max_new_tokens": 64})


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.model; its size is the vocabulary")
    parser.add_argument("--llm", default="7B", help=f"one of {', '.join(llama.PRESETS)} (default: 7B)")
    parser.add_argument("--vit", default="ViT-L/14", help=f"one of {', '.join(clip.PRESETS)} (default: ViT-L/14)")
    parser.add_argument("--shard", type=int, default=5 * 10**9, help="bytes of a shard (default: 5 GB)")
    args = parser.parse_args()
    make(args.folder, args.llm, args.vit, args.tokenizer, args.shard)


if __name__ == "__main__":
    cli.run(main)
