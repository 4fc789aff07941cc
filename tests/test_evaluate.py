"""End to end on small files in the published layouts: train on a mixture, then run evaluate.py's commands."""
import json
import math
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import naive
import numpy as np
import published
import pytest
import torch
from conftest import (
    N_CLS,
    ROOT,
    ROWS,
    TWO_PROCESSES,
    close,
    hidden_of,
    make_batch,
    make_lavin,
    needs_caption_tools,
    one_line,
)
from PIL import Image

import data
import evaluate
import lavin
import prompts
import train
from evaluation import answering, scores
from official.tokenizer import Tokenizer
from speed.step import FoldedLaVIN

TINY = ["--llama", f"{ROOT}/tiny/llama", "--clip", f"{ROOT}/tiny/clip", "--device", "cpu"]
MME = {"existence": 3, "artwork": 2, "code_reasoning": 1}


def call(main, *argv) -> None:
    """run a command in this process; its errors are raised, not printed"""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
        main()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """a folder with every data set, and out/ with adapters trained on a mixture of them"""
    folder = tmp_path_factory.mktemp("published")
    published.scienceqa(folder / "s", {"train": 20, "test": 13})
    published.alpaca(folder / "alpaca_data.json", 9)
    published.coco(published.llava(folder / "coco"))
    published.mme(folder / "mme", MME)
    published.truthfulqa(folder / "mc_task.json")
    mixture = f"alpaca:{folder}/alpaca_data.json,llava:{folder}/coco,coco:{folder}/coco,scienceqa:{folder}/s"
    with pytest.MonkeyPatch.context() as m:
        stderr = []
        m.setattr(sys.stderr, "write", stderr.append)
        call(train.main, "--data", mixture, "--out", folder / "out", *TINY, "--format", "QCM-ALE",
             "--epochs", 4, "--batch_size", 11, "--log_every", 1, "--split", "", "--max_new_tokens", 16)
    (folder / "stderr").write_text("".join(stderr))
    return folder


@pytest.fixture
def run(world, capsys):
    """call evaluate.py with the adapters of `world` -> (stdout, stderr)"""
    def run(*argv):
        call(evaluate.main, argv[0], *TINY, "--adapters", world / "out/adapters.safetensors", *argv[1:])
        return capsys.readouterr()
    return run


@pytest.fixture
def folded(world):
    model, _ = lavin.load(world / "out/adapters.safetensors", ROOT / "tiny/llama", ROOT / "tiny/clip")
    return FoldedLaVIN(model, lavin.TEXT, lavin.IMAGE), Tokenizer(ROOT / "tiny/llama/tokenizer.model")


def test_training_on_a_mixture_counts_its_samples_and_learns(world):
    stderr = (world / "stderr").read_text()
    for line in (f"alpaca:{world}/alpaca_data.json: 8 kept, 0 cut, 1 dropped", f"llava:{world}/coco: 6 kept",
                 f"coco:{world}/coco: 10 kept", f"scienceqa:{world}/s: 20 kept"):
        assert line in stderr
    losses = [json.loads(line)["loss"] for line in open(world / "out/log.jsonl")]
    assert len(losses) == 16 and np.mean(losses[-4:]) < np.mean(losses[:4])


def test_batches_mix_text_and_pictures_at_random(world):
    tokenizer = Tokenizer(ROOT / "tiny/llama/tokenizer.model")
    examples = []
    for source in prompts.mixture(f"alpaca:{world}/alpaca_data.json,coco:{world}/coco,scienceqa:{world}/s"):
        examples += data.encode_all(source.read(), tokenizer, 6, 200)[0]
    steps = data.Steps(examples, 8, 8, 0, 1, 0, 64, "clip")
    assert 18 <= sum(e.n_visual > 0 for e in examples) <= len(examples) - 18
    batches = [[examples[i].n_visual > 0 for i in steps.chosen(k)] for k in range(4 * steps.per_epoch)]
    assert np.mean([len(set(pictures)) == 2 for pictures in batches if len(pictures) == 8]) > 0.9
    batch, = steps[0][0]
    assert set(batch.modality) == {0, 1} and len(batch.images) == sum(batches[0])


