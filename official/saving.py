"""Write files so that a fault loses nothing: a kill, a full disk, a second run in the same place.

An error while writing becomes an OSError of one line that names the file.
"""
import errno
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Iterator

HELD = {}  # {path: the open lock file}; the system drops a lock when its process ends, however it ends


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Turn an OSError into one that names `path`: those of a full disk name no file."""
    try:
        yield
    except OSError as e:
        raise OSError(f"{path}: not written ({e.strerror or e}); mend that, then run the same command again, "
                      "train.py with --resume") from None


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Write a temporary file, fsync, rename: after a fault there is the old file or the new one."""
    part = path.with_name(path.name + ".part")
    try:
        with named(path):
            with open(part, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()  # give back what it takes of a full disk
        raise


def write_atomically(path: Path, content: bytes) -> None:
    with atomic(path) as f:
        f.write(content)


def append(file: BinaryIO, text: str) -> None:
    """Append to an unbuffered file in one system call, so that the lines of several processes do not mix.

    Nearly full disks write part of the text and report no error. That is an error here.
    """
    content = text.encode()
    with named(file.name):
        if file.write(content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def lock_folder(out: str | Path, name: str) -> Path:
    """Make the folder `out` and lock the file `name` in it until this process ends; return the folder.

    ValueError if another process holds the lock. The file stays behind, but the lock does not. It is a POSIX
    record lock: a worker that is forked for the data does not inherit it and cannot keep it after a kill.
    """
    folder = Path(out)
    with named(folder / name):
        folder.mkdir(parents=True, exist_ok=True)
    if (lock := (folder / name).resolve()) not in HELD:
        try:
            import fcntl
        except ImportError:  # Windows has other locks; there, nothing guards the folder
            return folder
        with named(folder / name):
            file = open(lock, "ab")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            file.close()
            if e.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                return folder
            raise ValueError(f"{folder / name}: another run is writing here; wait for it, or give another "
                             "--out") from None
        HELD[lock] = file
    return folder
