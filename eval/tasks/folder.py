# SPDX-License-Identifier: Apache-2.0
"""Anyone's own benchmark: a JSONL of questions, or a folder of pictures per class."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from PIL import Image

from visprune.errors import ConfigError
from visprune.eval.metrics.letters import answer_letter
from visprune.eval.metrics.text import lost_signs, plain_text
from visprune.eval.tasks import prompts
from visprune.eval.tasks.base import Parsed, PromptStyle, Sample, Task, check_option
from visprune.eval.tasks.loading import ImageFile, LazySamples, jsonl_lines
from visprune.eval.tasks.scoring import SCORINGS, Scoring

__all__ = ["Folder", "class_folders", "in_turn"]

Item = TypeVar("Item")
_NONE: Any = object()

_COLUMNS = ("image", "question", "answers")
_PLACEHOLDER = "<image>"
_NOTES = 3  # answers that look alike: so many are named
_ANNOTATORS = 4  # fewer people than that cannot give a VQA soft accuracy of 1
_LOST = {  # what a metric does to outputs, so that some answers can never be given
    "exact_match": "it leaves out articles and the punctuation of sentences",
    "gqa": "it lower-cases outputs and takes blanks and periods off their ends",
}


@dataclass(frozen=True, kw_only=True)
class Folder(Task):
    """Your own: a JSONL (image, question, answers, [choices, kind, id]) or an ImageFolder.

    In a JSONL, ``image`` is a path relative to the file, ``answers`` a text or a list of texts
    (``gqa``: one, ``vqa_...``: four or more), ``choices`` a list of options (an answer is then a
    letter or the text of an option). LLaVA's ``<image>`` in a question is left out. In an
    ImageFolder, ``path/CLASS/*.jpg``, the class is the answer.

    Args:
        path: the JSONL, a folder that holds exactly one, or an ImageFolder.
        metric_name: ``"exact_match"``, ``"letter_match"``, ``"vqa_official"``, ``"vqa_evalai"``,
            ``"vqa_vlmevalkit"``, ``"vqa_lmms-eval"``, ``"gqa"``, or, for an ImageFolder and models
            that give class numbers, ``"top1"``. Empty: letters where the rows have choices, else
            exact match.
        instruction: said after the question instead of LLaVA-1.5's; ``""`` for nothing.
        question: asked of every picture of an ImageFolder.
        max_new_tokens: longest answer.
        orient: turn pictures as their EXIF data say.
    """

    name: ClassVar[str] = "folder"
    VERSION: ClassVar[int] = 2

    path: str
    metric_name: str = ""  # type: ignore[misc]
    instruction: str | None = None
    question: str = "What is in this picture?"
    max_new_tokens: int = 16  # type: ignore[misc]
    orient: bool = True

    def __post_init__(self) -> None:
        """Reject values outside their range; choose the metric by the data if none is named."""
        super().__post_init__()
        object.__setattr__(self, "path", str(self.path))
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is at least 1, got {self.max_new_tokens}.")
        if not self.metric_name:
            metric = _metric_of(_rows(Path(self.path)) or ())
            object.__setattr__(self, "metric_name", metric)
        check_option(self.name, "metric_name", self.metric_name, tuple(SCORINGS))

    @property
    def generates(self) -> bool:  # type: ignore[override]
        """Whether models write text; with ``top1`` they give class numbers."""
        return self._scoring.generates

    @property
    def _scoring(self) -> Scoring:
        return SCORINGS[self.metric_name]

    def samples(self) -> Sequence[Sample]:
        """Return the samples in the order of the file, or one of each class in turn.

        Raises:
            ConfigError: nothing there, a column is missing, or an answer does not suit the metric.
        """
        rows = _rows(Path(self.path))
        if rows is None:
            return self._of_classes(class_folders(Path(self.path)))
        if not self.generates:
            raise ConfigError(
                f"The metric {self.metric_name!r} takes classes, an ImageFolder; {self.path} holds "
                f"questions. Metrics for questions: "
                f"{', '.join(name for name, s in SCORINGS.items() if s.generates)}."
            )
        self._check(rows)
        chosen = self._chosen([str(number) for number in range(len(rows))])
        base = Path(self.path) if Path(self.path).is_dir() else Path(self.path).parent
        return LazySamples(lambda number: self._of_row(number, *rows[number], base), chosen)

    def notes(self) -> Sequence[str]:
        """Return which answers, different as written, are one to exact match."""
        if self.metric_name != "exact_match":
            return ()
        try:
            rows = _rows(Path(self.path))
            if rows is None:
                found = [(name.replace("_", " "), name) for name in class_folders(Path(self.path))]
            else:
                found = [
                    (text, where) for where, row in rows for text in _texts(row, "answers", where)
                ]
        except ConfigError:
            return ()  # said where the data is needed
        return _alike(found)

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return the question, its options where letters are asked for, and the instruction."""
        lettered = self._scoring.multiple_choice
        lines = [sample.question, *(prompts.option_lines(sample.choices) if lettered else ())]
        default = prompts.LETTER if lettered else prompts.SHORT_ANSWER
        return prompts.instructed(lines, default, style, self.instruction)

    def parse(self, text: str, sample: Sample) -> Parsed:
        """Read the answer by the metric's rules."""
        return self._scoring.parse(text, sample)

    def score(self, sample: Sample, parsed: Parsed) -> float:
        """Return the metric's score."""
        return self._scoring.score(sample, parsed)

    def _check(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Refuse rows that cannot be asked or scored before the first of them is asked."""
        seen: dict[str, str] = {}
        for number, (where, row) in enumerate(rows):
            _check_asked(row, where)
            answers, choices = _texts(row, "answers", where), _texts(row, "choices", where)
            if not any(answer.strip() for answer in answers):
                raise ConfigError(f"{where}: answers is empty; give at least one.")
            if self._scoring.multiple_choice:
                _check_letters(answers, choices, where)
            if self.metric_name.startswith("vqa") and len(answers) < _ANNOTATORS:
                raise ConfigError(
                    f"{where} has {len(answers)} answers; {self.metric_name} compares with what "
                    f"several people say, {_ANNOTATORS} or more. Use metric_name=exact_match."
                )
            if self.metric_name == "gqa" and len(answers) > 1:
                raise ConfigError(
                    f"{where} has {len(answers)} answers; gqa compares with one. Keep one, or use "
                    f"metric_name=exact_match."
                )
            self._check_reached(answers, where)
            name = _id(row, number)
            if name in seen:
                raise ConfigError(f"{where} has the id {name!r}, as {seen[name]} has.")
            seen[name] = where

    def _check_reached(self, answers: Sequence[str], where: str) -> None:
        """Refuse answers that no output can equal under the metric."""
        if self.metric_name not in _LOST:
            return
        sample = Sample(where, "", ImageFile(Path(where)), tuple(answers))
        if not any(self.score(sample, self.parse(answer, sample)) for answer in answers):
            raise ConfigError(
                f"{where}: under {self.metric_name} no output equals the answer {answers[0]!r}, "
                f"since {_LOST[self.metric_name]}. Write it in that form, or use another "
                f"metric_name."
            )

    def _of_row(self, number: int, where: str, row: Mapping[str, Any], base: Path) -> Sample:
        picture = str(row["image"])
        answers, choices = _texts(row, "answers", where), _texts(row, "choices", where)
        if self._scoring.multiple_choice:
            answers = tuple(answer_letter(answer, choices) for answer in answers)
        return Sample(
            id=_id(row, number),
            question=_question(row),
            image=ImageFile(base / picture, where, orient=self.orient),
            answers=answers,
            choices=choices,
            kind=str(row.get("kind") or ""),
            cluster=picture,
        )

    def _of_classes(self, found: Mapping[str, Sequence[Path]]) -> Sequence[Sample]:
        if self._scoring.multiple_choice and len(found) > 26:
            raise ConfigError(f"{len(found)} classes; letters reach to 26. Use exact_match.")
        if self.metric_name.startswith("vqa"):
            raise ConfigError(
                f"{self.path} has one answer per picture, its class; {self.metric_name} compares "
                f"with what several people say. Use metric_name=exact_match."
            )
        names = tuple(name.replace("_", " ") for name in found)
        for folder, name in zip(found, names, strict=True):
            self._check_reached((name,), str(Path(self.path) / folder))
        files = in_turn(
            [[(number, f) for f in files] for number, files in enumerate(found.values())]
        )

        def make(number: int) -> Sample:
            label, file = files[number]
            answer = names[label] if self.generates else str(label)
            where = file.relative_to(self.path).as_posix()
            choices = names if self._scoring.multiple_choice or not self.generates else ()
            return Sample(
                id=where,
                question=self.question,
                image=ImageFile(file, orient=self.orient),
                answers=(answer,),
                choices=choices,
                kind=names[label],
                cluster=where,
            )

        return LazySamples(make, self._chosen([str(file) for _, file in files]))


def _metric_of(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return the metric of rows that name none: letters where they have choices.

    Raises:
        ConfigError: some have choices and some have not.
    """
    without = [where for where, row in rows if not row.get("choices")]
    if not rows or len(without) == len(rows):
        return "exact_match"
    if without:
        raise ConfigError(
            f"{without[0]} has no choices, and {len(rows) - len(without)} of {len(rows)} rows "
            f"have. Give choices to every row, split the file in two, or say "
            f"metric_name=exact_match, under which no options are shown."
        )
    return "letter_match"


def _alike(answers: Iterable[tuple[str, str]]) -> list[str]:
    """Say which answers exact match cannot tell apart though a sign or word does; at most three."""
    first: dict[str, tuple[tuple[str, ...], str, str]] = {}
    found: dict[str, str] = {}
    for text, where in answers:
        plain, lost = plain_text(text), lost_signs(text)
        before = first.setdefault(plain, (lost, text, where))
        if plain and before[0] != lost and plain not in found:
            found[plain] = (
                f"folder: under exact_match the answers {before[1]!r} ({before[2]}) and {text!r} "
                f"({where}) are one, {plain!r}; if they are not, write them in words."
            )
    notes = list(found.values())
    more = [f"folder: {len(notes) - _NOTES} more such answers."] if len(notes) > _NOTES else []
    return notes[:_NOTES] + more


def in_turn(groups: Sequence[Sequence[Item]]) -> list[Item]:
    """Return the first of each group, then the second of each, to the end of the longest.

    The first samples are what a limit takes: of folders in a row they would be one class.
    """
    rounds = itertools.zip_longest(*groups, fillvalue=_NONE)
    return [item for together in rounds for item in together if item is not _NONE]


def class_folders(path: Path) -> dict[str, list[Path]]:
    """Return the pictures of each class of an ImageFolder, classes and files sorted by name.

    Raises:
        ConfigError: no such folder, or no class in it that has a picture.
    """
    if not path.is_dir():
        raise ConfigError(f"There is no folder {path}.")
    known = Image.registered_extensions()
    found: dict[str, list[Path]] = {}
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known)
        if files:
            found[folder.name] = files
    if not found:
        raise ConfigError(
            f"{path} holds neither a .jsonl file nor folders of pictures, one per class."
        )
    return found


def _jsonl(path: Path) -> Path | None:
    """Return the JSONL that a path stands for, ``None`` for an ImageFolder.

    Raises:
        ConfigError: nothing there, another kind of file, or several to choose from.
    """
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ConfigError(f"{path} holds several .jsonl files ({names}); name one of them.")
        return files[0] if files else None
    if not path.exists():
        raise ConfigError(f"There is no file or folder {path}.")
    if path.suffix != ".jsonl":
        raise ConfigError(f"{path} is no .jsonl file; the task folder reads JSONL or ImageFolders.")
    return path


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]] | None:
    """Return ``("FILE, line N", row)`` of a JSONL, ``None`` for an ImageFolder."""
    file = _jsonl(path)
    if file is None:
        class_folders(path)
        return None
    return jsonl_lines(file, _COLUMNS)


def _id(row: Mapping[str, Any], number: int) -> str:
    """Return a row's id: its own, or its number."""
    own = row.get("id")
    return str(number if own is None else own)


def _check_asked(row: Mapping[str, Any], where: str) -> None:
    """Refuse an image that is no path, and a question that is no text (numbers count as texts)."""
    image, question = row["image"], row["question"]
    if not isinstance(image, str) or not image:
        raise ConfigError(f"{where}: image is the path of a picture, got {image!r:.80}.")
    if isinstance(question, bool) or not isinstance(question, str | int | float):
        raise ConfigError(f"{where}: question is a text, got {question!r:.80}.")
    if str(question).count(_PLACEHOLDER) > 1:
        raise ConfigError(
            f"{where}: the question has {str(question).count(_PLACEHOLDER)} {_PLACEHOLDER}; a row "
            f"is about one picture."
        )


def _question(row: Mapping[str, Any]) -> str:
    """Return a row's question without LLaVA's placeholder: each model has a place of its own."""
    return str(row["question"]).replace(_PLACEHOLDER, "").strip()


def _texts(row: Mapping[str, Any], column: str, where: str) -> tuple[str, ...]:
    """Return a column that holds a text or a list of texts (numbers count as texts)."""
    value = row.get(column)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, str | int | float) for item in values):
        raise ConfigError(f"{where}: {column} is a text or a list of texts, got {value!r}.")
    return tuple(str(item) for item in values)


def _check_letters(answers: Sequence[str], choices: Sequence[str], where: str) -> None:
    if not choices:
        raise ConfigError(f"{where} has no choices; letter_match needs them in every row.")
    try:
        prompts.letters(len(choices))
        for answer in answers:
            answer_letter(answer, choices)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
