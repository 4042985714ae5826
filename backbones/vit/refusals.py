# SPDX-License-Identifier: Apache-2.0
"""What attention that replaces timm's cannot be given."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from visprune.core.method import PruningMethod
from visprune.errors import ConfigError, UnsupportedModel


def refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise ``ConfigError`` where timm's callers give a mask.

    ``torch.fx`` traces with stand-ins for every argument, the optional ones too: then the graph
    refuses, when it is called.
    """
    given: tuple[Any, ...] = (attn_mask, is_causal)
    for argument in given:
        if isinstance(argument, torch.fx.Proxy):
            argument.tracer.create_proxy("call_function", refuse_mask, given, {})
            return
    if attn_mask is not None or is_causal:
        raise ConfigError(
            "This attention has its own pattern, which is its own mask; attn_mask and is_causal "
            "cannot be given."
        )


def refuse_pruned(model: nn.Module) -> None:
    """Raise ``ConfigError`` where a method is in force: its hooks are on the attention there is."""
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            method = getattr(getattr(hook, "__self__", None), "method", None)
            if isinstance(method, PruningMethod):
                raise ConfigError(
                    f"The model is pruned by {method.name!r}, whose hooks are on the attention "
                    f"that would be replaced. Call run.remove() first; attention on a grid needs "
                    f"all tokens, so the two cannot be combined."
                )


def refuse_scripting(module: nn.Module) -> NoReturn:
    """Raise ``UnsupportedModel`` where ``torch.jit.script`` is about to compile a module.

    It asks ``__prepare_scriptable__`` first, and would stop at an annotation or an operator deep
    within, without a word on what else there is.
    """
    raise UnsupportedModel(
        f"TorchScript cannot compile {type(module).__name__}: its operators and arguments are not "
        f"of its language. Use torch.export, torch.compile or torch.jit.trace, or "
        f"visprune.onnx.export."
    )
