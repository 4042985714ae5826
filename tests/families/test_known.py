# SPDX-License-Identifier: Apache-2.0
"""The table of families that users read is the registry's, and says what the suite proves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import visprune
from tests import tiny as four
from tests.families import tiny
from visprune.backbones.vlm import known
from visprune.backbones.vlm.known import KNOWN, table
from visprune.catalog import model_names
from visprune.errors import UnsupportedModel
from visprune.machine.find import find_adapter
from visprune.machine.plan import fitting

README = Path(__file__).parents[2] / "README.md"


def test_every_family_of_the_registry_is_known() -> None:
    assert list(KNOWN) == model_names()
    rows = visprune.list_models()
    assert [row.name for row in rows] == [*model_names(), *model_names("vit")]
    assert [row.name for row in visprune.list_models("encoder")] == model_names("vit")
    assert all(row.models and row.takes for row in rows)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *known.FIRST])
def test_what_is_told_of_a_family_is_what_its_adapter_says(family: str, models: Any) -> None:
    model = four.build(family) if family in known.FIRST else models(family)
    adapter, spec = find_adapter(model), find_adapter(model).spec
    rows = {row.name: row for row in visprune.list_models("vlm")}
    row = rows[model.config.model_type]
    shown = {"class token": "cls_token", "attention": "encoder_attention"}
    shown["features"] = "encoder_features"
    can = {told for told, asked in shown.items() if not spec.why_not(asked)}
    assert set(row.signals) == can, "READ, CLASS_TOKEN"
    counted = True
    try:
        adapter.cost_shape()
    except UnsupportedModel:
        counted = False
    if family != "gemma4_small":  # whose layers share keys: refused by the model, not the family
        assert row.cost == counted, "COUNTED"
    assert (row.name in known.THREE_AXES) == spec.multi_axis_rope, "THREE_AXES"
    assert row.methods == fitting(spec)


def test_the_list_is_read_without_pytorch() -> None:
    code = "import sys, visprune; rows = visprune.list_models(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_encoder_takes_what_acts_inside_one() -> None:
    rows = {row.name: row for row in visprune.list_models("encoder")}
    taken = rows["timm.VisionTransformer"].methods
    assert "tome" in taken
    assert "divprune" not in taken


def test_the_readme_has_the_table() -> None:
    assert table() in README.read_text(encoding="utf-8")


def test_clips_are_told_where_they_are_proved(models: Any) -> None:
    proved = {models(name).config.model_type for name, spec in tiny.FAMILIES.items() if spec.clip}
    told = {kind for kind, (_, shown) in KNOWN.items() if "clips" in shown}
    assert told - {"qwen2_vl", "qwen2_5_vl"} == proved
