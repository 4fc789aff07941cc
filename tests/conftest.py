"""Small random models, and a small world on disk, for every test. All in float32 on the CPU, offline."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are tiny, and two processes share two cores in places

import pytest
import torch

from adapters import AdapterConfig, trainable
from clip import CLIPConfig, VisionTransformer
from data import Batch, Example, Sample, collate
from lavin import LaVIN, LaVINConfig
from llama import LLaMA, LLaMAConfig

LLAMA = LLaMAConfig(dim=32, n_layers=3, n_heads=4, ffn_dim=48, vocab_size=61, norm_eps=1e-5, max_seq_len=64)
CLIP = CLIPConfig(image_size=16, patch_size=4, width=24, layers=4, heads=3, cls_every=2)
N_CLS = 2


def randomize(model: torch.nn.Module, std: float = 0.3) -> None:
    """no parameter at its initial value: zeros and ones hide mistakes"""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * std / max(1, p.shape[-1]) ** 0.5)


def make_lavin(seed: int = 0, trained: bool = True, **cfg) -> LaVIN:
    """a random LaVIN; `trained`: with adapters away from their start at the identity"""
    torch.manual_seed(seed)
    adapter = AdapterConfig(**{k: cfg.pop(k) for k in ("kind", "dim", "scale", "tau", "dropout") if k in cfg})
    llama, vit = LLaMA(LLAMA), VisionTransformer(CLIP)
    randomize(llama), randomize(vit)
    model = LaVIN(llama, vit, LaVINConfig(adapter, **cfg))
    if trained:
        with torch.no_grad():
            for p in trainable(model).values():
                p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def make_batch(rows: list[tuple[list[int], int, bool]], seed: int = 0, pack: bool = False) -> Batch:
    """rows of (ids after BOS, how many of them are response, has a picture); the picture's slots follow ids 1, 7"""
    examples = []
    for ids, n, picture in rows:
        ids = [1, 7] + [0] * N_CLS * picture + ids
        sample = Sample("", "", "", None, {})
        examples.append(Example(sample, ids, len(ids) - n, 2, 0))
    batch = collate(examples, CLIP.image_size, "clip", pack)
    starts = [0, *batch.lengths.cumsum(0)[:-1].tolist()] if pack else range(0, batch.tokens.numel(), batch.tokens.shape[1])
    slots = [at + 2 + k for at, (_, _, picture) in zip(starts, rows) for k in range(N_CLS * picture)]
    modality = torch.tensor([int(picture) for _, _, picture in rows])
    # each row's picture depends on its ids alone, so that a row can be compared with itself in another batch
    images = [torch.randn(3, CLIP.image_size, CLIP.image_size, generator=torch.Generator().manual_seed(seed + sum(ids)))
              for ids, _, picture in rows if picture]
    return batch._replace(slots=torch.tensor(slots, dtype=torch.long), images=torch.stack(images) if images else None, shows=torch.arange(len(images)),
                          modality=modality.repeat_interleave(batch.lengths)[None] if pack else modality[:, None])


ROWS = [([5, 9, 11, 3, 2], 2, True), ([8, 4, 6], 1, False), ([20, 31, 7, 12, 40, 41, 13, 2], 4, True),
        ([33, 2, 19, 18, 17, 2], 3, False)]


@pytest.fixture
def lavin():
    return make_lavin()


def close(a, b, tol: float = 1e-5) -> bool:
    """relative to the reference b, over the whole tensor"""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item() < tol
