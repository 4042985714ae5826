# SPDX-License-Identifier: Apache-2.0
"""Tiny models of all families, built once for each attention implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.families import claimed

Models = Callable[..., Any]


@pytest.fixture(scope="session")
def models() -> Models:
    """``models(name, attn="sdpa")``: a tiny model that tests share and leave as it was."""
    built: dict[Any, Any] = {}

    def get(name: str, attn: str = "sdpa") -> Any:
        if (name, attn) not in built:
            built[name, attn] = claimed.build(name, attn=attn)
        return built[name, attn]

    return get
