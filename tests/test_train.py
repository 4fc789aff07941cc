"""Training: any split of a batch gives the same update, a stopped run resumes, mistakes are one line."""
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cli

import pytest
import torch
from conftest import ROOT, TWO_PROCESSES, run_main
from PIL import Image
from safetensors.torch import load_file

import train
from tiny import world


@pytest.fixture(scope="module")
def small_world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    world.write(folder, seed=5, sizes={"test": 8, "val": 4, "train": 48})
    return folder


def flags(small_world, out, **kw) -> list[str]:
    kw = {"data": small_world, "out": out, "split": "",
          "llama": ROOT / "tiny/llama", "clip": ROOT / "tiny/clip", "device": "cpu",
          "batch_size": 8, "micro_batch": 8, "save_every": 2, "log_every": 1, **kw}
    return [x for k, v in kw.items() for x in ((f"--{k}",) if v is True else (f"--{k}", str(v)))]


def run(monkeypatch, argv: list[str]) -> None:
    run_main(monkeypatch, train.main, *argv)


def fails(monkeypatch, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, argv)
    assert e.value.code != 0
    return str(e.value.code)


def adapters(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapters.safetensors")


def same_bits(a: Path, b: Path) -> bool:
    a, b = adapters(a), adapters(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_step_moves_everything_and_logs_the_mean_of_its_targets(small_world, tmp_path, monkeypatch):
    """AdamW must not skip the ViT's adapters in a step without an image."""
    seen, in_chunks = [], train.in_chunks

    def recorded(loss):
        def f(hidden, W, R):
            L = in_chunks(loss)(hidden, W, R)
            seen.append((L.item(), len(R)))
            return L
        return f

    monkeypatch.setattr(train, "in_chunks", recorded)
    run(monkeypatch, flags(small_world, tmp_path, batch_size=2, micro_batch=1, steps=20))
    rows = [json.loads(row) for row in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(seen) == 40 and len(rows) == 20
    for row, (a, n), (b, m) in zip(rows, seen[::2], seen[1::2]):
        assert row["loss"] == pytest.approx((a + b) / (n + m), abs=1e-4)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    assert {int(moments["step"]) for moments in state.values()} == {20}


def test_two_processes_equal_accumulation_equal_one_batch(small_world, tmp_path, monkeypatch):
    """Splits differ only by rounding. The released loss is a mean of micro-batch means and depends on them.

    The test uses the paper's learning rate. Adam divides each gradient by its own magnitude. A router's
    gradient is nearly zero while its two experts are alike, so there rounding can change a step by up to a
    hundredth.
    """
    start = dict(steps=5, epochs=20, warmup=3, lr=9e-3, dropout=0.1)
    for name, micro in (("one", 8), ("two", 4), ("many", 3)):
        run(monkeypatch, flags(small_world, tmp_path / name, micro_batch=micro, **start))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    nodes = []
    for node in "01":  # two launchers, as on two machines
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", node,
                   "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port, "train.py",
                   *flags(small_world, tmp_path / "ranks", micro_batch=4, **start)]
        nodes.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    for node in nodes:
        assert node.wait(300) == 0, node.stderr.read()
    one = adapters(tmp_path / "one")
    moved = max(x.abs().max().item() for n, x in one.items() if "phi_u" in n)
    assert moved > 1e-4, "nothing was learned, so nothing was compared"
    assert same_bits(tmp_path / "two", tmp_path / "ranks")  # two processes compute the same sums as one
    logs = {name: [json.loads(line) for line in open(tmp_path / name / "log.jsonl")]
            for name in ("one", "two", "many", "ranks")}
    assert logs["one"][-1]["loss"] < 1.1 * logs["one"][0]["loss"]  # a mean, not a sum over the steps
    # Adam moves no parameter further than the sum of the learning rates
    whole = sum(row["lr"] for row in logs["one"])
    for name in ("two", "many", "ranks"):
        for row, expected in zip(logs[name], logs["one"], strict=True):
            for key in ("loss", "grad_norm"):
                assert abs(row[key] - expected[key]) < 1e-3 * expected[key], f"{name}: {key}"
        other = adapters(tmp_path / name)
        for n in one:
            assert (one[n] - other[n]).abs().max() < (whole / 100 if ".f_w." in n else 1e-6), f"{name}: {n}"


def test_recompute_blocks_reaches_the_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    for chosen in (False, True):
        model, _ = train.build(train.Config(recompute_blocks=chosen), torch.device("cpu"), torch.float32)
        assert model.llama.recompute_blocks is chosen


def test_a_rank_without_a_sample_adds_nothing(small_world, tmp_path, monkeypatch):
    start = dict(steps=2, epochs=20, warmup=3, lr=9e-3, batch_size=1)
    run(monkeypatch, flags(small_world, tmp_path / "one", **start))
    subprocess.run([*TWO_PROCESSES, "train.py", *flags(small_world, tmp_path / "two", **start)], cwd=ROOT,
                   check=True, capture_output=True)
    assert same_bits(tmp_path / "one", tmp_path / "two")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux shows them")
def test_no_thread_outlives_the_process_group(tmp_path):
    """A thread of gloo that outlives it may abort the process while Python shuts down."""
    (tmp_path / "two.py").write_text("""if True:
        import os
        import cli
        with cli.process_group("gloo"):
            import torch.distributed as dist
            import torch._dynamo  # as a model's code does sooner or later
            dist.gather_object("x", [None, None] if cli.is_main() else None)
            within = len(os.listdir("/proc/self/task"))
        os.write(1, f"{within > 1} {len(os.listdir('/proc/self/task'))}\\n".encode())
        """)
    command = [*TWO_PROCESSES, str(tmp_path / "two.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=120, check=True).stdout
    assert out.splitlines() == ["True 1"] * 2


def test_resume_is_bit_exact(small_world, tmp_path, monkeypatch):
    straight, stopped = (flags(small_world, tmp_path / name, dropout=0.1) for name in "ab")
    run(monkeypatch, [*straight, "--steps", "6"])
    run(monkeypatch, [*stopped, "--steps", "3"])
    assert not same_bits(tmp_path / "a", tmp_path / "b")
    with open(tmp_path / "b/log.jsonl", "a") as log:  # as if killed while writing the line of step 5
        log.write('{"step": 4, "loss": 9.0}\n{"step": 5')
    run(monkeypatch, [*stopped, "--steps", "6", "--resume"])
    assert same_bits(tmp_path / "a", tmp_path / "b")
    rows = [json.loads(line) for line in open(tmp_path / "b/log.jsonl")]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6] and all(r["loss"] > 0 for r in rows)
    assert Image.open(tmp_path / "b/curve.png").format == "PNG"  # the losses of the whole run


def test_a_killed_run_resumes_exactly(small_world, tmp_path, monkeypatch):
    command = [sys.executable, "train.py", *flags(small_world, tmp_path / "k", epochs=500)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    while not (tmp_path / "k/checkpoint.pt").is_file():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = torch.load(tmp_path / "k/checkpoint.pt", weights_only=True)["step"]
    run(monkeypatch, [*flags(small_world, tmp_path / "k", epochs=500), "--resume", "--steps", str(done + 2)])
    run(monkeypatch, flags(small_world, tmp_path / "s", epochs=500, steps=done + 2))
    assert same_bits(tmp_path / "k", tmp_path / "s")
    steps = [json.loads(line)["step"] for line in open(tmp_path / "k/log.jsonl")]
    assert steps == list(range(1, done + 3))  # steps after the checkpoint are logged only once


def test_frozen_tensors_keep_every_bit(small_world, tmp_path, monkeypatch):
    kept, build = {}, train.build

    def spy(*args):
        kept["model"], tokenizer = build(*args)
        kept["before"] = {n: p.clone() for n, p in kept["model"].named_parameters()}
        return kept["model"], tokenizer

    monkeypatch.setattr(train, "build", spy)
    run(monkeypatch, flags(small_world, tmp_path, steps=4))
    changed = {n for n, p in kept["model"].named_parameters() if not torch.equal(p, kept["before"][n])}
    assert changed == {n for n in kept["before"] if "adapter_" in n}


@pytest.mark.parametrize("choice", [["--no-vision", "--adapter", "rep"],
                                    ["--no-vit_adapters", "--adapter", "rep"]])
def test_rows_of_table_2_train_and_answer(small_world, tmp_path, monkeypatch, capsys, choice):
    run(monkeypatch, [*flags(small_world, tmp_path, steps=2, split="test", max_new_tokens=4), *choice])
    assert "NAT" in capsys.readouterr().out
    answers = json.loads((tmp_path / "predictions.json").read_text())
    assert len(answers) == 8 and json.loads((tmp_path / "scores.json").read_text())["columns"]["Avg"][1] == 8


def test_mistakes_are_one_line(small_world, tmp_path, monkeypatch):
    def message(*argv, **kw):
        text = fails(monkeypatch, [*flags(small_world, tmp_path / "out", **kw), *argv])
        assert "\n" not in text.strip() and "Traceback" not in text
        return text

    assert "known: mm, rep" in message("--dry_run", adapter="nonesuch")
    assert "expected an even number" in message("--dry_run", adapter_dim=7)
    assert "no such folder of LLaMA weights" in message(llama=tmp_path / "none")
    assert "no such folder of CLIP weights" in message(clip=tmp_path / "none")
    assert "problems.json: no such file" in message(data=tmp_path / "none")
    assert "no split 'dev'; it has" in message(split="dev")
    assert "unknown prompt format 'QCM'" in message(format="QCM")
    assert "known: imagenet, clip" in message(normalize="nonesuch")
    assert "known: mm, rep" in message(adapter="nonesuch")
    assert "known: auto, fp32, bf16" in message(dtype="int3")
    assert "nothing to resume from" in message("--resume")
    assert "--adapter_dim 7: expected an even number" in message(adapter_dim=7)
    assert "more than the LLaMA's context" in message(max_len=10 ** 6)
    assert "no sample of the train split" in message(max_len=2)


@pytest.mark.parametrize("argv, message", [
    (["--micro_batch", "0"], "--micro_batch 0: expected a number of at least 1"),
    (["--batchsize", "3"], "unknown flag --batchsize; did you mean --batch_size"),
    (["--zzzz"], "unknown flag --zzzz; see --help"),
    (["--recipe", "soup"], "known: tiny, paper"),
    (["--batch_size", "many"], "invalid int value")])
def test_mistakes_in_flags_exit_with_2(monkeypatch, capsys, argv, message):
    assert fails(monkeypatch, argv) == "2" and message in capsys.readouterr().err


def test_mistakes_in_resuming_are_one_line(small_world, tmp_path, monkeypatch):
    def message(data=small_world, **kw):
        return fails(monkeypatch, [*flags(data, tmp_path / "r", **kw), "--resume"])

    run(monkeypatch, flags(small_world, tmp_path / "r", steps=1))
    assert "--resume continues a run with lr 0.048, not 0.5" in message(lr=0.5)
    world.write(tmp_path / "other", seed=6, sizes={"test": 8, "val": 4, "train": 40})
    assert "--resume continues a run with data" in message(tmp_path / "other")
    (tmp_path / "r/checkpoint.pt").write_bytes(b"not a checkpoint")
    assert "checkpoint.pt: damaged or cut short" in message()


def test_a_bad_picture_is_one_line_with_and_without_workers(tmp_path, monkeypatch):
    world.write(tmp_path / "w", seed=5, sizes={"test": 8, "val": 4, "train": 24})
    for image in (tmp_path / "w/images/train").rglob("*.png"):
        image.write_bytes(b"no picture")
    for workers in (0, 1):
        text = fails(monkeypatch, flags(tmp_path / "w", tmp_path / "out", workers=workers))
        assert "image.png: " in text and "\n" not in text.strip() and "Traceback" not in text


def test_a_run_that_diverges_in_its_last_step_writes_nothing(small_world, tmp_path, monkeypatch):
    text = fails(monkeypatch, flags(small_world, tmp_path, steps=1, lr=1e30, warmup=0))
    assert "the training run diverged" in text and "\n" not in text
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.pt"))


def test_a_loss_that_is_not_finite_stops_the_run(small_world, tmp_path, monkeypatch):
    text = fails(monkeypatch, flags(small_world, tmp_path, steps=20, lr=1e30, warmup=0))
    assert "is not finite; its samples: " in text and "\n" not in text
    if (tmp_path / "checkpoint.pt").exists():
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["adapters"]
        assert all(x.isfinite().all() for x in saved.values())


def test_weight_decay_shrinks_matrices_only():
    params = {"matrix": torch.nn.Parameter(torch.ones(2, 2)), "vector": torch.nn.Parameter(torch.ones(2))}
    optimizer = train.optimizer_for(params, train.Config(weight_decay=0.1))
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    assert torch.allclose(params["matrix"], torch.tensor(0.95)) and params["vector"].eq(1).all()


@pytest.mark.parametrize("largest", [0, 1e-3, 1e6])
def test_the_gradient_is_clipped_to_its_largest_norm(small_world, tmp_path, monkeypatch, largest):
    run(monkeypatch, flags(small_world, tmp_path, steps=1, clip_grad=largest))
    norm = json.loads((tmp_path / "log.jsonl").read_text())["grad_norm"]  # before clipping
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]["state"].values()
    used = sum(s["exp_avg"].square().sum() for s in state).sqrt().item() / 0.1  # beta1 is 0.9
    assert used == pytest.approx(1e-3 if largest == 1e-3 else norm, rel=1e-3)


def test_the_paper_recipe_has_the_papers_values():
    cfg = cli.parse(train.Config, train.RECIPES, ["--recipe", "paper"])
    assert (cfg.epochs, cfg.batch_size, cfg.weight_decay, cfg.warmup) == (20, 32, 0.02, 2)
    assert (cfg.adapter_dim, cfg.tau, cfg.format, cfg.max_len) == (8, 10, "QCM-ALE", 512)
    assert cfg.lr * cfg.batch_size / 256 == pytest.approx(1.125e-3)
    tiny = cli.parse(train.Config, train.RECIPES, ["--epochs", "1"])
    assert tiny.epochs == 1 and tiny.format == "QCM-EA"


def test_dashes_in_flags_are_underscores():
    argv = ["--dry-run", "--no-vit-adapters", "--micro-batch=4", "--out", "my-run"]
    cfg = cli.parse(train.Config, train.RECIPES, argv)
    assert cfg.dry_run and not cfg.vit_adapters and cfg.micro_batch == 4 and cfg.out == "my-run"


def test_schedule_warms_up_and_ends_at_zero():
    rates = [train.schedule(i, 10, 100) for i in range(101)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1 and rates[100] == 0
    assert rates[55] == pytest.approx(0.5)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_help_shows_defaults_and_comments(capsys):
    with pytest.raises(SystemExit):
        cli.parse(train.Config, train.RECIPES, ["--help"])
    text = capsys.readouterr().out
    for f in dataclasses.fields(train.Config):
        assert f"--{f.name}" in text
    assert "base learning rate; the rate used is lr x batch_size / 256" in " ".join(text.split())
