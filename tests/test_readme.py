"""What the three texts for readers promise exists: commands, flags, files, links, equations."""
import dataclasses
import importlib
import inspect
import json
import re
import shlex
from operator import attrgetter

import pytest
from conftest import ROOT

import evaluate
import sample
import train
import web
from speed import bench

README, RESULTS, TINY = "README.md", "speed/RESULTS.md", "tiny/README.md"
TEXTS = {name: (ROOT / name).read_text() for name in (README, RESULTS, TINY)}
CONFIGS = {"train.py": train.Config, "sample.py": sample.Config, "web.py": web.Config,
           "speed.bench": bench.Config}
EVALUATE = [config for config, _ in evaluate.COMMANDS.values()]
ALL_FLAGS = {f.name for config in (*CONFIGS.values(), *EVALUATE) for f in dataclasses.fields(config)}


def inline(text: str) -> list[str]:
    """Every `span` of code outside the fenced blocks, on one line."""
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands(text: str) -> list[str]:
    """Every line of a ```sh block, continuation lines joined, and every inline command that runs Python."""
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return blocks.splitlines() + [code for code in inline(text) if re.search(r"\b(python|torchrun) ", code)]


def flags(words: list[str]) -> set[str]:
    return {word[2:].removeprefix("no-") for word in words if word.startswith("--")}


@pytest.mark.parametrize("name, at_least", [(README, 14), (RESULTS, 9), (TINY, 1)])
def test_commands_use_flags_that_exist(name, at_least):
    seen = 0
    for line in commands(TEXTS[name]):
        words = shlex.split(line, comments=True)
        script = next((w for w in words if w in (*CONFIGS, "evaluate.py")), None)
        if script:
            after = words[words.index(script) + 1:]
            if script == "evaluate.py":
                command = after[0] if after and not after[0].startswith("-") else "scienceqa"
                config = evaluate.COMMANDS[command][0]
            else:
                config = CONFIGS[script]
                assert script != "speed.bench" or after[0] in bench.COMMANDS, line
            assert flags(after) <= {f.name for f in dataclasses.fields(config)}, line
            seen += 1
        file = next((w for w in words if w.endswith(".py")), None)
        assert file is None or (ROOT / file).is_file(), line
    assert seen >= at_least


@pytest.mark.parametrize("name", TEXTS)
def test_flags_in_prose_exist(name):
    for code in inline(TEXTS[name]):
        assert flags(code.split()) <= ALL_FLAGS, code


@pytest.mark.parametrize("name", TEXTS)
def test_files_it_names_exist(name):
    text = TEXTS[name]
    for file in re.findall(r"`([\w./]+\.(?:py|png|txt|md)|\w+/)`", text):
        assert (ROOT / file).exists(), file
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)|<img src=\"([^\"]+)\"", text):
        assert (ROOT / name).parent.joinpath("".join(target).split("#")[0]).is_file(), target


def test_its_figures_of_the_experiments_are_the_stored_results():
    tables = {name: json.loads((ROOT / f"experiments/results/{name}.json").read_text())["tables"]
              for name in ("table2", "routing")}
    (rows,) = tables["table2"].values()
    figures = [x for x in (row.get("minus row before") for row in rows.values()) if isinstance(x, list)]
    figures.append(tables["routing"]["flipped"]["MM-Adapter"]["minus RepAdapter"])
    assert len(figures) == 5
    text = " ".join(TEXTS[README].split())
    for mean, error in figures:
        assert f"{mean:.1f} ± {error:.1f}" in text


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "\n".join(commands(TEXTS[README])), re.M)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_it_is_short():
    lines = TEXTS[README].splitlines()
    assert len(lines) <= 180
    assert not [line for text in TEXTS.values() for line in text.splitlines()
                if len(line) > 110 and not line.startswith("|")]


def test_equation_map():
    """Each link leads to the lines that are tagged with its equation, inside what it names."""
    rows = re.findall(r"^\| Eq\. \((\d)\).*\| (\[.*) \|$", TEXTS[README], re.M)
    assert [int(n) for n, _ in rows] == [1, 2, 3, 3, 4, 5, 6, 7, 8]
    for n, cell in rows:
        link = re.fullmatch(r"\[(\w+)\.py:(\d+)\]\((\w+)\.py#L(\d+)\): `([\w.]+)`", cell)
        assert link, cell
        module, line, target, target_line, name = link.groups()
        assert (module, line) == (target, target_line)
        lines, first = inspect.getsourcelines(attrgetter(name)(importlib.import_module(module)))
        tagged = [first + i for i, text in enumerate(lines) if f"# Eq. ({n}):" in text]
        assert [int(line)] == tagged, f"Eq. ({n}) in {name}: {module}.py:{tagged}, not {line}"
