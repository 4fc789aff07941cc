"""Time one token of an answer: LaVIN folded and unfolded, the bare LLaMA, and Hugging Face's `generate`.

The models take turns, answer by answer. A slow moment of the machine then hits all of them, so ratios between
them are more reliable than times. Each model answers one row greedily: the same prompt (an image and random
tokens), the same number of new tokens. The weights are random.
"""
import copy
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Callable

import torch
import torch.nn as nn

import data
from lavin import IMAGE, LaVIN
from speed.compiling import compile_step
from speed.machine import bandwidth, bytes_per_token
from speed.nf4 import NF4Linear
from speed.step import FoldedLaVIN

Answer = Callable[[], tuple[list[int], list[float]]]  # returns the tokens, and when each one reached the CPU


# ---------------------------------------------------------------------------------------------------
# LaVIN and the bare LLaMA

def share(model: LaVIN) -> LaVIN:
    """A second model with the same tensors. A module or parameter can be replaced in one of the two alone."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def bare(model: LaVIN) -> FoldedLaVIN:
    """The model without adapters in LLaMA. Untrained ones take their place: merged, they change no weight."""
    model = share(model)
    for layer in model.llama.layers:
        layer.adapter_attn = type(layer.adapter_attn)(model.llama.cfg.dim, model.cfg.adapter).to(model.device)
    return FoldedLaVIN(model, IMAGE)


def lavin_answer(model: LaVIN, batch: data.Batch, n: int) -> Answer:
    """A function that answers the one row of `batch` with n tokens."""
    def answer():
        tokens, times = [], []
        for (token,) in model.stream(batch, n, eos=-1, temperature=0.0):
            tokens.append(token)
            times.append(time.perf_counter())
        return tokens, times

    return answer


# ---------------------------------------------------------------------------------------------------
# Hugging Face

class TokenTimes:
    """A streamer for `generate`, which calls `put` after each token."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def to_halves(w: torch.Tensor, H: int) -> torch.Tensor:
    """Reorder the rows of wq or wk for Hugging Face.

    A head rotates pairs of rows: (2i, 2i + 1) in Meta's layout, (i, i + D/2) in Hugging Face's.
    """
    return w.unflatten(0, (H, -1, 2)).transpose(1, 2).flatten(0, 2)


def hugging_face_tensors(model: LaVIN) -> dict[str, torch.Tensor]:
    """The folded weights under Hugging Face's names. Only q and k are copies, with their rows reordered."""
    llama, H, G = model.llama, model.llama.cfg.n_heads, model.llama.cfg.n_kv_heads
    modules = {"model.embed_tokens": llama.tok_embeddings, "model.norm": llama.norm, "lm_head": llama.output}
    tensors = {}
    for i, layer in enumerate(llama.layers):
        a, ffn, at = layer.attention, layer.feed_forward, f"model.layers.{i}"
        modules |= {f"{at}.input_layernorm": layer.attention_norm, f"{at}.self_attn.o_proj": a.wo,
                    f"{at}.post_attention_layernorm": layer.ffn_norm, f"{at}.mlp.gate_proj": ffn.w1,
                    f"{at}.mlp.up_proj": ffn.w3, f"{at}.mlp.down_proj": ffn.w2}
        for kind in ("weight", "bias"):  # a folded adapter gives q, k and v a bias
            q, k, v = (getattr(linear, kind) for linear in (a.wq, a.wk, a.wv))
            tensors |= {f"{at}.self_attn.q_proj.{kind}": to_halves(q, H),
                        f"{at}.self_attn.k_proj.{kind}": to_halves(k, G), f"{at}.self_attn.v_proj.{kind}": v}
        # Hugging Face has one switch for the biases of q, k, v and o
        tensors[f"{at}.self_attn.o_proj.bias"] = torch.zeros_like(llama.norm.weight)
    return tensors | {f"{name}.weight": module.weight for name, module in modules.items()}


def hugging_face_model(model: LaVIN) -> nn.Module:
    """Hugging Face's LLaMA with the folded weights of `model`."""
    try:
        import transformers
    except ImportError as e:
        raise ValueError(f"--vs hf: the package {e.name} is missing; pip install transformers peft") from None
    c = model.llama.cfg
    config = transformers.LlamaConfig(
        hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, vocab_size=c.vocab_size,
        rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_seq_len, rope_theta=c.rope_theta,
        attention_bias=True, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None, pad_token_id=0)
    with torch.device("meta"):
        hf = transformers.LlamaForCausalLM(config).eval()
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config).to(model.device)  # its buffer is not a weight
    hf.load_state_dict(hugging_face_tensors(model), assign=True)
    return hf


def hugging_face_answer(hf: nn.Module, prompt: torch.Tensor, n: int) -> Answer:
    """A function that answers with n tokens. The prompt contains an image, so it is embedded: [1, T, C]."""
    def answer():
        streamer, mask = TokenTimes(), torch.ones(prompt.shape[:2], device=prompt.device)
        with torch.inference_mode():
            tokens = hf.generate(inputs_embeds=prompt, attention_mask=mask, max_new_tokens=n,
                                 min_new_tokens=n, do_sample=False, use_cache=True, streamer=streamer)
        return tokens[0].tolist(), streamer.times[-n:]

    return answer


