# SPDX-License-Identifier: Apache-2.0
"""Yes/no benchmarks: POPE and MME."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torchmetrics

from visprune.errors import ConfigError
from visprune.eval.metrics.mme import (
    COGNITION,
    PERCEPTION,
    mme_figures,
    parse_mme,
)
from visprune.eval.metrics.mme import (
    MME as MMEMetric,
)
from visprune.eval.metrics.pope import POPE as POPEMetric
from visprune.eval.metrics.pope import SPLITS, pope_cell, pope_figures
from visprune.eval.metrics.yesno import MME_PARSERS, POPE_PARSERS, parse_yes_no, yes_no_label
from visprune.eval.tasks import prompts
from visprune.eval.tasks.base import Parsed, PromptStyle, Sample, Scored, check_option
from visprune.eval.tasks.data import DataTask
from visprune.eval.tasks.loading import find_file, jsonl_lines, read_text
from visprune.eval.tasks.rows import FileRows, Rows

__all__ = ["MME", "POPE"]

_MME_TAIL = " Please answer yes or no."


@dataclass(frozen=True, kw_only=True)
class _YesNoTask(DataTask):
    """Base of the tasks whose right answers are yes and no."""

    TEXTS: ClassVar[Sequence[str]] = ("question", "answer", "category")

    def score(self, sample: Sample, parsed: Parsed) -> float:
        """Return 1 for the right answer; what no rule could read is wrong, whatever the label."""
        right = yes_no_label(sample.answers[0])
        return float(parsed.answer is not None and parsed.answer == right)

    def _check(self, rows: Rows, wanted: Sequence[int]) -> None:
        super()._check(rows, wanted)
        labels = rows.column("answer")
        for number in wanted:
            if yes_no_label(labels[number]) is None:
                raise ConfigError(
                    f"{rows.place(number)}: the right answer is yes or no, got "
                    f"{labels[number]!r:.40}; correct it, or take the row out."
                )


@dataclass(frozen=True, kw_only=True)
class POPE(_YesNoTask):
    """POPE (arXiv:2305.10355): is the object in the picture? 3 splits x 3,000 questions; F1.

    The score is the mean F1 of the splits (LLaVA-1.5: 85.9, with an older random split of 2,910
    questions). A folder holds ``coco_pope_{random,popular,adversarial}.json`` (or ``coco/`` with
    them, as in LLaVA's layout) and ``val2014/*.jpg``.

    Args:
        split: ``"all"``, or one of the three.
        parser: of :class:`visprune.eval.metrics.POPE`.
    """

    name: ClassVar[str] = "pope"
    VERSION: ClassVar[int] = 1
    max_new_tokens: ClassVar[int] = 16
    HUB: ClassVar[str] = "lmms-lab-encoder/POPE"
    SPLITS: ClassVar[Mapping[str, str]] = dict.fromkeys(("all", *SPLITS), "test")
    COLUMNS: ClassVar[Sequence[str]] = ("question_id", "question", "answer", "category")
    LAYOUT: ClassVar[str] = "coco_pope_*.json and val2014/*.jpg"

    split: str = "all"
    parser: str = "llava"

    def __post_init__(self) -> None:
        """Reject an unknown parser."""
        super().__post_init__()
        check_option(self.name, "parser", self.parser, POPE_PARSERS)

    @property
    def metric_name(self) -> str:  # type: ignore[override]
        """``"pope_"`` and the parser."""
        return f"pope_{self.parser}"

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return the question and LLaVA-1.5's instruction."""
        return prompts.short_answer(sample.question, style)

    def parse(self, text: str, sample: Sample) -> Parsed:
        """Read yes or no by the parser's rule; blanks at the ends never count."""
        return Parsed(*parse_yes_no(text.strip(), self.parser))

    def metric(self) -> torchmetrics.Metric:
        """Return the metric with this parser."""
        return POPEMetric(parser=self.parser)  # type: ignore[arg-type]

    def aggregate(
        self, records: Sequence[Scored], *, errors_count_as_wrong: bool = False
    ) -> dict[str, float]:
        """Return the figures of :func:`visprune.eval.metrics.pope.pope_figures`."""
        counts: dict[str, dict[str, int]] = {}
        for record in records:
            if record.score is None and not errors_count_as_wrong:
                continue
            label = record.answers[0]
            cell = pope_cell(record.answer, label)
            if record.score is None:  # an error is as wrong as can be: the opposite answer
                cell = "fn" if yes_no_label(label) == "yes" else "fp"
            row = counts.setdefault(record.kind, {})
            row[cell] = row.get(cell, 0) + 1
        return pope_figures(counts, self.parser)  # type: ignore[arg-type]

    def _wanted(self, rows: Rows) -> list[int]:
        kinds = rows.column("category")
        return [i for i, kind in enumerate(kinds) if self.split in ("all", kind)]

    def _names(self, rows: Rows) -> list[str]:
        columns = (rows.column("category"), rows.column("question_id"))
        return [f"{kind}/{number}" for kind, number in zip(*columns, strict=True)]

    def _files(self, folder: Path) -> FileRows | None:
        rows: list[tuple[str, Mapping[str, Any], Path]] = []
        missing = []
        for split in SPLITS:
            told = find_file(folder, *(f"{d}coco_pope_{split}.json" for d in ("", "coco/")))
            if told is None:
                if self.split in ("all", split):
                    missing.append(split)
                continue
            for where, row in jsonl_lines(told, ("question_id", "image", "text", "label")):
                more = {"question": row["text"], "answer": row["label"], "category": split}
                rows.append((where, row | more, folder / "val2014" / str(row["image"])))
        if rows and missing:
            raise ConfigError(
                f"pope: {folder} has no coco_pope_{missing[0]}.json; split={self.split!r} needs it."
            )
        return FileRows.of(rows) if rows else None

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        picture = str(row.get("image") or row.get("image_source") or name)
        return Sample(
            id=name,
            question=row["question"].strip(),
            image=rows.picture(number),
            answers=(row["answer"],),
            kind=row["category"],
            cluster=Path(picture).stem,
        )


@dataclass(frozen=True, kw_only=True)
class MME(_YesNoTask):
    """MME (arXiv:2306.13394): 14 categories, two yes/no questions per picture; points.

    A folder is ``MME_Benchmark_release_version``, or holds it.

    Args:
        part: ``"all"``, ``"perception"`` (LLaVA-1.5's 1510.7) or ``"cognition"``.
        parser: of :class:`visprune.eval.metrics.MME`.
    """

    name: ClassVar[str] = "mme"
    unit: ClassVar[str] = "points"
    VERSION: ClassVar[int] = 1
    HUB: ClassVar[str] = "lmms-lab-encoder/MME"
    SPLITS: ClassVar[Mapping[str, str]] = {"test": "test"}
    COLUMNS: ClassVar[Sequence[str]] = ("question_id", "question", "answer", "category")
    LAYOUT: ClassVar[str] = "MME_Benchmark_release_version/CATEGORY/*.txt and pictures"

    split: str = "test"
    part: str = "all"
    parser: str = "lmms-eval"

    def __post_init__(self) -> None:
        """Reject an unknown part or parser."""
        super().__post_init__()
        check_option(self.name, "part", self.part, tuple(_PARTS))
        check_option(self.name, "parser", self.parser, MME_PARSERS)

    @property
    def metric_name(self) -> str:  # type: ignore[override]
        """``"mme_"`` and the parser."""
        return f"mme_{self.parser}"

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return the question; LLaVA-1.5's instruction takes the place of MME's own."""
        if style == "plain":
            return sample.question
        return prompts.short_answer(sample.question.replace(_MME_TAIL, ""), style)

    def parse(self, text: str, sample: Sample) -> Parsed:
        """Read yes or no by the parser's rule."""
        return Parsed(*parse_mme(text, self.parser))  # type: ignore[arg-type]

    def metric(self) -> torchmetrics.Metric:
        """Return the metric with this parser."""
        return MMEMetric(parser=self.parser)  # type: ignore[arg-type]

    def aggregate(
        self, records: Sequence[Scored], *, errors_count_as_wrong: bool = False
    ) -> dict[str, float]:
        """Return the figures of :func:`visprune.eval.metrics.mme.mme_figures`."""
        return mme_figures(
            (record.kind, record.cluster, record.score == 1.0)
            for record in records
            if record.score is not None or errors_count_as_wrong
        )

    def _wanted(self, rows: Rows) -> list[int]:
        return [i for i, kind in enumerate(rows.column("category")) if kind in _PARTS[self.part]]

    def _check(self, rows: Rows, wanted: Sequence[int]) -> None:
        super()._check(rows, wanted)
        pictures = self._groups(rows, ())
        asked = Counter(pictures[number] for number in wanted)
        for number in wanted:
            if asked[pictures[number]] > 2:
                raise ConfigError(
                    f"{rows.place(number)}: MME asks two questions about a picture, here are "
                    f"{asked[pictures[number]]} about {pictures[number]}."
                )

    def _groups(self, rows: Rows, names: Sequence[str]) -> Sequence[str]:
        columns = (rows.column("category"), rows.column("question_id"))
        return [_mme_picture(*pair) for pair in zip(*columns, strict=True)]

    def _files(self, folder: Path) -> FileRows | None:
        root = find_file(folder, "MME_Benchmark_release_version") or folder
        rows: list[tuple[str, Mapping[str, Any], Path]] = []
        for category in (*PERCEPTION, *COGNITION):
            # Half of the categories keep texts and pictures in folders of their own.
            for told in sorted(root.glob(f"{category}/**/*.txt")):
                picture = find_file(
                    root / category, f"images/{told.stem}.*[!t]", f"{told.stem}.*[!t]"
                )
                file = picture or told.with_suffix(".jpg")
                # As LLaVA's and lmms-eval's question_id: "count/000000006040.jpg".
                columns = {"question_id": f"{category}/{file.name}", "category": category}
                for where, question, answer in _mme_lines(told):
                    row = {**columns, "question": question, "answer": answer}
                    rows.append((where, row, file))
        return FileRows.of(rows) if rows else None

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        return Sample(
            id=name,
            question=row["question"].strip(),
            image=rows.picture(number),
            answers=(row["answer"],),
            kind=row["category"],
            cluster=_mme_picture(row["category"], row["question_id"]),
        )


def _mme_lines(path: Path) -> list[tuple[str, str, str]]:
    """Return ``"FILE, line N"``, question and answer of each line; empty lines are skipped.

    Raises:
        ConfigError: it cannot be read, or a line has no tab between the two.
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        question, tab, answer = line.partition("\t")
        if not tab:
            raise ConfigError(
                f"{path}, line {number}: a tab stands between question and answer, got "
                f"{line[:60]!r}."
            )
        found.append((f"{path}, line {number}", question, answer))
    return found


def _mme_picture(category: str, question_id: str) -> str:
    """Return the id of a picture, "count/0001.jpg": question ids have their category or not."""
    return question_id if question_id.startswith(f"{category}/") else f"{category}/{question_id}"


_PARTS = {"all": (*PERCEPTION, *COGNITION), "perception": PERCEPTION, "cognition": COGNITION}
