# SPDX-License-Identifier: Apache-2.0
"""Efficient probing (arXiv 2506.10178)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.vit.heads.tokens import check_tokens, score_bias
from visprune.errors import ConfigError


class EfficientProbing(nn.Module):
    """Pool tokens with ``num_queries`` learned queries, each for channels of its own.

    Query m attends to the tokens as they are (there is no key projection) and sums its share of the
    value channels: ``dim ** 2 / d_out + num_queries * dim`` parameters. Names are those of
    billpsomas/efficient-probing at b8f4fb8, ``poolings/ep.py``.

    Args:
        dim: channels of the tokens.
        num_queries: queries; they divide ``dim / d_out``.
        d_out: by how much fewer channels come out.
        qkv_bias: whether values have a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: the channels cannot be shared out.
    """

    def __init__(
        self,
        dim: int,
        num_queries: int = 32,
        d_out: int = 1,
        qkv_bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if min(dim, num_queries, d_out) < 1 or dim % d_out or dim // d_out % num_queries:
            raise ConfigError(
                f"EfficientProbing: each query pools the same number of the dim / d_out channels; "
                f"got dim={dim}, d_out={d_out}, num_queries={num_queries}."
            )
        dd = {"device": device, "dtype": dtype}
        self.dim, self.num_queries, self.out_dim = dim, num_queries, dim // d_out
        self.scale = dim**-0.5
        self.cls_token = nn.Parameter(torch.empty(1, num_queries, dim, **dd))
        self.v = nn.Linear(dim, self.out_dim, bias=qkv_bias, **dd)
        nn.init.normal_(self.cls_token, std=0.02)

    def attention(
        self, x: Tensor, mask: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        """Weights of the tokens [B, queries, N]; arguments as of :meth:`forward`."""
        check_tokens("EfficientProbing", x, self.dim)
        scores = (self.cls_token * self.scale) @ x.transpose(1, 2)
        bias = score_bias(x, mask, sizes)
        return (scores if bias is None else scores + bias[:, None]).softmax(-1)

    def forward(self, x: Tensor, mask: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """Pool.

        Args:
            x: tokens [B, N, dim].
            mask: bool [B, N], False for padding.
            sizes: [B, N], how many patches a merged token stands for.

        Returns:
            [B, dim / d_out].
        """
        weights = self.attention(x, mask, sizes).type_as(x)
        v = self.v(x).unflatten(-1, (self.num_queries, -1))
        return torch.einsum("bmn,bnmc->bmc", weights.type_as(v), v).flatten(1)

    def extra_repr(self) -> str:
        """Shape, for ``print(model)``."""
        return f"dim={self.dim}, num_queries={self.num_queries}, out_dim={self.out_dim}"
