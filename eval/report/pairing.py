# SPDX-License-Identifier: Apache-2.0
"""Which records of two results folders are compared with which."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from visprune.errors import ConfigError, did_you_mean
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.records.place import named_arm
from visprune.eval.records.record import Cell, Record, canonical
from visprune.eval.report.build import arm_label

__all__ = ["by_task", "labels_of", "matched", "opened", "pairs_of", "same_folder", "titled"]

Setting = tuple[str, str]  # name of the model; generation options and style of the prompts
BySample = dict[tuple[int, str], Record]  # by seed and sample


def opened(text: str) -> tuple[ResultsFolder, str]:
    """``RESULTS`` or ``RESULTS:METHOD``: the folder, and the method or nothing."""
    folder, label = named_arm(text)
    return ResultsFolder(folder), arm_label(label) if label else ""


def same_folder(left: ResultsFolder, right: ResultsFolder) -> bool:
    """Whether two paths lead to one folder."""
    return Path(left.path).resolve() == Path(right.path).resolve()


def labels_of(folder: ResultsFolder) -> list[str]:
    """The methods of a folder, as its tables call them."""
    return list(dict.fromkeys(arm_label(cell.label) for cell in folder.cells().values()))


def pairs_of(
    left: ResultsFolder, a: str | None, right: ResultsFolder, b: str | None
) -> list[tuple[str, str]]:
    """The methods to compare with each other."""
    for folder, label in ((left, a), (right, b)):
        if label is not None and label not in labels_of(folder):
            raise ConfigError(
                f"{str(folder.path)!r} has no method {label!r}."
                f"{did_you_mean(label, labels_of(folder))} It has: {', '.join(labels_of(folder))}."
            )
    if a is not None or b is not None:
        one, other = (a or b or ""), (b or a or "")
        return pairs_of(left, one, right, other) if a is None or b is None else [(one, other)]
    common = [label for label in labels_of(left) if label in labels_of(right)]
    if not common:
        raise ConfigError(
            f"{str(left.path)!r} and {str(right.path)!r} have no method of the same name; name one "
            f"of each: {left.path}:METHOD. There are {', '.join(labels_of(left))}, and "
            f"{', '.join(labels_of(right))}."
        )
    return [(label, label) for label in common]


def by_task(folder: ResultsFolder, label: str) -> dict[str, dict[Setting, BySample]]:
    """Records of a method by task (with options), then by setting, then by seed and sample.

    Raises:
        ConfigError: two cells of the same setting are called the same.
    """
    found: dict[str, dict[Setting, BySample]] = {}
    cells = [cell for cell in folder.cells().values() if arm_label(cell.label) == label]
    places: dict[str, set[str]] = {}
    for cell in cells:
        places.setdefault(_task_title(cell), set()).add(_task_title(cell, place=True))
    for cell in cells:
        how = canonical({**cell.generation, "prompt_style": cell.prompt_style}).decode()
        title = _task_title(cell)
        # Where the data lies matters only among several of one name: a copy holds the same.
        settings = found.setdefault(_task_title(cell, place=len(places[title]) > 1), {})
        records = settings.setdefault((str(cell.model["name"]), how), {})
        for record in folder.records(cell.id):
            if (cell.seed, record.sample) in records:
                raise ConfigError(
                    f"{str(folder.path)!r} calls two methods {label!r}, with different "
                    f"parameters; it cannot be told which one is meant."
                )
            records[cell.seed, record.sample] = record
    return found


def matched(
    first: Mapping[Setting, BySample], second: Mapping[Setting, BySample], names: tuple[str, str]
) -> list[tuple[str, BySample, BySample]]:
    """What to compare of one task: each model with itself, where a folder has several.

    Two runs of one model each are compared whatever the models are.

    Returns:
        What tells the pair from the others, for its title; the records of A; those of B.

    Raises:
        ConfigError: a folder has several models, and the other none of them.
    """
    if not first or not second:
        return []
    if len(first) == len(second) == 1:
        ((_, one),), ((_, other),) = first.items(), second.items()
        return [("", one, other)]
    same = [key for key in first if key in second]
    if same:
        words = [model if len({m for m, _ in same}) > 1 else how for model, how in same]
        return [
            (f" on {word}" * (len(same) > 1), first[key], second[key])
            for key, word in zip(same, words, strict=True)
        ]
    by_model = [(f" on {a[0]}", first[a], second[b]) for a in first for b in second if a[0] == b[0]]
    if by_model and len(by_model) == len({on for on, _, _ in by_model}):
        return by_model
    have = [", ".join(f"{model} {how}" for model, how in keys) for keys in (first, second)]
    raise ConfigError(
        f"{names[0]} and {names[1]} cannot be paired: the one was run on {have[0]}, the other on "
        f"{have[1]}."
    )


def _task_title(cell: Cell, *, place: bool = False) -> str:
    left_out = ["task", "seed", "limit"]  # what samples two limits share are the same samples
    left_out += [] if place else ["data", "path"]
    options = {k: v for k, v in cell.task.items() if k not in left_out and v is not None}
    return f"{cell.task.get('task')} ({', '.join(f'{k}={v}' for k, v in options.items())})"


def titled(folder: ResultsFolder, label: str, other: ResultsFolder) -> str:
    """A method of a folder, with the folder where the other is another."""
    return label if same_folder(folder, other) else f"{folder.path}:{label}"
