# SPDX-License-Identifier: Apache-2.0
"""Studies: a grid of models x methods x budgets x tasks x seeds, as YAML, as flags or in Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from visprune.errors import ConfigError, did_you_mean
from visprune.eval.models import ModelSpec
from visprune.eval.prompts import check_style
from visprune.eval.published import read_published
from visprune.eval.tasks.base import Task, get_task
from visprune.eval.variants import Variant, expand, listed
from visprune.saved import read_method

__all__ = ["SpeedPlan", "Study", "build_study", "read_study"]


@dataclass(frozen=True)
class SpeedPlan:
    """How latency is measured, once all questions are answered.

    Args:
        rounds: timed rounds; every method runs once in each.
        warmup: untimed rounds before.
        batches: batch sizes.
        new_tokens: tokens generated, the same number for every method.
        prompts: prompts that the rounds go through.
    """

    rounds: int = 20
    warmup: int = 2
    batches: tuple[int, ...] = (1, 4)
    new_tokens: int = 8
    prompts: int = 20

    def __post_init__(self) -> None:
        """Reject values out of range."""
        object.__setattr__(self, "batches", tuple(self.batches))
        numbers = (self.rounds, self.prompts, self.new_tokens - 1, *self.batches)
        if not self.batches or any(type(n) is not int or n < 1 for n in numbers) or self.warmup < 0:
            raise ConfigError(
                f"speed takes rounds, prompts and batches of at least 1, new_tokens of at least 2 "
                f"and warmup of at least 0; got {self}."
            )


@dataclass(frozen=True)
class Study:
    """What to run.

    Attributes:
        models: models.
        variants: methods at budgets, controls among them.
        tasks: tasks; ``seed`` of each is set by ``seeds``.
        seeds: of question sets and random draws.
        name: what reports call it.
        batch_size: samples that are asked together.
        prompt_style: ``None``: as each model likes it.
        generation: options of ``generate`` in place of greedy search.
        pictures: keep a small copy of every picture for the report.
        speed: how latency is measured; ``None``: not.
        published: numbers to compare with: ``source``, ``note``, ``rows``.
        status: a remark for the report's head, such as ``not run here``.
    """

    models: tuple[ModelSpec, ...]
    variants: tuple[Variant, ...]
    tasks: tuple[Task, ...]
    seeds: tuple[int, ...] = (0,)
    name: str = ""
    batch_size: int = 1
    prompt_style: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    pictures: bool = True
    speed: SpeedPlan | None = None
    published: Mapping[str, Any] = field(default_factory=dict)
    status: str = ""

    def __post_init__(self) -> None:
        """Reject an empty grid and rows of one name."""
        for what in ("models", "variants", "tasks", "seeds"):
            if not getattr(self, what):
                raise ConfigError(f"The study has no {what.replace('variants', 'methods')}.")
        if isinstance(self.batch_size, bool) or self.batch_size < 1:
            raise ConfigError(f"batch_size is at least 1, got {self.batch_size!r}.")
        if self.prompt_style is not None:
            check_style(self.prompt_style)
        labels = [variant.label for variant in self.variants]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ConfigError(f"Two methods are called {twice[0]!r}; give one of them a label.")

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved study as JSON values."""
        return {
            "name": self.name,
            "status": self.status,
            "models": [dataclasses.asdict(model) for model in self.models],
            "methods": [v.to_dict() for v in self.variants],
            "tasks": [task.to_dict() for task in self.tasks],
            "seeds": list(self.seeds),
            "batch_size": self.batch_size,
            "prompt_style": self.prompt_style,
            "generation": dict(self.generation),
            "pictures": self.pictures,
            "speed": None if self.speed is None else dataclasses.asdict(self.speed),
            "published": dict(self.published),
        }


