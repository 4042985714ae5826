# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own, which find the plug-in as a server's do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for _name, _value in {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(_name, _value)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a family, built once."""
    from tests.serving.vllm.checkpoints import EMBEDDED, build

    made: dict[str, Path] = {"llava": EMBEDDED}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = build(family, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return folder


def options(family: str) -> dict[str, Any]:
    """How engines of a family are started."""
    limits = {"image": 3} if family in ("llava", "llava_next") else {"image": 3, "video": 1}
    return {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 8,
        "limit_mm_per_prompt": limits, "disable_log_stats": True, "block_size": 32,
    }  # fmt: skip


@pytest.fixture(scope="module")
def engines(folders: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """Start an engine for a family; those of the file before are gone."""
    from vllm import LLM

    started: list[Any] = []

    def start(family: str, **more: Any) -> Any:
        model = str(more.pop("model", folders(family)))
        started.append(LLM(model=model, **{**options(family), **more}))
        return started[-1]

    yield start
    for engine in started:
        with contextlib.suppress(Exception):
            engine.llm_engine.engine_core.shutdown()
