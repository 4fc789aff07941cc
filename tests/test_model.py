"""What must hold of the model whatever its weights: counts, identity at the start, caching, independence of rows."""
import copy
import shutil

import pytest
import torch
import torch.nn.functional as F

import adapters
import clip
from speed import compiling
import llama
from adapters import AdapterConfig, trainable
from clip import VisionTransformer
from conftest import CLIP, LLAMA, ROWS, close, make_batch, make_lavin, randomize
from lavin import LaVIN, LaVINConfig, NegativeLogLikelihood
from llama import KVCache, LLaMA


def count(size: str, encoder: str, **cfg) -> dict[str, int]:
    with torch.device("meta"):
        adapter = AdapterConfig(cfg.pop("kind", "mm"))
        model = LaVIN(LLaMA(llama.from_name(size)), VisionTransformer(clip.from_name(encoder)), LaVINConfig(adapter, **cfg))
    counts = {}
    for name, p in trainable(model).items():
        counts[name.split(".")[0]] = counts.get(name.split(".")[0], 0) + p.numel()
    counts["total"] = sum(counts.values())
    counts["decayed"] = sum(p.numel() for p in trainable(model).values() if p.ndim >= 2)
    return counts


def test_parameter_counts_of_the_paper():
    assert count("7B", "ViT-L/14") == {"llama": 32 * 81_930, "vit": 24 * 20_490, "adapter_proj": 659_584,
                                       "adapter_modality_embedding": 8_192, "total": 3_781_296, "decayed": 3_465_216}
    assert count("13B", "ViT-L/14")["total"] == 5_390_080 and count("13B", "ViT-L/14")["llama"] == 40 * 102_410
    # the other rows of Table 2, as the paper rounds them
    assert count("7B", "ViT-L/14", kind="rep", vision=False)["total"] == 1_704_192  # the paper prints 1.8M
    assert count("7B", "ViT-B/16", kind="rep", vit_adapters=False)["total"] == 2_331_008  # 2.4M
    assert count("7B", "ViT-B/16", kind="rep")["total"] == 2_515_448  # 2.5M
    assert count("7B", "ViT-L/14", kind="rep")["total"] == 2_855_536  # 2.9M


@pytest.mark.parametrize("kind", ["mm", "rep"])
def test_identity_at_init(kind):
    """Untrained adapters change no bit of the bare LLaMA's logits, nor of the bare ViT's [cls]."""
    torch.manual_seed(0)
    base, vit = LLaMA(LLAMA), VisionTransformer(CLIP)
    randomize(base), randomize(vit)
    ids, images = torch.randint(0, LLAMA.vocab_size, (3, 9)), torch.randn(2, 3, 16, 16)
    bare, bare_cls = base.output(base(ids)), vit(images)
    model = LaVIN(base, vit, LaVINConfig(AdapterConfig(kind))).eval()
    w = model.routing(torch.tensor([[0], [1], [0]]))
    assert torch.equal(model.llama.output(model.llama(ids, w)), bare)
    assert torch.equal(model.vit(images), bare_cls)


def test_unknown_names_list_the_known():
    for from_name in (llama.from_name, clip.from_name):
        with pytest.raises(ValueError, match="known: .*tiny"):
            from_name("nonesuch")
    with pytest.raises(ValueError, match="known: mm, rep"):
        adapters.new_adapter(8, AdapterConfig("nonesuch"))


def test_cached_equals_uncached_with_ragged_prompts_and_both_modalities(lavin):
    """What decoding sees token by token is what training sees at once. (The released cache shifts every position.)"""
    batch = make_batch(ROWS)
    with torch.no_grad():
        w = lavin.routing(batch.modality)
        whole = lavin.llama(lavin.embed(batch), w)
        prompts = [max(2 + 2 * r[2], len(r[0]) + 2 * r[2] - 2) for r in ROWS]  # ragged prefill, then 3 tokens each
        cut = make_batch([(r[0][: n - 2 - 2 * r[2]], 0, r[2]) for r, n in zip(ROWS, prompts)])
        cut = cut._replace(images=batch.images)
        cache = KVCache.empty(LLAMA, len(ROWS), batch.tokens.shape[1] + 4)
        h = lavin.llama(lavin.embed(cut), w, cache=cache)
        rows = torch.arange(len(ROWS))
        assert close(h[rows, cut.lengths - 1], whole[rows, cut.lengths - 1])
        for step in range(3):
            at = cut.lengths + step
            inside = at < batch.lengths
            ids = batch.tokens[rows, at.clamp(max=batch.tokens.shape[1] - 1)]
            h = lavin.llama(ids[:, None], w, at[:, None], cache=cache)
            assert close(h[inside, 0], whole[rows[inside], at[inside]])


