# SPDX-License-Identifier: Apache-2.0
"""A model of the embedded model's kind with random weights, small enough for tests."""

from __future__ import annotations

from typing import Any

import torch

from visprune.backbones.vlm import embedded
from visprune.backbones.vlm.embedded.tokenizer import SPECIAL
from visprune.eval.tasks.embedded import words


def small_embedded(seed: int = 0) -> tuple[Any, Any]:
    """(model, processor): 576 visual tokens and 8 decoder layers, as wide as a thumb."""
    torch.manual_seed(seed)
    vocabulary = words()
    model = embedded.build_model(
        len(vocabulary) + len(SPECIAL),
        vision={"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48},
        text={"hidden_size": 32, "intermediate_size": 48},
    )
    return model.eval(), embedded.build_processor(vocabulary)