# ---------------------------------------------------------------------------------------------------
# timing

@dataclass
class Timings:
    """One list entry per timed round. In a round, each model gives one answer."""
    prefill: dict[str, list[float]]  # {name: seconds until the first token}
    per_token: dict[str, list[float]]  # {name: seconds between two tokens, the median of an answer}
    tokens: dict[str, list[int]] = field(default_factory=dict)  # {name: the last answer}
    bandwidths: list[tuple[float, float]] = field(default_factory=list)  # before each round, after the last

    def speedup(self, a: str, b: str) -> float:
        """How many times faster b is than a: the median of the rounds' ratios."""
        return median(x / y for x, y in zip(self.per_token[a], self.per_token[b]))

    def limits(self) -> list[float]:
        """The memory bandwidth in each round: the best of the figures from before and after it."""
        return [max(before + after) for before, after in zip(self.bandwidths, self.bandwidths[1:])]

    def utilisation(self, name: str, size: float) -> float:
        """The share of the bandwidth that a model uses if a token reads `size` bytes."""
        return median(size / t / limit for t, limit in zip(self.per_token[name], self.limits()))


def take_turns(answers: dict[str, Answer], burn_in: int, steps: int, device: torch.device,
               say: Callable[[str], None]) -> Timings:
    """Run burn_in + steps rounds and time the last `steps` of them."""
    timings = Timings(prefill={name: [] for name in answers}, per_token={name: [] for name in answers})
    for k in range(burn_in + steps):
        timed = k >= burn_in
        if timed:
            timings.bandwidths.append(bandwidth(device))
        for name, answer in answers.items():
            started = time.perf_counter()
            timings.tokens[name], times = answer()
            per_token = median(b - a for a, b in zip(times, times[1:]))
            say(f"answer {k + 1} {name}: {1e3 * per_token:.2f} ms/token" + ", burn-in" * (not timed))
            if timed:
                timings.prefill[name].append(times[0] - started)
                timings.per_token[name].append(per_token)
    timings.bandwidths.append(bandwidth(device))
    return timings


def measure(model: LaVIN, batch: data.Batch, n: int, burn_in: int, steps: int, vs: str, compiled: bool,
            say: Callable[[str], None]) -> dict:
    """The figures that `speed.bench decode` prints. Every answer has n tokens. Folds the model.

    vs: "hf" includes Hugging Face; compiled: include the compiled step. With matrices in 4 bits, which cannot
    be folded, the only model is the unfolded one.
    """
    unfolded, ours = share(model), "unfolded"
    answers = {"unfolded": lavin_answer(unfolded, batch, n)}
    if not isinstance(model.llama.layers[0].attention.wq, NF4Linear):
        without_adapters, model, ours = bare(model), FoldedLaVIN(model, IMAGE), "folded"
        answers = {"bare": lavin_answer(without_adapters, batch, n), **answers,
                   "folded": lavin_answer(model, batch, n)}
    if compiled:
        fast = copy.copy(model)
        compile_step(fast)
        answers["compiled"] = lavin_answer(fast, batch, n)
    if vs:
        with torch.inference_mode(), model.autocast():
            answers["hf"] = hugging_face_answer(hugging_face_model(model), model.embed(batch)[0][None], n)
    timings = take_turns(answers, burn_in, steps, model.device, say)

    ms, length = {name: 1e3 * median(times) for name, times in timings.per_token.items()}, batch.lengths[0]
    prefill, size = median(timings.prefill[ours]), bytes_per_token(model.llama, length + n / 2)
    result = {f"{name}_ms_per_token": x for name, x in ms.items()} | {
        "prefill_s": prefill, "prefill_tokens_per_s": length / prefill, "tokens_per_s": 1e3 / ms[ours],
        "mb_per_token": size / 1e6, "gb_per_s": size / ms[ours] / 1e6,
        "memory_gb_per_s": median(timings.limits()) / 1e9, "utilisation": timings.utilisation(ours, size)}
    tokens = timings.tokens
    if "bare" in ms:
        result |= {f"{name}_over_bare": timings.speedup("bare", name) for name in ("folded", "unfolded")}
    if compiled:
        result |= {"compiled_over_folded": timings.speedup("folded", "compiled"),
                   "compiled_gb_per_s": size / ms["compiled"] / 1e6,
                   "compiled_utilisation": timings.utilisation("compiled", size),
                   "compiled_same_tokens": tokens["compiled"] == tokens["folded"]}
    if vs:  # hf_over_ours is a ratio of times: above 1, ours is faster
        result |= {"hf_over_ours": timings.speedup("hf", "folded"),
                   "hf_same_tokens": sum(a == b for a, b in zip(tokens["hf"], tokens["folded"])) / n}
    if vs and compiled:
        result["hf_over_compiled"] = timings.speedup("hf", "compiled")
    return result
