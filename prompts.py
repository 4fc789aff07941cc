"""Published data sets -> what is asked, and what should be answered. No torch here, and no picture is opened.

A mixture is sources separated by commas; a bare DIR is scienceqa:DIR.

    scienceqa:DIR           problems.json, pid_splits.json, captions.json (optional), images/<split>/<id>/<image>
    alpaca:FILE             alpaca_data.json
    llava:PATH[:IMAGES]     llava_instruct_150k.json, or one of its three parts, or the folder they lie in
    coco:DIR[:IMAGES]       dataset_coco.json (Karpathy's split); pictures in train2014/, val2014/
    json:FILE[:IMAGES]      your own: a JSON list, or JSONL with one record a line:

        {"instruction": "What is in the picture?", "image": "cat.jpg", "output": "A cat on a sofa."}
        {"instruction": "What color is the sofa?", "image": "cat.jpg", "output": "It is red."}
        {"instruction": "Translate to French.", "input": "Good morning.", "output": "Bonjour."}
        {"instruction": "Name a prime above 10.", "output": "11"}
        {"instruction": "Add a title.", "input": "The cat slept all day.", "output": "A lazy day"}
        {"instruction": "What is a prime?", "output": "A number that only 1 and itself divide."}

IMAGES defaults to what lies beside the file: train2014/ for LLaVA, the file's own folder for json.
"""
import difflib
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, NamedTuple

LETTERS = "ABCDE"


@dataclass
class Sample:
    id: str
    prompt: str
    response: str  # "" where only the prompt is wanted
    image: Path | None
    problem: dict  # the record it came from, where scoring needs its fields


# ---------------------------------------------------------------------------------------------------
# files

def read_json(path: Path, what: str = "a data file"):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {what}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None


def read_lines(path: Path, what: str) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {what}")
    try:
        return path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")  # splitlines would cut at U+2028 too
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not text in UTF-8 ({e.reason} at byte {e.start})") from None


def read_records(path: Path, what: str) -> list[tuple[str, dict]]:
    """[(where: file and index, record)] of a JSON list, or of a .jsonl file"""
    if path.suffix == ".jsonl":
        records = []
        for n, line in enumerate(read_lines(path, what), start=1):
            try:
                records += [(f"{path}:{n}", json.loads(line))] if line.strip() else []
            except ValueError as e:
                raise ValueError(f"{path}:{n}: not valid JSON ({e})") from None
    else:
        rows = read_json(path, what)
        if not isinstance(rows, list):
            raise ValueError(f"{path}: holds {type(rows).__name__}, expected a list; {what}")
        records = [(f"{path}: record {i}", row) for i, row in enumerate(rows)]
    if not records:
        raise ValueError(f"{path}: empty; expected {what}")
    return records


def field(where: str, record: dict, name: str, kind: type = str, default=None):
    """record[name], which must be of `kind`; absent it is the default, or an error without one"""
    value = record.get(name, default) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {name!r} is missing or not {kind.__name__}")
    return value


def check_pictures(samples: list[Sample]) -> None:
    """ValueError that names the first sample whose picture is missing. One listing a folder: network disks are slow."""
    folders = defaultdict(list)
    for s in samples:
        if s.image:
            folders[s.image.parent].append(s)
    missing = []
    for folder, rows in folders.items():
        here = set(os.listdir(folder)) if folder.is_dir() else ()
        missing += [s for s in rows if s.image.name not in here]
    if missing:
        raise ValueError(f"{missing[0].image}: no such picture, needed by sample {missing[0].id}" +
                         (f" (and {len(missing) - 1} more are missing)" if missing[1:] else ""))


# ---------------------------------------------------------------------------------------------------
# ScienceQA (Lu et al., "Learn to Explain", NeurIPS 2022)

FIELDS = {"question": str, "choices": list, "answer": int, "hint": str, "grade": str, "subject": str,
          "lecture": str, "solution": str}
