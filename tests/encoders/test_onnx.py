# SPDX-License-Identifier: Apache-2.0
"""ONNX files of pruned encoders: the same numbers in another runtime, for any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor

import visprune
import visprune.onnx
from tests.encoders import small
from tests.vit.shrunk import build, images
from visprune.errors import ConfigError

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("tome", {"r": 3}),
    ("pitome", {"keep_ratio": 0.8}),
    ("evit", {"keep_ratio": 0.6}),
    ("topk", {"keep_ratio": 0.6}),
    ("dynamicvit", {"keep_ratio": 0.6}),
    ("uniform", {"keep_ratio": 0.6}),
]


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize(("method", "params"), METHODS, ids=[m for m, _ in METHODS])
def test_a_pruned_encoder_for_any_batch(
    method: str, params: dict[str, Any], tmp_path: Path
) -> None:
    model, path = small.small(small.KINDS["plain"], 2).eval(), tmp_path / "model.onnx"
    with visprune.prune(model, method, **params), torch.no_grad():
        visprune.onnx.export(model, small.picture(model), path)
        for batch in (1, 2, 5):
            x = small.picture(model, batch=batch)
            assert_same(run(path, x), model(x))


# A bias per pair of places, heads that are mixed, a map of all patches behind the last layer.
OTHERS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "vit_relpos_medium_patch16_cls_224": ({"img_size": 64}, "topk", {"keep_ratio": 0.6}),
    "beit_base_patch16_224": ({"img_size": 64}, "evit", {"keep_ratio": 0.6}),
    "cait_xxs24_224": ({"img_size": 64}, "tome", {"r": 3}),
    "qwen3_vit_88m": ({"mlp_ratio": 2, "pos_embed_grid_size": 4}, "tome", {"r": 3}),
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_encoders_for_any_batch(name: str, tmp_path: Path) -> None:
    options, method, params = OTHERS[name]
    torch.manual_seed(0)
    sizes = {"embed_dim": 48, "num_heads": 4, "depth": 3, "num_classes": 5}
    model = small.enlarged(timm.create_model(name, **sizes, **options)).eval()
    x, path = torch.rand(5, 3, 64, 64), tmp_path / "model.onnx"
    with visprune.prune(model, method, **params):
        visprune.onnx.export(model, x[:2], path)
        for batch in (1, 5):
            assert_same(run(path, x[:batch]), model(x[:batch]))


@pytest.mark.parametrize("name", ["litv2_s", "dinat_mini", "sparsifiner_deit_tiny"])
@torch.no_grad()
def test_an_architecture_for_any_batch(name: str, tmp_path: Path) -> None:
    model, path = build(name), tmp_path / "model.onnx"
    visprune.onnx.export(model, images(2), path)
    for batch in (1, 5):
        assert_same(run(path, images(batch)), model(images(batch)))


@torch.no_grad()
def test_one_batch_size_and_options_of_pytorch(tmp_path: Path) -> None:
    model, path = small.small(small.KINDS["plain"], 2).eval(), tmp_path / "model.onnx"
    x = small.picture(model, batch=1)
    with visprune.prune(model, "tome", r=3):
        visprune.onnx.export(model, x, path, dynamic_batch=False, input_names=["pixels"])
        (given,) = onnx.load(path).graph.input
        assert given.name == "pixels"
        assert given.type.tensor_type.shape.dim[0].dim_value == 1
        assert_same(run(path, x), model(x))


def test_sorting_is_stable_there_too(tmp_path: Path) -> None:
    class Ranks(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(1)
            return torch.cat(
                [flat.argsort(dim=1, stable=True, descending=d) for d in (False, True)]
            )

    x = torch.randint(0, 3, (2, 3, 5, 5), generator=torch.Generator().manual_seed(0)).float()
    visprune.onnx.export(Ranks().eval(), x, tmp_path / "ranks.onnx")
    assert torch.equal(run(tmp_path / "ranks.onnx", x), Ranks()(x))


def test_what_cannot_be_exported_is_said_before(tmp_path: Path) -> None:
    model = small.small(small.KINDS["plain"], 2)
    x = small.picture(model, batch=2)
    with pytest.raises(ConfigError, match=r"at least 2 images .* got 1"):
        visprune.onnx.export(model.eval(), x[:1], tmp_path / "x.onnx")
    with pytest.raises(ConfigError, match=r"one tensor \[B, 3, H, W\]; got tuple"):
        visprune.onnx.export(model.eval(), (x,), tmp_path / "x.onnx")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
        visprune.onnx.export(model.train(), x, tmp_path / "x.onnx")

    class Gathers(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return visprune.ops.greedy_diverse(x.flatten(2), 2)

    with pytest.raises(ConfigError, match=r"no form of visprune\.greedy_diverse"):
        visprune.onnx.export(Gathers().eval(), x, tmp_path / "x.onnx")


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"onnx and onnxscript.*visprune\[onnx\]"):
        visprune.onnx.translations()
