# SPDX-License-Identifier: Apache-2.0
"""LLaVA's question and answer files, one JSON object per line, read and written.

Questions: ``question_id, image, text, category``. Answers: ``question_id, prompt, text, answer_id,
model_id, metadata``, as ``llava/eval/model_vqa_loader.py`` (c121f04) has them and as most code for
pruning LLaVA still does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visprune.errors import ConfigError
from visprune.eval.metrics.vqa_text import normalise_evalai
from visprune.eval.tasks.base import PromptStyle, Sample, Task
from visprune.eval.tasks.loading import ImageFile, jsonl_lines, require_columns

__all__ = [
    "LLaVAAnswer",
    "read_answers",
    "score_answers",
    "write_answers",
    "write_questions",
    "write_submission",
]

_NAMED = 3  # ids that a message lists


@dataclass(frozen=True)
class LLaVAAnswer:
    """One answer, with what :meth:`Task.aggregate` reads of a record.

    Attributes:
        sample: id of the sample.
        text: output of the model.
        answer: what was parsed from it.
        score: in [0, 1].
    """

    sample: str
    kind: str
    cluster: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    text: str
    answer: str | None
    rule: str
    score: float
    error: None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def write_questions(
    task: Task, path: str | Path, style: PromptStyle = "llava15", images: str | Path | None = None
) -> int:
    """Write a task's questions so that LLaVA's own scripts can answer them.

    Args:
        task: the task.
        path: the file to write.
        style: of the prompts.
        images: folder to save the pictures in, as PNG. ``None``: name the files that the task
            reads, which then must be files.

    Returns:
        How many questions were written.

    Raises:
        ConfigError: pictures do not lie in files and ``images`` is not given.
    """
    lines = []
    for number, sample in enumerate(task.samples()):
        row = {
            "question_id": sample.id,
            "image": _picture(sample, number, images),
            "text": task.prompt(sample, style),
            "category": sample.kind or "default",
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def _picture(sample: Sample, number: int, images: str | Path | None) -> str:
    if images is not None:
        folder = Path(images)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{number:06d}.png"
        sample.image().save(folder / name)
        return name
    if isinstance(sample.image, ImageFile):
        return str(sample.image.path)
    raise ConfigError(
        f"The picture of {sample.id} is not a file of its own; pass images=FOLDER to save them."
    )


def write_answers(
    path: str | Path, records: Iterable[Any], model_id: str, task: Task | None = None
) -> int:
    """Write records as a LLaVA answer file; records that hold an error have no answer.

    Args:
        path: the file to write.
        records: of one cell, with ``sample``, ``prompt``, ``text`` and ``kind``.
        model_id: a name for the model.
        task: the task that was answered: lines are written in the order of its samples, by which
            official scorers (POPE's, LLaVA's ``eval_pope.py``) pair them with labels. ``None``: in
            the order of the records.

    Returns:
        How many answers were written.
    """
    lines = []
    if task is not None:
        place = {sample.id: number for number, sample in enumerate(task.samples())}
        records = sorted(records, key=lambda record: place.get(record.sample, len(place)))
    for record in records:
        if record.text is None:
            continue
        name = f"{model_id}\0{record.sample}\0{record.text}"
        row = {
            "question_id": record.sample,
            "prompt": record.prompt,
            "text": record.text,
            # LLaVA draws one at random; from the content it is the same on every run.
            "answer_id": hashlib.sha256(name.encode()).hexdigest()[:22],
            "model_id": model_id,
            "metadata": {"category": record.kind} if record.kind else {},
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def read_answers(
    path: str | Path, task: Task, questions: str | Path | None = None
) -> list[LLaVAAnswer]:
    """Read an answer file and score it under a task.

    An answer finds its sample by ``question_id``: the sample's id, its last part, or its picture's
    id (TextVQA, MME); where several samples fit, the prompt tells which.

    Args:
        path: the answer file.
        task: the task that was answered.
        questions: the question file that was answered, where its ids are its own (LLaVA's
            ``llava_pope_test.jsonl``): then picture, category and prompt tell.

    Raises:
        ConfigError: the file answers other questions (another task, split or run), leaves some
            unanswered, or answers one twice.
    """
    path = Path(path)
    samples = task.samples()
    finder = _Finder(task, samples, None if questions is None else Path(questions))
    found: dict[str, LLaVAAnswer] = {}
    strange: list[str] = []
    for where, row in jsonl_lines(path):
        require_columns(row, ("question_id", "text"), where)
        sample = finder.find(str(row["question_id"]), str(row.get("prompt") or ""))
        if sample is None:
            strange.append(str(row["question_id"]))
        elif sample.id in found:
            raise ConfigError(f"{where} answers {sample.id} again; are two runs in one file?")
        else:
            found[sample.id] = _scored(task, sample, row["text"])
    missing = [sample.id for sample in samples if sample.id not in found]
    if strange or missing:
        raise ConfigError(
            f"{path} is not an answer file of {task.name} as it is set up here: "
            f"{len(strange)} of its questions are not asked{_some(strange)}, "
            f"{len(missing)} of {len(samples)} have no answer{_some(missing)}. "
            f"Check task, split and limit, or the run the file comes from."
        )
    return [found[sample.id] for sample in samples]


def score_answers(
    path: str | Path, task: Task, questions: str | Path | None = None
) -> dict[str, float]:
    """Return a task's figures for an answer file; see :func:`read_answers`."""
    return task.aggregate(read_answers(path, task, questions))


