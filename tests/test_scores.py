"""Tables from predictions equal figures computed by hand or in a second way. No test here needs a model."""
import json
import math
import random
import subprocess
import sys
from collections import Counter

import published
import pytest
from conftest import REAL, ROOT, needs_caption_tools, one_line

import evaluate
from evaluation import scores
from prompts import Sample
from tiny import world


@pytest.fixture
def score(monkeypatch, capsys):
    """run evaluate.py -> its stdout; its errors are raised, not printed"""
    def call(*argv) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
        evaluate.main()
        return capsys.readouterr().out
    return call


# ---------------------------------------------------------------------------------------------------
# ScienceQA

def problem(id, letter, subject="natural", hint="", image=None, grade="grade2", answer=0):
    """a problem, and (its id, an answer to it)"""
    p = {"subject": f"{subject} science", "hint": hint, "image": image, "grade": grade, "answer": answer,
         "choices": ["x", "y"]}
    return Sample(id, "", "", None, p), (id, f"So. The answer is {letter}.")


def test_nine_columns_counted_by_hand(monkeypatch):
    rows = [problem("1", "A", "natural", hint="h", image="i.png"),
            problem("2", "B", "natural", grade="grade7"),
            problem("3", "A", "social", image="i.png", grade="grade12"),
            problem("4", "Z", "language", hint="h"),
            problem("5", "B", "language", grade="grade6", answer=1),
            problem("6", "B", "social", hint="h")]
    result = scores.scienceqa([s for s, _ in rows], dict(text for _, text in rows))
    assert result["columns"] == {
        "NAT": [1, 2], "SOC": [1, 2], "LAN": [1, 2], "TXT": [1, 3], "IMG": [2, 2], "NO": [1, 2],
        "G1-6": [2, 4], "G7-12": [1, 2], "Avg": [3, 6], "no IMG": [1, 4]}
    assert result["unparsable"] == 1 and result["accuracy"]["TXT"] == 33.33
    text = scores.scienceqa_table(result).splitlines()
    assert text[0].split() == list(scores.COLUMNS)
    assert text[1].split() == "here 50.00 50.00 50.00 33.33 100.00 50.00 50.00 50.00 50.00".split()
    assert text[2].split() == "problems 2 2 2 3 2 2 4 2 6".split()
    assert text[3].startswith("1 answers without a letter")
    assert scores.scienceqa_table(result, paper=True).splitlines() == text  # these are other problems
    monkeypatch.setattr(scores, "TABLE_1_PROBLEMS", 6)
    paper = scores.scienceqa_table(result, paper=True).splitlines()
    printed = "89.25 94.94 85.24 88.51 87.46 88.08 90.16 88.07 89.41"
    assert next(x.split() for x in paper if "LaVIN-7B" in x)[2:] == printed.split()
    assert len(set(map(len, paper[:-1]))) == 1  # the rows are aligned


def test_an_empty_column_is_a_dash():
    sample, text = problem("1", "A")
    result = scores.scienceqa([sample], dict([text]))
    assert result["accuracy"]["SOC"] is None
    assert scores.scienceqa_table(result).splitlines()[1].split()[2] == "-"


def test_the_answer_is_parsed_from_the_generated_text():
    assert scores.read_answer("Grass is green. The answer is B. BECAUSE: The answer is C.", 3) == 1
    unreadable = "", "The answer is", "the answer is B.", "The answer is D.", "The answer is BB.", None, -1, 3
    assert all(scores.read_answer(text, 3) is None for text in unreadable)
    assert scores.read_answer(2, 3) == 2


def guesses(problems: dict, ids: list[str], seed: int) -> tuple[dict, dict]:
    """random predictions, as indices and as texts with the corresponding letters"""
    rng = random.Random(seed)
    index = {id: rng.choice([problems[id]["answer"], rng.randrange(len(problems[id]["choices"])), 7])
             for id in ids}
    rng.shuffle(ids)  # the order in the file must not matter
    texts = {id: f"Because. The answer is {'ABCDEFGH'[i]}. BECAUSE: The answer is A."
             for id, i in index.items()}
    return {id: index[id] for id in ids}, texts


