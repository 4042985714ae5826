# SPDX-License-Identifier: Apache-2.0
"""Which visual tokens are marks, and where the others lie, against what the encoder does."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import tiny
from visprune.backbones.hf.features import entries
from visprune.backbones.vlm.picture import Picture
from visprune.machine.find import find_adapter

CODES = ("apertus1p5", "emu3", "chameleon", "chameleon_swin")  # codes may be equal
INSIDE = ("phi4_multimodal",)  # encodes where nothing can be asked
FAMILIES = tuple(name for name in tiny.FAMILIES if name not in (*CODES, *INSIDE))
CLIPS = tuple(name for name in FAMILIES if tiny.FAMILIES[name].clip)
PACKED = ("llava_onevision", "llava_onevision_shrunk", "llava_next_video")


def encoded(model: Any, given: dict[str, Any], kind: str) -> tuple[list[Tensor], list[Picture]]:
    """Features of every entry, and what is known of them."""
    core = find_adapter(model).core
    encode = getattr(core, f"get_{kind}_features", None)
    if encode is None:
        encode, given = core.get_image_features, dict(given)
        given["pixel_values"] = given.pop("pixel_values_videos")
    known = inspect.signature(encode).parameters
    given = {k: v for k, v in given.items() if k in known}
    with torch.no_grad():
        output = encode(**given, return_dict=True)
    pieces = find_adapter(model).pieces(given, kind, output)
    return list(entries(output)), [piece for entry in pieces for piece in entry]


def given(family: str, picture: str) -> dict[str, Any]:
    made = tiny.inputs(family, [[3, picture, 2]])
    text = ("input_ids", "attention_mask")
    return {k: v for k, v in made.items() if k not in text and not k.endswith("type_ids")}


@pytest.mark.parametrize("family", FAMILIES)
def test_marks_are_the_tokens_that_no_pixel_changes(family: str, models: Any) -> None:
    model = models(family)
    one, known = encoded(model, given(family, "C"), "image")
    other, _ = encoded(model, given(family, "B"), "image")
    same = (torch.cat(one, -2) == torch.cat(other, -2)).all(-1).flatten()
    assert torch.equal(same, ~torch.cat([picture.free for picture in known]))


@pytest.mark.parametrize("family", CLIPS)
def test_marks_of_clips(family: str, models: Any) -> None:
    model = models(family)
    first = given(family, "v")
    other = {k: x * 0.5 if x.is_floating_point() else x for k, x in first.items()}
    one, known = encoded(model, first, "video")
    two, _ = encoded(model, other, "video")
    same = (torch.cat(one, -2) == torch.cat(two, -2)).all(-1).flatten()
    free = torch.cat([picture.free for picture in known])
    if family == "video_llava":  # what is protected are class tokens
        assert not bool(same.any())
        assert free.view(3, -1).sum(1).tolist() == [36] * 3
        assert not bool(free.view(3, -1)[:, 0].any())
    else:
        assert torch.equal(same, ~free)


def _coordinates(model: Any, tiles: list[tuple[int, int]]) -> Any:
    """A projector that tells row and column of each patch of the crops behind a thumbnail."""
    side = 6
    cells = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1)
    starts = torch.tensor([(0, 0), *[(row * side, column * side) for row, column in tiles]])
    known = (cells.view(1, -1, 2) + starts[:, None]).float()

    def project(features: Tensor) -> Tensor:
        assert features.shape[:2] == known.shape[:2]
        return torch.nn.functional.pad(known, (0, 30))

    return project


@pytest.mark.parametrize("family", PACKED)
def test_places_of_packed_crops_are_those_of_their_patches(family: str) -> None:
    model = tiny.build(family)
    crops = [(row, column) for row in range(2) for column in range(2)]
    model.model.multi_modal_projector.forward = _coordinates(model, crops)
    features, (picture,) = encoded(model, given(family, "C"), "image")
    told = features[0][picture.free][:, :2]
    thumbnail = picture.pos[:, 0] == 0
    assert torch.equal(told[thumbnail], picture.pos[thumbnail, 1:].float())
    rest, pos = told[~thumbnail], picture.pos[~thumbnail, 1:]
    for axis in (0, 1):
        lines = [rest[pos[:, axis] == place, axis] for place in range(int(pos[:, axis].max()) + 1)]
        assert all(float(line.max() - line.min()) < 1e-4 for line in lines)
        centres = torch.stack([line[0] for line in lines])
        steps = centres.diff()
        assert float(steps.min()) > 0.5
        if not family.endswith("_shrunk"):
            assert torch.equal(steps, torch.ones_like(steps))


def test_several_pictures_of_a_sample_are_not_cut(models: Any) -> None:
    # As the processor of LLaVA-OneVision says by `batch_num_images`.
    model = models("llava_onevision")
    made = {
        "pixel_values": torch.randn(2, 1, 3, 24, 24),
        "image_sizes": torch.tensor([[24, 40], [40, 46]]),
        "batch_num_images": torch.tensor([2]),
    }
    features, pictures = encoded(model, made, "image")
    assert [len(one) for one in features] == [37, 37]
    assert [int(picture.free.sum()) for picture in pictures] == [36, 36]
    assert all(not bool(picture.free[-1]) for picture in pictures)


def test_a_picture_without_local_views(models: Any) -> None:
    model = models("deepseek_ocr2")
    features, (small,) = encoded(model, given("deepseek_ocr2", "a"), "image")
    _, (large,) = encoded(model, given("deepseek_ocr2", "A"), "image")
    assert len(large.free) > len(small.free) == len(features[0])
    assert small.placed == "queries"


@pytest.mark.parametrize("picture", ["a", "B"])
def test_rows_of_codes_end_in_a_newline(picture: str, models: Any) -> None:
    model, shown = models("emu3"), given("emu3", picture)
    (features,), (known,) = encoded(model, shown, "image")
    newline = model.get_input_embeddings().weight[tiny.marked.NEWLINE]
    assert torch.equal((features == newline).all(-1), ~known.free)
    assert known.placed == "grid"
    with torch.no_grad():
        output = model.model.get_image_features(**shown, return_dict=True)
    at = output.image_tokens[0][known.pos[:, 1], known.pos[:, 2]]
    wanted = model.get_input_embeddings()(10 + at)
    assert torch.equal(features[known.free], wanted)


def _inside(model: Any, picture: str) -> tuple[Tensor, Picture]:
    """What stands in place of a picture's placeholders, and what is known of it."""
    adapter, known = find_adapter(model), []
    inputs = tiny.inputs("phi4_multimodal", [[3, picture, 2]])
    with torch.no_grad():
        call = adapter.embedded((), inputs, lambda kind, pictures: known.extend(pictures))
    places = inputs["input_ids"][0] == tiny.IMAGE
    return call["inputs_embeds"][0, places], known[0]


