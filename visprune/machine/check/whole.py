# SPDX-License-Identifier: Apache-2.0
"""The whole contract on a model that is at hand, and a prompt for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from visprune.errors import ConfigError, first_line
from visprune.machine.check.attach import still
from visprune.machine.check.contract import BREAKS, Contract, tried
from visprune.machine.check.prompts import pictured, prompt_of
from visprune.machine.check.report import Report, Row, difference, rounding
from visprune.machine.check.trial import report_on
from visprune.machine.find import find_adapter, unwrap
from visprune.machine.run import Run, runs

_PROMISES = {
    "keep all = untouched": "keep_all",
    "drop = hide": "hidden",
    "generate = one forward": "cached",
    "batch = singles": "batched",
}


@torch.no_grad()
def check_model(model: Any, inputs: Mapping[str, Any]) -> Report:
    """Run the contract of pruning on a model.

    Args:
        model: a vision-language model; it is left as it was.
        inputs: a prompt with a picture, as the processor returns it.

    Raises:
        ConfigError: the model is pruned already, or the inputs hold no pictures.
        UnsupportedModel: it has no adapter, and none can be tried.
    """
    if runs(model):
        raise ConfigError("A model is checked untouched; call run.remove() on its run first.")
    if not pictured(inputs):
        raise ConfigError(
            "A check needs a prompt with a picture: give what the processor returns, input_ids and "
            "pixel_values among it."
        )
    adapter = find_adapter(model)
    report = report_on(adapter)
    prompt = prompt_of(adapter, inputs)
    with still(adapter.model):
        try:
            contract = Contract(adapter, prompt)
            _ = contract.whole  # transformers puts hooks of its own on an encoder that runs
            before = _hooks(adapter.model)
            found = contract.pruned[2]
        except torch.OutOfMemoryError:
            raise
        except BREAKS as error:
            report.refused = first_line(error)
            return report
        for name, promise in _PROMISES.items():
            report.rows.append(tried(name, getattr(contract, promise)))
        report.rows.append(tried("removed = untouched", lambda: _undone(contract, before)))
    trace = found.hooks.trace
    row = trace.image_rows[0]
    total = sum(n for n, r in zip(trace.num_tokens, trace.image_rows, strict=True) if r == row)
    report.tokens = ([total] * len(adapter.layers), list(trace.tokens_per_layer[row]))
    report.cache = (contract.whole[1], contract.pruned[1])
    return report


def _undone(contract: Contract, before: int) -> Row:
    """A run that was taken off leaves no bit and no hook."""
    run = Run(contract.adapter, contract.probe, proved=True)
    with run:
        contract.logits(contract.inputs)
    want = contract.whole[0]
    output = contract.model(**contract.inputs, **contract.few, use_cache=True)
    left = _hooks(unwrap(contract.model)) - before
    note = "same bits" * torch.equal(output.logits, want)
    if left:
        return Row("removed = untouched", float("inf"), 0.0, f"{left} hooks are left on the model.")
    found = difference(output.logits, want)
    return Row("removed = untouched", found, rounding(contract.dtype), note)


def _hooks(model: nn.Module) -> int:
    """Hooks on all modules, and what stands on instances in place of their classes'."""
    count = 0
    for module in model.modules():
        count += len(module._forward_pre_hooks) + len(module._forward_hooks)
        count += sum(name in vars(module) for name in ("forward", "generate"))
    return count