def recount(problems: dict, guess: dict) -> tuple[dict, dict]:
    """the nine columns, counted problem by problem: {column: problems}, {column: percentage}"""
    subjects = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
    total, right = Counter(), Counter()
    for id, choice in guess.items():
        p = problems[id]
        columns = ["Avg", subjects[p["subject"]]]
        columns += ["TXT"] * (p["hint"] != "") + ["IMG"] * (p["image"] is not None)
        columns += ["NO"] * (p["hint"] == "" and p["image"] is None)
        columns.append("G7-12" if int(p["grade"].removeprefix("grade")) >= 7 else "G1-6")
        for c in columns:
            total[c] += 1
            right[c] += choice == p["answer"]
    return total, {c: round(100 * right[c] / total[c], 2) for c in total}


def check_columns(score, folder, tmp_path):
    """compare the columns of evaluate.py with a recount, for random predictions on the test split"""
    problems, ids = (json.loads((folder / f"{x}.json").read_text()) for x in ("problems", "pid_splits"))
    index, texts = guesses(problems, list(ids["test"]), seed=3)
    total, percent = recount(problems, index)
    assert len(index) == total["Avg"] == len(ids["test"]) and 30 < percent["Avg"] < 90
    for name, predictions in (("i.json", index), ("t.json", texts)):
        file = published.put(tmp_path / name, predictions)
        argv = "--data", folder, "--split", "test", "--predictions", file, "--json"
        found = json.loads(score("scienceqa", *argv))
        for c in scores.COLUMNS:
            assert found["accuracy"][c] == percent.get(c) and found["columns"][c][1] == total[c], c
        assert found["unparsable"] == sum(i == 7 for i in index.values()) > 0
    table = score("scienceqa", "--data", folder, "--predictions", tmp_path / "i.json").splitlines()
    here = next(line.split() for line in table if line.startswith("here"))
    assert here[1:] == [f"{percent[c]:.2f}" for c in scores.COLUMNS]


def test_columns_equal_a_recount_on_the_embedded_world(score, tmp_path):
    problems = {str(k): p for k, (p, _) in enumerate(world.split_problems(0, "test", 300, set()))}
    published.put(tmp_path / "problems.json", problems)
    published.put(tmp_path / "pid_splits.json", {"test": list(problems)})
    check_columns(score, tmp_path, tmp_path)


@pytest.mark.skipif(not (REAL / "scienceqa").is_dir(),
                    reason="the real ScienceQA problems are not in ../shared/data")
def test_columns_equal_a_recount_on_the_real_test_problems(score, tmp_path):
    assert len(json.loads((REAL / "scienceqa/pid_splits.json").read_text())["test"]) == 361
    check_columns(score, REAL / "scienceqa", tmp_path)


def test_scoring_needs_no_torch(tmp_path):
    published.scienceqa(tmp_path / "s", {"test": 6})
    published.put(tmp_path / "p.json", {str(i): 0 for i in range(1, 7)})
    code = ("import sys, cli, evaluate; cli.run(evaluate.main); "
            "assert not {'torch', 'numpy', 'PIL', 'sentencepiece'} & set(sys.modules), 'heavy imports'")
    argv = ["scienceqa", "--data", tmp_path / "s", "--predictions", tmp_path / "p.json"]
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "NAT" in done.stdout, done.stderr


def test_predictions_must_fit_the_problems(score, tmp_path):
    folder = published.scienceqa(tmp_path / "s", {"test": 6, "val": 0})

    def message(predictions, *argv):
        file = published.put(tmp_path / "p.json", predictions)
        return one_line(score, "scienceqa", "--data", folder, "--predictions", file, *argv)

    good = {str(i): 0 for i in range(1, 7)}
    the = f"the test problems of {folder}"
    assert message({**good, "99": 0}).endswith(f"p.json: predictions for ids not among {the}: 99")
    assert message({"1": 0}).endswith(f"p.json: no predictions for some of {the}: 2, 3, 4 and 2 more")
    for wrong in (0.5, True, [0], {"a": 0}):
        told = message({**good, "2": wrong})
        assert told.endswith(f"p.json: the prediction for 2 is {wrong}; expected an option index or a text")
    assert len(message({**good, "2": ["x" * 10 ** 5]})) < 300
    assert "holds int, expected a list | dict; predictions" in message(3)
    assert "record 0: not a JSON object" in message([3])
    assert "split val is empty" in message({}, "--split", "val")
    assert "no split 'dev'; it has test, val" in message({}, "--split", "dev")
    none = one_line(score, "scienceqa", "--data", folder, "--predictions", "none.json")
    assert "none.json: no such file; expected predictions" in none
    assert "unknown command 'scienceqs'; did you mean scienceqa?" in one_line(score, "scienceqs")


