"""Benchmarks -> samples. The model is asked these questions and never trained on them.

prompts.py reads the data sets that train.
"""
import os
from pathlib import Path

from official.records import field, read_lines, read_records
from prompts import Sample, instruct


def read_mme(folder: str | Path, tasks: list[str]) -> list[Sample]:
    """MME (Fu et al., 2023). Each task is a folder of pictures, each with two questions in <name>.txt.

    A line of <name>.txt is question<TAB>Yes|No. The release has two layouts: the texts next to the pictures,
    or the pictures in images/ and the texts in questions_answers_YN/.
    """
    folder, samples = Path(folder), []
    present = [task for task in tasks if (folder / task).is_dir()]
    if not present:
        raise FileNotFoundError(f"{folder}: none of MME's folders is here; expected {', '.join(tasks)}")
    for task in present:
        texts, pictures = folder / task / "questions_answers_YN", folder / task / "images"
        if not texts.is_dir():
            texts = pictures = folder / task
        files = sorted(texts.glob("*.txt"))
        if not files:
            raise FileNotFoundError(f"{texts}: no <picture>.txt with questions here")
        names = sorted(os.listdir(pictures)) if pictures.is_dir() else ()
        pictures_by_stem = {Path(name).stem: name for name in names if not name.endswith(".txt")}
        for file in files:
            name = pictures_by_stem.get(file.stem, f"{file.stem}.jpg")  # check_pictures reports a missing one
            for n, line in enumerate(read_lines(file, "questions"), start=1):
                question, _, answer = line.strip().rpartition("\t")
                if not line.strip():
                    continue
                if not question or answer not in ("Yes", "No"):
                    raise ValueError(f"{file}:{n}: expected question<TAB>Yes or No")
                problem = {"task": task, "picture": name, "question": question, "answer": answer}
                samples.append(Sample(f"{task}/{name}:{n}", instruct(question), "", pictures / name, problem))
    return samples


def read_truthfulqa(file: str | Path) -> list[Sample]:
    """TruthfulQA's mc_task.json (Lin et al., 2021): question, mc1_targets and mc2_targets {answer: 0 or 1}.

    mc1_targets has one true answer, mc2_targets may have several.
    """
    samples = []
    for i, (where, r) in enumerate(read_records(Path(file), "TruthfulQA's mc_task.json")):
        for name in ("mc1_targets", "mc2_targets"):
            labels = field(where, r, name, dict)
            values = list(labels.values())
            both = 0 in values and 1 in values and all(value in (0, 1) for value in values)
            if not both or not all(answer.strip() for answer in labels):
                raise ValueError(f"{where}: {name!r} needs true answers (1) and false answers (0)")
        if sum(r["mc1_targets"].values()) != 1:
            raise ValueError(f"{where}: 'mc1_targets' needs exactly one true answer")
        samples.append(Sample(str(i), instruct(field(where, r, "question")), "", None, r))
    return samples
