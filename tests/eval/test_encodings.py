# SPDX-License-Identifier: Apache-2.0
"""A picture is encoded once for all that is asked about it, and nothing in an answer tells."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import visprune
from tests.contract.test_processors import built, photo
from tests.eval.small import small_embedded
from tests.eval.test_evaluate import answers, requests
from visprune.eval.models.base import Request
from visprune.eval.models.encodings import Encodings
from visprune.eval.models.held import Held
from visprune.eval.models.vlm import PLAIN, VLM
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.run.album import picture_hash
from visprune.eval.run.progress import Silent
from visprune.eval.run.runner import run_study
from visprune.eval.study.grid import build_study
from visprune.eval.tasks.embedded.task import EmbeddedTask


@pytest.fixture(scope="module")
def vlm() -> VLM:
    torch.set_num_threads(1)
    model, processor = small_embedded()
    return VLM(model, processor, name="small", style="plain", template=PLAIN)


class Counted:
    """How many pictures went through the encoder while this is a context."""

    def __init__(self, vlm: VLM) -> None:
        self.pictures = 0
        self._encoder = vlm.model.model.vision_tower

    def __enter__(self) -> Counted:
        def count(module: Any, args: Any, kwargs: Any) -> None:
            self.pictures += len(kwargs.get("pixel_values", args[0] if args else None))

        self._hook = self._encoder.register_forward_pre_hook(count, with_kwargs=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hook.remove()


OUTSIDE = ["none", "keep_all", "todre", "fastv", "visionzip", "random", "pool"]
INSIDE = ["tome"]


def method(name: str) -> Any:
    budget = {"none": {}, "keep_all": {}, "tome": {"r": 20}}.get(name, {"num_keep": 30})
    return name if name == "none" else visprune.get_method(name, **budget)


@pytest.mark.parametrize("size", [1, 9])
@pytest.mark.parametrize("name", OUTSIDE + INSIDE)
def test_shared_pictures_answer_as_pictures_of_their_own(vlm: VLM, name: str, size: int) -> None:
    """Text, length, tokens, cost, cache and kept patches; two pictures, nine questions."""
    shared = requests(9)
    alone = [dataclasses.replace(request, digest=None) for request in shared]
    assert len({request.digest for request in shared}) == 2
    with Counted(vlm) as counted:
        once = answers(vlm, method(name), shared, size)
    assert counted.pictures == 2
    with Counted(vlm) as counted:
        each = answers(vlm, method(name), alone, size)
    assert counted.pictures == 9
    assert once == each


def test_methods_outside_the_encoder_share_and_one_inside_does_not(vlm: VLM) -> None:
    keys = [vlm.encodes(method(name)) for name in (*OUTSIDE, "none")]
    assert set(keys) == {None}
    gentle, strong = visprune.get_method("tome", r=20), visprune.get_method("tome", r=30)
    assert len({None, vlm.encodes(gentle), vlm.encodes(strong)}) == 3
    assert vlm.encodes(visprune.get_method("tome", r=20)) == vlm.encodes(gentle)


def test_an_encoding_of_one_reduction_is_not_taken_for_another(vlm: VLM) -> None:
    asked = requests(2)
    first = answers(vlm, visprune.get_method("tome", r=20), asked, 2)
    with vlm.answering(visprune.get_method("tome", r=30), *_options(vlm)) as answerer:
        without_forgetting = answerer(asked)
    assert without_forgetting == answers(vlm, visprune.get_method("tome", r=30), asked, 2)
    assert without_forgetting != first


def _options(vlm: VLM) -> tuple[Any, ...]:
    task = EmbeddedTask()
    return task, "plain", vlm.generation(task, {})


def test_a_study_encodes_each_picture_once_for_all_cells(vlm: VLM, tmp_path: Path) -> None:
    study = build_study(
        {
            "models": ["small"], "tasks": [{"task": "embedded", "limit": 21}], "batch_size": 4,
            "methods": ["todre", "fastv", {"method": "tome", "r": 20}],
            "budgets": [64, 32], "controls": ["none", "keep_all", "no_image", "random"],
        }
    )  # fmt: skip
    with Counted(vlm) as counted:
        folder = run_study(study, tmp_path, loader=lambda _: vlm)
    assert len(folder.records()) == 21 * 10
    pictures = len({record.cluster for record in folder.records()})
    assert pictures > 2
    assert not [record.error for record in folder.records() if record.error]
    assert counted.pictures == 2 * pictures  # tome sees them through an encoder of its own
    assert not len(vlm.encodings._encoded)  # and nothing is held afterwards


def test_a_processor_that_does_more_is_left_to_do_it(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that writes words of its own into a prompt: its prompts are not rebuilt without it."""
    model, processor = small_embedded()
    real = type(processor).__call__

    def chatty(self: Any, *args: Any, text: Any = None, **options: Any) -> Any:
        return real(self, *args, text=[f"{line} what" for line in text], **options)

    monkeypatch.setattr(type(processor), "__call__", chatty)
    other = VLM(model, processor, name="small", style="plain", template=PLAIN)
    asked = requests(2)
    with Counted(other) as counted:
        outputs = answers(other, method("todre"), asked, 2)
    assert not other.encodings.shares
    assert counted.pictures == 2
    alone = [dataclasses.replace(request, digest=None) for request in asked]
    assert outputs == answers(other, method("todre"), alone, 2)


