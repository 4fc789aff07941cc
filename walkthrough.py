"""Equations (1) to (8) of LaVIN (https://arxiv.org/abs/2305.15023), computed on the tiny model.

Run `python walkthrough.py`, or open its `# %%` cells as a notebook. Below each value of the model stands that
of tests/naive.py: the same formulas in numpy and float64. The program stops if they differ by more than 1e-4.
"""
import inspect
import sys
import textwrap
from unittest.mock import patch

import numpy as np
import torch

import clip
import lavin
import llama
from adapters import MMAdapter, freeze_base, trainable
from data import Sample, collate, encode
from lavin import IMAGE, LaVIN, Neck
from official.tokenizer import Tokenizer

sys.path.append("tests")
import naive


# %% Helpers: show the code of an equation, compare two values, compute one sample the naive way
def equation(n: int, title: str, *functions) -> None:
    """Print the lines of these functions that carry the tag of Eq. (n), up to the next line of code."""
    print(f"\nEq. ({n}): {title}")
    for f in functions:
        lines = [line.strip() for line in inspect.getsource(f).splitlines()]
        first = next(i for i, line in enumerate(lines) if f"# Eq. ({n}):" in line)
        last = next(i for i, line in enumerate(lines) if i >= first and line[0] != "#" and line[-1] != ":")
        for line in [*lines[first:last + 1], f"in {f.__qualname__}"]:
            print(textwrap.fill(line, 98, initial_indent="    ", subsequent_indent="        "))

def check(what: str, here, there, source: str = "naive.py") -> None:
    """Print two values of the same thing and their largest difference; stop if it exceeds 1e-4."""
    here, there = np.asarray(here), np.asarray(there)
    difference = abs(here - there).max() if here.shape == there.shape else np.nan
    for name, x in ((f"{what} {list(here.shape) or ''}", here), (source, there)):
        print(f"{name:>22} {' '.join(f'{value:9.4f}' for value in x.flat[:4])}{' ..' if x.size > 4 else ''}")
    print(f"{'largest difference':>22}    {difference:.0e}")
    assert difference < 1e-4, f"{what} differs from {source} by {difference}"

def naive_run(p: dict, e) -> tuple:
    """p: weights; e: a sample -> Z with t_m in front (token=True), w of each layer, log p of each target"""
    ids = e.head + [0] * e.n_visual + list(e.rest)  # head, X' in place of zeros, prompt and response
    Z = naive.sequence(ids, picture.numpy() if e.n_visual else None, len(e.head), p, model.cfg, model.vit.cfg)
    h, w = naive.llama(Z, naive.sub(p, "llama."), model.llama.cfg, model.cfg.adapter, token=True)
    log_p = np.log(naive.softmax(h[1:] @ p["llama.output.weight"].T))  # [T, V]
    return Z, np.stack(w), log_p[range(e.start - 1, e.length - 1), e.rest[e.n_prompt:]]

# %% Four inputs: a question about an image, with the right response, with a wrong one, without the image
torch.set_grad_enabled(False), torch.set_num_threads(1)  # only Eq. (4) needs gradients
model, _ = lavin.load("tiny/adapters.safetensors", "tiny/llama", "tiny/clip")
tokenizer, n_cls, vit_size = Tokenizer("tiny/llama"), model.vit.n_cls, model.vit.cfg.image_size
prompt = "Question: What color is the circle?\nContext: N/A\nOptions: (A) green (B) blue (C) red\nResponse:"
RED = "There is left a big red circle, right a small blue square. The circle is red. The answer is C."
asked, right, wrong, text = (encode(Sample("", prompt, R, image, {}), tokenizer, n_cls) for R, image in zip(
    ("", RED, "The answer is B.", ""), 3 * ["tiny/demo.png"] + [None]))
batch, right_batch, wrong_batch = (collate([e], vit_size, "clip") for e in (asked, right, wrong))
picture, p = batch.images[0], naive.params(model)
(Z, w_image, _), (Z_text, w_text, _) = naive_run(p, asked), naive_run(p, text)
print(f"tiny/demo.png shows a big red circle, left of a small blue square. The prompt:\n\n{prompt}")

