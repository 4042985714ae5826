# SPDX-License-Identifier: Apache-2.0
"""CLIP's text tower, for methods that rank patches by what a question says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from visprune.core.method import PruningMethod
from visprune.core.signals import EncoderFeatures, TextIds
from visprune.core.signals.base import Signal
from visprune.errors import ConfigError

IDS, PATCHES = TextIds(which="after_image"), EncoderFeatures("feature")
NEEDS: tuple[Signal, ...] = (IDS, PATCHES)


class TextTower:
    """The text tower of the CLIP model whose image encoder a vision-language model has.

    It reads the prompt's text behind the picture, template and all; ``cut`` can take the question
    out of it. A text of more tokens than the tower has places is read in parts.

    Args:
        model: a ``CLIPModel`` of transformers (``openai/clip-vit-large-patch14-336`` for
            LLaVA-1.5), on the device of the other model.
        tokenizer: its tokenizer.
        words: the tokenizer of the vision-language model, to read its prompt by.
        cut: from the prompt's text to what is asked.

    Raises:
        ConfigError: the model is no whole CLIP.
    """

    def __init__(
        self, model: Any, tokenizer: Any, words: Any, cut: Callable[[str], str] | None = None
    ) -> None:
        for part in ("text_model", "text_projection", "vision_model", "visual_projection"):
            if not hasattr(model, part):
                raise ConfigError(
                    f"A text tower is a CLIPModel with {part}; {type(model).__name__} has none. "
                    f"Load it with transformers.CLIPModel.from_pretrained."
                )
        self.model, self.tokenizer, self.words, self.cut = model, tokenizer, words, cut
        self._known: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> TextTower:
        return self  # weights that no method changes

    def __repr__(self) -> str:
        return f"TextTower({getattr(self.model.config, '_name_or_path', '') or 'CLIP'})"

    @property
    def name(self) -> str:
        """What a record of a method calls it."""
        return repr(self)

    def texts(self, ids: Tensor) -> list[str]:
        """What prompts ask, from ids of their text ``[B, R]``, -1 in padding."""
        rows = [row[row >= 0].tolist() for row in ids]
        said = [self.words.decode(row, skip_special_tokens=True).strip() for row in rows]
        return said if self.cut is None else [self.cut(text) for text in said]

    @torch.no_grad()
    def embed(self, text: str) -> Tensor:
        """Embeddings of a text, one row a part, ``[M, E]``."""
        if text not in self._known:
            if len(self._known) > 256:  # prompts of one batch, and beams, repeat
                self._known.clear()
            ids, mask = self._parts(text)
            pooled = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
            self._known[text] = self.model.text_projection(pooled).float()
        return self._known[text]

    @torch.no_grad()
    def place(self, patches: Tensor) -> Tensor:
        """Patches ``[B, N, C]``, as they leave the encoder, where texts are: ``[B, N, E]``.

        Raises:
            ConfigError: they are of another encoder.
        """
        projection = self.model.visual_projection
        width = projection.weight.shape[1]
        if patches.shape[-1] != width:
            raise ConfigError(
                f"The text tower belongs to an image encoder of {width} features; this model's has "
                f"{patches.shape[-1]}. Load the CLIP that its encoder comes from."
            )
        x = self.model.vision_model.post_layernorm(patches.to(projection.weight))
        return projection(x).float()

    def _parts(self, text: str) -> tuple[Tensor, Tensor]:
        """Ids and mask, ``[M, places]``: each part between the marks of a text's begin and end."""
        whole = list(self.tokenizer(text)["input_ids"])
        first, body, last = whole[:1], whole[1:-1], whole[-1:]
        places = int(self.model.text_model.config.max_position_embeddings) - 2
        parts = [body[n : n + places] for n in range(0, max(1, len(body)), places)]
        rows = [[*first, *part, *last] for part in parts]
        longest = max(map(len, rows))
        device = self.model.text_projection.weight.device
        ids = torch.tensor([row + last * (longest - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(longest, device=device) < lengths[:, None]
        return ids, mask.long()


def of_parts(method: PruningMethod) -> None:
    """Make a method's ``text_tower`` of the parts that were given.

    Raises:
        ConfigError: they are not these parts (a record holds no more than a name).
    """
    given = getattr(method, "text_tower", None)
    if given is None or isinstance(given, TextTower):
        return
    if not isinstance(given, tuple | list) or len(given) not in (3, 4):
        raise ConfigError(
            f"{method.name} takes text_tower=(CLIPModel, its tokenizer, the tokenizer of the "
            f"vision-language model), and behind them what cuts the question out of a prompt; got "
            f"{given!r}."
        )
    object.__setattr__(method, "text_tower", TextTower(*given))


def without_tower(method: PruningMethod) -> dict[str, Any]:
    """A method with a ``text_tower`` as plain values: the tower by its name."""
    tower = getattr(method, "text_tower", None)
    values = PruningMethod.to_dict(dataclasses.replace(method, text_tower=None))  # type: ignore[call-arg]
    return {**values, "text_tower": None if tower is None else tower.name}
