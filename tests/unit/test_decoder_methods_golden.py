# SPDX-License-Identifier: Apache-2.0
"""Methods inside the decoder against stored outputs of the official implementations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.unit.golden_cases import cases, tensors, visual
from visprune.core.method import Context, ModelSpec
from visprune.core.signals import (
    AttentionRows,
    DecoderSeen,
    FinalNormStates,
    HiddenStates,
    RotaryTables,
    SampleKeysValues,
    Slots,
    TextSlots,
    TextStates,
)
from visprune.machine.plan import make_plan
from visprune.methods.dart import DART, KeyNorms
from visprune.methods.dynamic_llava import DynamicLLaVA, TextPredictor
from visprune.methods.gemfilter import GemFilter
from visprune.methods.ivc_prune import IVCPrune
from visprune.methods.lightkv import LightKV, SpreadMass
from visprune.methods.pact import cluster
from visprune.methods.sparsevlm import Raters, SparseVLM
from visprune.methods.v2drop import V2Drop
from visprune.methods.vitcop import peaks, shared_out

SPEC = ModelSpec(family="llava", num_layers=32, has_cls=True, multi_axis_rope=False)
QWEN = ModelSpec(family="qwen2_vl", num_layers=28, has_cls=False, multi_axis_rope=True)


@cases("v2drop")
def test_v2drop(case: dict[str, Any]) -> None:
    t, p = tensors("v2drop", case), case["params"]
    start, end, length = p["image_start"], p["image_start"] + p["n"], p["image_start"] + p["n"] + 20
    method = V2Drop()
    stages = {s.site.resolve(28): s for s in method.schedule(QWEN)}
    assert sorted(stages) == [3, 16, 22]
    budget = stages[p["layer"]].budget
    assert budget is not None
    ctx = Context(
        num_keep=budget.resolve(p["n"], 1000),
        signals={HiddenStates(): t["previous"][:, start:end]},
    )
    index = method.select(visual(t["current"][:, start:end]), ctx).index[0]
    whole = torch.cat([torch.arange(start), index + start, torch.arange(end, length)])
    assert torch.equal(whole, t["keep"])


@cases("dynamic_llava", d_model=16, T=30)
def test_dynamic_llava_answers(case: dict[str, Any]) -> None:
    t, p = tensors("dynamic_llava", case), case["params"]
    predictor = TextPredictor(p["D"], p["d_model"])
    predictor.load_state_dict({name[2:]: x for name, x in t.items() if name.startswith("w.")})
    with torch.no_grad():
        torch.testing.assert_close(predictor(t["h"]), t["logits"], rtol=1e-4, atol=1e-5)
        method = DynamicLLaVA(keep_ratio=0.2, width=16, heads=2, hidden=16, text=True)
        learned = torch.nn.ModuleList([torch.nn.Identity(), predictor])
        stays = torch.stack([method.stores(h, learned) for h in t["h"].unbind(1)], 1)
    assert torch.equal(stays, t["store"].bool())


@cases("dynamic_llava", layers=2)
def test_dynamic_llava(case: dict[str, Any]) -> None:
    t, p = tensors("dynamic_llava", case), case["params"]
    method = DynamicLLaVA(
        keep_ratio=p["keep_rate"], width=p["d_model"], heads=p["heads"], hidden=p["ffn"]
    )
    (predictor,) = method.build_learned(replace(SPEC, decoder_width=p["D"]))
    weights = {name[2:]: value for name, value in t.items() if name.startswith("w.")}
    predictor.load_state_dict(weights)  # under the official names, none missing and none left
    with torch.no_grad():
        torch.testing.assert_close(predictor(t["x"]), t["logits"], rtol=1e-4, atol=1e-5)
        keep = method.budget.resolve(p["N"])
        assert keep == p["k"]
        ctx = Context(num_keep=keep, learned=predictor)
        assert torch.equal(method.select(visual(t["x"]), ctx).index, t["keep"])


@cases("dart")
def test_dart(case: dict[str, Any]) -> None:
    t, p = tensors("dart", case), case["params"]
    start, n, after = p["image_start"], p["n"], p["text_after"]
    image, text = slice(start, start + n), torch.arange(start + n, start + n + after)[None]
    states = t["hidden"]
    signals = {
        KeyNorms(): t["keys"].abs().sum((1, 3)),
        Slots(): torch.arange(start, start + n)[None],
        TextSlots(): text,
        FinalNormStates(): states[:, image],
        TextStates(which="after_image", normed=True): states[:, text[0]],
    }
    ratio = 1 - p["reduction_ratio"]
    common: dict[str, Any] = {"pivot_image": p["pivot_image"], "pivot_text": p["pivot_text"]}
    method = DART(keep_ratio=ratio, official=True, **common)
    (stage,) = method.schedule(SPEC)
    assert stage.site.resolve(32) == 2
    ctx = Context(num_keep=stage.budget.resolve(n), signals=signals)  # type: ignore[union-attr]
    index = method.select(visual(states[:, image]), ctx).index[0]
    assert torch.equal(index + start, t["kept"])
    assert len(index) == p["kept"]
    # Without the official arithmetic exactly the budget stays, the pivots among it.
    method = DART(num_keep=128 if n > 200 else 40, **common)
    ctx = Context(num_keep=method.num_keep or 0, signals=signals)
    index = method.select(visual(states[:, image]), ctx).index[0]
    assert len(index) == method.num_keep
    norm = t["keys"].abs().sum((1, 3))[0, image]
    assert set(norm.topk(p["pivot_image"]).indices.tolist()) <= set(index.tolist())


def rotary(positions: Tensor, head_dim: int) -> Tensor:
    """Tables of base 10000, ``[1, 2, P, d]``."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angles = positions.float()[:, None] * 10_000.0**-steps
    angles = torch.cat([angles, angles], dim=-1)
    return torch.stack([angles.cos(), angles.sin()])[None]


