# SPDX-License-Identifier: Apache-2.0
"""Methods at the cache against stored outputs of the official implementations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.test_methods_golden import cases
from tests.unit.test_methods_golden import tensors as stored_tensors
from visprune.backbones.hf.pages import Pages, Probe, Purse
from visprune.backbones.hf.sealed import Codes
from visprune.core.cache import (
    CacheMethod,
    CacheSeen,
    Counted,
    DropChannels,
    Eviction,
    Gated,
    HeadSlots,
    Looked,
    MergeNearest,
    ProbeSums,
)
from visprune.core.method import ModelSpec
from visprune.methods.adakv import AdaKV
from visprune.methods.compresskv import CompressKV
from visprune.methods.d2o import D2O
from visprune.methods.duo_attention import DuoAttention
from visprune.methods.expected_attention import ExpectedAttention
from visprune.methods.h2o import H2O
from visprune.methods.look_m import LookM
from visprune.methods.prefixkv import PrefixKV
from visprune.methods.pyramidkv import PyramidKV
from visprune.methods.snapkv import SnapKV
from visprune.methods.streaming_llm import StreamingLLM
from visprune.methods.think import ThinK
from visprune.methods.tova import TOVA
from visprune.methods.vl_cache import BySparsity, VLCache
from visprune.methods.zipcache import ZipCache
from visprune.methods.zipvl import ByMass, ZipVL

SPEC = ModelSpec(family="llava", num_layers=32, has_cls=True, multi_axis_rope=False)
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def tensors(family: str, case: dict[str, Any]) -> dict[str, Tensor]:
    """What a case stores as tensors; other values stand in the case itself."""
    named = {k: v for k, v in case["expected"].items() if isinstance(v, str)}
    return stored_tensors(family, {**case, "expected": named})


def shown(q: Tensor, k: Tensor, v: Tensor | None = None, **more: Any) -> CacheSeen:
    """One sample's layer: ``[H, P, d]``, ``[Hk, L, d]``; no token is visual unless it is said."""
    nothing = torch.zeros(k.shape[1], dtype=torch.bool)
    given = {"free": nothing, "visual": nothing, **more}
    return CacheSeen(q, k, k if v is None else v, **given)


def look(method: CacheMethod, seen: CacheSeen, spec: ModelSpec = SPEC) -> Looked:
    """What is known of a layer, its amount resolved."""
    eviction = method.eviction(spec)
    seen.text_observes = eviction.scope.kind == "visual"
    seen.free = eviction.scope.free(seen.visual, seen.prompt)
    counted = Counted(int(seen.free.sum()), seen.prompt)
    return eviction.look(seen, eviction.amount.resolve(counted))


def kept(method: CacheMethod, *looked: Looked, spec: ModelSpec = SPEC) -> list[list[Tensor]]:
    """Of every layer, what its heads keep."""
    counts = method.eviction(spec).budget.share(looked)
    return [x.kept(count.clamp(max=x.num_free)) for x, count in zip(looked, counts, strict=True)]


def same(got: Tensor, want: Tensor, score: Tensor) -> None:
    """Equal sets of slots; where they differ it is between equal scores at the boundary."""
    for mine, theirs, scores in zip(got, want, score, strict=True):
        apart = (set(mine.tolist()) ^ set(theirs.tolist())) or {0}
        assert len(mine) == len(theirs)
        assert len({float(scores[slot]) for slot in apart}) == 1


def pool(name: str) -> Any:
    return name.removesuffix("pool")


# SnapKV and its family --------------------------------------------------------------------------


@cases("snapkv")
def test_snapkv(case: dict[str, Any]) -> None:
    t, p = tensors("snapkv", case), case["params"]
    method = SnapKV(
        max_cache=p["cap"], scope="prompt", window=p["window"], kernel=p["kernel"],
        pool=pool(p["pooling"]), group=p["gqa_agg"] or "mean",
    )  # fmt: skip
    for row in range(p["B"]):
        looked = look(method, shown(t["q"][row], t["k"][row]))
        heads = kept(method, looked)[0]
        if "kept" not in t:
            assert [len(x) for x in heads] == [p["L"]] * p["Hk"]
            continue
        torch.testing.assert_close(looked.score[:, looked.free], t["pooled"][row], **CLOSE)
        want = t["kept"][row]
        # The official order: falling score, then the window (equal scores in any order).
        count = p["cap"] - p["window"]
        best, theirs = (looked.score.gather(1, x[:, :count]) for x in (looked.ranked(), want))
        torch.testing.assert_close(best, theirs, rtol=0.0, atol=0.0)
        same(torch.stack(heads), want, looked.score)


