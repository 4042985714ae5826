# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds per token of the matrices in a module, whatever they are stored as."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from visprune.errors import UnsupportedModel

# How many experts a token is sent to, in the words of transformers' routers, blocks and configs.
_CHOSEN = ("top_k", "num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def sizes(module: Any) -> tuple[int, int] | None:
    """Features in and out of a linear layer; ``None`` where ``module`` is none.

    A layer says its sizes by attribute. Its weight does not: packed into bytes (bitsandbytes,
    GPTQ) it has others, and hidden in an object (dynamic int8) none.
    """
    inner, outer = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inner, int) and isinstance(outer, int):
        return inner, outer
    # transformers' Conv1D (GPT-2) is a linear layer whose weight lies the other way round.
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        return int(module.weight.shape[0]), int(module.nf)
    return None


def linear(module: nn.Module) -> tuple[int, int]:
    """Sizes of a linear layer, also inside a wrapper (an adapter, a clamp).

    Raises:
        UnsupportedModel: it is none.
    """
    found = sizes(getattr(module, "base_layer", module))
    if found is None:
        # A wrapper around one.
        inside = [size for size in map(sizes, module.modules()) if size is not None]
        found = inside[0] if len(inside) == 1 else None
    if found is None:
        raise UnsupportedModel(
            f"A projection of attention is a {type(module).__name__}, whose features in and out "
            f"are not known: it has no in_features and out_features."
        )
    return found


def convolution(module: nn.Module) -> int | None:
    """Multiply-adds of a convolution for each place of its output; ``None``: it is none."""
    own = vars(module)
    kernel, channels, out = (own.get(n) for n in ("kernel_size", "in_channels", "out_channels"))
    if not isinstance(kernel, tuple) or not isinstance(channels, int) or not isinstance(out, int):
        return None
    return out * (channels // int(own.get("groups", 1))) * math.prod(kernel)


def matrix_weights(module: nn.Module) -> int:
    """Multiply-adds per token of the linear layers in ``module``."""
    return sum(_linear_macs(part) for part in _outermost(module))


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """Linear layers in ``module``; of one in a wrapper of the same sizes, the wrapper."""
    seen: set[int] = set()
    stack = [module]
    while stack:
        part = stack.pop()
        if id(part) in seen:  # one layer in two places is one, as in modules()
            continue
        seen.add(id(part))
        if _is_linear(part):
            yield part
        else:
            stack.extend(part.children())


def _is_linear(module: nn.Module) -> bool:
    if hasattr(module, "base_layer"):
        return sizes(module.base_layer) is not None
    # A block that merely notes its own width is none: its linear layers lie inside.
    return sizes(module) is not None and not any(sizes(m) for m in module.modules() if m != module)


def _linear_macs(module: nn.Module) -> int:
    """Multiply-adds per token of one linear layer, with the low-rank adapters in force on it."""
    base = getattr(module, "base_layer", None)
    if base is None:
        inner, outer = sizes(module) or (0, 0)
        return inner * outer
    total = _linear_macs(base)
    if getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        return total
    for name in getattr(module, "active_adapters", ()):
        for side in ("lora_A", "lora_B"):
            adapters: Any = getattr(module, side, None)
            if adapters is not None and name in adapters:
                total += matrix_weights(adapters[name])
    return total


def token_macs(module: nn.Module, top_k: int | None = None) -> int:
    """Multiply-adds of ``module`` for one token: every matrix in it, of experts those chosen.

    Unlike :func:`matrix_weights` it counts whatever multiplies (convolutions, stacks of experts,
    routers), and refuses what it cannot attribute rather than leave it out.

    Args:
        module: A part of a decoder layer, or a projector.
        top_k: Experts that a token is sent to, unless the modules say it.

    Raises:
        UnsupportedModel: A weight whose use is not known, or experts of which it is not known how
            many a token is sent to.
    """
    top_k = _chosen(module) or top_k
    if _is_linear(module):
        return _linear_macs(module)
    macs = convolution(module)
    if macs is not None:
        return macs
    if isinstance(module, nn.MultiheadAttention):
        return _in_proj(module) + matrix_weights(module.out_proj)
    if isinstance(module, nn.Embedding) or "Norm" in type(module).__name__:
        return 0
    if isinstance(module, nn.ModuleList) and _is_experts(module):
        return _share(sum(token_macs(part, top_k) for part in module), len(module), top_k, module)
    return _own_weights(module, top_k) + sum(token_macs(m, top_k) for m in module.children())


def _in_proj(module: nn.MultiheadAttention) -> int:
    """Weights of the three projections, together or (keys of another width) apart."""
    if module.in_proj_weight is not None:
        return module.in_proj_weight.numel()
    apart = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    return sum(weight.numel() for weight in apart)


def _own_weights(module: nn.Module, top_k: int | None) -> int:
    """Multiply-adds of the weights that ``module`` holds itself."""
    total = 0
    for name, weight in module.named_parameters(recurse=False):
        if weight.dim() == 3 and isinstance(getattr(module, "num_experts", None), int):
            total += _share(weight.numel(), weight.shape[0], top_k, module)
        elif weight.dim() == 2 and name.endswith("weight"):  # a router, a bare matrix (Gemma 3)
            total += weight.numel()
        elif weight.squeeze().dim() > 1:
            raise UnsupportedModel(
                f"What {type(module).__name__}.{name} {list(weight.shape)} does to a token is not "
                f"known, so its cost is not. Counted are linear layers, convolutions, experts and "
                f"their routers."
            )
    return total


def _is_experts(module: nn.ModuleList) -> bool:
    """Whether a list holds experts: equal modules whose parent calls them so."""
    return len(module) > 1 and all("expert" in type(part).__name__.lower() for part in module)


def _chosen(module: nn.Module) -> int | None:
    """Experts that a token is sent to, as the block or its router says."""
    for part in (module, *module.children()):
        own = vars(part)  # getattr of what is not there is slow on a module
        for name in _CHOSEN:
            value = own.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def chosen(config: object) -> int | None:
    """The same from a config."""
    values = (getattr(config, name, None) for name in _CHOSEN)
    return next((value for value in values if isinstance(value, int)), None)


def _share(macs: int, experts: int, top_k: int | None, module: nn.Module) -> int:
    """The part of all experts' multiply-adds that the chosen ones do."""
    if top_k is None:
        raise UnsupportedModel(
            f"How many of the {experts} experts of {type(module).__name__} a token is sent to is "
            f"not known: neither block, router nor config has one of {', '.join(_CHOSEN)}."
        )
    return macs * top_k // experts
