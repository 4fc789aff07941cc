"""price.py predicts what torch counts and measures, and bench.py runs. No test asserts a time."""
import json
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import REAL, ROOT, real_problems, run_main

import data
import llama
import train
from adapters import AdapterConfig, trainable
from clip import VisionTransformer
from lavin import LaVIN, LaVINConfig
from llama import LLaMA
from official import adapter_files, llama_layouts, tensorfiles
from official.tokenizer import Tokenizer
from speed import bench, machine, price
from speed.bench import Ours
from speed.price import Kind, Load
from speed.shapes import LLAMAS
from tiny import world

CPU = torch.device("cpu")
PROBLEMS = [Kind(300, 80, True), Kind(280, 90, False), Kind(400, 70, True), Kind(200, 60, False)]


def tiny(dtype=torch.float32, checkpoint: bool = False, n_kv_heads: int | None = None, **cfg) -> Ours:
    c, v = bench.PRESETS["tiny"]
    with torch.device("meta"):
        vit = VisionTransformer(v) if cfg.get("vision", True) else None
        model = LaVIN(LLaMA(replace(c, n_layers=3, n_kv_heads=n_kv_heads)), vit, LaVINConfig(**cfg))
    bench.materialise(model, CPU, dtype)
    model.llama.recompute_blocks = checkpoint
    return Ours(bench.Config(), model)


def on_meta(preset: str) -> LaVIN:
    c, v = bench.PRESETS[preset]
    with torch.device("meta"):
        return LaVIN(LLaMA(c), VisionTransformer(v), LaVINConfig())


# ---------------------------------------------------------------------------------------------------
# the table of lengths

def test_the_table_of_lengths_has_the_mean_lengths_of_scienceqa():
    lengths, prompt_lengths, pictures = np.array(price.kinds()).T
    assert len(lengths) == 80 and pictures.mean() == 0.5 and lengths.max() == 512
    assert (prompt_lengths < lengths).all()
    assert round(lengths.mean()) == 303 and round((lengths - prompt_lengths).mean()) == 215
    assert all(k.length <= 192 and k.prompt < 192 for k in price.kinds(192)) and len(price.kinds(192)) > 60


def test_the_table_of_lengths_agrees_with_the_real_problems():
    if not REAL.is_dir():
        pytest.skip("the real problems and LLaMA's tokenizer are not in ../shared/data")
    examples, _ = data.encode_all(real_problems(), Tokenizer(REAL / "llama_tokenizer.model"), 6, 512)
    kinds = [Kind(e.length, e.length - e.n_targets, e.n_visual > 0) for e in examples]
    real = Load.of(kinds).times(1 / len(examples))
    table = Load.of(price.kinds()).times(1 / len(price.kinds()))
    assert all(a == pytest.approx(b, rel=0.01) for a, b in zip(real[:4], table[:4]))


def test_eight_ranks_carry_nearly_equal_loads():
    assert price.balance(ranks=8, batch_size=32) <= 1.05


# ---------------------------------------------------------------------------------------------------
# FLOPs

@pytest.mark.parametrize("choice", [{}, {"vit_adapters": False}, {"vision": False}, {"checkpoint": True},
                                    {"n_kv_heads": 2}, {"adapter": AdapterConfig("rep")}],
                         ids=lambda choice: "-".join(choice) or "whole")
def test_flop_formula_equals_torchs_counter(choice):
    """The formula covers recomputed products, the routers, the neck, and attention as the counter sees it."""
    ours = tiny(**choice)
    problems = [p._replace(picture=p.picture and ours.model.vit is not None) for p in PROBLEMS]
    batch, load = ours.batch(problems), Load.of(problems)
    formula = price.flops(ours.model, load, choice.get("checkpoint", False), in_full=True)
    counted = bench.counted_flops(lambda: ours.model(batch).backward())
    assert counted == pytest.approx(sum(formula.values()), rel=1e-6)


def test_nearly_all_flops_are_useful():
    """There is no padding, and little is recomputed."""
    for preset, floor in (("7B", 4 * 6.476e9), ("13B", 4 * 12.688e9)):
        load = Load.of(price.kinds(), forwards=len(price.kinds()) / 4)
        lines = price.flops(on_meta(preset), load)
        assert lines["LLaMA"] / load.tokens == pytest.approx(floor, rel=1e-3)
        assert 1 < sum(lines.values()) / price.useful(lines) <= 1.02
    # ViT-L/14, forward and backward
    assert lines["pictures"] / load.pictures == pytest.approx(0.333e12, rel=0.01)


# ---------------------------------------------------------------------------------------------------
# memory

def test_a_7b_block_saves_at_most_95_kb_per_token():
    """The minimum is 93.3 kB. Without one of the recomputed regions it would be 102, 111 or 116 kB."""
    assert 93_000 < bench.block_bytes(llama.PRESETS["7B"], torch.bfloat16, CPU, lengths=(200, 56)) <= 95_000