def test_several_tokens_after_a_filled_cache(lavin):
    ids = torch.randint(0, LLAMA.vocab_size, (2, 11))
    with torch.no_grad():
        w = lavin.routing(torch.tensor([[0], [1]]))
        whole, cache = lavin.llama(ids, w), KVCache.empty(LLAMA, 2, 16)
        lavin.llama(ids[:, :4], w, cache=cache)
        rest = lavin.llama(ids[:, 4:], w, cache=cache, positions=torch.arange(4, 11).expand(2, -1))
    assert close(rest, whole[:, 4:])


def test_a_step_reads_the_filled_slots_alone(lavin):
    """one row without a mask, several with one; what lies beyond is never touched"""
    ids = torch.randint(0, LLAMA.vocab_size, (2, 9))
    with torch.no_grad():
        w = lavin.routing(torch.tensor([[0], [1]]))
        whole = lavin.llama(ids, w)
        for rows in (slice(0, 1), slice(0, 2)):
            B = len(ids[rows])
            cache = KVCache.empty(LLAMA, B, 16)
            for x in cache.k + cache.v:
                x[:, :, 9:] = float("nan")
            lavin.llama(ids[rows, :6], w[:, rows], cache=cache)
            for t in range(6, 9):
                h = lavin.llama(ids[rows, t: t + 1], w[:, rows], torch.full((B, 1), t), cache=cache, filled=t + 1)
                assert close(h[:, 0], whole[rows, t])


def test_few_rows_by_halves_equal_the_plain_product(monkeypatch):
    monkeypatch.setattr(llama.Linear, "by_halves", True)  # whatever this machine is
    for size, bias in ((600, False), (512, True)):
        linear = llama.Linear(512, size, bias)
        assert linear.in_halves
        for rows in (1, 2, 4, 5):
            x = torch.randn(rows, 1, 512)
            with torch.inference_mode():
                y = linear(x)
            assert y.shape == (rows, 1, size) and close(y, F.linear(x, linear.weight, linear.bias).detach())


def teacher_forced(model, row, n):
    """greedy answer by running the whole sequence anew for every token"""
    ids, answer = list(row[0]), []
    for _ in range(n):
        batch = make_batch([(ids, 0, row[2])])
        batch = batch._replace(images=make_batch([row]).images)
        with torch.no_grad():
            h = model.llama(model.embed(batch), model.routing(batch.modality))
        token = model.llama.output(h[0, -1]).argmax().item()
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


@pytest.mark.parametrize("kind", ["mm", "rep"])
def test_folded_equals_unfolded(kind):
    """Structural re-parameterisation: no adapter left in LLaMA, the same logits in both modalities."""
    model, folded = make_lavin(kind=kind, scale=0.7, tau=3.0), make_lavin(kind=kind, scale=0.7, tau=3.0).fold(0, 1)
    assert all(layer.adapter_attn is None for layer in folded.llama.layers)
    assert not any(n.endswith(("wq.weight", "wk.weight", "wv.weight")) for n, _ in folded.named_parameters())  # gone
    for rows in ([r for r in ROWS if r[2]], [r for r in ROWS if not r[2]]):
        batch = make_batch(rows)
        folded.enter(int(rows[0][2]))
        with torch.no_grad():
            logits = [m.llama.output(m.llama(m.embed(batch), m.routing(batch.modality))) for m in (model, folded)]
        assert close(logits[1], logits[0])
        prompts = make_batch([(ids, 0, picture) for ids, _, picture in rows])
        assert folded.generate(prompts, 12, eos=2, temperature=0.0) == model.generate(prompts, 12, eos=2, temperature=0.0)
    with pytest.raises(ValueError, match="fold for both"):
        make_lavin().fold(0).generate(make_batch([ROWS[0]]), 2, eos=2)


