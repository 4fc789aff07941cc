"""Our models equal those of transformers, an independent implementation, on random weights.

transformers writes the weights. All tests use float32 and a relative tolerance of 1e-5; the same weights in
another layout must give the same bits.
"""
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="needs transformers; see requirements-dev.txt")

from conftest import close, hidden_of, randomize
from weights_on_disk import copy_folder, write_meta, write_openai

import weights
from clip import MEAN_STD, VisionTransformer, preprocess
from data import Example, collate
from lavin import LaVIN, LaVINConfig
from llama import LLaMA

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def save_llama(folder, eps: float = 1e-5, theta: float = 10000.0, **saving):
    """a random LLaMA of transformers, saved by it"""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=61,
        rms_norm_eps=eps, rope_theta=theta, max_position_embeddings=64)).eval()
    randomize(model, 1.0)
    model.save_pretrained(folder, **saving)
    return model


VITS = {  # two or three heads; each is 64 wide, as in OpenAI's models
    "L-like": dict(image_size=42, patch_size=14, hidden_size=128, num_attention_heads=2, num_hidden_layers=4),
    "B-like": dict(image_size=32, patch_size=16, hidden_size=192, num_attention_heads=3, num_hidden_layers=3),
}


def save_vit(folder, shape: str = "L-like"):
    torch.manual_seed(0)
    sizes = VITS[shape]
    config = transformers.CLIPVisionConfig(**sizes, intermediate_size=4 * sizes["hidden_size"])
    model = transformers.CLIPVisionModel(config).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


def states(blocks: torch.nn.ModuleList) -> list[torch.Tensor]:
    """a list that gets the output of every block when the model runs"""
    outputs = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    return outputs


# ---------------------------------------------------------------------------------------------------
# LLaMA

@pytest.mark.parametrize("eps,theta", [(1e-5, 10000.0), (1e-6, 100.0)])
def test_llama_logits_hidden_states_and_gradients(tmp_path, eps, theta):
    reference = save_llama(tmp_path, eps, theta)
    model = LLaMA.from_pretrained(tmp_path)
    assert (model.cfg.norm_eps, model.cfg.rope_theta) == (eps, theta)
    tokens = torch.randint(0, 61, (2, 11))
    theirs = reference.model.embed_tokens(tokens).detach().requires_grad_()
    ours = model.tok_embeddings(tokens).detach().requires_grad_()
    assert torch.equal(ours, theirs)

    expected = reference(inputs_embeds=theirs, output_hidden_states=True)
    hidden = states(model.layers)
    last = model(ours)
    logits = model.output(last)
    assert close(logits, expected.logits)
    assert close(last, expected.hidden_states[-1])
    for i in range(2):  # transformers returns the last block's state only after the norm
        assert close(hidden[i], expected.hidden_states[i + 1]), f"block {i}"
    direction = torch.randn_like(logits)
    (expected.logits * direction).sum().backward()
    (logits * direction).sum().backward()
    assert close(ours.grad, theirs.grad)


def test_every_llama_layout_gives_the_same_bits(tmp_path):
    reference = save_llama(tmp_path / "single")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    state = reference.state_dict()
    bin_folder = copy_folder(tmp_path / "single", tmp_path / "bin", without="model.safetensors")
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save(state | inv_freq, bin_folder / "pytorch_model.bin")
    bins = copy_folder(tmp_path / "single", tmp_path / "bins", without="model.safetensors")
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in files if files[name] == file}, bins / file)
    (bins / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))

    base = LLaMA.from_pretrained(tmp_path / "single")
    for n in (1, 2, 4):
        write_meta(tmp_path / f"meta{n}", base, n)
    for layout in ("shards", "meta2"):
        (tmp_path / layout / "tokenizer.model").write_bytes(b"pieces")
        weights.convert(tmp_path / layout, tmp_path / f"converted {layout}")
    tokens = torch.randint(0, 61, (2, 11))
    expected = base.output(hidden_of(base, tokens))
    for layout in ("shards", "bin", "bins", "meta1", "meta2", "meta4", "converted shards", "converted meta2"):
        model = LLaMA.from_pretrained(tmp_path / layout)
        assert torch.equal(model.output(hidden_of(model, tokens)), expected), layout
    # transformers reads the files that we write
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "converted meta2")
    assert torch.equal(again(tokens).logits, reference(tokens).logits)


def greedy(model: LLaMA, prompts: list[list[int]], n: int, eos: int) -> list[list[int]]:
    """our greedy answers; the untrained adapters are the identity"""
    lavin = LaVIN(model, None, LaVINConfig(vision=False)).eval()
    batch = collate([Example(None, ids[:1], 0, ids[1:], len(ids) - 1) for ids in prompts], 0, "clip")
    return lavin.generate(batch, n, eos, temperature=0)


def generate(reference, prompts: list[list[int]], n: int, eos: int) -> list[list[int]]:
    """transformers' greedy answers; it pads prompts on the left, and finished rows on the right"""
    T = max(map(len, prompts))
    tokens = torch.tensor([[0] * (T - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in prompts])
    out = reference.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=n, eos_token_id=eos,
                             pad_token_id=0)[:, T:].tolist()
    return [row[:row.index(eos)] if eos in row else row for row in out]


