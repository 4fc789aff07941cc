"""Turn predictions into the numbers of the paper's tables. Needs no torch, no weights and no pictures.

    Table 1   ScienceQA    accuracy in nine columns, from the letter in "The answer is X."
    Table 4   COCO         BLEU-4 and CIDEr
    Table 5   MME          scores for perception and cognition
              TruthfulQA   MC1 and MC2
    own data               exact match
"""
import difflib
import math
import re
import shutil
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from pathlib import Path

import prompts
from official import records
from official.saving import write_atomically
from prompts import LETTERS, Sample

# --- files of predictions --------------------------------------------------------------------------

def read_predictions(path: str | Path) -> dict[str, object]:
    """{id: prediction}, from a .json of that form, evaluate.py's .jsonl or COCO's [{image_id, caption}]."""
    path, what = Path(path), "predictions {id: prediction}"
    if path.suffix == ".jsonl":
        rows = records.read_records(path, what)
        if isinstance(rows[0][1], dict) and "run" in rows[0][1]:  # the flags that evaluate.py ran with
            del rows[0]
        return {records.field(where, row, "id"): records.field(where, row, "prediction", str | int | dict)
                for where, row in rows}
    content = records.read_json(path, what, list | dict)
    if isinstance(content, dict):
        return content
    captions = {}
    for i, row in enumerate(content):
        text = records.field(f"{path}: record {i}", row, "caption")
        captions[str(records.field(f"{path}: record {i}", row, "image_id", str | int))] = text
    return captions


def predictions_for(path: str, ids: list[str], what: str) -> dict[str, object]:
    """The predictions in `path`. ValueError unless they are for exactly these ids, the ids of `what`."""
    predictions, known = read_predictions(path), set(ids)
    missing = [id for id in ids if id not in predictions]
    unknown = [id for id in predictions if id not in known]
    for fault, wrong in (("predictions for ids not among", unknown), ("no predictions for some of", missing)):
        if wrong:
            more = f" and {len(wrong) - 3} more" if wrong[3:] else ""
            raise ValueError(f"{path}: {fault} the {what}: {', '.join(wrong[:3])}{more}")
    return predictions


def check_types(file: str | Path, predictions: dict[str, object], kind: type, expected: str) -> None:
    for id, prediction in predictions.items():
        if not isinstance(prediction, kind) or isinstance(prediction, bool):
            raise ValueError(f"{file}: the prediction for {id} is {prediction!r:.60}; expected {expected}")


def did_you_mean(name: str, names) -> str:
    """The end of a message about an unknown name: the most similar of the known names, and all of them."""
    near = "".join(f"did you mean {x}? " for x in difflib.get_close_matches(name, names, n=1))
    return f"{near}known: {', '.join(names)}"


def table(columns: list[str], rows: dict[str, list[str]]) -> str:
    """Columns of text aligned to the right, after the rows' labels."""
    label_width = max(map(len, rows))
    widths = [max(map(len, cells)) + 2 for cells in zip(columns, *rows.values())]
    return "\n".join(f"{label:<{label_width}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths))
                     for label, cells in {"": columns, **rows}.items())


# --- Table 1: ScienceQA ----------------------------------------------------------------------------

COLUMNS = {
    "NAT": lambda p: p["subject"] == "natural science",
    "SOC": lambda p: p["subject"] == "social science",
    "LAN": lambda p: p["subject"] == "language science",
    "TXT": lambda p: bool(p["hint"]),
    "IMG": lambda p: bool(p.get("image")),
    "NO": lambda p: not p["hint"] and not p.get("image"),
    "G1-6": lambda p: int(p["grade"].removeprefix("grade")) <= 6,
    "G7-12": lambda p: int(p["grade"].removeprefix("grade")) >= 7,
    "Avg": lambda p: True,
}
TABLE_1 = {  # the paper's rows, on all problems of the test split
    "Human": (90.23, 84.97, 87.48, 89.60, 87.50, 88.10, 91.59, 82.42, 88.40),
    "LLaVA": (90.36, 95.95, 88.00, 89.49, 88.00, 90.66, 90.93, 90.90, 90.92),
    "LLaMA-Adapter": (84.37, 88.30, 84.36, 83.72, 80.32, 86.90, 85.83, 84.05, 85.19),
    "LaVIN-7B": (89.25, 94.94, 85.24, 88.51, 87.46, 88.08, 90.16, 88.07, 89.41),
    "LaVIN-13B": (90.32, 94.38, 87.73, 89.44, 87.65, 90.31, 91.19, 89.26, 90.50),
    "LaVIN-13B, second row": (89.88, 94.49, 89.82, 88.95, 87.61, 91.85, 91.45, 89.72, 90.83),
}
TABLE_1_PROBLEMS = 4241
ANSWER = re.compile(r"The answer is ([A-Z])\.")  # the first match counts