# %% Eq. (1): t_m = m E_m. m is one-hot, so t_m is the row of E_m for text or the row for an image.
equation(1, "the modality token", LaVIN.routing_weights)
with patch.object(model.llama, "route", lambda t: t):  # routing_weights() ends with route(t_m)
    check("t_m", model.routing_weights(), np.stack([Z_text[0], Z[0]]))

# %% Eq. (2): Z' = Z + s router(f_a1(Z), f_a2(Z); f_w(t_m)), f_a1(Z) = phi_u1(phi_d(Z)). Here Z: normed words
equation(2, "the MM-Adapter", MMAdapter.forward)
layer, w = model.llama.layers[0], model.routing_weights()  # w [layer, modality, (w_0, w_1)]
words = layer.attention_norm(model.llama.tok_embeddings(batch.tokens))  # [20, C]
adapted, adapter_p = layer.adapter_attn(words, w[0, IMAGE]), naive.sub(p, "llama.layers.0.adapter_attn.")
check("Z'", adapted, naive.mm_adapter(words.double().numpy(), w_image[0], adapter_p, model.cfg.adapter.scale))
bare, vit = llama.LLaMA.from_pretrained("tiny/llama"), clip.VisionTransformer.from_pretrained("tiny/clip")
before = bare(batch.tokens[None]), vit(batch.images)
untrained = LaVIN(bare, vit, model.cfg)  # puts new adapters into bare and vit
after = bare(batch.tokens[None], untrained.routing_weights()[:, [IMAGE], None]), vit(batch.images)
print("Untrained adapters leave every bit of the output as it was:", all(map(torch.equal, before, after)))

# %% Eq. (3): w = f_w(t_m) = softmax((t_m W_m + b_m) / tau), router(..) = w_0 f_a1(Z) + w_1 f_a2(Z)
equation(3, "the router", MMAdapter.route, MMAdapter.forward)
check("w", w, np.stack([w_text, w_image], axis=1))
hand = naive.softmax(np.array([1, 0]) / [[10], [1]]).ravel()
print("If t_m W_m + b_m = (1, 0), w is ({:.3f}, {:.3f}) at tau 10, ({:.3f}, {:.3f}) at tau 1.".format(*hand))
print("w_0 in LLaMA: two constants a layer, one for text and one for images.",
      *(f"    layer {i}: text {a:.3f}, image {b:.3f}" for i, (a, b) in enumerate(w[..., 0])), sep="\n")
w_vit, exchanged = [], picture.flip(0)  # red and blue exchanged
for block in model.vit.transformer.resblocks:
    block.adapter_attn.register_forward_pre_hook(lambda _, z_w_keep: w_vit.append(z_w_keep[1][:, 0, 0]))
X = model.vit(torch.stack([picture, exchanged]))
print("w_0 in the ViT: each image has its own. The demo, and the demo with red and blue exchanged:",
      *(f"    block {i}: demo {a:.3f}, exchanged {b:.3f}" for i, (a, b) in enumerate(w_vit)), sep="\n")

# %% Eq. (4): theta_a* = argmin L(f_phi(Z), R; theta_a). One derivative of L, beside a finite difference.
equation(4, "what trains", freeze_base)
with torch.enable_grad():
    model(wrong_batch).backward()
moved = {n for n, x in model.named_parameters() if x.grad is not None}
assert moved == trainable(model).keys(), "a frozen parameter trains"
b_d = "vit.transformer.resblocks.0.adapter_attn.phi_d.bias"  # far from L; all 8 entries get the same step
low, high = (-naive_run(p | {b_d: p[b_d] + step}, wrong)[2].sum() for step in (-1e-4, 1e-4))
check("dL/db_d", trainable(model)[b_d].grad.sum(), (high - low) / 2e-4)
with torch.device("meta"):  # the sizes without the numbers
    big = LaVIN(llama.LLaMA(llama.PRESETS["7B"]), clip.VisionTransformer(clip.PRESETS["ViT-L/14"]), model.cfg)
