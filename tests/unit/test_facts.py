# SPDX-License-Identifier: Apache-2.0
"""What users choose a method by is what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest

import visprune
from visprune.catalog import methods
from visprune.eval.report.methods import measured_columns
from visprune.machine.facts import KEEP, SPEC, Facts, facts, mean_tokens, page
from visprune.methods import LABELS

FACTS: dict[str, Facts] = {name: facts(name) for name in methods.names()}


def test_the_page_is_what_the_code_says() -> None:
    stored = Path(__file__).parents[2] / "METHODS.md"
    assert stored.read_text(encoding="utf-8") == page(measured_columns()), (
        "visprune methods --page > METHODS.md"
    )


def test_every_number_that_is_no_number_of_a_layer_is_named() -> None:
    def inside(name: str) -> bool:
        return any(where.startswith("decoder") for where in FACTS[name].where)

    other = {n for n, f in FACTS.items() if inside(n) and f.mean is not None and f.mean != KEEP}
    assert other | {"gemfilter"} == set(LABELS)  # whose first pass is no pruned layer
    assert visprune.get_method("gemfilter", num_keep=KEEP).signal(SPEC).at == 13
    for name in set(LABELS) - {"sparsevlm"}:
        assert f"num_keep={KEEP} is {FACTS[name].mean:.1f}" in LABELS[name]
    own = mean_tokens(visprune.get_method("v2drop"))
    assert f"its own ratios are {own:.1f}" in LABELS["v2drop"]
    assert mean_tokens(visprune.get_method("vscan", num_keep=32)) == 64.0


@pytest.mark.parametrize("version", [1, 2])
def test_the_settings_of_sparsevlm(version: int) -> None:
    found = [
        mean_tokens(visprune.get_method("sparsevlm", setting=setting, version=version))
        for setting in (192, 128, 96, 64)
    ]
    assert all(mean is not None for mean in found)
    text = ", ".join(f"{mean:.1f}" for mean in found[:3]) + f" and {found[3]:.1f}"
    assert text in LABELS["sparsevlm"]


@pytest.mark.parametrize(
    ("name", "where", "sees"),
    [
        ("todre", ("projector", "decoder 28"), ("ClsAttention", "VisualShare")),
        ("v2drop", ("decoder 3, 18, 25",), ("HiddenStates",)),  # 3, 16 and 22 of 28
        ("tome", ("every encoder layer",), ("EncoderKeys",)),
        ("uniform", ("projector",), ()),
    ],
)
def test_where_a_method_acts_and_what_it_is_shown(name: str, where: object, sees: object) -> None:
    assert FACTS[name].where == where
    assert FACTS[name].sees == sees


def test_what_a_method_asks_of_a_model() -> None:
    assert "a class token" in FACTS["visionzip"].asks
    assert FACTS["v2drop"].asks == ()
    assert FACTS["evit"].asks == ("an encoder that can be reduced",)
    assert not FACTS["tome"].kernel
    assert FACTS["fastv"].kernel
    assert FACTS["pact"].adaptive
    assert not FACTS["fastv"].adaptive
    assert FACTS["divprune"].macs > 50 * FACTS["dart"].macs > 0