def test_greedy_generation_token_for_token(tmp_path):
    reference = save_llama(tmp_path)
    model = LLaMA.from_pretrained(tmp_path)
    prompts = [[1, 9, 20], [1, 5, 6, 7, 8, 40, 41], [1], [1, 33, 34, 35, 36]]
    free = generate(reference, prompts, 24, eos=60)
    eos = free[1][5]  # with this EOS, rows end at different lengths
    expected = generate(reference, prompts, 24, eos)
    assert len({len(row) for row in expected}) > 1 and len({token for row in expected for token in row}) > 8
    assert greedy(model, prompts, 24, eos) == expected
    for prompt, row in zip(prompts, expected):
        assert greedy(model, [prompt], 24, eos) == [row]


# ---------------------------------------------------------------------------------------------------
# CLIP

def test_clip_hidden_states_and_every_cls(tmp_path):
    for shape in VITS:
        reference = save_vit(tmp_path / shape, shape)
        model = VisionTransformer.from_pretrained(tmp_path / shape)
        model.cfg.cls_every = 1
        images = torch.randn(2, 3, model.cfg.image_size, model.cfg.image_size)
        ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
        expected = reference(theirs, output_hidden_states=True).hidden_states[1:]  # without block 0's input
        hidden = states(model.transformer.resblocks)
        cls = model(ours)
        assert len(hidden) == len(expected) == model.n_visual
        for i, state in enumerate(expected):
            assert close(hidden[i], state), f"{shape}, block {i}"
            assert close(cls[:, i], state[:, 0])
        direction = torch.randn_like(cls)
        (torch.stack([state[:, 0] for state in expected], 1) * direction).sum().backward()
        (cls * direction).sum().backward()
        assert close(ours.grad, theirs.grad)


def test_every_clip_layout_gives_the_same_bits(tmp_path):
    reference = save_vit(tmp_path / "alone")
    state = load_file(tmp_path / "alone" / "model.safetensors")
    assert not any(name.startswith("vision_model.") for name in state)
    prefixed = copy_folder(tmp_path / "alone", tmp_path / "prefixed", without="model.safetensors")
    position_ids = {"vision_model.embeddings.position_ids": torch.arange(10)[None]}
    save_file({f"vision_model.{name}": t for name, t in state.items()} | position_ids,
              prefixed / "model.safetensors")
    bin_folder = copy_folder(tmp_path / "alone", tmp_path / "bin", without="model.safetensors")
    torch.save(state, bin_folder / "pytorch_model.bin")
    text = transformers.CLIPTextConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=1,
                                       num_attention_heads=2, vocab_size=50, bos_token_id=1, eos_token_id=2)
    full = transformers.CLIPModel(transformers.CLIPConfig(vision_config=reference.config.to_dict(),
                                                          text_config=text.to_dict()))
    full.vision_model.load_state_dict(state)
    full.save_pretrained(tmp_path / "full")
    assert any(name.startswith("text_model.") for name in load_file(tmp_path / "full" / "model.safetensors"))

    base = VisionTransformer.from_pretrained(tmp_path / "alone")
    (tmp_path / "openai").mkdir()
    write_openai(tmp_path / "openai" / "ViT-L-14.pt", base)
    weights.convert(tmp_path / "openai" / "ViT-L-14.pt", tmp_path / "converted")
    images = torch.randn(2, 3, 42, 42)
    for layout in ("prefixed", "bin", "full", "openai", "openai/ViT-L-14.pt", "converted"):
        model = VisionTransformer.from_pretrained(tmp_path / layout)
        assert dataclasses.asdict(model.cfg) == dataclasses.asdict(base.cfg), layout
        assert torch.equal(model(images), base(images)), layout
    again = transformers.CLIPVisionModel.from_pretrained(tmp_path / "converted")
    assert torch.equal(again(images).last_hidden_state, reference(images).last_hidden_state)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("normalize", MEAN_STD)
@pytest.mark.parametrize("size", [(50, 50), (31, 70), (300, 200)])
def test_preprocessing(size, normalize):
    """Ours resizes to a square and normalises. CLIP's own resizes the shortest edge and crops."""
    image, (mean, std) = picture(*size), MEAN_STD[normalize]
    ours = preprocess(image, 42, normalize)
    pixels = np.array(image.resize((42, 42), Image.BICUBIC)).astype(np.float64) / 255
    assert close(ours, ((pixels - np.array(mean)) / np.array(std)).transpose(2, 0, 1))
    common = dict(image_mean=mean, image_std=std, return_tensors="pt")
    processor = transformers.CLIPImageProcessorPil()
    squared = processor(image, size={"height": 42, "width": 42}, do_center_crop=False, **common)
    assert close(ours, squared.pixel_values[0])
    if size[0] == size[1]:  # for a square picture the two are the same
        clips = processor(image, size={"shortest_edge": 42}, crop_size=42, **common).pixel_values[0]
        assert close(ours, clips)
