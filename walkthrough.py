"""Equations (1) to (8) of LaVIN (https://arxiv.org/abs/2305.15023), computed on the tiny model.
Run it, or its `# %%` cells as a notebook. It stops if a value is not that of tests/naive.py within 1e-4."""
import inspect
import textwrap
from unittest.mock import patch

import numpy as np
import torch

import clip
import lavin
import llama
import train
from adapters import MMAdapter, RoutingFunction, fold, trainable
from data import Sample, collate, encode
from lavin import IMAGE, LaVIN, Neck
from official.tokenizer import Tokenizer
from tests import naive


# %% Two helpers: show the code of an equation, compare two values
def equation(n: int, title: str, *functions, first: str = "", last: str = "") -> None:
    """Of each function, print the line tagged Eq. (n). Start at the line with `first`, end at `last`."""
    print(f"\nEq. ({n}): {title}")
    for f in functions:
        lines, tag = inspect.getsource(f).splitlines(), f"# Eq. ({n}):"
        start, end = (next(k for k, line in enumerate(lines) if (x or tag) in line) for x in (first, last))
        code = textwrap.dedent("\n".join(lines[start:end + 1])).splitlines()
        print(f"in {f.__qualname__}:", *code, sep="\n    ")

def check(what: str, axes: str, here, there, source: str = "naive.py") -> None:
    """Print two values of the same thing and their largest difference; stop if it exceeds 1e-4."""
    here, there = np.asarray(here), np.asarray(there)
    difference = abs(here - there).max() if here.shape == there.shape else np.nan
    sizes = ", ".join(f"{axis}={size}" for axis, size in zip(axes.split(), here.shape))
    for name, x in ((f"{what} [{sizes}]" if axes else what, here), (source, there)):
        print(f"{name:>36} {' '.join(f'{value:9.4f}' for value in x.flat[:4])}{' ..' if x.size > 4 else ''}")
    print(f"{'largest difference':>36}    {difference:.0e}")
    assert difference < 1e-4, f"{what} differs from {source} by {difference}"

# %% The tiny model. asked: a question on an image; right, wrong: with a response; text: without the image
torch.set_grad_enabled(False), torch.set_num_threads(1)  # only Eq. (4) needs gradients
model, _ = lavin.load("tiny/adapters.safetensors", "tiny/llama", "tiny/clip")
tokenizer, n_visual, weights = Tokenizer("tiny/llama"), model.vit.n_visual, naive.params(model)
prompt = "Question: What color is the circle?\nContext: N/A\nOptions: (A) green (B) blue (C) red\nResponse:"
RED = "On the left is a big red circle, on the right a small blue square. The circle is red. The answer is C."
def example(response: str, image: str | None = "tiny/demo.png"):  # token ids of head and rest
    return encode(Sample("", prompt, response, image, problem={}), tokenizer, n_visual)
asked, right, wrong, text = example(""), example(RED), example("The answer is B."), example("", image=None)
batch, right_batch, wrong_batch = (collate([e], 64, "clip") for e in (asked, right, wrong))  # 64 x 64 pixels
picture, exchanged = batch.images[0], batch.images[0].flip(0)  # [3 = R G B, 64, 64]; red and blue exchanged
naive_asked, naive_right, naive_wrong, naive_text = (  # each: Z with t_m, w of all layers, log_p of R_s
    naive.run(weights, model, e, picture) for e in (asked, right, wrong, text))
print(f"The prompt for tiny/demo.png:\n\n{prompt}\n\nEach tensor [axis=size, ..] is computed twice: "
      "by this code,\nand by tests/naive.py, plain numpy with t_m in the sequence. We show four entries.")

# %% Eq. (1): t_m = m E_m. m is one-hot, so t_m is the row of E_m for text or the row for an image.
equation(1, "the modality token", LaVIN.modality_tokens)
check("t_m", "modality C", model.modality_tokens(), np.stack([naive_text.Z[0], naive_asked.Z[0]]))

