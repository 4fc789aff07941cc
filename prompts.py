"""Published data sets -> samples: a prompt, its response, a picture. Needs no torch and opens no picture.

A mixture is a list of sources, separated by commas. DIR alone means scienceqa:DIR.

    scienceqa:DIR        problems.json, pid_splits.json, captions.json (optional), images/<split>/<id>/<image>
    alpaca:FILE          alpaca_data.json
    llava:PATH[:IMAGES]  llava_instruct_150k.json, one of its three parts, or the folder that holds them
    coco:DIR[:IMAGES]    dataset_coco.json (Karpathy's split); pictures in train2014/ and val2014/
    json:FILE[:IMAGES]   your own data: a JSON list, or JSONL with one record per line:

        {"instruction": "What is in the picture?", "image": "cat.jpg", "output": "A cat on a sofa."}
        {"instruction": "What color is the sofa?", "image": "cat.jpg", "output": "It is red."}
        {"instruction": "Translate to French.", "input": "Good morning.", "output": "Bonjour."}
        {"instruction": "Name a prime above 10.", "output": "11"}

IMAGES is the folder of the pictures. By default it is the folder of the file, and for LLaVA train2014/ in it.
"""
import difflib
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, NamedTuple

from official.records import field, inside, read_json, read_records

LETTERS = "ABCDE"


@dataclass
class Sample:
    id: str
    prompt: str
    response: str  # "" if the model is asked and not trained
    image: Path | None
    problem: dict  # the fields that scoring needs; {} if there are none


def check_pictures(samples: list[Sample]) -> None:
    """ValueError if a picture is missing. Lists each folder once, because network disks are slow."""
    by_folder = defaultdict(list)
    for s in samples:
        if s.image:
            by_folder[s.image.parent].append(s)
    missing = []
    for folder, its_samples in by_folder.items():
        names = {entry.name for entry in os.scandir(folder) if entry.is_file()} if folder.is_dir() else ()
        missing += [s for s in its_samples if s.image.name not in names]
    if missing:
        more = f" (and {len(missing) - 1} more are missing)" if missing[1:] else ""
        raise ValueError(f"{missing[0].image}: no such picture, needed by sample {missing[0].id}{more}")


# --- ScienceQA (Lu et al., "Learn to Explain", NeurIPS 2022) ---------------------------------------

FIELDS = {"question": str, "choices": list, "answer": int, "hint": str, "grade": str, "subject": str,
          "lecture": str, "solution": str, "image": str | None}
ANSWERS = {  # the data set's own formats: A answer, L lecture, E explanation. It swaps L and E in AL and AE.
    "A": "The answer is {answer}.", "AL": "The answer is {answer}. BECAUSE: {solution}",
    "AE": "The answer is {answer}. BECAUSE: {lecture}",
    "ALE": "The answer is {answer}. BECAUSE: {lecture} {solution}",
    "AEL": "The answer is {answer}. BECAUSE: {solution} {lecture}",
    "LA": "{lecture} The answer is {answer}.", "EA": "{solution} The answer is {answer}.",
    "LEA": "{lecture} {solution} The answer is {answer}.",
    "ELA": "{solution} {lecture} The answer is {answer}.",
}


def check_format(form: str) -> None:
    """ValueError unless `form` is letters of Q, C, M in any order, a dash, and a key of ANSWERS."""
    asked, _, answered = form.partition("-")
    if not asked or set(asked) - set("QCM") or len(set(asked)) < len(asked) or answered not in ANSWERS:
        raise ValueError(f"unknown prompt format {form!r}; expected Q, C, M in any order, a dash and one of "
                         f"{', '.join(ANSWERS)}: for example QCM-ALE")


def tidy(text: str) -> str:
    return text.replace("  ", " ").strip()


def build_prompt(question: str, context: str, choices: list[str], form: str = "QCM-ALE") -> str:
    """The prompt, up to and including "Response:". Without choices it has no line of options."""
    if len(choices) > len(LETTERS):
        raise ValueError(f"the question has {len(choices)} options; at most {len(LETTERS)} are possible, "
                         f"(A) to ({LETTERS[-1]})")
    options = " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(choices))
    lines = {"Q": f"Question: {question}", "C": f"Context: {context or 'N/A'}", "M": f"Options: {options}"}
    asked = [lines[letter] for letter in form.partition("-")[0] if letter != "M" or choices]
    return tidy("\n".join([*asked, "Response:"]))


