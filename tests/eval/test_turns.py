# SPDX-License-Identifier: Apache-2.0
"""Several questions about one picture on one cache: each as if it were the only one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.eval.instant import Instant, instant_study, loader
from tests.eval.small import small_embedded
from visprune.backbones.vlm import embedded
from visprune.catalog import get_method
from visprune.errors import ConfigError, UnsupportedModel
from visprune.eval.models.base import NONE, Request
from visprune.eval.models.vit import TimmClassifier
from visprune.eval.models.vlm import VLM
from visprune.eval.report.build import build_tables
from visprune.eval.report.read import read_results
from visprune.eval.run.runner import run_study
from visprune.eval.run.turns import blocks_between, dialogues
from visprune.eval.study.grid import build_study
from visprune.eval.tasks.embedded.task import EmbeddedTask
from visprune.machine.run import prune


def test_dialogues_are_of_one_picture_and_every_place_comes_in_every_turn() -> None:
    pictures = [name for name in "abcdef" for _ in range(7)]
    found = dialogues(pictures, 3)
    assert [number for one in found for number in one] == list(range(42))
    assert all(len({pictures[n] for n in one}) == 1 and len(one) <= 3 for one in found)
    turns = Counter((n % 7, turn) for one in found for turn, n in enumerate(one))
    for place in range(2, 7):  # the first question of a picture is always a first turn
        assert [turns[place, turn] for turn in range(3)] == [2, 2, 2]
    assert dialogues(pictures, 1) == [[n] for n in range(42)]
    # More samples change no turn of those before them.
    for count in range(1, 42):
        short = dialogues(pictures[:count], 3)
        assert short == [[n for n in one if n < count] for one in found if one[0] < count]


def test_blocks_end_where_a_picture_does() -> None:
    pictures = ["a"] * 3 + ["b"] * 3 + ["c"]
    assert blocks_between([range(2), range(2, 4), range(4, 7)], pictures) == [
        range(3), range(3, 6), range(6, 7),
    ]  # fmt: skip
    assert blocks_between([range(1), range(1, 2), range(2, 3)], ["a"] * 3) == [range(3)]


def test_the_runner_asks_dialogues_and_knows_them_by_their_turns(tmp_path: Path) -> None:
    model = Instant()
    folder = run_study(instant_study(turns=3, limit=9), tmp_path / "a", loader=loader(model))
    assert model.asked == [["0/0", "0/1", "0/2"], ["0/3"], ["0/4", "0/5"], ["0/6", "0/7"], ["0/8"]]
    (cell,) = folder.cells().values()
    assert cell.generation["turns"] == 3
    assert [r.meta["turn"] for r in folder.records()] == [1, 2, 3, 1, 1, 2, 1, 2, 1]
    plain = run_study(instant_study(limit=9), tmp_path / "b", loader=loader(Instant()))
    assert set(plain.cells()) != set(folder.cells())
    assert "turn" not in plain.records()[0].meta
    # What is missing of a dialogue is asked together with the rest of it.
    path = folder.record_files()[0]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    model = Instant()
    run_study(instant_study(turns=3, limit=9), tmp_path / "a", loader=loader(model))
    assert model.asked == [["0/6", "0/7"], ["0/8"]]
    (table,) = build_tables(read_results(tmp_path / "a"), resamples=100)
    kinds = table.rows[0].kinds
    assert {name: kinds[name]["n"] for name in kinds} == {
        "even": 5, "odd": 4, "turn 1": 5, "turn 2": 3, "turn 3": 1,
    }  # fmt: skip


def test_a_dialogue_that_fails_is_not_asked_one_by_one(tmp_path: Path) -> None:
    model = Instant(failing=(1,))
    folder = run_study(instant_study(turns=3, limit=4), tmp_path, loader=loader(model))
    assert model.asked == [["0/0", "0/1", "0/2"], ["0/3"]]
    assert [record.error is not None for record in folder.records()] == [True, True, True, False]


def test_who_takes_no_turns_says_why(tmp_path: Path) -> None:
    class Refusing(Instant):
        def no_turns(self, *, query_aware: bool = True) -> str | None:
            return "It forgets."

    with pytest.raises(ConfigError, match="turns=2: It forgets"):
        run_study(instant_study(turns=2), tmp_path, loader=loader(Refusing()))
    with pytest.raises(ConfigError, match="turns is a whole number of at least 1, got 0"):
        build_study({"models": "embedded", "tasks": "embedded", "turns": 0})
    assert "has no cache" in str(TimmClassifier.no_turns(Instant()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "why"),
    [("qwen3_vl", "three axes"), ("gemma3", "see a window"), ("llava", None)],
)
def test_families_whose_caches_cannot_be_taken_back(family: str, why: str | None) -> None:
    from tests.families import tiny
    from visprune.eval.models.turns import no_turns
    from visprune.machine.find import find_adapter

    if family == "llava":
        model: Any = small_embedded()[0]
    else:
        model = tiny.build(family)
    said = no_turns(find_adapter(model))
    assert (said is None) if why is None else why in str(said)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return VLM(*embedded.load(), name="embedded")


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    task = EmbeddedTask(limit=6)
    samples = task.samples()
    image = samples[0].image()
    return [Request(sample, task.prompt(sample, "plain"), image, "one") for sample in samples]


def answers(vlm: VLM, choice: Any, asked: list[Request], turns: int | None) -> list[Any]:
    task = EmbeddedTask(limit=6)
    options = {**vlm.generation(task, {}), **({} if turns is None else {"turns": turns})}
    with vlm.answering(choice, task, "plain", options) as answer:
        return list(answer(asked))


def texts(outputs: list[Any]) -> list[str]:
    return [output.text for output in outputs]


@pytest.mark.parametrize("name", ["none", "keep_all", "uniform", "visionzip", "vscan"])
def test_turns_of_what_does_not_look_at_the_question_are_prompts_each(
    name: str, vlm: VLM, requests: list[Request]
) -> None:
    """Also where positions close up, and where tokens leave inside the decoder (vscan: no text)."""
    budget = {"none": {}, "keep_all": {}, "vscan": {"num_keep": 64, "second": 1.0}}
    choice = NONE if name == "none" else get_method(name, **budget.get(name, {"num_keep": 64}))
    apart = [answers(vlm, choice, [request], None)[0] for request in requests]
    together = answers(vlm, choice, requests, 6)
    assert texts(together) == texts(apart)
    assert len(set(texts(apart))) > 2
    assert {one.kv_bytes for one in together} == {apart[0].kv_bytes}
    assert {one.tokens for one in together} == {apart[0].tokens}


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("snapkv", {"keep_ratio": 1.0}), ("adakv", {"keep_ratio": 1.0}), ("zipvl", {"tau": 1.0}),
        ("kvquant", {"bits": 8}), ("actqkv", {"top": 36}), ("think", {"ratio": 0.0}),
    ],
)  # fmt: skip
def test_a_cache_of_which_nothing_is_lost_answers_as_the_model(
    name: str, params: dict[str, Any], vlm: VLM, requests: list[Request]
) -> None:
    whole = answers(vlm, NONE, requests, 6)
    assert texts(answers(vlm, get_method(name, **params), requests, 6)) == texts(whole)


@pytest.mark.parametrize("name", ["snapkv", "adakv", "knorm", "look_m", "razor_attention"])
def test_a_later_question_is_put_to_what_the_first_one_kept(
    name: str, vlm: VLM, requests: list[Request]
) -> None:
    method = get_method(name, keep_ratio=0.05)
    three = answers(vlm, method, requests[:3], 3)
    # The same cache, asked the third question alone: what was asked between leaves no trace.
    two = answers(vlm, method, [requests[0], requests[2]], 3)
    assert [three[0].text, three[2].text] == texts(two)
    first = answers(vlm, method, requests[:1], 1)
    assert first[0].text == three[0].text
    assert three[2].kv_bytes == first[0].kv_bytes
    whole = answers(vlm, NONE, requests[:1], 1)
    assert three[0].kv_bytes < whole[0].kv_bytes


# Questions that no method has seen: the cache is cut when it ends with the picture.


def test_the_runner_asks_about_a_picture_together_where_methods_see_no_question(
    tmp_path: Path,
) -> None:
    model = Instant()
    folder = run_study(instant_study(query_aware=False, limit=7), tmp_path, loader=loader(model))
    assert model.asked == [["0/0", "0/1", "0/2"], ["0/3", "0/4", "0/5"], ["0/6"]]
    (cell,) = folder.cells().values()
    assert cell.generation["query_aware"] is False
    assert "turn" not in folder.records()[0].meta
    # One that fails is asked alone: answers do not depend on what else is asked.
    model = Instant(failing=(1,))
    study = instant_study(query_aware=False, limit=3)
    folder = run_study(study, tmp_path / "failing", loader=loader(model))
    assert model.asked == [["0/0", "0/1", "0/2"], ["0/0"], ["0/1"], ["0/2"]]
    assert [record.error is not None for record in folder.records()] == [False, True, False]


def test_turns_and_no_question_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="Leave one of the two out"):
        build_study({"models": "embedded", "tasks": "embedded", "turns": 2, "query_aware": False})


def unseen(vlm: VLM, choice: Any, asked: list[Request]) -> list[Any]:
    task = EmbeddedTask(limit=6)
    options = {**vlm.generation(task, {}), "query_aware": False}
    with vlm.answering(choice, task, "plain", options) as answer:
        return list(answer(asked))


@torch.no_grad()
def by_hand(vlm: VLM, method: Any, asked: list[Request]) -> list[str]:
    """Read up to the end of the picture once, and let every question go on from a copy."""
    found = []
    with prune(vlm.model, method):
        for request in asked:
            inputs = vlm.inputs([request], "plain")
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            end = int((ids[0] == vlm.model.config.image_token_id).nonzero()[-1]) + 1
            first = {"input_ids": ids[:, :end], "attention_mask": mask[:, :end]}
            cache = vlm.model(
                **first, pixel_values=inputs["pixel_values"], use_cache=True
            ).past_key_values
            out = vlm.model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2,
                do_sample=False,
            )  # fmt: skip
            found.append(vlm.processor.tokenizer.decode(out[0, ids.shape[1] :], True).strip())
    return found


@pytest.mark.parametrize(
    ("name", "params"),
    [("knorm", {"num_keep": 40}), ("adakv", {"keep_ratio": 0.1}), ("visionzip", {"num_keep": 16}),
     ("streaming_llm", {"num_keep": 32}), ("kvquant", {"bits": 2})],
)  # fmt: skip
def test_a_cache_that_no_question_was_in_when_it_was_cut(
    name: str, params: dict[str, Any], vlm: VLM, requests: list[Request]
) -> None:
    method = get_method(name, **params)
    outputs = unseen(vlm, method, requests)
    assert texts(outputs) == by_hand(vlm, method, requests)
    # In another order, and alone: what was asked before leaves no trace.
    assert texts(unseen(vlm, method, requests[::-1])) == texts(outputs)[::-1]
    assert texts(unseen(vlm, method, requests[2:3])) == texts(outputs)[2:3]


def test_with_all_slots_it_makes_no_difference_where_the_prompt_was_cut(
    vlm: VLM, requests: list[Request]
) -> None:
    plain = [answers(vlm, NONE, [request], None)[0] for request in requests]
    outputs = unseen(vlm, NONE, requests)
    assert texts(outputs) == texts(plain)
    assert {one.tokens for one in outputs} == {576.0}
    assert outputs[0].kv_bytes < plain[0].kv_bytes  # of the picture and what stands before it


def test_questions_about_two_pictures_share_no_cache(vlm: VLM, requests: list[Request]) -> None:
    other = dataclasses.replace(requests[1], digest="another")
    with pytest.raises(UnsupportedModel, match="one picture"):
        unseen(vlm, NONE, [requests[0], other])
