# SPDX-License-Identifier: Apache-2.0
"""MME (arXiv:2306.13394): accuracy and accuracy-plus over pairs of yes/no questions, in points."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torchmetrics
from torch import Tensor

from visprune.errors import ConfigError, did_you_mean
from visprune.eval.metrics.base import check_variant, paired, percent, references_of
from visprune.eval.metrics.yesno import MME_PARSERS, parse_yes_no, yes_no_label

__all__ = ["COGNITION", "MME", "PERCEPTION", "MMEParser", "mme_figures"]

MMEParser = Literal["lmms-eval", "vlmevalkit"]
PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark"),
    *("artwork", "OCR"),
)
COGNITION = (
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
_CATEGORIES = (*PERCEPTION, *COGNITION)


def mme_figures(rows: Iterable[tuple[str, Any, bool]]) -> dict[str, float]:
    """Return MME's points from single questions.

    A category has ``acc``, the share of questions that are right, and ``acc_plus``, the share of
    pictures whose two questions are both right, each times 100; its points are their sum, 200 at
    most. Perception sums ten categories, cognition four. Papers of the field report either
    perception (LLaVA-1.5: 1510.7) or the sum of both (about 1862): name which.

    Args:
        rows: category, id of the picture (two questions share it), whether the answer was right.

    Returns:
        ``score`` (perception + cognition), ``perception``, ``cognition``, and per category
        ``CATEGORY``, ``acc/CATEGORY`` and ``acc_plus/CATEGORY``; ``unpaired``: questions whose
        partner is missing, which count in ``acc`` alone (lmms-eval stops there).

    Raises:
        ConfigError: an unknown category, or three questions about one picture.
    """
    pairs: dict[str, dict[Any, list[bool]]] = {}
    for category, picture, right in rows:
        pairs.setdefault(mme_category(category), {}).setdefault(picture, []).append(right)
    if not pairs:
        return {}
    figures: dict[str, float] = {"score": 0.0, "perception": 0.0, "cognition": 0.0, "unpaired": 0.0}
    for category in (name for name in _CATEGORIES if name in pairs):
        acc, acc_plus, unpaired = _category(category, list(pairs[category].values()))
        part = "perception" if category in PERCEPTION else "cognition"
        figures[f"acc/{category}"], figures[f"acc_plus/{category}"] = acc, acc_plus
        figures[category] = acc + acc_plus
        figures[part] += acc + acc_plus
        figures["unpaired"] += unpaired
    figures["score"] = figures["perception"] + figures["cognition"]
    return figures


def mme_category(name: str) -> str:
    """Return a category's name.

    Raises:
        ConfigError: MME has none of that name.
    """
    if name not in _CATEGORIES:
        hint = did_you_mean(name, _CATEGORIES)
        raise ConfigError(
            f"MME has no category {name!r}.{hint} Categories: {', '.join(_CATEGORIES)}."
        )
    return name


def _category(name: str, pictures: Sequence[Sequence[bool]]) -> tuple[float, float, int]:
    if max(len(answers) for answers in pictures) > 2:
        raise ConfigError(
            f"MME asks two questions per picture; {name} has a picture with more. Were two runs "
            f"put together, or question ids repeated?"
        )
    answers = [right for pair in pictures for right in pair]
    whole = [pair for pair in pictures if len(pair) == 2]
    acc_plus = percent(sum(all(pair) for pair in whole), len(whole)) if whole else 0.0
    return percent(sum(answers), len(answers)), acc_plus, len(pictures) - len(whole)


class MME(torchmetrics.Metric):
    """MME's points: ``score``, ``perception``, ``cognition`` and each category.

    Args:
        parser: ``"lmms-eval"`` (the first four characters) or ``"vlmevalkit"`` (a word).

    Raises:
        ConfigError: unknown parser.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    # Rows (category, id, right, parsed), [n, 4]: the two questions of a picture may meet different
    # processes, so sums of pairs cannot be kept; rows are concatenated instead.
    rows: list[Tensor]

    def __init__(self, parser: MMEParser = "lmms-eval", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_variant("MME", "parser", parser, MME_PARSERS)
        self.parser: MMEParser = parser
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(
        self,
        predictions: Sequence[str],
        references: Sequence[Any],
        categories: Sequence[str] | None = None,
        question_ids: Sequence[str] | None = None,
    ) -> None:
        """Add outputs and answers.

        Args:
            predictions: outputs of the model.
            references: ``"Yes"`` or ``"No"``, or samples, which bring the rest with them.
            categories: of each question; ``None``: the samples' kinds.
            question_ids: id of each question's picture; ``None``: the samples' clusters.

        Raises:
            ConfigError: lengths differ, or an answer or category is none of MME's.
        """
        pairs = paired(predictions, references)
        kinds = categories if categories is not None else [ref.kind for ref in references]
        ids = question_ids if question_ids is not None else [ref.cluster for ref in references]
        rows = []
        for (text, reference), category, picture in zip(pairs, kinds, ids, strict=True):
            mme_category(category)
            answer, _ = parse_mme(text, self.parser)
            (truth,) = map(yes_no_label, references_of(reference))
            if truth is None:
                raise ConfigError(f"MME's answers are 'Yes' and 'No', got {reference!r}.")
            right, number = answer == truth, _number(picture)
            rows.append([_CATEGORIES.index(category), number, int(right), int(answer is not None)])
        self.rows.append(self._tensor(rows))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Synchronise; a process without questions takes part with no rows.

        With an empty list torchmetrics (1.9) would leave it out of the exchange, and the others
        would wait for it or read what it sends next.
        """
        if isinstance(self.rows, list) and not self.rows:
            self.rows.append(self._tensor([]))
        super().sync(*args, **kwargs)

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.device).reshape(-1, 4)

    def compute(self) -> dict[str, float]:
        """Return the figures of :func:`mme_figures` and ``unparsed``, in percent."""
        # After a synchronisation the state is one tensor, before it a list.
        parts = [self.rows] if isinstance(self.rows, Tensor) else self.rows
        rows = [row for part in parts for row in part.tolist()]
        figures = mme_figures((_CATEGORIES[kind], number, bool(ok)) for kind, number, ok, _ in rows)
        if figures:
            figures["unparsed"] = percent(sum(not row[3] for row in rows), len(rows))
        return figures


def parse_mme(text: str, parser: MMEParser) -> tuple[str | None, str]:
    """Return ``"yes"``, ``"no"`` or ``None`` and the name of the rule."""
    return parse_yes_no(text, "mme" if parser == "lmms-eval" else parser)


def _number(picture: str) -> int:
    """Return 63 bits that stand for an id: tensors hold no text."""
    return int.from_bytes(hashlib.sha256(str(picture).encode()).digest()[:8], "big") >> 1
