# SPDX-License-Identifier: Apache-2.0
"""The words that families were trained to see around a prompt, where their processors say none."""

from __future__ import annotations

__all__ = ["VICUNA_V1"]

VICUNA_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
    "USER: <image>\n{prompt} ASSISTANT:"
)
"""LLaVA-1.5's template ``vicuna_v1`` with its system text: about 36 tokens before the picture."""
