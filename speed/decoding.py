"""What a token of an answer costs: LaVIN folded and unfolded, beside the bare LLaMA and Hugging Face's `generate`.

All take turns, answer by answer: whatever else slows the machine, slows them all, and ratios stand where times don't.
Greedy, one row, the same prompt (a picture and random tokens), the same number of new tokens, on random weights.
"""
import copy
import time
from statistics import median
from typing import Callable

import torch
import torch.nn as nn

import data
from lavin import IMAGE, LaVIN
from speed.compiling import compile_step
from speed.machine import bandwidth, bytes_per_token
from speed.step import FastStep

Answer = Callable[[], tuple[list[int], list[float]]]  # -> tokens, and when each had reached the CPU


def twin(model: LaVIN) -> LaVIN:
    """another model of the very same tensors: what is replaced in it, is replaced in it alone"""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def bare(model: LaVIN) -> LaVIN:
    """The same without LLaMA's adapters, as if they had been folded: only the adapters differ."""
    model = twin(model)
    model.folded = {IMAGE: []}
    for layer in model.llama.layers:
        a, layer.adapter_attn = layer.attention, None
        W = torch.cat([a.wq.weight, a.wk.weight, a.wv.weight])
        model.folded[IMAGE].append((W, W.new_zeros(len(W))))
    model.enter(IMAGE)
    return model


def ours(model: LaVIN, batch: data.Batch, n: int, step: Callable | None) -> Answer:
    def answer():
        tokens, marks = [], []
        for (token,) in model.stream(batch, n, eos=-1, temperature=0.0, step=step):
            tokens.append(token)
            marks.append(time.perf_counter())
        return tokens, marks

    return answer


class Clock:
    """what `generate` takes for a streamer: it is told of every token"""

    def __init__(self):
        self.marks = []

    def put(self, tokens):
        self.marks.append(time.perf_counter())

    def end(self):
        pass


def halves(w: torch.Tensor, heads: int) -> torch.Tensor:
    """rows of wq or wk: Meta turns the pairs (2i, 2i + 1) of a head, Hugging Face (i, i + D / 2)"""
    return w.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def merged(model: LaVIN) -> nn.Module:
    """Hugging Face's LLaMA with the folded model's weights: one set of tensors but for q and k, whose rows lie otherwise"""
    try:
        import transformers
    except ImportError as e:
        raise ValueError(f"--vs hf: the package {e.name} is not here; pip install transformers peft") from None
    c, weight = model.llama.cfg, model.llama.norm.weight
    config = transformers.LlamaConfig(
        hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        vocab_size=c.vocab_size, rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_seq_len, attention_bias=True,
        rope_theta=c.rope_theta, attn_implementation="sdpa",
        bos_token_id=None, eos_token_id=None, pad_token_id=0)
    with torch.device("meta"):
        hf = transformers.LlamaForCausalLM(config).eval()
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config).to(weight.device)  # the only tensor that is not a weight
    t = {"model.embed_tokens": model.llama.tok_embeddings.weight, "model.norm": weight, "lm_head": model.llama.output.weight}
    for i, layer in enumerate(model.llama.layers):
        a, f, at = layer.attention, layer.feed_forward, f"model.layers.{i}."
        t |= {f"{at}self_attn.o_proj": a.wo.weight, f"{at}mlp.gate_proj": f.w1.weight, f"{at}mlp.down_proj": f.w2.weight,
              f"{at}mlp.up_proj": f.w3.weight, f"{at}input_layernorm": layer.attention_norm.weight,
              f"{at}post_attention_layernorm": layer.ffn_norm.weight}
        for kind in ("weight", "bias"):
            q, k, v = (getattr(x, kind) for x in (a.wq, a.wk, a.wv))
            t |= {f"{at}self_attn.{name}.{kind}": x for name, x in
                  (("q_proj", halves(q, c.n_heads)), ("k_proj", halves(k, c.n_heads)), ("v_proj", v))}
        t[f"{at}self_attn.o_proj.bias"] = torch.zeros_like(weight)
    hf.load_state_dict({n if n.endswith((".weight", ".bias")) else n + ".weight": x for n, x in t.items()}, assign=True)
    return hf


