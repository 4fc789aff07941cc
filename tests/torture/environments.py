"""`pip install -r requirements.txt` in a clean environment of every Python from 3.10 to 3.13, then a demo.

Each environment trains the first five steps of the demo and runs a few test files. A last one has the oldest
versions that requirements.txt allows. An environment takes up to 6 GB while it is tried, then it is removed.
A Python that this machine does not have is reported as not run.
"""
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Iterator

from . import ROOT, Row

FULL = 5  # environments
TESTS = "tests/test_cli.py", "tests/test_equations.py", "tests/test_prompts.py", "tests/test_faults.py"


def find(version: str) -> str | None:
    """The path of a Python of this version: on PATH, installed by pyenv, or known to uv."""
    places = [shutil.which(f"python{version}"),
              *sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))]
    if shutil.which("uv"):
        asked = subprocess.run(["uv", "python", "find", version], capture_output=True, text=True)
        places.append(asked.stdout.strip())
    for python in filter(None, places):
        try:
            said = subprocess.run([python, "-V"], capture_output=True, text=True).stdout
        except OSError:
            continue
        if said.startswith(f"Python {version}."):
            return python
    return None


def oldest() -> list[str]:
    """The lower bound of every requirement: "numpy>=1.26,<3" -> "numpy==1.26.*"."""
    lines = (ROOT / "requirements.txt").read_text().split()
    bounds = [re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in lines]
    return [f"{name}=={bound}{'.*' if bound.count('.') < 2 else ''}" for name, bound in bounds]


def wrong(python: str, folder: Path, packages: list[str]) -> tuple[str, str]:
    """(what went wrong or "", the versions that were installed)"""
    env = folder / "env"
    shutil.rmtree(env, ignore_errors=True)
    pip = [env / "bin/python", "-m", "pip", "--disable-pip-version-check"]
    demo = ["train.py", "--device", "cpu", "--steps", "5", "--split", "", "--out", folder / "out"]
    commands = [[python, "-m", "venv", env], [*pip, "install", "--quiet", *packages],
                [*pip, "install", "--quiet", "pytest>=8,<10"], [*pip, "freeze"], [env / "bin/python", *demo],
                [env / "bin/python", "-m", "pytest", "-x", *TESTS]]
    versions = ""
    try:
        for command in commands:
            done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                said = (done.stdout + done.stderr).split()[-60:]
                return " ".join([*map(str, command[1:4]), ":", *said]), versions
            if "freeze" in command:
                names = "|".join(name.partition("==")[0] for name in oldest())
                versions = " ".join(re.findall(f"^(?:{names})==.*", done.stdout, re.M))
    finally:
        shutil.rmtree(env, ignore_errors=True)
    return "", versions.replace("==", " ")


def run(folder: Path, seed: int, count: int) -> Iterator[Row]:
    requirements = ["-r", "requirements.txt"]
    tried = [(f"Python {v}", find(v), requirements) for v in ("3.10", "3.11", "3.12", "3.13")]
    for name, python, packages in [*tried, ("oldest versions", sys.executable, oldest())][:count]:
        row = Row(name, note="not run: this machine does not have it")
        if python:
            row.tried = 1
            told, row.note = wrong(python, folder, packages)
            row.lost += [told] * bool(told)
        yield row
