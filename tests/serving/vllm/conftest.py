# SPDX-License-Identifier: Apache-2.0
"""Engines that tests share, which find the plug-in as a server's do.

They live in this process; the server and the benchmark have theirs in processes of their own.
"""

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
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # tests look into workers
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(_name, _value)

ENGINES = 3


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
    # One engine for all that ask LLaVA: by the encoder's cache alone, three whole pictures a call.
    more = {"enable_prefix_caching": False, "max_num_batched_tokens": 1800}
    limits = {"image": 3} if family in ("llava", "llava_next") else {"image": 3, "video": 1}
    return {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 8,
        "limit_mm_per_prompt": limits, "disable_log_stats": True, "block_size": 32,
        **(more if family == "llava" else {}),
    }  # fmt: skip


@pytest.fixture(scope="session")
def engines(folders: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """An engine for a family, started once; the few that were asked for last live."""
    from vllm import LLM, envs

    alive: dict[str, Any] = {}

    def end(name: str) -> None:
        with contextlib.suppress(Exception):
            alive.pop(name).llm_engine.engine_core.shutdown()

    def start(family: str, **more: Any) -> Any:
        given = {"model": str(more.pop("model", folders(family))), **options(family), **more}
        name = repr(given)
        if name in alive:
            alive[name] = alive.pop(name)
        else:
            if len(alive) == ENGINES:
                end(next(iter(alive)))
            # In this process: on a CPU each of the two that vLLM would start imports it anew.
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
                alive[name] = LLM(**given)
            envs.disable_envs_cache()  # which would hold on to that setting
        return alive[name]

    yield start
    for name in list(alive):
        end(name)
