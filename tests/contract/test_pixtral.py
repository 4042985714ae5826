# SPDX-License-Identifier: Apache-2.0
"""Pixtral under ``llava``: every picture has a grid of its own size, its row ends are text."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)

import visprune
from tests import tiny
from tests.contract import oracle
from tests.contract.cases import METHODS, NEEDS_CLASS_TOKEN, NO_BUDGET, everything, few
from tests.unit import cost_configs
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.find import find_adapter

BREAK, END, STEP = 94, 95, 4
SIZES = {"a": (12, 20), "b": (24, 8), "c": (16, 16)}
READABLE = [
    name
    for name in METHODS
    if name not in NEEDS_CLASS_TOKEN and (name not in NO_BUDGET or name == "keep_all")
]
ROWS: list[list[Any]] = [[3, "a", 6], [2, "b", 4, "c", 3], [5]]
VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "patch_size": STEP,
          "num_attention_heads": 2, "image_size": 24}  # fmt: skip
TEXT = {"sliding_window": None, **tiny._text(4)}


@functools.cache
def pixtral() -> Any:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**VISION), text_config=MistralConfig(**TEXT),
        image_token_id=tiny.IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    model.generation_config.eos_token_id = None
    return model.eval()


def inputs(rows: list[list[Any]]) -> dict[str, Any]:
    """As Pixtral's processor writes them: a break after each row of a picture, an end at last."""
    ids, pixels, sizes = [], [], []
    for row in rows:
        out: list[int] = []
        for place, part in enumerate(row):
            if isinstance(part, int):
                out += tiny._words(part, 0, place * 10 + part)
                continue
            height, width = SIZES[part]
            line = [tiny.IMAGE] * (width // STEP) + [BREAK]
            out += [*(line * (height // STEP))[:-1], END]
            own = tiny._pixels(part, 3, height, width)
            pixels.append(torch.nn.functional.pad(own, (0, 24 - width, 0, 24 - height)))
            sizes.append((height, width))
        ids.append(out)
    made = tiny._finish(ids, "left")
    return {**made, "pixel_values": torch.stack(pixels), "image_sizes": torch.tensor(sizes)}


@pytest.mark.parametrize("name", READABLE)
@torch.no_grad()
def test_keep_all_is_bit_equal(name: str) -> None:
    model, batch = pixtral(), inputs(ROWS)
    options = {"max_new_tokens": 4, "do_sample": False}
    plain, said = model(**batch).logits, model.generate(**batch, **options)
    with visprune.prune(model, name, **everything(name)) as run:
        assert torch.equal(model(**batch).logits, plain)
        assert torch.equal(model.generate(**batch, **options), said)
        assert run.trace.num_tokens == [15, 12, 16]
        assert run.trace.grids == [((1, 3, 5),), ((1, 6, 2),), ((1, 4, 4),)]
    assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("name", [m for m in READABLE if m not in ("keep_all", "pool")])
@torch.no_grad()
def test_drop_equals_hide_as_key_and_row_ends_stay(name: str) -> None:
    model, batch = pixtral(), inputs(ROWS)
    with (
        oracle.forwards() as seen,
        visprune.prune(model, name, **few(name, positions="original")) as run,
    ):
        logits = model(**batch).logits
    keep = oracle.alive(seen[0])
    valid = batch["attention_mask"].bool()
    there = keep[-1] & valid
    oracle.assert_close(logits[there], oracle.hidden_logits(model, batch, keep)[there])
    gone = ~keep[-1] & valid
    assert bool((batch["input_ids"][gone] == tiny.IMAGE).all())
    assert [len(kept) for kept in run.trace.kept] == [5, 5, 5]
    assert int(gone.sum()) == 15 + 12 + 16 - 3 * 5


@pytest.mark.parametrize("name", ["divprune", "random", "todre", "pool"])
@torch.no_grad()
def test_a_batch_equals_singles(name: str) -> None:
    model = pixtral()

    def kept(rows: list[list[Any]]) -> list[Tensor]:
        with visprune.prune(model, name, **few(name)) as run:
            model(**inputs(rows))
            return [k.clone() for k in run.trace.kept]

    together = kept(ROWS)
    alone = [*kept(ROWS[:1]), *kept(ROWS[1:2])]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_its_modules_cost_what_its_config_says() -> None:
    model = pixtral()
    read = find_adapter(model).cost_shape()
    vision = cost_configs.pixtral_vision_shape(model.config.vision_config)
    projector = cost_configs.llava_projector_shape(model.config)
    for name in ("layers", "patch", "prefix", "pooled", "pooled_token"):
        assert getattr(read.vision, name) == getattr(vision, name)
    for name in ("macs_per_token", "merge", "keeps_cls"):
        assert getattr(read.projector, name) == getattr(projector, name)
    assert read.decoder.layers == cost_configs.decoder_shape(model.config.text_config).layers


@torch.no_grad()
def test_cost_and_what_it_is_told_apart_from() -> None:
    model, batch = pixtral(), inputs(ROWS)
    with visprune.prune(model, "divprune", num_keep=5) as run:
        less = run.cost(batch)
    with visprune.prune(model, "keep_all") as run:
        whole = run.cost(batch)
    assert less.vision == whole.vision > 0
    assert less.prefill < whole.prefill
    with pytest.raises(UnsupportedModel, match="class token"):
        visprune.prune(model, "visionzip", num_keep=5)
    with pytest.raises(UnsupportedModel, match="packs all pictures of a call into one sequence"):
        visprune.prune(model, "tome", r=1)
    one = inputs(ROWS[:1])
    cut = {**one, "pixel_values": one["pixel_values"][..., :12, :20]}
    del cut["image_sizes"]  # a single picture may come without
    with visprune.prune(model, "uniform", num_keep=5) as run:
        model(**cut)
        assert run.trace.num_tokens == [15]
        del batch["image_sizes"]
        with pytest.raises(ConfigError, match="3 pictures came without image_sizes"):
            model(**batch)


def test_an_encoder_whose_tokens_are_not_known_is_refused_by_prune() -> None:
    text = {"text_config": MistralConfig(**TEXT), "image_token_id": tiny.IMAGE}
    vit = {"model_type": "vit", **VISION}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vit, **text))
    with pytest.raises(UnsupportedModel, match=r"sees with a ViTModel \(vit\).*clip_vision_model"):
        visprune.prune(model, "divprune", num_keep=5)
    config = LlavaNextConfig(
        vision_config=PixtralVisionConfig(**VISION), **text, image_grid_pinpoints=[[24, 24]]
    )
    with pytest.raises(UnsupportedModel, match=r"PixtralVisionModel \(pixtral\)"):
        visprune.prune(LlavaNextForConditionalGeneration(config), "divprune", num_keep=5)
