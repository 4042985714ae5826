# SPDX-License-Identifier: Apache-2.0
"""`visprune serve-info`: what is taken over, what fits and why the rest does not."""

from __future__ import annotations

from pathlib import Path

import pytest

import visprune
from visprune.backbones.vlm import embedded
from visprune.catalog import list_methods
from visprune.errors import ConfigError
from visprune.serving.info import serve_info
from visprune.serving.vllm import ARCHITECTURES


def test_every_method_fits_or_has_a_reason() -> None:
    server, taken, *rest = serve_info()
    assert "vLLM is not installed here" in server or "the plug-in is" in server
    assert all(name in taken for name in ARCHITECTURES)
    for kind in ("LLaVA with CLIP: ", "Qwen-VL: "):
        start = next(n for n, line in enumerate(rest) if line.startswith(kind))
        fits = set(rest[start].removeprefix(kind).split(", "))
        refused = {}
        for line in rest[start + 1 :]:
            if not line.startswith("  not "):
                break
            name, _, reason = line.removeprefix("  not ").partition(": ")
            refused[name] = reason
        assert fits | refused.keys() == set(list_methods())
        assert not fits & refused.keys()
        assert {"todre", "divprune", "random", "uniform", "pool", "evs", "vidcom2"} <= fits
        assert all(refused.values())
        assert "inside the decoder" in refused["fastv"]


def test_a_model_is_looked_at_and_its_saved_method_told(tmp_path: Path) -> None:
    assert any(
        line.startswith("LlavaForConditionalGeneration: ") and "visionzip" in line
        for line in serve_info(str(embedded.WEIGHTS))
    )
    model, processor = embedded.load()
    with visprune.prune(model, "divprune", num_keep=20) as run:
        visprune.save_pretrained(run, tmp_path, processor=processor)
    (line,) = [x for x in serve_info(str(tmp_path)) if x.startswith("default")]
    assert '"visprune": "divprune"' in line
    assert '"visprune_num_keep": 20' in line
    with pytest.raises(ConfigError, match="is no model of transformers"):
        serve_info(str(tmp_path / "nothing"))
