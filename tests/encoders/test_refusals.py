# SPDX-License-Identifier: Apache-2.0
"""What cannot be reduced says why, and leaves the model alone."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from torch import nn

import visprune
from tests.encoders import small
from visprune.backbones import encoders
from visprune.backbones.encoders import AROUND, REFUSED, TABLE, TIMM_AROUND
from visprune.backbones.encoders.tables import tables
from visprune.catalog import model_names
from visprune.errors import BudgetError, ConfigError, UnsupportedModel


@pytest.mark.parametrize(
    ("method", "params", "error", "message"),
    [
        ("tome", {"r": -1}, BudgetError, "at least 0.*got -1"),
        ("tome", {"r": 2.5}, BudgetError, "got 2.5"),
        ("tome", {"r": [1, 2]}, BudgetError, "2 numbers and the encoder 4 layers"),
        ("tome", {"r": []}, BudgetError, "one number, or one per layer"),
        ("tome", {"r": 3, "inflect": 2.0}, ConfigError, "by -1 to 1; got 2.0"),
        ("tome", {"r": 3, "keep": 2}, ConfigError, "no parameter 'keep'"),
        ("tome", {}, ConfigError, "tome needs r"),
        ("evit", {"keep_ratio": 0.0}, BudgetError, r"in \(0, 1\]; got 0.0"),
        ("evit", {"keep_ratio": 1.5}, BudgetError, r"in \(0, 1\]; got 1.5"),
        ("evit", {"layers": ()}, ConfigError, "at least one layer"),
        ("evit", {"layers": (9,)}, ConfigError, "encoder layer 9 does not exist"),
        ("topk", {"keep_ratio": 0}, BudgetError, "got 0"),
        ("topk", {}, BudgetError, "neither"),
        ("topk", {"keep_ratio": 0.5, "num_keep": 3}, BudgetError, "both"),
        ("pitome", {"keep_ratio": 0.4}, BudgetError, r"in \[0.5, 1\].*got 0.4"),
        ("dynamicvit", {"keep_ratio": 2.0}, BudgetError, "got 2.0"),
        ("dynamicvit", {"keep_ratio": 0.5, "learned": nn.ModuleList()}, ConfigError, "3 stages"),
        ("fastv", {"num_keep": 4}, UnsupportedModel, "inside a language model's decoder.*tome"),
        ("todre", {"num_keep": 4}, UnsupportedModel, "behind a VLM's projector.*evit"),
        ("tomee", {"r": 3}, ConfigError, "Did you mean 'tome'"),
        ("evit", {"keep_ratio": "0.7"}, BudgetError, r"in \(0, 1\]; got '0.7'"),
        ("pitome", {"keep_ratio": None}, BudgetError, r"in \[0.5, 1\].*got None"),
        ("random", {"num_keep": 4, "seed": "a"}, ConfigError, "random takes no seed='a': give an"),
    ],
)
def test_bad_parameters(
    method: str, params: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = small.small()
    x = small.picture(model, batch=1)
    with torch.no_grad():
        want = model(x)
        with pytest.raises(error, match=message):
            visprune.prune(model, method, **params)
        assert torch.equal(model(x), want)
    assert not hasattr(model, "visprune_learned")


@pytest.mark.parametrize("method", ["evit", "topk"])
@pytest.mark.parametrize(
    ("kind", "why"),
    [("siglip", "has no class token"), ("average_no_class", "has no class token"),
     ("differential", "subtracts two maps")],
)  # fmt: skip
def test_no_class_token(method: str, kind: str, why: str) -> None:
    model = small.small(small.KINDS[kind])
    with pytest.raises(UnsupportedModel, match=f"{why}.*Methods that fit it") as caught:
        visprune.prune(model, method, keep_ratio=0.5)
    named = str(caught.value).rpartition(": ")[2].rstrip(".").split(", ")
    assert named == [
        "keep_all",
        "random",
        "uniform",
        "tome",
        "pitome",
        "spatten",
        "dynamicvit",
        "ipcv",
    ]
    for name in named:
        params = {"keep_all": {}, "tome": {"r": 2}}.get(name, {"keep_ratio": 0.5})
        visprune.prune(model, name, **params).remove()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("swin_tiny_patch4_window7_224", "windows need the whole grid"),
        ("samvit_base_patch16", "windows need the whole grid"),
        ("xcit_nano_12_p16_224", "attention is between channels"),
        ("convit_tiny", "a function of places"),
        ("crossvit_9_240", "exchange class tokens"),
        ("volo_d1_224", "folds windows"),
        ("resnet18", "is not a plain vision transformer"),
        ("convnext_atto", "is not a plain vision transformer"),
        ("pit_s_224", "is not a plain vision transformer"),
    ],
)
def test_other_models_of_timm(name: str, why: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModel, match=f"{why}.*timm.VisionTransformer"):
        visprune.prune(model, "tome", r=3)


def test_image_encoders_of_transformers_without_an_adapter() -> None:
    models = [tf.ConvNextModel(tf.ConvNextConfig(depths=[1], hidden_sizes=[8], num_stages=1)),
              tf.ResNetModel(tf.ResNetConfig(depths=[1], hidden_sizes=[8]))]  # fmt: skip
    for model in models:
        with pytest.raises(UnsupportedModel) as caught:
            visprune.prune(model, "tome", r=1)
        message = str(caught.value)
        kind = type(model).__name__
        assert message.startswith(f"{kind} ({model.config.model_type}) takes pictures alone")
        assert "has no adapter" in message
        assert "text-only" not in message
        for name in (*model_names("vit"), *model_names()):
            assert name.removeprefix("transformers.") in message


_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
          "num_attention_heads": 2, "image_size": 16, "patch_size": 4}  # fmt: skip


def _transformers_class(name: str) -> Any:
    """A class of transformers, also one that is not among its public names."""
    found = getattr(tf, name, None)
    if found is not None:
        return found
    root = Path(tf.__file__).parent / "models"
    files = [p for p in root.glob("*/modeling_*.py") if f"class {name}(" in p.read_text()]
    assert len(files) == 1, name
    module = f"transformers.models.{files[0].parent.name}.{files[0].stem}"
    return getattr(importlib.import_module(module), name)


def test_every_refused_class_says_why() -> None:
    names = [name for name in REFUSED if name.startswith("transformers.")]
    assert len(names) > 60
    for name in names:
        kind = _transformers_class(name.partition(".")[2])
        # Built without its __init__: what is refused is told by its class.
        model = kind.__new__(kind)
        nn.Module.__init__(model)
        with pytest.raises(UnsupportedModel) as caught:
            visprune.prune(model, "tome", r=2)
        assert str(caught.value).startswith(f"{kind.__name__} is not reduced: {REFUSED[name]}. ")


def test_the_readme_has_a_row_for_every_encoder_and_every_refusal() -> None:
    text = (Path(encoders.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert text.partition("<!-- tables -->\n")[2] == tables()
    classes, around = len(TABLE), len(AROUND) + len(TIMM_AROUND) + 2  # and TimmWrapper's two
    words = f"{classes} classes of encoders and {around} of models around one"
    whole = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert words in " ".join(whole.split())


def test_a_model_around_an_encoder_that_is_not_known_names_it() -> None:
    text = {"vocab_size": 40, **{name: _TOWER[name] for name in tuple(_TOWER)[:4]}}
    config = tf.OwlViTConfig(vision_config=_TOWER, text_config=text, projection_dim=16)
    model = tf.OwlViTForObjectDetection(config)
    with pytest.raises(UnsupportedModel, match="one for each place of the grid"):
        visprune.prune(model, "tome", r=2)
    with visprune.prune(model.owlvit.vision_model, "tome", r=1):
        pass


def test_an_attention_that_is_not_known() -> None:
    from timm.layers import Attention

    class Other(Attention):
        pass

    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48, attn_layer=Other)
    with pytest.raises(UnsupportedModel, match=r"Block 0 of this VisionTransformer.*with Other"):
        visprune.prune(model, "tome", r=3)


def test_twice_and_with_a_mask() -> None:
    model = small.small()
    x = small.picture(model, batch=1)
    with visprune.prune(model, "tome", r=2):
        with pytest.raises(ConfigError, match=r"already pruned by 'tome'.*run.remove\(\)"):
            visprune.prune(model, "dynamicvit", keep_ratio=0.5)
        assert not hasattr(model, "visprune_learned")
        with pytest.raises(UnsupportedModel, match="attention mask"):
            model(x, attn_mask=torch.zeros(1, 1, 25, 25))
    model(x, attn_mask=torch.zeros(1, 1, 25, 25))


def test_after_removal_and_before_a_forward() -> None:
    model = small.small()
    run = visprune.prune(model, "tome", r=2)
    assert run.trace.tokens_per_layer == []
    assert run.cost().samples == 1
    with pytest.raises(ConfigError, match="Nothing has run"):
        _ = run.kept
    run.remove()
    assert "removed" in repr(run)
    with pytest.raises(ConfigError, match="was removed"):
        run.cost(small.picture(model))


@torch.no_grad()
def test_prompts_behind_the_patches_are_no_patches() -> None:
    model = small.shrunk(small.KINDS["plain"])
    x, own = small.picture(model), model._pos_embed
    prompts = torch.randn(1, 3, 48)
    vars(model)["_pos_embed"] = lambda y: torch.cat([own(y), prompts.expand(len(y), -1, -1)], dim=1)
    want = model(x)
    with (
        visprune.prune(model, "tome", r=2),
        pytest.raises(UnsupportedModel, match=r"27 tokens behind the prefix.* 24 patches"),
    ):
        model(x)
    assert torch.equal(model(x), want)
    # Before the patches and counted, they stay: deep prompts of one layer's length.
    vars(model)["_pos_embed"] = lambda y: torch.cat(
        [own(y)[:, :1], prompts.expand(len(y), -1, -1), own(y)[:, 1:]], dim=1
    )
    model.num_prefix_tokens = 4
    want = model(x)
    with visprune.prune(model, "tome", r=0):
        assert torch.equal(model(x), want)
    with visprune.prune(model, "tome", r=4) as run:
        model(x)
        assert run.trace.num_tokens == [24, 24]
        assert len(run.kept[0]) == 16
