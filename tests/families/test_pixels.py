# SPDX-License-Identifier: Apache-2.0
"""Patches left out before the encoder: it computes what it says with them hidden, in less time."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests import tiny as first_tiny
from tests.contract.oracle import alive, assert_close, error, forwards
from tests.families import tiny
from tests.families.oracle import gone_logits
from visprune.backbones.vlm.known import BEFORE, KNOWN
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.find import find_adapter

Inputs = dict[str, Any]
FIRST = ("qwen2_vl", "qwen2_5_vl")
ROWS = [[3, "a", 6], [2, "b", 4, "C", 3]]


@pytest.fixture(scope="module")
def built() -> Any:
    """``built(family)``: a tiny eager model, with windows in Qwen2.5-VL's encoder."""
    known: dict[str, Any] = {}

    def get(family: str, attn: str = "eager") -> Any:
        if (family, attn) not in known:
            make = first_tiny.build if family in FIRST else tiny.build
            known[family, attn] = make(family, attn=attn)
        return known[family, attn]

    return get


def repeated(family: str, rows: list[list[Any]] | None = None, part: float = 0.5) -> Inputs:
    """A batch whose pictures repeat: many blocks are copies of the one to their left."""
    make = first_tiny.inputs if family in FIRST else tiny.inputs
    inputs = dict(make(family, ROWS if rows is None else rows))
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels not in inputs:
            continue
        parts, first = [], 0
        for t, h, w in inputs[f"{kind}_grid_thw"].tolist():
            count = t * h * w
            own = inputs[pixels][first : first + count].reshape(t, h // 2, w // 2, -1).clone()
            draw = torch.Generator().manual_seed(count + first)
            copies = torch.rand(own.shape[:3], generator=draw) < part
            for column in range(1, w // 2):
                same = copies[:, :, column]
                own[:, :, column][same] = own[:, :, column - 1][same]
            parts.append(own.reshape(count, -1))
            first += count
        inputs[pixels] = torch.cat(parts)
    return inputs


def encoded_by_hand(
    tower: Any, pixels: Tensor, grids: Tensor, keep: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """What the encoder makes of all patches with some hidden as keys, in raster order of blocks.

    Args:
        tower: the encoder; its parts are used one by one, with dense masks of our own.
        pixels: ``[P, C]``.
        grids: (t, h, w) of every picture.
        keep: which patches are seen, ``[P]``.

    Returns:
        Features of each block, and those of earlier layers (DeepStack).
    """
    source = importlib.import_module(type(tower).__module__)
    rotate = source.apply_rotary_pos_emb_vision
    places, frame, window, number = [], [], [], 0
    side = getattr(tower, "window_size", 0) // 2 // getattr(tower, "patch_size", 1)
    for t, h, w in grids.tolist():
        for _ in range(t):
            for row in range(h // 2):
                for column in range(w // 2):
                    for dy in (0, 1):
                        for dx in (0, 1):
                            places.append((2 * row + dy, 2 * column + dx))
                            frame.append(number)
                            window.append((number, row // side, column // side) if side else 0)
            number += 1
    x = tower.patch_embed(pixels)
    if hasattr(tower, "pos_embed"):
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        index, weights = get_vision_interpolation_indices_and_weights(
            grids, num_grid_per_side=tower.num_grid_per_side, mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners, spatial_merge_size=2,
        )  # fmt: skip
        x = x + (tower.pos_embed(index) * weights[:, :, None]).sum(1)
    cosine, sine = tower.rotary_pos_emb(x, torch.tensor(places))
    whole = torch.tensor(frame)
    near = torch.tensor([hash(one) for one in window]) if side else whole
    deep = []
    for layer, block in enumerate(tower.blocks):
        full = layer in getattr(tower, "fullatt_block_indexes", range(len(tower.blocks)))
        segment = whole if full else near
        seen = (segment[:, None] == segment) & keep
        seen = seen | torch.eye(len(seen), dtype=torch.bool)
        attn, heads = block.attn, block.attn.num_heads
        query, key, value = attn.qkv(block.norm1(x)).reshape(len(x), 3, heads, -1).unbind(1)
        query, key = rotate(query, key, cosine, sine)
        scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
        mixed = scores.masked_fill(~seen, -1e30).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", mixed, value).flatten(1)
        x = x + attn.proj(out)
        x = x + block.mlp(block.norm2(x))
        if layer in getattr(tower, "deepstack_visual_indexes", ()):
            place = list(tower.deepstack_visual_indexes).index(layer)
            deep.append(tower.deepstack_merger_list[place](x))
    return tower.merger(x), deep


@contextmanager
def hidden_patches(model: Any, keep: Tensor) -> Iterator[None]:
    """Let the untouched model see pictures by :func:`encoded_by_hand`."""
    tower = find_adapter(model).tower

    def after(module: Any, args: Any, kwargs: Inputs, output: Any) -> Any:
        pixels = args[0] if args else kwargs["hidden_states"]
        grids = args[1] if len(args) > 1 else kwargs["grid_thw"]
        found, deep = encoded_by_hand(module, pixels, grids, keep)
        output.pooler_output = found
        if deep:
            output.deepstack_features = deep
        return output

    handle = tower.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def kept_patches(run: Any) -> Tensor:
    """Which patches of the last forward the encoder was given, ``[P]``."""
    parts = []
    for kept, count in zip(run.trace.kept, run.trace.num_tokens, strict=True):
        parts.append(torch.zeros(count, dtype=torch.bool).index_fill(0, kept, True))
    return torch.cat(parts).repeat_interleave(4)


@pytest.mark.parametrize("family", BEFORE)
@torch.no_grad()
def test_leaving_patches_out_is_hiding_them(family: str, built: Any) -> None:
    model, inputs = built(family), repeated(family)
    plain = model(**inputs).logits
    everything = torch.ones(len(inputs["pixel_values"]), dtype=torch.bool)
    with hidden_patches(model, everything):  # our encoder is the model's
        assert error(model(**inputs).logits, plain) <= 1e-5
    with forwards() as seen, visprune.prune(model, "pixelprune") as run:
        logits, trace = model(**inputs).logits, run.trace
    counts = [len(kept) for kept in trace.kept]
    assert all(0 < n < total for n, total in zip(counts, trace.num_tokens, strict=True))
    with hidden_patches(model, kept_patches(run)):
        want = gone_logits(family, model, inputs, alive(seen[0])) if family not in FIRST else (
            _hidden(model, inputs, alive(seen[0]))
        )  # fmt: skip
    there = alive(seen[0])[-1] & inputs["attention_mask"].bool()
    assert_close(logits[there], want[there])
    assert error(plain[there], want[there]) > 1e-3
    assert torch.equal(model(**inputs).logits, plain)


def _hidden(model: Any, inputs: Inputs, keep: list[Tensor]) -> Tensor:
    from tests.contract.oracle import hidden_logits

    return hidden_logits(model, inputs, keep)


@pytest.mark.parametrize("family", BEFORE)
@torch.no_grad()
def test_pictures_without_repeats_change_no_bit(family: str, built: Any) -> None:
    for attention in ("eager", "sdpa"):
        model, inputs = built(family, attention), repeated(family, part=0.0)
        plain = model(**inputs).logits
        with visprune.prune(model, "pixelprune") as run:
            assert torch.equal(model(**inputs).logits, plain)
            assert [len(kept) for kept in run.trace.kept] == run.trace.num_tokens
        before = {name: len(part._forward_hooks) for name, part in model.named_modules()}
        assert before == {name: len(part._forward_hooks) for name, part in model.named_modules()}


@pytest.mark.parametrize("family", BEFORE)
@torch.no_grad()
def test_a_batch_is_its_prompts_and_a_cache_goes_on(family: str, built: Any) -> None:
    model, inputs = built(family, "sdpa"), repeated(family)
    with visprune.prune(model, "pixelprune") as run:
        logits, together = model(**inputs).logits, run.trace
        valid = inputs["attention_mask"].bool()
        taken = 0
        for number, row in enumerate(ROWS):
            alone = _rows_of(inputs, number, taken)
            taken += len(alone["image_grid_thw"])
            assert_close(logits[number, valid[number]], model(**alone).logits[0])
            assert len(run.trace.kept) == len([part for part in row if isinstance(part, str)])
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert answer.shape[1] == inputs["input_ids"].shape[1] + 3
        assert [k.tolist() for k in run.trace.kept] == [k.tolist() for k in together.kept]
    assert together.tokens_per_layer[1][0] == sum(len(kept) for kept in together.kept[1:])


def _rows_of(inputs: Inputs, number: int, first: int) -> Inputs:
    """One row of a batch without its padding."""
    mask = inputs["attention_mask"][number].bool()
    count = len([part for part in ROWS[number] if isinstance(part, str)])
    grids = inputs["image_grid_thw"]
    starts = torch.nn.functional.pad(grids.prod(-1).cumsum(0), (1, 0)).tolist()
    own = {
        name: value[number : number + 1, mask]
        for name, value in inputs.items()
        if name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    return {
        **own,
        "image_grid_thw": grids[first : first + count],
        "pixel_values": inputs["pixel_values"][starts[first] : starts[first + count]],
    }


@pytest.mark.parametrize("family", BEFORE)
@torch.no_grad()
def test_the_encoder_costs_what_a_counter_sees(family: str, built: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, inputs = built(family), repeated(family)
    adapter = find_adapter(model)
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}

    def counted() -> int:
        with FlopCounterMode(display=False) as counter:
            adapter.core.get_image_features(**given)
        return counter.get_total_flops() // 2

    whole = counted()
    with visprune.prune(model, "pixelprune") as run:
        model(**inputs)
        try:
            cost = run.cost()
        except UnsupportedModel:  # a family whose cost was not compared
            assert family == "qwen3_5"
            return
        assert cost.vision + cost.projector == counted() < whole
        assert cost.selection == sum(
            3 * count * 4 * inputs["pixel_values"].shape[1] for count in run.trace.num_tokens
        )


@torch.no_grad()
def test_clips_and_pictures_in_one_prompt(built: Any) -> None:
    for family in FIRST:
        model, inputs = built(family), repeated(family, [[2, "v", 3, "a", 2]])
        with visprune.prune(model, "pixelprune") as run:
            assert torch.isfinite(model(**inputs).logits).all()
            assert all(
                len(kept) < total
                for kept, total in zip(run.trace.kept, run.trace.num_tokens, strict=True)
            )


@torch.no_grad()
def test_what_was_encoded_by_hand(built: Any) -> None:
    model, inputs = built("qwen2_5_vl"), repeated("qwen2_5_vl", [[3, "a", 6]])
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    text = {k: v for k, v in inputs.items() if k not in ("pixel_values",)}
    outside = visprune.encode_images(model, **given)
    with visprune.prune(model, "pixelprune") as run:
        want = model(**inputs).logits
        encoded = visprune.encode_images(model, run=run, **given)
        assert torch.equal(model(**text, mm_encoder_outputs=encoded.select()).logits, want)
        with pytest.raises(ConfigError, match="acts before the vision encoder"):
            model(**text, mm_encoder_outputs=outside.select())


@torch.no_grad()
def test_chains_copies_and_gradients(built: Any) -> None:
    model, inputs = built("qwen2_5_vl"), repeated("qwen2_5_vl", [[3, "a", 6]])
    with visprune.prune(model, "pixelprune") as run:
        alone = model(**inputs).logits
        first = len(run.trace.kept[0])
        twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, alone)
    visprune.remove(twin)
    with visprune.prune(model, "pixelprune+divprune", keep_ratio=0.5) as run:
        model(**inputs)
        assert len(run.trace.kept[0]) == round(0.5 * first)  # of those that are left
        assert run.cost().vision > 0
    with pytest.raises(ConfigError, match="both act before the image encoder"):
        visprune.prune(model, "pixelprune+pixelprune")
    with torch.enable_grad(), visprune.prune(model, "pixelprune"):
        logits = model(**inputs).logits
        (grad,) = torch.autograd.grad(
            logits.square().mean(), [model.model.visual.blocks[0].mlp.gate_proj.weight]
        )
        assert bool(grad.any())
        assert torch.isfinite(grad).all()


def test_others_are_refused_with_the_reason(built: Any) -> None:
    assert set(BEFORE) <= set(KNOWN)
    with pytest.raises(
        UnsupportedModel, match=r"pixelprune leaves patches out before .* whole pict"
    ):
        visprune.prune(first_tiny.build("llava"), "pixelprune")
    with pytest.raises(UnsupportedModel, match="can do without some of its patches is not known"):
        visprune.prune(tiny.build("idefics2"), "pixelprune")
    import timm

    with pytest.raises(UnsupportedModel, match="before a VLM's encoder"):
        visprune.prune(timm.create_model("vit_tiny_patch16_224"), "pixelprune")
