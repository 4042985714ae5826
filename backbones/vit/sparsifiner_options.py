# SPDX-License-Identifier: Apache-2.0
"""Which options Sparsifiner takes, and what it says to the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from timm.models.vision_transformer import Attention, Block

from visprune.backbones.vit.sparsifiner_attention import Sparsity
from visprune.errors import ConfigError, did_you_mean

# Fields of Sparsity that are arguments of the model.
_OWN = {"keep_rate": "attn_keep_rate", "score_threshold": "score_threshold"}


def make_rule(
    keep_rate: float, score_threshold: float | None, more: Mapping[str, Any] | None
) -> Sparsity:
    """The rule of a model.

    Args:
        keep_rate: share of the keys that a query keeps.
        score_threshold: keep keys by this score instead.
        more: the other fields of :class:`Sparsity`.

    Raises:
        BudgetError: a rate is out of range.
        ConfigError: ``more`` is no dictionary of such fields, or a value of it is not allowed.
    """
    known = [field.name for field in fields(Sparsity) if field.name not in _OWN]
    if more is not None and not isinstance(more, Mapping):
        raise ConfigError(f"Sparsifiner: sparsity must be a dictionary of {', '.join(known)}; "
                          f"got {more!r}.")  # fmt: skip
    for name in more or {}:
        if name in _OWN:
            raise ConfigError(f"Sparsifiner: give {name} as the argument {_OWN[name]} of the "
                              f"model, not in sparsity.")  # fmt: skip
        if name not in known:
            raise ConfigError(f"Sparsifiner: sparsity has no field {name!r}."
                              f"{did_you_mean(name, known)} "
                              f"Known: {', '.join(known)}.")  # fmt: skip
    return Sparsity(keep_rate=keep_rate, score_threshold=score_threshold, **(more or {}))


def default_rank(tokens: int, reduce_n_factor: int) -> int:
    """Rank of the predictors; raises ``ConfigError`` where the factor is no positive number."""
    if not isinstance(reduce_n_factor, int) or reduce_n_factor < 1:
        raise ConfigError(f"Sparsifiner: reduce_n_factor must be a whole number of tokens per "
                          f"rank, at least 1; got {reduce_n_factor!r}.")  # fmt: skip
    return max(1, tokens // reduce_n_factor)


def refuse_options(given: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for options of ``VisionTransformer`` that change grid or scores."""
    for name in ("dynamic_img_size", "qk_norm", "scale_attn_norm", "patch_drop_rate"):
        if given.get(name):
            raise ConfigError(f"Sparsifiner predicts for a fixed grid of plain attention; "
                              f"{name} is not supported.")  # fmt: skip


def refuse_parts(blocks: Iterable[Any]) -> None:
    """Raise ``ConfigError`` unless all blocks are timm's plain ones, with plain attention."""
    for block in blocks:
        attn = getattr(block, "attn", None)
        if type(block) is not Block or type(attn) is not Attention:
            raise ConfigError(
                f"Sparsifiner brings its own attention for timm's plain blocks; leave attn_layer "
                f"and block_fn out. Got {type(attn).__name__} in {type(block).__name__}."
            )
