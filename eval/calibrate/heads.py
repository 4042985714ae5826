# SPDX-License-Identifier: Apache-2.0
"""Gates of key heads on one model: which of them look at what a streaming head would drop."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from visprune.core.cache import Eviction, Gated, Looked
from visprune.core.cache.gates import Gates
from visprune.core.method import ModelSpec
from visprune.errors import ConfigError
from visprune.eval.check.run import QUESTION
from visprune.eval.models.base import ModelEntry, Request
from visprune.eval.models.load_vlm import load
from visprune.eval.models.vlm import VLM
from visprune.eval.show.vlm import open_picture
from visprune.eval.tasks.base import Sample
from visprune.machine.find import find_adapter
from visprune.machine.run import prune
from visprune.methods.duo_attention import DuoAttention

__all__ = ["HeadGates", "calibrate", "find_gates", "pictures_of"]


@dataclass(frozen=True)
class HeadGates:
    """How much attention of each key head falls on what it would drop if it streamed.

    Attributes:
        gates: of every layer, of every key head, the mean over prompts, in [0, 1]; an empty row for
            a layer that is left whole.
        prompts: how many were read.
        measured: with what: the settings of ``duo_attention``.
        model: the family.
    """

    gates: Gates
    prompts: int
    measured: Mapping[str, Any]
    model: str

    def write(self, path: str | Path) -> Path:
        """Write the file that ``duo_attention(gates=...)`` reads.

        Raises:
            ConfigError: it cannot be written.
        """
        path = Path(path)
        content = {"model": self.model, "prompts": self.prompts, "measured": dict(self.measured),
                   "gates": [list(row) for row in self.gates]}  # fmt: skip
        try:
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"Cannot write {str(path)!r}: {error.strerror}.") from error
        return path

    def __str__(self) -> str:
        lines = [f"layer   gates of key heads (mean of {self.prompts} prompts)"]
        for number, row in enumerate(self.gates):
            said = "  ".join(f"{gate:.4f}" for gate in row) or "left whole"
            lines.append(f"{number:5d}   {said}")
        return "\n".join(lines)


def calibrate(
    model: str,
    pictures: str | Path,
    *,
    questions: Sequence[str] = (QUESTION,),
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    **measured: Any,
) -> HeadGates:
    """Load a model, and measure its heads on the pictures of a folder.

    Args:
        model: as ``visprune check`` takes it: ``embedded``, a folder, or a name on the Hub.
        pictures: a folder of picture files, at any depth.
        questions: asked in turn, one of each picture.
        limit: how many pictures; ``None``: all.
        dtype: of the model.
        device: the same.
        **measured: see :func:`find_gates`.

    Raises:
        ConfigError: there is no such model or no picture, or see :func:`find_gates`.
        UnsupportedModel: the model has no adapter.
    """
    files = pictures_of(pictures)[:limit]
    vlm = load(ModelEntry(model, dtype, device))
    find_adapter(vlm.model)  # a refusal comes before the first picture is read
    return find_gates(vlm.model, _prompts(vlm, files, questions), **measured)


def pictures_of(folder: str | Path) -> list[Path]:
    """The picture files of a folder, at any depth, by name.

    Raises:
        ConfigError: no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {str(folder)!r}. Give one that holds pictures.")
    known = Image.registered_extensions()
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known and p.is_file())
    if not found:
        raise ConfigError(f"{str(folder)!r} holds no picture. Give a folder of PNG, JPEG or WebP.")
    return found


def _prompts(vlm: VLM, files: Sequence[Path], questions: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the model takes for each picture."""
    for number, file in enumerate(files):
        question, image = questions[number % len(questions)], open_picture(file)
        sample = Sample(str(number), question, partial(open_picture, file))
        yield vlm.inputs([Request(sample, question, image)], vlm.style)


@dataclass(frozen=True)
class _Noting(Gated):
    """Notes the gates of every layer of every sample, and lets all stay."""

    noted: dict[int, list[Tensor]] = field(default_factory=dict, compare=False)

    def share(self, layers: Sequence[Looked]) -> list[Tensor]:
        """All."""
        for looked in layers:
            self.noted.setdefault(looked.layer, []).append(self.gate(looked).float().cpu())
        return [torch.full((looked.heads,), looked.num_free) for looked in layers]


@dataclass(frozen=True, kw_only=True)
class _Measured(DuoAttention):
    """``duo_attention`` that measures and drops nothing."""

    noted: dict[int, list[Tensor]] = field(default_factory=dict, compare=False)

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Its own, with a budget that notes."""
        budget = _Noting(self.sparsity, None, self.window, self.noted)
        return replace(super().eviction(spec), budget=budget)


@torch.inference_mode()
def find_gates(model: Any, prompts: Iterable[Mapping[str, Any]], **measured: Any) -> HeadGates:
    """Measure how much each key head looks at what it would drop if it streamed.

    Of a head, the part of the prompt's last queries' attention that falls on slots which are
    neither sinks nor recent: the mean over queries, over the query heads of the key head, and over
    prompts. DuoAttention (arXiv:2410.10819) trains its gates instead, by the difference that
    streaming makes to the last states; a head with a large gate retrieves, here as there.

    Args:
        model: a vision-language model; it is left as it was.
        prompts: what the model takes, each with a picture.
        **measured: what a streaming head would keep, as ``duo_attention`` takes it: ``num_keep``,
            ``keep_ratio`` or ``max_cache``, and ``sinks``, ``window``, ``scope``. Without an
            amount: a tenth of the visual tokens.

    Raises:
        ConfigError: no prompt with a picture, a setting that is none, or the model is pruned.
        UnsupportedModel: the model has no adapter, or one latent for all heads.
    """
    if not {"num_keep", "keep_ratio", "max_cache"} & set(measured):
        measured["keep_ratio"] = 0.1
    adapter = find_adapter(model)
    method = _Measured.from_params(**measured)
    extra: dict[str, Any] = {} if adapter.heads_all else {"logits_to_keep": 1}
    with prune(model, method):
        for inputs in prompts:
            model(**inputs, use_cache=True, **extra)
    if not method.noted:
        raise ConfigError(
            "There is no prompt with a picture to measure heads on. Give at least one."
        )
    rows: list[tuple[float, ...]] = [()] * adapter.spec.num_layers
    for layer, found in method.noted.items():
        rows[layer] = tuple(round(x, 6) for x in torch.stack(found).mean(0).tolist())
    count = len(next(iter(method.noted.values())))
    return HeadGates(tuple(rows), count, measured, adapter.spec.family)
