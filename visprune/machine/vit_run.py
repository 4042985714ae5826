# SPDX-License-Identifier: Apache-2.0
"""A method in force on a vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.backbones.encoders.base import TowerAdapter
from visprune.core.budget import StepBudget
from visprune.core.method import PruningMethod
from visprune.core.trace_vit import ViTTrace
from visprune.cost.cost import Cost
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.encoder.plan import make_tower_plan, step
from visprune.machine.encoder.price import tower_cost
from visprune.machine.encoder.reducer import TowerReducer
from visprune.machine.encoder.state import TowerPass


class ViTRun:
    """A method in force on a vision transformer of timm or open_clip.

    Attributes:
        method: the method.
        learned: the method's own modules, one per stage, or ``None``. While the run is in force
            they are a sub-module of the model, ``visprune_learned``: its optimizer, device moves
            and ``state_dict`` include them.
    """

    def __init__(self, adapter: TowerAdapter, method: PruningMethod) -> None:
        self.adapter, self.method = adapter, method
        spec = adapter.spec
        schedule = method.schedule(spec)
        for stage in schedule:
            if stage.site.kind != "vision":
                raise _wrong_site(method, str(stage.site), spec.family)
        rows = adapter.why_no_cls_rows()
        self.plan = make_tower_plan(method, schedule, spec, no_cls_rows=rows)
        height, width = adapter.default_grid()
        self.plan.counts(height * width, len(adapter.layers))  # refuses a budget that is too large
        self.learned = method.build_learned(spec)
        self.reducer = TowerReducer(adapter, method, self.plan, self.learned)
        self.active = True
        try:
            self.reducer.install()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the method off: the model is bit for bit what it was. Safe to call twice."""
        self.reducer.remove()
        self.active = False

    def __enter__(self) -> ViTRun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "in force" if self.active else "removed"
        return f"ViTRun({self.method}, {self.adapter.spec.family}, {state})"

    @property
    def trace(self) -> ViTTrace:
        """What happened in the last forward."""
        latest, layers = self.reducer.latest, len(self.adapter.layers)
        if latest is None or not latest.layers:
            return ViTTrace(prefix=self.adapter.prefix)
        sites = {(n, order): str(s.site) for n in range(layers) for order, s in self.plan.at(n)}
        trace = latest.trace(layers, self.adapter.prefix, sites)
        trace.selection_macs = self.cost().selection
        return trace

    @property
    def kept(self) -> Tensor:
        """The patch that each final slot of the last forward stands for, int64 ``[B, K]``.

        -1 where a slot is no patch and no mean of patches (EViT's fused token).

        Raises:
            ConfigError: nothing has run.
        """
        latest = self._latest()
        whole = latest.composed(len(self.adapter.layers))
        if self.method.size_weighted or whole.weight is None:
            return whole.index
        return torch.where(whole.weight.gather(1, whole.index) == 1.0, whole.index, -1)

    @property
    def decisions(self) -> list[Tensor]:
        """In training, of a method that learns: the patches kept at each stage, ``[B, N]``.

        1 or 0, with a gradient. Empty for other methods, and after a forward in eval mode.
        """
        latest = self.reducer.latest
        return [] if latest is None else [latest.decisions[n] for n in sorted(latest.decisions)]

    @property
    def ratios(self) -> list[float]:
        """What part of its patches a picture should keep after each stage."""
        height, width = self.adapter.default_grid()
        left, found = height * width, []
        for layer in range(len(self.adapter.layers)):
            for _, stage in self.plan.at(layer):
                budget = stage.budget
                left = step(stage, left, height * width)
                exact = isinstance(budget, StepBudget) and budget.of == "original"
                ratio = budget.keep_ratio if exact and isinstance(budget, StepBudget) else None
                found.append(left / (height * width) if ratio is None else ratio)
        return found

    def _latest(self) -> TowerPass:
        latest = self.reducer.latest
        if latest is None or not latest.layers:
            raise ConfigError("Nothing has run under this method yet; call the model first.")
        return latest

    def expand(self, tokens: Tensor, layer: int | None = None) -> Tensor:
        """Give every patch of the last forward the value of its slot.

        Args:
            tokens: ``[B, K, D]`` patch tokens (without prefix) as they left ``layer``.
            layer: 0-based; ``None``: the last.

        Returns:
            ``[B, N, D]`` in raster order; zeros where a patch was dropped.
        """
        number = len(self.adapter.layers) - 1 if layer is None else layer
        return self.reducer.expand(number, tokens)

    def cost(self, pixels: Tensor | None = None) -> Cost:
        """Multiply-adds: the model under ``vision`` (head included), the method's own beside it.

        Args:
            pixels: ``[B, 3, H, W]``; one forward is run with it. ``None``: price the last forward,
                or one picture of the model's own input size if none has run.

        Raises:
            ConfigError: the run was removed.
        """
        if pixels is not None:
            if not self.active:
                raise ConfigError("This run was removed; price inputs while it is in force.")
            with torch.no_grad():
                self.adapter.model(pixels)
        latest = self.reducer.latest
        if latest is None or not latest.layers:
            return tower_cost(self.adapter, self.method, self.plan, self.adapter.default_grid())
        return tower_cost(self.adapter, self.method, self.plan, latest.grid, samples=latest.batch)


def _wrong_site(method: PruningMethod, site: str, family: str) -> UnsupportedModel:
    from visprune.catalog import methods

    where = "inside a language model's decoder" if "decoder" in site else "behind a VLM's projector"
    return UnsupportedModel(
        f"{method.name} acts at {site}, {where}; {family} is a vision transformer alone and has "
        f"none. Methods for it: {', '.join(n for n in methods if methods.get(n).in_towers)}."
    )
