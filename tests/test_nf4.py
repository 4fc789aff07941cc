"""LLaMA's matrices in 4 bits: the codes, the product, what is stored, and the commands with --bits 4."""
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import LLAMA, ROOT, ROWS, all_logits, hidden_of, make_batch, make_lavin, run_main
from torch.multiprocessing.reductions import StorageWeakRef

import evaluate
import lavin
import llama
import sample
import train
import weights
from adapters import trainable
from clip import VisionTransformer
from lavin import LaVIN, LaVINConfig
from llama import LLaMA
from speed import bench, machine, nf4, price
from speed.nf4 import NF4Linear
from tiny import world

PUBLISHED = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803,
             0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # bitsandbytes' table
CPU = torch.device("cpu")


def random(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def round_trip(W: torch.Tensor) -> torch.Tensor:
    return nf4.dequantise(nf4.quantise(W), W.shape)


def in_4_bits(model: torch.nn.Module) -> torch.nn.Module:
    for name, _ in list(model.named_modules()):
        nf4.pack(model, name)
    return model


# ---------------------------------------------------------------------------------------------------
# the code

def test_the_levels_are_those_published():
    assert torch.allclose(nf4.LEVELS, torch.tensor(PUBLISHED), rtol=0, atol=1e-4)
    assert nf4.LEVELS[7] == 0 and nf4.LEVELS[0] == -1 and nf4.LEVELS[15] == 1


def test_a_byte_holds_two_codes_in_order():
    W = torch.tensor(PUBLISHED).repeat(4)  # one block, with absmax 1
    q = nf4.quantise(W)
    assert q.codes.tolist() == [[16 * i + i + 1 for i in range(0, 16, 2)] * 4]
    assert torch.equal(nf4.dequantise(q, W.shape), nf4.LEVELS.repeat(4))


@pytest.mark.parametrize("shape", [(128, 128), (352, 128), (3, 7), (1, 1), (1100, 1000), (64,)], ids=str)
def test_every_weight_becomes_the_nearest_level(shape):
    """(1100, 1000) takes two chunks, and neither a whole number of blocks nor of groups."""
    W = random(*shape) * random(*shape[:1], *[1] * len(shape[1:]), seed=1).exp()  # rows of different sizes
    q, W_4 = nf4.quantise(W), round_trip(W)
    scale = q.scales().repeat_interleave(64, dim=0).flatten()[:W.numel()]
    best = (W.flatten()[:, None] - scale[:, None] * nf4.LEVELS).abs().amin(1)
    assert torch.allclose((W_4 - W).flatten().abs(), best, rtol=0, atol=1e-6)
    absmax = F.pad(W.flatten(), (0, -W.numel() % 64)).view(-1, 64).abs().amax(1)
    groups = absmax.split(256)
    step = torch.cat([(g.max() - g.min()).expand(len(g)) / 255 for g in groups])
    assert ((q.scales()[:, 0] - absmax).abs() <= 0.501 * step + 1e-6).all()  # the nearest of 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_a_tenth_of_the_weights(dtype):
    W = 0.02 * random(512, 512).to(dtype)
    error = (round_trip(W) - W.float()).norm() / W.float().norm()
    assert 0.088 < error < 0.096  # with 16 equidistant levels it is 0.100


def test_extreme_blocks():
    for W in (torch.zeros(128, 128), torch.full((64, 64), 3.0), torch.full((5, 5), -1e-20)):
        assert torch.allclose(round_trip(W), W, rtol=1e-6)
    W = random(256, 128)
    W[0, 0] = 1e4  # an outlier spoils its block, and the absmax of its group, but no other group
    assert round_trip(W)[0, 0] == pytest.approx(1e4, rel=1e-4)
    assert torch.equal(round_trip(W)[128:], round_trip(random(256, 128))[128:])


def test_storage_is_exact():
    layer = NF4Linear(random(256, 128))
    assert 8 * sum(b.nbytes for b in layer.buffers()) == 256 * 128 * nf4.BITS
    assert nf4.BITS == 4 + 1 / 8 + 1 / 256 and not list(layer.parameters())
    assert sum(b.nbytes for b in NF4Linear(random(33, 7)).buffers()) == 4 * 32 + 256 + 8  # 4 blocks, 1 group


# ---------------------------------------------------------------------------------------------------
# the product

@pytest.mark.parametrize("autocast", [False, True])
def test_product_and_gradient_have_the_bits_of_linear(autocast, monkeypatch):
    layer, x = NF4Linear(random(96, 80)), random(2, 9, 80, seed=1).requires_grad_()
    dtype, dtypes, decoded = torch.bfloat16 if autocast else torch.float32, [], layer.decoded
    monkeypatch.setattr(layer, "decoded", lambda dtype: dtypes.append(dtype) or decoded(dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, y_linear = layer(x), F.linear(x, decoded(dtype).clone())
    assert torch.equal(y, y_linear) and y.dtype == y_linear.dtype
    dy = random(2, 9, 96, seed=2).to(y.dtype)
    (dx,), (dx_linear,) = (torch.autograd.grad(out, x, dy) for out in (y, y_linear))
    assert torch.equal(dx, dx_linear) and dx.dtype == dx_linear.dtype and dx.any()
    assert dtypes == [dtype] * 2  # autocast decodes in bf16 right away, because fp32 takes twice the memory


def test_nothing_is_kept_for_the_backward_pass():
    layer, saved = NF4Linear(random(96, 80)), []
    leaf = random(5, 80).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = leaf + 0
        kept = weakref.ref(x)
        y = layer(x)
        del x
    assert not saved and kept() is None
    y.sum().backward()
    assert leaf.grad.any()


def test_all_matrices_are_decoded_into_the_same_memory():
    layers = [NF4Linear(random(n, 64)) for n in (96, 64, 96)]
    with torch.inference_mode():
        where = {layer.decoded(torch.float32).data_ptr() for layer in layers}
    layers[1].decoded(torch.float32)  # outside of inference mode, too
    assert len(where) == 1


def test_only_one_chunk_is_decoded_at_a_time():
    """Beside the bf16 matrix, the profiler sees less than 12 bytes for each weight of a chunk."""
    layer = NF4Linear(random(2048, 2048))
    layer.decoded(torch.bfloat16)  # caches the table of pairs
    nf4.BUFFERS.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        layer.decoded(torch.bfloat16)
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    assert 2 * 2048 ** 2 < peak < 2 * 2048 ** 2 + 8 * 64 * nf4.CHUNK


# ---------------------------------------------------------------------------------------------------
# the model

def test_only_the_matrices_of_llamas_blocks_change():
    before, model = make_lavin(), in_4_bits(make_lavin())
    replaced = {name for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    names = [*(f"attention.{w}" for w in ("wq", "wk", "wv", "wo")),
             *(f"feed_forward.{w}" for w in ("w1", "w2", "w3"))]
    assert replaced == {f"llama.layers.{i}.{name}" for i in range(LLAMA.n_layers) for name in names}
    left, old = dict(model.named_parameters()), dict(before.named_parameters())
    assert left.keys() == {name for name in old if name.removesuffix(".weight") not in replaced}
    assert all(torch.equal(p, old[name]) for name, p in left.items())
    assert trainable(model).keys() == trainable(before).keys()


def test_untrained_adapters_are_the_identity():
    model, bare = in_4_bits(make_lavin(trained=False)), in_4_bits(make_lavin(trained=False))
    tokens = torch.arange(1, 12)[None]
    expected = hidden_of(without_adapters(bare.llama), tokens)
    assert torch.equal(hidden_of(model.llama, tokens, model.routing_weights()[:, 1, None, None]), expected)


def without_adapters(model: LLaMA) -> LLaMA:
    for block in model.layers:
        block.adapter_attn = None
    return model


def test_generation_equals_training_logits():
    """The cache, the adapters and decode() are right where nothing can be folded."""
    model = in_4_bits(make_lavin())
    for row in ROWS:
        batch = make_batch([row])
        (answer,) = model.generate(batch, 6, eos=-1, temperature=0)
        whole = make_batch([(row[0] + answer, len(answer), row[2])])._replace(images=batch.images)
        logits = all_logits(model, whole)[0][-len(answer) - 1:-1]
        assert logits.argmax(-1).tolist() == answer


def test_the_fingerprint_is_that_of_the_original():
    for dtype in torch.float32, torch.bfloat16:
        model = make_lavin()
        for p in model.parameters():
            p.data = p.data.to(dtype)
        fingerprint = weights.fingerprint(model)
        assert weights.fingerprint(in_4_bits(model)) == fingerprint == weights.fingerprint(make_lavin())
    assert weights.fingerprint(in_4_bits(make_lavin(seed=1))) != fingerprint


def test_loading_goes_tensor_by_tensor(monkeypatch):
    """A matrix is freed once it has its codes: at most the last one is still there when the next is read."""
    storages, alive, pack = [], [], nf4.pack

    def spy(model, name):
        if name.rpartition(".")[2] in nf4.MATRICES:
            read = [m for n, m in model.named_modules() if n.rpartition(".")[2] in nf4.MATRICES
                    and isinstance(m, torch.nn.Linear) and not m.weight.is_meta]
            assert read == [model.get_submodule(name)]  # the others are codes, or still in the file
            alive.append(sum(not s.expired() for s in storages))
            storages.append(StorageWeakRef(read[0].weight.untyped_storage()))
        pack(model, name)

    model = LLaMA.from_pretrained(ROOT / "tiny/llama", after_read=spy)
    assert len(alive) == 7 * len(model.layers) and max(alive) <= 1 and all(s.expired() for s in storages)
    whole = LLaMA.from_pretrained(ROOT / "tiny/llama")
    for layer, original in zip(model.layers, whole.layers):
        for name in "wq", "wk", "wv", "wo":
            ours, theirs = getattr(layer.attention, name), getattr(original.attention, name)
            assert torch.equal(ours.codes, nf4.quantise(theirs.weight).codes)


def test_adapters_move_between_4_and_16_bits(tmp_path):
    def load(path, bits):
        return lavin.load(path, ROOT / "tiny/llama", ROOT / "tiny/clip", after_read=nf4.after_read(bits))[0]

    meta = dict(format="QCM-EA", captions=False, max_new_tokens=4)
    load(ROOT / "tiny/adapters.safetensors", 4).save(tmp_path / "a.safetensors", **meta)
    whole, quantised = (load(tmp_path / "a.safetensors", bits) for bits in (16, 4))
    assert not any(isinstance(m, NF4Linear) for m in whole.modules())
    assert all(torch.equal(p, trainable(quantised)[name]) for name, p in trainable(whole).items())


def test_bytes_read_per_token():
    model = in_4_bits(make_lavin())
    c, rest = LLAMA, sum(p.nbytes for n, p in model.llama.named_parameters() if "tok_embeddings" not in n)
    cache = 4 * 2 * 10 * c.n_layers * c.dim
    codes = c.n_layers * (4 * (16 * 32 + 264) + 3 * (24 * 32 + 264))  # 16 and 24 blocks, one group each
    assert machine.bytes_per_token(model.llama, 10) == rest + codes + cache


# ---------------------------------------------------------------------------------------------------
# predictions

@pytest.mark.parametrize("preset, most", [("7B", 5.2e9), ("13B", 8.8e9)])
def test_peaks_at_paper_scale(preset, most):
    c, v = bench.PRESETS[preset]
    with torch.device("meta"):
        model = LaVIN(LLaMA(c), VisionTransformer(v), LaVINConfig())
    load = price.Load.of([price.Kind(512, 0, True)])
    lines = price.memory(model, torch.bfloat16, load, checkpoint=True, bits=4)
    matrices = c.n_layers * (4 * c.dim ** 2 + 3 * c.dim * c.ffn_dim)
    saved = price.frozen_bytes(model, torch.bfloat16) - lines["frozen weights"]
    assert saved == matrices * (16 - nf4.BITS) / 8
    assert 0.9 * most < sum(lines.values()) <= most


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_memory_equals_measured_memory(dtype, checkpoint, monkeypatch):
    """The model is wide and the sequences are short, so the decoded matrix is a visible part of the peak."""
    c = llama.LLaMAConfig(dim=512, n_layers=2, n_heads=8, ffn_dim=1376, vocab_size=500)
    with torch.device("meta"):
        model = LaVIN(LLaMA(c), VisionTransformer(bench.PRESETS["tiny"][1]), LaVINConfig())
    bench.materialise(model, CPU, dtype, nf4.pack)
    model.llama.recompute_blocks = checkpoint
    problems = [price.Kind(60, 20, True), price.Kind(40, 20, False)]
    ours = bench.Ours(bench.Config(), model)
    ours.step([ours.batch(problems)])
    lines = price.memory(model, dtype, price.Load.of(problems), checkpoint, bits=4)
    held, peak = sum([*lines.values()][:4]), sum(lines.values())
    assert bench.held_bytes(model, ours.optimizer) == pytest.approx(held, rel=0.01)
    assert bench.peak_bytes(ours, problems, CPU) == pytest.approx(peak, rel=0.05)
    monkeypatch.setattr(price, "decoded_bytes", lambda *args: 0)
    without = sum(price.memory(model, dtype, price.Load.of(problems), checkpoint, bits=4).values())
    assert without < 0.93 * peak


def test_bench_in_4_bits(monkeypatch, capsys):
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e12)
    flags = ("--preset", "tiny", "--device", "cpu", "--steps", 1, "--burn_in", 0, "--batch_size", 2,
             "--bits", 4)
    results = {}
    for command in "train", "decode", "memory":
        run_main(monkeypatch, bench.main, command, *flags, "--micro_batch", 2, "--new_tokens", 3)
        results[command] = json.loads(capsys.readouterr().out)
    trained, decoded, memory = results.values()
    assert trained["peak_gb"] == pytest.approx(trained["predicted_peak_gb"], rel=0.05)
    assert trained["micro_batch_flops"] == pytest.approx(trained["micro_batch_flops_torch"], rel=2e-3)
    assert memory["held_mb"] == pytest.approx(memory["predicted_held_mb"], rel=0.01)
    assert decoded["unfolded_ms_per_token"] > 0 and "folded_ms_per_token" not in decoded
    for flag in ("--vs", "hf"), ("--compile",):
        with pytest.raises(SystemExit, match="--vs and --compile need folded adapters"):
            run_main(monkeypatch, bench.main, "decode", *flags, *flag)


# ---------------------------------------------------------------------------------------------------
# the commands

@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world.write(folder, seed=5, sizes={"test": 8, "val": 4, "train": 16})
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """run a command on the tiny model -> (stdout, stderr)"""
    def call(main, *argv):
        monkeypatch.chdir(ROOT)
        run_main(monkeypatch, main, *argv, "--device", "cpu")
        return capsys.readouterr()
    return call


def fails(run, *argv) -> str:
    with pytest.raises(SystemExit) as e:
        run(*argv)
    message = str(e.value.code)
    assert "\n" not in message and "Traceback" not in message
    return message


def flags(data, out, **kw) -> list[str]:
    kw = {"data": data, "out": out, "split": "", "batch_size": 8, "micro_batch": 4, **kw}
    return [x for name, value in kw.items() for x in (f"--{name}", str(value))]


def test_training_changes_no_code_and_answers_unfolded(small_world, tmp_path, run, monkeypatch):
    kept, build = {}, train.build

    def spy(*args):
        kept["model"], tokenizer = build(*args)
        kept["before"] = {name: x.clone() for name, x in kept["model"].state_dict().items()}
        return kept["model"], tokenizer

    monkeypatch.setattr(train, "build", spy)
    run(train.main, *flags(small_world, tmp_path, steps=2, split="test", max_new_tokens=4, bits=4))
    after = kept["model"].state_dict()
    changed = {name for name, x in after.items() if not torch.equal(x, kept["before"][name])}
    assert changed == set(trainable(kept["model"])) and any(name.endswith("wq.codes") for name in after)
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == 8


def test_resuming_with_other_bits_is_refused(small_world, tmp_path, run):
    run(train.main, *flags(small_world, tmp_path / "4", steps=1, bits=4))
    told = fails(run, train.main, *flags(small_world, tmp_path / "4"), "--resume")
    assert "--resume continues a run with bits 4, not 16" in told
    run(train.main, *flags(small_world, tmp_path / "4", bits=4), "--resume")
    run(train.main, *flags(small_world, tmp_path / "16", steps=1))
    told = fails(run, train.main, *flags(small_world, tmp_path / "16", bits=4), "--resume")
    assert "--resume continues a run with bits 16, not 4" in told


def test_predictions_of_other_bits_are_not_mixed(small_world, tmp_path, run):
    file = tmp_path / "p.jsonl"
    asked = evaluate.main, "scienceqa", "--data", small_world, "--out", file, "--max_new_tokens", 4
    run(*asked, "--bits", 4)
    assert "another run (bits 4, now 16)" in fails(run, *asked)
    assert "unknown --bits 3" in fails(run, *asked, "--bits", 3)
    head, *rows = file.read_text().split("\n")
    head = json.loads(head)
    assert head["run"].pop("bits") == 4
    file.write_text("\n".join([json.dumps(head), *rows]))  # as before there was --bits
    assert "another run (bits 16, now 4)" in fails(run, *asked, "--bits", 4)
    assert "8 predictions are there, 0 to go" in run(*asked)[1]


def test_sample_answers_in_4_bits(run, monkeypatch):
    steps = []
    monkeypatch.setattr(LaVIN, "decode", lambda *args, decode=LaVIN.decode: steps.append(1) or decode(*args))
    out, err = run(sample.main, "--bits", 4, "--temperature", 0)
    assert out.startswith("On the left is a big red circle") and "of weights and cache" in err
    assert len(steps) > 10


@pytest.mark.parametrize("command", [
    (train.main, "--dry_run"), (train.main, "--steps", "1", "--split", ""), (sample.main,),
    (bench.main, "memory"), (evaluate.main, "scienceqa")],
    ids=["dry_run", "train", "sample", "bench", "evaluate"])
def test_other_bits_are_one_line(run, small_world, tmp_path, command):
    main, *argv = command
    data = ("--data", small_world) if main in (train.main, evaluate.main) else ()
    out = ("--out", tmp_path / ("o.jsonl" if main is evaluate.main else "o")) if data else ()
    assert fails(run, main, *argv, *data, *out, "--bits", "3").endswith("unknown --bits 3; known: 4, 16")


def test_compiling_is_refused_before_weights_are_read(run):
    told = fails(run, sample.main, "--bits", "4", "--compile", "--llama", "nowhere")
    assert "--compile needs folded adapters" in told and "leave out --compile or --bits 4" in told