def test_folded_steps_need_no_autocast():
    model = make_lavin().to(torch.bfloat16)
    for p in trainable(model).values():
        p.data = p.data.float()
    rows = make_batch(PROMPTS[::2])
    answer = model.fold(1).generate(rows, 12, eos=-1, temperature=0.0)
    ids = torch.tensor(answer)
    with torch.no_grad(), model.autocast():  # the whole at once, as training sees it
        z = torch.cat([model.embed(rows)[:1, : rows.lengths[0]], model.llama.tok_embeddings(ids[:1])], dim=1)
        logits = model.llama.output(model.llama(z))[0, rows.lengths[0] - 1: -1].float()
    chosen = logits.gather(1, ids[0, :, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() < 0.05 * logits.std()  # but for bf16's rounding, the likeliest token


def test_pictures_do_not_depend_on_batch_mates(lavin):
    """The released router sends every picture of a batch the way of the first one."""
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        together = lavin.vit(images)
        for i in range(4):
            assert close(lavin.vit(images[i: i + 1])[0], together[i])


def test_the_vit_sees_only_the_pictures_that_exist(lavin, monkeypatch):
    seen = []
    forward = lavin.vit.forward
    monkeypatch.setattr(lavin.vit, "forward", lambda images, *a: seen.append(len(images)) or forward(images, *a))
    lavin(make_batch(ROWS))
    lavin(make_batch([r for r in ROWS if not r[2]]))
    assert seen == [2]


def test_a_picture_that_several_samples_show_is_encoded_once(lavin, monkeypatch):
    """In training for each of them: their dropout differs."""
    seen, forward = [], lavin.vit.forward
    monkeypatch.setattr(lavin.vit, "forward", lambda images, *a: seen.append(len(images)) or forward(images, *a))
    batch = make_batch([(ids, 0, True) for ids in ([5, 9, 11], [8, 4], [20, 31, 7, 12])], pack=True)
    shows = torch.tensor([1, 0, 1])
    shared, apart = batch._replace(images=batch.images[:2], shows=shows), batch._replace(images=batch.images[shows])
    with torch.no_grad():
        assert close(lavin.embed(shared), lavin.embed(apart)) and seen == [2, 3]
        assert torch.equal(lavin.embed(shared._replace(seen=lavin.look(shared), images=None)), lavin.embed(shared))
        lavin.train()
        seeds = torch.arange(3).repeat_interleave(batch.lengths)[None]
        assert close(lavin.embed(shared._replace(seeds=seeds)), lavin.embed(apart._replace(seeds=seeds))) and seen[-2:] == [3, 3]


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(batch).backward()
    return {n: p.grad for n, p in trainable(model).items()}


def test_packed_equals_padded(lavin):
    """Samples end to end in one row: the same loss and the same gradients, without a token of padding."""
    batch, packed = make_batch(ROWS), make_batch(ROWS, pack=True)
    assert packed.tokens.shape == (1, batch.lengths.sum())
    assert close(lavin(packed).detach(), lavin(batch).detach())
    padded = gradients(lavin, batch)
    assert all(close(g, padded[n]) for n, g in gradients(lavin, packed).items())


def test_chunked_loss_equals_the_whole_one(lavin, monkeypatch):
    batch = make_batch(ROWS)
    h = lavin.llama(lavin.embed(batch), lavin.routing(batch.modality))
    loss = F.cross_entropy(lavin.llama.output(h).flatten(0, 1)[batch.where], batch.targets, reduction="sum")
    expected = dict(zip(trainable(lavin), torch.autograd.grad(loss / 7, trainable(lavin).values())))
    for rows in (3, 256):
        monkeypatch.setattr(NegativeLogLikelihood, "ROWS", rows)
        assert close(lavin(batch).detach(), loss.detach())
        assert all(close(g / 7, expected[n]) for n, g in gradients(lavin, batch).items())


def test_logits_only_where_there_is_a_target(lavin, monkeypatch):
    rows, softmax = [], F.log_softmax
    monkeypatch.setattr(F, "log_softmax", lambda x, **kw: rows.append(x.shape[0]) or softmax(x, **kw))
    lavin(make_batch(ROWS))
    assert rows == [sum(n for _, n, _ in ROWS)]


def test_sampling_keeps_the_nucleus_and_follows_the_seed(lavin):
    from lavin import pick
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(1, 1)
    draws = [pick(logits, 1.0, 0.75, torch.Generator().manual_seed(s)).item() for s in range(300)]
    assert set(draws) == {0, 1}  # 0.5 + 0.3 reaches 0.75; the third token is never drawn
    assert abs(draws.count(0) / 300 - 0.5 / 0.8) < 0.1
    assert pick(logits, 0.0, 0.75, torch.Generator()).item() == 0
    assert draws == [pick(logits, 1.0, 0.75, torch.Generator().manual_seed(s)).item() for s in range(300)]


def test_dropout_is_a_function_of_seed_position_layer_and_unit():
    seeds, positions = torch.arange(200)[:, None] * 7919, torch.arange(50)[None]
    masks = lambda seeds, positions: adapters.survivors(seeds, positions, AdapterConfig(dim=8, dropout=0.1), 3, 2)
    keep, other_layer = masks(seeds, positions)
    assert abs(keep.float().mean().item() - 0.9) < 0.003
    for dim in range(3):  # no token, sample or unit is treated unlike the others
        others = tuple({0, 1, 2} - {dim})
        means = keep.float().mean(others)
        assert (means - 0.9).abs().max() < 5 * (0.09 * len(means) / keep.numel()) ** 0.5
    assert torch.equal(keep[5:9, 10:12], masks(seeds[5:9], positions[:, 10:12])[0])
    (alone,) = adapters.survivors(seeds, positions, AdapterConfig(dim=8, dropout=0.1), 4, 1)
    assert torch.equal(alone, other_layer) and not torch.equal(alone, keep)  # counted through the whole model
    assert abs((keep & other_layer).float().mean().item() - 0.81) < 0.005  # independent


def test_dropout_in_training_only():
    model, batch = make_lavin(dropout=0.5), make_batch(ROWS, pack=True)
    seeded = batch._replace(seeds=torch.arange(len(ROWS)).repeat_interleave(batch.lengths)[None])
    loss = model(batch).item()
    assert model(seeded).item() == loss
    model.train()
    assert model(batch).item() == loss and model(seeded).item() != loss and model(seeded).item() == model(seeded).item()
    # each sample has its own seed: together and alone are the same thing
    alone = sum(model(make_batch([row], pack=True)._replace(seeds=torch.full((1, n), i))).item()
                for i, (row, n) in enumerate(zip(ROWS, batch.lengths.tolist())))
    assert model(seeded).item() == pytest.approx(alone, rel=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
def test_a_compiled_step_is_the_step(lavin):
    """in C++: the same logits and cache, in both modalities, at any length; several rows are left to the plain one"""
    plain = copy.deepcopy(lavin).fold(0, 1)
    compiled = lavin.fold(0, 1).compile_step()
    for row, modality in ((PROMPTS[0], 1), (PROMPTS[1], 0), (PROMPTS[2], 1)):
        batch, caches = make_batch([row]), []
        for model in (plain, compiled):
            model.enter(modality)
            caches.append((model.compiled or model).cache(1, 40))
            with torch.inference_mode():
                model.llama(model.embed(batch), cache=caches[-1])
        n = int(batch.lengths)
        for t in range(n, n + 8):
            with torch.inference_mode():
                step = torch.tensor([t % 7 + 3]), None, torch.tensor([t])
                assert close(compiled.compiled(*step, caches[1], t + 1), plain.step(*step, caches[0], t + 1))
        for x, y in zip(*(c.k + c.v for c in caches)):
            assert close(x, y) and y[:, :, n + 7].abs().sum() > 0 and y[:, :, n + 8:].abs().sum() == 0
        assert compiled.generate(batch, 8, eos=2, temperature=0.0) == plain.generate(batch, 8, eos=2, temperature=0.0)
    rows = make_batch(PROMPTS[::2])
    assert compiled.generate(rows, 8, eos=2, temperature=0.0) == plain.generate(rows, 8, eos=2, temperature=0.0)


def test_a_graph_reads_its_cache_as_a_whole(lavin, monkeypatch):
    """Traced in one piece, with static shapes, one cache for all answers; what a GPU does with it is not seen here."""
    compile, rows = torch.compile, make_batch(PROMPTS[::2])
    monkeypatch.setattr(torch, "compile", lambda f, mode, **kw: compile(f, backend="eager", **kw))
    plain = lavin.fold(1).generate(rows, 8, eos=2, temperature=0.0)
    lavin.compiled = compiling.Graph(lavin)
    for _ in range(2):  # the second time after what the first one left in the cache
        assert lavin.generate(rows, 8, eos=2, temperature=0.0) == plain
    assert len(lavin.compiled.caches) == 1


def test_compiling_without_a_compiler_is_one_line(lavin, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="^--compile: there is no C.. compiler here; [^\n]*$"):
        lavin.compile_step()


def test_prompt_longer_than_the_context(lavin):
    with pytest.raises(ValueError, match="the prompt has 72 tokens; this LLaMA's context holds 64"):
        lavin.generate(make_batch([([5] * 70, 0, False)]), 4, eos=2)
    # an answer ends where the context does
    assert len(lavin.generate(make_batch([([5] * 60, 0, False)]), 9, eos=-1)[0]) == 2


def test_adapter_file_round_trip_and_refusals(tmp_path, lavin):
    path = tmp_path / "a.safetensors"
    lavin.save(path, format="QCM-A")
    tensors, meta = adapters.read_adapters(path)
    assert meta["format"] == "QCM-A" and meta["lavin"]["adapter"]["tau"] == 10.0 and meta["base"] == lavin.fingerprint()
    other = make_lavin(trained=False)
    adapters.load_adapters(other, tensors)
    assert all(torch.equal(a, b) for a, b in zip(trainable(lavin).values(), trainable(other).values()))
    assert other.fingerprint() == lavin.fingerprint() != make_lavin(seed=1).fingerprint()
    with pytest.raises(ValueError, match="unknown"):
        adapters.load_adapters(make_lavin(vit_adapters=False), tensors)
    with pytest.raises(ValueError, match="another size"):
        adapters.load_adapters(make_lavin(neck_dim=16), tensors)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cut.safetensors: not a readable safetensors file"):
        adapters.read_adapters(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError):
        adapters.read_adapters(tmp_path / "none.safetensors")
