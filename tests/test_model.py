"""Properties of the model for any weights: counts, identity at initialisation, caching, independent rows."""
import copy
import shutil
from dataclasses import replace
from functools import partial
from unittest.mock import patch
from weakref import WeakSet

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CLIP,
    GROUPED,
    LLAMA,
    ROWS,
    all_logits,
    close,
    hidden_of,
    make_batch,
    make_lavin,
    masks,
    randomize,
)
from torch.utils._python_dispatch import TorchDispatchMode

import clip
import llama
import weights
from adapters import AdapterConfig, trainable
from clip import VisionTransformer
from lavin import LaVIN, LaVINConfig, negative_log_likelihood
from llama import LLaMA
from official import adapter_files
from speed import chunked_loss, compiling, step
from speed.step import FoldedLaVIN


class Dtypes(TorchDispatchMode):
    """Collects the dtype of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.seen.add(x.dtype)
        return result


def count(size: str, encoder: str, **cfg) -> dict[str, int]:
    with torch.device("meta"):
        cfg = LaVINConfig(AdapterConfig(cfg.pop("kind", "mm")), **cfg)
        model = LaVIN(LLaMA(llama.PRESETS[size]), VisionTransformer(clip.PRESETS[encoder]), cfg)
    counts = {}
    for name, p in trainable(model).items():
        counts[name.split(".")[0]] = counts.get(name.split(".")[0], 0) + p.numel()
    counts["total"] = sum(counts.values())
    counts["decayed"] = sum(p.numel() for p in trainable(model).values() if p.ndim >= 2)
    return counts


def test_parameter_counts_of_the_paper():
    assert count("7B", "ViT-L/14") == {
        "llama": 32 * 81_930, "vit": 24 * 20_490, "adapter_proj": 659_584,
        "adapter_modality_embedding": 8_192, "total": 3_781_296, "decayed": 3_465_216}
    assert count("13B", "ViT-L/14")["total"] == 5_390_080
    assert count("13B", "ViT-L/14")["llama"] == 40 * 102_410
    # the other rows of Table 2, with the paper's rounded figures
    assert count("7B", "ViT-L/14", kind="rep", vision=False)["total"] == 1_704_192  # the paper prints 1.8M
    assert count("7B", "ViT-B/16", kind="rep", vit_adapters=False)["total"] == 2_331_008  # 2.4M
    assert count("7B", "ViT-B/16", kind="rep")["total"] == 2_515_448  # 2.5M
    assert count("7B", "ViT-L/14", kind="rep")["total"] == 2_855_536  # 2.9M


@pytest.mark.parametrize("kind", ["mm", "rep"])
def test_identity_at_init(kind):
    """Untrained adapters change no bit of LLaMA's logits or of the ViT's [cls]."""
    torch.manual_seed(0)
    base, vit = LLaMA(LLAMA), VisionTransformer(CLIP)
    randomize(base), randomize(vit)
    ids, images = torch.randint(0, LLAMA.vocab_size, (3, 9)), torch.randn(2, 3, 16, 16)
    bare, bare_cls = base.output(hidden_of(base, ids)), vit(images)
    model = LaVIN(base, vit, LaVINConfig(AdapterConfig(kind))).eval()
    w = model.routing_weights()
    w = None if w is None else w[:, [0, 1, 0], None]
    assert torch.equal(model.llama.output(hidden_of(model.llama, ids, w)), bare)
    assert torch.equal(model.vit(images), bare_cls)


def test_no_numbers_that_apple_gpus_lack(lavin):
    """They have no float64, and no complex numbers of that precision."""
    with Dtypes() as dtypes:
        lavin(make_batch(ROWS)).backward()
        lavin.generate(make_batch(ROWS[:1]), 3, eos=-1, temperature=0)
    assert dtypes.seen <= {torch.float32, torch.complex64, torch.int64, torch.bool}


def test_cached_equals_uncached_with_ragged_prompts_and_both_modalities(lavin):
    """Decoding token by token gives the logits of one full forward. (The released cache shifts positions.)"""
    n_prompt = [max(0, len(ids) - 3) for ids, _, _ in ROWS]  # ragged prompts, then up to 3 tokens each
    prompts = make_batch([(ids[:n], 0, image) for (ids, _, image), n in zip(ROWS, n_prompt)])
    if prompts.images is not None:
        prompts = prompts._replace(images=make_batch(ROWS).images)
    with torch.inference_mode():
        whole = all_logits(lavin, make_batch(ROWS))
        logits, cache, w = lavin.prefill(prompts, room=3)
        for s in range(4):
            for row, (ids, _, _) in enumerate(ROWS):
                if n_prompt[row] + s <= len(ids):
                    assert close(logits[row], whole[row][prompts.lengths[row] + s - 1])
            token = torch.tensor([(ids + [0] * 4)[n + s] for (ids, _, _), n in zip(ROWS, n_prompt)])
            logits = lavin.decode(w, token, cache) if s < 3 else None


def test_a_step_reads_only_the_filled_slots(lavin):
    for rows in (ROWS[:1], ROWS):
        with torch.inference_mode():
            logits, cache, w = lavin.prefill(make_batch(rows), room=6)
            for x in cache.k + cache.v:
                x[:, :, cache.filled + 2:] = float("nan")
            for _ in range(2):
                assert lavin.decode(w, torch.full((len(rows),), 5), cache).isfinite().all()


@pytest.mark.parametrize("amd", [False, True])
def test_matvec_equals_the_plain_product(monkeypatch, amd):
    monkeypatch.setattr(step, "amd", lambda: amd)  # test both code paths on any machine
    for size, bias in ((600, None), (512, torch.randn(512))):
        W, x = torch.randn(size, 512), torch.randn(1, 512)
        assert close(step.matvec(W, x, bias), F.linear(x, W, bias))


def teacher_forced(model, row, n):
    """the greedy answer from one full forward pass per token"""
    ids, answer = list(row[0]), []
    for _ in range(n):
        batch = make_batch([(ids, 0, row[2])])._replace(images=make_batch([row]).images)
        with torch.no_grad():
            token = all_logits(model, batch)[0][-1].argmax().item()
        if token == 2:
            break
        answer.append(token)
        ids = ids + [token]
    return answer


PROMPTS = [(ids, 0, picture) for ids, _, picture in ROWS]


def test_greedy_generation_equals_teacher_forcing(lavin):
    answers = lavin.generate(make_batch(PROMPTS), 12, eos=2, temperature=0.0)
    assert answers == [teacher_forced(lavin, row, 12) for row in PROMPTS]
    assert len({len(a) for a in answers}) > 1, "no row ended early: choose another seed, or EOS goes untested"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_batch_mates(lavin, temperature):
    sampling = dict(eos=2, temperature=temperature, top_p=0.9, seed=5)
    together = lavin.generate(make_batch(PROMPTS), 12, **sampling)
    assert together == [lavin.generate(make_batch([row]), 12, **sampling)[0] for row in PROMPTS]
    assert together[::-1] == lavin.generate(make_batch(PROMPTS[::-1]), 12, **sampling)


@pytest.mark.parametrize("kind,base", [("mm", LLAMA), ("rep", LLAMA), ("mm", GROUPED)])
def test_folded_equals_unfolded(kind, base):
    """Structural re-parameterisation removes LLaMA's adapters and keeps the logits in both modalities."""
    model, other = (make_lavin(base=base, kind=kind, scale=0.7, tau=3.0) for _ in range(2))
    folded = FoldedLaVIN(other, 0, 1)
    assert all(layer.adapter_attn is None for layer in folded.llama.layers)
    for rows in ([r for r in ROWS if r[2]], [r for r in ROWS if not r[2]]):
        batch = make_batch(rows)
        with torch.no_grad():
            assert all(close(a, b) for a, b in zip(all_logits(folded, batch), all_logits(model, batch)))
        prompts = make_batch([(ids, 0, picture) for ids, _, picture in rows])
        answers = [m.generate(prompts, 12, eos=2, temperature=0.0) for m in (folded, model)]
        assert answers[0] == answers[1]
    with pytest.raises(ValueError, match="name both: TEXT, IMAGE"):
        FoldedLaVIN(make_lavin(), 0).generate(make_batch([ROWS[0]]), 2, eos=2)


