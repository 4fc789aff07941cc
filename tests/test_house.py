"""The plan of the repository: what lies at the root, how long it is, and what it may import."""
import ast
from pathlib import Path

import pytest
from conftest import ROOT

ROOT_FILES = sorted(ROOT.glob("*.py"))
MODELS = "adapters.py", "llama.py", "clip.py", "lavin.py", "data.py"
CARD = "adapters.py", "llama.py", "clip.py", "lavin.py", "train.py", "sample.py"  # read beside the paper
BUDGETS = {"adapters.py": 160, "llama.py": 230, "clip.py": 190, "lavin.py": 240, "data.py": 200,
           "train.py": 250, "sample.py": 160}  # lines
FOLDERS = "official", "evaluation", "speed", "experiments", "tiny", "tests", "tests/torture"
SOURCES = [*ROOT_FILES, *(f for name in FOLDERS for f in sorted((ROOT / name).glob("*.py")))]


def lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def imports(file: Path) -> set[str]:
    """The modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_root_is_short():
    assert len(ROOT_FILES) <= 13, [f.name for f in ROOT_FILES]
    assert sum(len(lines(f)) for f in ROOT_FILES if f.name != "web.py") <= 2500  # the page is an extra
    assert sum(len(lines(ROOT / name)) for name in CARD) <= 1230
    assert {name: len(lines(ROOT / name)) for name, most in BUDGETS.items()
            if len(lines(ROOT / name)) > most} == {}


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_line_is_long(file):
    assert [n for n, line in enumerate(lines(file), start=1) if len(line) > 110] == []


def test_no_machinery_at_the_root():
    for file in ROOT_FILES:
        text = file.read_text(encoding="utf-8")
        for word in ("is_compiling", "/proc/", "_inductor", "autograd.Function"):
            assert word not in text, f"{file.name}: {word}"


def test_models_import_nothing_that_measures():
    forbidden = {"speed", "evaluation", "cli", "tiny"}
    for name in MODELS:
        assert not forbidden & {module.split(".")[0] for module in imports(ROOT / name)}, name


def test_imports_are_a_tree():
    """No file of the project imports, directly or through others, a file that imports it."""
    sources = [f for f in SOURCES if "tests" not in f.relative_to(ROOT).parts]
    files = {str(f.relative_to(ROOT).with_suffix("")).replace("/", "."): f for f in sources}
    arrows = {name: imports(file) & files.keys() - {name} for name, file in files.items()}
    while arrows:
        leaves = {name for name, targets in arrows.items() if not targets & arrows.keys()}
        assert leaves, f"these import each other: {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in leaves}