# ---------------------------------------------------------------------------------------------------
# the commands

def test_scienceqa(run, world, tmp_path, monkeypatch):
    flags = "--data", world / "s", "--json"
    found = json.loads(run("scienceqa", *flags, "--out", tmp_path / "p.jsonl")[0])
    assert found["columns"]["Avg"][1] == 13 and list(found["accuracy"])[:9] == list(scores.COLUMNS)
    assert json.loads(run("scienceqa", *flags, "--predictions", tmp_path / "p.jsonl")[0]) == found
    assert "paper" not in run("scienceqa", "--data", world / "s", "--limit", 3)[0]
    published.scienceqa(tmp_path / "v", {"train": 4, "val": 3, "test": 3})
    monkeypatch.setattr(scores, "TABLE_1_PROBLEMS", 3)  # val, too, has as many problems as test
    shown, flags = {}, ("--data", tmp_path / "v", "--split")
    for split in "val", "test":
        shown[split] = run("scienceqa", *flags, split)[0]
    assert "LaVIN-7B (paper)" in shown["test"] and "paper" not in shown["val"]


def test_the_default_command_is_scienceqa(world, monkeypatch):
    called = []
    monkeypatch.setattr("tiny.world.ensure", called.append)
    monkeypatch.setitem(evaluate.COMMANDS, "scienceqa", (evaluate.ScienceQA, lambda cfg: called.append(cfg)))
    call(evaluate.main, "--data", world / "s", "--limit", 3)
    call(evaluate.main)
    given, made, default = called
    assert (given.data, given.limit) == (str(world / "s"), 3)
    assert made == default.data == "tiny/data"
    assert (default.limit, default.predictions, default.stop_at_letter) == (0, "", True)


def test_mme_writes_result_files_in_mmes_layout(run, world, tmp_path):
    found = json.loads(run("mme", "--data", world / "mme", "--out", tmp_path, "--json")[0])
    assert sorted(f.stem for f in tmp_path.glob("*.txt")) == sorted(MME)
    for task, n in MME.items():
        rows = [line.split("\t") for line in (tmp_path / f"{task}.txt").read_text().splitlines()]
        assert {len(r) for r in rows} == {4} and [r[2] for r in rows] == ["Yes", "No"] * n
    assert found == json.loads(run("mme", "--results", tmp_path, "--json")[0])
    assert set(found["tasks"]) == set(MME)
    one = run("mme", "--data", world / "mme", "--out", tmp_path / "one", "--tasks", "artwork", "--limit", 1,
              "--json")[0]
    assert json.loads(one)["tasks"]["artwork"]["replies"] == 2


def test_mme_encodes_a_picture_once(run, world, tmp_path, monkeypatch):
    """Each picture has two questions. They share a batch even when batches are small."""
    encoded, forward = [], lavin.VisionTransformer.forward

    def spy(self, images, *args):
        encoded.append(len(images))
        return forward(self, images, *args)

    monkeypatch.setattr(lavin.VisionTransformer, "forward", spy)
    flags = "--data", world / "mme", "--json"
    found = [run("mme", *flags, "--out", tmp_path / str(n), "--batch_size", n)[0] for n in (64, 4)]
    assert encoded == [6, 2, 2, 2] and found[0] == found[1]


def test_coco_captions_the_test_split(run, world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)  # captions are written, but not scored
    out, err = run("coco", "--data", world / "coco", "--out", tmp_path / "c.jsonl")
    assert not out and "will not be scored" in err
    assert set(scores.read_predictions(tmp_path / "c.jsonl")) == {"103", "104"}