# ---------------------------------------------------------------------------------------------------
# COCO

REFERENCES = {"7": ["A dog runs on the beach.", "The brown dog is running by the sea, fast."],
              "8": ["Two cats sleep on a red sofa.", "A pair of cats on a couch."],
              "9": ["A plane in the blue sky.", "An airplane flies over a city."]}
CAPTIONS = {"7": "A brown dog is running on the beach.", "8": "Two cats sleep on a couch.",
            "9": "A plane flies over a city."}


def grams(text: str, n: int) -> Counter:
    words = text.lower().replace(".", "").replace(",", "").split()
    return Counter(tuple(words[i: i + n]) for i in range(len(words) - n + 1))


def length(text: str) -> int:
    return sum(grams(text, 1).values())


def naive_bleu4(captions: dict, references: dict) -> float:
    """the geometric mean of the clipped precisions of the corpus, times the penalty for short captions"""
    logs = []
    for n in range(1, 5):
        hit = total = 0
        for id, text in captions.items():
            most = Counter()
            for r in references[id]:
                most |= grams(r, n)
            hit += sum((grams(text, n) & most).values())
            total += sum(grams(text, n).values())
        logs.append(math.log(hit / total))
    lengths = {id: length(t) for id, t in captions.items()}
    closest = sum(min((length(r) for r in references[id]), key=lambda n: (abs(n - lengths[id]), n))
                  for id in captions)
    return 100 * math.exp(sum(logs) / 4) * min(1, math.exp(1 - closest / sum(lengths.values())))


def tf_idf(text: str, n: int, references: dict) -> dict:
    """{n-gram: its count in `text`, weighted by its rarity among the pictures' references}"""
    pictures = Counter(g for texts in references.values() for g in set().union(*(grams(t, n) for t in texts)))
    rarity = lambda g: math.log(len(references)) - math.log(max(1, pictures[g]))
    return {g: k * rarity(g) for g, k in grams(text, n).items()}


def naive_cider(captions: dict, references: dict) -> float:
    """CIDEr-D (Vedantam et al., 2015): clipped tf-idf cosines of 1- to 4-grams, with a length penalty"""
    scores = []
    for id, text in captions.items():
        each = []
        for r in references[id]:
            for n in range(1, 5):
                a, b = tf_idf(text, n, references), tf_idf(r, n, references)
                norm = math.sqrt(sum(x * x for x in a.values())) * math.sqrt(sum(x * x for x in b.values()))
                dot = sum(min(a[g], b.get(g, 0)) * b.get(g, 0) for g in a)
                gap = length(text) - length(r)
                each.append(dot / norm * math.exp(-gap ** 2 / (2 * 6 ** 2)) if norm else 0)
        scores.append(10 * sum(each) / len(each))
    return 100 * sum(scores) / len(scores)


def karpathy(folder):
    images = [{"filepath": "val2014", "filename": f"{id}.jpg", "split": "test", "cocoid": int(id),
               "sentences": [{"raw": t} for t in texts]} for id, texts in REFERENCES.items()]
    return published.put(folder / "dataset_coco.json", {"images": images})


