# SPDX-License-Identifier: Apache-2.0
"""Every signal is what eager attention or a plain hook shows, whatever kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

import visprune
from tests import tiny
from tests.contract.cases import batch, places
from visprune.core import (
    Budget,
    Context,
    ModelSpec,
    PruningMethod,
    Schedule,
    Selection,
    Site,
    Stage,
)
from visprune.core.signals import (
    AttentionRows,
    ClsAttention,
    DecoderReceivedAttention,
    DecoderSeen,
    DecoderSignal,
    EncoderFeatures,
    EncoderKeys,
    EncoderQueriesKeys,
    FinalNormStates,
    Fingerprint,
    Frames,
    HiddenStates,
    KeysValues,
    LastQueryAttention,
    QueriesKeys,
    ReceivedAttention,
    RotaryTables,
    SampleKeysValues,
    Signal,
    Slots,
    TextSlots,
    TextStates,
    VisualShare,
    WholeClsAttention,
)
from visprune.core.tokens import VisualTokens

LAYER = 2
ROWS = [[3, "a", 6], [2, "b", 4]]


@dataclass(frozen=True, kw_only=True)
class Looks(PruningMethod):
    """Keeps half at the projector if asked to, then looks at a signal and keeps all."""

    name: ClassVar[str] = "looks"
    site: Site
    wanted: Signal
    first: float = 1.0
    seen: list[Any] = field(default_factory=list, compare=False)

    def schedule(self, spec: ModelSpec) -> Schedule:
        """A stage that thins out, and one that looks."""
        thin = Stage(Site.projector(), Budget(keep_ratio=self.first))
        return (thin, Stage(self.site, Budget(keep_ratio=1.0), (self.wanted,)))

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Note the signal."""
        count, device = tokens.num_tokens, tokens.features.device
        if ctx.stage == 1:
            self.seen.append(ctx[self.wanted])
            return Selection.identity(len(tokens.features), count, device)
        index = torch.arange(count)[:: 2 if ctx.num_keep < count else 1][: ctx.num_keep]
        return Selection.keep(index.expand(len(tokens.features), -1), count)


def looked(
    model: Any, inputs: dict[str, Any], wanted: Signal, site: Site | None = None, **params: Any
) -> Any:
    """The signal ``[B, ...]`` of all pictures, one after another."""
    method = Looks(site=site or Site.decoder(LAYER), wanted=wanted, **params)
    with visprune.prune(model, method), torch.no_grad():
        model(**inputs)
    parts = method.seen
    if isinstance(parts[0], tuple):
        return tuple(x for part in parts for x in part)
    return torch.cat(parts)


def visual(family: str, inputs: dict[str, Any]) -> list[tuple[int, Tensor]]:
    """Row and places of the free tokens of every picture."""
    return [(row, free) for row, free, _ in places(family, inputs)]


