# SPDX-License-Identifier: Apache-2.0
"""Training: run the stages of a recipe, resumable at any step.

``train(config_path, out, overrides, resume)`` is what ``visprune train`` calls.
"""

from visprune.train.start import train

__all__ = ["train"]
