"""Flags from dataclasses: their ranges and their help; each mistake is one line with exit status 2."""
import dataclasses
import math
from dataclasses import dataclass

import cli

import pytest

import evaluate
import train


@dataclass
class Config:
    """What the flags are for."""
    recipe: str = "tiny"  # defaults of the others
    epochs: float = 1.0  # passes over the data [0, inf)
    dropout: float = 0.0  # share of units [0, 1)
    top_p: float = 0.75  # nucleus (0, 1]
    rate: float = 0.5  # both bounds excluded (0, 1)
    shift: int = 0  # both bounds included [-1, 2]
    lr: float = 0.1  # 100% of the rate (0, inf)
    cap: float = 1.0  # may be infinite [0, inf]
    scale: float = 1.0  # any finite number
    batch_size: int = 4  # samples in a step [1, inf)
    seed: int = 0  # any number
    out: str = "out"  # a folder
    dry_run: bool = False  # stop early


@dataclass
class Longer(Config):
    batch_size: int = 8  # a subclass narrows the range [2, inf)


PRESETS = {"tiny": {}, "paper": {"epochs": 20.0, "out": "paper"}}


def parse(*argv, config=Config, presets=None):
    return cli.parse(config, presets, list(argv))


def refused(capsys, *argv, **kw) -> str:
    """the one line on stderr, without the name of the program"""
    with pytest.raises(SystemExit) as e:
        parse(*argv, **kw)
    lines = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(lines) == 1
    return lines[0].partition(": ")[2]


def help_of(capsys, **kw) -> str:
    with pytest.raises(SystemExit) as e:
        parse("--help", **kw)
    assert e.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name, values", [
    ("epochs", "0 0.5 1e9"), ("dropout", "0 0.999"), ("top_p", "1e-9 1"), ("rate", "0.001 0.999"),
    ("shift", "-1 0 2"), ("lr", "1e-30 1e30"), ("cap", "0 inf"), ("scale", "-1 0 1e300"),
    ("batch_size", "1 1000000"), ("seed", f"-5 {10 ** 14}")])
def test_numbers_in_range(name, values):
    for text in values.split():
        kind = type(getattr(Config, name))
        assert getattr(parse(f"--{name}", text), name) == kind(text)


@pytest.mark.parametrize("name, values, expected", [
    ("epochs", "-0.1 -1 inf nan", "a number of at least 0"),
    ("dropout", "-0.1 1 2.0 inf nan", "a number from 0 to below 1"),
    ("top_p", "0 -1 1.001 nan", "a number from above 0 to 1"),
    ("rate", "0 1 nan", "a number from above 0 to below 1"),
    ("shift", "-2 3", "a number from -1 to 2"),
    ("lr", "0 -1 inf nan", "a number above 0"),
    ("cap", "-1 nan", "a number of at least 0"),
    ("scale", "inf nan 1e999", "a finite number"),
    ("batch_size", "0 -3", "a number of at least 1")])
def test_numbers_out_of_range(capsys, name, values, expected):
    for text in values.split():
        value = type(getattr(Config, name))(text)
        assert refused(capsys, f"--{name}", text) == f"--{name} {value}: expected {expected}"
    assert refused(capsys, "--scale=-inf") == "--scale -inf: expected a finite number"


@pytest.mark.parametrize("name, text", [
    ("batch_size", ""), ("batch_size", "many"), ("batch_size", "1.5"), ("batch_size", "inf"), ("lr", ""),
    ("lr", "fast")])
def test_words_are_not_numbers(capsys, name, text):
    kind = type(getattr(Config, name)).__name__
    assert refused(capsys, f"--{name}", text) == f"argument --{name}: invalid {kind} value: {text!r}"
    assert "expected one argument" in refused(capsys, f"--{name}")


def test_a_subclass_overrides_default_and_range(capsys):
    assert parse(config=Longer).batch_size == 8
    told = refused(capsys, "--batch_size", "1", config=Longer)
    assert told == "--batch_size 1: expected a number of at least 2"


def test_a_preset_is_checked_like_a_flag(capsys):
    wrong = {"tiny": {"dropout": 1.0}}
    assert refused(capsys, presets=wrong) == "--dropout 1.0: expected a number from 0 to below 1"
    assert parse("--dropout", "0.5", presets=wrong).dropout == 0.5
    assert math.isnan(dataclasses.replace(Config(), lr=math.nan).lr)  # only parse() checks


