# SPDX-License-Identifier: Apache-2.0
"""The table of families that users read is the registry's, and says what the suite proves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import visprune
from tests.families import tiny
from visprune.backbones.vlm.known import KNOWN, table

README = Path(__file__).parents[2] / "README.md"


def test_every_family_of_the_registry_is_known() -> None:
    assert list(KNOWN) == visprune.list_models()


def test_the_readme_has_the_table() -> None:
    assert table() in README.read_text(encoding="utf-8")


def test_clips_are_told_where_they_are_proved(models: Any) -> None:
    proved = {models(name).config.model_type for name, spec in tiny.FAMILIES.items() if spec.clip}
    told = {kind for kind, (_, shown) in KNOWN.items() if "clips" in shown}
    assert told - {"qwen2_vl", "qwen2_5_vl"} == proved