@cases("pyramidkv")
def test_pyramidkv(case: dict[str, Any]) -> None:
    t, p = tensors("pyramidkv", case), case["params"]
    method = PyramidKV(
        max_cache=p["cap"], scope="prompt", window=p["window"], kernel=p["kernel"],
        pool=pool(p["pooling"]), beta=p["beta"],
    )  # fmt: skip
    layers = [look(method, shown(t["q"][0], t["k"][0])) for _ in range(p["layers"])]
    found = kept(method, *layers)
    for number, length in zip(p["layer_indices"], case["expected"]["lengths"], strict=True):
        assert [len(x) for x in found[number]] == [length] * p["H"]
        if f"kept_{number}" in t:
            want = t[f"kept_{number}"][0]
            same(torch.stack(found[number]), want, layers[number].score)


@cases("adakv")
def test_adakv(case: dict[str, Any]) -> None:
    t, p = tensors("adakv", case), case["params"]
    pyramid = p["pyramid"]
    method = AdaKV(
        max_cache=p["cap"], scope="prompt", window=p["window"], kernel=p["kernel"],
        pool=pool(p["pooling"]), floor=p["floor_alpha"], normalize=p["normalize"],
        group=p["gqa"] or "mean", pyramid=pyramid and pyramid["beta"],
    )  # fmt: skip
    looked = look(method, shown(t["q"][0], t["k"][0]))
    number, count = (pyramid["layer"], pyramid["layers"]) if pyramid else (0, 1)
    heads = kept(method, *[looked] * count)[number]
    assert [len(x) for x in heads] == case["expected"]["head_lens"]
    if case["id"] == "noop":
        return
    score = looked.score[:, looked.free]
    torch.testing.assert_close(score, t["score"], **CLOSE)
    for head, index in enumerate(heads):
        want = t[f"kept_{head}"].sort().values
        if case["exact_match_expected"]:
            assert torch.equal(index, want)
        else:  # equal neighbours after max pooling: which of them is kept is not defined
            prefix = score.shape[1]
            mine, theirs = (score[head][x[x < prefix]].sort().values for x in (index, want))
            torch.testing.assert_close(mine, theirs, **CLOSE)


# Rules that go on while tokens are decoded: applied again after every token ---------------------


@cases("tova")
def test_tova(case: dict[str, Any]) -> None:
    t, p = tensors("tova", case), case["params"]
    method = TOVA(max_cache=p["size"], scope="prompt")
    for row in range(p["B"]):
        q, k = t["q"][row], t["k"][row]
        there = torch.arange(p["L"])
        for step in range(p["T"] + 1):
            new = slice(0, p["L"]) if step == 0 else slice(p["L"] + step - 1, p["L"] + step)
            looked = look(method, shown(q[:, new], k[:, there]))
            (heads,) = kept(method, looked)
            assert all(torch.equal(heads[0], other) for other in heads)
            there = there[heads[0]]
            assert torch.equal(there, t[f"kept_{step}"][row])
            there = torch.cat([there, torch.tensor([p["L"] + step])])


@pytest.mark.parametrize("number", [0, 1])
def test_h2o_that_drops(number: int) -> None:
    case = cases("h2o").args[1][number].values[0]
    t, p = tensors("h2o", case), case["params"]
    q, k = t["q"][0], t["k"][0]
    method = H2O(max_cache=p["hh"] + p["recent"], recent=p["recent"], scope="prompt")
    there = torch.arange(p["L"]).expand(p["H"], -1)
    carried: Tensor | None = None
    for step in range(p["T"] + 1):
        new = slice(0, p["L"]) if step == 0 else slice(p["L"] + step - 1, p["L"] + step)
        keys = torch.stack([k[head, there[head]] for head in range(p["H"])])
        looked = look(method, shown(q[:, new], keys, carried=carried))
        (heads,) = kept(method, looked)
        index = torch.stack(heads)
        there, score = there.gather(1, index), looked.score.gather(1, index)
        assert torch.equal(there, t[f"kept_{step}"])
        torch.testing.assert_close(score, t[f"score_{step}"], **CLOSE)
        there = torch.cat([there, torch.full((p["H"], 1), p["L"] + step)], 1)
        carried = torch.cat([score, torch.zeros(p["H"], 1)], 1)


