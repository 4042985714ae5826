# SPDX-License-Identifier: Apache-2.0
"""Training under token reduction: schedules, teachers, predictors; killed runs resume."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import visprune
from tests.train import small
from visprune.errors import ConfigError
from visprune.train.image import loop
from visprune.train.image.losses import logit_distillation, ratio_loss, token_distillation
from visprune.train.image.reduction import keep_ratio_at
from visprune.train.image.student import count_macs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_folder(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def dense(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a dense model that has learned a little."""
    out = tmp_path_factory.mktemp("dense")
    small.run(small.recipe(folder, schedule__epochs=4, augment={}, log_every=50), out)
    return out / "weights"


def pruned(folder: Path, dense: Path, method: str, **changes: Any) -> dict[str, Any]:
    args = {"tome": {"r": 2}, "topk": {"keep_ratio": 0.7}}.get(method, {"keep_ratio": 0.6})
    section = {"method": method, "args": args, **changes.pop("prune", {})}
    start = {"model__start_from": str(dense), "prune": section}
    return small.recipe(folder, **{**start, **changes})


def state(out: Path) -> dict[str, torch.Tensor]:
    model, _ = visprune.load_pretrained(out / "weights")
    return model.state_dict()


@pytest.mark.parametrize("method", ["tome", "evit", "topk", "dynamicvit"])
def test_each_method_trains_and_comes_back(
    method: str, folder: Path, dense: Path, tmp_path: Path
) -> None:
    result = small.run(pruned(folder, dense, method, ema={"decay": 0.5}), tmp_path)
    model, run = visprune.load_pretrained(tmp_path / "weights")
    assert run is not None
    assert run.method.name == method
    whole = small.run(small.recipe(folder, schedule__epochs=0.2), tmp_path / "whole")
    assert result["macs"] < 0.9 * whole["macs"]
    data = loop.Student(loop.build_recipe(small.recipe(folder), "x"), torch.device("cpu")).data
    right = 0
    for batch in data.val_loader(18, 0, 1):
        with torch.no_grad():
            right = int((model(batch.images).argmax(-1) == batch.labels).sum())
    assert right / 18 == result["validation"]["ema"]["accuracy"]


def test_evit_shrinks_along_a_cosine(folder: Path, dense: Path, tmp_path: Path) -> None:
    schedule = {"shrink_start": 1, "shrink_epochs": 2}
    raw = pruned(folder, dense, "evit", prune=schedule, schedule__epochs=4)
    small.run(raw, tmp_path)
    found = {r["step"]: r["keep_ratio"] for r in small.log(tmp_path) if r["event"] == "train"}
    assert [found[step] for step in range(1, 8)] == [1.0] * 7
    middle = 0.6 + 0.4 * 0.5 * (1 + math.cos(math.pi * 0.5))
    assert found[13] == pytest.approx(middle, abs=1e-4)  # step 13 begins at epoch 2.0
    assert [found[step] for step in range(19, 25)] == [0.6] * 6


def test_keep_ratio_schedule_equals_the_official_rule() -> None:
    """``adjust_keep_rate`` of EViT: total epochs 100 of which 10 keep all (shrink over 90)."""
    for iteration in (0, 400, 1000, 3333, 9999):
        per_epoch, warmup, total, base = 100, 10, 100, 0.7
        begin, span = warmup * per_epoch, (total - warmup) * per_epoch
        official = base + (1 - base) * (math.cos((iteration - begin) / span * math.pi) + 1) * 0.5
        official = 1.0 if iteration < begin else official
        assert keep_ratio_at(iteration / per_epoch, base, warmup, total - warmup) == (
            pytest.approx(official)
        )


def test_dynamicvit_learns_its_ratio(folder: Path, dense: Path, tmp_path: Path) -> None:
    raw = pruned(
        folder, dense, "dynamicvit",
        prune={"ratio_weight": 20.0}, schedule__epochs=10, augment={}, optimizer__lr=3e-3,
        distill={"teacher": str(dense), "logit": 0.5, "token": 0.5},
    )  # fmt: skip
    small.run(raw, tmp_path)
    rows = [row for row in small.log(tmp_path) if row["event"] == "train"]
    goal = [0.6, 0.36, 0.216]

    def error(row: dict[str, Any]) -> float:
        return sum(abs(k - g) for k, g in zip(row["kept"], goal, strict=True))

    early, late = rows[:10], rows[-10:]
    assert sum(map(error, late)) < 0.6 * sum(map(error, early))


