"""Make the tiny LLaMA: train its tokenizer, pretrain it on text alone, write it in Hugging Face's layout.

    python tiny/make_llm.py        # resumes if --work holds a checkpoint

Prints, for each kind of held-out problem, how often the greedy answer is exactly right. The model reads each
scene in words instead of a picture. It learns the format, the facts and how to read a described scene; it
never sees a picture.
"""
import argparse
import io
import json
import math
import os
import random
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from llama import LLaMA, LLaMAConfig  # noqa: E402
from official.tokenizer import Tokenizer
from tiny import corpus, scenes, world  # noqa: E402


def train_tokenizer(path: Path) -> None:
    """Write a sentencepiece model like LLaMA's. Every word of the corpus is one piece.

    The pieces are given, none is merged from a text: words after a space, words that may follow "Response:"
    directly, marks of the prompt, option letters, and single characters. Any other text falls into the
    longest pieces from left to right, then into characters and bytes.
    """
    spaced = sorted({*corpus.ALL_WORDS, *corpus.FIRST_WORDS})
    marks = ["▁Image:", "▁Question:", "▁Instruction:", "▁N/A", "\nContext:", "\nOptions:", "\nResponse:"]
    marks += [f"▁({letter})" for letter in world.LETTERS]
    pieces = marks + [f"▁{word}" for word in spaced if len(word) > 1 or word.isdigit() or word in "aAI"]
    pieces += [word for word in corpus.FIRST_WORDS if len(word) > 1]
    pieces += [f"▁{letter}" for letter in world.LETTERS if f"▁{letter}" not in pieces]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"-{c}" for c in corpus.CHARACTERS] * 20), model_writer=model,
        model_type="bpe",
        vocab_size=3 + 256 + len(pieces) + len(corpus.CHARACTERS) + 1,  # 3: unknown, BOS, EOS; 1: the space
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=True, split_digits=True, character_coverage=1.0, user_defined_symbols=pieces,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


def initialise(model: LLaMA) -> None:
    for name, p in model.named_parameters():
        if "tok_embeddings" in name:
            torch.nn.init.normal_(p, std=0.2)
        elif p.ndim == 2:
            branch = name.endswith(("wo.weight", "w2.weight"))  # the last matrix of a residual branch
            shrink = math.sqrt(2 * model.cfg.n_layers) if branch else 1
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5 / shrink)
    for layer in model.layers:  # start with keys equal to queries: each token attends to similar tokens
        layer.attention.wk.weight.data.copy_(layer.attention.wq.weight)


def batches(stream: corpus.Corpus, tokenizer: Tokenizer, size: int, turns):
    """Yield Rows of about `size` tokens, fewer during drills; each document has up to turns() questions.

    Documents of similar length share a batch, so there is little padding.
    """
    while True:
        pool = [corpus.tokens(stream.document(turns()), tokenizer.encode, tokenizer.bos, tokenizer.eos)
                for _ in range(128)]
        pool.sort(key=lambda doc: len(doc[0]))
        limit = size if stream.mastered() else size * 2 // 5  # smaller batches master the drill sooner
        chunks, chunk = [], []
        for doc in pool:
            if chunk and len(doc[0]) * (len(chunk) + 1) > limit:
                chunks.append(chunk)
                chunk = []
            chunk.append(doc)
        stream.rng.shuffle(chunks)
        for chunk in chunks:
            yield pad(chunk)


class Rows(NamedTuple):
    """A batch of documents, padded with 0, and its N stacked words."""
    ids: torch.Tensor  # [B, T]
    target: torch.Tensor  # [B, T], true for the tokens of a response
    where: torch.Tensor  # [N], position of each stacked word, as an index into ids.flatten()
    word: torch.Tensor  # [N], token id of each stacked word
    weight: torch.Tensor  # [N, 1]


def pad(docs: list) -> Rows:
    T = max(len(ids) for ids, _, _ in docs)
    words = [(row * T + place, word, weight)
             for row, (_, _, stacked) in enumerate(docs) for place, word, weight in stacked]
    where, word, weight = zip(*words) if words else ((), (), ())
    return Rows(torch.tensor([ids + [0] * (T - len(ids)) for ids, _, _ in docs]),
                torch.tensor([target + [False] * (T - len(target)) for _, target, _ in docs]),
                torch.tensor(where, dtype=torch.long), torch.tensor(word, dtype=torch.long),
                torch.tensor(weight)[:, None])