def read_study(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a study's YAML.

    Args:
        path: the file.
        overrides: top-level keys in place of the file's.

    Raises:
        ConfigError: there is no such file, it is no YAML mapping, or a name or value is not
            allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no study {str(path)!r}; give the path of a YAML file.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {error}.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{str(path)!r} holds no mapping of models, methods and tasks.")
    return build_study({"name": path.stem, **raw, **(overrides or {})})


def build_study(raw: Mapping[str, Any]) -> Study:
    """Build a study from the keys of its YAML.

    ``models``, ``methods`` and ``tasks`` are lists of names, of mappings with options, or of built
    objects; a model that was saved with a method brings it along. ``budgets`` (numbers of tokens,
    fractions, or mappings such as ``{r: 13}``) go to every method that takes such a one and names
    none itself; ``limit`` goes to every task without one; ``controls`` is ``true`` (the default:
    all of :data:`visprune.eval.variants.CONTROLS`), ``false``, or a list.

    Raises:
        ConfigError: a key, name or value is not allowed.
    """
    for key in raw:
        if key not in _KEYS:
            raise ConfigError(
                f"A study has no {key!r}.{did_you_mean(str(key), _KEYS)} Keys: {', '.join(_KEYS)}."
            )
    speed = raw.get("speed")
    plain = {k: raw[k] for k in _PLAIN if raw.get(k) is not None}
    models = tuple(_model(entry) for entry in listed("models", raw.get("models")))
    methods = [*listed("methods", raw.get("methods")), *_saved_methods(models)]
    return Study(
        models=models,
        variants=tuple(expand(methods, raw.get("budgets"), raw.get("controls", True))),
        tasks=tuple(_task(entry, raw.get("limit")) for entry in listed("tasks", raw.get("tasks"))),
        seeds=tuple(listed("seeds", raw.get("seeds", 0))),
        speed=SpeedPlan(**_fields("speed", speed, SpeedPlan)) if speed else None,
        published=read_published(raw.get("published")),
        **plain,
    )


_PLAIN = ("name", "batch_size", "prompt_style", "generation", "pictures", "status")
_KEYS = ("models", "methods", "budgets", "tasks", "seeds", "limit", "controls", "speed",
         "published", *_PLAIN)  # fmt: skip


def _fields(what: str, given: Any, cls: Any) -> dict[str, Any]:
    """Options of a dataclass; ``True`` stands for all defaults."""
    if given is True:
        return {}
    allowed = [f.name for f in dataclasses.fields(cls)]
    if not isinstance(given, Mapping):
        raise ConfigError(f"{what} takes a mapping with {', '.join(allowed)}; got {given!r}.")
    for key in given:
        if key not in allowed:
            raise ConfigError(
                f"{what} has no option {key!r}.{did_you_mean(str(key), allowed)} "
                f"Options: {', '.join(allowed)}."
            )
    return dict(given)


def _model(entry: Any) -> ModelSpec:
    if isinstance(entry, ModelSpec):
        return entry
    if isinstance(entry, str):
        return ModelSpec(entry)
    options = _fields("A model", entry, ModelSpec)
    if not isinstance(options.get("name"), str):
        raise ConfigError(f"A model needs a name; got {entry!r}.")
    return ModelSpec(**options)


def _saved_methods(models: Iterable[ModelSpec]) -> list[dict[str, Any]]:
    """The methods that folders of models were saved with: they are rows without being asked for."""
    folders = (model.name.removeprefix("timm:local-dir:") for model in models)
    found = (read_method(folder) for folder in folders if Path(folder).is_dir())
    return [method for method in found if method is not None]


def _task(entry: Any, limit: int | None) -> Task:
    if isinstance(entry, Task):
        return entry if limit is None else dataclasses.replace(entry, limit=limit)
    options = {"task": entry} if isinstance(entry, str) else dict(entry)
    name = options.pop("task", None)
    if name is None:
        raise ConfigError(f"A task is a name, or a mapping with 'task' and its options: {entry!r}.")
    options.pop("version", None)
    return get_task(name, **{**({} if limit is None else {"limit": limit}), **options})