@pytest.mark.parametrize("checkpoint,n_kv_heads", [(False, None), (True, None), (False, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_memory_equals_measured_memory(dtype, checkpoint, n_kv_heads):
    ours = tiny(dtype, checkpoint, n_kv_heads)
    batch = ours.batch(PROBLEMS)
    ours.step([batch])
    lines = price.memory(ours.model, dtype, Load.of(PROBLEMS), checkpoint)
    held, saved, peak = sum([*lines.values()][:4]), sum([*lines.values()][4:7]), sum(lines.values())
    assert bench.held_bytes(ours.model, ours.optimizer) == pytest.approx(held, rel=0.01)
    assert bench.saved_bytes(lambda: ours.loss(batch), ours.model) == pytest.approx(saved, rel=0.05)
    assert bench.peak_bytes(ours, PROBLEMS, CPU) == pytest.approx(peak, rel=0.05)


def test_peaks_and_file_sizes_at_paper_scale(tmp_path):
    for preset, most, checkpointed, megabytes in (("7B", 22, 16, 15.2), ("13B", 38.5, 29, 21.6)):
        model, load = on_meta(preset), Load.of([Kind(512, 0, True)] * 4)
        assert sum(price.memory(model, torch.bfloat16, load).values()) / 1e9 <= most
        assert sum(price.memory(model, torch.bfloat16, load, checkpoint=True).values()) / 1e9 <= checkpointed
        for name, p in trainable(model).items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(torch.zeros(p.shape)))
        adapter_files.write_adapters(tmp_path / "a.safetensors", trainable(model), {})
        assert round((tmp_path / "a.safetensors").stat().st_size / 1e6, 1) == megabytes


def test_checkpointing_changes_no_gradient():
    grads = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        ours = tiny(checkpoint=checkpoint)
        ours.model(ours.batch(PROBLEMS)).backward()
        grads.append({n: p.grad for n, p in trainable(ours.model).items()})
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


# ---------------------------------------------------------------------------------------------------
# commands

@pytest.fixture
def run(monkeypatch, capsys):
    """run a command -> (stdout, stderr)"""
    def call(main, *argv):
        run_main(monkeypatch, main, *argv)
        return capsys.readouterr()
    return call


@pytest.fixture
def run_bench(run, monkeypatch):
    """run bench.py on the tiny preset -> (stdout, stderr)"""
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e12)  # measuring the peak takes long
    flags = "--preset", "tiny", "--device", "cpu", "--steps", 1
    return lambda command, *argv: run(bench.main, command, *flags, *argv)


@pytest.mark.parametrize("command, keys", [
    ("train", {"tokens_per_s", "samples_per_s", "utilisation", "matmul_tflop_per_s", "flops_over_useful",
               "peak_gb", "predicted_peak_gb", "slowest_over_mean_rank", "recipe_hours_here",
               "recipe_hours_8_a100_projected"}),
    ("decode", {"prefill_tokens_per_s", "tokens_per_s", "mb_per_token", "gb_per_s", "memory_gb_per_s",
                "utilisation", "bare_ms_per_token", "folded_ms_per_token", "unfolded_ms_per_token",
                "folded_over_bare", "unfolded_over_bare"}),
    ("memory", {"block_kb_per_token", "held_mb", "saved_mb", "predicted_saved_mb", "peak_mb",
                "predicted_peak_mb"})])
def test_bench_ends_with_one_line_of_json(run_bench, command, keys):
    out, _ = run_bench(command, "--batch_size", 2, "--micro_batch", 2, "--burn_in", 0, "--new_tokens", 3)
    result = json.loads(out)  # nothing else is on stdout
    assert keys <= result.keys() and result["command"] == command and all(result[key] > 0 for key in keys)
    if command == "train":
        assert result["micro_batch_flops"] == pytest.approx(result["micro_batch_flops_torch"], rel=2e-3)
        assert result["peak_gb"] == pytest.approx(result["predicted_peak_gb"], rel=0.05)


def models_of(err: str, unit: str) -> list[str]:
    """which model took each timed step or answer, in order"""
    return [line.split()[2] for line in err.splitlines() if line.startswith(unit)]


def test_bench_train_alternates_ours_and_hugging_face(run_bench):
    pytest.importorskip("transformers"), pytest.importorskip("peft")
    out, err = run_bench("train", "--vs", "hf", "--batch_size", 2, "--micro_batch", 2, "--burn_in", 1)
    result = json.loads(out)
    assert result["hf_over_ours"] > 0
    assert result["micro_batch_flops"] == pytest.approx(result["micro_batch_flops_torch"], rel=2e-3)
    assert models_of(err, "step ") == ["ours:", "hf:"] * 2


def test_hugging_face_gives_the_same_answer(run_bench):
    """Hugging Face's modules hold the folded weights; picture and prompt go in as embeddings."""
    pytest.importorskip("transformers")
    out, err = run_bench("decode", "--vs", "hf", "--burn_in", 1, "--new_tokens", 20)
    result = json.loads(out)
    assert result["hf_same_tokens"] == 1 and result["hf_over_ours"] > 0 and result["hf_ms_per_token"] > 0
    assert models_of(err, "answer ") == ["bare:", "unfolded:", "folded:", "hf:"] * 2


def test_bytes_read_per_token():
    model = on_meta("7B")
    read = machine.bytes_per_token(model.llama.bfloat16(), 100)
    adapters_too = 2 * sum(p.numel() for n, p in trainable(model.llama).items())
    assert read == 2 * (6_738_415_616 - 32_000 * 4096 + 2 * 100 * 32 * 4096) + adapters_too


def test_mistakes_are_one_line(run, monkeypatch, capsys):
    def message(*argv):
        with pytest.raises(SystemExit) as e:
            run(bench.main, *argv)
        assert "\n" not in str(e.value.code)
        return e.value.code

    assert "unknown command 'fly'; known: train, decode, memory" in message("fly")
    assert "unknown --preset '9B'; known: tiny, small, 7B, 13B" in message("train", "--preset", "9B")
    assert "unknown --vs 'us'; known: hf" in message("--vs", "us")
    assert message("--steps", "0") == 2
    assert "--steps 0: expected a number of at least 1" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "peft", None)
    told = message("--preset", "tiny", "--vs", "hf")
    assert "the package peft is missing; pip install transformers peft" in told
    monkeypatch.setattr(bench.os, "sysconf", lambda name: 1000)
    assert "give --dtype bf16 or fewer --layers" in message("--preset", "7B", "--device", "cpu")
    assert message("memory", "--help") == 0


