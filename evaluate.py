"""Fill in the paper's tables, one command per table, or score your own data. Without a command: scienceqa.

    python evaluate.py scienceqa                                 the embedded model on the embedded test split
    python evaluate.py scienceqa --data ScienceQA                Table 1
    python evaluate.py coco --data COCO                          Table 4, Karpathy's test split
    python evaluate.py mme --data MME_Benchmark_release_version  Table 5, pictures
    python evaluate.py truthfulqa --data mc_task.json            Table 5, text
    python evaluate.py json --data mine.json                     your own records, see prompts.py

--llama, --clip and --adapters choose the model, as in sample.py. Under torchrun, each process answers a share
of the questions. With --out, a run that was stopped resumes when it is started again with the same flags.

Each command can also score existing predictions, which needs no weights, no pictures and no torch:

    python evaluate.py scienceqa --data ScienceQA --predictions FILE      {id: option index, or text}
    python evaluate.py coco --predictions FILE --references dataset_coco.json
    python evaluate.py mme --results DIR                                  MME's own files, one <task>.txt each
    python evaluate.py truthfulqa --data mc_task.json --predictions FILE  the file that --out wrote
    python evaluate.py json --data mine.json --predictions FILE           {id: text}
"""
import json
import sys
from dataclasses import dataclass
from datetime import timedelta

import cli

import prompts
from evaluation import benchmarks, scores  # answering needs torch: imported where it is used


@dataclass
class ModelFlags:
    """Flags of all commands."""
    adapters: str = "tiny/adapters.safetensors"  # adapter file written by train.py
    llama: str = "tiny/llama"  # folder of LLaMA weights
    clip: str = "tiny/clip"  # folder of CLIP weights
    any_base: bool = False  # accept base weights other than those that the adapters were trained on
    limit: int = 0  # use only the first N questions (coco, mme: pictures); 0: all [0, inf)
    json: bool = False  # print the scores as one JSON line instead of a table
    device: str = "auto"  # auto, cuda, cuda:1, mps, cpu, ..
    dtype: str = "auto"  # auto, bf16 or fp32
    bits: int = 16  # 4: keep LLaMA's matrices in 4 bits, as in train.py; 16: in --dtype


@dataclass
class GenerationFlags(ModelFlags):
    """Flags of the commands that generate text."""
    max_new_tokens: int = 0  # longest answer, in tokens; 0: as in training [0, inf)
    temperature: float = 0.0  # 0 is greedy and repeatable; the paper samples at 0.1 [0, inf)
    top_p: float = 0.75  # nucleus sampling from this share of the probability, as in the paper (0, 1]
    seed: int = 0  # seed of the sampling [0, inf)
    batch_size: int = 64  # questions that each process answers at once [1, inf)


@dataclass
class ScienceQA(GenerationFlags):
    """Table 1: answer a split of ScienceQA. Other commands: coco, mme, truthfulqa, json."""
    data: str = "tiny/data"  # folder in ScienceQA's layout
    split: str = "test"  # a key of pid_splits.json
    out: str = ""  # .jsonl file for the predictions; if it exists, the run resumes from it
    predictions: str = ""  # score this file instead of running the model: {id: option index, or text}
    stop_at_letter: bool = True  # end an answer after "The answer is X.", which decides its score


def scienceqa(cfg: ScienceQA) -> tuple[dict, str] | None:
    """The scores and their table on the first process, None on the others. So do the other commands."""
    if cfg.predictions:
        samples = prompts.read_scienceqa(cfg.data, cfg.split)[: cfg.limit or None]
        what = f"{cfg.split} problems of {cfg.data}"
        answers = scores.predictions_for(cfg.predictions, [s.id for s in samples], what)
    else:
        from evaluation import answering
        metadata = answering.adapter_metadata(cfg)
        samples = prompts.read_scienceqa(cfg.data, cfg.split, metadata["format"],
                                         metadata["captions"])[: cfg.limit or None]
        until = scores.ANSWER if cfg.stop_at_letter else None
        answers = answering.ask(cfg, samples, cfg.out, metadata, until, command="scienceqa", data=cfg.data,
                                split=cfg.split, stop_at_letter=cfg.stop_at_letter)
    if answers is None:
        return None
    result = scores.scienceqa(samples, answers, cfg.predictions or cfg.out)
    return result, scores.scienceqa_table(result, paper=cfg.split == "test")


@dataclass
class COCO(GenerationFlags):
    """Table 4: caption COCO's Karpathy test split, print BLEU-4 and CIDEr. Needs pycocoevalcap and Java."""
    data: str = ""  # folder of dataset_coco.json and the pictures, or DIR:IMAGES
    out: str = "out/coco.jsonl"  # .jsonl file for the captions; if it exists, the run resumes from it
    predictions: str = ""  # score this file instead: {id: text}, or COCO's [{image_id, caption}]
    references: str = ""  # what --predictions is scored against: dataset_coco.json, or COCO's captions_*.json
    max_new_tokens: int = 40  # longest caption, in tokens; 0: as in training [0, inf)