def test_folding_keeps_one_set_of_projections():
    folded = FoldedLaVIN(make_lavin(), 1)
    a, (W, _) = folded.llama.layers[0].attention, folded.projections[1][0]
    views = [x.data_ptr() for x in W.chunk(3)]
    assert [x.weight.data_ptr() for x in (a.wq, a.wk, a.wv)] == views  # no copies


@pytest.mark.parametrize("base", [LLAMA, GROUPED], ids=["", "grouped"])
def test_attention_as_the_compiler_gets_it_equals_decode(monkeypatch, base):
    model, batch = FoldedLaVIN(make_lavin(base=base), 1), make_batch(PROMPTS[:1])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.inference_mode():
        caches = [model.prefill(batch, room=3)[1] for _ in range(2)]
        for token in (torch.tensor([id]) for id in (5, 3, 9)):
            assert close(model.decode(None, token, caches[1]), LaVIN.decode(model, None, token, caches[0]))


def plain_answer(folded, batch, n):
    """greedy, without the fast step"""
    plain = copy.copy(folded)
    plain.decode = partial(LaVIN.decode, plain)
    return plain.generate(batch, n, eos=2, temperature=0.0)


@pytest.mark.parametrize("base", [LLAMA, GROUPED], ids=["", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_step_equals_decode(dtype, base):
    """For one row, it gives the same logits and the same cache, in both modalities."""
    model = make_lavin(base=base).to(dtype)
    for p in trainable(model).values():
        p.data = p.data.float()
    model = FoldedLaVIN(model, 0, 1)
    for row in PROMPTS[:3]:
        batch = make_batch([row])
        with torch.inference_mode():
            caches = [model.prefill(batch, room=8)[1] for _ in range(2)]
            for t in range(8):
                token = torch.tensor([t % 7 + 3])
                a, b = LaVIN.decode(model, None, token, caches[0]), model.decode(None, token, caches[1])
                assert close(b, a, 1e-5 if dtype == torch.float32 else 0.05)
        keys = [torch.stack(cache.k) for cache in caches]
        assert close(keys[1], keys[0], 1e-5 if dtype == torch.float32 else 0.05)
        answer = model.generate(batch, 12, eos=2, temperature=0.0)
        assert answer == plain_answer(model, batch, 12) or dtype == torch.bfloat16
        with patch.object(step, "one_token", wraps=step.one_token) as one_token:
            model.generate(batch, 3, eos=-1)
        assert one_token.call_count == 2  # the first token comes from prefill, and nothing reads the last
    rows = make_batch(PROMPTS[::2])  # several rows take the plain step
    assert model.generate(rows, 8, eos=2, temperature=0.0) == plain_answer(model, rows, 8)


def test_pictures_do_not_depend_on_batch_mates(lavin):
    """The released router applies the routing weights of the first picture to all pictures of a batch."""
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        together = lavin.vit(images)
        for i in range(4):
            assert close(lavin.vit(images[i: i + 1])[0], together[i])


@pytest.fixture
def encoded(lavin, monkeypatch) -> list[int]:
    """a list that gets the number of pictures in every forward of the ViT"""
    counts, forward = [], lavin.vit.forward

    def spy(images, *args):
        counts.append(len(images))
        return forward(images, *args)

    monkeypatch.setattr(lavin.vit, "forward", spy)
    return counts


def test_the_vit_runs_only_on_existing_pictures(lavin, encoded):
    lavin(make_batch(ROWS))
    lavin(make_batch([r for r in ROWS if not r[2]]))
    assert encoded == [2]


def test_known_image_embeds_skip_the_vit(lavin, encoded):
    batch = make_batch([(ids, 0, True) for ids in ([5, 9, 11], [8, 4], [20, 31, 7, 12])])
    with torch.no_grad():
        known = batch._replace(image_embeds=lavin.encode_images(batch), images=None)
        assert torch.equal(torch.cat(lavin.embed(known)), torch.cat(lavin.embed(batch))) and encoded == [3, 3]


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(batch).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable(model).items()}


def test_packed_equals_one_sample_at_a_time(lavin):
    """Packing samples end to end, without padding, gives the same loss and the same gradients."""
    batch, alone = make_batch(ROWS), [make_batch([row]) for row in ROWS]
    assert close(lavin(batch).detach(), sum(lavin(b).detach() for b in alone))
    apart = [gradients(lavin, b) for b in alone]
    assert all(close(g, sum(a[n] for a in apart)) for n, g in gradients(lavin, batch).items())


def test_the_chunked_loss_equals_the_whole_one(lavin, monkeypatch):
    batch = make_batch(ROWS)
    logits = lavin.llama.output(lavin.hidden(batch))
    assert len(logits) == sum(n for _, n, _ in ROWS)  # one row of logits for each target
    loss = F.cross_entropy(logits, batch.targets, reduction="sum")
    expected = dict(zip(trainable(lavin), torch.autograd.grad(loss, trainable(lavin).values())))
    chunked = chunked_loss.in_chunks(negative_log_likelihood)
    for implementation, rows in (negative_log_likelihood, 0), (chunked, 3), (chunked, 256):
        lavin.loss = implementation
        monkeypatch.setattr(chunked_loss, "ROWS", rows)
        assert close(lavin(batch).detach(), loss.detach())
        assert all(close(g, expected[n]) for n, g in gradients(lavin, batch).items())
        lavin.zero_grad(set_to_none=True)
        (lavin(batch) / 4).backward()  # train.py divides by the number of targets
        assert all(close(p.grad, expected[n] / 4) for n, p in trainable(lavin).items() if p.grad is not None)


@pytest.mark.parametrize("loss, keeps", [(negative_log_likelihood, True),
                                         (chunked_loss.in_chunks(negative_log_likelihood), False)])
def test_the_chunked_loss_keeps_no_logits(loss, keeps):
    """Once the forward pass has returned, only dL/dhidden waits for the backward pass."""
    class Kept:
        def __init__(self, x: torch.Tensor):
            self.x = x
            alive.add(self)

    hidden, W, alive = torch.randn(9, 4, requires_grad=True), torch.randn(50, 4), WeakSet()
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        L = loss(hidden, W, torch.arange(9))
    shapes = [kept.x.shape for kept in alive]
    assert L.requires_grad
    assert (9, 50) in shapes if keeps else shapes == [hidden.shape]


def test_sampling_keeps_the_nucleus_and_follows_the_seed(lavin):
    from lavin import pick
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    draws = [pick(p, 1.0, 0.75, torch.Generator().manual_seed(s)).item() for s in range(300)]
    assert set(draws) == {0, 1}  # 0.5 + 0.3 reaches 0.75; the third token is never drawn
    assert abs(draws.count(0) / 300 - 0.5 / 0.8) < 0.1
    assert pick(p, 0.0, 0.75, torch.Generator()).item() == 0
    assert draws == [pick(p, 1.0, 0.75, torch.Generator().manual_seed(s)).item() for s in range(300)]


def test_the_largest_random_number_draws_a_token(monkeypatch):
    from lavin import pick
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.ones(shape))  # as rounding may make it
    assert pick(torch.tensor([[0.2, 0.3, 0.5]]), 1.0, 1.0, torch.Generator()).item() in (0, 1, 2)


