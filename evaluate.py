"""The paper's tables, one command each; without a command, Table 1.

    python evaluate.py scienceqa                                   the embedded adapters on the embedded test split
    python evaluate.py scienceqa --data ScienceQA                  Table 1
    python evaluate.py coco --data COCO                            Table 4, Karpathy's test split
    python evaluate.py mme --data MME_Benchmark_release_version    Table 5, pictures
    python evaluate.py truthfulqa --data mc_task.json              Table 5, text

each with --llama, --clip and --adapters as in sample.py. Under torchrun every process answers a share. With --out the
predictions are written as they come, and a run that was killed goes on from there when it is started again.

Predictions that exist are scored without weights, pictures or torch:

    python evaluate.py scienceqa --data ScienceQA --predictions FILE       {id: option index, or generated text}
    python evaluate.py coco --predictions FILE --references dataset_coco.json
    python evaluate.py mme --results DIR                                   MME's own <task>.txt
    python evaluate.py truthfulqa --data mc_task.json --predictions FILE   what --out wrote
"""
import difflib
import json
import re
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import cli
import prompts
from evaluation import scores
from prompts import Sample

# torch, and our files that need it, are imported only where a model runs


def read_meta(cfg, pictures: bool = False) -> dict:
    """what the adapter file says about its training"""
    import weights
    meta = weights.read_adapters(cfg.adapters)[1]
    if pictures and not meta["lavin"]["vision"]:
        raise ValueError(f"{cfg.adapters}: text-only adapters (trained with --no-vision), and this needs pictures")
    return meta


def generate(cfg, samples: list[Sample], out: str, meta: dict, until: re.Pattern | None = None, **run) -> dict | None:
    """`predict` by generating text"""
    from evaluation import answering
    prompts.check_pictures(samples)
    sampling = {"max_new_tokens": cfg.max_new_tokens or meta["max_new_tokens"], "temperature": cfg.temperature,
                "top_p": cfg.top_p, "seed": cfg.seed}

    def work(model, tokenizer, samples, write):
        answering.answer(model, tokenizer, samples, **sampling, batch_size=cfg.batch_size, progress=cli.processes()[0] == 0,
               until=until, write=write)

    return answering.predict(cfg, samples, out, {**run, **sampling}, work)


@dataclass
class Config:
    """Flags of all commands that generate text."""
    adapters: str = "tiny/adapters.safetensors"  # what train.py wrote
    llama: str = "tiny/llama"  # folder of LLaMA weights
    clip: str = "tiny/clip"  # folder of CLIP weights
    any_base: bool = False  # accept a base with another fingerprint than the one trained on
    max_new_tokens: int = 0  # longest answer; 0: as trained
    temperature: float = 0.0  # the paper decodes at 0.1; 0 is greedy and repeatable
    top_p: float = 0.75  # nucleus, as in the paper
    seed: int = 0  # of the sampling
    batch_size: int = 64  # answered together, by each process
    limit: int = 0  # only the first so many problems or pictures; 0: all
    json: bool = False  # scores as one JSON line on stdout instead of the table
    device: str = "auto"  # cuda, cpu, ...
    dtype: str = "auto"  # bf16 or fp32


@dataclass
class ScienceQA(Config):
    """Table 1: answer a ScienceQA split and print the nine columns. Other commands: coco, mme, truthfulqa."""
    data: str = "tiny/data"  # folder in ScienceQA's layout
    split: str = "test"  # a key of pid_splits.json
    out: str = ""  # .jsonl that predictions go to as they come; if it exists, the run goes on from there
    predictions: str = ""  # score this file {id: option index, or generated text} instead of running the model
    stop_at_letter: bool = True  # stop an answer after "The answer is X.": the score is decided


def scienceqa(cfg: ScienceQA) -> tuple[dict, str] | None:
    """-> scores and their table, on the first process; so do the other commands"""
    if cfg.predictions:
        samples = prompts.read_scienceqa(cfg.data, cfg.split)[: cfg.limit or None]
        replies = scores.match(cfg.predictions, scores.read_predictions(cfg.predictions), [s.id for s in samples],
                               f"the {cfg.split} problems of {cfg.data}")
    else:
        meta = read_meta(cfg)
        samples = prompts.read_scienceqa(cfg.data, cfg.split, meta["format"], meta["captions"], meta["lavin"]["vision"])
        samples = samples[: cfg.limit or None]
        replies = generate(cfg, samples, cfg.out, meta, scores.ANSWER if cfg.stop_at_letter else None,
                           command="scienceqa", data=cfg.data, split=cfg.split)
    if replies is None:
        return None
    if not samples:
        raise ValueError(f"{cfg.data}: split {cfg.split} is empty")
    result = scores.scienceqa(samples, replies)
    note = "\n(here: the embedded small world; the paper's rows are ScienceQA)" * (cfg.data == ScienceQA.data)
    return result, scores.scienceqa_table(result, paper=True) + note


@dataclass
class COCO(Config):
    """Table 4: caption COCO's Karpathy test split and print BLEU-4 and CIDEr (pip install pycocoevalcap; needs Java)."""
    data: str = ""  # folder of dataset_coco.json and the pictures, or DIR:IMAGES
    out: str = "out/coco.jsonl"  # captions go there as they come; if it exists, the run goes on from there
    predictions: str = ""  # score these captions, {id: text} or COCO's [{image_id, caption}], instead of running the model
    references: str = ""  # to score against: dataset_coco.json, or COCO's captions_*.json
    max_new_tokens: int = 40  # longest caption