ANSWERS = {  # L lecture, E explanation; that "AL" carries the solution and "AE" the lecture is the data set's own slip
    "A": "The answer is {answer}.", "AL": "The answer is {answer}. BECAUSE: {solution}",
    "AE": "The answer is {answer}. BECAUSE: {lecture}", "ALE": "The answer is {answer}. BECAUSE: {lecture} {solution}",
    "AEL": "The answer is {answer}. BECAUSE: {solution} {lecture}", "LA": "{lecture} The answer is {answer}.",
    "EA": "{solution} The answer is {answer}.", "LEA": "{lecture} {solution} The answer is {answer}.",
    "ELA": "{solution} {lecture} The answer is {answer}.",
}


def check_format(form: str) -> None:
    """ValueError unless `form` is letters of Q, C, M in any order, a dash, and a known answer."""
    asked, _, answered = form.partition("-")
    if not asked or set(asked) - set("QCM") or len(set(asked)) < len(asked) or answered not in ANSWERS:
        raise ValueError(f"unknown prompt format {form!r}; expected Q, C, M in any order, a dash and one of "
                         f"{', '.join(ANSWERS)}: for example QCM-ALE")


def tidy(text: str) -> str:
    return text.replace("  ", " ").strip()


def build_prompt(question: str, context: str, choices: list[str], form: str = "QCM-ALE") -> str:
    """What stands before the response. Without choices the options line is left out."""
    options = " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(choices))
    lines = {"Q": f"Question: {question}", "C": f"Context: {context or 'N/A'}", "M": f"Options: {options}"}
    asked = [lines[x] for x in form.partition("-")[0] if x != "M" or choices]
    return tidy("\n".join([*asked, "Response:"]))


def build_response(problem: dict, form: str = "QCM-ALE") -> str:
    lecture, solution = (problem[x].replace("\n", "\\n") for x in ("lecture", "solution"))
    text = ANSWERS[form.partition("-")[2]].format(answer=LETTERS[problem["answer"]], lecture=lecture, solution=solution)
    return tidy(text).removesuffix("BECAUSE:").strip()


def check_problem(path: Path, id: str, p: dict) -> None:
    for name, kind in FIELDS.items():
        field(f"{path}: problem {id}", p, name, kind)
    if not 2 <= len(p["choices"]) <= len(LETTERS) or not 0 <= p["answer"] < len(p["choices"]):
        raise ValueError(f"{path}: problem {id}: answer {p['answer']} does not fit its {len(p['choices'])} choices "
                         f"(2 to {len(LETTERS)} are possible)")


def read_scienceqa(folder: str | Path, split: str, form: str = "QCM-ALE", captions: bool = False,
                   vision: bool = True) -> list[Sample]:
    """The problems of one split. captions: append each picture's to the hint. vision False: drop the pictures.

    FileNotFoundError or ValueError in one line, with the problem's id.
    """
    folder, what = Path(folder), "a folder in ScienceQA's layout"
    check_format(form)
    problems, splits = read_json(folder / "problems.json", what), read_json(folder / "pid_splits.json", what)
    if split not in splits:
        raise ValueError(f"{folder / 'pid_splits.json'}: no split {split!r}; it has {', '.join(splits)}")
    texts = read_json(folder / "captions.json", what)["captions"] if captions else {}
    samples = []
    for id in map(str, splits[split]):
        if id not in problems:
            raise ValueError(f"{folder / 'problems.json'}: problem {id} of split {split} is missing")
        p = problems[id]
        check_problem(folder / "problems.json", id, p)
        context = f"{p['hint']} {texts.get(id, '')}".strip()
        image = folder / "images" / split / id / p["image"] if p.get("image") and vision else None
        samples.append(Sample(id, build_prompt(p["question"], context, p["choices"], form), build_response(p, form),
                              image, p))
    return samples


# ---------------------------------------------------------------------------------------------------
# instructions

def instruct(instruction: str, input: str = "") -> str:
    """The prompt of everything but ScienceQA."""
    return f"Instruction: {f'{instruction} {input}'.strip()}\nResponse:"  # not tidied: double spaces indent code