def test_h2o_that_masks() -> None:
    """The first release: what it can see again is what the later one stores."""
    case = cases("h2o").args[1][2].values[0]
    t, p = tensors("h2o", case), case["params"]
    q, k, v = (t[name][0] for name in "qkv")
    method = H2O(
        max_cache=p["hh"] + p["recent"], recent=p["recent"], scope="prompt", every=1,
        first_release=True,
    )  # fmt: skip
    hides = method.eviction(SPEC).action.hides
    there = torch.arange(p["L"]).expand(p["H"], -1)
    carried: Tensor | None = None
    visible = torch.ones(1, 1, 1, p["L"], dtype=torch.bool)
    for step in range(p["T"] + 1):
        new = slice(0, p["L"]) if step == 0 else slice(p["L"] + step - 1, p["L"] + step)
        keys = k.gather(1, there[..., None].expand(-1, -1, k.shape[2]))
        seen = shown(q[:, new], keys, carried=carried, mask=lambda at, now=visible: now)
        looked = look(method, seen)
        index = torch.stack(kept(method, looked)[0])
        if step == p["T"]:
            values = v.gather(1, there[..., None].expand(-1, -1, v.shape[2]))
            out = seen.rows(seen.queries)[:, 0, None] @ values
            torch.testing.assert_close(out.flatten(), t["out_last"].flatten(), **CLOSE)
        there, score = there.gather(1, index), looked.score.gather(1, index)
        visible = (torch.arange(index.shape[1] + 1) != index.shape[1] - hides)[None, None, None]
        there = torch.cat([there, torch.full((p["H"], 1), p["L"] + step)], 1)
        carried = torch.cat([score, torch.zeros(p["H"], 1)], 1)
        mask = torch.zeros(p["H"], p["L"] + step + 1, dtype=torch.bool)
        mask = mask.scatter(1, there, visible[0, 0].expand(p["H"], -1))
        assert torch.equal(mask, t[f"mask_{step}"].bool())


def test_h2o_at_the_end_of_a_prompt() -> None:
    case = cases("h2o").args[1][3].values[0]
    t, p = tensors("h2o", case), case["params"]
    method = H2O(max_cache=p["cap"], recent=p["window"], scope="prompt")
    looked = look(method, shown(t["q"][0], t["k"][0]))
    want = t["kept"].reshape(p["H"], -1)
    assert torch.equal(torch.stack(kept(method, looked)[0]), want.sort(dim=1).values)
    stored = t["score"].reshape(p["H"], -1)
    torch.testing.assert_close(looked.score[:, : stored.shape[1]], stored, **CLOSE)


# ``evict_range`` of the official class cuts out what its caller names, and is no rule.
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_streaming_llm(number: int) -> None:
    case = cases("streaming_llm").args[1][number].values[0]
    t, p = tensors("streaming_llm", case), case["params"]
    room = p["num_coming"] or 0  # made before that many tokens come
    method = StreamingLLM(
        max_cache=p["start"] + p["recent"] - room, sinks=p["start"], scope="prompt"
    )
    x = torch.zeros(1, p["L"], 4)
    assert torch.equal(kept(method, look(method, shown(x, x)))[0][0], t["kept"])


# Layers and heads that differ ------------------------------------------------------------------


