"""Write random weights of full size. They show whether 7B loads, how much memory it needs and how fast it is.

    python tests/make_random_7b.py random --tokenizer LLaMA/tokenizer.model
    python sample.py --llama random/llama --clip random/clip --adapters random/adapters.safetensors \\
        --dtype bf16 --image tiny/demo.png --prompt "What is this?" --max_new_tokens 8

Writes both models in Hugging Face's layout and bf16, one tensor in memory at a time, and random adapters.
"""
import argparse
import dataclasses
import shutil
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli

import torch

import adapters
import clip
import llama
import weights
from lavin import LaVIN, LaVINConfig
from official import clip_layouts, llama_layouts
from official.adapter_files import write_adapters
from official.tensorfiles import Lazy, Tensors, write_folder
from official.tokenizer import Tokenizer
from speed.shapes import LLAMAS, VITS


def random_tensor(seed: int, shape: torch.Size) -> torch.Tensor:
    """Scaled so that activations neither vanish nor explode; vectors are near one, like a norm's weight."""
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (t.mul_(shape[-1] ** -0.5) if len(shape) > 1 else t.mul_(0.01).add_(1)).to(torch.bfloat16)


def random_tensors(model: torch.nn.Module) -> Tensors:
    return {name: Lazy(tuple(p.shape), torch.bfloat16, partial(random_tensor, seed, p.shape))
            for seed, (name, p) in enumerate(model.named_parameters())}


def make(folder: Path, llm: str, vit: str, tokenizer: Path, shard: int) -> None:
    vocab_size = Tokenizer(tokenizer).vocab_size
    with torch.device("meta"):  # names and shapes only
        language = llama.LLaMA(dataclasses.replace(LLAMAS[llm], vocab_size=vocab_size))
        vision = clip.VisionTransformer(VITS[vit])
    towers = (language, llama_layouts.to_hf, "llama"), (vision, clip_layouts.to_hf, "clip")
    for model, to_hf, name in towers:
        config_and_tensors = to_hf(dataclasses.asdict(model.cfg), random_tensors(model))
        write_folder(folder / name, *config_and_tensors, limit=shard)
        print(weights.show(folder / name), end="\n\n")
    shutil.copyfile(tokenizer, folder / "llama" / "tokenizer.model")

    torch.manual_seed(0)
    model = LaVIN(language, vision, LaVINConfig())  # the adapters are real tensors; the base is on meta
    with torch.no_grad():
        for p in adapters.trainable(model).values():
            p.add_(torch.randn_like(p) * 0.01)
    write_adapters(folder / "adapters.safetensors", adapters.trainable(model), {
        "lavin": dataclasses.asdict(model.cfg), "llama": dataclasses.asdict(language.cfg), "base": None,
        "format": "QCM-ALE", "captions": False, "max_new_tokens": 64})


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True,
                        help="a tokenizer.model; it sets the vocabulary size")
    parser.add_argument("--llm", default="7B", help=f"one of {', '.join(LLAMAS)} (default: 7B)")
    parser.add_argument("--vit", default="ViT-L/14",
                        help=f"one of {', '.join(VITS)} (default: ViT-L/14)")
    parser.add_argument("--shard", type=int, default=5 * 10**9, help="bytes of a shard (default: 5 GB)")
    args = parser.parse_args()
    make(args.folder, args.llm, args.vit, args.tokenizer, args.shard)


if __name__ == "__main__":
    cli.run(main)
