"""Models of LLaMA's family equal those of transformers, on small random weights of the real shape.

Every test takes the fields of a real config.json and makes the widths small. What makes the model another
model stays: heads per key/value head, tied embeddings, base and scaling of the rotary frequencies, epsilon.
"""
import dataclasses
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="needs transformers; see requirements-dev.txt")

from conftest import ROOT, close, hidden_of, one_line, randomize
from weights_on_disk import write_meta

import train
import weights
from clip import CLIPConfig, VisionTransformer
from data import Example, collate
from lavin import TEXT, LaVIN, LaVINConfig
from llama import LLaMA
from official import clip_layouts, tensorfiles
from official.rope import slowed
from official.tokenizer import Tokenizer
from speed.step import FoldedLaVIN

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
    "Llama-3.2-1B": dict(  # 2048 / 8192, 32 heads, 8 key/value heads, scaled from 8,192 tokens, here from 64
        hidden_size=128, intermediate_size=512, num_attention_heads=8, num_key_value_heads=2,
        rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=131072, tie_word_embeddings=True,
        rope_scaling=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                          original_max_position_embeddings=64)),
    "Mistral-7B-v0.1": dict(  # 4096 / 14336, 32 heads, 8 key/value heads, window of 4,096 tokens, here of 60
        hidden_size=64, intermediate_size=224, num_attention_heads=8, num_key_value_heads=2,
        rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=32768, sliding_window=60),
    "Vicuna-7B-v1.5, padded": dict(  # LLaMA-2, with more embeddings than the tokenizer has pieces
        hidden_size=64, intermediate_size=172, num_attention_heads=2, rms_norm_eps=1e-5, vocab_size=64,
        max_position_embeddings=4096),
}


def save_llama(folder, name: str, **changed):
    """a small random model of that shape, written by transformers"""
    torch.manual_seed(0)
    kind = "Mistral" if name.startswith("Mistral") else "Llama"
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **LLAMAS[name], **changed})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
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
    model = FoldedLaVIN(model, TEXT)
    assert model.generate(batch(prompts), 12, -1, temperature=0) == expected
    for ids, answer in zip(prompts, expected):  # a single row takes the fast step
        assert model.generate(batch([ids]), 12, -1, temperature=0) == [answer]


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
            assert torch.equal(model.output(hidden_of(model, tokens)), base.output(hidden_of(base, tokens)))
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"pieces")
    weights.convert(tmp_path / "hf", tmp_path / "again")
    assert torch.equal(hidden_of(LLaMA.from_pretrained(tmp_path / "again"), tokens), hidden_of(base, tokens))
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


@pytest.mark.parametrize("factor,D", [(32.0, 64), (8.0, 128)], ids=["Llama-3.2-1B", "Llama-3.1-8B"])
def test_scaled_frequencies_of_the_real_sizes(factor, D):
    scaling = dict(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192)
    config = transformers.LlamaConfig(
        hidden_size=32 * D, num_attention_heads=32, rope_theta=500000.0, max_position_embeddings=131072,
        rope_scaling={"rope_type": "llama3", **scaling})
    expected = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    freq = 500000.0 ** (-torch.arange(0, D, 2) / D)
    assert close(slowed(freq, scaling), expected, 1e-6) and not close(freq, expected, 1e-3)
    kept = (slowed(freq, scaling) / freq)
    assert kept[0] == 1 and kept[-1] == 1 / factor and len(set(kept.tolist())) > 4  # all three bands
    assert slowed(freq, None) is freq


def test_the_scaling_matters_within_the_tokens_tested(tmp_path):
    save_llama(tmp_path, "Llama-3.2-1B")
    model, tokens = LLaMA.from_pretrained(tmp_path), torch.randint(0, 61, (1, 50))
    scaled = hidden_of(model, tokens)
    model.cfg.rope_scaling = None
    assert not close(hidden_of(model, tokens), scaled, 1e-2)


def test_early_files_say_type_and_keep_theta_at_the_top(tmp_path):
    save_llama(tmp_path, "Llama-3.2-1B")
    expected = LLaMA.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    scaling["type"] = scaling.pop("rope_type")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert LLaMA.from_pretrained(tmp_path).cfg == expected.cfg


