# SPDX-License-Identifier: Apache-2.0
"""Pictures of several sizes in one padded batch: each is reduced as if it were alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import visprune
from tests.encoders import hf, small
from visprune.errors import UnsupportedModel

SHAPES = [(4, 6), (3, 4), (6, 4), (2, 3)]
METHODS: dict[str, dict[str, Any]] = {
    "tome": {"r": 3},
    "pitome": {"keep_ratio": 0.8},
    "evit": {"keep_ratio": 0.6},
    "topk": {"keep_ratio": 0.6},
    "random": {"keep_ratio": 0.6},
    "uniform": {"keep_ratio": 0.6},
    "spatten": {"keep_ratio": 0.6},
    "ficoco_v": {"r": 2},
    "ipcv": {"keep_ratio": 0.4, "attention_stabilization": 1, "top_k": 3},
}
NAFLEX = timm.list_models("naflexvit*")


@functools.cache
def naflex(name: str) -> Any:
    """``name`` with two layers, 48 features and small patches."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"embed_dim": 48, "num_heads": 4, "depth": 3, "num_classes": 5}
    return small.enlarged(timm.create_model(name, patch_size=4, **options)).eval()


def patches(shapes: list[tuple[int, int]], width: int) -> dict[str, Tensor]:
    """A batch as timm's loader gives it, each picture the same whatever else is in it."""
    most = max(h * w for h, w in shapes)
    batch = {
        "patches": torch.zeros(len(shapes), most, width),
        "patch_coord": torch.zeros(len(shapes), most, 2, dtype=torch.int64),
        "patch_valid": torch.zeros(len(shapes), most, dtype=torch.bool),
    }
    for row, (h, w) in enumerate(shapes):
        generator = torch.Generator().manual_seed(h * 100 + w)
        batch["patches"][row, : h * w] = torch.randn(h * w, width, generator=generator)
        batch["patch_coord"][row, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        batch["patch_valid"][row, : h * w] = True
    return batch


def siglip(shapes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """The same for SigLIP 2 of transformers."""
    batch = patches(shapes, 3 * hf.PATCH * hf.PATCH)
    return {
        "pixel_values": batch["patches"],
        "pixel_attention_mask": batch["patch_valid"].to(torch.int64),
        "spatial_shapes": torch.tensor(shapes),
    }


def fits(model: Any, method: str) -> bool:
    """Whether a model has what a method reads."""
    try:
        visprune.prune(model, method, **METHODS[method]).remove()
    except UnsupportedModel:
        return False
    return True


@pytest.mark.parametrize("name", NAFLEX)
@torch.no_grad()
def test_every_registered_configuration_takes_pixels_and_lists_of_patches(name: str) -> None:
    model, shapes = naflex(name), SHAPES[:2]
    pixels = torch.randn(2, 3, 16, 24)
    for x in (pixels, patches(shapes, 48), patches([(4, 6)] * 2, 48)):
        want = model(x)
        assert bool(torch.isfinite(want).all())
        for method, params in (("tome", {"r": 0}), ("pitome", {"keep_ratio": 1.0})):
            with visprune.prune(model, method, **params):
                assert torch.equal(model(x), want), method
        with visprune.prune(model, "tome", r=2) as run:
            got = model(x)
            totals = run.trace.num_tokens
            assert run.trace.mlp_tokens_per_layer == [[n - 2, n - 4, n - 6] for n in totals]
        assert got.shape == want.shape
        assert not torch.equal(got, want)
        assert torch.equal(model(x), want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name",
    [
        "naflexvit_so150m2_patch16_reg1_map",
        "naflexvit_base_patch16_gap",
        "naflexvit_base_patch16_radio_v3",
        "rope",
    ],
)
@torch.no_grad()
def test_a_padded_batch_is_its_pictures_alone(name: str, method: str) -> None:
    model = _rope() if name == "rope" else naflex(name)
    if not fits(model, method):
        pytest.skip(f"{method} is refused there")
    with visprune.prune(model, method, **METHODS[method]) as run:
        together = model(patches(SHAPES, 48))
        traced, kept = run.trace, run.kept
        assert traced.num_tokens == [h * w for h, w in SHAPES]
        assert traced.grids == [((1, h, w),) for h, w in SHAPES]
        whole = run.cost().macs
        alone = 0
        for row, shape in enumerate(SHAPES):
            got = model(patches([shape], 48))
            torch.testing.assert_close(together[row], got[0], rtol=2e-5, atol=2e-5)
            assert torch.equal(run.kept[0], kept[row])
            assert run.trace.tokens_per_layer[0] == traced.tokens_per_layer[row]
            assert torch.equal(run.trace.pos[0], traced.pos[row])
            assert torch.equal(run.trace.slots[0], traced.slots[row])
            alone += run.cost().macs
        assert whole == alone


def _rope() -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"embed_dim": 48, "num_heads": 4, "depth": 3, "num_classes": 5}
    options |= {"patch_size": 4, "rope_type": "axial", "class_token": True, "global_pool": "avg"}
    return small.enlarged(timm.create_model("naflexvit_base_patch16_gap", **options)).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["Siglip2VisionModel", "Siglip2ForImageClassification"])