def test_dropout_depends_on_the_seed_of_each_sample():
    rows = [([5] * 100, 1, True)] * 40
    keep, again = masks(rows, range(40), p=0.1), masks(rows[:3], (0, 7, 2), p=0.1)
    for name, axis in (("llama_dropout_mask", 2), ("vit_dropout_mask", 1)):
        mask = keep[name]
        assert abs(mask.float().mean().item() - 0.9) < 0.005
        # the share of kept units is the same for all layers, tokens and units
        for dim in {*range(mask.ndim)} - {1 if name == "llama_dropout_mask" else -1}:
            means = mask.float().mean([d for d in range(mask.ndim) if d != dim])
            assert (means - 0.9).abs().max() < 6 * (0.09 * len(means) / mask.numel()) ** 0.5
        T = mask.shape[axis] // 40 if name == "llama_dropout_mask" else 1
        parts = [m.split(T, dim=axis) for m in (mask, again[name])]
        assert all(torch.equal(parts[1][k], parts[0][seed]) for k, seed in enumerate((0, 7, 2)))
        assert not torch.equal(parts[0][0], parts[0][1])


def test_dropout_of_a_sample_does_not_depend_on_its_batch_mates():
    model, batch, seeds = make_lavin(dropout=0.5), make_batch(ROWS), range(len(ROWS))
    dropped = batch._replace(**masks(ROWS, seeds))
    assert model(dropped).item() != model(batch).item() and model(dropped).item() == model(dropped).item()
    alone = [make_batch([row])._replace(**masks([row], [seed])) for row, seed in zip(ROWS, seeds)]
    assert model(dropped).item() == pytest.approx(sum(model(b).item() for b in alone), rel=1e-5)


