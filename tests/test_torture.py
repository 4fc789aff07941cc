"""A slice of each part of tests/torture, which `make torture` runs in full."""
import dataclasses
import os
import random
import socket
import time
from pathlib import Path

import pytest
from torture import disk, environments, flags, kills, memory, mutations, precision

import train

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs fork and Linux's /proc")


def survived(rows) -> int:
    """How many things were tried; fails if one was lost."""
    tried = 0
    for row in rows:
        assert not row.lost, f"{row.what}: {row.lost}"
        tried += row.tried
    return tried


def test_mutated_files(tmp_path):
    assert survived(mutations.run(tmp_path, seed=1, count=4)) == 4 * 36


@pytest.mark.parametrize("expected, read", [
    ("traceback: KeyError: 'x'", lambda: {}["x"]), ("unnamed: ", lambda: int("no")),
    ("crash: status 9", lambda: os.kill(os.getpid(), 9)), ("memory: ", lambda: bytearray(2**31)),
    ("hang: ", lambda: time.sleep(9))])
def test_the_mutations_notice_how_a_reader_fails(tmp_path, monkeypatch, expected, read):
    (tmp_path / "x.whole").write_bytes(b"abc")
    monkeypatch.setattr(mutations, "LIMIT", 1)
    target = mutations.Target(tmp_path / "x", mutations.change_bytes, read)
    found = list(mutations.read_all("x", target, tmp_path, seed=0, count=2))
    assert [i for i, _ in found] == [0, 1] and all(told.startswith(expected) for _, told in found), found


def test_flags_at_and_beyond_their_ranges(tmp_path):
    dropout = next(f for f in dataclasses.fields(train.Config) if f.name == "dropout")
    assert {"-1e-06", "1.0"} < set(flags.values(dropout, "a share [0, 1)"))  # both bounds are tried
    assert survived(flags.run(tmp_path, seed=0, count=3)) > 15


@pytest.mark.parametrize("name, ranks", [("train", 1), ("evaluate", 2)])
def test_kills(tmp_path, name, ranks):
    kills.prepare(tmp_path)
    runs = kills.Runs(name, tmp_path, ranks)
    moments = runs.reference()
    assert runs.kill_in_write(random.Random(0).randrange(moments)) == ""
    assert runs.kill_randomly(random.Random(0))[1] == ""


def test_full_disks(tmp_path):
    assert survived(disk.run(tmp_path / "d", seed=0, count=3)) > 30


def test_memory_and_network(tmp_path):
    assert survived(memory.run(tmp_path / "m", seed=0, count=100)) == 5


def test_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "SEEDS", 1)
    assert survived(precision.run(tmp_path / "p", seed=0, count=1)) == 4


def test_the_oldest_versions_are_those_of_the_requirements():
    assert "torch==2.11.*" in environments.oldest() and len(environments.oldest()) == 5


def test_no_test_talks_to_a_network():
    """conftest.py blocks all addresses but this machine's own."""
    for host in ("192.0.2.1", "example.org"):
        with pytest.raises(PermissionError, match="the tests run offline"):
            socket.create_connection((host, 80), timeout=1)