def read_instructions(file: str | Path, images: Path | None = None) -> list[Sample]:
    """Alpaca-52k (Taori et al., 2023), or your own records: instruction, output, and perhaps input and image."""
    file, samples = Path(file), []
    for i, (where, r) in enumerate(read_records(file, "records with instruction, input, output")):
        name = field(where, r, "image", default="")
        prompt = instruct(field(where, r, "instruction"), field(where, r, "input", default=""))
        image = (images or file.parent) / name if name else None
        samples.append(Sample(f"{file.stem}:{i}", prompt, field(where, r, "output").strip(), image, {}))
    return samples


LLAVA_PARTS = ("complex_reasoning_77k.json", "detail_23k.json", "conversation_58k.json")
LLAVA_WHOLE = "llava_instruct_150k.json"  # the three joined


def read_llava(path: str | Path, images: Path | None = None) -> list[Sample]:
    """LLaVA-158k (Liu et al., 2023). Every question-answer pair of a conversation is a sample, without the earlier turns.

    Pictures are COCO's train2014, under LLaVA's name for them (000000215677.jpg) or COCO's (COCO_train2014_000..).
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = [path / n for n in ([LLAVA_WHOLE] if (path / LLAVA_WHOLE).is_file() else LLAVA_PARTS)]
    images = images or files[0].parent / "train2014"
    here = set(os.listdir(images)) if images.is_dir() else ()
    samples = []
    for file in files:
        for i, (where, r) in enumerate(read_records(file, f"LLaVA's {LLAVA_WHOLE} or its parts")):
            name = field(where, r, "image")
            image = images / (f"COCO_train2014_{name}" if f"COCO_train2014_{name}" in here else name)
            turns = field(where, r, "conversations", list)
            said = [(field(where, t, "from"), field(where, t, "value").replace("<image>", "").strip()) for t in turns]
            if [who for who, _ in said] != ["human", "gpt"] * (len(said) // 2) or not said:
                raise ValueError(f"{where}: 'conversations' do not go human, gpt, human, gpt, ..")
            samples += [Sample(f"{file.stem}:{i}.{k // 2}", instruct(said[k][1]), said[k + 1][1], image, {})
                        for k in range(0, len(said), 2)]
    return samples


CAPTION = "Describe the picture in one sentence."  # neither the paper nor its code's documentation tells theirs


def read_coco(path: str | Path, images: Path | None = None, split: str = "train") -> list[Sample]:
    """COCO captions in Karpathy's split, where restval belongs to train.

    train: one sample a sentence. Other splits: one a picture, no response, its sentences in problem["captions"].
    """
    file = Path(path) / "dataset_coco.json" if Path(path).is_dir() else Path(path)
    records = field(str(file), read_json(file, "Karpathy's dataset_coco.json"), "images", list)
    samples, known = [], set()
    for i, r in enumerate(records):
        where = f"{file}: image {i}"
        its = field(where, r, "split").replace("restval", "train")
        known.add(its)
        if its != split:
            continue
        image = (images or file.parent) / field(where, r, "filepath", default="") / field(where, r, "filename")
        texts = [" ".join(field(where, s, "raw").split()) for s in field(where, r, "sentences", list)]
        id = str(r.get("cocoid", r.get("imgid", i)))
        if split == "train":
            samples += [Sample(f"coco:{id}.{k}", instruct(CAPTION), text, image, {}) for k, text in enumerate(texts)]
        else:
            samples.append(Sample(id, instruct(CAPTION), "", image, {"captions": texts}))
    if not samples:
        raise ValueError(f"{file}: no image of split {split!r}; it has {', '.join(sorted(known)) or 'none at all'}")
    return samples


# ---------------------------------------------------------------------------------------------------
# benchmarks: asked, never trained on

def read_mme(folder: str | Path, tasks: list[str]) -> list[Sample]:
    """MME (Fu et al., 2023): for each task a folder of pictures, each with a <name>.txt of two lines question<TAB>Yes|No.

    Beside the pictures, or in questions_answers_YN/ with the pictures in images/: the release has both.
    """
    folder, samples = Path(folder), []
    found = [t for t in tasks if (folder / t).is_dir()]
    if not found:
        raise FileNotFoundError(f"{folder}: none of MME's folders is here; expected {', '.join(tasks)}")
    for task in found:
        texts, pictures = folder / task / "questions_answers_YN", folder / task / "images"
        texts, pictures = (texts, pictures) if texts.is_dir() else (folder / task, folder / task)
        files = sorted(texts.glob("*.txt"))
        if not files:
            raise FileNotFoundError(f"{texts}: no <picture>.txt with questions here")
        here = sorted(os.listdir(pictures)) if pictures.is_dir() else ()
        names = {Path(n).stem: n for n in here if not n.endswith(".txt")}
        for file in files:
            name = names.get(file.stem, f"{file.stem}.jpg")  # a missing one is told by check_pictures
            for n, line in enumerate(read_lines(file, "questions"), start=1):
                question, _, answer = line.strip().rpartition("\t")
                if not line.strip():
                    continue
                if not question or answer not in ("Yes", "No"):
                    raise ValueError(f"{file}:{n}: expected question<TAB>Yes or No")
                samples.append(Sample(f"{task}/{name}:{n}", instruct(question), "", pictures / name,
                                      {"task": task, "picture": name, "question": question, "answer": answer}))
    return samples


def read_truthfulqa(file: str | Path) -> list[Sample]:
    """TruthfulQA's mc_task.json (Lin et al., 2021): question, mc1_targets and mc2_targets {answer: 0 or 1}."""
    samples = []
    for i, (where, r) in enumerate(read_records(Path(file), "TruthfulQA's mc_task.json")):
        for name in ("mc1_targets", "mc2_targets"):
            labels = field(where, r, name, dict)
            if set(labels.values()) != {0, 1} or not all(a.strip() for a in labels):
                raise ValueError(f"{where}: {name!r} needs answers that are true (1) and others that are false (0)")
        if sum(r["mc1_targets"].values()) != 1:
            raise ValueError(f"{where}: 'mc1_targets' needs exactly one true answer")
        samples.append(Sample(str(i), instruct(field(where, r, "question")), "", None, r))
    return samples