def build_response(problem: dict, form: str = "QCM-ALE") -> str:
    lecture, solution = (problem[name].replace("\n", "\\n") for name in ("lecture", "solution"))
    answer = LETTERS[problem["answer"]]
    text = tidy(ANSWERS[form.partition("-")[2]].format(answer=answer, lecture=lecture, solution=solution))
    return text.removesuffix("BECAUSE:").strip()  # lecture and solution may both be empty


def check_problem(where: str, p: dict) -> None:
    for name, kind in FIELDS.items():
        field(where, p, name, kind)
    if not all(isinstance(choice, str) for choice in p["choices"]):
        raise ValueError(f"{where}: 'choices' holds something that is not str")
    if not re.fullmatch("grade[0-9]{1,2}", p["grade"]):
        raise ValueError(f"{where}: 'grade' is {p['grade']!r}; expected grade1 to grade12")
    if not 2 <= len(p["choices"]) <= len(LETTERS) or not 0 <= p["answer"] < len(p["choices"]):
        raise ValueError(f"{where}: answer {p['answer']} does not fit its {len(p['choices'])} choices "
                         f"(2 to {len(LETTERS)} are possible)")


def read_scienceqa(folder: str | Path, split: str, form: str = "QCM-ALE",
                   captions: bool = False) -> list[Sample]:
    """The problems of a split. captions: append captions to the hints."""
    folder, what = Path(folder), "a folder in ScienceQA's layout"
    check_format(form)
    problems_file, splits_file = folder / "problems.json", folder / "pid_splits.json"
    problems, splits = read_json(problems_file, what, dict), read_json(splits_file, what, dict)
    if split not in splits:
        raise ValueError(f"{splits_file}: no split {split!r}; it has {', '.join(splits)}")
    captions_file = folder / "captions.json"
    texts = field(captions_file, read_json(captions_file, what), "captions", dict) if captions else {}
    samples = []
    for id in map(str, field(splits_file, splits, split, list)):
        where = f"{problems_file}: problem {id}"
        if id not in problems:
            raise ValueError(f"{where} of split {split} is missing")
        p = problems[id]
        check_problem(where, p)
        context = f"{p['hint']} {field(captions_file, texts, id, default='')}".strip()
        image = inside(where, folder / "images", split, id, p["image"]) if p.get("image") else None
        prompt = build_prompt(p["question"], context, p["choices"], form)
        samples.append(Sample(id, prompt, build_response(p, form), image, p))
    if not samples:
        raise ValueError(f"{folder}: split {split} is empty")
    return samples


# --- instructions ----------------------------------------------------------------------------------

def instruct(instruction: str, input: str = "") -> str:
    """The prompt of every data set but ScienceQA. Not tidied, because code is indented with double spaces."""
    return f"Instruction: {f'{instruction} {input}'.strip()}\nResponse:"


def read_instructions(file: str | Path, images: str | Path | None = None,
                      asked: bool = False) -> list[Sample]:
    """Alpaca-52k (Taori et al., 2023), or your own records. The fields input and image are optional.

    asked: the field output is optional, too, because only training and scoring need it.
    """
    file, samples = Path(file), []
    for i, (where, r) in enumerate(read_records(file, "records with instruction, input, output")):
        name = field(where, r, "image", default="")
        prompt = instruct(field(where, r, "instruction"), field(where, r, "input", default=""))
        image = inside(where, Path(images or file.parent), name) if name else None
        output = field(where, r, "output", default="" if asked else None).strip()
        samples.append(Sample(f"{file.stem}:{i}", prompt, output, image, {}))
    return samples


LLAVA_PARTS = ("complex_reasoning_77k.json", "detail_23k.json", "conversation_58k.json")
LLAVA_WHOLE = "llava_instruct_150k.json"  # the three parts in one file


