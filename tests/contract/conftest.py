# SPDX-License-Identifier: Apache-2.0
"""Tiny models, built once for each family and attention implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import tiny

Models = Callable[..., Any]


@pytest.fixture(scope="session")
def models() -> Models:
    """``models(family, attn="sdpa")``: a tiny model that tests share and leave as it was."""
    built: dict[Any, Any] = {}

    def get(family: str, attn: str = "sdpa") -> Any:
        if (family, attn) not in built:
            model = tiny.build(family, attn=attn)
            # transformers puts hooks of its own on the vision tower when it first runs.
            with torch.no_grad():
                model(**tiny.inputs(family, [[1, "a", 1]]))
            built[family, attn] = model
        return built[family, attn]

    return get