def test_a_mistral_reads_no_more_than_its_window(tmp_path):
    """Up to the window its attention is LLaMA's. A longer --max_len or prompt is refused."""
    save_llama(tmp_path, "Mistral-7B-v0.1", vocab_size=Tokenizer(ROOT / "tiny/llama").vocab_size)
    shutil.copyfile(ROOT / "tiny/llama/tokenizer.model", tmp_path / "tokenizer.model")
    llama = LLaMA.from_pretrained(tmp_path)
    assert llama.cfg.max_seq_len == 60
    model = LaVIN(llama, None, LaVINConfig(vision=False))
    long = collate([Example(None, [1], 0, [5] * 60, 0)], 0, "clip")
    assert "the prompt has 61 tokens; the context holds 60" in one_line(model.generate, long, 1, -1)
    cfg = train.Config(llama=str(tmp_path), vision=False, max_len=61)
    message = one_line(train.build, cfg, "cpu", torch.float32)
    assert "--max_len 61: more than the LLaMA's context of 60" in message


def test_embeddings_without_a_piece(tmp_path):
    """Some models round the number of embeddings up. The tokenizer has no text for such a token."""
    file = ROOT / "tiny/llama/tokenizer.model"
    n = Tokenizer(file).vocab_size
    tokenizer = Tokenizer(file, n + 64)
    assert tokenizer.decode([*tokenizer.encode("a b"), n + 4, n + 63]) == "a b"
    assert "".join(tokenizer.stream([*tokenizer.encode("a"), n + 63, *tokenizer.encode(" b")])) == \
        tokenizer.decode(tokenizer.encode("a") + tokenizer.encode(" b"))
    assert f"{n} pieces, but the LLaMA has {n + 1024} embeddings" in one_line(Tokenizer, file, n + 1024)


# ---------------------------------------------------------------------------------------------------
# tokenizer.json

def write_bpe(folder, bos="<|begin_of_text|>", eos="<|end_of_text|>"):
    """a byte-level BPE that splits text as LLaMA-3's does, with its special tokens"""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers; see requirements-dev.txt")
    split = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
             r"\s*[\r\n]+|\s+(?!\S)|\s+")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([TEXT_OF_ALL_KINDS, "Image: N/A The answer is"] * 9, trainer)
    bpe.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    bpe.post_processor = tokenizers.processors.TemplateProcessing(  # puts BOS in front, as LLaMA-3's does
        single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    bpe.enable_truncation(5)
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    names = {"bos_token": bos, "eos_token": {"content": eos}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


TEXT_OF_ALL_KINDS = "Image: The sun ☀ isn't 12345 hot,\n\n  naïve 世界 🙂🙃 - ok"


def test_tokenizer_json_gives_the_ids_of_transformers(tmp_path):
    folder = write_bpe(tmp_path / "llama")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder)
    n = tokenizer.vocab_size
    assert (tokenizer.bos, tokenizer.eos, n) == (n - 3, n - 2, len(reference))
    ids = tokenizer.encode(TEXT_OF_ALL_KINDS)
    assert len(ids) > 15 and ids == reference.encode(TEXT_OF_ALL_KINDS, add_special_tokens=False)
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == TEXT_OF_ALL_KINDS
    pieces = list(tokenizer.stream(ids))
    assert "".join(pieces) == TEXT_OF_ALL_KINDS and not any("\ufffd" in piece for piece in pieces)
    # what looks like a special token in a prompt is text, and cannot end the turn
    assert not {n - 3, n - 2, n - 1} & set(tokenizer.encode("a<|eot_id|>b")) and \
        tokenizer.decode(tokenizer.encode("a<|eot_id|>b")) == "a<|eot_id|>b"
    assert "is not valid UTF-8" in one_line(tokenizer.encode, "\ud800")


def test_converting_keeps_tokenizer_json_and_its_ids(tmp_path):
    save_llama(tmp_path / "hf", "Llama-3.2-1B")
    write_bpe(tmp_path / "hf")
    weights.convert(tmp_path / "hf", tmp_path / "again")
    old, new = Tokenizer(tmp_path / "hf"), Tokenizer(tmp_path / "again")
    assert (old.bos, old.eos, old.encode("Image: N/A")) == (new.bos, new.eos, new.encode("Image: N/A"))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (old.bos, old.eos)


def test_mistakes_with_tokenizer_json(tmp_path, monkeypatch):
    folder = write_bpe(tmp_path / "llama")
    n = Tokenizer(folder).vocab_size
    assert f"tokenizer.json: {n} pieces, but the LLaMA has 61 embeddings" in one_line(Tokenizer, folder, 61)
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "tokenizers", None)
        told = "tokenizer.json: the package tokenizers is missing; pip install tokenizers"
        assert told in one_line(Tokenizer, folder)
    names = folder / "tokenizer_config.json"
    names.write_text(json.dumps({"bos_token": None, "eos_token": "<|end_of_text|>"}))
    assert "config.json: bos_token is None, which tokenizer.json does not" in one_line(Tokenizer, folder)
    names.unlink()
    assert "tokenizer_config.json: no such file; download it" in one_line(Tokenizer, folder)
    write_bpe(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [3, {"id": "x"}]}))
    assert "bos_token is '<|begin_of_text|>', which" in one_line(Tokenizer, folder)
    tokens = [{"id": i, "content": name} for i, name in enumerate(["<|begin_of_text|>", "<|end_of_text|>"])]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    assert "tokenizer.json: not a tokenizer (" in one_line(Tokenizer, folder)
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # as Meta's of LLaMA-3
    assert "tokenizer.model: not a sentencepiece model; from LLaMA-3 on" in one_line(Tokenizer, folder)