def read_llava(path: str | Path, images: Path | None = None) -> list[Sample]:
    """LLaVA-158k (Liu et al., 2023). Each question-answer pair of a conversation is a sample of its own.

    The pictures are COCO's train2014, named as in LLaVA (000000215677.jpg) or COCO (COCO_train2014_000..).
    """
    path = Path(path)
    names = [LLAVA_WHOLE] if (path / LLAVA_WHOLE).is_file() else LLAVA_PARTS
    files = [path / name for name in names] if path.is_dir() else [path]
    images = images or files[0].parent / "train2014"
    present = set(os.listdir(images)) if images.is_dir() else ()
    samples = []
    for file in files:
        for i, (where, r) in enumerate(read_records(file, f"LLaVA's {LLAVA_WHOLE} or its parts")):
            name = field(where, r, "image")
            coco_name = f"COCO_train2014_{name}"
            image = inside(where, images, coco_name if coco_name in present else name)
            turns = field(where, r, "conversations", list)
            speakers = [field(where, turn, "from") for turn in turns]
            texts = [field(where, turn, "value").replace("<image>", "").strip() for turn in turns]
            if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
                raise ValueError(f"{where}: 'conversations' do not go human, gpt, human, gpt, ..")
            for k, (question, answer) in enumerate(zip(texts[::2], texts[1::2])):
                samples.append(Sample(f"{file.stem}:{i}.{k}", instruct(question), answer, image, {}))
    return samples


CAPTION = "Describe the picture in one sentence."  # our own: the paper and its code do not give theirs


def read_coco(path: str | Path, images: Path | None = None, split: str = "train") -> list[Sample]:
    """COCO captions in Karpathy's split, whose restval belongs to train.

    train: one sample per sentence. Others: one sample per picture, its sentences in problem["captions"].
    """
    file = Path(path) / "dataset_coco.json" if Path(path).is_dir() else Path(path)
    records = field(file, read_json(file, "Karpathy's dataset_coco.json"), "images", list)
    samples, splits = [], set()
    for i, r in enumerate(records):
        where = f"{file}: image {i}"
        record_split = field(where, r, "split").replace("restval", "train")
        splits.add(record_split)
        if record_split != split:
            continue
        names = field(where, r, "filepath", default=""), field(where, r, "filename")
        image = inside(where, images or file.parent, *names)
        texts = [" ".join(field(where, s, "raw").split()) for s in field(where, r, "sentences", list)]
        id, prompt = str(r.get("cocoid", r.get("imgid", i))), instruct(CAPTION)
        if split == "train":
            samples += [Sample(f"coco:{id}.{k}", prompt, text, image, {}) for k, text in enumerate(texts)]
        else:
            samples.append(Sample(id, prompt, "", image, {"captions": texts}))
    if not samples:
        known = ", ".join(sorted(splits)) or "none at all"
        raise ValueError(f"{file}: no image of split {split!r}; it has {known}")
    return samples


# --- mixtures --------------------------------------------------------------------------------------

KINDS = ("scienceqa", "alpaca", "llava", "coco", "json")


class Source(NamedTuple):
    kind: str
    path: str
    images: Path | None

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}"

    def read(self, split: str = "train", form: str = "QCM-ALE", captions: bool = False,
             vision: bool = True) -> list[Sample]:
        """The samples of one split, after checking that every picture exists. vision False: no pictures.

        form and captions are for ScienceQA. Instructions have no splits: `split` is ignored.
        """
        if self.kind == "scienceqa":
            samples = read_scienceqa(self.path, split, form, captions)
        elif self.kind == "llava":
            samples = read_llava(self.path, self.images)
        elif self.kind == "coco":
            samples = read_coco(self.path, self.images, split)
        else:
            samples = read_instructions(self.path, self.images)
        if not vision:
            for s in samples:
                s.image = None
        check_pictures(samples)
        return samples


def mixture(spec: str) -> Iterator[Source]:
    """The sources that the value of --data names."""
    for part in map(str.strip, spec.split(",")):
        kind, colon, rest = part.partition(":")
        if not colon:
            kind, rest = "scienceqa", kind
        if kind not in KINDS:
            near = "".join(f"did you mean {word}?; " for word in difflib.get_close_matches(kind, KINDS, n=1))
            raise ValueError(f"--data {part}: unknown kind {kind!r}; {near}known: {', '.join(KINDS)}")
        path, _, images = rest.partition(":")
        if not path:
            raise ValueError(f"--data {part or spec!r}: names no file or folder; expected {kind}:PATH")
        if images and kind in ("scienceqa", "alpaca"):
            raise ValueError(f"--data {part}: {kind} takes no folder of pictures; leave out :{images}")
        yield Source(kind, path, Path(images) if images else None)