@cases("vl_cache")
def test_vl_cache(case: dict[str, Any]) -> None:
    t, p = tensors("vl_cache", case), case["params"]
    method = VLCache(
        keep_ratio=p["alpha"], scope="prompt", per_head=p["head_adaptive"],
        own_windows=p["per_layer_window"], window=p["post_vision"],
    )  # fmt: skip
    layers = [
        look(method, shown(t["q"][n], t["k"][n], layer=n, num_layers=p["layers"]))
        for n in range(p["layers"])
    ]
    budget = method.eviction(SPEC).budget
    assert isinstance(budget, BySparsity)
    sparsity = torch.stack([x.budget for x in layers])
    torch.testing.assert_close(sparsity, t["sparsity"], rtol=0.0, atol=1e-6)
    torch.testing.assert_close(budget.shares(layers), t["budget"], rtol=0.0, atol=1e-6)
    for number, heads in enumerate(kept(method, *layers)):
        assert torch.equal(torch.stack(heads), t[f"kept_{number}"])


@cases("compresskv")
def test_compresskv(case: dict[str, Any]) -> None:
    t, p = tensors("compresskv", case), case["params"]
    layers = len(p["caps"])
    spec = ModelSpec("llava", num_layers=layers, has_cls=True, multi_axis_rope=False)
    heads = tuple(tuple(p["heads"]) for _ in range(layers))
    method = CompressKV(
        heads=heads, first=p["first_k"], slots=tuple(p["caps"]), window=p["window"],
        scope="prompt",
    )  # fmt: skip
    seen = shown(t["q"][0], t["k"][0], layer=p["layer"], num_layers=layers)
    looked = look(method, seen, spec)
    (found,) = kept(method, looked, spec=spec)
    assert torch.equal(looked.ranked()[0, : len(t["kept"]) - p["window"]],
                       t["kept"][: -p["window"]])  # fmt: skip
    for index in found:
        assert torch.equal(index, t["kept"].sort().values)


@cases("prefixkv")
def test_prefixkv(case: dict[str, Any]) -> None:
    t, p, want = tensors("prefixkv", case), case["params"], case["expected"]
    spec = ModelSpec("llava", num_layers=p["layers"], has_cls=True, multi_axis_rope=False)
    given: dict[str, Any] = {"keep_ratio": 1 - p["ratio"]}
    if p["mode"] == "fixed":
        given = {"ratios": tuple(p["ratios"])}
    method = PrefixKV(**given, sinks=p["start_size"], scope="prompt")
    layers = [
        look(method, shown(t["q"][n], t["k"][n], layer=n, num_layers=p["layers"]), spec)
        for n in range(p["layers"])
    ]
    assert method.eviction(spec).budget.forgotten(layers) == want["forget"]  # type: ignore[attr-defined]
    for heads, slots in zip(kept(method, *layers, spec=spec), want["kept"], strict=True):
        assert all(index.tolist() == slots for index in heads)


@cases("zipvl")
def test_zipvl(case: dict[str, Any]) -> None:
    t, p = tensors("zipvl", case), case["params"]
    rows = tuple(t["rows"].tolist())

    class Rows(ZipVL):
        def eviction(self, spec: ModelSpec) -> Eviction:
            score = ProbeSums(rows=rows)
            made = super().eviction(spec)
            return Eviction(score, made.amount, ByMass(self.tau, score), scope=made.scope)

    method = Rows(tau=p["tau"], scope="prompt")
    seen = shown(t["q"].reshape(p["H"], p["L"], -1), t["k"].reshape(p["H"], p["L"], -1))
    looked = look(method, seen)
    assert looked.budget == case["expected"]["p"]
    for index in kept(method, looked)[0]:
        assert torch.equal(index, t["kept"])


@cases("duo_attention")
def test_duo_attention(case: dict[str, Any]) -> None:
    t, p = tensors("duo_attention", case), case["params"]
    gates = tuple(tuple(row) for row in t["gates"].tolist())
    spec = ModelSpec("llava", num_layers=p["layers"], has_cls=True, multi_axis_rope=False)
    method = DuoAttention(
        gates=gates, sparsity=p["sparsity"], sinks=4, max_cache=10, scope="prompt"
    )
    budget = method.eviction(spec).budget
    assert isinstance(budget, Gated)
    full = t["full"].bool()
    assert torch.equal(budget.full(t["gates"]), full)
    x = torch.zeros(p["heads"], 30, 4)
    layers = [look(method, shown(x, x, layer=n), spec) for n in range(p["layers"])]
    stream = [0, 1, 2, 3, 24, 25, 26, 27, 28, 29]
    for number, heads in enumerate(kept(method, *layers, spec=spec)):
        for head, index in enumerate(heads):
            assert index.tolist() == (list(range(30)) if full[number, head] else stream)


