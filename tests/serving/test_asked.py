# SPDX-License-Identifier: Apache-2.0
"""What a request says over a server's default, and what a method leaves of a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import visprune
from tests import tiny
from tests.contract.cases import batch
from tests.families import tiny as families
from tests.unit.golden_cases import cases, tensors
from visprune.backbones.vlm.picture import grid
from visprune.core import ModelSpec
from visprune.machine.find import find_adapter
from visprune.serving.asked import as_settings, fitting, read, saved_settings
from visprune.serving.places import blocks, from_digits, pooled, spec_of, tiled, tiles, to_digits
from visprune.serving.shorten import Encoded, shorten

LLAVA = ModelSpec("llava", 32, has_cls=False, multi_axis_rope=False)
QWEN = ModelSpec("qwen2_5_vl", 28, has_cls=False, multi_axis_rope=True)
NONE: frozenset[str] = frozenset()
SHOWN = frozenset({"feature", "last"})
DEFAULT = {"visprune": "divprune", "visprune_keep_ratio": 0.25, "size": 336}


def asked(given: dict[str, Any], default: dict[str, Any] | None = None) -> Any:
    return read(given, default or {}, QWEN, NONE)


def test_without_settings_there_is_nothing() -> None:
    assert asked({}) is None
    assert asked({"size": 336}) is None
    assert asked({"visprune": None}, DEFAULT) is None


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"method": "divprune", "keep_ratio": 0.25, "num_keep": None, "strict": False}),
        ({"visprune_num_keep": 9},
         {"method": "divprune", "keep_ratio": None, "num_keep": 9, "strict": True}),
        ({"visprune": "uniform", "visprune_num_keep": 9},
         {"method": "uniform", "keep_ratio": None, "num_keep": 9, "strict": True}),
    ],
    ids=["default", "budget", "method"],
)  # fmt: skip
def test_a_request_stands_above_the_default(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    """A budget of its own is kept to; a default is cut down to what a picture has."""
    found = asked(given, DEFAULT).method.to_dict()
    assert {key: found[key] for key in wanted} == wanted


def test_equal_settings_have_one_key_and_others_another() -> None:
    short = {"visprune": "todre", "visprune_num_keep": 9}
    assert asked(short).key == asked({**short, "visprune_params": {"stage2": False}}).key
    assert asked(short).key != asked({**short, "visprune_num_keep": 8}).key
    assert asked(short).key != asked({**short, "visprune_params": {"objective": "max_sum"}}).key
    assert visprune.__version__ in asked(short).key


def test_a_saved_method_becomes_settings() -> None:
    saved = visprune.get_method("todre", num_keep=7, stage2=False, objective="max_sum").to_dict()
    found = asked({}, as_settings(saved)).method
    assert (found.num_keep, found.objective) == (7, "max_sum")
    assert asked({"visprune_num_keep": 5}, as_settings(saved)).method.num_keep == 5


def test_what_does_not_fit_says_why() -> None:
    why = fitting(QWEN, NONE)
    assert why["todre"] is None
    assert "no class token" in str(why["visionzip"])
    assert "inside the decoder" in str(why["fastv"])
    assert "inside the image encoder" in str(why["tome"])
    assert "without a text" in str(why["cdpruner"])
    for name in ("snapkv", "streaming_llm", "kvquant"):
        assert "a server's cache is the server's own" in str(why[name])
    assert fitting(LLAVA, NONE)["divprune"] is None
    with pytest.raises(visprune.UnsupportedModel, match=r"a server prunes by one.*can: todre, "):
        asked({"visprune": "divprune+fastv", "visprune_num_keep": 8})
    with pytest.raises(visprune.ConfigError, match="Did you mean 'divprune'"):
        asked({"visprune": "divprun+fastv", "visprune_num_keep": 8})


@pytest.mark.parametrize("method", ["todre", "divprune", "pool", "uniform", "random"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_one_picture_is_shortened_as_in_the_model(family: str, method: str) -> None:
    """The rows and their order are those that the decoder of transformers is given."""
    model = tiny.build(family)
    adapter = find_adapter(model)
    params: dict[str, Any] = {"stage2": False} if method == "todre" else {}
    contexts: list[Any] = []
    given: list[torch.Tensor] = []
    inputs = batch(family, [[3, "A", 6]])
    features = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    (picture,) = adapter.pictures(inputs, "image")
    with torch.no_grad():
        rows = model.model.get_image_features(**features).pooler_output[0]
        with visprune.prune(model, method, num_keep=5, **params) as run:
            run.observe(lambda site, tokens, context, selection, seconds: contexts.append(context))
            handle = model.model.language_model.register_forward_pre_hook(
                lambda module, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
            )
            model(**inputs)
            handle.remove()
    spec = spec_of(model.config)
    one = read({"visprune": method, "visprune_num_keep": 5}, {}, spec, SHOWN)
    assert one is not None
    signals = {
        s: v[0] if isinstance(v, tuple) else v.movedim(s.token_dim, 1)[0]
        for s, v in contexts[0].signals.items()
    }
    left, index = shorten(one, Encoded(rows, picture.pos, picture.free, signals=signals), spec)
    start = int((inputs["input_ids"][0] == adapter.token_id("image")).nonzero()[0])
    torch.testing.assert_close(given[0][0, start : start + len(left)], left)
    protected = int((~picture.free).sum())
    assert len(left) == len(index) == one.count(picture.pos, "image", spec) + protected


def test_places_survive_half_precision() -> None:
    values = torch.tensor([[0, 255, 256], [65_535, 301, 1], [7, 8, 9]])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(from_digits(to_digits(values).to(dtype)), values)


def test_tiles_lie_where_the_model_lays_them() -> None:
    """Against the adapter, which packs indices through the model itself."""
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        unpad_image,
    )

    model = tiny.build("llava_next")
    inputs = batch("llava_next", [[3, "A", 6, "a"]])
    known = find_adapter(model).pictures(inputs, "image")
    for picture, size in zip(known, inputs["image_sizes"].tolist(), strict=True):
        pos, free = tiled(model.config, tuple(size), get_anyres_image_grid_shape, unpad_image)
        assert torch.equal(pos, picture.pos)
        assert torch.equal(free, picture.free)


def test_a_method_that_breaks_its_word_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    one = asked({"visprune": "uniform", "visprune_num_keep": 4})
    monkeypatch.setattr(type(one.method), "survivors", lambda self, places, keep, kind: keep + 1)
    with pytest.raises(visprune.ConfigError, match="kept 4 of 9 tokens where it had announced 5"):
        shorten(one, Encoded(torch.rand(9, 8), grid(1, 3, 3)), QWEN)


def places_in_the_model(family: str, picture: str) -> tuple[Any, torch.Tensor, Any]:
    """The model, (t, h, w) of one picture as a method is shown them, and its inputs."""
    model, seen = families.build(family), []
    inputs = families.inputs(family, [[3, picture, 6]])
    with torch.no_grad(), visprune.prune(model, "uniform", keep_ratio=0.5) as run:
        run.observe(lambda site, tokens, context, selection, seconds: seen.append(tokens.pos[0]))
        model(**inputs)
    return model, seen[0], inputs


@pytest.mark.parametrize(
    ("family", "most"), [("llava_onevision", 9), ("llava_onevision_shrunk", 1)]
)
@pytest.mark.parametrize("name", ["a", "b"])
def test_crops_are_interpolated_as_in_the_model(family: str, most: int, name: str) -> None:
    from transformers.models.llava_onevision.modeling_llava_onevision import (
        get_anyres_image_grid_shape,
        unpad_image,
    )

    model, wanted, inputs = places_in_the_model(family, name)
    size = tuple(inputs["image_sizes"][0].tolist())
    pos, free = tiled(model.config, size, get_anyres_image_grid_shape, unpad_image, most=most)
    assert torch.equal(pos, wanted)
    count = int((inputs["input_ids"] == find_adapter(model).token_id("image")).sum())
    assert len(free) == count
    assert int(free.sum()) == len(pos)


def test_frames_are_halved_and_end_with_a_newline() -> None:
    model, wanted, inputs = places_in_the_model("llava_onevision", "v")
    pos, free = pooled(model.config, inputs["pixel_values_videos"].shape[1])
    assert torch.equal(pos, wanted)
    assert free.tolist() == [True] * len(pos) + [False]


def test_tiles_follow_one_another_and_tokens_are_blocks_of_patches() -> None:
    model, wanted, inputs = places_in_the_model("internvl", "a")
    encoder = find_adapter(model).read_encoder
    assert torch.equal(tiles(model.config, len(inputs["pixel_values"])), wanted)
    assert encoder is not None
    assert torch.equal(blocks(model.config), encoder.blocks())


@cases("evs")
def test_a_number_told_ahead_holds_on_stored_clips(case: dict[str, Any]) -> None:
    """Stored outputs of the official rule, through what a server calls."""
    t, p = tensors("evs", case), case["params"]
    if "clips" in p:  # of positions
        return
    pos = grid(p["T"], p["H"] // p["merge"], p["W"] // p["merge"])
    one = asked({"visprune": "evs", "visprune_keep_ratio": 1 - p["q"]})
    assert one.count(pos, "video", QWEN) == p["kept"]
    assert one.count(pos, "image", QWEN) == len(pos)
    _, index = shorten(one, Encoded(t["embeds"], pos, kind="video"), QWEN)
    assert index.tolist() == t["mask"].flatten().nonzero()[:, 0].tolist()


def test_frames_that_share_a_budget_keep_to_it_where_they_are_told() -> None:
    own = {"visprune": "vidcom2", "visprune_num_keep": 5}
    assert asked(own).method.exact
    assert asked(own).count(grid(2, 3, 4), "video", QWEN) == 5
    assert asked(own).count(grid(7, 3, 4), "video", QWEN) == 7
    one = asked({**own, "visprune_params": {"exact": False}})
    assert len(shorten(one, Encoded(torch.rand(12, 8), grid(1, 3, 4)), QWEN)[0]) == 5
    assert one.count(grid(1, 3, 4), "video", QWEN) == 5
    with pytest.raises(visprune.UnsupportedModel, match=r"sees in a clip how many.*or exact=True"):
        one.count(grid(2, 3, 4), "video", QWEN)
    with pytest.raises(visprune.BudgetError):
        one.count(grid(1, 2, 2), "image", QWEN)


@cases("vidcom2")
def test_shares_of_stored_clips_come_to_the_number_told_ahead(case: dict[str, Any]) -> None:
    """The official choice, less or more the few tokens that its shares are beside the budget."""
    t, p = tensors("vidcom2", case), case["params"]
    side = int(p["tokens_per_frame"] ** 0.5)
    pos, official = grid(p["T"], side, side), set(t["kept"].long().tolist())
    one = asked({"visprune": "vidcom2", "visprune_keep_ratio": p["base"]})
    told = one.count(pos, "video", QWEN)
    assert told == max(p["T"], int(p["base"] * len(pos)))
    _, index = shorten(one, Encoded(t["features"], pos, kind="video"), QWEN)
    found = set(index.tolist())
    assert len(index) == told
    assert len(found ^ official) == abs(told - len(official)) < p["T"]


def test_a_model_on_the_hub_carries_its_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the revision that is served; a repository without one, and one that is not there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    saved = visprune.get_method("divprune", num_keep=20).to_dict()
    for name, files in {
        "pruned": {"visprune.json": json.dumps({"method": saved}), "config.json": "{}"},
        "plain": {"config.json": "{}"},
    }.items():
        folder = tmp_path / f"models--me--{name}"
        snapshot = folder / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        for file, text in files.items():
            (snapshot / file).write_text(text)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("a" * 40)
    wanted = {"visprune": "divprune", "visprune_num_keep": 20}
    for revision in (None, "a" * 40):
        found = saved_settings("me/pruned", revision)
        assert found is not None
        assert found.items() >= wanted.items()
    assert asked({}, found).method == visprune.get_method("divprune", num_keep=20)
    assert saved_settings("me/pruned", "b" * 40) is None
    assert saved_settings("me/plain") is None
    assert saved_settings("me/nothing") is None
