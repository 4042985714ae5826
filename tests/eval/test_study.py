# SPDX-License-Identifier: Apache-2.0
"""Studies: what a YAML becomes, and what is refused with a hint."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from visprune.cli import study as cli_study
from visprune.errors import ConfigError
from visprune.eval.evaluate import evaluate
from visprune.eval.models.base import ModelEntry
from visprune.eval.study.grid import SpeedPlan, Study, build_study, read_study
from visprune.eval.study.options import FLAGS, KEYS
from visprune.eval.tasks import STANDARD
from visprune.eval.tasks.embedded.task import EmbeddedTask
from visprune.methods.fastv import FastV


def study(**keys: Any) -> Study:
    return build_study({"models": "embedded", "tasks": "embedded", **keys})


def labels(made: Study, *, controls: bool = True) -> list[str]:
    return [v.label for v in made.variants if controls or not v.control]


def test_a_chain_is_a_method_of_a_study() -> None:
    entry = {"method": "todre+fastv", "fastv.layer": 3}
    made = study(methods=[entry], budgets=[64, 32], controls=False)
    assert labels(made) == ["todre+fastv 64", "todre+fastv 32"]
    chains: list[Any] = [variant.choice for variant in made.variants]
    assert [[m.num_keep for m in chain.members] for chain in chains] == [[128, 64], [64, 32]]
    assert all(chain.members[1].layer == 3 for chain in chains)
    with pytest.raises(ConfigError, match="Unknown method 'fastx'"):
        study(methods=["todre+fastx"], budgets=[64])


def test_methods_stand_at_every_budget_and_controls_beside_them() -> None:
    made = study(methods=["todre", "fastv"], budgets=[64, 0.25])
    assert labels(made) == [
        "none", "keep_all", "random 64", "random 25 %", "uniform 64", "uniform 25 %", "pool 64",
        "pool 25 %", "todre 64", "todre 25 %", "fastv 64", "fastv 25 %", "no_image",
    ]  # fmt: skip
    assert [v.num_keep for v in made.variants][8:10] == [64, None]
    assert labels(made, controls=False) == ["none", *labels(made)[8:12]]


def test_controls_stand_where_methods_with_budgets_of_their_own_stand() -> None:
    made = study(methods=[{"method": "fastv", "num_keep": 30, "layer": 3}])
    assert {"random 30", "pool 30", "fastv 30"} <= set(labels(made))
    made = study(methods=[{"method": "fastv", "budgets": [8, 16]}])
    assert {"random 8", "random 16", "fastv 8", "fastv 16"} <= set(labels(made))
    made = study(
        methods=["todre", {"method": "evit", "budgets": [{"keep_ratio": 0.7}]}], budgets=[8]
    )
    assert "random 8" in labels(made)  # 0.7 of each stage is no share that random keeps
    assert "random 70 %" not in labels(made)
    assert labels(study()) == ["none", "keep_all", "no_image"]
    assert labels(study(controls=["random"], budgets=[5])) == ["random 5"]


def test_budgets_go_to_the_methods_that_take_them() -> None:
    made = study(methods=["tome", "todre"], budgets=[{"r": 4}, 32], controls=False)
    assert next(label for label in labels(made) if label.startswith("tome")) == "tome r=4"
    assert [label for label in labels(made) if label.startswith("todre")] == ["todre 32"]
    late = study(methods=[{"method": "todre", "stage1": False}], budgets=[32, 64], controls=False)
    assert labels(late) == ["todre"]


def test_built_objects_are_taken_as_they_are() -> None:
    made = build_study(
        {"models": [ModelEntry("embedded")], "tasks": study().tasks, "methods": [FastV(num_keep=9)]}
    )
    assert "fastv 9" in labels(made)


def test_one_name_for_two_methods_is_refused_and_labels_tell_them_apart() -> None:
    two = [{"method": "fastv", "layer": 2}, {"method": "fastv", "layer": 3}]
    with pytest.raises(ConfigError, match="Two methods are called 'fastv 8'"):
        study(methods=two, budgets=[8])
    two[1]["label"] = "fastv, layer 3"
    assert "fastv, layer 3 8" in labels(study(methods=two, budgets=[8]))


def test_a_control_that_is_also_listed_is_one_row() -> None:
    assert labels(study(methods=["random"], budgets=[8])).count("random 8") == 1


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"method": ["todre"]}, "no 'method'. Did you mean 'methods'"),
        ({"methods": ["todr"], "budgets": [8]}, "Did you mean 'todre'"),
        ({"methods": [{"method": "todre", "num_kep": 3}]}, "Did you mean 'num_keep'"),
        ({"methods": [{"label": "x"}]}, "mapping with 'method'"),
        ({"methods": ["todre"]}, "Exactly|exactly one"),
        ({"methods": ["todre"], "budgets": ["many"]}, "A budget is a number"),
        ({"methods": ["todre"], "budgets": [1.5]}, "fraction"),
        ({"tasks": ["embeded"]}, "Did you mean 'embedded'"),
        ({"tasks": [{"task": "embedded", "splt": "x"}]}, "Did you mean 'split'"),
        ({"tasks": [{"limit": 3}]}, "mapping with 'task'"),
        ({"tasks": []}, "no tasks"),
        ({"models": [{"name": "embedded", "dtpe": "x"}]}, "Did you mean 'dtype'"),
        ({"models": [{"dtype": "auto"}]}, "needs a name"),
        ({"seeds": [-1]}, "whole numbers from 0"),
        ({"controls": ["keepall"]}, "Did you mean 'keep_all'"),
        ({"batch_size": 0}, "at least 1"),
        ({"prompt_style": "llava"}, "Did you mean 'llava15'"),
        ({"speed": {"round": 3}}, "Did you mean 'rounds'"),
        ({"speed": {"batches": []}}, "speed takes"),
        ({"published": {"rows": {"none": [1, 2]}, "columns": ["gqa"]}}, "2 numbers for 1"),
        ({"published": {"row": {}, "rows": {}}}, "Did you mean 'rows'"),
        ({"batch_size": "8"}, "batch_size is '8'; it must be an int"),
        ({"batch_size": 2.5}, "batch_size is 2.5; it must be an int"),
        ({"limit": "x"}, "limit is 'x'; it must be an int"),
        ({"limit": 2.5}, "limit is 2.5; it must be an int"),
        ({"tasks": [{"task": "embedded", "limit": 2.5}]}, "embedded: limit is 2.5; it must be an"),
        ({"tasks": [{"task": "embedded", "limit": "x"}]}, "embedded: limit is 'x'; it must be an"),
        ({"pictures": "maybe"}, "pictures is 'maybe'; it must be True or False"),
        ({"generation": [1]}, r"generation is \[1\]; it must be a mapping"),
        ({"generation": {"max_new_tokns": 3}}, "Did you mean 'max_new_tokens'"),
        ({"generation": {"max_new_tokens": "x"}}, "whole number from 1"),
        ({"speed": {"batches": ["a"]}}, r"batches\[0\] is 'a'; it must be an int"),
        ({"speed": {"warmup": "a"}}, "warmup is 'a'; it must be an int"),
        ({"speed": {"warmup": -1}}, "warmup of at least 0"),
        ({"speed": 3}, "speed must be a mapping.*got 3"),
        ({"models": [3]}, "A model must be a mapping.*got 3"),
        (
            {"models": [{"name": "embedded", "processor": 3}]},
            "processor is 3; it must be a mapping",
        ),
        ({"models": [{"name": "embedded", "device": "gpu9"}]}, "Unknown device 'gpu9'"),
        ({"methods": [3]}, "mapping with 'method': 3"),
        ({"methods": [{"method": 3}]}, "mapping with 'method'"),
        ({"tasks": [3]}, "mapping with 'task' and its options: 3"),
        ({"tasks": [{"task": "embedded", "seed": 4}]}, r"seed of its own \(4\).*seeds: \[4\]"),
        ({"published": {"rows": {"none": 1}}}, "1 numbers for 0 columns"),
        ({"published": {"rows": [1, 2]}}, r"rows\[0\] is 1; it must be a mapping"),
        ({"published": {"rows": {"none": [1]}, "columns": [3]}}, r"columns\[0\] is 3; it must be"),
        ({"published": 3}, "published must be a mapping.*got 3"),
        ({"controls": "rndom"}, "Unknown control 'rndom'. Did you mean 'random'"),
        ({"budgets": [{"rr": 4}], "controls": ["none"]}, "no method of the study .*'rr'"),
    ],
)
def test_mistakes_are_named(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        study(**keys)


def test_a_lone_value_is_a_list_of_one() -> None:
    made = study(
        controls="random", budgets=8, seeds=2, speed={"batches": 4},
        published={"rows": {"random 8": 1}, "columns": "embedded"},
    )  # fmt: skip
    assert labels(made) == ["random 8"]
    assert made.seeds == (2,)
    assert made.speed == SpeedPlan(batches=(4,))
    assert [row["score"] for row in made.published["rows"]] == [1.0]


def test_default_controls_that_take_no_budget_of_the_study_are_left_out_and_named() -> None:
    for keys in (
        {"methods": [{"method": "tome", "r": 13}]},
        {"methods": ["tome"], "budgets": [{"r": 13}]},
    ):
        made = study(**keys)
        assert labels(made) == ["none", "keep_all", "tome r=13", "no_image"]
        (note,) = made.notes
        assert note.startswith("left out: random, uniform, pool: ")
        assert "r=13" in note
        assert "--num-keep 64" in note
        assert "notes" not in made.to_dict()
        with pytest.raises(ConfigError, match=r"controls: random: .*stands at r=13"):
            study(**keys, controls=["none", "random"])
    both = study(methods=[{"method": "tome", "r": 13}], budgets=[64])
    assert "random 64" in labels(both)
    assert not both.notes


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"seeds": [1, 1]}, "the seed 1 twice"),
        ({"tasks": ["embedded", "embedded"]}, "the task 'embedded' with the same options twice"),
        ({"models": ["embedded", {"name": "embedded"}]}, "the model 'embedded' with the same"),
    ],
)
def test_what_would_be_asked_twice_is_refused(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        study(**keys)


def test_one_method_under_two_labels_is_refused_and_listed_twice_it_is_one_row() -> None:
    two = [{"method": "fastv", "label": label} for label in ("a", "b")]
    with pytest.raises(ConfigError, match="'a 8' and 'b 8' are the same"):
        study(methods=two, budgets=[8])
    assert labels(study(methods=["fastv", "fastv"], budgets=[8, 8])).count("fastv 8") == 1


TRAIN = {"task": "embedded", "split": "train"}


def test_a_limit_makes_no_other_task() -> None:
    """The smaller one's samples are among the larger one's: they would be asked twice."""
    with pytest.raises(ConfigError, match=r"'embedded' with the same options twice.*no other"):
        study(tasks=["embedded", {"task": "embedded", "limit": 7}])


def test_limits_and_seeds_reach_the_tasks() -> None:
    made = study(tasks=["embedded", {**TRAIN, "limit": 7}], limit=5, seeds=[0, 3])
    assert [task.limit for task in made.tasks] == [5, 7]
    assert made.seeds == (0, 3)
    assert study(speed=True).speed == SpeedPlan()
    built = study(tasks=[EmbeddedTask(), EmbeddedTask(split="train", limit=7)], limit=5)
    assert [task.limit for task in built.tasks] == [5, 7]  # as of names and mappings
    assert study(tasks=EmbeddedTask(seed=3), seeds=3).tasks[0].seed == 3
    with pytest.raises(ConfigError, match="seed of its own"):
        study(tasks=EmbeddedTask(seed=3))


def test_the_resolved_study_is_json_and_builds_the_same_again() -> None:
    made = study(methods=["todre"], budgets=[8], seeds=[1], speed={"rounds": 3})
    resolved = json.loads(json.dumps(made.to_dict()))
    again = build_study(
        {
            "models": resolved["models"],
            "tasks": resolved["tasks"],
            "methods": [
                {k: v for k, v in row.items() if k not in ("label", "control") and v is not None}
                for row in resolved["methods"]
            ],
            "seeds": resolved["seeds"],
            "speed": resolved["speed"],
            "controls": False,
        }
    )
    assert [v.choice for v in again.variants] == [v.choice for v in made.variants]
    assert (again.tasks, again.models, again.speed) == (made.tasks, made.models, made.speed)


def test_a_file_is_read_safely(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("models: [embedded]\ntasks: [embedded]\nlimit: 3\n")
    made = read_study(path, {"limit": 4})
    assert (made.name, made.tasks[0].limit) == ("mine", 4)
    for text, match in (
        ("models: [", "is not YAML"),
        ("- a", "no mapping"),
        ("models: !!python/object:os.system x", "is not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=match):
            read_study(path)
    with pytest.raises(ConfigError, match="There is no study"):
        read_study(tmp_path / "absent.yaml")


def test_a_flag_wins_over_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "models: [embedded, {name: a/b, dtype: bfloat16}]\n"
        "tasks: [embedded, {task: embedded, limit: 30, per_kind: 2}]\n"
        "speed: {rounds: 3}\ngeneration: {do_sample: true, max_new_tokens: 2}\n"
    )
    flags = {
        "limit": 2, "model_options": {"dtype": "float32"}, "task_options": {"split": "train"},
        "speed": True, "generation": {"max_new_tokens": 5},
    }  # fmt: skip
    made = read_study(path, flags)
    assert [task.to_dict() for task in made.tasks] == [
        EmbeddedTask(limit=2, split="train", per_kind=n).to_dict() for n in (1, 2)
    ]
    assert [spec.dtype for spec in made.models] == ["float32", "float32"]
    assert made.speed == SpeedPlan(rounds=3)
    assert made.generation == {"do_sample": True, "max_new_tokens": 5}
    with pytest.raises(ConfigError, match="Did you mean 'split'"):
        read_study(path, {"task_options": {"splt": "train"}})
    named = read_study(path, {"tasks": [{"task": "embedded", "limit": 3}], "limit": 9})
    assert [task.limit for task in named.tasks] == [3]  # both are flags: the closer one


def test_published_tables_become_rows() -> None:
    made = study(
        published={
            "source": "a paper, table 1",
            "model": "m",
            "columns": ["gqa", "mme/perception"],
            "rows": {"none": [62.0, 1510.7], "todre 64": ["-", 1464.4]},
        }
    )
    rows = made.published["rows"]
    assert rows[1] == {
        "model": "m", "label": "none", "task": "mme", "metric": "perception", "score": 1510.7,
    }  # fmt: skip
    assert [(row["label"], row["task"]) for row in rows] == [
        ("none", "gqa"), ("none", "mme"), ("todre 64", "mme"),
    ]  # fmt: skip


STUDIES = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_shipped_studies_are_sound(path: Path) -> None:
    """Every published number stands beside a row and a task of its study."""
    made = read_study(path)
    assert {v.label for v in made.variants} >= {"none", "keep_all"}
    assert made.speed is not None
    if path.stem.startswith("embedded") or path.stem in ("easy_vqa", "vg500"):  # run here
        return
    assert made.status == "not run here"
    assert "Not run here." in path.read_text(encoding="utf-8").split("\n\n")[0]
    found = {v.label for v in made.variants}
    tasks = {task.name for task in made.tasks}
    for row in made.published.get("rows", ()):
        assert row["label"] in found
        assert row["task"] in tasks
        assert row["model"] in {spec.name for spec in made.models}


def test_flags_keys_and_arguments_are_the_options_of_a_study() -> None:
    """One list: what a file, the command line and Python can say is the same."""
    command = inspect.signature(cli_study.evaluate)
    own = {"study", "out", "dry_run", "retry_errors", "answers", "threads"}
    assert set(command.parameters) == own | set(FLAGS)
    said = inspect.signature(evaluate)
    of_model = {"model", "processor", "pad", "engine"}
    assert set(said.parameters) - of_model - {"out", "progress"} <= set(KEYS)
    every = dict.fromkeys(FLAGS)
    assert cli_study.changes_of(every) == {}
    of_variants = {"methods", "budgets", "controls"}
    assert set(Study.__dataclass_fields__) >= set(KEYS) - of_variants - {"limit"}


def test_every_flag_reaches_its_key() -> None:
    given = {
        "model": ["a", "b"], "dtype": "float32", "task": ["pope"], "task_option": ["split=test"],
        "method": ["tome,r=13", "todre"], "num_keep": [8], "keep_ratio": [0.5],
        "num_keep_per_frame": [2], "limit": 3,
        "seed": [1], "batch_size": 4, "controls": False, "speed": True, "device": "cpu",
        "attention": "eager", "prompt_style": "plain", "max_new_tokens": 5, "pictures": False,
        "pad": True, "engine": "vllm", "engine_option": ["seed=1"], "turns": 3,
        "query_aware": False,
    }  # fmt: skip
    assert set(given) == set(FLAGS)
    options = {"dtype": "float32", "device": "cpu", "attention": "eager", "pad": True,
               "engine": "vllm", "engine_options": {"seed": 1}}  # fmt: skip
    assert cli_study.changes_of(given) == {
        "models": [{"name": "a", **options}, {"name": "b", **options}],
        "tasks": [{"task": "pope", "split": "test"}],
        "methods": [{"method": "tome", "r": 13}, "todre"],
        "budgets": [8, 0.5, {"num_keep_per_frame": 2}], "limit": 3,
        "seeds": [1], "batch_size": 4, "controls": False,
        "speed": True, "prompt_style": "plain", "generation": {"max_new_tokens": 5},
        "pictures": False, "turns": 3, "query_aware": False,
    }  # fmt: skip


READING = {"ocrbench", "docvqa", "chartqa", "refcoco_rec", "topology"}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_of_methods_ask_what_pruning_breaks_first(path: Path) -> None:
    """Where the model can answer: not the embedded model and those tuned from it, no classifier."""
    study = read_study(path)
    if not any(model.name.startswith(("embedded", "runs/", "timm:")) for model in study.models):
        assert {task.name for task in study.tasks} >= READING


@pytest.mark.parametrize(
    ("model", "tasks"),
    [
        ("llava-hf/llava-1.5-7b-hf", set(STANDARD)),
        ("embedded", {"embedded"}),
        ("timm:deit_small_patch16_224", {"imagenet"}),
    ],
)
def test_a_study_that_names_no_task_has_those_of_its_model(model: str, tasks: set[str]) -> None:
    study = build_study({"models": model, "methods": "todre", "budgets": 64})
    assert {task.name for task in study.tasks} == tasks
    assert set(STANDARD) >= READING
    with pytest.raises(ConfigError, match="no tasks"):
        build_study({"models": [model, "embedded" if model != "embedded" else "timm:x"],
                     "methods": "todre", "budgets": 64})  # fmt: skip
