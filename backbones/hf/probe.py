# SPDX-License-Identifier: Apache-2.0
"""Read queries and keys of one attention module as it runs, without changing how it runs.

Transformers calls attention through ``ALL_ATTENTION_FUNCTIONS[config._attn_implementation]`` with
post-rotary queries and keys. A probe gives *one* module, for *one* call, a copy of its config that
names a function of ours; that function shows the tensors to a callback and hands them on to the
implementation that the user chose. So no model is switched to eager attention to obtain scores.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

NAME = "visprune_probe"
Record = Callable[[Tensor, Tensor, float], None]


class Captured(Exception):
    """Ends a call that was made only to see queries and keys."""


class _Shown:
    """What a probed config carries: whom to show, and whom to hand on to."""

    def __init__(self, record: Record, implementation: str, stop: bool) -> None:
        self.record, self.implementation, self.stop = record, implementation, stop

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shown:
        return self


def _probed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    shown: _Shown = module.config._visprune_shown
    shown.record(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    if shown.stop:
        raise Captured
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(shown.implementation, eager)
    return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(NAME, _probed_attention)


def _probed_config(config: Any, record: Record, stop: bool) -> Any:
    probed = copy.copy(config)
    probed._visprune_shown = _Shown(record, config._attn_implementation, stop)
    probed._attn_implementation_internal = NAME
    return probed


def watch(attention: nn.Module, wanted: Callable[[], Record | None]) -> list[RemovableHandle]:
    """Show queries and keys of ``attention`` whenever ``wanted()`` returns a callback.

    Args:
        attention: a module that reads ``self.config._attn_implementation`` when it is called.
        wanted: asked at each call; ``None`` leaves the call alone.

    Returns:
        Handles of the two hooks; removing them leaves the module as it was.
    """
    hooks = _Watch(attention.config, wanted)
    return [
        attention.register_forward_pre_hook(hooks.before),
        attention.register_forward_hook(hooks.after, always_call=True),
    ]


class _Watch:
    """The hooks of :func:`watch`; methods, so that those of a copied model act on the copy."""

    def __init__(self, original: Any, wanted: Callable[[], Record | None]) -> None:
        self.original, self.wanted = original, wanted

    def before(self, module: nn.Module, args: Any) -> None:
        record = self.wanted()
        if record is not None:
            module.config = _probed_config(self.original, record, stop=False)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        module.config = self.original


def capture(attention: nn.Module, record: Record, **inputs: Any) -> None:
    """Run ``attention`` only as far as its queries and keys, and show them to ``record``."""
    original = attention.config
    attention.config = _probed_config(original, record, stop=True)
    try:
        attention(**inputs)
    except Captured:
        pass
    finally:
        attention.config = original
