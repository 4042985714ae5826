# SPDX-License-Identifier: Apache-2.0
"""Read queries, keys and values of one attention module as it runs, without changing how it runs.

Transformers calls attention through ``ALL_ATTENTION_FUNCTIONS[config._attn_implementation]`` with
post-rotary queries and keys. A watched module has, as long as it is watched, a copy of its config
that names a function of ours; that function asks whether anyone wants to see this call, and hands
the tensors on to the implementation that the user chose. So no model is switched to eager attention
to obtain scores, and nothing that two threads share changes during a call.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from visprune.backbones.hf.ragged import RaggedLayer, layer_of
from visprune.errors import UnsupportedModel

NAME = "visprune_probe"


@dataclass
class Attended:
    """What one call of an attention module worked on.

    Attributes:
        query: after norm and rotary, ``[B, H, Q, d]``.
        key: of stored and new tokens, ``[B, Hk, K, d]``.
        value: ``[B, Hk, K, d]``.
        scale: of the scores.
        softcap: bound of the scores, or ``None``.
        mask: what the module gives as its mask, or ``None``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softcap: float | None = None
    mask: Any = None


@dataclass
class Wanted:
    """What a call is asked for.

    Attributes:
        record: is shown the tensors.
        stop: end the call there; it was made only to see them.
        bias: is added to the scores of each key, ``[B, K]``; the call has no mask then.
    """

    record: Callable[[Attended], None] | None = None
    stop: bool = False
    bias: Tensor | None = None


class Captured(Exception):
    """Ends a call that was made only to see queries and keys."""


class _Shown:
    """What a watched module's config carries: whom to ask, and whom to hand on to."""

    def __init__(self, original: Any, wanted: Callable[[], Wanted | None]) -> None:
        self.original, self.wanted, self.over = original, wanted, False

    @property
    def below(self) -> _Shown | None:
        """The same of another watch, which this one was put on top of."""
        found: _Shown | None = getattr(self.original, "_visprune_shown", None)
        return found


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
    biased = False
    while True:
        wanted = None if shown.over else shown.wanted()
        if wanted is not None and wanted.bias is not None:
            attention_mask, biased = _row(wanted.bias, query), True
        if wanted is not None and wanted.record is not None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            softcap = kwargs.get("softcap")
            wanted.record(Attended(query, key, value, scale, softcap, attention_mask))
            if wanted.stop:
                raise Captured
        if shown.below is None:
            break
        shown = shown.below
    ragged = layer_of(key)
    if ragged is not None:
        return _attend_ragged(ragged, query, scaling, kwargs)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    name = str(shown.original._attn_implementation)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(_taking_bias(name) if biased else name, eager)
    return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _row(bias: Tensor, query: Tensor) -> Tensor:
    """A bias per key as a mask, ``[B, 1, 1, K]``."""
    return bias[:, None, None].to(query.dtype)


def _taking_bias(name: str) -> str:
    """The implementation that takes a bias per key, in place of the user's.

    Raises:
        UnsupportedModel: FlashAttention would ignore it.
    """
    if name.startswith("flash"):
        raise UnsupportedModel(
            "FlashAttention takes no bias per key, which merged tokens need in the encoder. "
            "Load the model with attn_implementation='sdpa', or pass prop_attn=False."
        )
    # transformers' flex looks a mask up by query, of which this has none: it read past its end.
    return "sdpa" if name.startswith("flex") else name


def _attend_ragged(
    layer: RaggedLayer, query: Tensor, scaling: float | None, kwargs: dict[str, Any]
) -> tuple[Tensor, None]:
    """Attention to a cache whose heads hold different numbers of slots, ``[B, R, H, dv]``."""
    other = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if other:
        raise UnsupportedModel(
            f"This decoder's attention takes {other[0]}, which a cache with heads of different "
            f"lengths does not know. Use a method that keeps the same number in every head."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layer.attend(query, scale, kwargs.get("softcap"))
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _probed_attention)


class Watch:
    """A module that is watched; :meth:`remove` leaves it as it was."""

    def __init__(self, attention: nn.Module, wanted: Callable[[], Wanted | None]) -> None:
        self._attention, self._original = attention, attention.config
        probed: Any = copy.copy(attention.config)
        probed._visprune_shown = _Shown(attention.config, wanted)
        probed._attn_implementation_internal = NAME
        self._probed = probed
        attention.config = probed

    def remove(self) -> None:
        """Give the module its own config back, unless another watch still stands on this one."""
        self._probed._visprune_shown.over = True
        if self._attention.config is not self._probed:
            return
        config = self._original
        while (shown := getattr(config, "_visprune_shown", None)) is not None and shown.over:
            config = shown.original
        self._attention.config = config


def watch(attention: nn.Module, wanted: Callable[[], Wanted | None]) -> Watch:
    """Show what ``attention`` works on whenever ``wanted()`` asks for it.

    Args:
        attention: a module that reads ``self.config._attn_implementation`` when it is called.
        wanted: asked at each call, in the thread that makes it; ``None`` leaves the call alone.
    """
    return Watch(attention, wanted)


class _NoValues(nn.Module):
    """Stands for the projection of values, where nobody looks at them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Zeros that take no room."""
        return x.new_zeros(1).expand(*x.shape[:-1], self.width)


def without_values(attention: nn.Module) -> nn.Module | None:
    """The same attention, on the same weights, that computes queries and keys alone.

    The module itself stays as it is, since another thread may be in it. ``None``: its values have
    no linear projection of their own.
    """
    project = attention._modules.get("v_proj")
    if type(project) is not nn.Linear:
        return None
    found = copy.copy(attention)
    found._modules = {**attention._modules, "v_proj": _NoValues(project.out_features)}
    return found


class _Once(nn.Module):
    """A projection that is asked for the same states again gives what it gave."""

    def __init__(self, project: nn.Module) -> None:
        super().__init__()
        self.project = project
        self._known: tuple[Tensor | None, Any] = (None, None)

    def forward(self, x: Tensor) -> Any:
        """As the projection."""
        if self._known[0] is not x:
            self._known = x, self.project(x)
        return self._known[1]


def projecting_once(attention: nn.Module) -> nn.Module | None:
    """The same attention, which two calls with the same states project once.

    ``None``: queries and keys have no projection of their own.
    """
    found = copy.copy(attention)
    found._modules = dict(attention._modules)
    for name in ("q_proj", "k_proj", "v_proj"):
        project = attention._modules.get(name)
        if project is not None:
            found._modules[name] = _Once(project)
        elif name != "v_proj":
            return None
    return found


def capture(call: Callable[..., Any], **inputs: Any) -> None:
    """Call a watched attention, or a model around it, only as far as its queries and keys.

    Its ``wanted`` must ask for the call with ``stop``.
    """
    with contextlib.suppress(Captured):
        call(**inputs)
