# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (PEFT) for vision-language models that look at fewer tokens."""

from visprune.train.vlm.tune import train

__all__ = ["train"]
