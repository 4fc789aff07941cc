"""Fill in the paper's tables, one command per table. Without a command: scienceqa.

    python evaluate.py scienceqa                                 the embedded model on the embedded test split
    python evaluate.py scienceqa --data ScienceQA                Table 1
    python evaluate.py coco --data COCO                          Table 4, Karpathy's test split
    python evaluate.py mme --data MME_Benchmark_release_version  Table 5, pictures
    python evaluate.py truthfulqa --data mc_task.json            Table 5, text

--llama, --clip and --adapters choose the model, as in sample.py. Under torchrun, each process answers a share
of the questions. With --out, a run that was stopped resumes when it is started again with the same flags.

Each command can also score existing predictions, which needs no weights, no pictures and no torch:

    python evaluate.py scienceqa --data ScienceQA --predictions FILE      {id: option index, or text}
    python evaluate.py coco --predictions FILE --references dataset_coco.json
    python evaluate.py mme --results DIR                                  MME's own files, one <task>.txt each
    python evaluate.py truthfulqa --data mc_task.json --predictions FILE  the file that --out wrote
"""
import difflib
import json
import re
import sys
from dataclasses import dataclass
from datetime import timedelta

import cli
import prompts
from evaluation import benchmarks, scores  # answering needs torch: imported where it is used
from prompts import Sample


@dataclass
class ModelFlags:
    """Flags of all commands."""
    adapters: str = "tiny/adapters.safetensors"  # adapter file written by train.py
    llama: str = "tiny/llama"  # folder of LLaMA weights
    clip: str = "tiny/clip"  # folder of CLIP weights
    any_base: bool = False  # accept base weights other than those that the adapters were trained on
    limit: int = 0  # [0, inf) use only the first N questions (coco, mme: pictures); 0: all
    json: bool = False  # print the scores as one JSON line instead of a table
    device: str = "auto"  # auto, cuda, cuda:1, cpu, ..
    dtype: str = "auto"  # auto, bf16 or fp32


@dataclass
class GenerationFlags(ModelFlags):
    """Flags of the commands that generate text."""
    max_new_tokens: int = 0  # [0, inf) longest answer, in tokens; 0: as in training
    temperature: float = 0.0  # [0, inf) 0 is greedy and repeatable; the paper samples at 0.1
    top_p: float = 0.75  # (0, 1] nucleus sampling from this share of the probability, as in the paper
    seed: int = 0  # [0, inf) seed of the sampling
    batch_size: int = 64  # [1, inf) questions that each process answers at once


def adapter_metadata(cfg: ModelFlags, needs_pictures: bool = False) -> dict:
    """What the adapter file records about its training."""
    import weights
    metadata = weights.read_adapters(cfg.adapters)[1]
    if needs_pictures and not metadata["lavin"]["vision"]:
        raise ValueError(f"{cfg.adapters}: text-only adapters; this command needs some trained with pictures")
    return metadata


def generate(cfg: GenerationFlags, samples: list[Sample], out: str, metadata: dict,
             until: re.Pattern | None = None, **run) -> dict[str, str] | None:
    """{id: generated text} on the first process, None on the others.

    An answer ends where `until` matches. run: settings that are recorded in `out`, see `answering.predict`.
    """
    from evaluation import answering
    prompts.check_pictures(samples)
    rank, _ = cli.processes()
    longest = cfg.max_new_tokens or metadata["max_new_tokens"]
    sampling = dict(max_new_tokens=longest, temperature=cfg.temperature, top_p=cfg.top_p, seed=cfg.seed)

    def work(model, tokenizer, samples, write):
        answering.answer(model, tokenizer, samples, **sampling, batch_size=cfg.batch_size,
                         progress=rank == 0, until=until, write=write)

    return answering.predict(cfg, samples, out, {**run, **sampling}, work)