def coco(cfg: COCO) -> tuple[dict, str] | None:
    if bool(cfg.data) == bool(cfg.predictions) or bool(cfg.predictions) != bool(cfg.references):
        raise ValueError("coco: give --data DIR to caption the test split, or --predictions FILE and --references FILE "
                         "(dataset_coco.json, or COCO's captions_val2014.json) to score")
    if cfg.predictions:
        captions = scores.read_predictions(cfg.predictions)
        references = scores.read_references(cfg.references, captions)
        captions = scores.match(cfg.predictions, captions, list(references), f"the pictures of {cfg.references}")
    else:
        (source,) = prompts.mixture(f"coco:{cfg.data}")
        samples = prompts.read_coco(source.path, source.images, "test")[: cfg.limit or None]
        references = {s.id: s.problem["captions"] for s in samples}
        try:
            scores.caption_tools()
        except ValueError as e:  # better known before the pictures are captioned than after
            print(f"the captions will not be scored: {e}", file=sys.stderr)
            references = {}
        captions = generate(cfg, samples, cfg.out, read_meta(cfg, pictures=True), command="coco", data=cfg.data)
        if captions is None or not references:
            return None
    result = scores.coco(captions, references)
    return result, scores.coco_table(result)


@dataclass
class MME(Config):
    """Table 5, MME: answer the questions, write MME's own <task>.txt, and print the scores."""
    data: str = ""  # folder with a folder for each task, as released
    out: str = "out/mme"  # folder that the answers go to as they come, and <task>.txt in the end
    results: str = ""  # score the <task>.txt of this folder instead of running the model
    tasks: str = ""  # only these, separated by commas
    max_new_tokens: int = 16  # longest reply: its first four characters count


def mme(cfg: MME) -> tuple[dict, str] | None:
    if bool(cfg.data) == bool(cfg.results):
        raise ValueError("mme: give --data DIR to answer the questions, or --results DIR to score answers")
    if cfg.data:
        tasks = cfg.tasks.split(",") if cfg.tasks else [*scores.PERCEPTION, *scores.COGNITION]
        for task in tasks:
            scores.check_task("--tasks", task)
        samples = prompts.read_mme(cfg.data, tasks)[: 2 * cfg.limit or None]  # two questions a picture
        replies = generate(cfg, samples, f"{cfg.out}/predictions.jsonl", read_meta(cfg, pictures=True),
                           command="mme", data=cfg.data, tasks=cfg.tasks)
        if replies is None:
            return None
        for task in tasks:
            rows = [[s.problem[x] for x in ("picture", "question", "answer")] + [" ".join(replies[s.id].split())]
                    for s in samples if s.problem["task"] == task]
            if rows:
                Path(cfg.out, f"{task}.txt").write_text("".join("\t".join(r) + "\n" for r in rows), encoding="utf-8")
    result = scores.mme(cfg.results or cfg.out)
    return result, scores.mme_table(result)


@dataclass
class TruthfulQA:
    """Table 5, TruthfulQA: how likely the model finds the given answers; prints MC1 and MC2."""
    data: str = ""  # mc_task.json
    out: str = ""  # .jsonl that log-probabilities go to as they come; if it exists, the run goes on from there
    predictions: str = ""  # score what --out wrote instead of running the model
    adapters: str = "tiny/adapters.safetensors"  # what train.py wrote
    llama: str = "tiny/llama"  # folder of LLaMA weights
    clip: str = "tiny/clip"  # folder of CLIP weights
    any_base: bool = False  # accept a base with another fingerprint than the one trained on
    limit: int = 0  # only the first so many questions; 0: all
    json: bool = False  # scores as one JSON line on stdout instead of the table
    device: str = "auto"  # cuda, cpu, ...
    dtype: str = "auto"  # bf16 or fp32


def truthfulqa(cfg: TruthfulQA) -> tuple[dict, str] | None:
    if not cfg.data:
        raise ValueError("truthfulqa: give --data FILE, TruthfulQA's mc_task.json")
    samples = prompts.read_truthfulqa(cfg.data)[: cfg.limit or None]

    if cfg.predictions:
        likely = scores.match(cfg.predictions, scores.read_predictions(cfg.predictions), [s.id for s in samples],
                              f"the questions of {cfg.data}")
    else:
        from evaluation import answering
        likely = answering.predict(cfg, samples, cfg.out, {"command": "truthfulqa", "data": cfg.data}, answering.weigh)
    if likely is None:
        return None
    result = scores.truthfulqa(samples, likely)
    return result, scores.truthfulqa_table(result)


COMMANDS = {"scienceqa": (ScienceQA, scienceqa), "coco": (COCO, coco), "mme": (MME, mme),
            "truthfulqa": (TruthfulQA, truthfulqa)}


def main() -> None:
    name, argv = "scienceqa", sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        name, *argv = argv
    if name not in COMMANDS:
        near = "".join(f"did you mean {x}? " for x in difflib.get_close_matches(name, COMMANDS, n=1))
        raise ValueError(f"unknown command {name!r}; {near}known: {', '.join(COMMANDS)}")
    config, command = COMMANDS[name]
    cfg = cli.parse(config, argv=argv)
    if cfg.data == ScienceQA.data and cli.processes()[0] == 0:
        from tiny import world
        world.ensure(cfg.data)
    with cli.process_group("gloo", timeout=timedelta(days=1)):  # only predictions travel, at the end
        done = command(cfg)
        if done:
            result, text = done
            print(json.dumps(result) if cfg.json else text)


if __name__ == "__main__":
    cli.run(main)
