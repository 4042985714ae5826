# SPDX-License-Identifier: Apache-2.0
"""The lmms-eval plug-in, against the package if it is installed, else its published interface."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import visprune
from visprune.backbones.vlm import embedded
from visprune.errors import ConfigError, UnsupportedModel
from visprune.eval.models.vlm import PLAIN
from visprune.eval.tasks.embedded.task import EmbeddedTask

ROOT = Path(__file__).parents[2]


def _published() -> dict[str, ModuleType]:
    """What of lmms-eval 0.7 a plug-in meets: names, signatures and fields."""

    class Base:
        is_simple = True

        def __init__(self) -> None:
            self._rank, self._world_size = 0, 1
            self.cache_hook = SimpleNamespace(add_partial=lambda *args: None)
            self.task_dict: dict[str, Any] = {}

    @dataclass
    class TokenCounts:
        input_tokens: int | None = None
        output_tokens: int | None = None
        reasoning_tokens: int | None = None

    @dataclass
    class GenerationResult:
        text: str
        token_counts: TokenCounts | None = None

    @dataclass
    class ChatMessages:
        messages: list[dict[str, Any]]

        def extract_media(self) -> tuple[list[Any], list[Any], list[Any]]:
            parts = [part for message in self.messages for part in message["content"]]
            kinds = ("image", "video", "audio")
            a, b, c = ([p["url"] for p in parts if p["type"] == kind] for kind in kinds)
            return a, b, c

        def to_hf_messages(self) -> list[dict[str, Any]]:
            return [
                {
                    "role": message["role"],
                    "content": [
                        p if p["type"] == "text" else {"type": p["type"], p["type"]: p["url"]}
                        for p in message["content"]
                    ],
                }
                for message in self.messages
            ]

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.api.instance": {
            "GenerationResult": GenerationResult,
            "TokenCounts": TokenCounts,
        },
        "lmms_eval.protocol": {"ChatMessages": ChatMessages},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    modules = {}
    for name, values in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(values)
    return modules


@pytest.fixture(scope="module")
def plugin() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("lmms_eval") is None:
            for name, module in _published().items():
                patch.setitem(sys.modules, name, module)
        yield importlib.import_module("visprune.eval.lmms_eval")
        sys.modules.pop("visprune.eval.lmms_eval")


def _messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    picture = {"type": "image", "url": doc["image"]}
    return [{"role": "user", "content": [picture, {"type": "text", "text": doc["question"]}]}]


def _requests(model: Any, options: list[dict[str, Any]]) -> list[SimpleNamespace]:
    """Requests as lmms-eval makes them for chat models: context, messages, options, doc ..."""
    samples = EmbeddedTask(limit=len(options)).samples()
    docs = [{"question": sample.question, "image": sample.image()} for sample in samples]
    model.task_dict = {"mini": {"test": docs}}
    return [
        SimpleNamespace(args=("", _messages, wanted, number, "mini", "test"))
        for number, wanted in enumerate(options)
    ]


def test_the_entry_point_names_a_chat_model(plugin: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["visprune"].partition(":")
    manifest = getattr(importlib.import_module(module), name)()
    assert manifest.model_id == "visprune"
    assert manifest.chat_class_path == f"{plugin.Visprune.__module__}.{plugin.Visprune.__name__}"
    assert plugin.Visprune.is_simple is False
    wanted = project["optional-dependencies"]["lmms-eval"]
    assert any(row.startswith("lmms-eval") for row in wanted)
    # From 4.3 on filelock has no `_api`, which lmms-eval 0.7.3 imports.
    assert "filelock<4.3" in wanted


def test_it_answers_in_order_whatever_the_batches(plugin: Any) -> None:
    greedy = {"max_new_tokens": 2, "temperature": 0, "do_sample": False, "top_p": None}
    longer = {"max_new_tokens": 3, "until": ["\n\n"], "image_aspect_ratio": "original"}
    options = [greedy, longer, greedy, longer, greedy]
    seen: list[tuple[Any, ...]] = []
    answers = []
    for size in (1, 2):
        model = plugin.Visprune("embedded", method="todre", num_keep=64, batch_size=size)
        model.cache_hook = SimpleNamespace(add_partial=lambda *args: seen.append(args))
        answers.append([r.text for r in model.generate_until(_requests(model, options))])
        assert model.run.method.num_keep == 64
        assert set(model.run.trace.tokens_per_layer[0]) == {64}
        model.run.remove()
    assert answers[0] == answers[1]
    right = [sample.answers[0] for sample in EmbeddedTask(limit=5).samples()]
    assert sum(a == b for a, b in zip(answers[0], right, strict=True)) >= 3
    assert len(seen) == 10
    assert seen[0][0] == "generate_until"
    assert seen[0][1][1] == greedy  # the options that the cache is keyed by


def test_only_model_arguments_say_what_is_pruned(plugin: Any) -> None:
    """lmms-eval's cache knows a model by ``model_args`` alone."""
    with pytest.raises(ConfigError, match="Did you mean 'num_keep'"):
        plugin.Visprune("embedded", method="todre", num_kept=64)
    with pytest.raises(ConfigError, match="without method= there are no parameters, got num_keep"):
        plugin.Visprune("embedded", num_keep=64)
    with pytest.raises(ConfigError, match="method=none takes no parameters"):
        plugin.Visprune("embedded", method="none", num_keep=64)
    whole = plugin.Visprune("embedded")
    assert whole.run is None
    assert not whole.vlm.model.model.language_model._forward_pre_hooks