def read_answer(answer: str | int | None, n_choices: int) -> int | None:
    """The index of the option that an answer chooses, or None (counted as wrong) if it chooses none.

    answer: a generated text, or an option index
    """
    if isinstance(answer, int):
        index = answer
    else:
        found = ANSWER.search(answer or "")
        index = LETTERS.find(found[1]) if found else -1
    return index if 0 <= index < n_choices else None


def scienceqa(samples: list[Sample], answers: dict[str, str | int], file: str = "predictions") -> dict:
    """accuracy: {column: per cent}, columns: {column: [right, all]}, unparsable: answers without a letter

    "no IMG" is added to the paper's nine columns: all problems without a picture, with or without a hint.
    file: what messages call the answers
    """
    check_types(file, answers, str | int | None, "an option index or a text")
    chosen = {s.id: read_answer(answers[s.id], len(s.problem["choices"])) for s in samples}
    counts = {}
    for name, belongs in {**COLUMNS, "no IMG": lambda p: not p.get("image")}.items():
        rows = [s for s in samples if belongs(s.problem)]
        counts[name] = [sum(chosen[s.id] == s.problem["answer"] for s in rows), len(rows)]
    accuracy = {name: round(100 * right / n, 2) if n else None for name, (right, n) in counts.items()}
    return {"accuracy": accuracy, "columns": counts, "unparsable": sum(c is None for c in chosen.values())}


def scienceqa_table(result: dict, paper: bool = False) -> str:
    """The nine columns and the number of problems in each.

    paper: print the paper's own rows above them, if there are as many problems as those rows are about. Other
    problems, such as the small world's, cannot be compared with them.
    """
    percents = [result["accuracy"][x] for x in COLUMNS]
    paper = paper and result["columns"]["Avg"][1] == TABLE_1_PROBLEMS
    rows = {f"{name} (paper)": [f"{x:.2f}" for x in row] for name, row in TABLE_1.items()} if paper else {}
    rows["here"] = ["-" if x is None else f"{x:.2f}" for x in percents]
    rows["problems"] = [str(result["columns"][x][1]) for x in COLUMNS]
    return f"{table(list(COLUMNS), rows)}\n{result['unparsable']} answers without a letter, counted as wrong"


# --- Table 4: COCO captions ------------------------------------------------------------------------

TABLE_4 = {  # the paper's rows: BLEU-4, CIDEr
    "ClipCap": (33.5, 113.1), "LLaMA-Adapter V2": (36.2, 122.2), "BLIP": (40.4, 136.7),
    "BLIP-2": (43.7, 145.3), "LaVIN-13B": (36.4, 126.9),
    "LaVIN-13B, pre-trained on 0.6M pictures": (37.8, 131.7),
}


def read_references(path: str | Path, ids) -> dict[str, list[str]]:
    """{picture id: captions} of dataset_coco.json's test split, or of these ids in COCO's captions_*.json."""
    content = records.read_json(Path(path), "dataset_coco.json, or COCO's captions_val2014.json")
    if not isinstance(content, dict) or "annotations" not in content:
        return {s.id: s.problem["captions"] for s in prompts.read_coco(path, split="test")}
    captions = {}
    for i, r in enumerate(records.field(path, content, "annotations", list)):
        where = f"{path}: annotation {i}"
        text, id = records.field(where, r, "caption"), str(records.field(where, r, "image_id", str | int))
        if id in ids:
            captions.setdefault(id, []).append(text)
    return captions


