# SPDX-License-Identifier: Apache-2.0
"""What a method asks to be shown before it selects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Needs:
    """Signals that a stage of a method needs; checked against the model before any forward.

    Attributes:
        cls_attention: attention of the encoder's class token to the patches, from the encoder's
            ``"last"`` layer or from the ``"feature"`` layer, whose output the model reads
            (the last but one in LLaVA); ``"own"``: at a site inside an encoder, from the layer
            that the stage acts in, which is the only one to have there.
        cls_required: refuse models without a class token; otherwise the signal is ``None`` there.
        vision_keys: keys of the feature layer's attention, averaged over heads; at a site inside
            an encoder, those of the layer that the stage acts in.
        attention: decoder attention to the visual tokens: from the ``"last_query"`` of the prompt
            or from all ``"text_queries"`` after the first visual token.
        attention_layer: the layer that the decoder attention is read from: the ``"previous"`` one
            (as it ran) or the stage's ``"own"`` (its projections, ahead of its run).
        positions: (t, h, w) of the tokens, at a site inside an encoder; they are there always at
            the others.
        fingerprint: a number that depends on the picture's pixels alone.
    """

    cls_attention: Literal["last", "feature", "own"] | None = None
    cls_required: bool = False
    vision_keys: bool = False
    attention: Literal["last_query", "text_queries"] | None = None
    attention_layer: Literal["previous", "own"] = "previous"
    positions: bool = False
    fingerprint: bool = False
