# SPDX-License-Identifier: Apache-2.0
"""A clip is one pool: also where it is written as pictures; budgets that count its frames."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import visprune
from tests.contract.oracle import TOLERANCE, alive, error, forwards, grown
from tests.families import tiny
from tests.families.oracle import extended, hidden_logits, two_kernels
from tests.families.test_contract import GENERATE
from tests.families.tiny import parts
from visprune.backbones.hf.cache import cache_of
from visprune.catalog import get_method, list_methods, parameters
from visprune.errors import BudgetError, ConfigError
from visprune.machine.find import find_adapter

# Whose processors, or users, write clips as pictures.
FAMILIES = ("internvl", "smolvlm", "gemma3")
ROWS = [[3, "a", 2, "b", 2, "c", 4], [2, "d", 3]]
TOLD = [3, 1]

each_family = pytest.mark.parametrize("family", FAMILIES)


def whole(family: str, rows: list[list[Any]]) -> dict[str, Any]:
    """Prompts whose pictures are one tile each, as frames are."""
    spec = replace(tiny.FAMILIES[family], picture=parts.square(1, 3, 24, 24))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.FAMILIES, family, spec)
        patch.setitem(parts._COUNTS, (family, "a"), 9)
        return tiny.inputs(family, rows)


@each_family
@torch.no_grad()
def test_pictures_that_are_frames_are_one_pool(family: str, models: Any) -> None:
    model, inputs = models(family), whole(family, ROWS)
    with visprune.prune(model, "random", num_keep=4) as run:
        model(**inputs)
        assert [len(kept) for kept in run.trace.kept] == [4, 4, 4, 4]  # pictures of a text
    few = {"num_keep": 4, "positions": "original"}
    with forwards() as seen, visprune.prune(model, "random", **few) as run:
        logits = model(**inputs, clip_frames=TOLD).logits
        trace = run.trace
        made = model.generate(**inputs, clip_frames=TOLD, **GENERATE)
        again = run.trace
    assert trace.image_rows == again.image_rows == [0, 1]
    assert [len(kept) for kept in trace.kept] == [4, 4]
    assert trace.num_tokens == [27, 9]
    assert trace.all_pos[0][:, 0].tolist() == sorted([0, 1, 2] * 9)
    eager, valid = models(family, "eager"), inputs["attention_mask"].bool()
    plain = model(**inputs, use_cache=False).logits
    bound = TOLERANCE + 2 * two_kernels(family, eager, inputs, plain)
    keep = alive(seen[0])
    there = keep[-1] & valid
    want = hidden_logits(eager, inputs, keep)
    assert error(logits[there], want[there]) <= bound < 1e-4
    new = made.sequences[:, inputs["input_ids"].shape[1] :]
    longer = extended(inputs, new[:, :-1], find_adapter(model).answer_types)
    want = hidden_logits(eager, longer, grown(alive(seen[1]), longer["input_ids"].shape[1]))
    for number, got in enumerate(made.logits):
        at = inputs["input_ids"].shape[1] - 1 + number
        assert error(got, want[:, at]) <= bound


@each_family
@torch.no_grad()
def test_nothing_dropped_changes_no_bit(family: str, models: Any) -> None:
    model, inputs = models(family), whole(family, ROWS)
    plain, answer = model(**inputs).logits, model.generate(**inputs, **GENERATE).sequences
    with visprune.prune(model, "divprune", keep_ratio=1.0):
        assert torch.equal(model(**inputs, clip_frames=TOLD).logits, plain)
        made = model.generate(**inputs, clip_frames=TOLD, **GENERATE).sequences
    assert torch.equal(made, answer)


@each_family
@torch.no_grad()
def test_methods_for_clips_see_the_frames(family: str, models: Any) -> None:
    model, inputs = models(family), whole(family, ROWS)
    with visprune.prune(model, "evs", keep_ratio=0.5) as run:
        model(**inputs)
        assert [len(kept) for kept in run.trace.kept] == [9, 9, 9, 9]  # pictures stay whole
        model(**inputs, clip_frames=TOLD)
        assert [len(kept) for kept in run.trace.kept] == [13, 9]


@torch.no_grad()
def test_beams_and_equal_clips(models: Any) -> None:
    model, inputs = models("gemma3"), whole("gemma3", ROWS)
    options = {**GENERATE, "num_beams": 2, "max_new_tokens": 2}
    with visprune.prune(model, "random", num_keep=4) as run:
        model.generate(**inputs, clip_frames=TOLD, **options)
        assert run.trace.image_rows == [0, 1, 2, 3]
        assert run.trace.num_tokens == [27, 27, 9, 9]
        rows = [[3, "a", 2, "b", 3, "c", 2, "d", 2]]
        model(**whole("gemma3", rows), clip_frames=2)
        assert run.trace.num_tokens == [18, 18]


@pytest.mark.parametrize("told", [2, [2, 1], [3, 2], [4], [3], "eight", [0, 4], []])
def test_frames_that_do_not_fit_are_refused(told: Any, models: Any) -> None:
    model, inputs = models("gemma3"), whole("gemma3", ROWS)
    with visprune.prune(model, "random", num_keep=4):
        with pytest.raises(ConfigError, match="clip_frames"):
            model(**inputs, clip_frames=told)
        model(**inputs)  # it was told of that call alone


def test_tiles_are_no_frames(models: Any) -> None:
    model, inputs = models("internvl"), tiny.inputs("internvl", [[3, "a", 2, "b", 2]])
    with (
        visprune.prune(model, "random", num_keep=4),
        pytest.raises(ConfigError, match="frame 0 of a clip is cut into 2 tiles"),
    ):
        model(**inputs, clip_frames=2)


@torch.no_grad()
def test_a_clip_of_a_later_turn(models: Any) -> None:
    model = models("internvl")
    first, second = whole("internvl", [[3, "a", 2, "b", 2]]), whole("internvl", [[2, "c", 2, "d"]])
    with visprune.prune(model, "random", num_keep=4) as run:
        cache = cache_of(model(**first, clip_frames=2, use_cache=True))
        length = first["input_ids"].shape[1] + second["input_ids"].shape[1]
        second["attention_mask"] = torch.ones(1, length, dtype=torch.long)
        model(**second, clip_frames=2, past_key_values=cache)
    assert run.trace.num_tokens == [18]
    assert [len(kept) for kept in run.trace.kept] == [4]


# Chunks -----------------------------------------------------------------------------------------


def chunked(text: str, grids: list[list[int]]) -> dict[str, Any]:
    """A prompt of Kimi K2.5 in letters: "P" a chunk's placeholders, "<>" its marks."""
    marks, ids = {"<": parts.VSTART, ">": parts.VEND}, []
    for letter in text:
        word = marks.get(letter, ord(letter) % 60 + 10)
        ids += [parts.VIDEO] * 4 if letter == "P" else [word]
    pixels = parts.noise("v", sum(t * h * w for t, h, w in grids), 3, 4, 4)
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor(grids),
    }


