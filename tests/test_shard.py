"""--shard: two processes keep half of LLaMA's blocks each, and train the adapters as one process does."""
import os
import re
import subprocess

import pytest
from conftest import ROOT, TWO_PROCESSES, run_main
from safetensors.torch import load_file

import train
from tiny import world

SPY = """if True:
    import cli, os, train
    from torch.distributed.tensor import DTensor
    build = train.build

    def counted(*args):
        model, tokenizer = build(*args)
        base = [p for name, p in model.llama.layers.named_parameters() if "adapter_" not in name]
        here = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in base)
        os.write(1, f"share {here / sum(p.nbytes for p in base)}\\n".encode())  # at once, or ranks mix lines
        return model, tokenizer

    train.build = counted
    cli.run(train.main)
"""


def test_a_sharded_run_equals_a_whole_one(tmp_path, monkeypatch):
    """Batches of 7 and of 2: the ranks have unequal shares. One rank's last micro-batch of 1 is empty."""
    world.write(tmp_path / "world", seed=5, sizes={"test": 2, "val": 2, "train": 16})
    (tmp_path / "spy.py").write_text(SPY)
    flags = ["--data", str(tmp_path / "world"), "--device", "cpu", "--batch_size", "7", "--epochs", "20",
             "--warmup", "1", "--lr", "9e-3", "--dropout", "0.1", "--steps", "3",
             "--micro_batch", "1", "--recompute_blocks"]
    run_main(monkeypatch, train.main, *flags, "--out", str(tmp_path / "whole"), "--split", "")
    command = [*TWO_PROCESSES, str(tmp_path / "spy.py"), *flags, "--out", str(tmp_path / "shards"), "--shard"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "sharded, so without a test" in done.stderr
    shares = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(shares) == 2 and all(0.49 < share < 0.51 for share in shares)  # rows of a matrix may be odd
    whole, shards = (load_file(tmp_path / name / "adapters.safetensors") for name in ("whole", "shards"))
    assert whole.keys() == shards.keys()
    for name, x in whole.items():
        assert (x - shards[name]).abs().max() < (1e-5 if ".f_w." in name else 1e-6), name


def test_its_price(capsys, monkeypatch):
    """Each of 8 GPUs keeps an eighth of 13B's 40 blocks, and gathers two of them."""
    peak = {}
    for shard in [], ["--shard"]:
        run_main(monkeypatch, train.main, "--dry_run", "--recipe", "paper", "--llama", "13B", "--clip",
                 "ViT-L/14", *shard)
        peak[bool(shard)] = float(re.search(r"frozen weights +([\d.]+) GB", capsys.readouterr().out)[1])
    blocks = 40 * 2 * (4 * 5120 * 5120 + 3 * 5120 * 13824) / 1e9
    assert peak[False] - peak[True] == pytest.approx(blocks * (1 - 1 / 8 - 2 / 40), abs=0.01)


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    world.write(tmp_path / "world", seed=5, sizes={"test": 2, "val": 2, "train": 4})
    with pytest.raises(SystemExit) as e:
        run_main(monkeypatch, train.main, "--device", "cpu", "--shard", "--data", str(tmp_path / "world"),
                 "--out", str(tmp_path / "out"))
    assert "start with torchrun" in str(e.value.code)
    for more in [], ["--dry_run"]:
        with pytest.raises(SystemExit) as e:
            run_main(monkeypatch, train.main, "--device", "cpu", "--shard", "--bits", "4", "--data",
                     str(tmp_path / "world"), "--out", str(tmp_path / "out"), *more)
        assert "--shard cannot spread matrices in 4 bits" in str(e.value.code)
