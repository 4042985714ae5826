# SPDX-License-Identifier: Apache-2.0
"""A method on a model for as long as a check looks at it, and what it does in there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from visprune.backbones.hf.cache import Owner
from visprune.backbones.vlm.base import VLMAdapter
from visprune.core.method import PruningMethod
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.check.probe import Probe
from visprune.machine.decoder.forward import Forward
from visprune.machine.decoder.hooks import DecoderHooks
from visprune.machine.plan import make_plan


@dataclass
class Attached:
    """A method on a model.

    Attributes:
        hooks: what does it.
        forwards: the calls of the decoder that held pictures, in order.
    """

    hooks: DecoderHooks
    forwards: list[Forward] = field(default_factory=list)

    def alive(self, call: int) -> list[Tensor]:
        """Which input tokens each decoder layer worked on in a call, ``[B, S]`` bool per layer."""
        forward = self.forwards[call]
        layers = range(len(forward.adapter.layers))
        return [forward.entered[number].table.kept() for number in layers]


@contextmanager
def attached(adapter: VLMAdapter, method: PruningMethod) -> Iterator[Attached]:
    """Put a method on that does nothing inside the encoder, without a run."""
    owner = Owner(method.name)
    plan = make_plan(method, adapter.spec)
    found = Attached(DecoderHooks(adapter, method, plan, owner, None, ()))
    found.hooks.told.append(found.forwards.append)
    try:
        found.hooks.install()
        yield found
    finally:
        found.hooks.remove()
        owner.active = False


def probe_for(adapter: VLMAdapter) -> Probe:
    """The check's method, at the depths at which tokens of this model may leave.

    Raises:
        UnsupportedModel: nowhere.
    """
    try:
        make_plan(Probe(), adapter.spec)
    except (ConfigError, UnsupportedModel):
        make_plan(Probe(deep=False), adapter.spec)
        return Probe(deep=False)
    return Probe()


@contextmanager
def still(model: Any) -> Iterator[None]:
    """Let a model run in eval mode, whatever its parts were in."""
    parts: list[tuple[nn.Module, bool]] = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in parts:
            module.training = training