SMALL, TALL = [2, 4, 4], [2, 2, 8]


@pytest.mark.parametrize(
    ("text", "grids", "pools"),
    [
        ("xx0.0<vcP>0.4<vcP>yy", [SMALL] * 2, [8]),
        ("xx0.0<vcP>0.4<vcP>0.8<vcP>yy", [SMALL] * 3, [12]),
        ("xx0.0<vcP>0.4<vcP>yy", [SMALL, [1, 4, 4]], [8]),
        # two clips: time begins anew, words or a line's end between, sizes, a chunk of fewer frames
        ("xx0.0<vcP>0.4<vcP>0.0<vcP>yy", [SMALL] * 3, [8, 4]),
        ("xx0.0<vcP>0.0<vcP>yy", [SMALL] * 2, [4, 4]),
        ("xx0.0<vcP>n0.0<vcP>yy", [SMALL] * 2, [4, 4]),
        ("xx0.0<vcP>0.4<vcP>n0.0<vcP>0.4<vcP>", [SMALL] * 4, [8, 8]),
        ("xx0.0<vcP>0.4<vcP>and0.0<vcP>", [SMALL] * 3, [8, 4]),
        ("xx0.0<vcP>0.4<vcP>yy", [SMALL, TALL], [4, 4]),
        ("xx0.0<vcP>0.4<vcP>yy", [[1, 4, 4], SMALL], [4, 4]),
        ("xx0.0<vcP>0.4<vcP>0.8<vcP>", [SMALL, [1, 4, 4], [1, 4, 4]], [8, 4]),
    ],
)
@torch.no_grad()
def test_chunks_of_one_clip_are_one_pool(
    text: str, grids: list[list[int]], pools: list[int], models: Any
) -> None:
    model, inputs = models("kimi_k25"), chunked(text, grids)
    with visprune.prune(model, "random", num_keep=3) as run:
        model(**inputs)
    assert run.trace.num_tokens == pools
    assert [len(kept) for kept in run.trace.kept] == [3] * len(pools)
    assert [sorted(set(own[:, 0].tolist())) for own in run.trace.all_pos] == [
        list(range(count // 4)) for count in pools
    ]


# Budgets that count frames -----------------------------------------------------------------------


NAMES = ("random", "divprune", "fastv", "todre", "evs", "vidcom2", "trim", "v2drop", "prumerge")
MORE = {"todre": {"tau": 0.0}, "v2drop": {"layers": (1, 2, 3)}}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision", "internvl", "kimi_k25"])
@torch.no_grad()
def test_tokens_of_each_frame_are_so_many_of_the_clip(name: str, family: str, models: Any) -> None:
    model, told = models(family), {}
    inputs = tiny.inputs(family, [[3, "v", 4]]) if family != "internvl" else whole(family, ROWS[:1])
    if family == "internvl":
        told = {"clip_frames": 3}
    if name == "prumerge" and family != "internvl":
        pytest.skip("no class token")
    more = MORE.get(name, {})
    with visprune.prune(model, name, num_keep_per_frame=3, **more) as run:
        by_frame = model(**inputs, **told).logits
        kept, frames = run.trace.kept[0], len(run.trace.all_pos[0][:, 0].unique())
    assert frames > 1
    with visprune.prune(model, name, num_keep=3 * frames, **more) as run:
        assert torch.equal(model(**inputs, **told).logits, by_frame)
        assert torch.equal(run.trace.kept[0], kept)
    if name in ("random", "divprune", "fastv", "todre"):
        assert len(kept) == 3 * frames


def test_a_picture_has_no_frames(models: Any) -> None:
    model = models("qwen3_vl")
    with visprune.prune(model, "fastv", num_keep_per_frame=3):
        for rows in ([[3, "a", 4]], [[3, "a", 2, "v", 4]]):
            with pytest.raises(BudgetError, match=r"this is a picture\. Use num_keep"):
                model(**tiny.inputs("qwen3_vl", rows))
        model(**tiny.inputs("qwen3_vl", [[3, "v", 4], [5]]))


def test_an_encoder_has_no_clips(models: Any) -> None:
    from timm.models import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2)
    with pytest.raises(BudgetError, match="inside an encoder every picture is by itself"):
        visprune.prune(model, "random", num_keep_per_frame=3)


def test_one_budget_is_given() -> None:
    with pytest.raises(BudgetError, match="got both: num_keep=4, num_keep_per_frame=2"):
        get_method("divprune", num_keep=4, num_keep_per_frame=2)
    with pytest.raises(BudgetError, match="num_keep_per_frame must be at least 1, got 0"):
        get_method("divprune", num_keep_per_frame=0)
    with pytest.raises(BudgetError, match=r"whole number of tokens, got 2\.5"):
        get_method("todre", num_keep_per_frame=2.5)
    frames = (4, 4, 3)
    with pytest.raises(BudgetError, match="3 to 4 tokens"):
        get_method("divprune", num_keep_per_frame=2).of_clip(frames)


@pytest.mark.parametrize("name", list_methods())
def test_what_takes_a_number_takes_one_of_frames(name: str) -> None:
    if "num_keep" not in parameters(name):
        with pytest.raises(ConfigError, match=r"it takes no number of tokens that stay"):
            get_method(name, num_keep_per_frame=2)
        return
    if name == "zipvl":
        with pytest.raises(ConfigError, match="decides itself how much stays"):
            get_method(name, num_keep_per_frame=2)
        return
    method = get_method(name, num_keep_per_frame=2)
    assert method.of_clip((4, 4, 4)) == get_method(name, num_keep=6)
    with pytest.raises(BudgetError, match=r"this is a picture\. Use num_keep"):
        method.of_clip(())
    with pytest.raises(BudgetError, match="num_keep=4"):
        get_method(name, num_keep=4, num_keep_per_frame=2)


@torch.no_grad()
def test_a_cache_keeps_so_many_of_each_frame(models: Any) -> None:
    model, inputs = models("qwen3_vl"), tiny.inputs("qwen3_vl", [[3, "v", 2, "v", 4], [2, "v"]])
    kept = []
    for budget in ({"num_keep_per_frame": 3}, {"num_keep": 6}):
        with visprune.prune(model, "snapkv", **budget) as run:
            made = model.generate(**inputs, **GENERATE)
        kept.append((run.trace.cache.slots, made.sequences, torch.stack(made.logits)))
    words = inputs["attention_mask"][0].sum() - 2 * 8
    assert set(kept[0][0][0][0]) == {int(words) + 2 * 6}
    assert kept[0][0] == kept[1][0]
    assert torch.equal(kept[0][1], kept[1][1])
    assert torch.equal(kept[0][2], kept[1][2])
    with visprune.prune(model, "divprune+snapkv", num_keep_per_frame=1) as run:
        model.generate(**inputs, **GENERATE)
    assert [len(own) for own in run.trace.kept] == [4, 4, 4]
    with (
        visprune.prune(model, "knorm", num_keep_per_frame=3),
        pytest.raises(BudgetError, match=r"this is a picture\. Use num_keep"),
    ):
        model.generate(**tiny.inputs("qwen3_vl", [[3, "v", 2, "a", 4]]), **GENERATE)
    with pytest.raises(BudgetError, match="num_keep_per_frame counts visual tokens"):
        get_method("snapkv", num_keep_per_frame=3, scope="prompt")
    with pytest.raises(BudgetError, match="got num_keep_per_frame=3, max_cache=9"):
        get_method("snapkv", num_keep_per_frame=3, max_cache=9)


def test_it_is_shared_out_and_written_down_as_others() -> None:
    chain = get_method("divprune+fastv", num_keep_per_frame=2)
    assert [member.num_keep_per_frame for member in chain.members] == [4, 2]
    method = get_method("divprune", num_keep_per_frame=2)
    saved = method.to_dict()
    assert saved["num_keep_per_frame"] == 2
    assert get_method(saved.pop("method"), **saved) == method
    assert "num_keep_per_frame" not in get_method("divprune", num_keep=2).to_dict()
