"""Write a few records of each published data set, in the layout that its authors describe."""
import json
from pathlib import Path

from PIL import Image

COLORS = ("red", "green", "blue", "white")
PARTS = ("complex_reasoning_77k.json", "detail_23k.json", "conversation_58k.json")


def picture(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), color).save(path)
    return path


def put(path: Path, content) -> Path:
    """write `content` as JSON"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def scienceqa(folder: Path, sizes: dict[str, int]) -> Path:
    """every other problem has a picture"""
    problems, splits = {}, {}
    for split, n in sizes.items():
        splits[split] = [str(len(problems) + k + 1) for k in range(n)]
        for k, id in enumerate(splits[split]):
            color = COLORS[k % 3]
            problems[id] = {
                "question": "What color is the picture?" if k % 2 else f"What color is a {color} ball?",
                "choices": list(COLORS[:3]), "answer": k % 3, "hint": "Look at it." if k % 4 == 0 else "",
                "image": "image.png" if k % 2 else None, "task": "closed choice",
                "grade": f"grade{k % 12 + 1}",
                "topic": "physics", "category": "Materials", "skill": "Name a color",
                "subject": ("natural science", "social science", "language science")[k % 3],
                "lecture": "Color is a property.", "solution": f"It is {color}.", "split": split}
            if k % 2:
                picture(folder / "images" / split / id / "image.png", color)
    put(folder / "problems.json", problems)
    put(folder / "pid_splits.json", splits)
    put(folder / "captions.json", {"captions": {id: "A color." for id, p in problems.items() if p["image"]}})
    return folder


def alpaca(file: Path, n: int = 6) -> Path:
    """the last record has no output, like some of the real ones"""
    records = [{"instruction": f"Name {k} colors.", "input": "Start with red." if k % 2 else "",
                "output": "red, green"} for k in range(1, n)]
    return put(file, [*records, {"instruction": "Draw a house.", "input": "", "output": ""}])


def llava(folder: Path, prefix: str = "COCO_train2014_") -> Path:
    """the three parts, and the pictures in train2014/ under COCO's names, or (prefix "") under LLaVA's"""
    def record(k: int, *turns: str) -> dict:
        picture(folder / f"train2014/{prefix}{k:012}.jpg", COLORS[k % 4])
        said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
        return {"id": f"{k:012}", "image": f"{k:012}.jpg", "conversations": said}

    reasoning, detail, conversation = PARTS
    put(folder / reasoning, [record(1, "Why is it so green?\n<image>", "Because it is painted.")])
    put(folder / detail, [record(2, "<image>\nDescribe it in detail.", "It is blue all over."),
                          record(3, "Describe it.\n<image>", "It is white.")])
    put(folder / conversation, [record(2, "<image>\nWhat color is it?", "Blue.", "Is it red?",
                                       "No, it is blue.", "Are you sure?", "Yes.")])
    return folder


def llava_joined(folder: Path) -> Path:
    """the three parts in one file"""
    records = [r for part in PARTS for r in json.loads((folder / part).read_text())]
    return put(folder / "llava_instruct_150k.json", records)


def coco(folder: Path, splits=("train", "restval", "val", "test", "test")) -> Path:
    """Karpathy's dataset_coco.json: one picture for each entry of `splits`, five sentences each"""
    images = []
    for k, split in enumerate(splits):
        part = "train2014" if split == "train" else "val2014"
        name = f"COCO_{part}_{100 + k:012}.jpg"
        picture(folder / part / name, COLORS[k % 4])
        ends = (".", " on a wall.", " of  nothing\n", ", all plain.", " in a frame.")
        sentences = [{"tokens": ["a", COLORS[k % 4], "picture"], "raw": f"A {COLORS[k % 4]} picture{end}",
                      "imgid": k, "sentid": 10 * k + i} for i, end in enumerate(ends)]
        images.append({"filepath": part, "sentids": [x["sentid"] for x in sentences], "filename": name,
                       "imgid": k, "split": split, "sentences": sentences, "cocoid": 100 + k})
    put(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return folder


def mme(folder: Path, tasks: dict[str, int]) -> Path:
    """{task: pictures}; every other task is in the layout with images/ and questions_answers_YN/"""
    for t, (task, n) in enumerate(tasks.items()):
        pictures = texts = folder / task
        if t % 2:
            pictures, texts = folder / task / "images", folder / task / "questions_answers_YN"
        for k in range(n):
            picture(pictures / f"{k:04}.{'png' if k % 2 else 'jpg'}", COLORS[k % 4])
            texts.mkdir(parents=True, exist_ok=True)
            (texts / f"{k:04}.txt").write_text(
                f"Is this picture {COLORS[k % 4]}? Please answer yes or no.\tYes\n"
                "Is this picture black? Please answer yes or no.\tNo\n")
    return folder


def truthfulqa(file: Path) -> Path:
    return put(file, [
        {"question": "What color is the sky?", "mc1_targets": {"Blue": 1, "Green": 0, "Red as blood": 0},
         "mc2_targets": {"Blue": 1, "It is blue": 1, "Green": 0, "Red as blood": 0}},
        {"question": "How many legs has a dog?", "mc1_targets": {"It has four legs": 1, "Two": 0},
         "mc2_targets": {"It has four legs": 1, "Four": 1, "Two": 0, "Six": 0, "None at all": 0}}])
