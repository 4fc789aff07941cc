"""Prompts and responses from published files; a mistake in a file is one line that names the place."""
import json
import os
from pathlib import Path

import published
import pytest
from conftest import one_line

import prompts
from evaluation import benchmarks, scores
from prompts import build_prompt, build_response

PROBLEM = {"question": "Which is  red?", "choices": ["sky", "a  rose"], "answer": 1, "hint": "Look.",
           "image": "image.png", "grade": "grade7", "subject": "natural science", "topic": "color",
           "lecture": "Some things\nare red.", "solution": "A rose is red.", "split": "train"}


def write(folder: Path, problems: dict, splits: dict) -> Path:
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder


def test_prompt_and_response_formats(tmp_path):
    write(tmp_path, {"5": PROBLEM}, {"train": ["5"]})
    (sample,) = prompts.read_scienceqa(tmp_path, "train", "QCM-ALE")
    assert sample.prompt == "Question: Which is red?\nContext: Look.\nOptions: (A) sky (B) a rose\nResponse:"
    assert sample.response == "The answer is B. BECAUSE: Some things\\nare red. A rose is red."
    assert sample.image == tmp_path / "images/train/5/image.png"
    assert sample.problem["subject"] == "natural science"
    prompt = build_prompt("Q?", "", ["x", "y"], "CQM-A")
    assert prompt == "Context: N/A\nQuestion: Q?\nOptions: (A) x (B) y\nResponse:"
    assert build_prompt("Q?", "", [], "QCM-A") == "Question: Q?\nContext: N/A\nResponse:"
    with pytest.raises(ValueError, match="the question has 6 options; at most 5 are possible, .A. to .E."):
        build_prompt("Q?", "", list("uvwxyz"))
    bare = {**PROBLEM, "lecture": "", "solution": ""}
    assert build_response(bare, "QCM-ALE") == "The answer is B."
    lecture, solution = "Some things\\nare red.", "A rose is red."
    answer = "The answer is B."
    for form, text in {"A": answer,
                       "AL": f"{answer} BECAUSE: {solution}",
                       "AE": f"{answer} BECAUSE: {lecture}",
                       "AEL": f"{answer} BECAUSE: {solution} {lecture}",
                       "LA": f"{lecture} {answer}",
                       "EA": f"{solution} {answer}",
                       "LEA": f"{lecture} {solution} {answer}",
                       "ELA": f"{solution} {lecture} {answer}"}.items():
        assert build_response(PROBLEM, f"QCM-{form}") == text
    for form in ("QXM-A", "QCM", "QCM-Z", "QQ-A", "-A"):
        with pytest.raises(ValueError, match="unknown prompt format"):
            prompts.check_format(form)


def test_captions_are_appended_to_the_hint(tmp_path):
    write(tmp_path, {"5": PROBLEM, "6": {**PROBLEM, "hint": "", "image": None}}, {"train": ["5", "6"]})
    (tmp_path / "captions.json").write_text(json.dumps({"captions": {"5": "A rose."}}))
    with_picture, without = prompts.read_scienceqa(tmp_path, "train", captions=True)
    assert "Context: Look. A rose.\n" in with_picture.prompt and "Context: N/A\n" in without.prompt


@pytest.mark.parametrize("change, message", [
    ({"answer": 2}, "problem 5: answer 2 does not fit its 2 choices"),
    ({"choices": ["x"], "answer": 0}, "problem 5: answer 0"),
    ({"question": None}, "problem 5: 'question' is missing or not str"),
    ({"answer": "B"}, "problem 5: 'answer'"),
    ({"choices": "ab"}, "problem 5: 'choices'"), (None, "problem 5: not a JSON object"),
    ({"choices": ["sky", 3]}, "problem 5: 'choices' holds something that is not str"),
    ({"answer": True}, "problem 5: 'answer' is missing or not int"), ({"answer": -1}, "problem 5: answer -1"),
    ({"image": 3}, "problem 5: 'image' is missing or not"),
    ({"grade": ""}, "problem 5: 'grade' is ''; expected grade1 to grade12"),
    ({"grade": "gradeX"}, "problem 5: 'grade' is 'gradeX'"),
    ({"grade": "grade7 "}, "problem 5: 'grade' is 'gr")])
def test_malformed_problem_is_named(tmp_path, change, message):
    write(tmp_path, {"5": change and {**PROBLEM, **change}}, {"train": ["5"]})
    with pytest.raises(ValueError, match=message):
        prompts.read_scienceqa(tmp_path, "train")


