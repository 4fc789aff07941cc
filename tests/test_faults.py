"""Faults from outside, such as kills, full disks and Ctrl-C: each ends in one line and loses nothing."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TWO_PROCESSES, run_main

import evaluate
import lavin
import train
from official import saving
from tiny import world

TINY = ["--llama", str(ROOT / "tiny/llama"), "--clip", str(ROOT / "tiny/clip"), "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    world.write(folder, seed=5, sizes={"test": 8, "val": 4, "train": 48})
    return folder


def flags(data: Path, out: Path, *more: str) -> list[str]:
    return [*TINY, "--data", str(data), "--out", str(out), "--split", "", "--batch_size", "8",
            "--warmup", "0", "--save_every", "1", "--log_every", "1", *more]


def fails(monkeypatch, main, *argv) -> str:
    with pytest.raises(SystemExit) as e:
        run_main(monkeypatch, main, *argv)
    assert "\n" not in str(e.value.code)
    return str(e.value.code)


def start(command: list, until: Path) -> subprocess.Popen:
    """Start a command and wait until it has written a file."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not until.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process


def test_the_advice_of_a_diverged_run_works(data, tmp_path, monkeypatch):
    """It is to start again with a lower --lr, because --resume does not accept another --lr."""
    told = fails(monkeypatch, train.main, *flags(data, tmp_path, "--steps", "9", "--lr", "1e30"))
    assert re.search("start (it )?again with a lower --lr", told) and "--resume" not in told
    run_main(monkeypatch, train.main, *flags(data, tmp_path, "--steps", "1", "--lr", "0.01"))
    assert (tmp_path / "adapters.safetensors").is_file()


def test_two_runs_in_one_folder_are_refused_and_spoil_nothing(data, tmp_path, monkeypatch):
    first = start([sys.executable, "train.py", *flags(data, tmp_path, "--epochs", "900")],
                  tmp_path / "checkpoint.pt")
    try:
        for more in ((), ("--resume",)):
            told = fails(monkeypatch, train.main, *flags(data, tmp_path, "--epochs", "900", *more))
            assert "train.lock: another run is writing here" in told
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    steps = [json.loads(line)["step"] for line in open(tmp_path / "log.jsonl") if line.endswith("\n")]
    assert steps == list(range(1, len(steps) + 1))
    done = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    more = "--epochs", "900", "--resume", "--steps"  # the killed run left the file of the lock, but no lock
    run_main(monkeypatch, train.main, *flags(data, tmp_path, *more, str(done + 1)))
    assert f"belongs to a run that has done {done + 1} steps" in fails(
        monkeypatch, train.main, *flags(data, tmp_path, *more, str(done)))


def test_two_evaluations_of_one_file_are_refused(tmp_path, monkeypatch):
    holder = ("import time; from official.saving import lock_folder; "
              f"lock_folder({str(tmp_path)!r}, 'p.jsonl.lock'); open({str(tmp_path / 'on')!r}, 'w'); "
              "time.sleep(99)")
    process = start([sys.executable, "-c", holder], tmp_path / "on")
    world.write(tmp_path / "w", seed=5, sizes={"test": 2, "val": 0, "train": 0})
    argv = [*TINY, "--adapters", ROOT / "tiny/adapters.safetensors", "--data", tmp_path / "w", "--any_base"]
    try:
        told = fails(monkeypatch, evaluate.main, *argv, "--out", tmp_path / "p.jsonl")
    finally:
        process.kill()
        process.communicate()
    assert "p.jsonl.lock: another run is writing here" in told and not (tmp_path / "p.jsonl").exists()