def test_coco_is_scored(run, world, tmp_path):
    needs_caption_tools()
    found = json.loads(run("coco", "--data", world / "coco", "--out", tmp_path / "c.jsonl", "--json")[0])
    call(evaluate.main, "coco", "--predictions", tmp_path / "c.jsonl",
         "--references", world / "coco/dataset_coco.json")
    assert found["pictures"] == 2


def test_truthfulqa_equals_a_naive_recomputation(run, world, tmp_path, folded):
    """The recomputation takes each answer alone and sums its tokens' log-probabilities in float64."""
    flags = "--data", world / "mc_task.json", "--json"
    found = json.loads(run("truthfulqa", *flags, "--out", tmp_path / "t.jsonl")[0])
    written = scores.read_predictions(tmp_path / "t.jsonl")
    model, tokenizer = folded
    mc1, mc2 = [], []
    for i, q in enumerate(json.loads((world / "mc_task.json").read_text())):
        p = {}
        for answer in {**q["mc1_targets"], **q["mc2_targets"]}:
            asked = f"Instruction: {q['question']}\nResponse:"
            head = [1] + tokenizer.encode("Image: N/A")
            ids, n = head + tokenizer.encode(asked + answer), len(head) + len(tokenizer.encode(asked))
            with torch.no_grad():
                logits = model.llama.output(hidden_of(model.llama, torch.tensor([ids])))[0].double().numpy()
            logp = [np.log(naive.softmax(logits[t - 1])[ids[t]]) for t in range(n, len(ids))]
            assert len(logp) > 0 and written[str(i)][answer] == pytest.approx(sum(logp), rel=1e-5)
            p[answer] = math.exp(sum(logp))
        best = max(q["mc1_targets"], key=lambda a: p[a])
        mc1.append(q["mc1_targets"][best])
        mc2.append(sum(p[a] for a, y in q["mc2_targets"].items() if y) / sum(p[a] for a in q["mc2_targets"]))
    assert found["MC1"] == 100 * np.mean(mc1) and found["MC2"] == pytest.approx(100 * np.mean(mc2), rel=1e-4)
    again = run("truthfulqa", *flags, "--predictions", tmp_path / "t.jsonl")[0]
    assert json.loads(again) == found


def test_own_data(run, world, tmp_path):
    """Every record is answered. Text-only adapters answer without opening, or needing, the pictures."""
    colors = {name: published.picture(tmp_path / f"pics/{name}.png", name) for name in published.COLORS}
    rows = [{"instruction": "What color?", "image": f"{name}.png", "output": name} for name in colors]
    rows += [{"instruction": f"Name {k} colors."} for k in (2, 3)]
    file = published.put(tmp_path / "own.json", rows)
    flags = "--data", f"json:{file}", "--images", tmp_path / "pics"
    found = json.loads(run("json", *flags, "--json", "--out", tmp_path / "p.jsonl")[0])
    assert {name: n for name, (_, *n) in found["counts"].items()} == {
        "with a picture": [4, 4], "without": [0, 2], "all": [4, 6]}
    said = scores.read_predictions(tmp_path / "p.jsonl")
    assert sorted(said) == [f"own:{i}" for i in range(6)] and len({said[f"own:{i}"] for i in range(4)}) > 1
    for i in range(6):  # an answer that is taken over as the record's own is right
        rows[i]["output"] = f" {said[f'own:{i}'].upper()} "
    published.put(file, rows)
    again, err = run("json", *flags, "--json", "--out", tmp_path / "p.jsonl")
    assert json.loads(again)["exact_match"]["all"] == 100 and "6 predictions are there, 0 to go" in err
    assert json.loads(run("json", *flags, "--json", "--limit", 3)[0])["counts"]["all"] == [3, 3, 3]
    with pytest.raises(ValueError, match="own/red.png: no such picture, needed by sample own:0 .and 3 more"):
        run("json", "--data", file, "--images", tmp_path / "own")
    call(train.main, "--data", f"json:{file}:{tmp_path}/pics", "--out", tmp_path / "text", *TINY,
         "--no-vision", "--adapter", "rep", "--steps", 1)
    text_only = "--adapters", tmp_path / "text/adapters.safetensors"
    found = json.loads(run("json", "--data", file, *text_only, "--json", "--out", tmp_path / "t.jsonl")[0])
    assert found["counts"]["with a picture"][1:] == [4, 4]
    said = scores.read_predictions(tmp_path / "t.jsonl")
    assert len({said[f"own:{i}"] for i in range(4)}) == 1  # one question, and no picture tells them apart