# Merges ----------------------------------------------------------------------------------------


def stored(method: CacheMethod, looked: Looked, k: Tensor, v: Tensor) -> list[HeadSlots]:
    return method.eviction(SPEC).action.apply(k, v, kept(method, looked)[0], looked)


@cases("look_m")
def test_look_m(case: dict[str, Any]) -> None:
    t, p = tensors("look_m", case), case["params"]
    prior = p["merge"].startswith("text_")
    merge = {"h2o": "none"}.get(p["merge"], p["merge"].removeprefix("text_"))
    method = LookM(
        max_cache=p["hh"] + p["recent"], scope="prompt", merge=merge, text_prior=prior,
        recent=p["recent"], official=p["official_bug"],
    )  # fmt: skip
    visual = torch.zeros(p["L"], dtype=torch.bool)
    for number, place in enumerate(p["image_position"]):
        start = place + (p["n_img"] - 1) * number
        visual[start : start + p["n_img"]] = True
    q, k, v = (t[name][0] for name in "qkv")
    looked = look(method, shown(q, k, v, visual=visual))
    heads = stored(method, looked, k, v)
    assert torch.equal(torch.stack([x.index for x in heads]), t["kept"])
    torch.testing.assert_close(torch.stack([x.key for x in heads]), t["k_out"][0], **MERGED)
    torch.testing.assert_close(torch.stack([x.value for x in heads]), t["v_out"][0], **MERGED)
    finite = torch.isfinite(t["score"]) & torch.isfinite(looked.score)
    finite &= t["score"] > -1000  # image columns of the prior are far below there
    torch.testing.assert_close(looked.score[finite], t["score"][finite], **CLOSE)


MERGED = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("number", [0, 1])
def test_d2o(number: int) -> None:
    case = cases("d2o").args[1][number].values[0]
    t, p = tensors("d2o", case), case["params"]
    length = p["L"] + 1  # the first decoded token is there when the cache is cut
    q, k, v = (t[name][0][:, :length] for name in "qkv")
    method = D2O(
        max_cache=p["hh"] + p["recent"], recent=p["recent"], scope="prompt", by_variance=False
    )
    looked = look(method, shown(q, k, v))
    heads = stored(method, looked, k, v)
    assert torch.equal(torch.stack([x.index for x in heads]), t["kept_1"])
    keys, values = (torch.stack([getattr(x, n) for x in heads]) for n in ("key", "value"))
    torch.testing.assert_close(keys, t["k_1"][0], **MERGED)
    torch.testing.assert_close(values, t["v_1"][0], **MERGED)
    _go_on(case, t, looked, torch.stack([x.index for x in heads]), keys, values)


def _go_on(
    case: dict[str, Any], t: dict[str, Tensor], looked: Looked, index: Tensor, keys: Tensor,
    values: Tensor,
) -> None:  # fmt: skip
    """Later steps: one slot leaves a step, and merges if near enough to the running threshold."""
    p, want = case["params"], case["expected"]
    threshold = want["threshold"][0]
    score = looked.score.gather(1, index)
    for step in range(1, p["T"]):
        at = p["L"] + step
        keys = torch.cat([keys, t["k"][0][:, at : at + 1]], 1)
        values = torch.cat([values, t["v"][0][:, at : at + 1]], 1)
        carried = torch.cat([score, torch.zeros(p["H"], 1)], 1)
        seen = shown(t["q"][0][:, at : at + 1], keys, values, carried=carried)
        method = D2O(
            max_cache=p["hh"] + p["recent"], recent=p["recent"], scope="prompt", by_variance=False
        )
        found = look(method, seen)
        stay = kept(method, found)[0]
        nearest = [MergeNearest(free_only=False)._nearest(keys[h], stay[h], found)
                   for h in range(p["H"])]  # fmt: skip
        mean = float(torch.stack([c for _, _, c in nearest]).mean())
        threshold = p["alpha"] * threshold + p["beta"] * mean
        assert abs(threshold - want["threshold"][step]) < 1e-5
        action = MergeNearest("weighted", filtered=True, free_only=False, threshold=threshold)
        assert int(mean >= threshold) == want["merged"][step]
        heads = action.apply(keys, values, stay, found)
        keys, values = (torch.stack([getattr(x, n) for x in heads]) for n in ("key", "value"))
        score = found.score.gather(1, torch.stack(stay))
    torch.testing.assert_close(keys, t[f"k_{p['T']}"][0], **MERGED)
    torch.testing.assert_close(values, t[f"v_{p['T']}"][0], **MERGED)


