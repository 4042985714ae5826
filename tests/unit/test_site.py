# SPDX-License-Identifier: Apache-2.0
"""Sites: a layer, or a fraction of the depth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visprune.core.site import Site
from visprune.errors import ConfigError


@pytest.mark.parametrize(
    ("layer", "depth", "want"),
    [(7 / 8, 32, 28), (7 / 8, 4, 3), (7 / 8, 28, 24), (0.29, 100, 29), (0.25, 32, 8), (0.01, 8, 1),
     (2, 32, 2), (0, 4, 0), (2.0, 32, 2), (3, 4, 3)],
)  # fmt: skip
def test_resolve(layer: float, depth: int, want: int) -> None:
    assert Site.decoder(layer).resolve(depth) == want


@given(st.floats(0.0, 1.0, exclude_min=True, exclude_max=True), st.integers(2, 128))
def test_a_fraction_is_a_layer_that_exists(fraction: float, depth: int) -> None:
    assert 1 <= Site.decoder(fraction).resolve(depth) < depth


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (4, "decoder layer 4 does not exist: the model has 4 decoder layers, 0 to 3"),
        (-1, "decoder layer -1 does not exist"),
        (1.5, "fractional layer lies between 0 and 1, got 1.5"),
        (-0.5, "got -0.5"),
        (True, "no layer; give an int or a fraction"),
        ("2", "no layer"),
        (None, "no layer"),
        (float("nan"), "got nan"),
        (float("inf"), "got inf"),
    ],
)
def test_layers_that_do_not_exist(layer: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Site("decoder", layer).resolve(4)  # type: ignore[arg-type]


def test_names() -> None:
    assert str(Site.decoder(2)) == "decoder(2)"
    assert str(Site.projector()) == "projector"
    assert str(Site.encoder(0.5)) == "encoder(0.5)"
    assert str(Site.cache()) == "cache"
    assert Site.decoder(2) == Site("decoder", 2)
