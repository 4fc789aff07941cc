"""What the README promises exists: files, flags, make targets, and a home for every equation."""
import dataclasses
import re
import shlex

from conftest import ROOT

import evaluate
import sample
import train
from speed import bench

README = (ROOT / "README.md").read_text()
CODE = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
SCRIPTS = {"train.py": train.Config, "sample.py": sample.Config, "evaluate.py": evaluate.ScienceQA, "speed.bench": bench.Config}


def test_commands_use_flags_that_exist():
    seen = 0
    for line in CODE.splitlines():
        words = shlex.split(line, comments=True)
        script = next((w for w in words if w in SCRIPTS), None)
        if script:
            config = SCRIPTS[script]
            if script == "evaluate.py":
                config, _ = evaluate.COMMANDS.get([*words, ""][words.index(script) + 1], evaluate.COMMANDS["scienceqa"])
            fields = {f.name for f in dataclasses.fields(config)}
            flags = [w[2:].removeprefix("no-") for w in words[words.index(script):] if w.startswith("--")]
            assert set(flags) <= fields, line
            seen += 1
    assert seen >= 8


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", CODE, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_files_it_names_exist():
    for name in re.findall(r"`([\w/]+\.(?:py|png|txt))`", README):
        assert (ROOT / name).is_file(), name


def test_equation_map():
    """each function that the map names holds the tag of its equation"""
    rows = re.findall(r"^\| Eq\. \((\d)\)[^|]*\| (.*?) \|$", README, re.M)
    assert [int(n) for n, _ in rows] == list(range(1, 9))
    source = {f.name: f.read_text() for f in ROOT.glob("*.py")}
    for n, places in rows:
        for place in re.findall(r"`(\w+(?:\.\w+)?)`", places.split(";")[0]):
            body = [re.search(rf"^( *)def {place.split('.')[-1]}\(.*?(?=^\1\S|\Z)", text, re.M | re.S) for text in source.values()]
            text = [re.search(rf"^class {place.split('.')[0]}\b.*?(?=^\S|\Z)", t, re.M | re.S) for t in source.values()] if "." in place else body
            found = [m[0] for m in text if m]
            if "." in place:
                method = place.split(".")[1]
                found = [m[0] for f in found if (m := re.search(rf"^    def {method}\(.*?(?=^    (?:def|@)|\Z)", f, re.M | re.S))]
            assert any(f"Eq. ({n})" in f for f in found), f"Eq. ({n}) is not tagged in {place}"