# ---------------------------------------------------------------------------------------------------
# mixtures

KINDS = ("scienceqa", "alpaca", "llava", "coco", "json")


class Source(NamedTuple):
    kind: str
    path: str
    images: Path | None

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}"

    def read(self, split: str = "train", form: str = "QCM-ALE", captions: bool = False, vision: bool = True) -> list[Sample]:
        """Its samples, all pictures being there. form, captions: of ScienceQA. vision False: drop the pictures."""
        if self.kind == "scienceqa":
            samples = read_scienceqa(self.path, split, form, captions)
        elif self.kind == "llava":
            samples = read_llava(self.path, self.images)
        elif self.kind == "coco":
            samples = read_coco(self.path, self.images, split)
        else:
            samples = read_instructions(self.path, self.images)
        if not samples:
            raise ValueError(f"{self}: split {split} is empty")
        for s in samples if not vision else ():
            s.image = None
        check_pictures(samples)
        return samples


def mixture(spec: str) -> Iterator[Source]:
    """The sources that --data names."""
    for part in spec.split(","):
        kind, colon, rest = part.strip().partition(":")
        if not colon:
            kind, rest = "scienceqa", kind
        if kind not in KINDS:
            near = [f"did you mean {word}?; " for word in difflib.get_close_matches(kind, KINDS, n=1)]
            raise ValueError(f"--data {part.strip()}: unknown kind {kind!r}; {''.join(near)}known: {', '.join(KINDS)}")
        path, _, images = rest.partition(":")
        if not path:
            raise ValueError(f"--data {part.strip() or spec!r}: names no file or folder; expected {kind}:PATH")
        if images and kind in ("scienceqa", "alpaca"):
            raise ValueError(f"--data {part.strip()}: {kind} takes no folder of pictures")
        yield Source(kind, path, Path(images) if images else None)