@cases("sparsevlm")
def test_sparsevlm(case: dict[str, Any]) -> None:
    t, p = tensors("sparsevlm", case), case["params"]
    x, start, n = t["hidden"], p["start"], p["n_visual"]
    version, head_dim = p["version"], p["head_dim"]
    method = SparseVLM(lists=tuple(p["lists"]), version=version, official=True)
    stages = method.schedule(SPEC)
    assert [s.site.resolve(32) - 1 for s in stages] == p["pruning_layers"]
    ids = torch.arange(x.shape[1])
    seen = decoder_seen(x, start, n)
    raters = Raters().read(seen)
    assert torch.equal(raters[0].nonzero()[:, 0], t["raters"])
    for number, stage in enumerate(stages):
        image, length = slice(start, start + n), x.shape[1]
        heads = [(x[0] @ t[w][number]).view(length, p["H"], head_dim).transpose(0, 1)
                 for w in ("wq", "wk")]  # fmt: skip
        logits = heads[0] @ heads[1].transpose(1, 2) / head_dim**0.5
        hidden = torch.full((length, length), -torch.inf).triu(1)
        rows = (logits + hidden).softmax(-1)[None, :, start + n :, image]
        text = torch.arange(start + n, length)[None]
        signals = {
            Raters(): raters, AttentionRows(): rows, Slots(): torch.arange(start, start + n)[None],
            TextSlots(): text, RotaryTables(): rotary(ids, head_dim),
        }  # fmt: skip
        assert stage.budget is not None
        keep = stage.budget.resolve(n, p["n_visual"])
        ctx = Context(num_keep=keep, original=p["n_visual"], signals=signals)
        made = method.select(visual(x[:, image]), ctx)
        clusters = p["clusters"][number] if version == 1 else 0
        plain = made.index[0, : made.num_slots - clusters]
        assert torch.equal(plain, t[f"mask_{number}"].nonzero()[:, 0])
        after = made.reduce(x[:, image])
        if version == 1:
            torch.testing.assert_close(after[:, -clusters:], t[f"merge_out_{number}"],
                                       rtol=1e-5, atol=1e-5)  # fmt: skip
        x = torch.cat([x[:, :start], after, x[:, start + n :]], dim=1)
        kept = torch.cat([ids[:start], ids[image][made.index[0]], ids[start + n :]])
        ids, n = torch.arange(len(kept)) if version == 1 else kept, made.num_slots
        assert n == p["visual_after"][number]
    torch.testing.assert_close(x[0], t["hidden_out"], rtol=1e-5, atol=1e-5)
    assert torch.equal(ids, t["pos_out"])
    assert SPARSE_POSITIONS[version] == make_plan(method, SPEC).positions


SPARSE_POSITIONS = {1: "compact", 2: "original"}


def decoder_seen(x: Tensor, start: int, n: int) -> DecoderSeen:
    """One sample whose picture has n tokens from ``start``."""
    everything = torch.ones(x.shape[:2], dtype=torch.bool)
    picture = torch.zeros_like(everything)
    picture[:, start : start + n] = True
    last = torch.tensor([x.shape[1] - 1])
    return DecoderSeen(x, last, picture, everything, everything)


@cases("ivc_prune")
def test_ivc_prune(case: dict[str, Any]) -> None:
    t, p = tensors("ivc_prune", case), case["params"]
    start, n, length = p["image_start"], p["n"], t["v"].shape[2]
    signals = {
        SampleKeysValues(): torch.stack([torch.zeros_like(t["v"]), t["v"]], 1),
        RotaryTables(): torch.stack([t["cos"], t["sin"]], 1),
        Slots(): torch.arange(start, start + n)[None],
        TextSlots(): torch.arange(start + n, length)[None],
        TextSlots(which="all"): torch.arange(length)[None],
    }
    made = IVCPrune().select(visual(torch.zeros(1, n, 4)), Context(signals=signals))
    whole = [torch.arange(start), made.index[0] + start, torch.arange(start + n, length)]
    assert torch.equal(torch.cat(whole), t["keep"])
    assert made.counts == [p["kept_image"]]


