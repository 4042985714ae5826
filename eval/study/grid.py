# SPDX-License-Identifier: Apache-2.0
"""Studies: a grid of models x methods x budgets x tasks x seeds, as YAML, as flags or in Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from visprune.core.checked import build_section, check_values
from visprune.errors import ConfigError, did_you_mean
from visprune.eval.models.base import ModelEntry
from visprune.eval.models.names import EMBEDDED, LIBRARIES
from visprune.eval.study.flags import override
from visprune.eval.study.options import KEYS, Options
from visprune.eval.study.published import read_published
from visprune.eval.study.variants import Variant, expand, listed
from visprune.eval.tasks import STANDARD
from visprune.eval.tasks.base import Task, get_task
from visprune.eval.tasks.prompts import check_style
from visprune.machine.saved import read_method

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
        object.__setattr__(self, "batches", tuple(listed("batches", self.batches)))
        least = [(self.new_tokens, 2), (self.warmup, 0)]
        least += [(number, 1) for number in (self.rounds, self.prompts, *self.batches)]
        if not self.batches or any(type(n) is not int or n < low for n, low in least):
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
        batch_size: samples that are asked together; ``None``: as many as each model likes.
        prompt_style: ``None``: as each model likes it.
        generation: options of ``generate`` in place of greedy search.
        turns: questions about one picture that share one cache: it is made by the prompt of the
            first, and each of them, the first too, is then put to it as if it were the only one.
            ``None``: every question is a prompt of its own.
        query_aware: methods see the question. If not, the prompt up to the end of the picture is
            read first, and its cache cut; all questions about the picture go on from copies of it.
        pictures: keep a small copy of every picture for the report.
        speed: how latency is measured; ``None``: not.
        published: numbers to compare with: ``source``, ``note``, ``rows``.
        status: a remark for the report's head, such as ``not run here``.
        notes: what to tell whoever runs it: controls that were left out, answers that look
            alike to a metric.

    Raises:
        ConfigError: the grid is empty, something stands in it twice, or a value is not allowed.
    """

    models: tuple[ModelEntry, ...]
    variants: tuple[Variant, ...]
    tasks: tuple[Task, ...]
    seeds: tuple[int, ...] = (0,)
    name: str = ""
    batch_size: int | None = None
    prompt_style: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    turns: int | None = None
    query_aware: bool = True
    pictures: bool = True
    speed: SpeedPlan | None = None
    published: Mapping[str, Any] = field(default_factory=dict)
    status: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Reject an empty grid, repetitions, rows of one name and values out of range."""
        for what in ("models", "variants", "tasks", "seeds"):
            if not getattr(self, what):
                raise ConfigError(f"The study has no {what.replace('variants', 'methods')}.")
        if self.batch_size is not None and (
            type(self.batch_size) is not int or self.batch_size < 1
        ):
            raise ConfigError(
                f"batch_size is a whole number of at least 1, got {self.batch_size!r}."
            )
        if self.prompt_style is not None:
            check_style(self.prompt_style)
        if self.turns is not None and (type(self.turns) is not int or self.turns < 1):
            raise ConfigError(f"turns is a whole number of at least 1, got {self.turns!r}.")
        if self.turns is not None and not self.query_aware:
            raise ConfigError(
                "turns puts questions to the cache of the first one's prompt, which a method then "
                "has seen; with query_aware=false it sees none, and every question of a picture is "
                "put to one cache anyway. Leave one of the two out."
            )
        self._check_repetition()
        served = next((model.name for model in self.models if model.engine == "vllm"), None)
        if self.speed is not None and served is not None:
            raise ConfigError(
                f"speed measures the parts of a model in transformers, and {served!r} is asked "
                f"through vLLM; leave speed out."
            )
        labels = [variant.label for variant in self.variants]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ConfigError(f"Two methods are called {twice[0]!r}; give one of them a label.")

    def _check_repetition(self) -> None:
        """Reject what would be asked twice: each sample has one record."""
        listing: list[tuple[str, Any]] = [(f"the seed {seed}", seed) for seed in self.seeds]
        for task in self.tasks:
            options = {k: v for k, v in task.to_dict().items() if k not in ("seed", "limit")}
            listing.append((f"the task {task.name!r} with the same options", options))
        for model in self.models:
            options = model.to_dict()
            listing.append((f"the model {model.name!r} with the same options", options))
        for number, entry in enumerate(listing):
            if entry in listing[:number]:
                raise ConfigError(
                    f"The study lists {entry[0]} twice; leave one out"
                    f"{' (a limit makes no other task)' * entry[0].startswith('the task')}."
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved study as JSON values."""
        return {
            "name": self.name,
            "status": self.status,
            "models": [model.to_dict() for model in self.models],
            "methods": [v.to_dict() for v in self.variants],
            "tasks": [task.to_dict() for task in self.tasks],
            "seeds": list(self.seeds),
            "batch_size": self.batch_size,
            "prompt_style": self.prompt_style,
            "generation": dict(self.generation),
            **({} if self.turns is None else {"turns": self.turns}),
            **({} if self.query_aware else {"query_aware": False}),
            "pictures": self.pictures,
            "speed": None if self.speed is None else dataclasses.asdict(self.speed),
            "published": dict(self.published),
        }


