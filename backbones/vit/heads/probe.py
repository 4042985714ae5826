# SPDX-License-Identifier: Apache-2.0
"""A head behind a frozen encoder: what its tokens, or those that pruning kept, still know."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from visprune.backbones.vit.heads.efficient_probing import EfficientProbing
from visprune.backbones.vit.heads.tokens import check_tokens, score_bias
from visprune.errors import ConfigError, UnsupportedModel


class MeanTokens(nn.Module):
    """The mean of the tokens: what a linear probe reads. Arguments as of ``EfficientProbing``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.out_dim = dim

    def forward(self, x: Tensor, mask: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """[B, N, dim] -> [B, dim]."""
        check_tokens("A linear probe", x, self.dim)
        bias = score_bias(x, mask, sizes)
        return x.mean(1) if bias is None else (bias.softmax(-1)[:, None].type_as(x) @ x)[:, 0]


class ProbeHead(nn.Module):
    """Pooling, batch norm without parameters, linear: the official probing head.

    Args:
        dim: channels of the tokens.
        num_classes: classes.
        num_queries: of :class:`EfficientProbing`; 0 for the mean of the tokens, a linear probe.
        d_out: of :class:`EfficientProbing`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: the channels cannot be shared out.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_queries: int = 32,
        d_out: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pool: Any = MeanTokens(dim)
        if num_queries:
            self.pool = EfficientProbing(dim, num_queries, d_out, **dd)
        self.norm = nn.BatchNorm1d(self.pool.out_dim, affine=False, eps=1e-6, **dd)
        self.fc = nn.Linear(self.pool.out_dim, num_classes, **dd)

    def forward(self, x: Tensor, mask: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """Tokens [B, N, dim] -> logits [B, classes]; arguments as of ``EfficientProbing``."""
        return self.fc(self.norm(self.pool(x, mask, sizes)))


class TokenProbe(nn.Module):
    """A head on the patch tokens of an encoder that stays as it is.

    The encoder's parameters are frozen (``requires_grad`` is switched off), it stays in evaluation
    mode and runs without gradients. Under :func:`visprune.prune` the head sees the tokens that are
    left. Prefix tokens are left out, as the paper has it, unless their pre-training is defined on
    them.

    Args:
        encoder: a backbone of timm (tokens or maps), or one of transformers that returns
            ``last_hidden_state``.
        head: a module from tokens [B, N, D] to logits, e.g. :class:`ProbeHead`.
        num_prefix_tokens: tokens before the patches; as timm says if None, which has to be said for
            other libraries.
        keep_prefix: show them to the head too.

    Raises:
        ConfigError: it is not known how many tokens stand before the patches.
        UnsupportedModel: the encoder gives no tokens.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        num_prefix_tokens: int | None = None,
        keep_prefix: bool = False,
    ) -> None:
        super().__init__()
        of_timm = hasattr(encoder, "forward_features")
        if num_prefix_tokens is None:
            if not of_timm:
                raise ConfigError(
                    f"TokenProbe: {type(encoder).__name__} does not say how many tokens stand "
                    "before its patches; give num_prefix_tokens (1 for CLIP, 0 for SigLIP)."
                )
            num_prefix_tokens = int(getattr(encoder, "num_prefix_tokens", 0))
        self.encoder: Any = encoder.requires_grad_(False).eval()
        self.head = head
        self.first = 0 if keep_prefix else num_prefix_tokens
        self.of_timm = of_timm

    def train(self, mode: bool = True) -> Self:
        """Training mode of the head; the encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def tokens(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the tokens [B, N, D] that the head sees."""
        found = self.encoder.forward_features(x) if self.of_timm else self.encoder(x)
        found = getattr(found, "last_hidden_state", found)
        if isinstance(found, Tensor) and found.ndim == 4:
            first_channels = str(getattr(self.encoder, "output_fmt", "NCHW")) == "NCHW"
            found = found.flatten(2).transpose(1, 2) if first_channels else found.flatten(1, 2)
        if not isinstance(found, Tensor) or found.ndim != 3:
            raise UnsupportedModel(
                f"TokenProbe reads tokens [B, N, D] or a map of four axes; "
                f"{type(self.encoder).__name__} gives {type(found).__name__}"
                f"{list(getattr(found, 'shape', []))}."
            )
        return found[:, self.first :]

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> what the head gives."""
        out: Tensor = self.head(self.tokens(x))
        return out