def test_predictors_learn_faster_than_the_model(folder: Path, dense: Path, tmp_path: Path) -> None:
    """At a scale of 0 only the predictors move; at 0.01 the rest moves a little."""
    moved = {}
    before = state(dense.parent)
    for scale in (0.0, 0.01, 1.0):
        raw = pruned(folder, dense, "dynamicvit", prune={"model_lr_scale": scale}, augment={})
        small.run(raw, tmp_path / str(scale))
        after = state(tmp_path / str(scale))
        learned = [key for key in after if key not in before]
        assert learned
        assert all("learned" in key for key in learned)
        moved[scale] = max(float((after[key] - before[key]).abs().max()) for key in before)
    assert moved[0.0] == 0
    assert 0 < moved[0.01] < 0.05 * moved[1.0]


def test_a_scale_of_the_rate_needs_a_predictor(folder: Path, dense: Path, tmp_path: Path) -> None:
    for method, scale, message in (
        ("evit", 0.01, "evit has no predictor"),
        ("dynamicvit", 2.0, "allowed: 0 to 1"),
        ("dynamicvit", -1.0, "allowed: 0 to 1"),
    ):
        raw = pruned(folder, dense, method, prune={"model_lr_scale": scale})
        with pytest.raises(ConfigError, match=message):
            small.run(raw, tmp_path)


@pytest.mark.parametrize("method", ["evit", "dynamicvit"])
def test_a_killed_run_resumes_to_the_same_weights(
    method: str, folder: Path, dense: Path, tmp_path: Path
) -> None:
    """While the ratio shrinks, with a teacher and a moving average; Gumbel draws repeat."""
    shrink = {"shrink_epochs": 2} if method == "evit" else {"model_lr_scale": 0.1}
    teacher = {"teacher": str(dense), "token": 0.5}
    changes = {"ema": {"decay": 0.9}, "distill": teacher, "schedule__epochs": 2, "prune": shrink}
    small.run(pruned(folder, dense, method, **changes), tmp_path / "whole")

    def work(rank: int) -> None:
        plain = loop._Run._one_step

        def dying(self: Any, loader: Any) -> None:
            if self.step == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            plain(self, loader)

        loop._Run._one_step = dying  # type: ignore[method-assign]
        small.run(pruned(folder, dense, method, **changes), tmp_path / "cut")

    assert small.in_children(work) == [-signal.SIGKILL]
    small.run(pruned(folder, dense, method, **changes), tmp_path / "cut", resume=True)
    whole, cut = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    if method == "dynamicvit":
        assert any("learned" in key for key in whole)


def test_gradient_checkpointing_changes_nothing(folder: Path, dense: Path, tmp_path: Path) -> None:
    for name, on in (("plain", False), ("again", True)):
        raw = pruned(folder, dense, "evit", model__args__drop_path_rate=0.0)
        raw["model"]["grad_checkpointing"] = on
        small.run(raw, tmp_path / name)
    plain, again = state(tmp_path / "plain"), state(tmp_path / "again")
    assert all(torch.allclose(plain[key], again[key], atol=1e-6) for key in plain)


# Sparsifiner ---------------------------------------------------------------------------------


def sparse(folder: Path, dense: Path, **changes: Any) -> dict[str, Any]:
    return small.recipe(
        folder,
        **{
            "model__name": "sparsifiner_deit_tiny",
            "model__start_from": str(dense),
            "model__args__drop_path_rate": 0.0,
            "distill": {"teacher": str(dense), "logit": 0.5, "token": 0.5},
            "sparse": {"recon_epochs": 2, "recon_lr": 1e-2},
            "schedule__epochs": 3,
            "augment": {},
            **changes,
        },
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "args",
    [{"token_pruning_loc": [1, 2], "token_keep_rate": 0.7}, {"score_threshold": 0.02}],
    ids=["token pruning", "threshold"],
)
def test_every_budget_of_sparsifiner_trains(
    args: dict[str, Any], precision: str, folder: Path, dense: Path, tmp_path: Path
) -> None:
    """The teacher's tokens are compared at the places that are left; keys are counted as kept."""
    changes = {f"model__args__{name}": value for name, value in args.items()}
    result = small.run(sparse(folder, dense, precision=precision, **changes), tmp_path)
    whole, _ = visprune.load_pretrained(dense)
    assert 0 < result["macs"] < 1.2 * count_macs(whole, None, (3, small.SIDE, small.SIDE))
    model, run = visprune.load_pretrained(tmp_path / "weights")
    assert run is None
    assert result["parameters"] == sum(p.numel() for p in model.parameters())