def test_dry_run_needs_no_weights(run):
    flags = "--dry_run", "--recipe", "paper", "--llama", "13B", "--clip", "ViT-L/14"
    out, _ = run(train.main, *flags)
    assert "5,390,080 train" in out and "20 x 12,726 problems as in ScienceQA" in out
    assert "stated, not measured" in out
    peak = float(next(line for line in out.splitlines() if line.startswith("  peak")).split()[1])
    assert 36 < peak < 38.5
    saving, _ = run(train.main, *flags, "--recompute_blocks")
    assert "recomputed blocks" in saving and "28." in saving


def test_dry_run_prices_a_folder_on_its_own_data(run, tmp_path):
    world.write(tmp_path, seed=5, sizes={"test": 4, "val": 4, "train": 12})
    out, _ = run(train.main, "--dry_run", "--llama", ROOT / "tiny/llama", "--clip", ROOT / "tiny/clip",
                 "--data", tmp_path)
    assert "61,550 train" in out and f"1.5 x 12 problems as in {tmp_path}" in out


def test_dry_run_knows_models_by_name_and_counts_tied_embeddings_once(run, tmp_path):
    flags = "--dry_run", "--recipe", "paper", "--no-vision", "--data", "ScienceQA"  # not on this disk
    out, _ = run(train.main, *flags, "--llama", "Llama-3.2-1B")
    n_trained = 16 * 40_970 + 2 * 2048  # adapters of 16 layers, modality embedding
    assert f"{1_235_814_400 + n_trained:,} parameters, of which {n_trained:,} train" in out
    assert "  to answer " in out
    # a folder with tied embeddings
    model = LLaMA(replace(bench.PRESETS["tiny"][0], n_kv_heads=2))
    tensors = {n: tensorfiles.Lazy(tuple(p.shape), p.dtype, lambda p=p: p.detach())
               for n, p in model.named_parameters()}
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    tensorfiles.write_folder(tmp_path, *llama_layouts.to_hf(asdict(model.cfg), tensors))
    out, _ = run(train.main, *flags, "--llama", tmp_path)
    n = sum(p.numel() for p in model.parameters()) - model.output.weight.numel()
    assert f"{n + model.cfg.n_layers * 2_570 + 2 * 128:,} parameters" in out
    with pytest.raises(SystemExit, match="neither a folder of weights nor one of 7B, 13B, tiny, 30B"):
        run(train.main, "--dry_run", "--llama", "Llama-9")


def test_models_md_has_the_computed_columns():
    """`python -m speed.price` prints them. The numbers of parameters are the published ones."""
    text = (ROOT / "official" / "MODELS.md").read_text()
    for name in LLAMAS:
        assert name == "tiny" or f"\n{price.row(name)} " in text, name
    published = {"TinyLlama-1.1B": 1_100_048_384, "Llama-3.2-1B": 1_235_814_400,
                 "Llama-3.1-8B": 8_030_261_248, "Mistral-7B-v0.1": 7_241_732_096,
                 "SmolLM2-135M": 134_515_008, "OpenLLaMA-3B": 3_426_473_600}
    for name, n in published.items():
        assert f"| {name} | {n:,} |" in text
