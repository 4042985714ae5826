# SPDX-License-Identifier: Apache-2.0
"""Image classification: train and fine-tune vision transformers, whole or with fewer tokens."""

from visprune.train.image.loop import train

__all__ = ["train"]