def test_bleu_and_cider_of_the_coco_library_equal_naive_ones(score, tmp_path):
    needs_caption_tools()
    more = {**REFERENCES, "10": ["Not asked."]}
    own = published.put(tmp_path / "captions_val2014.json", {"annotations": [
        {"image_id": int(id), "id": 1, "caption": t} for id, texts in more.items() for t in texts]})
    published.put(tmp_path / "p.json", CAPTIONS)
    published.put(tmp_path / "coco.json", [{"image_id": int(id), "caption": t} for id, t in CAPTIONS.items()])
    for predictions, references in (("p.json", karpathy(tmp_path)), ("coco.json", own)):
        argv = "--predictions", tmp_path / predictions, "--references", references, "--json"
        result = json.loads(score("coco", *argv))
        assert result["pictures"] == 3
        assert result["BLEU-4"] == pytest.approx(naive_bleu4(CAPTIONS, REFERENCES), abs=1e-4)
        assert result["CIDEr"] == pytest.approx(naive_cider(CAPTIONS, REFERENCES), abs=1e-4)
    table = score("coco", "--predictions", tmp_path / "p.json", "--references", own)
    assert "LaVIN-13B (paper)" in table and "here, 3 pictures" in table


def test_captions_must_fit_the_pictures(score, tmp_path):
    references = karpathy(tmp_path)

    def message(captions, *argv):
        file = published.put(tmp_path / "p.json", captions)
        return one_line(score, "coco", "--predictions", file, *(argv or ("--references", references)))

    assert "ids not among the pictures of" in message({**CAPTIONS, "1": "x"})
    assert "no predictions for some of the pictures" in message({"7": "x"})
    assert "p.json: the prediction for 8 is 3; expected a text" in message({**CAPTIONS, "8": 3})
    for row in ({"caption": "x"}, {"caption": "x", "image_id": None}, {"caption": "x", "image_id": [7]}):
        assert "p.json: record 0: 'image_id' is missing or not str | int" in message([row])
    for argv in ((), ("--predictions", "p.json"), ("--data", "x", "--references", "y"),
                 ("--data", "x", "--predictions", "p.json")):
        told = one_line(score, "coco", *argv)
        assert "give --data DIR to caption the test split, or --predictions FILE and --references" in told
    assert "dataset_coco.json" in message(CAPTIONS, "--references", tmp_path / "none.json")


def test_a_missing_caption_library_is_one_line(score, tmp_path, monkeypatch):
    published.put(tmp_path / "p.json", CAPTIONS)
    argv = ("coco", "--predictions", tmp_path / "p.json", "--references", karpathy(tmp_path))
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    told = one_line(score, *argv)
    assert "pip install pycocoevalcap" in told and "Java" in told