def test_models_that_take_no_encoded_pictures_are_asked_with_pixels(vlm: VLM) -> None:
    assert not Encodings(vlm.model, vlm.processor, None).shares


def test_what_does_not_fit_is_made_again_and_what_fits_stays() -> None:
    held: Held[bytes] = Held(10, len)
    made: list[str] = []

    def get(key: str, size: int) -> bytes:
        def make() -> bytes:
            made.append(key)
            return bytes(size)

        return held.get(key, make)

    for _ in range(3):
        for key in ("a", "b", "c"):
            assert len(get(key, 4)) == 4
    assert made == ["a", "b", "c", "c", "c"]
    held.forget()
    get("c", 4)
    get("c", 4)
    assert made[5:] == ["c"]


def test_records_of_a_batch_are_those_of_single_questions(vlm: VLM, tmp_path: Path) -> None:
    """Through the runner: batches by length, of a block's questions, against one at a time."""

    def run(size: int) -> list[dict[str, Any]]:
        study = build_study(
            {
                "models": ["small"], "tasks": [{"task": "embedded", "limit": 25}],
                "batch_size": size, "methods": ["todre", "fastv", "visionzip"], "budgets": [32],
                "controls": ["none", "no_image", "pool"],
            }
        )  # fmt: skip
        folder: ResultsFolder = run_study(study, tmp_path / str(size), loader=lambda _: vlm)
        rows = [dataclasses.asdict(record) for record in folder.records()]
        return [{k: v for k, v in row.items() if k not in ("seconds", "env")} for row in rows]

    assert run(1) == run(8)


def test_a_small_model_is_asked_several_at_once_and_the_folder_says_so(
    vlm: VLM, tmp_path: Path
) -> None:
    assert vlm.together == 16
    half = VLM(copy.deepcopy(vlm.model).to(torch.bfloat16), vlm.processor, name="small")
    assert half.together == 1  # its answers depend on what is asked together
    raw = {"models": ["small"], "tasks": [{"task": "embedded", "limit": 5}], "controls": ["none"]}
    said: list[str] = []

    class Heard(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    def run(**changes: Any) -> ResultsFolder:
        where = tmp_path / str(len(said))
        return run_study(build_study({**raw, **changes}), where, loader=lambda _: vlm,
                         progress=Heard())  # fmt: skip

    alone = run(batch_size=1)
    assert said == []
    said.append("")
    folder = run()
    assert said[1:] == ["small: 16 questions are asked together (--batch-size)."]
    for found, size in ((alone, 1), (folder, 16)):
        (name,) = {record.env for record in found.records()}
        assert found.environments()[name]["batch_size"] == size
    assert [r.text for r in folder.records()] == [r.text for r in alone.records()]


TEMPLATES = {
    "llava": "USER : <image> {prompt} ASSISTANT :",
    "llava_next": "USER : <image> {prompt} ASSISTANT :",
    "qwen2_vl": "USER : <|vision_start|> <image> <|vision_end|> {prompt} ASSISTANT :",
    "qwen2_5_vl": "USER : <|vision_start|> <image> <|vision_end|> {prompt} ASSISTANT :",
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_every_family_shares_pictures_of_any_size(family: str) -> None:
    """Photos of two shapes through each family's own processor, questions of two lengths."""
    model, processor, _ = built(family)
    vlm = VLM(model, processor, name=family, style="plain", template=TEMPLATES[family])
    task = EmbeddedTask(limit=4)
    shots = [photo(320, 224, 0), photo(224, 280, 1)]
    words = ["what is in this picture ?", "describe", "describe this and that", "what is that ?"]
    asked = [
        Request(sample, words[n], shots[n % 2], picture_hash(shots[n % 2]))
        for n, sample in enumerate(task.samples())
    ]
    alone = [dataclasses.replace(request, digest=None) for request in asked]
    for choice in ("none", visprune.get_method("todre", num_keep=16, tau=0.0),
                   visprune.get_method("fastv", num_keep=16)):  # fmt: skip
        shared = answers(vlm, choice, asked, 4)
        assert vlm.encodings.shares
        assert len(vlm.encodings._encoded) == 2
        assert shared == answers(vlm, choice, alone, 4)