def caption_tools():
    """BLEU-4, CIDEr and their tokenizer. ValueError says what to install if a part is missing."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError:
        raise ValueError("BLEU-4 and CIDEr need the COCO caption library: pip install pycocoevalcap (100 MB);"
                         " its tokenizer needs Java") from None
    if not shutil.which("java"):
        raise ValueError("the COCO caption library needs Java, but there is no `java` on the PATH; install a "
                         "Java runtime, for example default-jre-headless")
    return Bleu(4), Cider(), PTBTokenizer()


def can_score_captions() -> bool:
    """Whether caption_tools() works here; prints why not. Call it before the captioning, which takes long."""
    try:
        caption_tools()
    except ValueError as e:
        print(f"the captions will not be scored: {e}", file=sys.stderr)
        return False
    return True


def coco(captions: dict[str, str], references: dict[str, list[str]], file: str = "predictions") -> dict:
    """BLEU-4 and CIDEr in per cent, not rounded, and the number of pictures"""
    check_types(file, captions, str, "a text")
    for id in captions:
        if not references[id]:
            raise ValueError(f"picture {id} has no reference caption; remove it from {file}")
    bleu, cider, tokenizer = caption_tools()
    with redirect_stdout(sys.stderr):  # the library prints to stdout, which is for scores
        said = tokenizer.tokenize({id: [{"caption": text}] for id, text in captions.items()})
        true = tokenizer.tokenize({id: [{"caption": text} for text in references[id]] for id in captions})
        return {"BLEU-4": 100 * bleu.compute_score(true, said)[0][3],
                "CIDEr": 100 * float(cider.compute_score(true, said)[0]), "pictures": len(captions)}


def coco_table(result: dict) -> str:
    columns = ["BLEU-4", "CIDEr"]
    rows = {f"{name} (paper)": [f"{x:.1f}" for x in row] for name, row in TABLE_4.items()}
    rows[f"here, {result['pictures']} pictures"] = [f"{result[c]:.1f}" for c in columns]
    return table(columns, rows)


# --- Table 5: MME and TruthfulQA -------------------------------------------------------------------

TABLE_5 = {  # the paper's rows: TruthfulQA, MME perception, MME cognition
    # The paper swaps the headings of its MME columns: perception can reach 2,000, but cognition only 800.
    "LLaMA": (38.7, None, None), "LLaMA-Adapter V2": (24.4, 972.6, 248.9), "LLaVA": (16.4, 502.8, 214.6),
    "BLIP-2": (None, 1293.8, 290.0), "MiniGPT-4": (None, 866.5, 292.1), "LaVIN": (47.9, 963.6, 249.6),
}
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
              "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
MME_LINE = "picture<TAB>question<TAB>Yes|No<TAB>reply"


def check_task(where: str, task: str) -> None:
    if task not in PERCEPTION + COGNITION:
        raise ValueError(f"{where}: unknown MME task {task!r}; {did_you_mean(task, PERCEPTION + COGNITION)}")


def mme_tasks(names: str) -> list[str]:
    """The tasks that the flag --tasks names, separated by commas; all tasks if it is empty."""
    tasks = names.split(",") if names else [*PERCEPTION, *COGNITION]
    for task in tasks:
        check_task("--tasks", task)
    return tasks


def read_reply(reply: str) -> str | None:
    """"Yes", "No" or None, from the first four characters as in MME's own tool. "Not at all" is a no."""
    head = reply[:4].lower()
    return "Yes" if "yes" in head else "No" if "no" in head else None


def mme_task(file: Path) -> dict:
    """The score of a result file: accuracy + accuracy+, in per cent each.

    accuracy is the share of right replies. accuracy+ is the share of pictures with two right replies.
    """
    pictures, replies, unreadable = {}, 0, 0
    for n, line in enumerate(records.read_lines(file, "MME results"), start=1):
        if not line.strip():
            continue
        cells = line.split("\t", 3)
        if len(cells) < 4:
            raise ValueError(f"{file}:{n}: {len(cells) - 1} tabs, expected {MME_LINE}")
        picture, _, answer, reply = cells
        if answer not in ("Yes", "No"):
            raise ValueError(f"{file}:{n}: the right answer is {answer!r}, expected Yes or No")
        said = read_reply(reply)
        pictures.setdefault(picture, []).append(said == answer)
        replies, unreadable = replies + 1, unreadable + (said is None)
    for picture, right in pictures.items():
        if len(right) != 2:
            raise ValueError(f"{file}: {len(right)} replies for {picture}, expected 2; is the run finished?")
    if not pictures:
        raise ValueError(f"{file}: empty; expected lines {MME_LINE}")
    accuracy = 100 * sum(map(sum, pictures.values())) / replies
    plus = 100 * sum(map(all, pictures.values())) / len(pictures)
    return {"score": accuracy + plus, "accuracy": accuracy, "accuracy+": plus, "replies": replies,
            "unreadable": unreadable}


def write_mme(folder: str | Path, samples: list[Sample], replies: dict[str, str]) -> None:
    """Write the replies in MME's own format, one <task>.txt per task."""
    lines = defaultdict(list)
    for s in samples:
        cells = [s.problem[name] for name in ("picture", "question", "answer")]
        cells.append(" ".join(replies[s.id].split()))  # on one line
        lines[s.problem["task"]].append("\t".join(cells) + "\n")
    for task in lines:
        write_atomically(Path(folder, f"{task}.txt"), "".join(lines[task]).encode())