# ---------------------------------------------------------------------------------------------------
# stopping at the letter

def test_a_complete_row_ends_and_the_others_stay_unchanged():
    model = make_lavin()
    batch = make_batch(ROWS)
    whole = model.generate(batch, 12, eos=-1, temperature=0.0)
    complete = lambda ids: ids[-1] % 4 == 1 or len(ids) == 9
    ends = [next(i for i in range(12) if complete(ids[: i + 1])) + 1 for ids in whole]
    assert len(set(ends)) > 1 and min(ends) < 9
    steps = []
    decode = model.decode
    model.decode = lambda *args: steps.append(1) or decode(*args)
    answers = answering.generate(model, batch, 12, -1, complete, temperature=0.0)
    assert len(steps) == max(ends) - 1  # one step per token after the first, and not one more
    assert answers == [ids[:n] for ids, n in zip(whole, ends)]


def test_a_picture_that_questions_share_is_encoded_once(tmp_path):
    files = {color: tmp_path / f"{color}.png" for color in ("red", "blue")}
    for color, file in files.items():
        Image.new("RGB", (9, 9), color).save(file)
    model, encoded = make_lavin(), []
    questions = ("red", [5, 9]), ("", [4]), ("blue", [8]), ("red", [3])
    rows = [data.Example(prompts.Sample("", "", "", files.get(color), {}), [1, 7], N_CLS * bool(color), ids,
                         len(ids)) for color, ids in questions]
    size = model.vit.cfg.image_size
    each = data.collate(rows, size, model.cfg.normalize)
    model.vit.register_forward_hook(lambda vit, args, X: encoded.append(len(X)))
    batch = answering.collate(model, rows, size)
    assert encoded == [2] and batch.images is None and len(batch.image_embeds) == len(each.images) == 3
    with torch.no_grad():
        assert close(torch.cat(model.embed(batch)), torch.cat(model.embed(each)))
    assert answering.collate(model, rows[1:2], size).image_embeds is None and encoded == [2, 3]
    for p in model.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    answers = model.generate(answering.collate(model, rows, size), 2, eos=-1, temperature=0.0)
    assert [len(a) for a in answers] == [2] * 4


def test_stopping_at_the_letter_changes_no_score(world, folded):
    model, tokenizer = folded
    samples = prompts.read_scienceqa(world / "s", "test", "QCM-ALE")
    tokenizer.eos = -1  # answers continue after their letter, as with explanations
    whole, cut = (answering.answer(model, tokenizer, samples, 24, progress=False, until=pattern)
                  for pattern in (None, scores.ANSWER))
    assert scores.scienceqa(samples, whole) == scores.scienceqa(samples, cut)
    stopped = [s.id for s in samples if len(cut[s.id]) < len(whole[s.id])]
    assert len(stopped) > 6 and all(whole[id].startswith(cut[id]) for id in whole)
    assert all(re.search(r"The answer is [A-Z]\.$", cut[id]) for id in stopped)


# ---------------------------------------------------------------------------------------------------
# interruptions and processes