def test_dropout_scales_the_kept_units():
    model, batch = make_lavin(dropout=0.5), make_batch(ROWS)
    keep = {name: torch.ones_like(x) for name, x in masks(ROWS, range(4)).items()}
    hooked = make_lavin(dropout=0.5)
    for name, module in hooked.named_modules():
        if name.endswith("adapter_attn.phi_d"):
            module.register_forward_hook(lambda module, args, h: 2 * h)
    with torch.no_grad():
        w = model.routing_weights()
        hooked.routing_weights = lambda: w  # the routing weights are computed without dropout
        assert close(model(batch._replace(**keep)), hooked(batch))


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
def test_the_compiled_step_equals_decode():
    """Compiled to C++, it gives the same logits and cache, in both modalities and at any length.

    The model has grouped queries and tied embeddings, of which torch.export keeps one name.
    """
    lavin = FoldedLaVIN(make_lavin(base=replace(GROUPED, n_layers=2), tied=True), 0, 1)
    compiling.compile_step(lavin)
    for row in (PROMPTS[0], PROMPTS[1], PROMPTS[2]):  # with a picture, without, with
        batch = make_batch([row])
        with torch.inference_mode():
            caches = [lavin.prefill(batch, room=30)[1] for _ in range(2)]
            for t in range(8):
                token = torch.tensor([t % 7 + 3])
                logits = LaVIN.decode(lavin, None, token, caches[0])
                assert close(lavin.decode(None, token, caches[1]), logits)
        n = caches[1].filled
        for x, y in (map(torch.stack, pair) for pair in zip(*((c.k, c.v) for c in caches))):
            assert close(x, y) and y[:, :, :, n - 1].abs().sum() > 0 and y[:, :, :, n:].abs().sum() == 0
        assert lavin.generate(batch, 8, eos=2, temperature=0.0) == plain_answer(lavin, batch, 8)
    rows = make_batch(PROMPTS[::2])  # several rows take the plain step
    assert lavin.generate(rows, 8, eos=2, temperature=0.0) == plain_answer(lavin, rows, 8)


