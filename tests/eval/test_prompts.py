# SPDX-License-Identifier: Apache-2.0
"""Every prompt of every task, word for word: a changed blank changes published numbers.

``prompts.json`` holds them. After a change that is meant: raise the task's VERSION, run
``python -m tests.eval.test_prompts`` from the root, and read the difference.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.eval.task_fixtures import LOCAL, dump_lines
from visprune.errors import ConfigError
from visprune.eval.tasks import prompts
from visprune.eval.tasks.base import STYLES, Task, get_task, list_tasks

SNAPSHOT = Path(__file__).with_name("prompts.json")
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "textvqa": [{}, {"ocr": True}],
    "refcoco_rec": [{"split": "testA"}, {"split": "testA", "scale": "per_mille"}],
    "embedded": [{"limit": 7}],
    "topology": [{"limit": 3}],
}

# What is past its first version: its rules changed (see CHANGELOG).
VERSIONS = {
    "folder": 2,
    "folder 2": 2,
    "folder 3": 2,
    "mmbench_en": 2,
    "refcoco_rec": 2,
    "scienceqa_img": 2,
    "seedbench_image": 2,
}


def _folder_task(root: Path) -> None:
    rows = [
        {"image": "a.png", "question": "What color?", "answers": "red"},
        {"image": "a.png", "question": "Which?", "answers": "A", "choices": ["cat", "dog"]},
    ]
    dump_lines(root / "free.jsonl", rows[:1])
    dump_lines(root / "choices.jsonl", rows[1:])


def _tasks(root: Path) -> list[tuple[str, Task]]:
    found = []
    for name in list_tasks():
        folder = root / name
        folder.mkdir()
        if name == "folder":
            _folder_task(folder)
            options: list[dict[str, Any]] = [
                {"path": str(folder / "free.jsonl")},
                {"path": str(folder / "choices.jsonl")},
                {"path": str(folder / "free.jsonl"), "instruction": "In one word."},
            ]
        else:
            data = {} if name in ("embedded", "topology") else {"data": str(folder)}
            LOCAL.get(name, lambda folder: None)(folder)
            options = [data | more for more in VARIANTS.get(name, [{}])]
        for number, values in enumerate(options):
            found.append((name if not number else f"{name} {number + 1}", get_task(name, **values)))
    return found


def all_prompts(root: Path) -> dict[str, dict[str, list[str]]]:
    """Task and its variant -> style -> prompts, each once."""
    return {
        label: {
            style: list(dict.fromkeys(task.prompt(sample, style) for sample in task.samples()))
            for style in STYLES
        }
        for label, task in _tasks(root)
    }


def test_every_prompt_is_as_recorded(tmp_path: Path) -> None:
    recorded = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    assert all_prompts(tmp_path) == recorded
    assert {label.split()[0] for label in recorded} == set(list_tasks())


def test_versions_are_as_recorded(tmp_path: Path) -> None:
    # Results of other versions are not comparable: raise a number only with its prompts or rules.
    versions = {label: task.VERSION for label, task in _tasks(tmp_path)}
    assert {label: version for label, version in versions.items() if version > 1} == VERSIONS


def test_llava_s_template() -> None:
    assert prompts.VICUNA_V1.format(prompt="Is it red?\nOne word.") == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: <image>\n"
        "Is it red?\nOne word. ASSISTANT:"
    )


# ImageNet asks nothing.
@pytest.mark.parametrize("name", [name for name in list_tasks() if name != "imagenet"])
def test_an_unknown_style_is_refused(tmp_path: Path, name: str) -> None:
    task = next(task for label, task in _tasks(tmp_path) if label == name)
    with pytest.raises(
        ConfigError, match=r"Unknown prompt style 'lava15'\. Did you mean 'llava15'"
    ):
        task.prompt(task.samples()[0], "lava15")  # type: ignore[arg-type]


def test_letters_reach_to_z() -> None:
    with pytest.raises(ConfigError, match="27 choices; letters reach to 26"):
        prompts.multiple_choice("?", ["x"] * 27, "llava15")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(all_prompts(Path(folder)), indent=1, ensure_ascii=False)
    SNAPSHOT.write_text(text + "\n", encoding="utf-8")
