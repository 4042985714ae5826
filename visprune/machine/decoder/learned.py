# SPDX-License-Identifier: Apache-2.0
"""The modules that a method brings to its stages behind the encoder."""

from __future__ import annotations

from torch import nn

from visprune.backbones.vlm.base import VLMAdapter
from visprune.core.chain import Act
from visprune.core.method import PruningMethod
from visprune.errors import ConfigError
from visprune.machine.plan import Plan

_NAME = "visprune_learned"


class LearnedModules:
    """What one method of a run has learned, a sub-module of the model while the run is in force.

    Args:
        adapter: the model.
        plan: the stages.

    Attributes:
        modules: one per stage of the method that has parameters; ``None``: none has.
    """

    modules: nn.ModuleList | None = None

    def __init__(self, adapter: VLMAdapter, plan: Plan) -> None:
        self._model, self._like = adapter.model, adapter.language_model
        self._method: PruningMethod | None = None
        for act in plan.acts:
            if act.stage.site.kind == "encoder" or act.method is self._method:
                continue
            found = act.method.build_learned(adapter.spec)
            if found is not None and self.modules is not None:
                raise ConfigError(
                    f"Two members of a chain bring parameters of their own, {self._method!r} and "
                    f"{act.method!r}; a run holds those of one. Leave one of them out."
                )
            if found is not None:
                self._method, self.modules = act.method, found

    def of(self, act: Act) -> nn.Module | None:
        """The module of a stage."""
        if self.modules is None or act.method is not self._method:
            return None
        return self.modules[act.number]

    def attach(self) -> None:
        """Put them into the model, on the device and in the dtype of its decoder."""
        if self.modules is None:
            return
        like = next(p for p in self._like.parameters() if p.is_floating_point())
        self.modules.to(device=like.device, dtype=like.dtype)
        self.modules.train(self._model.training)
        self._model.add_module(_NAME, self.modules)

    def detach(self) -> None:
        """Take them out. Safe to call twice."""
        inside = self._model._modules
        if self.modules is not None and inside.get(_NAME) is self.modules:
            del inside[_NAME]