# ---------------------------------------------------------------------------------------------------
# CLIP

VITS = {
    "openai/clip-vit-base-patch32": dict(image_size=64, patch_size=32),
    "openai/clip-vit-large-patch14-336": dict(image_size=84, patch_size=14),
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K": dict(image_size=42, patch_size=14, hidden_act="gelu"),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": dict(
        image_size=42, patch_size=14, hidden_act="gelu", hidden_size=160),
}


def save_vit(folder, name: str):
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, num_attention_heads=2, num_hidden_layers=4) | VITS[name]
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        intermediate_size=4 * sizes["hidden_size"], **sizes)).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", VITS)
def test_image_encoders(tmp_path, name):
    reference = save_vit(tmp_path / "hf", name)
    model = VisionTransformer.from_pretrained(tmp_path / "hf")
    size = model.cfg.image_size
    ours = torch.randn(2, 3, size, size).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    expected, cls = reference(theirs, output_hidden_states=True).hidden_states[-1][:, 0], model(ours)[:, -1]
    assert close(cls, expected)
    direction = torch.randn_like(cls)
    (expected * direction).sum().backward()
    (cls * direction).sum().backward()
    assert close(ours.grad, theirs.grad)
    weights.convert(tmp_path / "hf", tmp_path / "again")
    again = VisionTransformer.from_pretrained(tmp_path / "again")
    assert again.cfg == model.cfg and torch.equal(again(ours), model(ours))
    reread = transformers.CLIPVisionModel.from_pretrained(tmp_path / "again")
    assert torch.equal(reread(theirs).last_hidden_state, reference(theirs).last_hidden_state)


def test_the_section_of_a_full_clip_leaves_out_what_is_as_in_vit_b_32(tmp_path):
    """As in config.json of openai/clip-vit-base-patch32, whose vision_config names hardly anything."""
    config = {"model_type": "clip", "vision_config": {"dropout": 0.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    vit_b_32 = CLIPConfig(patch_size=32, width=768, layers=12, heads=12)
    with torch.device("meta"):
        state = VisionTransformer(vit_b_32).state_dict()
    tensors = {name: tensorfiles.Lazy(tuple(t.shape), t.dtype, lambda t=t: torch.zeros(t.shape))
               for name, t in state.items()}
    tensorfiles.write_safetensors(tmp_path / "model.safetensors",
                                  clip_layouts.to_hf(dataclasses.asdict(vit_b_32), tensors)[1])
    assert CLIPConfig(**weights.read_clip(tmp_path)[0]) == vit_b_32