a, vit_block = big.llama.layers[0].adapter_attn, big.vit.transformer.resblocks[0]
n = [sum(x.numel() for x in m.parameters() if x.requires_grad)
     for m in (*a.children(), a, vit_block, big.adapter_proj, big.adapter_modality_embedding, big)]
print("One adapter of LLaMA-7B: {:,} (phi_d) + {:,} (phi_u1) + {:,} (phi_u2) + {:,} (f_w) = {:,}.".format(*n))
print("LaVIN-7B trains 32 x {:,} (LLaMA) + 24 x {:,} (ViT) + {:,} (neck) + {:,} (E_m) = {:,}.".format(*n[4:]))

# %% Eq. (5): L = - sum_i sum_s log p(R_s^i | Z^i, R_{0:s-1}^i; theta_a), one sample at a time
equation(5, "the loss, of the right response and of a wrong one", lavin.negative_log_likelihood)
check("L", [model(right_batch), model(wrong_batch)], [-naive_run(p, e)[2].sum() for e in (right, wrong)])

# %% Eq. (6): X' = SiLU(X W_d + b_d) W_u + b_u
equation(6, "the visual neck", Neck.forward)  # adapter_proj is its name in released files
check("X'", model.adapter_proj(X[0]), Z[1 + len(asked.head):][:n_cls])

# %% Eq. (7): Z = [t_m, X', Y]
equation(7, "the input of LLaMA", LaVIN.embed)
check("Z after t_m", model.embed(batch)[0], Z[1:])
for e, head in ((asked, tokenizer.decode(asked.head)), (text, tokenizer.decode(text.head))):
    print(f"{1 + e.length} tokens: t_m, [BOS] {head!r}, X' x {e.n_visual}, then {len(e.rest)} of the prompt")

# %% Eq. (8): p(R | Z) = prod_s p(R_s | Z, R_{0:s-1}; theta_l, theta_a)
equation(8, "generation", LaVIN.stream)
with patch.object(lavin, "pick", wraps=lavin.pick) as pick:  # records the logits of each step
    answer = model.generate(batch, 40, tokenizer.eos, temperature=0)[0] + [tokenizer.eos]
p_R = [call.args[0].softmax(-1)[0, t].item() for call, t in zip(pick.call_args_list, answer)]
check("p(R_s | ..)", p_R, np.exp(naive_run(p, right)[2]))
print(textwrap.fill(" ".join(f"{tokenizer.decode([t]) or '[EOS]'}:{x:.4f}" for t, x in zip(answer, p_R)), 96))
other = model.generate(batch._replace(images=exchanged[None]), 40, tokenizer.eos, temperature=0)[0]
print(f"p(R | Z) = {np.prod(p_R):.4f}. With red and blue exchanged in the image:\n{tokenizer.decode(other)}")

# %% The attention of LLaMA's last layer, from the token that predicts "red", and folding
with patch.object(llama, "dot_product_attention", wraps=llama.dot_product_attention) as attention:
    model.hidden(right_batch)
q, k = (x[0] for x in attention.call_args.args[:2])  # of the last layer, rotated: [T, H, D]
names = [repr(tokenizer.decode([id])) for id in right.head + list(right.rest)]
names = names[:len(right.head)] + [f"X'_{i + 1}" for i in range(n_cls)] + names[len(right.head):]
at = names.index("'big'")
share = torch.softmax((q[at] * k[:at + 1]).sum(-1) / q.shape[-1] ** 0.5, dim=0).mean(-1).tolist()
print('\nThe token before "red" looks at (last layer, mean of the heads):',
      *(f"{name:>10} {x:.3f} {'#' * round(60 * x)}" for name, x in zip(names, share) if x > 0.01), sep="\n")
print("\nFolding merges the adapters into wq, wk and wv. The logits of the first token stay the same:")
check("not folded", model.prefill(batch, 1)[0], model.fold(IMAGE).prefill(batch, 1)[0], "folded")