def test_a_malformed_range_is_a_failed_assertion():
    assert cli.out_of_range(3, "any comment with [brackets] inside") == ""
    for comment in ("dropout [0, 1", "dropout (0 1]", "dropout [0,1]", "[0, 1) dropout",
                    "dropout [0, 0.5", "x [-1,256]", "x [0, 1).", "x [0;1]"):
        with pytest.raises(AssertionError, match="declare a range like"):
            cli.out_of_range(0.5, comment)


def test_help_shows_what_a_bare_run_uses(capsys):
    text = help_of(capsys, presets=PRESETS)
    assert "passes over the data [0, inf) (default: 1.0; --recipe paper: 20.0)" in text
    assert "a folder (default: out; --recipe paper: paper)" in text
    assert "share of units [0, 1) (default: 0.0)" in text and "100% of the rate (0, inf) (default" in text
    assert parse(presets=PRESETS) == Config() and parse("--recipe", "paper", presets=PRESETS).epochs == 20
    assert parse("--recipe", "paper", "--epochs", "3", presets=PRESETS).epochs == 3


def test_help_where_the_preset_of_a_bare_run_changes_the_default(capsys):
    text = help_of(capsys, presets={"tiny": {"epochs": 0.5}, "paper": {}})
    assert "(default: 0.5; --recipe paper: 1.0)" in text
    assert "--recipe" not in help_of(capsys).replace("--recipe str", "")


def test_only_rank_0_says(capsys, monkeypatch):
    for rank, said in (("1", ""), ("0", "x\n")):
        monkeypatch.setenv("RANK", rank)
        cli.say("x")
        assert capsys.readouterr().err == said and cli.is_main() == (rank == "0")


def test_dashes_are_underscores():
    cfg = parse("--dry-run", "--batch-size=2", "--out", "my-run")
    assert cfg.dry_run and cfg.batch_size == 2 and cfg.out == "my-run" and not parse("--no-dry-run").dry_run
    assert parse("--out=--a-b").out == "--a-b"


def test_an_empty_word_is_refused_unless_it_means_something(capsys):
    for argv in (["--out", ""], ["--out", " "], ["--out=--"], ["--recipe=--"]):
        assert refused(capsys, *argv, presets=PRESETS).startswith(("--out is empty", "unknown --recipe"))
    assert cli.parse(evaluate.ScienceQA, argv=["--out", ""]).out == ""
    assert "--out is empty" in refused(capsys, "--out", " ", config=evaluate.ScienceQA)


def test_unknown_flags_and_recipes(capsys):
    assert refused(capsys, "--batchsize", "3") == "unknown flag --batchsize; did you mean --batch_size?"
    assert refused(capsys, "--zzzz") == "unknown flag --zzzz; see --help"
    near = "did you mean --resume or --recompute_blocks or --save_every?"  # their help texts hold the word
    assert refused(capsys, "--checkpoint", config=train.Config) == f"unknown flag --checkpoint; {near}"
    told = refused(capsys, "--recipe", "soup", presets=PRESETS)
    assert told == "unknown --recipe 'soup'; known: tiny, paper"


@pytest.mark.parametrize("argv, expected", [
    ("--batch_size 0", "a number of at least 1"), ("--limit -1", "a number of at least 0"),
    ("--temperature -0.1", "a number of at least 0"), ("--temperature nan", "a number of at least 0"),
    ("--top_p 0.0", "a number from above 0 to 1"), ("--top_p 1.1", "a number from above 0 to 1"),
    ("--max_new_tokens -1", "a number of at least 0"), ("--seed -1", "a number of at least 0")])
def test_the_ranges_of_evaluate(capsys, argv, expected):
    for config in (evaluate.ScienceQA, evaluate.COCO, evaluate.MME):
        assert refused(capsys, *argv.split(), config=config) == f"{argv}: expected {expected}"
        assert parse("--top_p", "1", "--temperature", "0", "--batch_size", "1", config=config).top_p == 1
    assert refused(capsys, "--limit", "-1", config=evaluate.TruthfulQA).startswith("--limit -1: expected")


def test_a_mistake_is_one_line_whatever_it_quotes(monkeypatch):
    def main():
        raise ValueError("a.json: no field 'x\ny'\u2028z\x1b[2J" + "9" * 5000 + "; restore it")
    monkeypatch.setattr("sys.argv", ["some/train.py"])
    with pytest.raises(SystemExit) as e:
        cli.run(main)
    told = e.value.code
    assert told.startswith("train.py: a.json: no field 'x y' z\\x1b[2J99") and len(told) < 1100
    assert told.endswith("99; restore it")