def theirs(hf: nn.Module, prompt: torch.Tensor, n: int) -> Answer:
    """prompt [1, T, C], as embeddings: there is a picture in it"""
    def answer():
        clock = Clock()
        with torch.inference_mode():
            tokens = hf.generate(inputs_embeds=prompt, attention_mask=torch.ones(prompt.shape[:2], device=prompt.device),
                                 max_new_tokens=n, min_new_tokens=n, do_sample=False, use_cache=True, streamer=clock)
        return tokens[0].tolist(), clock.marks[-n:]

    return answer


def measure(model: LaVIN, batch: data.Batch, n: int, burn_in: int, steps: int, vs: str, compiled: bool,
            say: Callable[[str], None]) -> dict:
    """`n` tokens after the one prompt of `batch`, `steps` times; -> what bench.py prints. Folds the model."""
    without = bare(model)
    answers = {"bare": ours(without, batch, n, FastStep(without)), "unfolded": ours(twin(model), batch, n, None)}
    answers["folded"] = ours(model.fold(IMAGE), batch, n, FastStep(model))
    if compiled:
        answers["compiled"] = ours(model, batch, n, compile_step(model))
    if vs:
        with torch.inference_mode(), model.autocast():
            answers["hf"] = theirs(merged(model), model.embed(batch)[0][None], n)
    device, length = model.device, batch.lengths[0]
    limits, prefill, gaps, tokens = [], {name: [] for name in answers}, {name: [] for name in answers}, {}
    for k in range(burn_in + steps):
        if k >= burn_in:
            limits.append(bandwidth(device))
        for name, answer in answers.items():
            started = time.perf_counter()
            tokens[name], marks = answer()
            between = [b - a for a, b in zip(marks, marks[1:])]
            say(f"answer {k + 1} {name}: {1e3 * median(between):.2f} ms/token" + ", burn-in" * (k < burn_in))
            if k >= burn_in:
                prefill[name].append(marks[0] - started)
                gaps[name].append(median(between))  # of one answer: its last tokens cost hardly more than its first
    limits.append(bandwidth(device))
    ms = {name: 1e3 * median(x) for name, x in gaps.items()}

    def ratio(a: str, b: str) -> float:  # of answers that followed each other, so that both had the same machine
        return median(x / y for x, y in zip(gaps[a], gaps[b]))

    size = bytes_per_token(model.llama, length + n / 2)
    around = [max(a + b) for a, b in zip(limits, limits[1:])]  # the better of before and after: nothing is to be flattered

    def utilisation(a: str) -> float:
        return median(size / gap / limit for gap, limit in zip(gaps[a], around))

    result = {f"{name}_ms_per_token": x for name, x in ms.items()} | {
        "prefill_s": median(prefill["folded"]), "prefill_tokens_per_s": length / median(prefill["folded"]),
        "tokens_per_s": 1e3 / ms["folded"], "folded_over_bare": ratio("bare", "folded"),  # as speeds
        "unfolded_over_bare": ratio("bare", "unfolded"), "mb_per_token": size / 1e6, "gb_per_s": size / ms["folded"] / 1e6,
        "memory_gb_per_s": median(around) / 1e9, "utilisation": utilisation("folded")}
    if compiled:
        result |= {"compiled_over_folded": ratio("folded", "compiled"), "compiled_gb_per_s": size / ms["compiled"] / 1e6,
                   "compiled_utilisation": utilisation("compiled"),
                   "compiled_same_tokens": tokens["compiled"] == tokens["folded"]}
    if vs:  # of times: > 1 is ours being faster
        same = sum(a == b for a, b in zip(tokens["hf"], tokens["folded"]))
        result |= {"hf_over_ours": ratio("hf", "folded"), "hf_same_tokens": same / n}
    if vs and compiled:
        result["hf_over_compiled"] = ratio("hf", "compiled")
    return result