def test_malformed_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="problems.json: no such file"):
        prompts.read_scienceqa(tmp_path, "train")
    write(tmp_path, {}, {"train": [7]})
    with pytest.raises(ValueError, match="problem 7 of split train is missing"):
        prompts.read_scienceqa(tmp_path, "train")
    with pytest.raises(ValueError, match="no split 'dev'; it has train"):
        prompts.read_scienceqa(tmp_path, "dev")
    (tmp_path / "problems.json").write_text('{"5": ')
    with pytest.raises(ValueError, match="problems.json: not valid JSON"):
        prompts.read_scienceqa(tmp_path, "train")


# ---------------------------------------------------------------------------------------------------
# instructions and captions

def test_alpaca(tmp_path):
    samples = prompts.read_instructions(published.alpaca(tmp_path / "alpaca_data.json"))
    assert samples[0].prompt == "Instruction: Name 1 colors. Start with red.\nResponse:"
    assert samples[0].response == "red, green"
    assert samples[1].prompt == "Instruction: Name 2 colors.\nResponse:" and samples[1].image is None
    assert len(samples) == 6 and samples[5].response == ""  # tokenising drops and counts this sample


def test_code_keeps_its_indentation(tmp_path):
    published.put(tmp_path / "a.json", [{"instruction": "Fix:\n    x  = 1", "output": "if x:\n    y"}])
    (sample,) = prompts.read_instructions(tmp_path / "a.json")
    assert sample.prompt == "Instruction: Fix:\n    x  = 1\nResponse:" and sample.response == "if x:\n    y"


def test_the_four_documented_lines_of_own_data(tmp_path):
    lines = [line.strip() for line in prompts.__doc__.splitlines() if line.strip().startswith("{")]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n\n")
    published.put(tmp_path / "mine.json", [json.loads(line) for line in lines])
    published.picture(tmp_path / "cat.jpg")
    a, b = (next(prompts.mixture(f"json:{tmp_path}/mine.{x}")).read() for x in ("jsonl", "json"))
    assert a == b and len(a) == 4 and [s.image for s in a] == [tmp_path / "cat.jpg"] * 2 + [None] * 2
    assert a[2].prompt == "Instruction: Translate to French. Good morning.\nResponse:"
    assert a[2].response == "Bonjour."
    (tmp_path / "mine.jsonl").write_text('{"instruction": "one\u2028line", "output": "x"}', encoding="utf-8")
    assert len(prompts.read_instructions(tmp_path / "mine.jsonl")) == 1


def test_null_means_missing_and_only_training_needs_an_output(tmp_path):
    """pandas and other tools write null for an empty cell"""
    rows = [{"instruction": "x", "input": None, "image": None, "output": "y"}, {"instruction": "x"},
            {"instruction": "x", "output": None}]
    file = published.put(tmp_path / "a.json", rows)
    assert [(s.response, s.image) for s in prompts.read_instructions(file, asked=True)] == [
        ("y", None), ("", None), ("", None)]
    assert "a.json: record 1: 'output' is missing" in one_line(prompts.read_instructions, file)
    published.put(file, [{"instruction": "x", "output": 3}])
    assert "record 0: 'output' is missing or not str" in one_line(prompts.read_instructions, file, asked=True)


@pytest.mark.parametrize("prefix", ["COCO_train2014_", ""])
def test_every_question_and_answer_of_llava_is_a_sample(tmp_path, prefix):
    (source,) = prompts.mixture(f"llava:{published.llava(tmp_path, prefix)}")
    samples = source.read()
    assert [(s.prompt, s.response) for s in samples] == [
        (f"Instruction: {q}\nResponse:", a) for q, a in [
            ("Why is it so green?", "Because it is painted."),
            ("Describe it in detail.", "It is blue all over."),
            ("Describe it.", "It is white."), ("What color is it?", "Blue."),
            ("Is it red?", "No, it is blue."), ("Are you sure?", "Yes.")]]
    assert [s.image.name for s in samples] == [f"{prefix}{k:012}.jpg" for k in (1, 2, 3, 2, 2, 2)]
    whole = published.llava_joined(tmp_path)
    joined, from_folder = (prompts.read_llava(p) for p in (whole, tmp_path))
    fields = lambda samples: [(s.prompt, s.response, s.image) for s in samples]
    assert fields(joined) == fields(samples)
    assert from_folder == joined  # a folder with both the joined file and its parts is read once
    part, = prompts.mixture(f"llava:{tmp_path / 'detail_23k.json'}:{tmp_path / 'train2014'}")
    assert len(part.read()) == 2
    assert not any(s.image for s in source.read(vision=False))


