# SPDX-License-Identifier: Apache-2.0
"""Methods against stored outputs of the official implementations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from visprune import ops
from visprune.backbones.hf.cache import CACHE_ARGUMENT
from visprune.backbones.hf.probe import Attended, Wanted, capture, watch
from visprune.core.budget import Budget
from visprune.core.method import Context, ModelSpec
from visprune.core.signals import ClsAttention, EncoderKeys, LastQueryAttention, VisualShare
from visprune.core.tokens import VisualTokens
from visprune.methods.divprune import DivPrune
from visprune.methods.fastv import FastV
from visprune.methods.pyramiddrop import PyramidDrop
from visprune.methods.todre import ToDRE
from visprune.methods.visionzip import VisionZip, zip_tokens

GOLDEN = Path(__file__).parents[1] / "golden"
SPEC = ModelSpec(family="llava", num_layers=32, has_cls=True, multi_axis_rope=False)


def cases(family: str) -> Any:
    found = json.loads((GOLDEN / family / "cases.json").read_text())["cases"]
    return pytest.mark.parametrize("case", [pytest.param(c, id=c["id"]) for c in found])


def tensors(family: str, case: dict[str, Any]) -> dict[str, Tensor]:
    stored = load_file(GOLDEN / family / case["file"])
    wanted = {**case["inputs"], **case["expected"]}
    return {name: stored[key] for name, key in wanted.items() if key in stored}


def visual(features: Tensor) -> VisualTokens:
    """Features ``[B, N, D]`` as the tokens of pictures that are one row of patches."""
    batch, count, _ = features.shape
    pos = torch.zeros(count, 3, dtype=torch.int64)
    pos[:, 2] = torch.arange(count)
    return VisualTokens(features, torch.ones(batch, count), pos.expand(batch, -1, -1))


def scored(score: Tensor) -> VisualTokens:
    return visual(score.new_zeros(*score.shape[:1], score.shape[-1], 4))


# FastV ---------------------------------------------------------------------------------------


@cases("fastv")
def test_fastv(case: dict[str, Any]) -> None:
    t, p = tensors("fastv", case), case["params"]
    start, count, length = p["image_start"], p["image_tokens"], p["L"]
    keep = Budget(keep_ratio=1 - p["R"]).resolve(count)
    assert keep == p["keep_image"]  # Python's rounding: halves to even
    last = torch.tensor([length - 1])
    rows = ops.attention_rows(
        t["q"][:, :, -1:], t["k"], scale=p["head_dim"] ** -0.5, query_idx=last, causal=True
    )[:, :, 0]  # [B, H, L]
    torch.testing.assert_close(rows[0], t["last_row"], rtol=1e-5, atol=1e-8)
    (stage,) = FastV(keep_ratio=1 - p["R"], layer=p["K"]).schedule(SPEC)
    assert stage.site.resolve(32) == p["K"]
    seen = rows[:, :, start : start + count]
    ctx = Context(num_keep=keep, signals={LastQueryAttention(): seen})
    index = FastV(num_keep=keep).select(scored(seen[:, 0]), ctx).index[0]
    before, after = torch.arange(start), torch.arange(start + count, length)
    # The official code prunes every sample as the first.
    assert torch.equal(torch.cat([before, index + start, after]), t["keep"])
    # Kept positions are the position ids: FastV leaves gaps.
    assert torch.equal(t["position_ids"].flatten(), t["keep"])
    assert FastV.default_positions == "original"


# PyramidDrop ---------------------------------------------------------------------------------


def layer_of(case: dict[str, Any], t: dict[str, Tensor]) -> LlamaModel:
    """One Llama layer with the stored weights."""
    p = case["params"]
    config = LlamaConfig(
        vocab_size=8, hidden_size=p["D"], intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=p["heads"], num_key_value_heads=p["heads"], rms_norm_eps=p["rms_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": p["rope_base"]},
    )  # fmt: skip
    model = LlamaModel(config).eval()
    layer = model.layers[0]
    with torch.no_grad():
        layer.input_layernorm.weight.copy_(t["w_ln"])
        layer.self_attn.q_proj.weight.copy_(t["w_q"])
        layer.self_attn.k_proj.weight.copy_(t["w_k"])
    return model


@cases("pdrop")
@torch.no_grad()
def test_pyramiddrop(case: dict[str, Any]) -> None:
    t, p = tensors("pdrop", case), case["params"]
    model, features = layer_of(case, t), t["features"]
    ids = t.get("position_ids")
    ids = torch.arange(p["L"]).expand(p["B"], -1) if ids is None else ids
    seen: list[Attended] = []
    layer = model.layers[0]
    watched = watch(layer.self_attn, lambda: Wanted(seen.append, stop=True))
    capture(
        layer.self_attn,
        hidden_states=layer.input_layernorm(features), attention_mask=None,
        position_embeddings=model.rotary_emb(features, position_ids=ids), **{CACHE_ARGUMENT: None},
    )  # fmt: skip
    watched.remove()
    query, key, scale = seen[0].query, seen[0].key, seen[0].scale
    torch.testing.assert_close(query, t["q"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(key, t["k"], rtol=1e-4, atol=1e-5)
    if p["mode"] == "training":
        return  # the official code averages over answers then; ours asks the last token always
    for row, start in enumerate(p["image_start"]):
        kept = torch.arange(p["lengths"][row])
        if start >= 0:
            kept = kept_of_row(case, t, row, query, key, scale)
        assert torch.equal(kept, t[f"kept_row{row}"].long())


def kept_of_row(case: dict[str, Any], t: dict[str, Tensor], row: int, query: Tensor, key: Tensor,
                scale: float) -> Tensor:  # fmt: skip
    p = case["params"]
    start, count = p["image_start"][row], p["image_tokens"][row]
    last = torch.tensor([p["prompt_len"][row] + count - 1])
    valid = t["attention_mask"][row : row + 1].bool()[:, None, None]
    own = slice(row, row + 1)
    rows = ops.attention_rows(
        query[own, :, last], key[own], scale=scale, mask=valid, query_idx=last, causal=True
    )[:, :, 0, start : start + count]  # [1, H, count]
    if row == max(n for n, at in enumerate(p["image_start"]) if at >= 0):
        torch.testing.assert_close(rows.mean(1)[0], t["scores"], rtol=1e-4, atol=1e-7)
    ratio = p["image_token_ratio_list"][p["stage"] + 1]
    keep = Budget(keep_ratio=ratio, rounding="floor").resolve(p["image_tokens_initial"][row])
    assert keep == p["keep"][row]
    ctx = Context(num_keep=keep, signals={LastQueryAttention("own"): rows})
    index = PyramidDrop(num_keep=keep).select(scored(rows[:, 0]), ctx).index[0]
    after = torch.arange(start + count, p["lengths"][row])
    return torch.cat([torch.arange(start), index + start, after])


def test_pyramiddrop_publishes_halves() -> None:
    stages = PyramidDrop(keep_ratio=0.125).schedule(SPEC)
    assert [stage.site.resolve(32) for stage in stages] == [8, 16, 24]
    assert [stage.budget.resolve(576) for stage in stages] == [288, 144, 72]
    assert [stage.budget.resolve(49) for stage in stages] == [24, 12, 6]
    stages = PyramidDrop(num_keep=64).schedule(SPEC)
    assert [stage.budget.resolve(576) for stage in stages] == [256, 128, 64]
    assert PyramidDrop.default_positions == "compact"


# VisionZip -----------------------------------------------------------------------------------


@cases("visionzip")
def test_visionzip(case: dict[str, Any]) -> None:
    t, p = tensors("visionzip", case), case["params"]
    # The class token is column 0 there; here it is no visual token.
    score = t["cls_attn"][:, :, 1:].sum(1)
    keys = t["keys"].mean(1)
    torch.testing.assert_close(keys, t["metric"])
    made = zip_tokens(score, keys[:, 1:], p["dominant"], p["contextual"])
    top = made.index[:, : p["dominant"]]
    assert torch.equal(top, t["topk"][:, 1:].sort(1).values - 1)
    assert torch.equal(made.index[:, p["dominant"] :], t["target_pos"].long() - 1)
    merged = t["merge_pos"].long() - 1
    want = t["merge_target"].long() + p["dominant"]
    assert torch.equal(made.dest().gather(1, merged), want)
    tokens = made.reduce(t["hidden"][:, 1:])
    torch.testing.assert_close(tokens, t["tokens"][:, 1:], rtol=1e-5, atol=1e-5)
    rows = made.matrix().sum(2)
    assert torch.allclose(rows[:, : p["dominant"]], torch.ones(()))
    # A target, and the mean of what came to it: two where anything came.
    assert set(rows[:, p["dominant"] :].round(decimals=4).flatten().tolist()) <= {1.0, 2.0}


@pytest.mark.parametrize(("budget", "contextual"), [(64, 10), (128, 20), (192, 30)])
def test_visionzip_splits_as_published(budget: int, contextual: int) -> None:
    torch.manual_seed(0)
    attention, keys = torch.rand(1, 2, 576), torch.randn(1, 576, 8)
    signals = {ClsAttention("feature"): attention, EncoderKeys("feature"): keys}
    ctx = Context(num_keep=budget, signals=signals)
    made = VisionZip(num_keep=budget).select(visual(torch.randn(1, 576, 4)), ctx)
    ours = zip_tokens(attention.sum(1), keys, budget - contextual, contextual)
    assert torch.equal(made.index, ours.index)
    assert made.num_slots == budget


# ToDRE, DivPrune -----------------------------------------------------------------------------


@cases("todre")
@pytest.mark.parametrize(("objective", "key"), [("k_center", "maxmin"), ("max_sum", "maxsum")])
def test_todre(case: dict[str, Any], objective: Any, key: str) -> None:
    t, p = tensors("todre", case), case["params"]
    tokens = visual(t["X"][None])
    attention = torch.zeros(1, 2, len(t["X"]))
    attention[0, :, p["pivot"]] = 1.0
    method = ToDRE(num_keep=p["k"], objective=objective)
    made = method.select(
        tokens, Context(num_keep=p["k"], signals={ClsAttention("last"): attention})
    )
    assert torch.equal(made.index[0], t[key].sort().values)  # kept tokens are in raster order


def test_todre_takes_its_pivot_from_the_thumbnail() -> None:
    torch.manual_seed(0)
    tokens = visual(torch.randn(1, 8, 4))
    pos = tokens.pos.clone()
    pos[:, 4:, 0] = 1  # the second half are crops
    tokens = VisualTokens(tokens.features, tokens.size, pos, "image")
    attention = torch.tensor([0.1, 0.0, 0.3, 0.0, 0.9, 0.0, 0.0, 0.0]).expand(1, 2, -1)
    ctx = Context(num_keep=1, signals={ClsAttention("last"): attention})
    assert ToDRE(num_keep=1).select(tokens, ctx).index.tolist() == [[2]]
    video = VisualTokens(tokens.features, tokens.size, pos, "video")  # there it is a frame
    assert ToDRE(num_keep=1).select(video, ctx).index.tolist() == [[4]]


def test_todre_without_a_class_token_starts_far_from_the_mean() -> None:
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [-1.0, 0.2], [1.0, -0.1]]])
    made = ToDRE(num_keep=1).select(visual(features), Context(num_keep=1))
    assert made.index.tolist() == [[2]]


def test_todre_stages() -> None:
    first, second = ToDRE(num_keep=64).schedule(SPEC)
    assert (str(first.site), first.budget.num_keep) == ("projector", 64)
    assert (second.site.resolve(32), second.budget) == (28, None)
    assert len(ToDRE(num_keep=64, stage2=False).schedule(SPEC)) == 1
    (only,) = ToDRE(stage1=False).schedule(SPEC)
    assert only.budget is None  # all or none
    shares = torch.tensor([0.05, 0.10, 0.2])
    ctx = Context(site=only.site, signals={VisualShare(): shares})
    made = ToDRE(num_keep=4).select(visual(torch.randn(3, 4, 2)), ctx)
    assert made.counts == [0, 4, 4]  # below, not at
    assert torch.equal(made.evidence["share"], shares)


@cases("divprune")
def test_divprune(case: dict[str, Any]) -> None:
    t, k = tensors("divprune", case), case["params"]["k"]
    made = DivPrune(num_keep=k).select(visual(t["X"][None]), Context(num_keep=k))
    if case.get("exact_match_expected"):
        assert torch.equal(made.index[0], t["sorted"])
    else:
        assert len(set(made.index[0].tolist())) == k
    assert DivPrune.default_positions == "compact"


def test_divprune_rounds_as_the_official_code() -> None:
    table = json.loads((GOLDEN / "divprune" / "cases.json").read_text())["k_from_ratio"]
    rows = table if isinstance(table, list) else table["rows"]
    assert rows
    for row in rows:
        budget = DivPrune(keep_ratio=row["ratio"]).budget
        assert budget.resolve(row["n"]) == max(1, row["k"])
