# SPDX-License-Identifier: Apache-2.0
"""Methods at the projector against stored outputs of the official implementations."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.golden_cases import cases, tensors, visual
from visprune.core.method import Context
from visprune.core.selection import Selection
from visprune.core.signals import (
    ClsAttention,
    EncoderFeatures,
    EncoderQueriesKeys,
    EncoderSeen,
    Frames,
    ReceivedAttention,
    WholeClsAttention,
)
from visprune.core.tokens import VisualTokens
from visprune.methods import cdpruner, idpruner, prunesid, vidcom2, vispruner
from visprune.methods.evs import EVS
from visprune.methods.fastervlm import FasterVLM
from visprune.methods.gprune import GPrune
from visprune.methods.hiprune import HiPrune
from visprune.methods.holov import HoloV
from visprune.methods.prumerge import PruMerge, PruMergePlus
from visprune.methods.scope import SCOPE
from visprune.methods.trim import trim_tokens
from visprune.methods.vidcom2 import VidCom2
from visprune.methods.vispruner import VisPruner
from visprune.methods.vscan import VScan

SEEN = ClsAttention("feature")


def shown(num_keep: int, signals: dict[Any, Tensor]) -> Context:
    return Context(num_keep=num_keep, signals=signals)


def of_mask(mask: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in mask.reshape(-1, mask.shape[-1])]


# CDPruner ------------------------------------------------------------------------------------


@cases("cdpruner")
def test_cdpruner(case: dict[str, Any]) -> None:
    t, p = tensors("cdpruner", case), case["params"]
    unit, text = (
        torch.nn.functional.normalize(t[k], dim=-1) for k in ("image_embeds", "text_embeds")
    )
    # CLIP's patches turn away from their text: the official code takes minus the mean cosine.
    scaled = cdpruner.relevance(-(unit @ text.T).mean(-1), joint=True)
    torch.testing.assert_close(scaled, t["relevance"], rtol=0, atol=1e-6)
    order = cdpruner.pick(t["image_features"], scaled, p["k"])
    if case["exact_match_expected"]:
        assert torch.equal(order, t["order"].long())
    else:  # more than the rank of the kernel
        assert [len(set(row)) for row in order.tolist()] == [p["k"]] * p["B"]


# FasterVLM, VisPruner ------------------------------------------------------------------------


@cases("fastervlm")
def test_fastervlm(case: dict[str, Any]) -> None:
    t, p = tensors("fastervlm", case), case["params"]
    made = FasterVLM(num_keep=p["T"]).select(visual(t["attn"].mT), shown(p["T"], {SEEN: t["attn"]}))
    assert torch.equal(made.index, t["kept"].long())


@cases("vispruner")
def test_vispruner(case: dict[str, Any]) -> None:
    p = case["params"]
    method = VisPruner(num_keep=p["T"], important=p["important_ratio"])
    if "raises" in p:  # where the official code fails, ours keeps what it was told
        torch.manual_seed(0)
        t = {"features": torch.randn(2, p["N"], 8), "attn": torch.rand(2, 2, p["N"])}
    else:
        t = tensors("vispruner", case)
    ctx = shown(p["T"], {SEEN: t["attn"], EncoderFeatures("feature"): t["features"]})
    made = method.select(visual(t["features"]), ctx)
    assert [len(set(row)) for row in made.index.tolist()] == [p["T"]] * len(made.index)
    if "raises" not in p:
        assert made.index.tolist() == of_mask(t["mask"])


@pytest.mark.parametrize(("count", "keep"), [(200, 9), (91, 30), (4, 1)])
def test_vispruner_thins_out_as_every_cosine_anew(count: int, keep: int) -> None:
    torch.manual_seed(count)
    x = torch.randn(2, count, 6, dtype=torch.float64)
    listed = torch.rand(2, count).argsort(dim=1)
    got = vispruner.thin_out(x, listed, keep)
    unit = torch.nn.functional.normalize(x, dim=-1)
    for b, row in enumerate(listed.tolist()):
        while len(row) > keep:
            even, odd = row[::2], row[1::2]
            near = (unit[b, even] @ unit[b, odd].T).amax(1).tolist()
            order = sorted(range(len(even)), key=lambda n: -near[n])
            row = [even[n] for n in order[min(8, len(row) - keep, len(even)) :]] + odd
        assert got[b].tolist() == row


# PruMerge ------------------------------------------------------------------------------------


@cases("prumerge")
def test_prumerge(case: dict[str, Any]) -> None:
    t, p = tensors("prumerge", case), case["params"]
    seen = EncoderSeen(prefix=1, has_cls=True, query=t["q"][:, None], key=t["k"][:, None],
                       scale=p["C"] ** -0.5)  # fmt: skip
    signals = {s: s.read(seen) for s in (WholeClsAttention("last"), EncoderQueriesKeys("last"))}
    kind = PruMergePlus if p["plus"] else PruMerge
    keep = 0 if p["adaptive"] else p["k"] + 1
    method = kind(num_keep=keep or None, official=True)
    made = method.select(visual(t["features"]), shown(keep, signals))
    assert torch.equal(made.index[:, :-1], t["idx"].long())
    torch.testing.assert_close(made.reduce(t["features"]), t["tokens"], rtol=1e-4, atol=1e-4)
    # By default the same number, another order, and no patch twice.
    if p["B"] == 1:
        ours = kind(num_keep=keep or None).select(visual(t["features"]), shown(keep, signals))
        kept = ours.index[0, :-1].tolist()
        assert kept == sorted(set(kept))
        assert len(kept) == p["k"]
        if p["adaptive"]:
            assert kept == sorted(t["idx"][0].tolist())
            where = t["idx"][0].argsort()
            want = torch.cat([t["tokens"][:, where], t["tokens"][:, -1:]], dim=1)
            got = ours.reduce(t["features"])
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# TRIM ----------------------------------------------------------------------------------------


@cases("trim")
def test_trim(case: dict[str, Any]) -> None:
    t, p = tensors("trim", case), case["params"]
    width = t["features"].shape[-1]
    embeds = torch.layer_norm(t["features"], (width,), t["ln_w"], t["ln_b"], 1e-5) @ t["proj"].T
    product = -(embeds @ t["text"][..., None])[..., 0]
    keep = 0 if p["ratio"] == -1 else p["actual"]
    made = trim_tokens(product, keep, joint=True)
    assert torch.equal(made.index[:, :-1], t["kept"].long())
    torch.testing.assert_close(made.reduce(t["features"]), t["tokens"].float(), rtol=0, atol=2e-3)


# HoloV ---------------------------------------------------------------------------------------


@cases("holov")
def test_holov(case: dict[str, Any]) -> None:
    t, p = tensors("holov", case), case["params"]
    ctx = shown(p["keep"], {SEEN: t["attn"][:, None]})
    method = HoloV(num_keep=p["keep"], crops=p["num_patches"], official=True)
    made = method.select(visual(t["tokens"]), ctx)
    assert torch.equal(made.index.where(made.matrix().sum(2) > 0, -1), t["positions"].long())
    assert torch.equal(made.reduce(t["tokens"]), t["out"])
    ours = HoloV(num_keep=p["keep"], crops=p["num_patches"]).select(visual(t["tokens"]), ctx)
    for row, theirs in zip(ours.index.tolist(), t["positions"].tolist(), strict=True):
        assert len(set(row)) == p["keep"]
        assert set(theirs) - {-1} <= set(row)  # what zeros stood for is given to other crops
        assert row == sorted(row)


# HiPrune, G-Prune ----------------------------------------------------------------------------


@cases("hiprune")
def test_hiprune(case: dict[str, Any]) -> None:
    t, p = tensors("hiprune", case), case["params"]
    method = HiPrune(num_keep=p["T"], alpha=p["alpha"], official=True)
    shallow, deep = ReceivedAttention(method.layer), ReceivedAttention("feature")
    signals = {shallow: t["attn_object"][:, None], deep: t["attn_deep"][:, None]}
    made = method.select(visual(torch.randn(p["B"], 576, 2), (24, 24)), shown(p["T"], signals))
    assert made.index.tolist() == of_mask(t["mask"])


def test_hiprune_has_no_neighbour_beyond_the_edge() -> None:
    shallow = torch.zeros(1, 1, 12)
    shallow[..., 3] = 1.0  # the last of the first row of four
    signals = {
        ReceivedAttention(1 / 3): shallow,
        ReceivedAttention("feature"): torch.zeros(1, 1, 12),
    }
    ctx, tokens = shown(5, signals), visual(torch.randn(1, 12, 2), (3, 4))
    made = HiPrune(num_keep=5, alpha=1.0).select(tokens, ctx)
    assert made.index.tolist() == [[0, 1, 2, 3, 7]]  # 2, 3, 7, and the lowest of the others
    made = HiPrune(num_keep=5, alpha=1.0, official=True).select(tokens, ctx)
    assert made.index.tolist() == [[0, 2, 3, 4, 7]]  # 0 above the picture, 4 in the next row


@cases("gprune")
def test_gprune(case: dict[str, Any]) -> None:
    t, p = tensors("gprune", case), case["params"]
    method = GPrune(keep_ratio=p["keep_ratio"])
    tokens, keep = visual(t["features"][None]), method.budget.resolve(p["N"])
    score = method.importance(t["features"][None], torch.zeros(1, p["N"], dtype=torch.long))
    torch.testing.assert_close(score[0], t["score"], rtol=1e-3, atol=0)
    made = method.select(tokens, shown(keep, {}))
    if case["exact_match_expected"]:
        assert torch.equal(made.index[0], t["kept"].long())


# SCOPE, PruneSID, IDPruner -------------------------------------------------------------------


@cases("scope")
def test_scope(case: dict[str, Any]) -> None:
    t, p = tensors("scope", case), case["params"]
    method = SCOPE(num_keep=p["K"], alpha=p["alpha"])
    ctx = shown(p["K"], {SEEN: t["saliency"][:, None]})
    made = method.select(visual(t["features"]), ctx)
    assert torch.equal(made.index, t["order"].long().sort(1).values)


@cases("prunesid")
def test_prunesid(case: dict[str, Any]) -> None:
    t, p = tensors("prunesid", case), case["params"]
    score, features = t["attn"][..., 1:].sum(1), t["hidden"][:, 1:]
    made = prunesid.pick(features, score, t["groups"].long(), p["G"], p["K"] - 1)
    # The official list begins with the class token.
    assert torch.equal(made + 1, t["indices"][:, 1:].long())


def test_prunesid_has_its_own_components() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 30, 4) @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    x = x @ torch.linalg.qr(torch.randn(12, 4)).Q.T + 0.01 * torch.randn(2, 30, 12)
    torch.manual_seed(1)
    one = prunesid.components(x, 4, seed=0)
    torch.manual_seed(2)
    assert torch.equal(one, prunesid.components(x, 4, seed=0))
    assert torch.equal(one[1:], prunesid.components(x[1:], 4, seed=0))
    # Those of an exact decomposition, up to tokens that load on two components alike.
    table = x[0].sigmoid().double().T
    loadings = torch.linalg.svd(table - table.mean(0), full_matrices=False).Vh[:4].abs()
    best = loadings.topk(2, dim=0).values
    clear = best[0] - best[1] > 0.1
    assert int(clear.sum()) > 10
    same = (one[0] == loadings.argmax(0))[clear].float().mean()
    assert float(same) > 0.9


@cases("idpruner")
def test_idpruner(case: dict[str, Any]) -> None:
    t, p = tensors("idpruner", case), case["params"]
    order = idpruner.marginal(
        t["features"][None], t["raw"][None], p["K"], p["mmr_lambda"], p["parallel_k"]
    )
    assert order.sort(1).values.tolist() == of_mask(t["mask"])


# VScan ---------------------------------------------------------------------------------------


@cases("vscan")
def test_vscan(case: dict[str, Any]) -> None:
    t, p = tensors("vscan", case), case["params"]
    signals = {ClsAttention(5 / 24): t["attn_shallow"], SEEN: t["attn_deep"]}
    tokens, ctx = visual(t["features"], (24, 24)), shown(p["T"], signals)
    made = VScan(num_keep=p["T"], official=True).select(tokens, ctx)
    assert made.index.tolist() == of_mask(t["mask"])
    torch.testing.assert_close(made.reduce(t["features"]), t["tokens"], rtol=1e-5, atol=1e-5)
    ours = VScan(num_keep=p["T"]).select(tokens, ctx)
    assert ours.num_slots == p["T"]
    assert all(
        set(a) <= set(b) for a, b in zip(made.index.tolist(), ours.index.tolist(), strict=True)
    )


def test_windows_follow_the_regions_of_a_tiled_picture() -> None:
    torch.manual_seed(0)
    tokens = visual(torch.randn(1, 128, 4), (16, 8))
    pos = tokens.pos.clone()
    pos[:, 64:, 0], pos[:, 64:, 1] = 1, pos[:, 64:, 1] - 8  # two regions of 8 x 8
    shallow = torch.rand(1, 1, 128)
    signals = {ClsAttention(5 / 24): shallow, SEEN: torch.rand(1, 1, 128)}
    moved = type(tokens)(tokens.features, tokens.size, pos)
    made: Selection = VScan(num_keep=64).select(moved, shown(64, signals))
    kept = torch.zeros(128, dtype=torch.long)
    kept[made.index[0]] = 1
    per_window = kept.view(2, 4, 2, 4, 2).sum((2, 4))
    assert int(per_window.min()) >= 1  # 32 windows, one local token each
    assert made.num_slots == 64


# Clips ---------------------------------------------------------------------------------------


def clip(features: Tensor, frames: int, width: int) -> tuple[VisualTokens, dict[Any, Tensor]]:
    """One clip ``[T n, D]`` and what stages are shown of it."""
    still = visual(features[None])
    steps = torch.arange(len(features))
    each = len(features) // frames
    pos = torch.stack([steps // each, steps % each // width, steps % each % width], dim=1)[None]
    tokens = VisualTokens(still.features, still.size, pos, "video")
    return tokens, {Frames(): Frames().read(tokens)}


@cases("evs")
def test_evs(case: dict[str, Any]) -> None:
    t, p = tensors("evs", case), case["params"]
    if "clips" in p:
        evs_positions(t, p)
        return
    tokens, signals = clip(t["embeds"], p["T"], p["W"] // p["merge"])
    method = EVS(keep_ratio=1 - p["q"])
    made = method.select(tokens, shown(0, signals))
    assert made.index.tolist() == of_mask(t["mask"])
    assert made.num_slots == p["kept"]
    picture = dataclasses.replace(tokens, kind="image")
    assert method.select(picture, shown(0, signals)).num_slots == len(t["embeds"])


def evs_positions(t: dict[str, Any], p: dict[str, Any]) -> None:
    """Kept tokens have (t, h, w) from the place behind the clip's start, as there.

    The text does not follow by the width alone: that is the fault of the rule that EVS's docstring
    names, and what it leads to is written down here.
    """
    marks = (t["input_ids"].flatten() == p["vision_start"]).nonzero()[:, 0].tolist()
    positions = t["positions"].long()
    for number, start in enumerate(marks):
        media = t[f"media_positions_{number}"].long()
        first = start + 1
        base = positions[2, start] + 1
        own = positions[:, first : first + media.shape[1]]
        assert torch.equal(own, base + media[:3])
        behind = positions[:, first + media.shape[1]]
        assert set(behind.tolist()) == {int(base + media[3].max())}
        if p["clips"][number][0] > media[3].max() or media[1].max() >= media[3].max():
            assert int(behind.max()) <= int(own.max())  # the text stands among the frames


@cases("vidcom2")
def test_vidcom2(case: dict[str, Any]) -> None:
    t, p = tensors("vidcom2", case), case["params"]
    tokens, signals = clip(t["features"], p["T"], int(p["tokens_per_frame"] ** 0.5))
    method = VidCom2(keep_ratio=p["base"])
    of_clip, of_frame = vidcom2.likeness(tokens.features, signals[Frames()])
    torch.testing.assert_close((of_clip + of_frame)[0], t["score"].flatten(), rtol=1e-4, atol=1e-5)
    counts = vidcom2.shares(of_clip, signals[Frames()], p["base"])
    assert counts[0].tolist() == t["counts"]
    made = method.select(tokens, shown(0, signals))
    assert made.index[0].tolist() == t["kept"].long().tolist()


def test_an_exact_clip_comes_to_its_number_one_token_at_a_time() -> None:
    """Against a loop: what is too much leaves by its likeness, what is too little comes by it."""
    torch.manual_seed(1)
    for number in (4, 9, 17, 31):
        features = torch.randn(36, 8, dtype=torch.float64)
        features[9:18] = features[:9] + 0.01
        tokens, signals = clip(features, 4, 3)
        alike = sum(vidcom2.likeness(tokens.features.float(), signals[Frames()]))[0]
        kept = set(VidCom2(num_keep=number).select(tokens, shown(0, signals)).index[0].tolist())
        while len(kept) > number:
            kept.remove(max(kept, key=lambda i: (alike[i].item(), i)))
        while len(kept) < number:
            kept.add(min(set(range(36)) - kept, key=lambda i: (alike[i].item(), i)))
        made = VidCom2(num_keep=number, exact=True).select(tokens, shown(0, signals))
        assert made.index[0].tolist() == sorted(kept)


def test_a_frame_that_is_like_no_other_is_given_more() -> None:
    torch.manual_seed(0)
    same = torch.randn(9, 8).repeat(4, 1) + 0.01 * torch.randn(36, 8)
    same[18:27] = torch.randn(9, 8)
    tokens, signals = clip(same, 4, 3)
    made = VidCom2(num_keep=12).select(tokens, shown(0, signals))
    counts = torch.bincount(made.index[0] // 9, minlength=4)
    assert int(counts.argmax()) == 2
    evs = EVS(num_keep=18).select(tokens, shown(0, signals))
    assert torch.bincount(evs.index[0] // 9, minlength=4).tolist() == [9, 0, 9, 0] or (
        torch.bincount(evs.index[0] // 9, minlength=4)[2] >= 4
    )
