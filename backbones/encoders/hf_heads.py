# SPDX-License-Identifier: Apache-2.0
"""What reads the tokens of transformers' image encoders, each as often as it stands for patches."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from visprune.backbones.cost.matrices import matrix_weights
from visprune.backbones.encoders.base import Instead, Reduction
from visprune.errors import UnsupportedModel

# Linear layers of a model around an encoder that work on its pictures once.
_OUTER = ("visual_projection", "classifier", "cls_classifier", "distillation_classifier")


def poolers(model: nn.Module) -> list[Any]:
    """Attention poolings of an encoder: one learned query over all tokens."""
    return [m for m in model.modules() if _is_torch_pooling(m) or _is_own_pooling(m)]


def _is_torch_pooling(module: Any) -> bool:
    """SigLIP's and SigLIP 2's."""
    inner = getattr(module, "attention", None)
    return isinstance(inner, nn.MultiheadAttention) and hasattr(module, "probe")


def _is_own_pooling(module: nn.Module) -> bool:
    """AIMv2's."""
    return {"k_proj", "v_proj", "output_proj"} == set(module._modules)


def weigh_pooling(model: nn.Module, reduction: Reduction) -> list[Any]:
    """Let attention poolings count a token as often as it stands for patches."""
    handles: list[Any] = []
    for pooler in poolers(model):
        if _is_own_pooling(pooler):
            forward = functools.partial(_pool, pooler, reduction)
            handles.append(Instead(pooler, "forward", forward))
            continue
        handles.append(pooler.register_forward_pre_hook(_without_mask, with_kwargs=True))
        hook = functools.partial(_add_pool_bias, reduction)
        handles.append(pooler.attention.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def _without_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """SigLIP 2 hands on the mask of its patches, which hides none (or was refused)."""
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if mask is None or mask.shape[-1] == args[0].shape[1]:
        return None
    return args[:1], {name: value for name, value in kwargs.items() if name != "attention_mask"}


def _add_pool_bias(
    reduction: Reduction, module: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    size = reduction.sizes(args[1].shape[1])
    if size is None:
        return None
    return args, {**kwargs, "key_padding_mask": size.log().to(args[1].dtype)}


def _pool(pooler: Any, reduction: Reduction, hidden_states: Tensor) -> Tensor:
    """In place of AIMv2's pooling, where tokens have sizes."""
    size = reduction.sizes(hidden_states.shape[1])
    if size is None:
        return type(pooler).forward(pooler, hidden_states)
    split = (pooler.num_heads, -1)
    query = pooler.cls_token.expand(len(hidden_states), -1, -1)
    parts = (query, pooler.k_proj(hidden_states), pooler.v_proj(hidden_states))
    q, k, v = (part.unflatten(-1, split).transpose(1, 2) for part in parts)
    bias = size.log()[:, None, None].to(q.dtype)
    rows = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return pooler.output_proj(rows.transpose(1, 2).flatten(2).mean(dim=1))


def weigh_tokens(model: nn.Module, reduction: Reduction, prefix: int) -> Any:
    """Let the plain mean of an encoder's patches, taken in a model around it, be the right one.

    The patches come out of the encoder multiplied by what makes their plain mean the mean over all
    patches, each as its slot has it.
    """
    hook = functools.partial(_weigh, reduction, prefix)
    return model.register_forward_hook(hook, with_kwargs=True)


def _weigh(
    reduction: Reduction, prefix: int, module: Any, args: Any, kwargs: Any, output: Any
) -> Any:
    if not reduction.fresh():
        raise UnsupportedModel(
            f"This {type(module).__name__} was compiled by itself, and the mean over its patches "
            f"is taken behind it, where it is not known how many each token stands for. Compile "
            f"the whole model, or none of it."
        )
    tokens = output.last_hidden_state
    count = tokens.shape[1] - prefix
    size, mask = reduction.sizes(count), kwargs.get("pixel_attention_mask")
    if mask is not None and size is None and mask.shape[1] == count:
        return output  # nothing left, and its own mean is over its mask
    whole = count if mask is None else mask.shape[1]
    # SigLIP 2's mean is over its mask, of which each picture fills a part.
    patches = count if mask is None else mask.sum(1, keepdim=True)
    if size is None:
        size = tokens.new_ones(len(tokens), count)
    share = size * (patches / size.sum(1, keepdim=True))
    share = nn.functional.pad(share, (prefix, 0), value=1.0)
    tokens = tokens * share[..., None].to(tokens.dtype)
    output.last_hidden_state = nn.functional.pad(tokens, (0, 0, 0, whole - count))
    return output


def head_macs(model: nn.Module, outer: nn.Module | None, width: int, tokens: int) -> int:
    """Multiply-adds behind the layers: poolings of ``tokens`` tokens, projections, classifiers."""
    total = 0
    for pooler in poolers(model):
        if _is_own_pooling(pooler):
            each = matrix_weights(pooler.k_proj) + matrix_weights(pooler.v_proj) + 2 * width
            total += tokens * each + matrix_weights(pooler.output_proj)
        else:
            total += 2 * width * (tokens * width + tokens) + 2 * width * width
            total += matrix_weights(pooler.mlp)
    parts: list[Any] = [getattr(model, "pooler", None), getattr(model, "visual_projection", None)]
    parts += [getattr(outer, name, None) for name in _OUTER]
    return int(total + sum(matrix_weights(part) for part in parts if part is not None))
