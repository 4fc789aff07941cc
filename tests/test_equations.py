"""Each equation of the paper equals a naive recomputation, and a tag marks where it is implemented."""
import re

import naive
import numpy as np
import pytest
import torch
from conftest import (
    CLIP,
    GROUPED,
    LLAMA,
    N_CLS,
    ROOT,
    ROWS,
    all_logits,
    close,
    ids_of,
    make_batch,
    make_lavin,
)

from adapters import AdapterConfig, MMAdapter, RepAdapter, trainable


def adapter(kind, d=12, **cfg):
    torch.manual_seed(0)
    a = kind(d, AdapterConfig(dropout=0.5, **cfg)).eval()
    with torch.no_grad():
        for p in a.parameters():
            p.copy_(torch.randn_like(p))
    return a


def test_rep_adapter():
    a, z = adapter(RepAdapter, scale=0.7), torch.randn(2, 5, 12)
    p = naive.params(a)
    z64 = z.double().numpy()
    f = naive.rep_adapter(z64, p["phi_d.weight"], p["phi_d.bias"], p["phi_u.weight"], p["phi_u.bias"])
    assert close(a(z).detach(), z64 + 0.7 * f)


def test_eq2_eq3_mm_adapter_and_router():
    a, z, t = adapter(MMAdapter, scale=0.7, tau=5.0), torch.randn(2, 5, 12), torch.randn(2, 12)
    p = naive.params(a)
    w = a.f_w(t)
    assert close(w.detach(), naive.route(t.double().numpy(), p, 5.0))
    for row in range(2):
        expected = naive.mm_adapter(z[row].double().numpy(), w[row].detach().double().numpy(), p, 0.7)
        assert close(a(z, w[:, None])[row].detach(), expected)


def test_the_routers_softmax_runs_in_fp32():
    a, t = adapter(MMAdapter, tau=5.0), torch.randn(3, 12, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        w, logits = a.f_w(t), torch.nn.functional.linear(t, a.f_w.weight, a.f_w.bias)
    assert logits.dtype == torch.bfloat16 and w.dtype == torch.float32
    assert torch.equal(w, torch.softmax(logits.float() / 5, -1))


def test_eq1_modality_token_is_a_row_of_the_modality_embedding(lavin):
    with torch.no_grad():
        w = lavin.routing_weights()  # [L, 2, 2]
        lavin.adapter_modality_embedding.weight[1] += 1
        moved = lavin.routing_weights()
    assert not torch.equal(w[:, 0], w[:, 1])
    assert torch.equal(w[:, 0], moved[:, 0]) and not torch.equal(w[:, 1], moved[:, 1])


def test_eq4_only_adapters_neck_and_modality_embedding_train(lavin):
    names = {n for n, p in lavin.named_parameters() if p.requires_grad}
    kinds = {re.sub(r"\.\d+\.", ".N.", n).rsplit(".", 2)[0] for n in names}
    assert kinds == {"llama.layers.N.adapter_attn", "vit.transformer.resblocks.N.adapter_attn",
                     "adapter_proj", "adapter_modality_embedding"}
    lavin(make_batch(ROWS)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable(lavin).values())
    assert all(p.grad is None for n, p in lavin.named_parameters() if n not in names)


def test_eq6_neck(lavin):
    x = torch.randn(3, N_CLS, CLIP.width)
    p = naive.sub(naive.params(lavin), "adapter_proj.")
    assert close(lavin.adapter_proj(x).detach(), naive.neck(x.double().numpy(), p))


def naive_logits(model, batch):
    """for each row: logits [T, V] with the modality token in the sequence, and routing weights per layer"""
    p, images, out = naive.params(model), iter(batch.images.double().numpy()), []
    for row in ROWS:
        z = naive.sequence(ids_of(row), next(images) if row[2] else None, 2, p, model.cfg, CLIP)
        h, routing = naive.llama(z, naive.sub(p, "llama."), model.llama.cfg, model.cfg.adapter, token=True)
        out.append((h[1:] @ p["llama.output.weight"].T, np.stack(routing)))
    return out


@pytest.mark.parametrize("routing,base", [("cls", LLAMA), ("token", LLAMA), ("cls", GROUPED)])
def test_eq7_eq8_logits_with_the_modality_token_in_the_sequence(routing, base):
    """Running the modality token separately and packing samples end to end leave the logits unchanged."""
    model, batch = make_lavin(base=base, vit_routing=routing, tau=3.0, scale=0.8), make_batch(ROWS)
    with torch.no_grad():
        w = model.routing_weights()
        logits = all_logits(model, batch)
    for row, (expected, routed) in enumerate(naive_logits(model, batch)):
        assert close(logits[row], expected)
        assert close(w[:, batch.modality[row]], routed)


def test_eq5_loss_is_the_sum_over_response_tokens(lavin):
    batch = make_batch(ROWS)
    expected = 0.0
    for row, (logits, _) in enumerate(naive_logits(lavin, batch)):
        p = naive.softmax(logits)
        ids, n = ids_of(ROWS[row]), ROWS[row][1]
        for s in range(len(ids) - n, len(ids)):
            expected -= np.log(p[s - 1, ids[s]])
    assert close(lavin(batch).detach(), expected)


def test_every_equation_has_a_tag_and_a_test():
    files = {f.name: f.read_text() for f in ROOT.glob("*.py")}
    tests = (ROOT / "tests/test_equations.py").read_text()
    for n in range(1, 9):
        homes = [f for f, text in files.items() for _ in re.findall(rf"# Eq\. \({n}\)[^\n]*[:=]", text)]
        assert homes, f"no line is tagged # Eq. ({n})"
        assert re.search(rf"def test_\w*eq{n}_", tests), f"no test of Eq. ({n})"
    tagged = {int(n) for text in files.values() for n in re.findall(r"# Eq\. \((\d+)\)", text)}
    assert tagged <= set(range(1, 9)), f"tags for equations that the paper does not have: {tagged}"