def test_missing_java_is_one_line(score, tmp_path, monkeypatch):
    pytest.importorskip("pycocoevalcap", reason="the COCO caption library is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    published.put(tmp_path / "p.json", CAPTIONS)
    argv = ("--predictions", tmp_path / "p.json", "--references", karpathy(tmp_path))
    assert "no `java` on the PATH" in one_line(score, "coco", *argv)


@pytest.mark.parametrize("annotations, message", [
    ("none", "'annotations' is missing or not list"), ([3], "annotation 0: not a JSON object"),
    ([{"caption": "x"}], "annotation 0: 'image_id' is missing or not str | int"),
    ([{"caption": "x", "image_id": 1.5}], "annotation 0: 'image_id' is missing or not str | int")])
def test_malformed_references_are_named(score, tmp_path, annotations, message):
    published.put(tmp_path / "p.json", CAPTIONS)
    references = published.put(tmp_path / "r.json", {"annotations": annotations})
    argv = "coco", "--predictions", tmp_path / "p.json", "--references", references
    assert f"r.json: {message}" in one_line(score, *argv)


@pytest.mark.parametrize("line, message", [
    ("3", "not a JSON object"), ('"run"', "not a JSON object"), ('{"prediction": "x"}', "'id' is missing"),
    ('{"id": 1, "prediction": "x"}', "'id' is missing or not str"),
    ('{"id": "1"}', "'prediction' is missing"),
    ('{"id": "1", "prediction": true}', "'prediction' is missing or not str | int | dict"),
    ('{"id": "1", "prediction": "x\\ud800"}', "not valid JSON"), ("[" * 10 ** 5, "not valid JSON")])
def test_malformed_lines_of_predictions_are_named(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text('{"run": {}}\n' + line + "\n")
    assert f"p.jsonl:2: {message}" in one_line(scores.read_predictions, tmp_path / "p.jsonl")


# ---------------------------------------------------------------------------------------------------
# MME

def results(folder, **tasks):
    folder.mkdir(exist_ok=True)
    for task, rows in tasks.items():
        (folder / f"{task}.txt").write_text("".join("\t".join(r) + "\n" for r in rows))
    return folder


A, B, C = "a.jpg", "b.jpg", "c.png"


def test_mme_scored_by_hand(score, tmp_path):
    """Right questions, and pictures with both right. existence: 4/6, 1/3. OCR: 1/2, 0/1. code: 2/2, 1/1."""
    folder = results(
        tmp_path / "r",
        existence=[(A, "Is it?", "Yes", "Yes, it is."), (A, "Is it not?", "No", "no"),
                   (B, "Is it?", "Yes", " YES"), (B, "Is it not?", "No", "Maybe not"),
                   (C, "Is it?", "Yes", ""), (C, "Is it not?", "No", "Not at\tall")],
        OCR=[(A, "q", "Yes", "Yes"), (A, "r", "No", "The answer is no")],
        code_reasoning=[(B, "q", "No", "No."), (B, "r", "Yes", "yes")])
    (folder / "predictions.jsonl").write_text("not a result\n")
    found = json.loads(score("mme", "--results", folder, "--json"))
    assert found["tasks"]["existence"] == {"score": 400 / 6 + 100 / 3, "accuracy": 400 / 6,
                                           "accuracy+": 100 / 3, "replies": 6, "unreadable": 2}
    assert found["tasks"]["OCR"]["score"] == 50 and found["tasks"]["code_reasoning"]["score"] == 200
    assert found["perception"] == 400 / 6 + 100 / 3 + 50 and found["cognition"] == 200
    assert "existence" not in found["missing"] and len(found["missing"]) == 11
    table = score("mme", "--results", folder).splitlines()
    assert [x.split() for x in table if x.startswith("here")] == [["here", "150.0", "200.0"]]
    assert "not a whole MME" in table[-1]
    perception_and_cognition = [x.split()[-2:] for x in table if x.startswith("LaVIN")]
    assert perception_and_cognition == [["963.6", "249.6"]]


def test_a_perfect_mme_is_2000_and_800(score, tmp_path):
    rows = [(picture, q, a, a) for picture in (A, B) for q, a in (("q", "Yes"), ("r", "No"))]
    folder = results(tmp_path, **{task: rows for task in scores.PERCEPTION + scores.COGNITION})
    found = json.loads(score("mme", "--results", folder, "--json"))
    assert found["perception"] == 2000 and found["cognition"] == 800 and found["missing"] == []
    assert "not a whole" not in score("mme", "--results", folder)


@pytest.mark.parametrize("task, text, message", [
    ("celebrities", "",
     "celebrities.txt: unknown MME task 'celebrities'; did you mean celebrity? known: existence"),
    ("OCR", "a.jpg\tq\tYes\tNo\na.jpg\tq\tYes\n",
     "OCR.txt:2: 2 tabs, expected picture<TAB>question<TAB>Yes|No<TAB>reply"),
    ("OCR", "a.jpg\tq\tTrue\tNo\n", "OCR.txt:1: the right answer is 'True', expected Yes or No"),
    ("OCR", "a.jpg\tq\tYes\tNo\n", "OCR.txt: 1 replies for a.jpg, expected 2; is the run finished?"),
    ("OCR", "\n", "OCR.txt: empty")])
def test_mme_mistakes_in_result_files(score, tmp_path, task, text, message):
    (tmp_path / f"{task}.txt").write_text(text)
    assert message in one_line(score, "mme", "--results", tmp_path)


def test_mme_mistakes_in_folders_and_flags(score, tmp_path):
    assert "no <task>.txt here" in one_line(score, "mme", "--results", tmp_path)
    assert "no such folder of MME results" in one_line(score, "mme", "--results", tmp_path / "none")
    assert "give --data DIR" in one_line(score, "mme")
    unknown = one_line(score, "mme", "--data", tmp_path, "--tasks", "OCR,Color")
    assert "--tasks: unknown MME task 'Color'; did you mean color?" in unknown


# ---------------------------------------------------------------------------------------------------
# TruthfulQA

def log_probabilities() -> dict:
    p = [{"Blue": 0.5, "It is blue": 0.1, "Green": 0.3, "Red as blood": 0.1},
         {"It has four legs": 0.02, "Four": 0.04, "Two": 0.03, "Six": 0.01, "None at all": 0.1}]
    # exp(-900) underflows to 0
    return {str(i): {a: math.log(x) - 900 for a, x in row.items()} for i, row in enumerate(p)}


def test_mc1_and_mc2_by_hand(score, tmp_path):
    argv = ("truthfulqa", "--data", published.truthfulqa(tmp_path / "mc_task.json"),
            "--predictions", published.put(tmp_path / "p.json", log_probabilities()))
    found = json.loads(score(*argv, "--json"))
    assert found["MC1"] == 50 and found["questions"] == 2
    assert found["MC2"] == pytest.approx(100 * (0.6 / 1.0 + 0.06 / 0.2) / 2)
    table = score(*argv)
    assert "LaVIN (paper)" in table and "47.9" in table and "here, MC1" in table


def test_truthfulqa_mistakes(score, tmp_path):
    file, logs = published.truthfulqa(tmp_path / "mc_task.json"), log_probabilities()

    def message(predictions):
        written = published.put(tmp_path / "p.json", predictions)
        return one_line(score, "truthfulqa", "--data", file, "--predictions", written)

    del logs["1"]["Six"]
    assert message(logs).endswith("p.json: question 1: no finite log-probability for 'Six'")
    for wrong in (math.nan, math.inf, True, "-3", None, 10 ** 400):
        logs["1"]["Six"] = wrong
        assert "question 1: no finite log-probability for 'Six'" in message(logs)
    told = message({**logs, "1": "x"})
    assert "p.json: the prediction for 1 is 'x'; expected {answer: log-probability}" in told
    assert "no predictions for some of the questions" in message({"0": {}})
    assert "give --data FILE" in one_line(score, "truthfulqa")


# ---------------------------------------------------------------------------------------------------
# own data

OWN = [{"instruction": "Who?", "image": "a.jpg", "output": "A  brown Cat."},
       {"instruction": "Where?", "image": "a.jpg", "output": "on the sofa"},
       {"instruction": "When?", "output": "At 9.30 p.m."}, {"instruction": "Why?", "output": ""},
       {"instruction": "How?", "image": None}]


def test_exact_matches_counted_by_hand(score, tmp_path):
    """Case, blanks and one final full stop do not count. The last two records have no answer to compare."""
    file = published.put(tmp_path / "own.json", OWN)

    def found(*texts):
        said = published.put(tmp_path / "p.json", {f"own:{i}": text for i, text in enumerate(texts)})
        return score("json", "--data", file, "--predictions", said, *flags)

    flags = ["--json"]
    assert json.loads(found(" a brown\ncat", "On the sofa!", "at 9.30 p.m", "x", "y")) == {
        "exact_match": {"with a picture": 50.0, "without": 100.0, "all": 66.67},
        "counts": {"with a picture": [1, 2, 2], "without": [1, 1, 3], "all": [2, 3, 5]}}
    wrong = json.loads(found("a cat", "", "at 930 pm", "", ""))
    assert wrong["exact_match"] == {"with a picture": 0.0, "without": 0.0, "all": 0.0}
    flags = []
    rows = found("a brown cat", "on the sofa..", "At 9.30 p.m.", "", "").splitlines()
    assert rows[1].split() == "with a picture 50.00 1 2 2".split()
    assert rows[2].split() == "without 100.00 1 1 3".split() and "paper" not in "".join(rows)
    published.put(file, OWN[3:])
    assert found("x", "y").splitlines()[3].split() == "all - 0 0 2".split()
    assert "is 3; expected a text" in one_line(found, "x", 3)
    assert "no predictions for some of the records of" in one_line(found, "x")


def test_own_data_mistakes(score, tmp_path):
    assert "json: give --data FILE" in one_line(score, "json")
    told = one_line(score, "json", "--data", "json:none.json")
    assert "none.json: no such file; expected records with instruction, input, output" in told