def test_a_killed_run_resumes(run, world, tmp_path, monkeypatch):
    argv = ("scienceqa", "--data", world / "s", "--batch_size", 3, "--out", tmp_path / "p.jsonl")
    run(*argv)
    whole = (tmp_path / "p.jsonl").read_text().splitlines(keepends=True)
    assert len(whole) == 14
    asked, answer = [], answering.answer

    def spy(model, tokenizer, samples, **kw):
        asked.extend(samples)
        return answer(model, tokenizer, samples, **kw)

    monkeypatch.setattr(answering, "answer", spy)
    for kept in ("".join(whole[:6]) + whole[6][:9], whole[0][:12], ""):  # killed within a line, or at once
        (tmp_path / "p.jsonl").write_text(kept)
        asked.clear()
        _, err = run(*argv)
        done = max(0, kept.count("\n") - 1)
        assert len(asked) == 13 - done
        assert (f"{done} predictions are there, {13 - done} to go" in err) == (done > 0)
        assert sorted((tmp_path / "p.jsonl").read_text().splitlines(keepends=True)) == sorted(whole)
    monkeypatch.setattr(answering, "load", None)  # a finished run loads no model
    run(*argv)


def test_a_run_does_not_resume_on_other_questions(run, tmp_path):
    """in the same folder: other prompts, then another image name; the number of questions is the same"""
    folder = published.scienceqa(tmp_path / "s", {"test": 3})
    argv = ("scienceqa", "--data", folder, "--out", tmp_path / "p.jsonl")
    run(*argv)
    kept = (tmp_path / "p.jsonl").read_text()
    file = tmp_path / "s/problems.json"
    original = file.read_text()
    id, problem = next((id, p) for id, p in json.loads(original).items() if p["image"])
    image = file.parent / "images/test" / id / problem["image"]
    image.with_name("other.png").write_bytes(image.read_bytes())
    for change in ({"hint": "Look again."}, {"image": "other.png"}):
        published.put(file, {**json.loads(original), id: {**problem, **change}})
        with pytest.raises(ValueError, match=r"of another run \(questions 3:\w+, now 3:\w+\)"):
            run(*argv)
    assert (tmp_path / "p.jsonl").read_text() == kept
    file.write_text(original)
    run(*argv)  # the same questions again


def test_two_processes_write_what_one_writes(run, world, tmp_path):
    found = run("mme", "--data", world / "mme", "--out", tmp_path / "one", "--json")[0]
    whole = (tmp_path / "one/predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two").mkdir()
    (tmp_path / "two/predictions.jsonl").write_text("".join(whole[:3]))  # the two processes resume from here
    command = [sys.executable, "evaluate.py", "mme", *TINY,
               "--adapters", str(world / "out/adapters.safetensors"),
               "--data", str(world / "mme"), "--out", str(tmp_path / "two"), "--json"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # like torchrun
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**env, "RANK": rank})
            for rank in "01"]
    try:
        assert [p.communicate(timeout=180)[0] for p in both] == [found, ""]  # only rank 0 prints the result
    finally:
        for p in both:
            p.kill()
    assert sorted((tmp_path / "two/predictions.jsonl").read_text().splitlines(keepends=True)) == sorted(whole)
    for task in MME:
        assert (tmp_path / f"one/{task}.txt").read_text() == (tmp_path / f"two/{task}.txt").read_text()


def test_answers_do_not_depend_on_processes_or_batch_size(run, world, tmp_path):
    flags = "--data", str(world / "s"), "--limit", "7", "--json"
    out = {n: run("scienceqa", *flags, "--batch_size", n, "--out", tmp_path / f"{n}.jsonl")[0]
           for n in (64, 1)}
    command = [*TWO_PROCESSES, "evaluate.py", "scienceqa", *TINY, *flags,
               "--adapters", str(world / "out/adapters.safetensors"), "--out", str(tmp_path / "two.jsonl")]
    two = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=180, check=True).stdout
    files = [scores.read_predictions(tmp_path / f"{name}.jsonl") for name in (64, 1, "two")]
    assert len(files[0]) == 7 and files[0] == files[1] == files[2] and two == out[64] == out[1]


