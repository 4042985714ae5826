# SPDX-License-Identifier: Apache-2.0
"""transformers' BEiT and Data2Vec: a bias per pair of places goes with the tokens."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import visprune
from tests.encoders import hf, oracle
from tests.encoders.small import WITHOUT_MERGING as METHODS
from tests.encoders.small import enlarged, listed
from visprune.backbones.encoders import BIASED
from visprune.errors import UnsupportedModel

BIASES: dict[str, dict[str, Any]] = {
    "own": {"use_relative_position_bias": True},
    "shared": {"use_shared_relative_position_bias": True},
    "both": {"use_relative_position_bias": True, "use_shared_relative_position_bias": True},
    "no_scale": {"use_relative_position_bias": True, "layer_scale_init_value": 0.0},
    "first": {"use_relative_position_bias": True, "use_mean_pooling": False},
    "absolute": {"use_relative_position_bias": True, "use_absolute_position_embeddings": True},
    "drop_path": {"use_relative_position_bias": True, "drop_path_rate": 0.1},
    "eager": {"use_relative_position_bias": True, "attn_implementation": "eager"},
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "image_size", "patch_size")  # fmt: skip
KINDS = ("BeitModel", "Data2VecVisionModel")
AROUND = ("BeitForImageClassification", "Data2VecVisionForImageClassification")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_bias = pytest.mark.parametrize("bias", BIASES)


def build(kind: str, **options: Any) -> Any:
    cls = getattr(transformers, kind)
    given = {name: hf.SIZES[name] for name in SIZES}
    given |= {"num_labels": 3, "layer_scale_init_value": 0.5, "drop_path_rate": 0.0, **options}
    chosen = given.pop("attn_implementation", None)
    config = cls.config_class(**given)
    if chosen is not None:
        config._attn_implementation = chosen
    torch.manual_seed(0)
    more = {"add_pooling_layer": True} if kind == "Data2VecVisionModel" else {}
    return enlarged(cls(config, **more)).eval()


def pixels(batch: int = 2, seed: int = 0, size: tuple[int, int] = (24, 24)) -> Tensor:
    return torch.randn((batch, 3, *size), generator=torch.Generator().manual_seed(seed))


def layers_of(model: Any) -> Any:
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


@pytest.mark.parametrize("kind", [*KINDS, "BeitBackbone", *AROUND])
@every_bias
@torch.no_grad()
def test_keeping_all_changes_no_bit(kind: str, bias: str) -> None:
    model, x = build(kind, **BIASES[bias]), pixels(1)
    want = hf.answer(model(x))
    for method in METHODS:
        with visprune.prune(model, method, keep_ratio=1.0) as run:
            assert torch.equal(hf.answer(model(x)), want), method
            assert run.trace.stages
        with visprune.prune(model, method, **METHODS[method]) as run:
            assert not torch.equal(hf.answer(model(x)), want)
            assert (len(run.kept[0]) < 36) == (method != "ipcv")  # whose patches come back
    assert torch.equal(hf.answer(model(x)), want)


@every_kind
@every_bias
@pytest.mark.parametrize("method", ["topk", "random"])
@torch.no_grad()
def test_dropping_equals_hiding(kind: str, bias: str, method: str) -> None:
    model, x = build(kind, **BIASES[bias]), pixels()
    last: list[Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    handle = layers_of(model)[-1].register_forward_hook(note)
    with visprune.prune(model, method, **METHODS[method]) as run:
        model(x)
        keep = [oracle.alive(run, layer) for layer in range(hf.LAYERS)]
        order = run._reducer.latest.composed(hf.LAYERS - 1).index
    takes = inspect.signature(type(layers_of(model)[0]).forward).parameters
    name = next(n for n in ("relative_position_bias", "attention_mask") if n in takes)
    got = last.pop()
    for row in range(2):
        handles = []
        for layer, left in zip(layers_of(model), keep, strict=True):
            hidden = ~torch.nn.functional.pad(left[row], (1, 0), value=True)
            added = torch.zeros(1, 4, 37, 37).masked_fill(hidden, float("-inf"))

            def before(module: Any, args: Any, kwargs: Any, added: Tensor = added) -> Any:
                shared = kwargs.get(name)
                return args, {**kwargs, name: added if shared is None else added + shared}

            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        model(x[row : row + 1])
        for each in handles:
            each.remove()
        want = last.pop()[0]
        oracle.assert_close(got[row], want[[0, *(order[row] + 1).tolist()]])
    handle.remove()


@every_kind
@every_bias
@torch.no_grad()
def test_the_class_tokens_row_is_that_of_the_attention(kind: str, bias: str) -> None:
    options = {**BIASES[bias], "attn_implementation": "eager"}
    seen, x = build(kind, **options), pixels()
    rows = seen(x, output_attentions=True).attentions[1][:, :, 0, 1:].mean(1)
    best = rows.argsort(dim=1, descending=True, stable=True)[:, :6].sort(dim=1).values
    for model in (seen, build(kind, **BIASES[bias])):
        with visprune.prune(model, "topk", num_keep=6, layers=(1,)) as run:
            model(x)
            assert torch.equal(torch.stack(run.kept), best)


@every_kind
@pytest.mark.parametrize("method", ["tome", "pitome", "diffrate", "spatten", "ficoco_v"])
def test_what_it_cannot(kind: str, method: str) -> None:
    params = {"tome": {"r": 2}, "diffrate": {}, "ficoco_v": {}}.get(method, {"keep_ratio": 0.8})
    with pytest.raises(
        UnsupportedModel, match=r"bias per pair of places.*Methods that fit it"
    ) as e:
        visprune.prune(build(kind, **BIASES["own"]), method, **params)
    named = str(e.value).rpartition(": ")[2].rstrip(".").split(", ")
    assert set(named) == {"keep_all", *METHODS}
    assert set(named) == listed(f"transformers.{kind}")


@torch.no_grad()
def test_without_a_bias_tokens_merge_and_count() -> None:
    plain = {"use_relative_position_bias": False, "use_absolute_position_embeddings": True}
    model = build("BeitModel", **plain)
    model.embeddings.position_embeddings.zero_()
    x = hf.in_pairs(pixels(1))
    want = model(x).pooler_output
    with visprune.prune(model, "tome", r=[18, 0, 0]) as run:
        got = model(x).pooler_output
        assert len(run.kept[0]) == 18
    oracle.assert_close(got, want)
    with pytest.raises(UnsupportedModel, match=r"written out, and takes no sizes"):
        visprune.prune(build("Data2VecVisionModel", **plain), "tome", r=2)
    model = build("Data2VecVisionModel", **plain)
    with visprune.prune(model, "topk", keep_ratio=0.5) as run:
        model(pixels())
        assert len(run.kept[0]) < 36


@every_kind
@pytest.mark.parametrize("method", ["topk", "evit"])
def test_gradients_under_checkpointing(kind: str, method: str) -> None:
    model, x = build(kind, **BIASES["both"]).train(), pixels().requires_grad_()

    def gradients() -> dict[str, Tensor]:
        model(x).last_hidden_state.square().sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    with visprune.prune(model, method, **METHODS[method]):
        want = gradients()
        assert all(bool(torch.isfinite(grad).all()) for grad in want.values())
        tables = [n for n in want if n.endswith("relative_position_bias_table")]
        assert len(tables) == hf.LAYERS + 1
        assert all(float(want[name].abs().sum()) > 0 for name in tables)
        # A checkpoint that reenters does not take BEiT's shared bias backward twice, pruned or not.
        for reentrant in (False,) if kind == "BeitModel" else (False, True):
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
            got = gradients()
            assert got.keys() == want.keys()
            for key, grad in want.items():
                oracle.assert_close(got[key], grad)


@every_kind
@pytest.mark.parametrize("bias", ["own", "both"])
@pytest.mark.parametrize("interpolate", [False, True])
@torch.no_grad()
def test_another_size_and_a_batch_as_its_pictures(kind: str, bias: str, interpolate: bool) -> None:
    model, x = build(kind, **BIASES[bias]), pixels(3, size=(32, 24))
    more = {"interpolate_pos_encoding": interpolate}
    want = model(x, **more).last_hidden_state
    with visprune.prune(model, "topk", keep_ratio=1.0):
        assert torch.equal(model(x, **more).last_hidden_state, want)
    with visprune.prune(model, "topk", keep_ratio=0.6) as run:
        got = model(x, **more).last_hidden_state
        assert run.trace.num_tokens == [48, 48, 48]
        for row in range(3):
            oracle.assert_close(got[row], model(x[row : row + 1], **more).last_hidden_state[0])


@torch.no_grad()
def test_a_mask_hides_what_it_hid() -> None:
    model, x = build("BeitModel", **BIASES["own"]), pixels()
    mask = torch.ones(2, 37, dtype=torch.int64)
    mask[0, 20:] = 0
    want = model(x, attention_mask=mask).last_hidden_state
    with visprune.prune(model, "topk", keep_ratio=1.0):
        assert torch.equal(model(x, attention_mask=mask).last_hidden_state, want)
    with visprune.prune(model, "topk", num_keep=10, layers=(1,)) as run:
        model(x, attention_mask=mask)
        assert int(run.kept[0].max()) < 19
        assert int(run.kept[1].max()) >= 19


@pytest.mark.parametrize("method", ["topk", "random"])
@torch.no_grad()
def test_feature_maps_lie_on_the_grid(method: str) -> None:
    stages = {"out_features": [f"stage{n}" for n in range(1, hf.LAYERS + 1)]}
    model, x = build("BeitBackbone", **BIASES["own"], **stages), pixels()
    whole = model(x).feature_maps
    with visprune.prune(model, method, **METHODS[method]):
        maps = model(x).feature_maps
    assert [m.shape for m in maps] == [m.shape for m in whole]
    assert len(maps) == hf.LAYERS
    assert not torch.equal(maps[-1], whole[-1])


@every_kind
@torch.no_grad()
def test_the_cost_is_what_a_counter_counts(kind: str) -> None:
    model, x = build(kind, **BIASES["both"], attn_implementation="eager"), pixels()
    for method, params in (("keep_all", {}), ("random", {"keep_ratio": 0.6})):
        with visprune.prune(model, method, **params) as run:
            with FlopCounterMode(display=False) as counter:
                model(x)
            cost = run.cost()
        assert cost.vision <= counter.get_total_flops() // 2 <= cost.vision + cost.selection


@every_kind
@torch.no_grad()
def test_threads_a_copy_and_removal(kind: str) -> None:
    model = build(kind, **BIASES["both"])
    before = {n: set(vars(m)) for n, m in model.named_modules()}
    pictures = [pixels(1, seed) for seed in range(8)]
    dense = model(pictures[0]).pooler_output
    with visprune.prune(model, "topk", keep_ratio=0.6):
        want, twin = oracle.threads_equal_turns(model, pictures, lambda out: out.pooler_output)
    assert torch.equal(twin(pictures[0]).pooler_output, want[0])
    visprune.remove(twin)
    assert torch.equal(twin(pictures[0]).pooler_output, dense)
    assert torch.equal(model(pictures[0]).pooler_output, dense)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == before


def test_all_of_the_table_is_here() -> None:
    assert set(BIASED) == {*KINDS, "BeitBackbone"}


@every_kind
@torch.no_grad()
def test_compiled_and_exported(kind: str) -> None:
    torch._dynamo.reset()
    model, x = build(kind, **BIASES["both"]), pixels()
    with visprune.prune(model, "topk", keep_ratio=0.6):
        want = model(x).pooler_output
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x).pooler_output, want)
        assert torch.equal(compiled(x).pooler_output, want)
        exported = torch.export.export(model, (x,)).module()
        oracle.assert_close(exported(x).pooler_output, want)
