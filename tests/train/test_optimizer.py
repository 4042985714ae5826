# SPDX-License-Identifier: Apache-2.0
"""Muon on a CPU iterates in fp32, and timm's own function is back after the step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visprune.errors import ConfigError
from visprune.train.image import optimizer as made
from visprune.train.image.recipe import OptimizerConfig

muon = pytest.importorskip("timm.optim.muon")


def stepped(monkeypatch: pytest.MonkeyPatch, device: str) -> list[torch.dtype]:
    plain, seen = muon.zeropower_via_newtonschulz, []

    def watched(*args: object, dtype: torch.dtype = torch.bfloat16, **kwargs: object) -> object:
        seen.append(dtype)
        return plain(*args, dtype=dtype, **kwargs)

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", watched)
    model = nn.Linear(8, 4)
    optimizer = made.build_optimizer(OptimizerConfig("nmuon", lr=0.1), model)
    before = model.weight.detach().clone()
    model(torch.randn(3, 8)).square().sum().backward()
    made.take_step(optimizer, torch.device(device))
    assert not torch.equal(model.weight, before)
    assert muon.zeropower_via_newtonschulz is watched
    return seen


def test_on_a_cpu_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stepped(monkeypatch, "cpu") == [torch.float32]


def test_elsewhere_as_timm_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stepped(monkeypatch, "cuda") == [torch.bfloat16]


def test_a_failed_step_leaves_timm_as_it_was() -> None:
    plain = muon.zeropower_via_newtonschulz
    optimizer = made.build_optimizer(OptimizerConfig("nmuon"), nn.Linear(2, 2))

    def broken() -> None:
        raise KeyboardInterrupt

    optimizer.step = broken  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        made.take_step(optimizer, torch.device("cpu"))
    assert muon.zeropower_via_newtonschulz is plain


def test_unknown_names_and_arguments() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'adamw'"):
        made.build_optimizer(OptimizerConfig("adamww"), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="do not fit adamw"):
        made.build_optimizer(OptimizerConfig("adamw", args={"beta": 3}), nn.Linear(2, 2))