def test_a_graph_step_with_one_static_cache_equals_decode(lavin, monkeypatch):
    """The step is traced as one graph with static shapes and one cache for all answers. No GPU is tested."""
    compile, row = torch.compile, make_batch(PROMPTS[:1])
    monkeypatch.setattr(torch, "compile", lambda f, mode, **kw: compile(f, backend="eager", **kw))
    folded = FoldedLaVIN(lavin, 1)
    plain = folded.generate(row, 8, eos=2, temperature=0.0)
    folded.step = compiling.Graph(folded.llama, folded.projections)
    for _ in range(2):  # in the second round, the cache still holds the first answer
        assert folded.generate(row, 8, eos=2, temperature=0.0) == plain
    assert folded.step.slots == 256


def test_compiling_without_a_compiler_is_one_line(lavin, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="^--compile: there is no C.. compiler here; [^\n]*$"):
        compiling.compile_step(FoldedLaVIN(lavin, 0))


def test_prompt_longer_than_the_context(lavin):
    with pytest.raises(ValueError, match="the prompt has 72 tokens; the context holds 64"):
        lavin.generate(make_batch([([5] * 70, 0, False)]), 4, eos=2)
    # an answer ends where the context does
    assert len(lavin.generate(make_batch([([5] * 60, 0, False)]), 9, eos=-1)[0]) == 2


def test_a_long_prompt_does_not_shorten_the_answers_of_others(lavin):
    rows = [([5] * 60, 0, False), ([5, 9, 7], 0, False)]  # the context holds 64, head included
    together = lavin.generate(make_batch(rows), 9, eos=-1, temperature=0.0)
    assert together == [lavin.generate(make_batch([row]), 9, eos=-1, temperature=0.0)[0] for row in rows]
    assert [len(answer) for answer in together] == [2, 9]


def test_adapter_file_round_trip_and_refusals(tmp_path, lavin):
    path = tmp_path / "a.safetensors"
    lavin.save(path, format="QCM-A")
    tensors, meta = adapter_files.read_adapters(path)
    assert meta["format"] == "QCM-A" and meta["lavin"]["adapter"]["tau"] == 10.0
    assert meta["base"] == weights.fingerprint(lavin)
    other = make_lavin(trained=False)
    adapter_files.fill(trainable(other), tensors, path)
    assert all(torch.equal(a, b) for a, b in zip(trainable(lavin).values(), trainable(other).values()))
    assert weights.fingerprint(other) == weights.fingerprint(lavin) != weights.fingerprint(make_lavin(seed=1))
    with pytest.raises(ValueError, match="unknown"):
        adapter_files.fill(trainable(make_lavin(vit_adapters=False)), tensors, path)
    with pytest.raises(ValueError, match="another size"):
        adapter_files.fill(trainable(make_lavin(neck_dim=16)), tensors, path)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cut.safetensors: not a readable safetensors file"):
        adapter_files.read_adapters(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError):
        adapter_files.read_adapters(tmp_path / "none.safetensors")
