# SPDX-License-Identifier: Apache-2.0
"""What a method may be shown; see :mod:`visprune.core.signals.base` for how to bring one's own."""

from __future__ import annotations

from visprune.core.signals.ahead import AheadSignal, LastQueryLogits
from visprune.core.signals.base import (
    DecoderSeen,
    DecoderSignal,
    EncoderSeen,
    EncoderSignal,
    PictureSignal,
    Signal,
    TokenSignal,
)
from visprune.core.signals.decoder_attention import (
    AttentionRows,
    DecoderReceivedAttention,
    LastQueryAttention,
    VisualShare,
)
from visprune.core.signals.decoder_states import (
    FinalNormStates,
    HiddenStates,
    KeysValues,
    QueriesKeys,
)
from visprune.core.signals.encoder_attention import (
    ClsAttention,
    EncoderKeys,
    EncoderLogits,
    EncoderQueriesKeys,
    ReceivedAttention,
    WholeClsAttention,
)
from visprune.core.signals.encoder_features import EncoderChange, EncoderFeatures
from visprune.core.signals.pictures import Fingerprint, Frames, PatchPositions
from visprune.core.signals.sample import RotaryTables, SampleKeysValues, Slots, TextSlots
from visprune.core.signals.text import TextIds, TextStates

__all__ = [
    "AheadSignal",
    "AttentionRows",
    "ClsAttention",
    "DecoderReceivedAttention",
    "DecoderSeen",
    "DecoderSignal",
    "EncoderChange",
    "EncoderFeatures",
    "EncoderKeys",
    "EncoderLogits",
    "EncoderQueriesKeys",
    "EncoderSeen",
    "EncoderSignal",
    "FinalNormStates",
    "Fingerprint",
    "Frames",
    "HiddenStates",
    "KeysValues",
    "LastQueryAttention",
    "LastQueryLogits",
    "PatchPositions",
    "PictureSignal",
    "QueriesKeys",
    "ReceivedAttention",
    "RotaryTables",
    "SampleKeysValues",
    "Signal",
    "Slots",
    "TextIds",
    "TextSlots",
    "TextStates",
    "TokenSignal",
    "VisualShare",
    "WholeClsAttention",
]