@cases("lightkv")
def test_lightkv(case: dict[str, Any]) -> None:
    t, p = tensors("lightkv", case), case["params"]
    logits, x = t["logits"], t["hidden"]
    pictures = torch.zeros(x.shape[1], dtype=torch.bool)
    for first, last in p["img"]:
        pictures[first : last + 1] = True
    # Queries and keys whose products are the stored logits: each key is a unit vector.
    everything = torch.ones(x.shape[:2], dtype=torch.bool)
    seen = DecoderSeen(x, torch.tensor([len(pictures) - 1]), pictures[None], everything, everything)
    seen.query, seen.key = logits, torch.eye(x.shape[1]).expand_as(logits)
    mass = SpreadMass().read(seen)
    method = LightKV(ratios=(p["ratio"],), windows=(p["W"],), layers=(2,), official=True)
    rows, new, at = [], [], 0
    small = min(last + 1 - first for first, last in p["img"]) < 8 * p["W"] ** 2
    for number, (first, last) in enumerate(p["img"]):
        span = slice(first, last + 1)
        ctx = Context(signals={SpreadMass(): mass[:, span]})
        made = method.select(visual(x[:, span]), ctx)
        assert not (small and made.merges)
        if not small:  # what is skipped has no list of kept tokens
            kept = t["kept"][number]
            assert torch.equal(made.index[0], kept[kept >= 0][: made.num_slots])
        rows += [x[:, at:first], made.reduce(x[:, span])]
        new.append([sum(r.shape[1] for r in rows[:-1]), sum(r.shape[1] for r in rows) - 1])
        at = last + 1
    torch.testing.assert_close(torch.cat([*rows, x[:, at:]], 1), t["tokens"], rtol=1e-4, atol=1e-5)
    assert new == t["new_img"]


@cases("pact")
def test_pact(case: dict[str, Any]) -> None:
    t, p = tensors("pact", case), case["params"]
    keys, hidden = t["keys"], t["hidden"]
    if p["M"]:
        keys = torch.cat([keys, t["pruned_keys"]])
        hidden = torch.cat([hidden, t["pruned_hidden"]])
    stay = torch.arange(len(keys)) < p["N"]
    made = cluster(keys[None], stay[None], p["cutoff"], p["coef_pruned"])
    centers = t["mask"].nonzero()[:, 0]
    assert torch.equal(made.index[0], centers)
    assert torch.equal(made.size[0], t["weights"][centers])
    torch.testing.assert_close(made.reduce(hidden[None])[0], t["merged"], rtol=1e-5, atol=1e-5)


@cases("vitcop", kind="vic")
def test_vitcop_clusters(case: dict[str, Any]) -> None:
    t, p = tensors("vitcop", case), case["params"]
    assert torch.equal(peaks(t["x"], t["pos"], p["percentage"], p["dc"], p["k"]), t["labels"])


@cases("vitcop", kind="select")
def test_vitcop_shares(case: dict[str, Any]) -> None:
    t, p = tensors("vitcop", case), case["params"]
    start, n = p["visual_start"], p["n"]
    image = slice(start, start + n)
    norm = t["keys"].mean(1)[0, image].norm(dim=-1)
    made = shared_out(norm, t["labels"], p["R"], official=True)
    index = made.index[0] + start
    assert sorted(t["kept"] + t["merged_positions"]) == index.tolist()
    matrix = made.matrix()[0]
    alone = [int(i) for i, row in zip(index, matrix, strict=True) if (row != 0).sum() == 1
             and float(row.sum()) == 1.0]  # fmt: skip
    assert sorted(t["kept"]) == alone
    after = made.reduce(t["hidden"][:, image])
    whole = torch.cat([t["hidden"][:, :start], after, t["hidden"][:, start + n :]], 1)
    torch.testing.assert_close(whole, t["tokens"], rtol=1e-5, atol=1e-5)
    ids = torch.cat([torch.arange(start), index, torch.arange(start + n, p["L"])])
    assert torch.equal(ids, t["position_ids"].flatten())
    # By default a merged token is a mean, as large as any other.
    rows = shared_out(norm, t["labels"], p["R"]).matrix()[0].sum(1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


@cases("gemfilter")
def test_gemfilter(case: dict[str, Any]) -> None:
    t, length = tensors("gemfilter", case), case["params"]["L"]
    method = GemFilter(num_keep=case["params"]["topk"])
    signal = method.signal(SPEC)
    assert signal.at == 13  # of 32
    query = torch.zeros(1, t["q_last"].shape[1], length, t["q_last"].shape[2])
    query[:, :, -1] = t["q_last"]
    there = torch.ones(1, length, dtype=torch.bool)
    seen = DecoderSeen(
        hidden=query[:, 0], last=torch.tensor([length - 1]), visual=there, valid=there,
        prompt=there, query=query, key=t["k"],
    )  # fmt: skip
    ctx = Context(num_keep=method.budget.resolve(length), signals={signal: signal.read(seen)})
    assert torch.equal(method.select(visual(torch.zeros(1, length, 4)), ctx).index[0], t["kept"])
