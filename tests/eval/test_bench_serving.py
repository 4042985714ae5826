# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a server without one: its arithmetic, its prompts, what it refuses.

tests/serving/vllm runs it with an engine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoProcessor

from visprune.backbones.vlm.embedded import WEIGHTS
from visprune.errors import ConfigError, UnsupportedModel, VispruneError
from visprune.eval.speed import bench_serving
from visprune.eval.speed.bench_serving import DENSE, LONG, SHORT, Asking, measure, row, write
from visprune.eval.speed.ideal import SHAPES
from visprune.eval.speed.latency import Timings
from visprune.serving.engine import Prompt
from visprune.serving.stream import Arrived


class Server:
    """Answers at once, with prompts as long as they would be, or longer by ``off``."""

    def __init__(self, off: int = 0) -> None:
        self.off = off
        self.asked: list[tuple[int, int, Prompt]] = []

    def burst(self, prompts: Sequence[Prompt], *, clients: int, new_tokens: int) -> list[Arrived]:
        self.asked += [(clients, new_tokens, one) for one in prompts]
        return [Arrived(self.length(one), new_tokens, 0.1, 0.2) for one in prompts]

    def length(self, one: Prompt) -> int:
        if one.image is None:
            return len(one.ids)
        if one.settings["visprune"] is None:
            return len(one.ids) - 1 + 576
        return len(one.ids) - 1 + round(one.settings["visprune_keep_ratio"] * 576) + self.off


def measured(server: Server, *methods: str, **more: Any) -> list[dict[str, Any]]:
    given: dict[str, Any] = {
        "keep_ratio": 0.25,
        "requests": 2,
        "new_tokens": 3,
        "rounds": 2,
        **more,
    }
    return measure(server, Asking(WEIGHTS), methods, [1, 2], **given)


def test_each_case_is_asked_by_all_clients_with_pictures_of_its_own() -> None:
    server = Server()
    rows = measured(server, "random", "divprune")
    assert [(x["clients"], x["method"], x["prompt"]) for x in rows] == [
        (n, name, 40 + kept) for n in (1, 2)
        for name, kept in ((DENSE, 576), ("random", 144), ("divprune", 144))
    ]  # fmt: skip
    timed = server.asked[3:]  # behind the lengths
    # Five cases, one round to warm up, two requests of each client.
    assert [clients for clients, _, _ in timed].count(2) == 5 * 3 * 2 * 2
    pictures = [one.image.tobytes() for _, _, one in server.asked if one.image is not None]
    assert len(set(pictures)) == len(pictures)
    assert {len(one.ids) for _, _, one in timed if one.image is None} == {616, 184}
    for _, _, one in server.asked:
        assert list(one.ids).count(4) == (one.image is not None), "words hold no mark of a picture"


def test_the_promise_is_a_short_prompt_and_what_a_picture_costs() -> None:
    seconds = {DENSE: [10.0, 20.0], LONG: [8.0, 16.0], SHORT: [2.0, 4.0], "random": [5.0, 8.0]}
    answers = {name: [[Arrived(9, 1, 0.1 * n, 1.0)] for n in (1, 3)] for name in seconds}
    found = row("random", 4, 8, Timings(seconds), answers)
    assert found["requests_per_s"] == pytest.approx(8 / 6.5)
    assert found["ttft_ms"] == pytest.approx(100.0)
    assert found["speedup"] == pytest.approx(2.25)  # 10 / 5 and 20 / 8
    # Pictures cost 2 and 4, so 3: the promise is 2 + 3 and 4 + 3.
    assert found["promised"] == pytest.approx((10 / 5 + 20 / 7) / 2)
    assert found["share"] == pytest.approx((5 / 5 + 7 / 8) / 2)
    assert row(DENSE, 4, 8, Timings(seconds), answers)["share"] is None


def test_prompts_of_another_length_are_not_timed() -> None:
    with pytest.raises(
        VispruneError, match=r"random: its prompt has 185 tokens.*it would have 184"
    ):
        measured(Server(off=1), "random")
    with pytest.raises(UnsupportedModel, match="inside the decoder"):
        measured(Server(), "fastv")
    with pytest.raises(ConfigError, match="at least one"):
        measured(Server(), "random", rounds=0)


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="bench serving needs vLLM in this environment") as said:
        bench_serving.main(["--quick"])
    assert "engine transformers" not in str(said.value)


def test_the_model_that_is_written_goes_with_its_processor(tmp_path: Path) -> None:
    folder, sizes = write("quick", tmp_path, "bfloat16"), SHAPES["quick"]
    config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert config.dtype == torch.bfloat16
    assert config.text_config.vocab_size == sizes.vocabulary
    prompt = Asking(folder)({})
    assert prompt.image is not None
    made = processor(text="<image>", images=prompt.image, return_tensors="pt")
    assert (made["input_ids"] == config.image_token_id).sum() == sizes.visual_tokens
    assert made["pixel_values"].shape[-2:] == (sizes.image, sizes.image)
    assert list(prompt.ids).count(config.image_token_id) == 1
