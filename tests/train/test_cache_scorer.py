# SPDX-License-Identifier: Apache-2.0
"""Learned scores of cache slots: what is learned, what is kept, and that it is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import visprune
from tests import tiny
from tests.contract.cases import batch, places
from visprune.core.method import ModelSpec
from visprune.errors import ConfigError, UnsupportedModel
from visprune.eval.models.load import load_model
from visprune.eval.tasks.embedded.task import EmbeddedTask
from visprune.methods.learned import HeadScorer, Learned
from visprune.train.start import TASKS, train

CONFIG = Path(__file__).parents[2] / "configs/train/cache_scorer_embedded.yaml"
pytestmark = pytest.mark.filterwarnings("ignore:The scorers of 'learned' are new")


class ByNorm(nn.Module):
    """Values the slots with large values."""

    def forward(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.norm(dim=-1)


@torch.no_grad()
def test_heads_keep_what_their_network_values_most() -> None:
    model, inputs = tiny.build("llava"), batch("llava", [[3, "a", 6]])
    networks = nn.ModuleList([nn.ModuleList([ByNorm() for _ in range(4)])])
    plain = model(**inputs, use_cache=True).past_key_values
    with visprune.prune(model, "learned", num_keep=5, learned=networks) as run:
        model(**inputs, use_cache=True)
        assert run.learned is networks
        kept = run.trace.cache.kept[0]
    _, free, _ = places("llava", inputs)[0]
    for layer, entry in enumerate(plain.layers):
        for head, norm in enumerate(entry.values[0].norm(dim=-1)):
            best = free[norm[free].topk(5).indices].tolist()
            assert sorted(best) == [n for n in kept[layer][head].tolist() if n in free.tolist()]


def test_what_is_no_set_of_networks() -> None:
    model = tiny.build("llava")
    with pytest.raises(ConfigError, match="for each of the 4 decoder layers"):
        visprune.prune(model, "learned", num_keep=5, learned=nn.ModuleList([ByNorm()]))
    with pytest.raises(ConfigError, match="hidden is a whole number"):
        visprune.get_method("learned", num_keep=5, hidden=0)
    other = nn.ModuleList([nn.ModuleList([HeadScorer(2, 10, 4) for _ in range(4)])])
    with (
        visprune.prune(model, "learned", num_keep=5, learned=other),
        pytest.raises(ConfigError, match="10 features of key and value; this layer has 2"),
    ):
        model(**batch("llava", [[3, "a", 6]]), use_cache=True)
    latents = ModelSpec("x", num_layers=4, has_cls=True, multi_axis_rope=False)
    with pytest.raises(UnsupportedModel, match="do not store those alike"):
        Learned(num_keep=5).build_learned(latents)


@torch.no_grad()
def test_what_was_learned_is_saved_and_loaded(tmp_path: Path) -> None:
    model, inputs = tiny.build("llava"), batch("llava", [[3, "a", 6]])
    with visprune.prune(model, "learned", num_keep=5, hidden=8) as run:
        want = [k.tolist() for layer in _kept(model, run, inputs) for k in layer]
        with pytest.warns(UserWarning, match="holds no processor"):
            visprune.save_pretrained(run, tmp_path / "weights")
    model, run = visprune.load_pretrained(tmp_path / "weights")
    found = [k.tolist() for layer in _kept(model, run, inputs) for k in layer]
    assert found == want


def _kept(model: Any, run: Any, inputs: dict[str, Any]) -> Any:
    model(**inputs, use_cache=True)
    return run.trace.cache.kept[0]


def test_a_short_run_learns(tmp_path: Path) -> None:
    result = train(
        CONFIG,
        tmp_path,
        {"steps": 12, "batch": 2, "train.options.limit": 28, "test.options.limit": 14,
         "prune.args.num_keep": 24},
    )  # fmt: skip
    losses = result["losses"]
    assert losses[-1] < 0.9 * losses[0]
    stored = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert set(stored["score"]) == {"dense", "dense_tuned", "pruned", "pruned_tuned"}
    # The folder is evaluated with what was learned, to the same score.
    folder = str(tmp_path / "weights")
    asked = visprune.evaluate(
        folder, tasks={"task": "embedded", "limit": 14}, controls=False, query_aware=False,
        progress=False,
    )  # fmt: skip
    assert [row["score"] for row in asked.rows] == [result["score"]["pruned_tuned"]]
    vlm = load_model(folder)
    other = Learned(num_keep=9, hidden=3)
    assert "does not fit learned" in str(vlm.refusal(other, EmbeddedTask()))
    own = Learned(num_keep=9, learned=nn.ModuleList([nn.ModuleList([ByNorm() for _ in range(8)])]))
    assert "modules of its own" in str(vlm.refusal(own, EmbeddedTask()))
    _, run = visprune.load_pretrained(folder)
    assert run is not None
    assert run.method == Learned(num_keep=24)
    assert any(bool(p.any()) for name, p in run.learned.named_parameters() if "bias" in name)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prune.method": "snapkv"}, "use 'learned'"),
        ({"steps": 0}, "must be at least 1"),
        ({"lr": 0.0}, "lr above 0"),
        ({"trainer.max_steps": 4}, "trainer"),
    ],
)
def test_recipes_that_cannot_be_used(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        train(CONFIG, tmp_path, changes)


def test_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert "cache_scorer" in TASKS
    with pytest.raises(ConfigError, match="keeps no checkpoints"):
        train(CONFIG, tmp_path, resume=True)