def test_sparsifiner_trains_in_two_stages(folder: Path, dense: Path, tmp_path: Path) -> None:
    snapshots: dict[int, dict[str, torch.Tensor]] = {}
    plain = loop._Run._one_step

    def watch(self: Any, loader: Any) -> None:
        snapshots[self.step] = {k: v.clone() for k, v in self.student.model.state_dict().items()}
        plain(self, loader)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "_one_step", watch)
        small.run(sparse(folder, dense), tmp_path)
    steps = 6  # of an epoch
    end = state(tmp_path)

    def changed(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[bool]:
        return {".mask_predictor." in k for k in a if not torch.equal(a[k], b[k])}

    assert changed(snapshots[0], snapshots[2 * steps]) == {True}
    assert changed(snapshots[2 * steps], end) == {False}
    rows = [row for row in small.log(tmp_path) if row["event"] == "train"]
    assert [row.get("stage") for row in rows] == ["reconstruct"] * 12 + [None] * 6
    assert rows[11]["loss"] < 0.9 * rows[0]["loss"]
    assert {row["lr"] for row in rows[:12]} == {1e-2}


def test_sparsifiner_resumes_in_its_second_stage(folder: Path, dense: Path, tmp_path: Path) -> None:
    small.run(sparse(folder, dense), tmp_path / "whole")
    small.run(sparse(folder, dense, schedule__epochs=7 / 3), tmp_path / "cut")

    def work(rank: int) -> None:
        plain = loop._Run._one_step

        def dying(self: Any, loader: Any) -> None:
            if self.step == 15:
                os.kill(os.getpid(), signal.SIGKILL)
            plain(self, loader)

        loop._Run._one_step = dying  # type: ignore[method-assign]
        small.run(sparse(folder, dense), tmp_path / "killed")

    assert small.in_children(work) == [-signal.SIGKILL]
    small.run(sparse(folder, dense), tmp_path / "killed", resume=True)
    whole, cut = state(tmp_path / "whole"), state(tmp_path / "killed")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


# Losses --------------------------------------------------------------------------------------


def test_losses_of_known_values() -> None:
    ours, theirs = torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.8, 0.2]]))
    want = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    assert float(logit_distillation(ours, theirs)) == pytest.approx(want, rel=1e-5)
    decisions = [torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0, 0.0]])]
    assert float(ratio_loss(decisions, [0.5, 0.5])) == pytest.approx(0.25**2 / 2)
    tokens = torch.zeros(1, 2, 3)
    mask = torch.tensor([[True, False]])
    other = torch.tensor([[[2.0] * 3, [9.0] * 3]])
    assert float(token_distillation(tokens, other, mask)) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"method": "evti"}}, "Did you mean 'evit'"),
        ({"prune": {"method": "evit", "args": {"keep_ratio": 0}}}, "keep_ratio"),
        ({"prune": {"method": "evit", "args": {"keep_rate": 0.5}}}, "no parameter 'keep_rate'"),
        ({"prune": {"method": "tome", "args": {"r": 1}, "shrink_epochs": 1}}, "need a keep_ratio"),
        ({"sparse": {}}, "for Sparsifiner models"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        small.run(small.recipe(folder, **changes), tmp_path)


def test_token_distillation_needs_tokens_of_one_width(
    folder: Path, dense: Path, tmp_path: Path
) -> None:
    raw = small.recipe(
        folder, model__args__embed_dim=32, distill={"teacher": str(dense), "token": 1.0}
    )
    with pytest.raises(ConfigError, match=r"student's have 32 features, the teacher's 16"):
        small.run(raw, tmp_path)
