"""What several test files share: small random models in float32, batches for them, and helpers."""
import os
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are tiny, and some tests start two processes

import cli

import pytest
import torch

import prompts
from adapters import AdapterConfig, trainable
from clip import CLIPConfig, VisionTransformer
from data import Batch, Example, MaskSampler, Sample, collate
from evaluation import scores
from lavin import LaVIN, LaVINConfig
from llama import LLaMA, LLaMAConfig


def offline(event: str, args: tuple) -> None:
    """Refuse every connection and every look-up that leaves this machine."""
    host = {"socket.connect": lambda: args[1], "socket.getaddrinfo": lambda: args}.get(event, tuple)()
    if isinstance(host, tuple) and host and host[0] not in ("127.0.0.1", "::1", "localhost", None):
        raise PermissionError(f"{event} {host}: the tests run offline")


sys.addaudithook(offline)
LLAMA = LLaMAConfig(dim=32, n_layers=3, n_heads=4, ffn_dim=48, vocab_size=61, norm_eps=1e-5, max_seq_len=64)
CLIP = CLIPConfig(image_size=16, patch_size=4, width=24, layers=4, heads=3, cls_every=2)
N_CLS = 2
REAL = ROOT.parent / "shared/data"  # real ScienceQA problems and LLaMA's tokenizer, if available


def randomize(model: torch.nn.Module, std: float = 0.3) -> None:
    """move every parameter away from its initial value, because zeros and ones hide mistakes"""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * std / max(1, p.shape[-1]) ** 0.5)


GROUPED = replace(LLAMA, n_kv_heads=2)


def make_lavin(seed: int = 0, trained: bool = True, base: LLaMAConfig = LLAMA, tied: bool = False,
               **cfg) -> LaVIN:
    """a random LaVIN; `trained`: its adapters are not the identity; `tied`: one matrix of embeddings"""
    torch.manual_seed(seed)
    adapter = AdapterConfig(**{k: cfg.pop(k) for k in ("kind", "dim", "scale", "tau", "dropout") if k in cfg})
    llama, vit = LLaMA(base), VisionTransformer(CLIP)
    randomize(llama), randomize(vit)
    if tied:
        llama.output.weight = llama.tok_embeddings.weight
    model = LaVIN(llama, vit, LaVINConfig(adapter, **cfg))
    if trained:
        with torch.no_grad():
            for p in trainable(model).values():
                p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


HEAD = [1, 7]  # in place of [BOS] "Image: "


def make_batch(rows: list[tuple[list[int], int, bool]], seed: int = 0) -> Batch:
    """rows of (ids after the head, how many of them are response, whether there is an image)"""
    examples = [Example(Sample("", "", "", None, {}), HEAD, N_CLS * image, ids, len(ids) - n)
                for ids, n, image in rows]
    # each row's image depends only on its ids, so that a row can be compared with itself in another batch
    seeds = [seed + sum(ids) for ids, _, image in rows if image]
    images = [torch.randn(3, CLIP.image_size, CLIP.image_size, generator=torch.Generator().manual_seed(s))
              for s in seeds]
    batch = collate(examples, CLIP.image_size, "clip", image_embeds=torch.zeros(0))
    batch = batch._replace(image_embeds=None)
    if not images:
        return batch
    return batch._replace(images=torch.stack(images))


def with_masks(batch: Batch, rows, seeds, p: float = 0.5) -> Batch:
    """a batch of make_batch(rows) with dropout masks"""
    examples = [Example(None, HEAD, N_CLS * image, ids, 0) for ids, _, image in rows]
    dropout = MaskSampler(p, 8, LLAMA.n_layers, CLIP.layers, 1 + (CLIP.image_size // CLIP.patch_size) ** 2)
    return dropout.add(batch, examples, [[seed] for seed in seeds])


def masks(rows, seeds, p: float = 0.5) -> dict[str, torch.Tensor]:
    """the dropout masks for rows of make_batch"""
    batch = with_masks(make_batch(rows), rows, seeds, p)
    return dict(llama_dropout_mask=batch.llama_dropout_mask, vit_dropout_mask=batch.vit_dropout_mask)


def ids_of(row) -> list[int]:
    """a row's tokens, with zeros in the image slot"""
    return HEAD + [0] * N_CLS * row[2] + row[0]


def all_logits(model: LaVIN, batch: Batch) -> list[torch.Tensor]:
    """logits [T, V] of every position of every row, from one packed forward"""
    everywhere = batch._replace(predict_at=torch.arange(sum(batch.lengths)))
    return list(model.llama.output(model.hidden(everywhere)).split(batch.lengths))


ROWS = [([5, 9, 11, 3, 2], 2, True), ([8, 4, 6], 1, False), ([20, 31, 7, 12, 40, 41, 13, 2], 4, True),
        ([33, 2, 19, 18, 17, 2], 3, False)]


@pytest.fixture
def lavin():
    return make_lavin()


def close(a, b, tol: float = 1e-5) -> bool:
    """whether the norm of a - b is below tol times the norm of the reference b"""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item() < tol


TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def real_problems() -> list[Sample]:
    """the real ScienceQA problems, of all splits"""
    splits = "train", "val", "test"
    return [s for split in splits for s in prompts.read_scienceqa(REAL / "scienceqa", split)]


def run_main(monkeypatch, main, *argv) -> None:
    """run a command in this process"""
    monkeypatch.setattr(sys, "argv", ["command.py", *map(str, argv)])
    cli.run(main)


def one_line(call, *args, **kw) -> str:
    """the message of the error that `call` raises; it must be a single line"""
    with pytest.raises((ValueError, OSError)) as e:
        call(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


def needs_caption_tools() -> None:
    """skip the test unless the COCO caption library and Java are installed"""
    pytest.importorskip("pycocoevalcap", reason="the COCO caption library is not installed")
    try:
        scores.caption_tools()
    except ValueError as e:
        pytest.skip(str(e))


def hidden_of(llama, ids, w=None) -> torch.Tensor:
    """LLaMA's hidden states for token ids [B, T], each row a sequence."""
    return llama(llama.tok_embeddings(ids), w)
