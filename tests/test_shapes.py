"""Models of LLaMA's family equal those of transformers, on small random weights of the real shape.

Every test takes the fields of a real config.json and makes the widths small. What makes the model another
model stays: heads per key/value head, tied embeddings, base and scaling of the rotary frequencies, epsilon.
"""
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="needs transformers; see requirements-dev.txt")

from conftest import close, randomize
from weights_on_disk import write_meta

import weights
from data import Example, collate
from lavin import TEXT, LaVIN, LaVINConfig
from llama import LLaMA
from speed.step import FastStep

SMALL = dict(num_hidden_layers=2, vocab_size=61, initializer_range=0.2)
LLAMAS = {
    "TinyLlama-1.1B": dict(  # 2048 / 5632, 32 heads, 4 key/value heads
        hidden_size=64, intermediate_size=176, num_attention_heads=16, num_key_value_heads=2,
        rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=2048),
    "SmolLM2-135M": dict(  # 576 / 1536, 9 heads, 3 key/value heads
        hidden_size=72, intermediate_size=192, num_attention_heads=9, num_key_value_heads=3,
        rms_norm_eps=1e-5, rope_theta=100000.0, max_position_embeddings=8192, tie_word_embeddings=True),
    "OpenLLaMA-3B": dict(  # 3200 / 8640, 32 heads of 100
        hidden_size=60, intermediate_size=160, num_attention_heads=3, rms_norm_eps=1e-6,
        max_position_embeddings=2048),
}


def save_llama(folder, name: str):
    """a small random model of that shape, written by transformers"""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **LLAMAS[name]})).eval()
    randomize(model, 1.0)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", LLAMAS)
def test_logits_and_gradients(tmp_path, name):
    reference = save_llama(tmp_path, name)
    model = LLaMA.from_pretrained(tmp_path)
    tied = LLAMAS[name].get("tie_word_embeddings", False)
    assert (model.output.weight is model.tok_embeddings.weight) == tied
    tokens = torch.randint(0, 61, (2, 50))
    theirs = reference.model.embed_tokens(tokens).detach().requires_grad_()
    ours = model.tok_embeddings(tokens).detach().requires_grad_()
    expected, logits = reference(inputs_embeds=theirs).logits, model.output(model(ours))
    assert close(logits, expected)
    direction = torch.randn_like(logits)
    (expected * direction).sum().backward()
    (logits * direction).sum().backward()
    assert close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", LLAMAS)
def test_greedy_answers_of_every_path(tmp_path, name):
    """The cache, the folded projections and the fast step are right for this shape, too."""
    reference = save_llama(tmp_path, name)
    prompts = [[1, 9, 20, 31], [1, 5, 6, 7, 8, 40, 41], [1, 33]]
    expected = []
    for ids in prompts:
        out = reference.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, eos_token_id=None,
                                 pad_token_id=0)
        expected.append(out[0, len(ids):].tolist())
    model = LaVIN(LLaMA.from_pretrained(tmp_path), None, LaVINConfig(vision=False)).eval()
    batch = lambda rows: collate([Example(None, row[:1], 0, row[1:], 0) for row in rows], 0, "clip")
    assert model.generate(batch(prompts), 12, -1, temperature=0) == expected
    model.fold(TEXT)
    fast = FastStep(model)
    for ids, answer in zip(prompts, expected):
        assert model.generate(batch([ids]), 12, -1, temperature=0) == [answer]
        assert model.generate(batch([ids]), 12, -1, temperature=0, fast_decode=fast) == [answer]


@pytest.mark.parametrize("name", LLAMAS)
def test_every_layout_gives_the_same_bits(tmp_path, name):
    reference = save_llama(tmp_path / "hf", name)
    base = LLaMA.from_pretrained(tmp_path / "hf")
    tokens = torch.randint(0, 61, (2, 11))
    if name == "TinyLlama-1.1B":  # Meta's layout: no tied embeddings, and every shard has whole heads
        for n in (1, 2):
            write_meta(tmp_path / f"meta{n}", base, n)
            model = LLaMA.from_pretrained(tmp_path / f"meta{n}")
            assert dataclasses.asdict(model.cfg) == dataclasses.asdict(base.cfg)
            assert torch.equal(model.output(model(tokens)), base.output(base(tokens)))
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"pieces")
    weights.convert(tmp_path / "hf", tmp_path / "again")
    assert torch.equal(LLaMA.from_pretrained(tmp_path / "again")(tokens), base(tokens))
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(tokens).logits, reference(tokens).logits)


def test_tied_embeddings_are_stored_once(tmp_path):
    save_llama(tmp_path, "SmolLM2-135M")
    file, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    model = LLaMA.from_pretrained(tmp_path)
    numbers = sum(t.numel() for t in tensors.values())
    assert sum(p.numel() for p in model.parameters()) == numbers
    assert f"{numbers:,} in {len(tensors)} tensors" in weights.show(tmp_path)
    # a file that holds the matrix twice, and a config.json that does not say whether it is tied
    save_file(tensors | {"lm_head.weight": torch.zeros(61, 72)}, file)  # transformers ignores it, too
    assert torch.equal(LLaMA.from_pretrained(tmp_path).output.weight, model.output.weight)
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not LLaMA.from_pretrained(tmp_path).output.weight.any()
    save_file(tensors, file)
    assert torch.equal(LLaMA.from_pretrained(tmp_path).output.weight, model.output.weight)