def coco(cfg: COCO) -> tuple[dict, str] | None:
    if bool(cfg.data) == bool(cfg.predictions) or bool(cfg.predictions) != bool(cfg.references):
        raise ValueError("coco: give --data DIR to caption the test split, or --predictions FILE and "
                         "--references FILE (dataset_coco.json or captions_val2014.json) to score captions")
    if cfg.predictions:
        references = scores.read_references(cfg.references, scores.read_predictions(cfg.predictions))
        what = f"pictures of {cfg.references}"
        captions = scores.predictions_for(cfg.predictions, list(references), what)
    else:
        from evaluation import answering
        source, *others = prompts.mixture(f"coco:{cfg.data}")
        if others:
            raise ValueError(f"--data {cfg.data}: expected one folder, without a comma")
        samples = prompts.read_coco(source.path, source.images, "test")[: cfg.limit or None]
        references = {s.id: s.problem["captions"] for s in samples} if scores.can_score_captions() else {}
        metadata = answering.adapter_metadata(cfg, needs_pictures=True)
        captions = answering.ask(cfg, samples, cfg.out, metadata, command="coco", data=cfg.data)
        if captions is None or not references:
            return None
    result = scores.coco(captions, references, cfg.predictions or cfg.out)
    return result, scores.coco_table(result)


@dataclass
class MME(GenerationFlags):
    """Table 5, MME: answer the questions, write MME's own <task>.txt files, and print the scores."""
    data: str = ""  # the released folder, which has one folder per task
    out: str = "out/mme"  # folder for the predictions and, at the end, the <task>.txt files
    results: str = ""  # score the <task>.txt files in this folder instead of running the model
    tasks: str = ""  # use only these tasks, separated by commas
    max_new_tokens: int = 16  # longest reply, in tokens; its first four characters count [0, inf)


def mme(cfg: MME) -> tuple[dict, str] | None:
    if bool(cfg.data) == bool(cfg.results):
        raise ValueError("mme: give --data DIR to answer the questions, or --results DIR to score replies")
    if cfg.data:
        from evaluation import answering
        tasks = scores.mme_tasks(cfg.tasks)
        samples = benchmarks.read_mme(cfg.data, tasks)[: 2 * cfg.limit or None]  # two questions per picture
        metadata = answering.adapter_metadata(cfg, needs_pictures=True)
        replies = answering.ask(cfg, samples, f"{cfg.out}/predictions.jsonl", metadata, command="mme",
                                data=cfg.data, tasks=cfg.tasks)
        if replies is None:
            return None
        scores.write_mme(cfg.out, samples, replies)
    result = scores.mme(cfg.results or cfg.out)
    return result, scores.mme_table(result)


@dataclass
class TruthfulQA(ModelFlags):
    """Table 5, TruthfulQA: compute the log-probability of each given answer, and print MC1 and MC2."""
    data: str = ""  # mc_task.json
    out: str = ""  # .jsonl file for the log-probabilities; if it exists, the run resumes from it
    predictions: str = ""  # score this file, written by --out, instead of running the model


def truthfulqa(cfg: TruthfulQA) -> tuple[dict, str] | None:
    if not cfg.data:
        raise ValueError("truthfulqa: give --data FILE, where FILE is TruthfulQA's mc_task.json")
    samples = benchmarks.read_truthfulqa(cfg.data)[: cfg.limit or None]
    if cfg.predictions:
        logp = scores.predictions_for(cfg.predictions, [s.id for s in samples], f"questions of {cfg.data}")
    else:
        from evaluation import answering
        run = {"command": "truthfulqa", "data": cfg.data}
        logp = answering.predict(cfg, samples, cfg.out, run, answering.weigh)
    if logp is None:
        return None
    result = scores.truthfulqa(samples, logp, cfg.predictions or cfg.out)
    return result, scores.truthfulqa_table(result)


@dataclass
class OwnData(GenerationFlags):
    """Your own data: answer the records of a JSON file, and print how many answers match exactly."""
    data: str = ""  # .json or .jsonl file of records; json:FILE, as for train.py, means the same
    images: str = ""  # folder of the pictures; "": the folder of the file
    out: str = ""  # .jsonl file for the answers; if it exists, the run resumes from it
    predictions: str = ""  # score this file instead of running the model: {id: text}


def own_data(cfg: OwnData) -> tuple[dict, str] | None:
    if not cfg.data:
        raise ValueError("json: give --data FILE, where FILE is a list of records as in training")
    file = cfg.data.removeprefix("json:")
    samples = prompts.read_instructions(file, cfg.images, asked=True)[: cfg.limit or None]
    if cfg.predictions:
        answers = scores.predictions_for(cfg.predictions, [s.id for s in samples], f"records of {cfg.data}")
    else:
        from evaluation import answering
        metadata = answering.adapter_metadata(cfg)
        answers = answering.ask(cfg, samples, cfg.out, metadata, command="json", data=cfg.data)
    if answers is None:
        return None
    result = scores.exact_match(samples, answers, cfg.predictions or cfg.out)
    return result, scores.exact_match_table(result)


COMMANDS = {"scienceqa": (ScienceQA, scienceqa), "coco": (COCO, coco), "mme": (MME, mme),
            "truthfulqa": (TruthfulQA, truthfulqa), "json": (OwnData, own_data)}


def main() -> None:
    name, argv = "scienceqa", sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        name, *argv = argv
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; {scores.did_you_mean(name, COMMANDS)}")
    config, command = COMMANDS[name]
    cfg = cli.parse(config, argv=argv)
    if cfg.data == ScienceQA.data and cli.is_main():
        from tiny import world
        world.ensure(cfg.data)
    with cli.process_group("gloo", timeout=timedelta(days=1)):  # all wait for the slowest
        scored = command(cfg)
        if scored:
            result, table = scored
            print(json.dumps(result) if cfg.json else table)


if __name__ == "__main__":
    cli.run(main)