# %% Eq. (2): Z' = Z + s router(f_a1(Z), f_a2(Z); f_w(t_m)), f_a1(Z) = phi_u1(phi_d(Z))
equation(2, "the MM-Adapter", MMAdapter.forward)
print("`mixed` is Eq. (3). Here, Z is the output of layer 0's norm. The attention reads Z' in its place.")
layer, w = model.llama.layers[0], model.routing_weights()  # w [layer, modality, (w_0, w_1)]
Z = layer.attention_norm(model.embed(batch)[0])  # [T, C]
p = naive.sub(weights, "llama.layers.0.adapter_attn.")  # the parameters below this name
check("Z'", "T C", layer.adapter_attn(Z, w[0, IMAGE]), naive.mm_adapter(Z.numpy(), naive_asked.w[0], p, s=1))
bare, vit = llama.LLaMA.from_pretrained("tiny/llama"), clip.VisionTransformer.from_pretrained("tiny/clip")
x = bare.tok_embeddings(batch.tokens[None])  # [1, T, C], without X'
before = bare(x), vit(batch.images)
untrained_w = LaVIN(bare, vit, model.cfg).routing_weights()  # LaVIN puts new adapters into bare and vit
after = bare(x, untrained_w[:, IMAGE, None, None]), vit(batch.images)
print("New adapters (phi_u = 0) change no bit of LLaMA or ViT outputs:", all(map(torch.equal, before, after)))

# %% Eq. (3): w = f_w(t_m) = softmax((t_m W_m + b_m) / tau), router(..) = w_0 f_a1(Z) + w_1 f_a2(Z)
equation(3, "the router", RoutingFunction.forward, MMAdapter.forward)
check("w", "layer modality adapter", w, np.stack([naive_text.w, naive_asked.w], axis=1))
by_hand, logit = naive.softmax(np.array([1, 0]) / 10), 10 * torch.log(w[0, 0, 0] / w[0, 0, 1])
print(f"tau = 10 flattens the softmax: if t_m W_m + b_m is (1, 0), w is only {by_hand.round(3)}. But in\n"
      f"layer 0, for text, training has made the two entries of t_m W_m + b_m differ by {logit:.1f}.")
print("w_0 in LLaMA: two constants a layer, one for text and one for images.",
      *(f"    layer {i}: text {a:.3f}, image {b:.3f}" for i, (a, b) in enumerate(w[..., 0])), sep="\n")
w_vit = []  # of each block, w_0 of both images
for block in model.vit.transformer.resblocks:
    block.adapter_attn.f_w.register_forward_hook(lambda f_w, cls, w: w_vit.append(w[:, 0, 0]))
model.vit(torch.stack([picture, exchanged]))
print("w_0 in the ViT, for demo.png and for the same image with red and blue exchanged. In block 0, they\n"
      "are equal, because there [cls] has not yet attended to any patch.",
      *(f"    block {i}: demo {a:.3f}, exchanged {b:.3f}" for i, (a, b) in enumerate(w_vit)), sep="\n")

# %% Eq. (4): theta_a* = argmin L(f_phi(Z), R; theta_a). One derivative of L, beside a finite difference.
equation(4, "training", train.train, last="optimizer.step()")
print("We check the gradient of phi_d.bias in the ViT's block 0, the block that backward() reaches last. If\n"
      "the same number e is added to all its entries, dL/de is the sum of bias.grad. naive.py computes\n"
      "(L(e) - L(-e)) / 2e. R is wrong on purpose, 'The answer is B.': for the right R, both are almost 0.")
with torch.enable_grad():
    model(wrong_batch).backward()
assert all((x.grad is not None) == ("adapter_" in n) for n, x in model.named_parameters()), "others train"
name = "vit.transformer.resblocks.0.adapter_attn.phi_d.bias"  # its gradient passes through both models
L = lambda x: -naive.run(weights | {name: weights[name] + x}, model, wrong, picture).log_p.sum()
check("dL/de", "", trainable(model)[name].grad.sum(), (L(1e-4) - L(-1e-4)) / 2e-4, "naive.py, finite diff.")
with torch.device("meta"):  # the sizes without the numbers
    big = LaVIN(llama.LLaMA(llama.PRESETS["7B"]), clip.VisionTransformer(clip.PRESETS["ViT-L/14"]), model.cfg)
count = lambda module: f"{sum(p.numel() for p in module.parameters() if p.requires_grad):,}"
a, a_vit = big.llama.layers[0].adapter_attn, big.vit.transformer.resblocks[0].adapter_attn
print(f"LaVIN-7B trains 32 x {count(a)} (LLaMA) + 24 x {count(a_vit)} (ViT) + "
      f"{count(big.adapter_proj)} (neck) + {count(big.adapter_modality_embedding)} (E_m) = {count(big)}.")