def test_a_folder_saved_with_a_method_runs_with_it(
    plugin: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = embedded.load(torch.float32)
    with visprune.prune(model, "random", num_keep=8) as run:
        visprune.save_pretrained(run, tmp_path, processor=processor,
                                 asked={"template": PLAIN, "style": "plain"})  # fmt: skip
    options = [{"max_new_tokens": 2}] * 3

    def answers(**arguments: Any) -> tuple[list[str], Any]:
        loaded = plugin.Visprune(str(tmp_path), **arguments)
        found = [r.text for r in loaded.generate_until(_requests(loaded, options))]
        kept = None if loaded.run is None else set(loaded.run.trace.tokens_per_layer[0])
        if loaded.run is not None:
            loaded.run.remove()
        return found, kept

    caplog.set_level("INFO")
    own, kept = answers()
    assert kept == {8}
    assert "was saved with" in caplog.text
    assert "method=none asks the untouched model" in caplog.text
    assert answers(method="random", num_keep=8) == (own, {8})
    assert answers(method="none")[1] is None
    assert answers(method="todre", num_keep=64)[1] == {64}


def test_progress_is_shown(plugin: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = plugin.Visprune("embedded", batch_size=2)
    model.generate_until(_requests(model, [{"max_new_tokens": 1}] * 5))
    err = capsys.readouterr().err
    assert "Model Responding" in err
    assert "5/5" in err


def test_what_it_does_not_do_is_said(plugin: Any) -> None:
    model = plugin.Visprune("embedded")
    with pytest.raises(UnsupportedModel, match="generate_until"):
        model.loglikelihood([])
    film = [{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}]
    model.task_dict = {"mini": {"test": [{}]}}
    request = SimpleNamespace(args=("", lambda doc: film, {}, 0, "mini", "test"))
    with pytest.raises(UnsupportedModel, match="video"):
        model.generate_until([request])


def test_stop_words_cut_the_answer(plugin: Any) -> None:
    assert plugin._cut("yes. ASSISTANT: no\n\n", ["\n\n", "ASSISTANT:"]) == "yes. "
    assert plugin._cut("yes", ["", "no"]) == "yes"
    sampled = plugin._generation({"do_sample": True, "temperature": 0.7, "until": ["x"]})
    assert (sampled["do_sample"], sampled["temperature"]) == (True, 0.7)
    assert "until" not in sampled
    assert plugin._generation({"temperature": 0, "top_p": 1.0}) == {
        "max_new_tokens": 1024, "num_beams": 1, "do_sample": False,
    }  # fmt: skip


def test_a_picture_of_16_bits_is_not_shown_white(plugin: Any) -> None:
    ramp = np.arange(256, dtype=np.float64).reshape(16, 16)
    deep = Image.fromarray((ramp * 257).astype(np.uint16))  # as `datasets` hands it on
    shown: list[np.ndarray] = []
    model = plugin.Visprune("embedded")
    real = model.vlm.processor

    class Looking:
        tokenizer = real.tokenizer

        def __call__(self, *, images: Any, **options: Any) -> Any:
            shown.append(np.asarray(images[0][0]))
            return real(images=images, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    model.vlm.processor = Looking()
    requests = _requests(model, [{"max_new_tokens": 1}])
    model.task_dict["mini"]["test"][0]["image"] = deep
    model.generate_until(requests)
    assert np.array_equal(shown[0][..., 0], ramp)