def test_d2o_ratios_of_layers() -> None:
    case = cases("d2o").args[1][2].values[0]
    t, p = tensors("d2o", case), case["params"]
    budget = D2O(max_cache=9, scope="prompt").eviction(SPEC).budget
    variance = torch.stack([
        budget.read(shown(t["q"][n].reshape(p["H"], p["L"], -1),
                          t["k"][n].reshape(p["H"], p["L"], -1)))
        for n in range(p["layers"])
    ])  # fmt: skip
    ratio = budget.ratios(variance, p["rho"])  # type: ignore[attr-defined]
    torch.testing.assert_close(ratio, t["ratio"], rtol=1e-5, atol=1e-6)


# kvpress ----------------------------------------------------------------------------------------


def rotary(ids: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    inverse = 10000.0 ** (-torch.arange(0, dim, 2).float() / dim)
    angle = ids.float()[:, None] * inverse
    return torch.cat([angle, angle], 1).cos(), torch.cat([angle, angle], 1).sin()


def half_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


@cases("kvpress_scores")
def test_kvpress_scores(case: dict[str, Any]) -> None:
    t, p = tensors("kvpress_scores", case), case["params"]
    length, dim = p["L"], p["head_dim"]
    cos, sin = rotary(torch.arange(length), dim)
    seen = shown(
        half_turned(t["q"][0], cos, sin), t["k"][0], t["v"][0],
        places=torch.arange(length), turn=lambda ids: rotary(ids, dim),
    )  # fmt: skip
    method: CacheMethod
    if p["kind"] == "expected_attention":
        method = ExpectedAttention(
            max_cache=9, scope="prompt", future=p.get("n_future_positions", 512),
            sinks=p.get("n_sink", 4), covariance=p.get("use_covariance", True),
            values=p.get("use_vnorm", True),
        )  # fmt: skip
        got, want = look(method, seen).score, t["score"][0]
        top = slice(0, method.sinks)
        assert bool((got[:, top] > got[:, method.sinks :].max()).all())
        got, want = got[:, method.sinks :], want[:, method.sinks :]
    elif p["kind"] == "tova":
        got = look(TOVA(max_cache=9, scope="prompt"), seen).score
        got, want = got[:, :-1], t["score"][0][:, :-1]  # the last slot is set to a maximum there
    else:
        window = p["window_size"]
        method = SnapKV(max_cache=20, scope="prompt", window=window)
        looked = look(method, seen)
        got = looked.score[:, looked.free] / window  # a mean there, a sum here
        want = t["score"][0][:, : length - window]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


# Storage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_zipcache_saliency(number: int) -> None:
    case = cases("zipcache").args[1][number].values[0]
    t, p = tensors("zipcache", case), case["params"]
    method = ZipCache(low=p["ratio"], scope="prompt")
    score = method.eviction(SPEC).score
    assert isinstance(score, ProbeSums)
    seen = shown(t["q"][0], t["k"][0])
    at = score.at(seen)  # the last rows are those of the official code, the earlier ones drawn
    last = p["L"] - int(p["L"] - 0.05 * p["L"])
    assert torch.equal(at[-last:], t["probe"].sort().values[-last:])
    given = replace(score, rows=tuple(t["probe"].tolist()))
    saliency = given.read(seen)
    torch.testing.assert_close(saliency, t["saliency"][0], rtol=1e-4, atol=0.0)
    looked = Looked(saliency, torch.ones(p["L"], dtype=torch.bool), p["L"], p["L"])
    everything = [torch.arange(p["L"])] * p["Hk"]
    heads = method.eviction(SPEC).action.apply(t["k"][0], t["k"][0], everything, looked)
    for head, want in zip(heads, t["unimportant"][0], strict=True):
        assert head.bits is not None
        assert torch.equal((head.bits == 2).nonzero()[:, 0], want.sort().values)
        assert set(head.bits.tolist()) == {2, 4}


@pytest.mark.parametrize("number", [2, 3, 4])
def test_zipcache_quantisers(number: int) -> None:
    case = cases("zipcache").args[1][number].values[0]
    t, p = tensors("zipcache", case), case["params"]
    x, want = t["x"][0], t["dequantised"][0]
    if p["mode"] == "channelwise":
        codes = Codes(list(x), list(x), p["H"], p["bits"], group=32)
        got = torch.stack([key for key, _ in codes.numbers()])
    else:  # official scales of values span all heads: these are one head here
        flat = x.transpose(0, 1).flatten(1)
        codes = Codes([flat], [flat], 1, p["bits"])
        got = codes.numbers()[0][1].unflatten(1, (p["H"], -1)).transpose(0, 1)
    torch.testing.assert_close(got, want, rtol=0.0, atol=1e-5)


@cases("think")
def test_think(case: dict[str, Any]) -> None:
    t, p = tensors("think", case), case["params"]
    method = ThinK(ratio=p["ratio"], recent=p["recent"], scope="prompt")
    action = method.eviction(SPEC).action
    assert isinstance(action, DropChannels)
    squares = t["q"][0][:, -32:].square().mean(1)
    free = torch.arange(p["S"]) < p["S"] - p["recent"]
    looked = Looked(torch.zeros(p["H"], p["S"]), free, 0, p["S"], action=squares)
    whole = [torch.arange(p["S"])] * p["H"]
    heads = action.apply(t["k"][0], t["k"][0], whole, looked)
    for number, head in enumerate(heads):
        assert head.channels is not None
        assert torch.equal(head.channels, t["keep"][0, number].nonzero()[:, 0])
        thin = head.key[~head.plain][:, head.channels]
        assert torch.equal(thin, t["k_pruned"][0, number])
        assert torch.equal(head.key[head.plain], t["k_recent"][0, number])
    queries = shown(t["q"][0], t["q"][0], t["q"][0])
    torch.testing.assert_close(action.read(queries), squares)


def test_actqkv_probes_are_means_before_a_thousand_windows() -> None:
    case = cases("actqkv").args[1][1].values[0]
    t, p = tensors("actqkv", case), case["params"]
    none = torch.zeros(0, p["D"])
    for window in range(p["T"]):
        pages = Pages([none], [none], 1, 4, 1, "cosine")
        probe = pages.probe(t[f"x_{window}"][None, None])
        torch.testing.assert_close(probe[0], t[f"probe_{window}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [0, 1])
def test_actqkv_probes(number: int) -> None:
    case = cases("actqkv").args[1][number].values[0]
    t, p = tensors("actqkv", case), case["params"]
    probe, weigh = Probe(p["U"]), Probe(p["U"])
    for window in range(p["T"]):
        x = t[f"x_{window}"][None]
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(weigh.weights(x)[0], t[f"weights_{window}"], **close)
        torch.testing.assert_close(probe(x)[0], t[f"probe_{window}"], **close)
    assert probe.mean is not None
    assert probe.var is not None
    torch.testing.assert_close(probe.mean, t["mean"], **close)
    torch.testing.assert_close(probe.var, t["var"], **close)


def test_actqkv_shares_blocks_out_among_layers() -> None:
    case = cases("actqkv").args[1][2].values[0]
    t, p = tensors("actqkv", case), case["params"]
    purse = Purse(p["warmup"], p["k_min"])
    numbers = [purse.join() for _ in range(p["layers"])]
    most = torch.tensor([p["k_max"]])
    for step, entropies in enumerate(t["entropy"]):
        for layer in numbers:
            got = purse.take(layer, entropies[layer, None], most, p["total"] // p["layers"])
            assert int(got) == case["expected"]["k"][step][layer]
            assert purse.left is not None
            assert float(purse.left) == case["expected"]["remaining"][step][layer]


def test_an_eviction_has_four_parts() -> None:
    made = SnapKV(num_keep=4).eviction(SPEC)
    assert isinstance(made, Eviction)
    assert made.scope.kind == "visual"