def test_a_folder_is_claimed_once_per_process(tmp_path):
    for _ in range(2):
        assert saving.lock_folder(tmp_path / "a", "x.lock") == tmp_path / "a"
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="x.lock: not written"):
        saving.lock_folder(tmp_path / "file", "x.lock")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    with pytest.raises(OSError, match="^/dev/full: not written .No space left on device"):
        with open("/dev/full", "ab", buffering=0) as f:
            saving.append(f, "a line")
    command = [sys.executable, "weights.py", "show", "tiny/llama"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.stderr == "weights.py: the output was not written (No space left on device)\n"
    assert done.returncode == 1


def test_a_file_that_is_cut_short_by_the_disk_is_an_error(tmp_path):
    """A nearly full disk accepts a part of the bytes and reports nothing."""
    class NearlyFull:
        name = "p.jsonl"

        def write(self, content: bytes) -> int:
            return len(content) - 1

    with pytest.raises(OSError, match="p.jsonl: not written"):
        saving.append(NearlyFull(), "a line")


def test_a_failed_write_keeps_the_old_file(tmp_path):
    saving.write_atomically(tmp_path / "x", b"old")
    with pytest.raises(KeyboardInterrupt):
        with saving.atomic(tmp_path / "x") as f:
            f.write(b"new")
            raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"old"


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(sorted(f.name for f in tmp_path.iterdir())))
    saving.write_atomically(tmp_path / "x", b"new")
    assert synced == [["x.part"]]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a rank as Linux shows it")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_is_one_line_and_ends_the_others(data, tmp_path, victim):
    command = [*TWO_PROCESSES, "train.py", *flags(data, tmp_path, "--epochs", "900")]
    launcher = start(command, tmp_path / "checkpoint.pt")
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in children:
        if f"RANK={victim}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            os.kill(int(pid), signal.SIGKILL)
    err = launcher.communicate(timeout=60)[1]
    ours = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert len(ours) == 1 and ours[0].startswith(f"train.py: rank {victim} ended before the others")
    assert "--resume" in ours[0] and launcher.returncode == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


@pytest.mark.parametrize("command", ["train.py", "evaluate.py", "sample.py", "weights.py", "web.py"])
def test_ctrl_c_during_the_imports_is_one_line(command, data, tmp_path):
    """numpy, for one, turns a KeyboardInterrupt during its import into an AttributeError."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(
        f"import time\nopen({str(tmp_path / 'ready')!r}, 'w')\n"
        "try:\n    for _ in range(3000): time.sleep(0.01)\n"  # Python looks for signals before each sleep
        "except BaseException:\n    raise AttributeError")
    process = subprocess.Popen([sys.executable, ROOT / command, "--data", data], cwd=tmp_path, text=True,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1].strip() == "interrupted" and process.returncode == 130


@pytest.mark.parametrize("change, message", [
    (lambda s: [s], "not a checkpoint"), (lambda s: {**s, "step": "3"}, "not a checkpoint"),
    (lambda s: {**s, "step": -1}, "not a checkpoint"), (lambda s: {**s, "run": [1]}, "not a checkpoint"),
    (lambda s: {**s, "run": {"lr": torch.ones(2)}}, "not a checkpoint"),
    (lambda s: {**s, "adapters": 3}, "not a checkpoint"),
    (lambda s: {**s, "adapters": {"a": [1]}}, "a is a list, expected a dense tensor"),
    (lambda s: {**s, "adapters": {}}, "lacks adapter_modality_embedding.weight"),
    (lambda s: {**s, "optimizer": {}}, "the optimizer's state is not that of this model"),
    (lambda s: {**s, "optimizer": {"state": {0: 1}}}, "the optimizer's state is not that of this model"),
    (lambda s: {**s, "optimizer": {"state": {**s["optimizer"]["state"], 0: {}}}}, "the optimizer's state"),
])
def test_a_checkpoint_of_another_structure_is_one_line(data, tmp_path, monkeypatch, change, message):
    file = tmp_path / "checkpoint.pt"
    run_main(monkeypatch, train.main, *flags(data, tmp_path, "--steps", "1"))
    torch.save(change(torch.load(file, weights_only=True)), file)
    told = fails(monkeypatch, train.main, *flags(data, tmp_path, "--steps", "2", "--resume"))
    assert "checkpoint.pt: " in told and message in told


def test_a_full_memory_is_one_line(monkeypatch):
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):
        def main(error=error):
            raise error
        assert "out of memory or threads; use a smaller model" in fails(monkeypatch, main)
    with pytest.raises(RuntimeError, match="a bug"):
        run_main(monkeypatch, lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_a_temperature_near_zero_is_greedy():
    """Divided by 1e-300 the logarithms are infinite and their softmax is NaN: any token was chosen once."""
    p = torch.tensor([[0.2, 0.5, 0.3]])
    for temperature in (0.0, 1e-300, 1e-9, 1e-4):
        assert lavin.pick(p, temperature, 0.75, torch.Generator().manual_seed(0)).tolist() == [1]