def noted(module: Any, model: Any, inputs: dict[str, Any], what: Callable[..., Any]) -> Any:
    found: list[Any] = []
    handle = module.register_forward_hook(
        lambda m, args, kwargs, out: found.append(what(args, kwargs, out)), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return found[0]


@pytest.fixture(params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# The decoder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["previous", "own"])
def test_attention_of_the_last_query(
    where: Literal["previous", "own"], family: str, attention: str, models: Any
) -> None:
    inputs = batch(family, ROWS)
    maps = models(family, "eager")(**inputs, output_attentions=True).attentions
    source = maps[LAYER - 1 if where == "previous" else LAYER]
    got = looked(models(family, attention), inputs, LastQueryAttention(where))
    for mine, (row, free) in zip(got, visual(family, inputs), strict=True):
        assert torch.allclose(mine, source[row, :, -1][:, free], atol=1e-5)


@pytest.mark.parametrize("raters", ["text", "after_image", "all"])
def test_attention_of_many_queries(raters: Any, family: str, attention: str, models: Any) -> None:
    inputs = batch(family, ROWS)
    maps = models(family, "eager")(**inputs, output_attentions=True).attentions[LAYER - 1]
    model = models(family, attention)
    rows = looked(model, inputs, AttentionRows(raters=raters))
    sums = looked(model, inputs, DecoderReceivedAttention(raters=raters))
    share = looked(model, inputs, VisualShare())
    valid = inputs["attention_mask"].bool()
    image = torch.zeros_like(valid)
    for row, free, fixed in places(family, inputs):
        image[row, free] = image[row, fixed] = True
    for number, (row, free) in enumerate(visual(family, inputs)):
        queries = valid[row] if raters == "all" else valid[row] & ~image[row]
        if raters == "after_image":
            queries = queries & (image[row].long().cumsum(0) > 0)
        want = maps[row][:, queries][:, :, free]
        count = int(queries.sum())
        assert torch.allclose(rows[number][:, -count:], want, atol=1e-5)
        assert not bool(rows[number][:, : rows.shape[2] - count].any())
        assert torch.allclose(sums[number], want.sum(1), atol=1e-5)
        text = valid[row] & ~image[row] & (image[row].long().cumsum(0) > 0)
        mass = maps[row][:, text][:, :, image[row]].sum(-1).mean()
        assert torch.allclose(share[number], mass, atol=1e-5)


def test_states_and_what_is_made_of_them(family: str, attention: str, models: Any) -> None:
    model, inputs = models(family, attention), batch(family, ROWS)
    decoder = model.model.language_model
    entered = noted(decoder.layers[LAYER - 1], model, inputs, lambda a, k, o: a[0])
    left = noted(
        decoder.layers[LAYER - 1],
        model,
        inputs,
        lambda a, k, o: o[0] if isinstance(o, tuple) else o,
    )
    states = looked(model, inputs, HiddenStates())
    normed = looked(model, inputs, FinalNormStates())
    for number, (row, free) in enumerate(visual(family, inputs)):
        assert torch.allclose(states[number], entered[row, free], atol=1e-6)
        assert torch.allclose(normed[number], decoder.norm(left)[row, free], atol=1e-5)


def test_queries_keys_and_values(family: str, attention: str, models: Any) -> None:
    model, inputs = models(family, attention), batch(family, ROWS)
    layers = model.model.language_model.layers
    heads, grouped = model.config.text_config.num_attention_heads, 0
    grouped = model.config.text_config.num_key_value_heads

    def projected(layer: Any, name: str, count: int) -> Tensor:
        out = noted(getattr(layer.self_attn, name), model, inputs, lambda a, k, o: o)
        return out.unflatten(-1, (count, -1)).transpose(1, 2)

    bare = looked(model, inputs, QueriesKeys(rotary=False))
    turned = looked(model, inputs, QueriesKeys())
    stored = looked(model, inputs, KeysValues())
    query = projected(layers[LAYER], "q_proj", heads)
    key = projected(layers[LAYER], "k_proj", grouped)
    value = projected(layers[LAYER - 1], "v_proj", grouped)
    for number, (row, free) in enumerate(visual(family, inputs)):
        want = torch.cat([query[row], key[row]])[:, free]
        assert torch.allclose(bare[number], want, atol=1e-5)
        assert torch.allclose(turned[number].norm(dim=-1), want.norm(dim=-1), atol=1e-4)
        assert float((turned[number] - want).abs().max()) > 1e-3
        assert torch.allclose(stored[number, 1], value[row][:, free], atol=1e-5)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    from visprune.backbones.hf.cache import cache_of

    keys = cache_of(out).layers[LAYER - 1].keys
    for number, (row, free) in enumerate(visual(family, inputs)):
        assert torch.allclose(stored[number, 0], keys[row][:, free], atol=1e-5)


def test_text_at_the_projector(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, ROWS)
    got = looked(model, inputs, TextStates(), Site.projector())
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    valid = inputs["attention_mask"].bool()
    image = torch.zeros_like(valid)
    for row, free, fixed in places(family, inputs):
        image[row, free] = image[row, fixed] = True
    for number, (row, _) in enumerate(visual(family, inputs)):
        text = embeds[row, valid[row] & ~image[row]]
        assert torch.equal(got[number][-len(text) :], text)
        assert not bool(got[number][: -len(text)].any())


def test_signals_follow_tokens_that_are_left(models: Any) -> None:
    model, inputs = models("llava"), batch("llava", ROWS)
    whole = looked(model, inputs, EncoderFeatures())
    half = looked(model, inputs, EncoderFeatures(), first=0.5)
    assert torch.equal(half, whole[:, ::2])
    short = looked(model, inputs, LastQueryAttention(), first=0.5)
    assert short.shape[-1] == whole.shape[1] // 2


# The encoder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 0.5, "feature", "last"])
def test_the_image_encoder(layer: Any, attention: str, models: Any) -> None:
    model, inputs = models("llava", attention), batch("llava", ROWS)
    tower, site = model.model.vision_tower, Site.projector()
    number = {"last": len(tower.encoder.layers) - 1, "feature": len(tower.encoder.layers) - 2}
    number[0.5] = len(tower.encoder.layers) // 2
    block = tower.encoder.layers[number.get(layer, layer)]
    with torch.no_grad():
        models("llava", "eager").model.vision_tower.set_attn_implementation("eager")
        maps = models("llava", "eager").model.vision_tower(
            inputs["pixel_values"], output_attentions=True
        ).attentions[number.get(layer, layer)]  # fmt: skip
    rows = looked(model, inputs, ClsAttention(layer), site)
    assert torch.allclose(rows, maps[:, :, 0, 1:], atol=1e-5)
    received = looked(model, inputs, ReceivedAttention(layer), site)
    assert torch.allclose(received, maps.mean(2)[..., 1:], atol=1e-5)
    states = noted(block, model, inputs, lambda a, k, o: o[0] if isinstance(o, tuple) else o)
    assert torch.equal(looked(model, inputs, EncoderFeatures(layer), site), states[:, 1:])
    query = noted(block.self_attn.q_proj, model, inputs, lambda a, k, o: o)
    key = noted(block.self_attn.k_proj, model, inputs, lambda a, k, o: o)
    whole = (query[:, :1] @ key.transpose(1, 2) * key.shape[-1] ** -0.5).softmax(-1)
    found = looked(model, inputs, WholeClsAttention(layer), site)
    assert torch.allclose(found, whole[:, 0, 1:], atol=1e-5)
    query, key = query[:, 1:], key[:, 1:]
    both = looked(model, inputs, EncoderQueriesKeys(layer), site)
    assert torch.allclose(both[:, 0], query, atol=1e-6)
    assert torch.allclose(both[:, 1], key, atol=1e-6)
    heads = model.config.vision_config.num_attention_heads
    mean = key.unflatten(-1, (heads, -1)).mean(2)
    assert torch.allclose(looked(model, inputs, EncoderKeys(layer), site), mean, atol=1e-6)


def test_pictures_have_fingerprints(family: str, models: Any) -> None:
    inputs = batch(family, ROWS)
    found = looked(models(family), inputs, Fingerprint(), Site.projector())
    assert len(found) == len(set(found)) == 2


def test_tokens_of_a_clip_know_their_frame(models: Any) -> None:
    inputs = batch("qwen2_5_vl", [[3, "v", 6]])
    found = looked(models("qwen2_5_vl"), inputs, Frames(), Site.projector(), first=0.5)
    assert found.tolist() == [[0, 0, 1, 1]]  # of two pairs of frames, 2 x 2 tokens each


def test_tokens_of_a_picture_are_one_frame(models: Any) -> None:
    """Also where LLaVA-NeXT counts its thumbnail and its tiles in ``pos``."""
    found = looked(models("llava_next"), batch("llava_next", ROWS), Frames(), Site.decoder(LAYER))
    assert not found.any()


def test_a_layer_that_is_not_there(models: Any) -> None:
    method = Looks(site=Site.projector(), wanted=ClsAttention(99))
    with pytest.raises(visprune.ConfigError, match=r"Encoder layer 99 does not exist.*0 to "):
        visprune.prune(models("llava"), method)
    assert visprune.runs(models("llava")) == []


# A signal from elsewhere -------------------------------------------------------------------------


@dataclass(frozen=True)
class Norms(DecoderSignal):
    """Length of every visual token as it enters the previous layer, ``[B, N]``."""

    uses: ClassVar[Literal["attention", "states", "sequence"]] = "states"

    def read(self, seen: DecoderSeen) -> Tensor:
        """One number per slot."""
        return seen.hidden.norm(dim=-1)


def test_a_method_brings_its_own_signal(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, ROWS)
    states = looked(model, inputs, HiddenStates())
    assert torch.allclose(looked(model, inputs, Norms()), states.norm(dim=-1), atol=1e-5)


@dataclass(frozen=True)
class Weighed(LastQueryAttention):
    """The last query's attention times the length of the value, ``[B, H, N]``."""

    reads_values: ClassVar[bool] = True

    def read(self, seen: DecoderSeen) -> Tensor:
        """Of heads that share a value, each."""
        assert seen.value is not None
        rows = super().read(seen)
        each = seen.new(seen.value.norm(dim=-1))
        return rows * each.repeat_interleave(rows.shape[1] // each.shape[1], dim=1)


def test_values_are_computed_ahead_where_a_signal_looks_at_them(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, ROWS)
    attention = model.model.language_model.layers[LAYER].self_attn
    calls: list[int] = []
    handle = attention.v_proj.register_forward_hook(lambda *given: calls.append(len(given[1][0])))
    rows = looked(model, inputs, LastQueryAttention("own"))
    assert len(calls) == 1  # its own run
    weighed = looked(model, inputs, Weighed("own"))
    assert len(calls) == 3
    handle.remove()
    value = noted(attention.v_proj, model, inputs, lambda a, k, o: o)
    config = model.config.text_config
    group = config.num_attention_heads // config.num_key_value_heads
    each = value.unflatten(-1, (config.num_key_value_heads, -1)).norm(dim=-1)
    for number, (row, free) in enumerate(visual(family, inputs)):
        length = each[row, free].T.repeat_interleave(group, dim=0)
        torch.testing.assert_close(weighed[number], rows[number] * length, rtol=1e-4, atol=1e-6)


def test_queries_and_keys_are_projected_once_for_two_ways_of_reading(
    family: str, models: Any
) -> None:
    """PACT reads them before and behind the rotary embedding; what each shows is tested above."""
    model, inputs = models(family), batch(family, ROWS)
    attention = model.model.language_model.layers[LAYER].self_attn
    calls: list[str] = []
    handles = [
        getattr(attention, name).register_forward_hook(lambda *_, name=name: calls.append(name))
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    with torch.no_grad(), visprune.prune(model, "pact", layer=LAYER):
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert sorted(calls) == ["k_proj", "k_proj", "q_proj", "q_proj", "v_proj"]  # and its own run


def test_no_signal_switches_the_kernel(models: Any) -> None:
    from torch.nn import functional

    model, inputs = models("llava"), batch("llava", ROWS)
    calls = {"sdpa": 0}
    fused = functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls["sdpa"] += 1
        return fused(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(functional, "scaled_dot_product_attention", counted)
        model(**inputs)
        want, calls["sdpa"] = calls["sdpa"], 0
        looked(model, inputs, LastQueryAttention())
        assert calls["sdpa"] == want
    assert model.config.text_config._attn_implementation == "sdpa"
    assert tiny.FAMILIES


def test_slots_say_which_entries_of_a_sample_are_whose(family: str) -> None:
    model, inputs = tiny.build(family), batch(family, ROWS)
    whole = looked(model, inputs, SampleKeysValues())
    slots = looked(model, inputs, Slots())
    own = looked(model, inputs, KeysValues())
    at = slots[:, None, None, :, None].expand(own.shape)
    assert torch.equal(whole.gather(3, at), own)
    for (_, free), found in zip(visual(family, inputs), slots, strict=True):
        assert found.tolist() == free.tolist()
    after = looked(model, inputs, TextSlots())
    for row, (_, free), found in zip(range(2), visual(family, inputs), after, strict=True):
        wanted = [
            n
            for n in range(int(free.max()) + 1, whole.shape[3])
            if bool(inputs["attention_mask"][row, n])
        ]
        assert found[found >= 0].tolist() == wanted
    plain, normed = (
        looked(model, inputs, TextStates(which="after_image", normed=n)) for n in (False, True)
    )
    want = model.model.language_model.norm(plain)
    there = plain.abs().sum(-1) > 0
    torch.testing.assert_close(normed[there], want[there])
    assert bool((normed[~there] == 0).all())


def test_rotary_tables_are_those_of_the_layer(family: str) -> None:
    model, inputs = tiny.build(family), batch(family, ROWS)
    got = looked(model, inputs, RotaryTables())
    given = noted(
        model.model.language_model.layers[0], model, inputs,
        lambda args, kwargs, out: kwargs["position_embeddings"],
    )  # fmt: skip
    for number, want in enumerate(given):
        mean = want.mean(0) if want.dim() == 4 else want
        torch.testing.assert_close(got[:, number], mean.expand(len(got), -1, -1))
