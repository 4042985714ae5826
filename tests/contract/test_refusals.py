# SPDX-License-Identifier: Apache-2.0
"""Bad input: each message says what was wrong and what is allowed; the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import visprune
from tests import tiny
from tests.contract.cases import (
    LINE_FAMILIES,
    METHODS,
    NEEDS_CLASS_TOKEN,
    NO_BUDGET,
    OPTIONAL_BUDGET,
    batch,
    every_family,
    everything,
    takes,
)
from tests.contract.test_removal import state
from visprune.catalog import model_names
from visprune.errors import BudgetError, ConfigError, UnsupportedModel, VispruneError

BUDGETED = [name for name in METHODS if name not in NO_BUDGET]
FAMILY_LIST = ", ".join(model_names())


@pytest.fixture
def llava(models: Any) -> Iterator[Any]:
    """A model that is the same after the test as before."""
    model = models("llava")
    before = state(model)
    yield model
    assert state(model) == before


@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_is_one_of_two(name: str, llava: Any) -> None:
    with pytest.raises(BudgetError, match=r"got both: num_keep=4, keep_ratio=0.5. Give exactly"):
        visprune.prune(llava, name, num_keep=4, keep_ratio=0.5)
    if name in OPTIONAL_BUDGET:
        visprune.prune(llava, name).remove()
        return
    with pytest.raises(BudgetError, match=r"num_keep .* or keep_ratio .*got neither"):
        visprune.prune(llava, name)


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.0001, 64, float("nan"), "half"])
def test_keep_ratio_is_a_fraction(name: str, ratio: Any, llava: Any) -> None:
    with pytest.raises(BudgetError, match=r"in \(0, 1\]; got .*use num_keep"):
        visprune.prune(llava, name, keep_ratio=ratio)


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, "at least 1, got 0"),
        (-3, "at least 1, got -3"),
        (64.0, "whole number of tokens, got 64.0"),
        (True, "whole number of tokens, got True"),
        ("64", "whole number of tokens, got '64'"),
    ],
)
def test_num_keep_is_a_positive_whole_number(
    name: str, number: Any, message: str, llava: Any
) -> None:
    with pytest.raises(BudgetError, match=message):
        visprune.prune(llava, name, num_keep=number)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("todree", "todre"),
        ("fast_v", "fastv"),
        ("divprun", "divprune"),
        ("Pool", "pool"),
        ("pdrop", None),
    ],
)
def test_unknown_method(wrong: str, right: str | None, llava: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        visprune.prune(llava, wrong, num_keep=4)
    message = str(caught.value)
    assert f"Unknown method {wrong!r}" in message
    if right is not None:
        assert f"Did you mean {right!r}?" in message
    assert all(name in message for name in METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_parameter(name: str, llava: Any) -> None:
    message = rf"{name} has no parameter 'positionss'.*Did you mean 'positions'"
    with pytest.raises(ConfigError, match=message):
        visprune.prune(llava, name, **everything(name), positionss="compact")
    if name in BUDGETED:
        message = r"'numkeep'. Did you mean 'num_keep'\? Parameters: .*keep_ratio"
        with pytest.raises(ConfigError, match=message):
            visprune.prune(llava, name, numkeep=4)


@pytest.mark.parametrize(
    "name", [name for name in visprune.list_methods() if "num_keep" not in takes(name)]
)
def test_what_takes_no_budget_says_what_it_takes(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} has no parameter 'num_keep'") as found:
        visprune.get_method(name, num_keep=4)
    options = str(found.value).split("Parameters: ")[1]
    assert all(option in options for option in takes(name))


@pytest.mark.parametrize("name", METHODS)
def test_unknown_position_rule(name: str, llava: Any) -> None:
    message = r"'original' or 'compact', got 'compacted'. Did you mean 'compact'"
    with pytest.raises(ConfigError, match=message):
        visprune.prune(llava, name, **everything(name), positions="compacted")


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("todre", {"num_keep": 4, "objective": "maxmin"}, "'k_center' or 'max_sum', got 'maxmin'"),
        ("todre", {"stage1": False, "stage2": False}, "Both stages of todre are off"),
        ("todre", {"stage1": False, "num_keep": 4}, "has no budget"),
        ("todre", {"num_keep": 4, "tau": -0.1}, "share of attention, at least 0; got -0.1"),
        ("todre", {"num_keep": 4, "tau": float("nan")}, "tau is a share"),
        ("fastv", {"num_keep": 4, "layer": 4}, r"layer 4 does not exist.*4 decoder layers, 0 to 3"),
        ("fastv", {"num_keep": 4, "layer": -1}, "decoder layer -1 does not exist"),
        ("fastv", {"num_keep": 4, "layer": 0}, "layer 0 has none before it. Use layer 1 to 3"),
        ("fastv", {"num_keep": 4, "layer": 1.5}, "lies between 0 and 1, got 1.5"),
        ("fastv", {"num_keep": 4, "layer": True}, "give an int or a fraction"),
        ("todre", {"num_keep": 4, "depth": 9}, "decoder layer 9 does not exist"),
        ("pyramiddrop", {"num_keep": 4, "depths": ()}, "depths are increasing fractions"),
        ("pyramiddrop", {"num_keep": 4, "depths": (0.5, 0.25)}, r"got \(0.5, 0.25\)"),
        ("pyramiddrop", {"num_keep": 4, "depths": (0.5, 9)}, "decoder layer 9 does not exist"),
        ("pyramiddrop", {"num_keep": 4, "factor": 0.0}, r"in \(0, 1\]; got 0.0"),
        ("pyramiddrop", {"num_keep": 4, "factor": 1.5}, r"in \(0, 1\]; got 1.5"),
        ("visionzip", {"num_keep": 4, "contextual": 4}, "between 0 and num_keep - 1 = 3, got 4"),
        ("visionzip", {"num_keep": 4, "contextual": -1}, "got -1"),
    ],
)  # fmt: skip
def test_parameters_out_of_range(
    name: str, params: dict[str, Any], message: str, llava: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        visprune.prune(llava, name, **params)


def test_a_built_method_takes_no_parameters(llava: Any) -> None:
    built = visprune.get_method("fastv", num_keep=4)
    with pytest.raises(ConfigError, match="fastv is already built; set num_keep on it"):
        visprune.prune(llava, built, num_keep=8)
    with pytest.raises(
        ConfigError, match=r"name or a PruningMethod instance, got int. Names: todre"
    ):
        visprune.prune(llava, 3)  # type: ignore[arg-type]


# Models --------------------------------------------------------------------------------------


def test_a_text_only_model() -> None:
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                         num_attention_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config)
    before = state(model)
    with pytest.raises(UnsupportedModel) as caught:
        visprune.prune(model, "fastv", num_keep=4)
    message = str(caught.value)
    assert "LlamaForCausalLM (llama) is a text-only model: there are no visual tokens" in message
    assert FAMILY_LIST in message
    assert state(model) == before
    other = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UnsupportedModel, match="text-only"):
        visprune.prune(other, "todre", num_keep=4)


_SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
          "num_attention_heads": 2}  # fmt: skip
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WHISPER = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1,
            "decoder_attention_heads": 1, "decoder_start_token_id": 1}  # fmt: skip


def _colqwen2() -> Any:
    config = tf.ColQwen2Config(vlm_config=tiny.build("qwen2_vl").config.to_dict())
    return tf.ColQwen2ForRetrieval(config)


class _House(tf.GitConfig):
    """Of a family that nobody has looked at."""

    model_type = "house"


def _git(kind: Any) -> Any:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tf.GitForCausalLM(kind(vision_config=vision, **_SIZES, **_TOKENS))


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "fuyu": (
        lambda: tf.FuyuForCausalLM(tf.FuyuConfig(text_config=tf.PersimmonConfig(**_SIZES))),
        r"FuyuForCausalLM \(fuyu\) is not pruned: it has no image encoder",
    ),
    "colqwen2": (_colqwen2, r"\(colqwen2\) is not pruned: it retrieves pages"),
    "git": (
        lambda: _git(tf.GitConfig), r"GitForCausalLM \(git\) is not pruned: its decoder puts"
    ),
    "house": (
        lambda: _git(_House),
        r"GitForCausalLM \(house\) takes pictures \(pixel_values\) and has no adapter",
    ),
    "whisper": (
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(vocab_size=40, **_TOKENS, **_WHISPER)
        ),
        r"\(whisper\) takes sound \(input_features\) and no pictures",
    ),
    "bert": (lambda: tf.BertModel(tf.BertConfig(**_SIZES)), r"\(bert\) is a text-only model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_is_told_what_it_is(kind: str) -> None:
    build, message = OTHERS[kind]
    model = build()
    before = state(model)
    with pytest.raises(UnsupportedModel, match=message) as caught:
        visprune.prune(model, "divprune", num_keep=4)
    assert FAMILY_LIST in str(caught.value)
    assert ("text-only" in str(caught.value)) == (kind == "bert")
    assert state(model) == before


def test_a_vision_model_of_timm() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, depth=1)
    before = state(model)
    behind = [name for name in METHODS if name not in ("keep_all", "random", "uniform")]
    for name in behind:
        with pytest.raises(UnsupportedModel) as caught:
            visprune.prune(model, name, **everything(name))
        message = str(caught.value)
        assert f"{name} acts at " in message
        assert "VisionTransformer is a vision transformer alone and has none" in message
        assert "Methods that fit it: keep_all, random, uniform, tome, pitome" in message
    with pytest.raises(UnsupportedModel) as caught:
        visprune.prune(torch.nn.Linear(2, 2), "tome", r=2)
    message = str(caught.value)
    assert "Linear is neither a transformers vision-language model nor a vision transf" in message
    assert FAMILY_LIST in message
    assert state(model) == before


@pytest.mark.parametrize("nonsense", [None, 3, "llava", object(), {"model": 1}, torch.zeros(2)])
def test_nonsense(nonsense: Any) -> None:
    message = rf"takes a model, got {type(nonsense).__name__}.*llava"
    with pytest.raises(UnsupportedModel, match=message):
        visprune.prune(nonsense, "todre", num_keep=4)


@every_family
def test_the_inner_model_is_not_enough(family: str, models: Any) -> None:
    model = models(family)
    before = state(model)
    for part in (model.model, model.model.language_model):
        with pytest.raises(UnsupportedModel, match=FAMILY_LIST):
            visprune.prune(part, "todre", num_keep=4)
    assert state(model) == before


def test_layers_of_other_kinds_are_refused() -> None:
    model = tiny.build("qwen2_5_vl")
    model.config.text_config.layer_types = ["full_attention", "chunked_attention"] * 2
    message = r"layers \[1, 3\].*chunked_attention.*full and sliding-window attention"
    with pytest.raises(UnsupportedModel, match=message):
        visprune.prune(model, "todre", num_keep=4)


@every_family
@torch.no_grad()
def test_pruning_twice_is_refused(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    before = state(model)
    with visprune.prune(model, "todre", num_keep=4) as run:
        want, inside = model(**inputs).logits, state(model)
        for name in ("fastv", "todre"):
            with pytest.raises(ConfigError, match=r"already pruned by 'todre'.*run.remove\(\)"):
                visprune.prune(model, name, num_keep=4)
        assert state(model) == inside
        assert torch.equal(model(**inputs).logits.nan_to_num(), want.nan_to_num())
        assert len(run.trace.kept) == 3
    assert state(model) == before
    visprune.prune(model, "fastv", num_keep=4).remove()  # the first is gone
    assert state(model) == before


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f not in LINE_FAMILIES])
@pytest.mark.parametrize("name", [m for m in METHODS if m not in NEEDS_CLASS_TOKEN])
def test_compact_positions_need_a_line(name: str, family: str, models: Any) -> None:
    model = models(family)
    before = state(model)
    message = rf"closes up a line of ids; {family}.*Use positions='original'"
    with pytest.raises(ConfigError, match=message):
        visprune.prune(model, name, **everything(name), positions="compact")
    assert state(model) == before


# A method's own default is not forced on a family that cannot have it.
def test_the_default_rule_gives_way(models: Any) -> None:
    with visprune.prune(models("llava"), "divprune", num_keep=4) as run:
        assert run.plan.positions == "compact"
    with visprune.prune(models("qwen2_vl"), "divprune", num_keep=4) as run:
        assert run.plan.positions == "original"


def test_every_error_is_ours_and_a_builtin_kind() -> None:
    assert issubclass(BudgetError, ConfigError)
    assert issubclass(ConfigError, VispruneError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(UnsupportedModel, VispruneError)
    assert issubclass(UnsupportedModel, TypeError)
