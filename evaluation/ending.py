"""How a command ends before it is done: Ctrl-C, SIGTERM, a full memory, a process of torchrun that died."""
import errno
import os
import re
import signal
import socket
import sys
import time
from contextlib import contextmanager

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE
PEERS = []  # [(host, process id)] of all ranks
DEAD = ("rank {} ended before the others (its message is above, if it could print one; the system may have "
        "killed it for its memory); this run stops with it. Run the same command again: train.py with "
        "--resume, evaluate.py with the same --out")


def say(text: str) -> None:
    """One line on stderr that nothing can interrupt or divide."""
    os.write(2, f"{os.path.basename(sys.argv[0])}: {text}\n".encode())


def at_once(*_) -> None:
    """Ctrl-C while modules are imported. No exception: some imports turn it into an error of their own."""
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


def handle_signals(folder: str) -> None:
    """End in one line on Ctrl-C, from here on, if the running command is a file of `folder`."""
    command = getattr(sys.modules["__main__"], "__file__", None)
    if command and os.path.dirname(os.path.abspath(command)) == folder:
        signal.signal(signal.SIGINT, at_once)


def terminated(*_) -> None:
    report_dead_rank()
    raise SystemExit(143)


def one_line(text: str) -> str:
    """Without line breaks, control characters and the middle of a long text, which files can bring along."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.splitlines()))
    return text if len(text) <= 1000 else f"{text[:700]} .. {text[-200:]}"


def message(e: BaseException) -> str:
    """The line for a user's mistake, a full disk behind stdout or a full memory; "" for a bug of ours."""
    if isinstance(e, OSError) and e.errno in FULL and not e.filename:  # saving.py names our own files
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again when it ends, and fails again
        return f"the output was not written ({e.strerror})"
    if isinstance(e, (ValueError, OSError)):
        text = str(e).strip()
        if text.startswith("Caught "):  # by a DataLoader's worker: its traceback, which ends with the message
            text = text.splitlines()[-1].removeprefix(f"{type(e).__name__}: ")
        return one_line(text)
    full = "(out of|allocate|not enough) memory|start new thread"
    if isinstance(e, MemoryError) or re.search(full, str(e)):
        return "out of memory or threads; use a smaller model, --micro_batch, --batch_size or --workers"
    return ""


def dead_ranks() -> list[int]:
    """The ranks of this host whose process has ended."""
    here, dead = socket.gethostname(), []
    for rank, (host, pid) in enumerate(PEERS):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as f:  # Linux keeps a killed process until its parent asks for it
                ended = f.read().rpartition(") ")[2][0] in "ZX"
        except ProcessLookupError:
            ended = True
        except OSError:  # no /proc here
            ended = False
        if ended and host == here:
            dead.append(rank)
    return dead


def report_dead_rank(wait: float = 0) -> bool:
    """Whether a rank has ended. The lowest rank that is alive prints which; the others wait for that line.

    wait: seconds to wait for the end of a rank whose connections are closed already
    """
    until = time.time() + wait
    while not (dead := dead_ranks()) and time.time() < until:
        time.sleep(0.05)
    if dead:
        alive = set(range(len(PEERS))) - set(dead)
        PEERS.clear()  # report once
        if os.environ["RANK"] == str(min(alive)):
            say(DEAD.format(" and ".join(map(str, dead))))
        else:
            time.sleep(1)
    return bool(dead)


@contextmanager
def watched():
    """For a process group: if a collective fails because a rank has ended, end in one line."""
    import torch.distributed as dist

    mine = socket.gethostname(), os.getpid()
    PEERS[:] = [mine] * dist.get_world_size()
    dist.all_gather_object(PEERS, mine)
    try:
        yield
    except RuntimeError:
        if not report_dead_rank(wait=5):
            raise
        raise SystemExit(1) from None
    finally:
        PEERS.clear()