@dataclass
class ScienceQA(GenerationFlags):
    """Table 1: answer a split of ScienceQA, print the nine columns. Other commands: coco, mme, truthfulqa."""
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
        metadata = adapter_metadata(cfg)
        samples = prompts.read_scienceqa(cfg.data, cfg.split, metadata["format"], metadata["captions"],
                                         metadata["lavin"]["vision"])[: cfg.limit or None]
        answers = generate(cfg, samples, cfg.out, metadata, scores.ANSWER if cfg.stop_at_letter else None,
                           command="scienceqa", data=cfg.data, split=cfg.split,
                           stop_at_letter=cfg.stop_at_letter)
    if answers is None:
        return None
    if not samples:
        raise ValueError(f"{cfg.data}: split {cfg.split} is empty; choose another --split")
    result = scores.scienceqa(samples, answers, cfg.predictions or cfg.out)
    table = scores.scienceqa_table(result, paper=True)
    if cfg.data == ScienceQA.data:
        table += "\n(here: the embedded small world; the paper's rows are about ScienceQA)"
    return result, table


@dataclass
class COCO(GenerationFlags):
    """Table 4: caption COCO's Karpathy test split, print BLEU-4 and CIDEr. Needs pycocoevalcap and Java."""
    data: str = ""  # folder of dataset_coco.json and the pictures, or DIR:IMAGES
    out: str = "out/coco.jsonl"  # .jsonl file for the captions; if it exists, the run resumes from it
    predictions: str = ""  # score this file instead: {id: text}, or COCO's [{image_id, caption}]
    references: str = ""  # what --predictions is scored against: dataset_coco.json, or COCO's captions_*.json
    max_new_tokens: int = 40  # [0, inf) longest caption, in tokens; 0: as in training


def coco(cfg: COCO) -> tuple[dict, str] | None:
    if bool(cfg.data) == bool(cfg.predictions) or bool(cfg.predictions) != bool(cfg.references):
        raise ValueError("coco: give --data DIR to caption the test split, or --predictions FILE and "
                         "--references FILE (dataset_coco.json or captions_val2014.json) to score captions")
    if cfg.predictions:
        references = scores.read_references(cfg.references, scores.read_predictions(cfg.predictions))
        what = f"pictures of {cfg.references}"
        captions = scores.predictions_for(cfg.predictions, list(references), what)
    else:
        source, *others = prompts.mixture(f"coco:{cfg.data}")
        if others:
            raise ValueError(f"--data {cfg.data}: expected one folder, without a comma")
        samples = prompts.read_coco(source.path, source.images, "test")[: cfg.limit or None]
        references = {s.id: s.problem["captions"] for s in samples}
        try:
            scores.caption_tools()
        except ValueError as e:  # report it before the captioning, which takes long
            print(f"the captions will not be scored: {e}", file=sys.stderr)
            references = {}
        metadata = adapter_metadata(cfg, needs_pictures=True)
        captions = generate(cfg, samples, cfg.out, metadata, command="coco", data=cfg.data)
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
    max_new_tokens: int = 16  # [0, inf) longest reply, in tokens; its first four characters count


def mme(cfg: MME) -> tuple[dict, str] | None:
    if bool(cfg.data) == bool(cfg.results):
        raise ValueError("mme: give --data DIR to answer the questions, or --results DIR to score replies")
    if cfg.data:
        tasks = cfg.tasks.split(",") if cfg.tasks else [*scores.PERCEPTION, *scores.COGNITION]
        for task in tasks:
            scores.check_task("--tasks", task)
        samples = benchmarks.read_mme(cfg.data, tasks)[: 2 * cfg.limit or None]  # two questions per picture
        metadata, out = adapter_metadata(cfg, needs_pictures=True), f"{cfg.out}/predictions.jsonl"
        replies = generate(cfg, samples, out, metadata, command="mme", data=cfg.data, tasks=cfg.tasks)
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
    with cli.process_group("gloo", timeout=timedelta(days=1)):  # all wait for the slowest
        scored = command(cfg)
        if scored:
            result, table = scored
            print(json.dumps(result) if cfg.json else table)


if __name__ == "__main__":
    cli.run(main)