def read_study(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a study's YAML.

    Args:
        path: the file.
        overrides: top-level keys in place of the file's; they win over all of it. ``limit`` also
            replaces the tasks' own, ``model_options`` and ``task_options`` (mappings) go to every
            model and task of the file, ``generation`` adds to the file's, and ``speed: true``
            leaves the file's options of it.

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
    return build_study(override({"name": path.stem, **raw}, overrides or {}))


def build_study(raw: Mapping[str, Any]) -> Study:
    """Build a study from the keys of its YAML.

    ``models``, ``methods`` and ``tasks`` are lists of names, of mappings with options, or of built
    objects; a model that was saved with a method brings it along. Without ``tasks`` a
    vision-language model is asked :data:`visprune.eval.tasks.STANDARD`, the embedded model its own
    questions, a classifier ImageNet. ``budgets`` (numbers of tokens,
    fractions, or mappings such as ``{r: 13}``) go to every method that takes such a one and names
    none itself; ``limit`` goes to every task that sets none itself (a built task: that has its
    default); ``controls`` is ``true`` (the default: all of
    :data:`visprune.eval.study.variants.CONTROLS` that take one of the study's budgets), ``false``,
    or a list. Where a list is meant, a lone value is a list of one.

    Raises:
        ConfigError: a key, name or value is not allowed.
    """
    for key in raw:
        if key not in KEYS:
            raise ConfigError(
                f"A study has no {key!r}.{did_you_mean(str(key), KEYS)} Keys: {', '.join(KEYS)}."
            )
    said = {key: value for key, value in raw.items() if value is not None}
    options = Options(**check_values(Options, said, "The study"))
    _check_generation(options.generation)
    models = tuple(_model(entry) for entry in listed("models", options.models))
    methods = [*listed("methods", options.methods), *_saved_methods(models)]
    seeds = tuple(listed("seeds", options.seeds))
    variants, notes = expand(methods, options.budgets, options.controls)
    asked = _standard(models) if options.tasks is None else listed("tasks", options.tasks)
    tasks = tuple(_task(one, options.limit, seeds) for one in asked)
    return Study(
        models=models,
        variants=tuple(variants),
        tasks=tasks,
        seeds=seeds,
        speed=_speed(options.speed),
        published=_published(options.published),
        notes=(*notes, *(note for task in tasks for note in task.notes())),
        **{key: getattr(options, key) for key in _PLAIN},
    )


# Options that are fields of a study as they are.
_PLAIN = ("name", "status", "batch_size", "prompt_style", "generation", "turns",
          "query_aware", "pictures")  # fmt: skip


def _check_generation(options: Mapping[str, Any]) -> None:
    """Refuse what ``generate`` has no option for."""
    if not options:
        return
    from transformers import GenerationConfig

    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for key in options:
        if key not in known:
            raise ConfigError(
                f"generation has no option {key!r}.{did_you_mean(str(key), known)} It takes those "
                f"of transformers' GenerationConfig, such as max_new_tokens."
            )
    longest = options.get("max_new_tokens", 1)
    if type(longest) is not int or longest < 1:
        raise ConfigError(
            f"generation: max_new_tokens is {longest!r}; it must be a whole number from 1."
        )


def _speed(raw: Any) -> SpeedPlan | None:
    """How latency is measured; ``True`` stands for all defaults."""
    if raw is None or raw is False:
        return None
    plan: SpeedPlan = build_section(SpeedPlan, {} if raw is True else raw, "speed")
    return plan


@dataclass(frozen=True)
class _Published:
    """Types of a table that :func:`read_published` reads."""

    rows: Mapping[str, tuple[Any, ...]] | tuple[Mapping[str, Any], ...]
    source: Any = ""
    note: Any = ""
    model: str | None = None
    columns: tuple[str, ...] = ()


def _published(raw: Any) -> dict[str, Any]:
    tables = [check_values(_Published, t, "published") for t in listed("published", raw)]
    return read_published(tables if isinstance(raw, list) else next(iter(tables), None))


def _model(entry: Any) -> ModelEntry:
    if isinstance(entry, ModelEntry):
        return entry
    if isinstance(entry, str):
        return ModelEntry(entry)
    if isinstance(entry, Mapping) and not isinstance(entry.get("name"), str):
        raise ConfigError(f"A model needs a name; got {entry!r}.")
    spec: ModelEntry = build_section(ModelEntry, entry, "A model")
    return spec


def _saved_methods(models: Iterable[ModelEntry]) -> list[dict[str, Any]]:
    """The methods that folders of models were saved with: they are rows without being asked for."""
    folders = (model.name.removeprefix("timm:local-dir:") for model in models)
    found = (read_method(folder) for folder in folders if Path(folder).is_dir())
    return [method for method in found if method is not None]


def _standard(models: Sequence[ModelEntry]) -> list[str]:
    """What models are asked where a study names no tasks: all of one kind, or nothing is clear."""
    kinds = {"embedded" if m.name == EMBEDDED else m.name.partition(":")[0] for m in models}
    if kinds == {EMBEDDED}:
        return [EMBEDDED]
    if kinds and kinds <= set(LIBRARIES):
        return ["imagenet"]
    return [] if kinds & {EMBEDDED, *LIBRARIES} else list(STANDARD)


def _task(entry: Any, limit: int | None, seeds: Sequence[int]) -> Task:
    """A task with the study's limit, unless it has one of its own."""
    if isinstance(entry, Task):
        default = next(f.default for f in dataclasses.fields(entry) if f.name == "limit")
        unset = limit is not None and entry.limit == default
        task = dataclasses.replace(entry, limit=limit) if unset else entry
    else:
        options = dict(entry) if isinstance(entry, Mapping) else {"task": entry}
        name = options.pop("task", None)
        if not isinstance(name, str):
            raise ConfigError(
                f"A task is a name, or a mapping with 'task' and its options: {entry!r}."
            )
        options.pop("version", None)
        own = {key: options[key] for key in ("limit", "seed") if key in options}
        check_values(Task, own, f"The task {name}")
        task = get_task(name, **{**({} if limit is None else {"limit": limit}), **options})
    if task.seed and list(seeds) != [task.seed]:
        raise ConfigError(
            f"The task {task.name} has a seed of its own ({task.seed}), and a study sets that of "
            f"every task; write seeds: [{task.seed}] in the study instead."
        )
    return task