def write_submission(
    path: str | Path, task: Task, records: Iterable[Any], questions: str | Path | None = None
) -> int:
    """Write the answers of VQAv2's test-dev or VizWiz's test as their server takes them.

    Answers pass EvalAI's processor first, as in LLaVA's ``convert_vqav2_for_submission.py`` and
    ``convert_vizwiz_for_submission.py``.

    Args:
        path: the JSON file to write.
        task: ``vqav2`` or ``vizwiz``.
        records: of one cell.
        questions: VQAv2's server wants all of test: LLaVA's ``llava_vqav2_mscoco_test2015.jsonl``,
            whose other questions get an empty answer.

    Returns:
        How many entries were written.

    Raises:
        ConfigError: another task, or a record without an answer (run it again first).
    """
    if task.name not in ("vqav2", "vizwiz"):
        raise ConfigError(f"{task.name} is not handed in anywhere; only vqav2 and vizwiz are.")
    answers: dict[str, str] = {}
    for record in records:
        if record.text is None:
            raise ConfigError(f"{record.sample} has no answer to hand in; run the study again.")
        answers[record.sample] = normalise_evalai(record.text)
    if questions is not None:
        answers = dict.fromkeys(_asked(Path(questions)), "") | answers
    entries: list[dict[str, Any]] = [
        {"question_id": int(name), "answer": answer}
        if task.name == "vqav2"
        else {"image": f"{name}.jpg", "answer": answer}
        for name, answer in answers.items()
    ]
    Path(path).write_text(json.dumps(entries), encoding="utf-8")
    return len(entries)


class _Finder:
    """Finds the sample that a line answers."""

    def __init__(self, task: Task, samples: Iterable[Sample], questions: Path | None) -> None:
        self.task = task
        self.exact: dict[str, Sample] = {}
        self.loose: dict[str, list[Sample]] = {}
        for sample in samples:
            self.exact[sample.id] = sample
            for name in {sample.id.rpartition("/")[2], sample.cluster}:
                self.loose.setdefault(name, []).append(sample)
        self.asked = {} if questions is None else _asked(questions)

    def find(self, name: str, prompt: str) -> Sample | None:
        """Return the sample, ``None`` where none or several fit."""
        first = self.exact.get(name)
        pool = self.loose.get(name, [])
        if name in self.asked:
            row = self.asked[name]
            first, prompt = None, str(row["text"])
            pool = self.loose.get(Path(row["image"]).stem, [])
            pool = [s for s in pool if row.get("category", "default") in ("default", s.kind)]
        if not prompt:
            return first or (pool[0] if len(pool) == 1 else None)
        if first is not None and self._asks(first, prompt):
            return first
        fits = [sample for sample in pool if self._asks(sample, prompt)]
        return fits[0] if len(fits) == 1 else None

    def _asks(self, sample: Sample, prompt: str) -> bool:
        said = prompt.lower()
        texts = (sample.question, self.task.prompt(sample))
        return any(text.lower().strip() in said for text in texts)


def _asked(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a question file by id."""
    rows = {}
    for where, row in jsonl_lines(path):
        require_columns(row, ("question_id", "image", "text"), where)
        rows[str(row["question_id"])] = row
    return rows


def _scored(task: Task, sample: Sample, text: str) -> LLaVAAnswer:
    parsed = task.parse(text, sample)
    return LLaVAAnswer(
        sample=sample.id,
        kind=sample.kind,
        cluster=sample.cluster,
        question=sample.question,
        answers=sample.answers,
        choices=sample.choices,
        text=text,
        answer=parsed.answer,
        rule=parsed.rule,
        score=task.score(sample, parsed),
        meta=sample.meta,
    )


def _some(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