def mme(folder: str | Path) -> dict:
    """tasks: {task: its scores}, perception, cognition: sums over tasks, missing: tasks without a file"""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of MME results")
    files = sorted(folder.glob("*.txt"))
    for file in files:
        check_task(str(file), file.stem)
    if not files:
        raise FileNotFoundError(f"{folder}: no <task>.txt here")
    tasks = {t: mme_task(folder / f"{t}.txt") for t in PERCEPTION + COGNITION if folder / f"{t}.txt" in files}
    sums = {name: sum(tasks[t]["score"] for t in group if t in tasks)
            for name, group in (("perception", PERCEPTION), ("cognition", COGNITION))}
    return {"tasks": tasks, **sums, "missing": [t for t in PERCEPTION + COGNITION if t not in tasks]}


def mme_table(result: dict) -> str:
    tasks = table(["score", "accuracy", "accuracy+", "replies", "unreadable"],
                  {task: [f"{r[x]:.2f}" for x in ("score", "accuracy", "accuracy+")] +
                         [str(r["replies"]), str(r["unreadable"])] for task, r in result["tasks"].items()})
    rows = {f"{name} (paper)": [f"{x:.1f}" for x in row[1:]] for name, row in TABLE_5.items() if row[1]}
    rows["here"] = [f"{result['perception']:.1f}", f"{result['cognition']:.1f}"]
    note = f"\nnot a whole MME: {', '.join(result['missing'])} missing" if result["missing"] else ""
    return f"{tasks}\n\n{table(['perception', 'cognition'], rows)}{note}"


def truthfulqa(questions: list[Sample], predictions: dict[str, dict[str, float]],
               file: str = "predictions") -> dict:
    """MC1 and MC2 in per cent, and the number of questions.

    predictions: {question id: {answer: log p(answer | question)}}
    MC1: the share of questions whose one true answer is the likeliest of mc1_targets
    MC2: the probability of the true answers divided by that of all answers in mc2_targets, on average
    """
    check_types(file, predictions, dict, "{answer: log-probability}")
    mc1, mc2 = [], []
    for q in questions:
        logp, single, several = predictions[q.id], q.problem["mc1_targets"], q.problem["mc2_targets"]
        for answer in (*single, *several):
            value = logp.get(answer)
            if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # nan fails, too
                raise ValueError(f"{file}: question {q.id}: no finite log-probability for {answer!r}")
        (true,) = (a for a, label in single.items() if label)
        mc1.append(logp[true] > max(logp[a] for a, label in single.items() if not label))
        top = max(logp[a] for a in several)  # subtract it: exp() of a long answer's log p underflows to 0
        p = {a: math.exp(logp[a] - top) for a in several}
        mc2.append(sum(p[a] for a, label in several.items() if label) / sum(p.values()))
    return {"MC1": 100 * sum(mc1) / len(mc1), "MC2": 100 * sum(mc2) / len(mc2), "questions": len(questions)}


def truthfulqa_table(result: dict) -> str:
    rows = {f"{name} (paper)": [f"{x:.1f}"] for name, (x, _, _) in TABLE_5.items() if x is not None}
    rows |= {f"here, {name}": [f"{result[name]:.1f}"] for name in ("MC1", "MC2")}
    note = "the paper does not say whether it reports MC1 or MC2"
    return f"{table(['TruthfulQA'], rows)}\n{result['questions']} questions; {note}"


# --- your own data ---------------------------------------------------------------------------------

def normalise(answer: str) -> str:
    """Case, a final full stop and blanks at both ends do not count; blanks within count as one."""
    return " ".join(answer.casefold().split()).removesuffix(".").rstrip()


def exact_match(samples: list[Sample], answers: dict[str, str], file: str = "predictions") -> dict:
    """exact_match: {rows: per cent}, counts: {rows: [right, scored, all]}

    The rows: records with a picture, without one, and all. An answer is right if it equals the record's
    response, both normalised. A record without a response is not scored.
    file: what messages call the answers
    """
    check_types(file, answers, str, "a text")
    right = {s.id: normalise(answers[s.id]) == normalise(s.response) for s in samples if s.response}
    counts = {}
    for name, belongs in {"with a picture": lambda s: s.image, "without": lambda s: not s.image,
                          "all": lambda s: True}.items():
        ids = [s.id for s in samples if belongs(s)]
        scored = [right[id] for id in ids if id in right]
        counts[name] = [sum(scored), len(scored), len(ids)]
    percent = {name: round(100 * hits / n, 2) if n else None for name, (hits, n, _) in counts.items()}
    return {"exact_match": percent, "counts": counts}


def exact_match_table(result: dict) -> str:
    rows = {name: ["-" if percent is None else f"{percent:.2f}", *map(str, result["counts"][name])]
            for name, percent in result["exact_match"].items()}
    return table(["exact match", "right", "scored", "records"], rows)
