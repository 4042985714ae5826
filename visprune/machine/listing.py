# SPDX-License-Identifier: Apache-2.0
"""The models that can be pruned, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from visprune.backbones.encoders import LACKING
from visprune.backbones.vlm import known
from visprune.catalog import adapters, encoders

if TYPE_CHECKING:
    from visprune.core.method import ModelSpec

_OTHER = "of another package"


@dataclass(frozen=True)
class ModelRow:
    """A family of models that :func:`visprune.prune` takes.

    Attributes:
        name: ``config.model_type`` of a vision-language model; library and class of an encoder.
        kind: ``"vlm"`` or ``"encoder"`` (an image encoder alone).
        models: what users know it by.
        takes: what a budget is given for: pictures, clips, whether tiles are one.
        signals: what it can show of its image encoder: class token, attention, features.
        cost: whether ``run.cost`` counts its operations.
        proved: what its tests run with.
        needs: the transformers that it needs, where an older one is installed.
    """

    name: str
    kind: Literal["vlm", "encoder"]
    models: str
    takes: str
    signals: tuple[str, ...]
    cost: bool
    proved: str
    needs: str = ""

    @property
    def methods(self) -> list[str]:
        """Names of the methods that it takes; imports them."""
        from visprune.machine.plan import fitting

        return fitting(self._spec())

    def _spec(self) -> ModelSpec:
        """Its description, of a size that every method's example fits."""
        from visprune.core.method import ModelSpec

        lacking = {
            capability: "no"
            for capability, shown in (
                ("encoder_attention", "attention"),
                ("encoder_features", "features"),
                ("cls_token", "class token"),
            )
            if shown not in self.signals
        }
        if self.name in known.JOINED:
            lacking["dropping"] = "no"
        lacking |= dict.fromkeys(LACKING.get(self.name, ()), "no")
        inside = self.kind == "encoder" or self.name in known.REDUCED
        return ModelSpec(
            family=self.name,
            num_layers=32 if self.kind == "vlm" else 0,
            has_cls="class token" in self.signals,
            multi_axis_rope=self.name in known.THREE_AXES,
            encoder_layers=24 if inside else 0,
            encoder_width=64 if inside else 0,
            patch_refusal="" if self.name in known.BEFORE else ModelSpec.patch_refusal,
            lacking=lacking,
        )

    def __str__(self) -> str:
        shown = ", ".join(self.signals) or "nothing"
        return (
            f"{self.models or _OTHER}; {self.takes}; shows of its encoder: {shown}"
            f"{'' if self.cost else '; cost not known'}"
            f"{f'; needs {self.needs}' if self.needs else ''}"
        )


def list_models(kind: Literal["vlm", "encoder"] | None = None) -> list[ModelRow]:
    """What can be pruned, one row a family; a model of another family is tried and checked first.

    Args:
        kind: vision-language models or encoders alone; ``None``: both.

    Example:
        >>> [row.name for row in visprune.list_models("vlm")][:2]
        ['llava', 'llava_next']
    """
    rows = [] if kind == "encoder" else [_family(name) for name in adapters.names()]
    return rows if kind == "vlm" else [*rows, *(_encoder(name) for name in encoders.names())]


def _family(name: str) -> ModelRow:
    models, takes = known.KNOWN.get(name, (_OTHER, "pictures"))
    own = name in known.KNOWN
    return ModelRow(
        name,
        "vlm",
        models,
        takes,
        known.signals(name),
        cost=name in (*known.FIRST, *known.COUNTED),
        proved=known.proof(name) if own else "nothing of this package",
        needs=f"transformers {known.SINCE[name]}" if known.lacking(name) else "",
    )


def _encoder(name: str) -> ModelRow:
    """Of most encoders, whether there is a class token depends on the model."""
    none = "cls_token" in LACKING.get(name, ())
    return ModelRow(
        name,
        "encoder",
        encoders.summary(name),
        "pictures",
        ("attention", "features") if none else ("class token", "attention", "features"),
        cost=True,
        proved="every method inside an encoder",
    )
