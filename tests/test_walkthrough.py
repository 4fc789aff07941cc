"""walkthrough.py prints tiny/walkthrough.txt, and stops where an equation no longer agrees with naive.py."""
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

NUMBER = r"-?\d+\.\d+"
DIFFERENCE = r"(largest difference +)(\S+)"

# one line of each equation: file, code, the same code with a mistake
MISTAKES = {
    1: ("lavin.py", "t_m = m @ E_m", "t_m = m.flip(0) @ E_m"),
    2: ("adapters.py", "return z + self.cfg.scale * mixed", "return self.cfg.scale * mixed"),
    3: ("adapters.py", "w_0 * f_a1 + w_1 * f_a2", "w_1 * f_a1 + w_0 * f_a2"),
    4: ("adapters.py", "model.requires_grad_(False)", "model.requires_grad_(True)"),
    5: ("lavin.py", "-log_p_R.sum()", "-log_p_R.mean()"),
    6: ("lavin.py", "self.W_u(F.silu(self.W_d(X)))", "self.W_u(F.gelu(self.W_d(X)))"),
    7: ("lavin.py", "[Y_head, X_prime, Y_rest]", "[X_prime, Y_head, Y_rest]"),
    8: ("lavin.py", "torch.softmax(logits, -1)", "torch.softmax(-logits, -1)"),
}


# torch is imported once; then each folder gets a process of its own, which imports the rest
FORKS = """if True:
    import os, runpy, sys, torch

    for folder in sys.argv[1:]:
        if not os.fork():
            os.chdir(folder)
            os.dup2(os.open("stderr", os.O_CREAT | os.O_WRONLY), 2)
            sys.path[0] = folder
            try:
                runpy.run_path("walkthrough.py")
            except AssertionError as e:
                print("AssertionError:", e, file=sys.stderr, flush=True)
            os._exit(0)
        os.wait()
"""


def run(*command, folder=ROOT) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True,
                          timeout=300)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> dict[int, str]:
    """What the walkthrough in a copy of the repository with a mistake in Eq. (n) says last, for every n."""
    folders = []
    for n, (file, code, mistake) in MISTAKES.items():
        source = (ROOT / file).read_text()
        assert source.count(code) == 1, f"Eq. ({n}): {file} no longer holds {code!r} once; adapt MISTAKES"
        folder = tmp_path_factory.mktemp(f"eq{n}")
        for path in ROOT.glob("*"):
            if path.name not in (file, "walkthrough.py"):
                (folder / path.name).symlink_to(path)
        shutil.copy(ROOT / "walkthrough.py", folder)
        (folder / file).write_text(source.replace(code, mistake))
        folders.append(folder)
    done = run("-c", FORKS, *folders)
    assert done.returncode == 0, done.stderr
    return {n: (folder / "stderr").read_text() for n, folder in zip(MISTAKES, folders)}


def test_prints_what_tiny_walkthrough_txt_holds():
    """Numbers may differ in their last digits: |a - b| < 2e-3 or 0.2 %. A difference has to be below 1e-4."""
    done = run("walkthrough.py")
    assert done.returncode == 0, done.stderr
    printed, saved = done.stdout, (ROOT / "tiny" / "walkthrough.txt").read_text()
    assert all(float(x) < 1e-4 for _, x in re.findall(DIFFERENCE, printed))
    printed, saved = (re.sub(DIFFERENCE, r"\1", text) for text in (printed, saved))
    printed, saved = (re.sub(" #+$", "", text, flags=re.M) for text in (printed, saved))  # the bars
    update = "python walkthrough.py > tiny/walkthrough.txt"
    assert re.sub(NUMBER, "x", printed).split() == re.sub(NUMBER, "x", saved).split(), update
    for a, b in zip(re.findall(NUMBER, printed), re.findall(NUMBER, saved)):
        assert float(a) == pytest.approx(float(b), rel=2e-3, abs=2e-3), update


def test_shows_every_equation_in_short_lines():
    text = (ROOT / "tiny" / "walkthrough.txt").read_text()
    assert re.findall(r"^Eq\. \((\d)\)", text, re.M) == list("12345678")
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("n", MISTAKES)
def test_stops_at_a_mistake_in_an_equation(broken, n):
    expected = "AssertionError: (.* differs from naive.py.* by|others train)"
    assert re.match(expected, broken[n].strip().splitlines()[-1]), broken[n]