@torch.no_grad()
def test_siglip2_in_a_padded_batch(kind: str, method: str) -> None:
    model = hf.shared(kind)
    if not fits(model, method):
        pytest.skip(f"{method} is refused there")
    with visprune.prune(model, method, **METHODS[method]) as run:
        together, kept = hf.answer(model(**siglip(SHAPES))), run.kept
        for row, shape in enumerate(SHAPES):
            got = hf.answer(model(**siglip([shape])))
            torch.testing.assert_close(together[row], got[0], rtol=2e-5, atol=2e-5)
            assert torch.equal(run.kept[0], kept[row])


@torch.no_grad()
def test_nothing_left_changes_no_bit_of_a_padded_batch() -> None:
    for kind in ("Siglip2VisionModel", "Siglip2ForImageClassification"):
        model, x = hf.shared(kind), siglip(SHAPES)
        want = hf.answer(model(**x))
        for method, params in (("tome", {"r": 0}), ("ipcv", {"keep_ratio": 1.0})):
            with visprune.prune(model, method, **params):
                assert torch.equal(hf.answer(model(**x)), want)


@torch.no_grad()
def test_features_of_all_patches() -> None:
    model, x = naflex("naflexvit_base_patch16_gap"), patches(SHAPES, 48)
    with visprune.prune(model, "tome", r=2) as run:
        features = model.forward_features(**x)
        assert features["patches"].shape[1] - model.num_prefix_tokens == 18
        assert features["patch_valid"].sum(1).tolist() == [18, 6, 18, 1]
        whole = run.expand(features["patches"][:, model.num_prefix_tokens :])
        assert whole.shape[:2] == (4, 24)
        assert bool((whole[1, 12:] == 0).all())
        assert bool((whole[1, :12] != 0).any(1).all())
        maps = model.forward_intermediates(
            x, indices=[0, 2], output_fmt="NLC", intermediates_only=True
        )
        assert [tuple(m.shape[:2]) for m in maps] == [(4, 24)] * 2


def test_gradients_of_a_padded_batch() -> None:
    model, x = naflex("naflexvit_base_patch16_gap"), patches(SHAPES, 48)
    with visprune.prune(model, "tome", r=2):
        model(x).square().sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert found
    assert all(bool(torch.isfinite(g).all()) for g in found)
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_masks_that_hide_more_than_padding_are_refused() -> None:
    model, x = naflex("naflexvit_base_patch16_gap"), patches(SHAPES, 48)
    with visprune.prune(model, "tome", r=2):
        x["patch_valid"][0, 3] = False
        with pytest.raises(UnsupportedModel, match="raster order"):
            model(x)
    x = siglip(SHAPES)
    x["pixel_attention_mask"][1] = 1
    model = hf.shared("Siglip2VisionModel")
    with (
        visprune.prune(model, "tome", r=2),
        pytest.raises(UnsupportedModel, match="does not hide exactly"),
    ):
        model(**x)