def embed(model: LLaMA, rows: Rows, noise: float = 0.0) -> torch.Tensor:
    """[B, T, C]. Embeddings of stacked words are summed at their position. Noise goes where the id is 0."""
    embeddings = model.tok_embeddings
    x = embeddings(rows.ids).masked_fill(rows.ids[..., None] == 0, 0).flatten(0, 1)
    x = x.index_add(0, rows.where, rows.weight * embeddings(rows.word)).view(*rows.ids.shape, -1)
    return x + noise * torch.randn_like(x) * (rows.ids[..., None] == 0) if noise else x


def held_out(n: int, seed: int = 1) -> dict[str, list]:
    """n problems of each kind, from a seed that training never uses.

    Each kind of scene question counts four times: with the scene in the hint, or in the image slot as a
    sentence, a telegram or a stack. Lists, tables and sums are asked about in English, not in made-up words.
    """
    rng, kinds = random.Random(f"held out {seed}"), defaultdict(list)
    asker, letters = world.Asker(rng), world.Letters(rng)

    def add(kind: str, slot, p: dict) -> None:
        if len(kinds[kind]) < n:
            kinds[kind].append([(slot, ""), (world.prompt(p), corpus.response(p))])

    while len(kinds) < 4 * len(world.SCENE_KINDS) or min(map(len, kinds.values())) < n:
        p, scene = world.scene_problem(asker, letters)
        add(p["kind"], f"Image: {scenes.sentence(scene)}", p)
        add(p["kind"] + " telegram", f"Image: {corpus.telegram(rng, scene)}", p)
        add(p["kind"] + " stack", corpus.stack(rng, scene), p)
        p, _ = world.scene_problem(asker, letters, told=True)
        add(p["kind"], "Image: N/A", p)
    for _ in range(n):
        asked = [(world.ask_rule(asker, rule, m), rule.hint)
                 for m in world.MADE_UP.values() for rule in [world.random_rule(rng, m)]]
        cast = world.random_cast(rng)
        asked += [(world.ask_people(rng, cast), cast.told())]
        asked += [(world.ask_fact(rng, facts, *rng.choice(facts.pairs())), "") for facts in world.FACTS]
        for q, hint in asked:
            kind = "who has what" if hint.startswith("Who") else q.kind.removeprefix("made-up ")
            add(kind, "Image: N/A", world.record(rng, letters, q, hint, "", "", ""))
    return kinds


@torch.no_grad()
def accuracy(model: LLaMA, tokenizer: Tokenizer, kinds: dict[str, list]) -> dict[str, float]:
    """Share of problems whose greedy response equals the reference, token by token, EOS included.

    Greedy decoding yields the reference exactly if each reference token has the highest logit at its
    position, so one forward pass is enough.
    """
    score = {}
    for kind, docs in kinds.items():
        rows = pad([corpus.tokens(doc, tokenizer.encode, tokenizer.bos, tokenizer.eos) for doc in docs])
        hit = model.output(model(embed(model, rows)[:, :-1])).argmax(-1) == rows.ids[:, 1:]
        score[kind] = (hit | ~rows.target[:, 1:]).all(1).float().mean().item()
    return score