# %% Eq. (5): L = - sum_i sum_s log p(R_s^i | Z^i, R_{0:s-1}^i; theta_a), one sample at a time
equation(5, "L of two responses; W is LLaMA's output matrix", lavin.negative_log_likelihood, first="log_p =")
print(f"1: {RED}\n2: The answer is B.")
here, there = [model(right_batch), model(wrong_batch)], [-x.log_p.sum() for x in (naive_right, naive_wrong)]
check("L", "response", here, there)

# %% Eq. (6): X' = SiLU(X W_d + b_d) W_u + b_u
equation(6, "the visual neck; in the tiny ViT, X has a [cls] after each of the 6 blocks", Neck.forward)
check("X'", "n C", model.encode_images(batch)[0], naive_asked.Z[1 + len(asked.head):][:n_visual])

# %% Eq. (7): Z = [t_m, X', Y]
equation(7, "the input; Y is Y_head and Y_rest", LaVIN.embed, first="if modality", last="Z = [t_m, Y]")
check("Z without t_m", "T C", model.embed(batch)[0], naive_asked.Z[1:])
words = lambda ids: [repr(tokenizer.decode([id]) or " ") for id in ids]
for what, e in ("image", asked), ("text", text):
    head = f"{len(e.head)} (Y_head: [BOS] {' '.join(words(e.head[1:]))})"
    print(f"{what}: {1 + e.length} tokens = 1 (t_m) + {head} + {e.n_visual} (X') + {len(e.rest)} (prompt)")

# %% Eq. (8): p(R | Z) = prod_s p(R_s | Z, R_{0:s-1}; theta_l, theta_a)
equation(8, "generation; prefill(Z) gives the first logits, decode(R_s) the next", LaVIN.stream, last="R_s =")
with patch.object(lavin, "pick", wraps=lavin.pick) as pick:  # records p of each step
    answer = model.generate(batch, 40, tokenizer.eos, temperature=0)[0] + [tokenizer.eos]
p_R = [call.args[0][0, t].item() for call, t in zip(pick.call_args_list, answer)]
check("p(R_s | ..)", "s", p_R, np.exp(naive_right.log_p))
print(textwrap.fill(" ".join(f"{tokenizer.decode([t]) or '[EOS]'}:{x:.4f}" for t, x in zip(answer, p_R)), 96))
other = model.generate(batch._replace(images=exchanged[None]), 40, tokenizer.eos, temperature=0)[0]
print(f"p(R | Z) = {np.prod(p_R):.4f} = exp(-L)\nWith red and blue exchanged:\n{tokenizer.decode(other)}")

# %% The attention of LLaMA's last layer: where does the token that predicts "red" find the color? Folding.
with patch.object(llama, "dot_product_attention", wraps=llama.dot_product_attention) as attention:
    model.hidden(right_batch)
q, k = (x[0] for x in attention.call_args.args[:2])  # of the last layer, rotated: [T, H, D]
names = ["[BOS]", *words(right.head[1:]), *(f"X'_{i + 1}" for i in range(n_visual)), *words(right.rest)]
at = names.index("'big'")
share = torch.softmax((q[at] * k[:at + 1]).sum(-1) / q.shape[-1] ** 0.5, dim=0).mean(-1).tolist()
print("\nFor demo.png, the model predicts 'red' after 'On the left is a big'. In the last layer, 'big'\n"
      "attends mostly to X'_4, the visual token from the ViT's fourth block (block 3 above).\n"
      "Attention weights above 0.01, averaged over the heads:",
      *(f"{name:>10} {x:.3f} {'#' * round(60 * x)}" for name, x in zip(names, share) if x > 0.01), sep="\n")
print("\nAn adapter of LLaMA is an affine map, so it merges into wq, wk and wv. q of layer 0 is the same:")
W, b = fold(layer.attention.wq.weight, layer.adapter_attn, w[0, IMAGE])
check("q", "T C", layer.attention.wq(layer.adapter_attn(Z, w[0, IMAGE])), Z @ W.T + b, "folded")