def test_coco_karpathy(tmp_path):
    (source,) = prompts.mixture(f"coco:{published.coco(tmp_path)}")
    train, test = source.read("train"), source.read("test")
    assert len(train) == 10
    assert {s.image.parent.name for s in train} == {"train2014", "val2014"}  # restval is in val2014
    assert train[2].response == "A red picture of nothing"
    assert train[0].prompt == f"Instruction: {prompts.CAPTION}\nResponse:"
    assert [s.id for s in test] == ["103", "104"]
    assert not test[0].response and len(test[0].problem["captions"]) == 5
    told = one_line(source.read, "dev")
    assert "dataset_coco.json: no image of split 'dev'; it has test, train, val" in told


@pytest.mark.parametrize("change, message", [
    ({"output": None}, "a.json: record 1: 'output' is missing or not str"),
    ({"input": 3}, "a.json: record 1: 'input'"),
    ({"instruction": 3}, "a.json: record 1: 'instruction'"),
    ({"image": 4}, "a.json: record 1: 'image'")])
def test_malformed_instruction_is_named(tmp_path, change, message):
    good = {"instruction": "x", "input": "", "output": "y"}
    published.put(tmp_path / "a.json", [good, {**good, **change}])
    with pytest.raises(ValueError, match=message):
        prompts.read_instructions(tmp_path / "a.json")


