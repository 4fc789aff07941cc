"""Break the project on purpose: kills, mutated files, odd flags, full disks, long runs, other Pythons.

    make torture                                    everything, at most 30 minutes on 2 cores
    python -m tests.torture mutations --count 500 --seed 3      one part, smaller, with another seed

Each part is a file with a function run(folder, seed, count), which yields one `Row` for each thing it tried,
and FULL, the count of a full run. tests/test_torture.py runs a slice of each. README.md has the table.
"""
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TINY = ["--llama", f"{ROOT}/tiny/llama", "--clip", f"{ROOT}/tiny/clip", "--device", "cpu"]

import cli


def checkpoint_of(model, optimizer, flags: dict) -> dict:
    """What train.py writes after its first step."""
    adapters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"step": 1, "run": flags, "optimizer": optimizer.state_dict(), "adapters": adapters}


@dataclass
class Row:
    """One line of the table. `lost` says of each failure what it was and how to see it again."""
    what: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    note: str = ""


def forked(main: Callable, argv: list[str], log: Path, before: Callable = lambda: None, **env: str) -> int:
    """Run a command in a forked process, which needs no imports; its stdout and stderr go to `log`.

    before: called in the process first. Returns the process id. Exit status 70: it ended in a traceback.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        status = run_forked(main, argv, log, before, env)
    finally:  # a late SIGTERM raises SystemExit, which must not leave here: two processes would run the tests
        os._exit(status)


def run_forked(main: Callable, argv: list[str], log: Path, before: Callable, env: dict[str, str]) -> int:
    status = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(out, 1), os.dup2(out, 2)
        sys.stdin, sys.stdout, sys.stderr = (
            open(i, "w" if i else "r", errors="backslashreplace", closefd=False) for i in range(3))
        os.environ.update(env)
        sys.argv = ["command.py", *map(str, argv)]
        before()
        cli.run(main)
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
        print(e.code if isinstance(e.code, str) else "", file=sys.stderr)
    except BaseException as e:
        print(f"Traceback, {type(e).__name__}: {e}", file=sys.stderr)
    finally:
        sys.stdout.flush(), sys.stderr.flush()
    return status


def ended(pid: int, limit: float = 120) -> int | str:
    """The exit status of a forked process, -N if signal N killed it; "hang" if it takes more seconds."""
    until = time.time() + limit
    while time.time() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hang"


def more_memory(n_bytes: int) -> None:
    """From here on, this process may map n_bytes beyond what it has mapped."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + n_bytes
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