def save(model: LLaMA, folder: Path) -> None:
    """Write config.json and model.safetensors in Hugging Face's LLaMA layout, in bf16."""
    c, D = model.cfg, model.cfg.dim // model.cfg.n_heads
    # Hugging Face's rotary pairs are (i, i + D / 2), ours (2i, 2i + 1)
    half_split = lambda w: w.view(c.n_heads, D // 2, 2, c.dim).transpose(1, 2).reshape(c.dim, c.dim)
    names = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
             "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
             "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
             "feed_forward.w2": "mlp.down_proj",
             **{f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"}}
    tensors = {}
    for name, p in model.state_dict().items():
        layer = re.match(r"layers\.\d+\.", name)
        prefix, leaf = (f"model.{layer[0]}", name[layer.end():]) if layer else ("", name)
        if leaf.startswith(("attention.wq", "attention.wk")):
            p = half_split(p)
        tensors[f"{prefix}{names[leaf.removesuffix('.weight')]}.weight"] = p.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": c.dim, "intermediate_size": c.ffn_dim, "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_heads, "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta, "vocab_size": c.vocab_size, "max_position_embeddings": c.max_seq_len,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "attention_bias": False,
        "torch_dtype": "bfloat16"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="pretrain the tiny LLaMA on text")
    parser.add_argument("--out", type=Path, default=HERE / "llama", help="folder for the finished files")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=15000)
    parser.add_argument("--decay", type=int, default=2500, help="final steps over which the rate falls to 0")
    parser.add_argument("--tokens", type=int, default=2048, help="approximate number of tokens per step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.model").is_file():
        train_tokenizer(args.out / "tokenizer.model")
    train(args, Tokenizer(args.out / "tokenizer.model"))


def closed_prompts(problems: dict[str, list]) -> set[str]:
    """Text prompts that no document may contain: those of the val and test splits, and of `problems`."""
    closed = set()
    for split in ("test", "val"):
        for _ in world.split_problems(0, split, world.SPLITS[split], closed):
            pass
    held = {turn[0] for docs in problems.values() for slot, turn in docs if slot[0] == "Image: N/A"}
    return held | {prompt for prompt, picture in closed if picture is None}


def train(args, tokenizer: Tokenizer) -> None:
    cfg = LLaMAConfig(dim=args.dim, n_layers=args.layers, n_heads=args.heads,
                      ffn_dim=32 * round(args.dim / 12), vocab_size=tokenizer.vocab_size, norm_eps=1e-5,
                      rope_theta=100.0, max_seq_len=256)
    model = LLaMA(cfg)
    initialise(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01,
                                  fused=True)
    problems = held_out(40)
    stream = corpus.Corpus(args.seed, closed_prompts(problems))
    step, checkpoint = 0, args.work / "llm.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        stream = corpus.Corpus(args.seed + 1000 * step, stream.closed)  # fresh documents
        stream.n_words, stream.n_between, stream.paired = state["lesson"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {step}", flush=True)

    source = batches(stream, tokenizer, args.tokens, lambda: 1 if step > args.steps - args.decay // 2 else 2)
    letters = torch.tensor([tokenizer.encode(c)[0] for c in world.LETTERS])
    running, drill, seen, start = 3.0, 3.0, 0, time.time()
    for step in range(step + 1, args.steps + 1):  # noqa: B020
        rate = args.lr * min(1, step / 100, (args.steps - step + 1) / args.decay)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = next(source)
        wanted = rows.ids[:, 1:][rows.target[:, 1:]]  # [N]
        h = model(embed(model, rows, noise=0.1)[:, :-1])[rows.target[:, 1:]]
        each = F.cross_entropy(model.output(h), wanted, reduction="none")
        loss = each.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += 0.02 * (loss.item() - running)
        pairs = stream.letters_mastered() and not stream.paired  # then every response counts
        drilled = torch.isin(wanted, letters) | pairs
        if drilled.any():
            drill += 0.02 * (each[drilled].mean().item() - drill)
        seen += rows.ids.numel()
        if drill < 0.4 and not stream.mastered():
            stream.harder()
            drill = 0.8
        if step % 50 == 0:
            spent = time.time() - start
            print(f"step {step} loss {running:.3f} drill {drill:.3f} lr {rate:.1e} "
                  f"lesson {stream.n_words} words, {stream.n_between} between, pairs {stream.paired} "
                  f"{seen / spent:.0f} tokens/s {spent:.0f} s", flush=True)
        if step % 1000 == 0 or step == args.steps:
            score = accuracy(model, tokenizer, problems)
            print(f"mean {sum(score.values()) / len(score):.3f} worst {min(score.values()):.2f} "
                  + " ".join(f"{k}={v:.2f}" for k, v in sorted(score.items(), key=lambda x: x[1])),
                  flush=True)
            save(model, args.out)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                     "lesson": (stream.n_words, stream.n_between, stream.paired)}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)


if __name__ == "__main__":
    main()