def test_malformed_files_are_named(tmp_path):
    for text, message in (("[]", "a.json: empty"), ('{"a": 1}', "a.json: holds dict, expected a list"),
                          ("[1]", "record 0: not a JSON object"), ("[", "a.json: not valid JSON")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            prompts.read_instructions(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text('{"instruction": "x", "output": "y"}\n{"instruction"\n')
    with pytest.raises(ValueError, match="a.jsonl:2: not valid JSON"):
        prompts.read_instructions(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="a.jsonl: not text in UTF-8"):
        prompts.read_instructions(tmp_path / "a.jsonl")
    with pytest.raises(FileNotFoundError, match="none.json: no such file; expected"):
        prompts.read_instructions(tmp_path / "none.json")


@pytest.mark.parametrize("speakers", [[], ["human"], ["gpt", "human"], ["human", "human"]])
def test_malformed_conversation_is_named(tmp_path, speakers):
    turns = [{"from": speaker, "value": "x"} for speaker in speakers]
    published.put(tmp_path / "c.json", [{"image": "x.jpg", "conversations": turns}])
    with pytest.raises(ValueError, match="c.json: record 0: 'conversations' do not go human, gpt"):
        prompts.read_llava(tmp_path / "c.json")


def test_missing_pictures_are_reported_before_anything_runs(tmp_path):
    published.scienceqa(tmp_path / "s", {"train": 8})
    (tmp_path / "s/images/train/4/image.png").unlink()
    published.llava(tmp_path / "l")
    for f in list((tmp_path / "l/train2014").iterdir())[:2]:
        f.unlink()
    for spec, message in (
            (f"{tmp_path}/s", r"train/4/image.png: no such picture, needed by sample 4$"),
            (f"llava:{tmp_path}/l", r"jpg: no such picture, needed by sample .*more are missing\)"),
            (f"llava:{tmp_path}/l:{tmp_path}/nowhere", "nowhere/000000000001.jpg: no such picture")):
        with pytest.raises(ValueError, match=message):
            next(prompts.mixture(spec)).read()
    assert len(next(prompts.mixture(f"{tmp_path}/s")).read(vision=False)) == 8


# ---------------------------------------------------------------------------------------------------
# mixtures and benchmarks

def test_mixture_by_name():
    a, b, c = prompts.mixture("alpaca:x/alpaca_data.json, llava:y:pictures,z/ScienceQA")
    assert (a.kind, a.path, a.images) == ("alpaca", "x/alpaca_data.json", None)
    assert (b.kind, b.path, b.images) == ("llava", "y", Path("pictures"))
    assert (c.kind, c.path) == ("scienceqa", "z/ScienceQA")


@pytest.mark.parametrize("spec, message", [
    ("lava:x", "unknown kind 'lava'; did you mean llava\\?; known: scienceqa, alpaca"),
    ("alpaca:", "names no file or folder; expected alpaca:PATH"), ("", "names no file or folder"),
    ("alpaca:x,", "names no file"), ("alpaca:x:y", "alpaca takes no folder of pictures")])
def test_mixture_mistakes(spec, message):
    with pytest.raises(ValueError, match=message):
        list(prompts.mixture(spec))


def test_mme_in_both_layouts(tmp_path):
    published.mme(tmp_path, {"existence": 2, "artwork": 3})
    samples = benchmarks.read_mme(tmp_path, ["existence", "artwork", "OCR"])
    prompts.check_pictures(samples)
    names = ["existence/0000.jpg", "existence/0001.png",
             "artwork/0000.jpg", "artwork/0001.png", "artwork/0002.jpg"]
    assert [s.id for s in samples] == [f"{name}:{line}" for name in names for line in (1, 2)]
    assert samples[0].prompt == "Instruction: Is this picture red? Please answer yes or no.\nResponse:"
    assert [s.problem["answer"] for s in samples] == ["Yes", "No"] * 5
    (tmp_path / "artwork/questions_answers_YN/0001.txt").write_text("Is it?\tYes\nIs it not? No\n")
    with pytest.raises(ValueError, match="0001.txt:2: expected question<TAB>Yes or No"):
        benchmarks.read_mme(tmp_path, ["artwork"])
    with pytest.raises(FileNotFoundError, match="none of MME's folders"):
        benchmarks.read_mme(tmp_path, ["OCR"])
    (tmp_path / "existence/0000.jpg").unlink()
    with pytest.raises(ValueError, match="existence/0000.jpg: no such picture"):
        prompts.check_pictures(benchmarks.read_mme(tmp_path, ["existence"]))


def test_truthfulqa(tmp_path):
    sky, dog = benchmarks.read_truthfulqa(published.truthfulqa(tmp_path / "mc_task.json"))
    assert sky.prompt == "Instruction: What color is the sky?\nResponse:" and dog.id == "1"
    for change in ({"mc1_targets": {"x": 1, "y": 1, "z": 0}}, {"mc1_targets": {"x": 0}},
                   {"mc2_targets": {"x": 1}}, {"mc2_targets": []}):
        published.put(tmp_path / "bad.json", [{**dog.problem, **change}])
        with pytest.raises(ValueError, match="bad.json: record 0: 'mc"):
            benchmarks.read_truthfulqa(tmp_path / "bad.json")


# ---------------------------------------------------------------------------------------------------
# hostile files

OUTSIDE = ("../x.png", "a/../../x.png", "..", "/etc/x.png")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leaves_its_folder_is_refused(tmp_path, name):
    refused = f"{name!r} leaves its folder; expected a relative path without .."
    write(tmp_path, {"5": {**PROBLEM, "image": name}}, {"train": ["5"]})
    assert f"problem 5: {refused}" in one_line(prompts.read_scienceqa, tmp_path, "train")
    write(tmp_path, {name: PROBLEM}, {"train": [name]})
    assert refused in one_line(prompts.read_scienceqa, tmp_path, "train")
    published.put(tmp_path / "a.json", [{"instruction": "x", "output": "y", "image": name}])
    assert f"a.json: record 0: {refused}" in one_line(prompts.read_instructions, tmp_path / "a.json")
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    published.put(tmp_path / "l.json", [{"image": name, "conversations": turns}])
    assert f"l.json: record 0: {refused}" in one_line(prompts.read_llava, tmp_path / "l.json")
    for names in ({"filepath": name, "filename": "x.png"}, {"filepath": "val2014", "filename": name},
                  {"filename": name}):
        published.put(tmp_path / "c.json", {"images": [{"split": "train", "sentences": [], **names}]})
        assert f"c.json: image 0: {refused}" in one_line(prompts.read_coco, tmp_path / "c.json")


def test_names_inside_the_folder_and_symbolic_links_are_accepted(tmp_path):
    published.picture(tmp_path / "elsewhere/cat.jpg")
    published.picture(tmp_path / "data/sub/dog..jpg")
    (tmp_path / "data/cat.jpg").symlink_to(tmp_path / "elsewhere/cat.jpg")
    names = "cat.jpg", "sub/dog..jpg", "./cat.jpg"
    rows = [{"instruction": "x", "output": "y", "image": name} for name in names]
    published.put(tmp_path / "data/a.json", rows)
    assert len(next(prompts.mixture(f"json:{tmp_path}/data/a.json")).read()) == 3


def test_a_picture_must_be_a_file(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("folder.jpg", "broken.jpg", "pipe.jpg", "."):
        published.put(tmp_path / "a.json", [{"instruction": "x", "output": "y", "image": name}])
        assert "no such picture" in one_line(next(prompts.mixture(f"json:{tmp_path}/a.json")).read)


READERS = {"problems.json": lambda folder: prompts.read_scienceqa(folder, "train"),
           "pid_splits.json": lambda folder: prompts.read_scienceqa(folder, "train"),
           "captions.json": lambda folder: prompts.read_scienceqa(folder, "train", captions=True),
           "a.json": lambda folder: prompts.read_instructions(folder / "a.json"),
           "a.jsonl": lambda folder: prompts.read_instructions(folder / "a.jsonl"),
           "detail_23k.json": lambda folder: prompts.read_llava(folder / "detail_23k.json"),
           "dataset_coco.json": lambda folder: prompts.read_coco(folder),
           "mc_task.json": lambda folder: benchmarks.read_truthfulqa(folder / "mc_task.json"),
           "p.json": lambda folder: scores.read_predictions(folder / "p.json"),
           "p.jsonl": lambda folder: scores.read_predictions(folder / "p.jsonl"),
           "references.json": lambda folder: scores.read_references(folder / "references.json", ["1"])}


NOT_JSON = (b"", b"[", b"\xff\xfe", b'["\xe9"]', b'{"5": "\\ud800"}', b'["\\uDC00x"]', b"[" * 10 ** 5,
            b'{"a":' * 10 ** 5, b"[" + b"9" * 5000 + b"]")
WRONG_LISTS = (b"3", b'"text"', b"null", b"[[]]", b"[null]")
WRONG_DICTS = (b'{"5": 3}', b'{"train": 3}', b'{"annotations": 3}', b'{"images": [3]}', b'{"captions": []}')


@pytest.mark.parametrize("name", READERS)
def test_broken_json_is_named(tmp_path, name):
    write(tmp_path, {"5": PROBLEM}, {"train": ["5"]})
    wrong = WRONG_LISTS + WRONG_DICTS
    if name == "p.json":
        wrong = WRONG_LISTS  # reading accepts any dict; scoring checks it
    for content in NOT_JSON + wrong:
        (tmp_path / name).write_bytes(content)
        assert name in one_line(READERS[name], tmp_path), content[:100]


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_or_a_folder_is_not_read_as_a_file(tmp_path, name):
    write(tmp_path, {"5": PROBLEM}, {"train": ["5"]})
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert f"{name}: no such file; expected" in one_line(READERS[name], tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    if name not in ("dataset_coco.json", "detail_23k.json"):  # the readers of these two also accept a folder
        assert f"{name}: no such file; expected" in one_line(READERS[name], tmp_path)


NO_CAPTIONS = {"captions": {}}


@pytest.mark.parametrize("splits, captions, message", [
    ([], NO_CAPTIONS, "pid_splits.json: holds list, expected a dict"),
    ({"train": "5"}, NO_CAPTIONS, "pid_splits.json: 'train' is missing or not list"),
    ({"train": [["5"]]}, NO_CAPTIONS, "problem ['5'] of split train is missing"),
    ({"train": ["5"]}, [], "captions.json: not a JSON object"),
    ({"train": ["5"]}, {"captions": ["x"]}, "captions.json: 'captions' is missing or not dict"),
    ({"train": ["5"]}, {"captions": {"5": 3}}, "captions.json: '5' is missing or not str")])
def test_wrong_types_in_splits_and_captions(tmp_path, splits, captions, message):
    write(tmp_path, {"5": PROBLEM}, splits)
    published.put(tmp_path / "captions.json", captions)
    assert message in one_line(prompts.read_scienceqa, tmp_path, "train", captions=True)


def test_escaped_surrogate_pairs_and_a_byte_order_mark_are_accepted(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf[{"instruction": "smile", "output": "\\ud83d\\ude00"}]')
    assert prompts.read_instructions(tmp_path / "a.json")[0].response == "\U0001f600"


@pytest.mark.parametrize("labels", [
    {"x": [1], "y": 0}, {"x": 1, "y": 2, "z": 0}, {"x": "1", "y": 0}, {"x": None, "y": 1}])
def test_wrong_labels_of_truthfulqa(tmp_path, labels):
    record = {"question": "Q?", "mc1_targets": labels, "mc2_targets": {"x": 1, "y": 0}}
    told = one_line(benchmarks.read_truthfulqa, published.put(tmp_path / "m.json", [record]))
    assert "m.json: record 0: 'mc1_targets' needs" in told