def test_a_run_does_not_overwrite_another_file(run, world, tmp_path):
    message = partial(one_line, run)
    p, small = tmp_path / "p.jsonl", ("scienceqa", "--data", world / "s", "--limit", 2)
    run(*small, "--out", p)
    kept = p.read_text()
    another = "p.jsonl: holds the predictions of another run ({}, now {}); give another --out, or delete it"
    assert another.format("seed 0", 1) in message(*small, "--seed", 1, "--out", p)
    told = message("coco", "--data", world / "coco", "--out", p)
    assert another.format("command scienceqa", "coco") in told
    assert another.format("dtype float32", "bfloat16") in message(*small, "--dtype", "bf16", "--out", p)
    told = message(*small, "--no-stop_at_letter", "--out", p)
    assert another.format("stop_at_letter True", False) in told
    (tmp_path / "notes.jsonl").write_text("my notes")
    assert "is not a file of predictions" in message(*small, "--out", tmp_path / "notes.jsonl")
    assert "name that ends in .jsonl" in message(*small, "--out", tmp_path / "p.json")
    assert p.read_text() == kept and (tmp_path / "notes.jsonl").read_text() == "my notes"


def test_mistakes_are_one_line(run, world, tmp_path):
    message = partial(one_line, run)
    published.scienceqa(tmp_path / "s", {"test": 4, "val": 0})
    (tmp_path / "s/images/test/2/image.png").unlink()
    told = message("scienceqa", "--data", tmp_path / "s")
    assert "test/2/image.png: no such picture, needed by sample 2" in told
    assert "split val is empty" in message("scienceqa", "--data", tmp_path / "s", "--split", "val")
    assert "none of MME's folders is here" in message("mme", "--data", tmp_path)
    assert "mc.json: no such file" in message("truthfulqa", "--data", tmp_path / "mc.json")
    published.coco(tmp_path / "coco")
    (tmp_path / "coco/val2014/COCO_val2014_000000000104.jpg").unlink()
    lacking = message("coco", "--data", tmp_path / "coco", "--out", tmp_path / "c.jsonl")
    assert "000000000104.jpg: no such picture, needed by sample 104" in lacking
    assert "--data a,b: expected one folder" in message("coco", "--data", "a,b")
    text_only = ("--no-vision", "--adapter", "rep", "--steps", 1, "--split", "")
    call(train.main, "--data", world / "s", "--out", tmp_path / "text", *TINY, *text_only)
    for name in ("mme", "coco"):
        told = message(name, "--data", world / name, "--adapters", tmp_path / "text/adapters.safetensors")
        assert "text-only adapters" in told


def test_data_sets_count_as_often_as_named_and_the_first_scienceqa_is_tested(world, tmp_path):
    other = published.scienceqa(tmp_path / "t", {"train": 5, "test": 4})
    alpaca = f"alpaca:{world}/alpaca_data.json"
    training, test_problems = train.read_data(train.Config(data=f"{alpaca},{world}/s,{alpaca},{other}"))
    assert [len(samples) for _, samples in training] == [9, 20, 9, 5] and len(test_problems) == 13
    assert train.read_data(train.Config(data=alpaca))[1] == []
    assert train.read_data(train.Config(data=f"{world}/s", split=""))[1] == []


def test_train_refuses_an_empty_or_broken_mixture(world, tmp_path):
    def message(spec):
        return one_line(call, train.main, "--data", spec, "--out", tmp_path, *TINY)

    published.put(tmp_path / "a.json", [{"instruction": "x", "output": ""}])
    assert "no sample of the train split has a response" in message(f"alpaca:{tmp_path}/a.json")
    published.put(tmp_path / "b.json", [{"instruction": "x", "ouput": "y"}])
    assert "b.json: record 0: 'output' is missing or not str" in message(f"{world}/s,json:{tmp_path}/b.json")
    assert "unknown kind 'alpca'; did you mean alpaca?" in message("alpca:x")
    empty = published.scienceqa(tmp_path / "e", {"train": 0, "test": 1})
    assert "split train is empty" in message(f"scienceqa:{empty}")
