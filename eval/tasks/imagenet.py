# SPDX-License-Identifier: Apache-2.0
"""ImageNet-1k: class numbers from timm classifiers, or zero-shot from open_clip models."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchmetrics
from torch import Tensor

from visprune.errors import ConfigError
from visprune.eval.metrics.base import percent
from visprune.eval.metrics.topk import TopK, parse_ranking
from visprune.eval.tasks.base import Parsed, PromptStyle, Sample, Scored
from visprune.eval.tasks.data import DataTask
from visprune.eval.tasks.folder import class_folders, in_turn
from visprune.eval.tasks.loading import find_file
from visprune.eval.tasks.rows import FileRows, Rows
from visprune.eval.tasks.scoring import first_class, score_class

__all__ = ["ImageNet", "ranking_text", "zero_shot_classifier"]


@dataclass(frozen=True, kw_only=True)
class ImageNet(DataTask):
    """ImageNet-1k validation (arXiv:1409.0575): 50,000 pictures, top-1 and top-5.

    For models that give class numbers: timm ViTs, and open_clip models with
    :func:`zero_shot_classifier`. Size, crop and interpolation are the model's own. A folder is an
    ImageFolder of synsets (``n01440764/*.JPEG``) or holds one as ``val/``; with other class names,
    classes are numbered in the order of their names. A model that was trained here knows the names
    of its classes, and they are matched by name.
    """

    name: ClassVar[str] = "imagenet"
    VERSION: ClassVar[int] = 1
    metric_name: ClassVar[str] = "top1"
    generates: ClassVar[bool] = False
    HUB: ClassVar[str] = "ILSVRC/imagenet-1k"
    SPLITS: ClassVar[Mapping[str, str]] = {"val": "validation"}
    COLUMNS: ClassVar[Sequence[str]] = ("label",)
    LAYOUT: ClassVar[str] = "val/SYNSET/*.JPEG"

    split: str = "val"

    @functools.cached_property  # every method of a study asks, of 50,000 files
    def classes(self) -> tuple[dict[str, int], list[str]]:
        """Number of every class by its name, and the names of those that the data holds.

        Names are ImageNet's synsets, or those of the folders.

        Raises:
            ConfigError: the data is not there, or some folders are synsets and others not.
        """
        folder = self._folder()
        root = folder and (find_file(folder, "val") or folder)
        if root is None or _from_the_hub(root):
            return _synsets(), list(_synsets())
        held = list(class_folders(root))
        return _class_numbers(held), held

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return nothing: no question is asked."""
        return ""

    def parse(self, text: str, sample: Sample) -> Parsed:
        """Read class numbers, best first, separated by blanks; the first is the answer."""
        return first_class(text, sample)

    def score(self, sample: Sample, parsed: Parsed) -> float:
        """Return 1 where the first class is right."""
        return score_class(sample, parsed)

    def metric(self) -> torchmetrics.Metric:
        """Return top-1 and top-5."""
        return TopK()

    def aggregate(
        self, records: Sequence[Scored], *, errors_count_as_wrong: bool = False
    ) -> dict[str, float]:
        """Return ``score`` (top-1), ``top1`` and ``top5``."""
        taken = [r for r in records if r.score is not None or errors_count_as_wrong]
        if not taken:
            return {}
        figures = {f"top{k}": percent(sum(_among(r, k) for r in taken), len(taken)) for k in (1, 5)}
        return {"score": figures["top1"], **figures}

    def _names(self, rows: Rows) -> list[str]:
        if isinstance(rows, FileRows):
            return [str(name) for name in rows.column("name")]
        return [str(number) for number in range(len(rows))]

    def _files(self, folder: Path) -> FileRows | None:
        root = find_file(folder, "val") or folder
        if _from_the_hub(root):
            return None
        found = class_folders(root)
        numbers = _class_numbers(list(found))
        rows: list[Mapping[str, Any]] = []
        files: list[Path] = []
        for name, file in in_turn([[(n, file) for file in found[n]] for n in found]):
            rows.append({"label": numbers[name], "name": file.relative_to(root).as_posix()})
            files.append(file)
        return FileRows(rows, files)

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        label = str(rows.row(number)["label"])
        return Sample(
            id=name,
            question="",
            image=rows.picture(number),
            answers=(label,),
            kind=label,
            cluster=name,
        )


def _from_the_hub(root: Path) -> bool:
    """Whether a folder is a copy of the Hub's repository, or ``save_to_disk`` output."""
    signs = ("*.parquet", "*/*.parquet", "dataset_info.json", "dataset_dict.json")
    return bool(find_file(root, *signs))


def _among(record: Scored, k: int) -> bool:
    return record.answers[0] in map(str, parse_ranking(record.text or "")[:k])


def _class_numbers(folders: Sequence[str]) -> dict[str, int]:
    """Return the number of each class folder: ImageNet's own where folders are its synsets."""
    synsets = _synsets()
    known = [name for name in folders if name in synsets]
    if known and len(known) != len(folders):
        strange = sorted(set(folders) - set(known))
        raise ConfigError(
            f"imagenet: {len(known)} folders are synsets of ImageNet-1k, others are not: "
            f"{', '.join(strange[:5])}."
        )
    return synsets if known else {name: number for number, name in enumerate(sorted(folders))}


@functools.cache
def _synsets() -> dict[str, int]:
    from timm.data import ImageNetInfo

    names = ImageNetInfo("imagenet-1k").label_names()
    return {name: number for number, name in enumerate(names)}


@torch.inference_mode()
def zero_shot_classifier(
    model: Any,
    tokenizer: Any,
    classes: Sequence[str] | None = None,
    templates: Sequence[Any] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the text classifier of an open_clip model, ``[d, classes]``.

    ``open_clip.build_zero_shot_classifier`` (3.3): each text is embedded and normalised, averaged
    over the templates, normalised again, as in clip_benchmark; averaging what is not normalised
    gives slightly other weights.

    Args:
        model: an open_clip model.
        tokenizer: its tokenizer.
        classes: class names; ``None``: OpenAI's thousand for ImageNet.
        templates: ``None``: OpenAI's eighty.
        device: where the model is.
    """
    import open_clip

    return open_clip.build_zero_shot_classifier(
        model,
        tokenizer,
        classnames=open_clip.IMAGENET_CLASSNAMES if classes is None else classes,
        templates=open_clip.OPENAI_IMAGENET_TEMPLATES if templates is None else templates,
        device=device,
    )


def ranking_text(logits: Tensor, numbers: Tensor | None = None, k: int = 5) -> list[str]:
    """Return the texts that this task reads, such as ``"12 5 7 1 9"``.

    Args:
        logits: ``[B, C]``.
        numbers: the task's number of each class of the model ``[C]``; ``None``: the same.
        k: how many to name.
    """
    best = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    best = best if numbers is None else numbers[best]
    return [" ".join(map(str, row)) for row in best.tolist()]
