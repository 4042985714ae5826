# SPDX-License-Identifier: Apache-2.0
"""Features of pictures in the form in which transformers passes them on."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling


def encoder_output(features: list[Tensor]) -> Any:
    """What ``get_image_features`` returns, made of features that were encoded earlier."""
    return BaseModelOutputWithPooling(pooler_output=features)
