# SPDX-License-Identifier: Apache-2.0
"""Without settings vLLM is what it was, to the bit; the plug-in can be left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serving.vllm.checkpoints import named_as_before

SCRIPT = """
import json, sys
from tests.serving.vllm.asking import picture, request, sampling
from tests.serving.vllm.conftest import options
from vllm import LLM

if __name__ == "__main__":
    family, folder, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    engine = LLM(model=folder, **options(family))
    pictures = [[picture(140, 280)], [picture(280, 140), picture(56, 56)], []]
    found = []
    for own in settings:
        assert engine.reset_prefix_cache()
        requests = [request(family, one, own) for one in pictures]
        found += engine.generate(requests, sampling(), use_tqdm=False)
    print("FOUND" + json.dumps([
        [o.prompt_token_ids, o.outputs[0].token_ids,
         [{t: e.logprob for t, e in step.items()} for step in o.outputs[0].logprobs]]
        for o in found
    ]))
"""


def answers(family: str, folder: Path, *settings: dict[str, Any], **environment: str) -> Any:
    """What an engine in a process of its own answers under each of some settings."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, family, str(folder), json.dumps(settings)],
        capture_output=True, text=True, timeout=300, check=False,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": ".", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment},
    )  # fmt: skip
    lines = [x for x in done.stdout.splitlines() if x.startswith("FOUND")]
    assert lines, done.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("FOUND"))
    return [found[n : n + 3] for n in range(0, len(found), 3)]


SLOW = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "internvl")


@pytest.mark.parametrize(
    "family", ["qwen3_vl", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)]
)
def test_nothing_asked_for_changes_no_bit(
    family: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folders(family)
    if family.startswith("llava"):  # whose towers vLLM itself knows by older names
        folder = named_as_before(folder, tmp_path / "model")
    few = {"visprune": "uniform", "visprune_num_keep": 3}
    with ThreadPoolExecutor(2) as pool:  # each imports vLLM, on one core
        bare = pool.submit(answers, family, folder, {}, VLLM_PLUGINS="")
        whole, kept, pruned = answers(family, folder, {}, {"visprune": "keep_all"}, few)
        (stock,) = bare.result()
    assert whole == stock
    assert kept == stock
    assert [len(p[0]) < len(q[0]) for p, q in zip(pruned, stock, strict=True)] == [
        True,
        True,
        False,
    ]
    assert pruned[2] == stock[2], "words alone"