def test_marks_of_a_picture_that_is_merged_inside(models: Any) -> None:
    model = models("phi4_multimodal")
    for one, two in ("ab", "AB"):
        (first, known), (second, _) = _inside(model, one), _inside(model, two)
        assert torch.equal((first == second).all(-1), ~known.free)


def test_places_of_crops_that_are_merged_inside() -> None:
    model = tiny.build("phi4_multimodal")
    embed = model.model.embed_tokens_extend.image_embed
    cells = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1)
    starts = torch.tensor([(0, 0), (0, 0), (0, 4)])  # the whole, and two crops side by side
    told = (cells.view(1, -1, 2) + starts[:, None]).float()
    told = torch.nn.functional.pad(told, (0, embed.image_dim_out - 2))
    embed.get_img_features = lambda pixels, attention_mask: told
    embed.img_projection_up.forward = lambda x: torch.nn.functional.pad(x, (0, 8))
    embed.img_projection_down.forward = lambda x: x
    features, picture = _inside(model, "A")
    whole = picture.pos[:, 0] == 1
    assert whole.sum() == 16
    assert picture.pos[~whole].amax(0).tolist() == [0, 3, 5]  # two columns are padding
    wanted = torch.nn.functional.gelu(picture.pos[:, 1:].float())
    assert torch.equal(features[picture.free][:, :2], wanted)
