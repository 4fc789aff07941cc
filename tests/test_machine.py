"""speed/machine.py hands freed memory back to the system, which glibc would keep."""
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from speed import machine

# prints the MB that 100 tensors of 1 MB leave behind, with small ones between them that are kept
PROGRAM = """if True:
    import re, torch
    from speed import machine

    def resident() -> int:
        return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

    torch.ones(2 ** 21)  # freeing 8 MB teaches glibc to keep pieces of that size
    {first}
    before = resident()
    small, large = zip(*((torch.ones(2 ** 13), torch.ones(2 ** 18)) for _ in range(100)))
    del large
    {last}
    print(resident() - before)
"""


def left_behind(first: str = "", last: str = "") -> int:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(first=first, last=last)], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_goes_back_to_the_system():
    if not Path("/proc/self/status").is_file() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("resident memory is read from Linux's /proc, with glibc")
    assert left_behind() > 80, "glibc keeps freed tensors, or the other two would show nothing"
    assert left_behind(first="machine.keep_no_freed_tensor()") < 20
    assert left_behind(last="machine.release_freed_memory()") < 20


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_left_alone(platform, monkeypatch):
    monkeypatch.setattr(machine.sys, "platform", platform)
    monkeypatch.setattr(machine.ctypes, "CDLL", None)  # calling it would fail
    machine.release_freed_memory()
    machine.keep_no_freed_tensor()
