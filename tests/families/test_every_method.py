# SPDX-License-Identifier: Apache-2.0
"""Every method of the registry on one family of each kind of decoder, beside the first four.

DeepStack and (t, h, w) positions, tiles without marks, windows with pictures seen both ways,
recurrent layers, tiles between marks. A pair is refused with the reason, or: keeping all changes no
bit; what was dropped is hidden, or where layers carry a state was never there; what was merged is
the layers' own work on the explicit maps; answers are those of one forward; a batch is its samples;
and the model is left as it was.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visprune
import visprune.catalog
from tests.contract.cases import BEFORE, BY_PLACE, EVERY, INSIDE, NO_BUDGET, WHOLE_PICTURES
from tests.contract.cases import everything as everything_of
from tests.contract.cases import few as few_of
from tests.contract.oracle import TOLERANCE, alive, error, forwards, grown
from tests.contract.test_removal import state
from tests.families import tiny
from tests.families.oracle import extended, gone_logits, two_kernels
from tests.families.replay import Stages, replayed
from visprune.backbones.vlm.known import BEFORE as TAKE_PATCHES
from visprune.backbones.vlm.known import EVERY_METHOD, FIRST, REDUCED
from visprune.core.selection import Selection
from visprune.machine.decoder.hooks import DecoderHooks
from visprune.machine.find import find_adapter
from visprune.machine.plan import why_not

FAMILIES = tuple(name for name in EVERY_METHOD if name not in FIRST)
PRECISE = 2e-5  # sums of another batch and length run in another order
GREEDY: dict[str, Any] = {
    "max_new_tokens": 2,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    "suppress_tokens": list(range(86, 100)),  # placeholders and marks
}
# Where the layers of a method's own choice have no attention to be asked, and what it drops there.
OWN: dict[tuple[str, str], dict[str, Any]] = {
    ("pyramiddrop", "qwen3_5"): {"depths": (1, 2)},
    ("sparsevlm", "qwen3_5"): {"layers": (2, 3), "lists": (8, 5)},
    ("lightkv", "qwen3_5"): {"layers": (2, 3), "windows": (1, 1), "ratios": (0.5, 0.5)},
}
LOSSLESS: dict[tuple[str, str], dict[str, Any]] = {
    ("sparsevlm", "qwen3_5"): {"lists": (10_000, 10_000)},
    ("lightkv", "qwen3_5"): {"ratios": (0.0, 0.0)},
}

every_pair = pytest.mark.parametrize(
    ("name", "family"), [(name, family) for family in FAMILIES for name in EVERY]
)


def rows_of(family: str) -> list[list[Any]]:
    """Left padding, two pictures in a row, one a clip where the family has them, text alone."""
    second = "v" if tiny.FAMILIES[family].clip else "C"
    return [[3, "a", 6], [2, "b", 4, second, 3], [5]]


def few(name: str, family: str) -> dict[str, Any]:
    return {**few_of(name, positions="original"), **OWN.get((name, family), {})}


def everything(name: str, family: str) -> dict[str, Any]:
    pair = (name, family)
    return {**everything_of(name), **OWN.get(pair, {}), **LOSSLESS.get(pair, {})}


def placed(name: str, family: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """With the positions that tokens have alone, for a method whose choice depends on them."""
    if name not in BY_PLACE or "mm_token_type_ids" in inputs:
        return inputs
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def refused(name: str, family: str, model: Any) -> bool:
    """Whether a family cannot take a method; then it says so, and is left as it was."""
    if why_not(visprune.catalog.methods.get(name), find_adapter(model).spec) is None:
        return False
    before = state(model)
    with pytest.raises(visprune.UnsupportedModel, match=r"Methods that fit it|Use snapkv") as found:
        visprune.prune(model, visprune.catalog.methods.get(name).example())
    assert name in str(found.value)
    assert state(model) == before
    return True


@pytest.fixture(scope="session")
def noise() -> dict[str, float]:
    """How far the oracle of a family lies from the untouched model, by family."""
    return {}


@every_pair
@torch.no_grad()
def test_what_holds_of_every_method(
    name: str, family: str, models: Any, noise: dict[str, float]
) -> None:
    model, rows = models(family), rows_of(family)
    if refused(name, family, model):
        return
    eager, inputs = models(family, "eager"), placed(name, family, tiny.inputs(family, rows))
    before, valid = state(model), inputs["attention_mask"].bool()
    plain = model(**inputs).logits
    if family not in noise:
        noise[family] = two_kernels(family, eager, inputs, plain)
    allowed = TOLERANCE + 2 * noise[family]
    assert allowed < 1e-4
    if NO_BUDGET.get(name, ({}, {}))[0] is not None:
        with visprune.prune(model, name, **everything(name, family)):
            assert torch.equal(model(**inputs).logits, plain)

    with forwards() as seen, visprune.prune(model, name, **few(name, family)) as run:
        logits, kept = model(**inputs).logits, run.trace.kept
        answer = model.generate(**inputs, **GREEDY)
        alone = []
        for number, row in enumerate(rows):
            single = model(**tiny.inputs(family, [row])).logits[0]
            assert error(logits[number, valid[number]], single) <= PRECISE
            if number < 2:
                alone += run.trace.kept
    assert state(model) == before
    assert torch.equal(model(**inputs).logits, plain)
    assert torch.isfinite(logits[valid]).all()
    assert sorted(k.tolist() for k in kept) == sorted(k.tolist() for k in alone)
    left = any(bool((valid & ~there).any()) for there in alive(seen[0]))
    clips = tiny.FAMILIES[family].clip is not None
    assert left == (name != "keep_all" and (clips or name not in WHOLE_PICTURES))

    assert error(answer.logits[0], logits[:, -1]) <= PRECISE
    if any(s.merges for image in seen[0].images for s in image.chosen):
        assert name in MERGES
        return  # by test_merging_equals_the_layers_with_the_maps_between
    length = inputs["input_ids"].shape[1]
    new = answer.sequences[:, length:-1]
    longer = placed(name, family, extended(inputs, new, find_adapter(model).answer_types))
    keep = grown(alive(seen[0]), length + new.shape[1])
    want = gone_logits(family, eager, longer, keep)
    there = alive(seen[0])[-1] & valid
    assert error(logits[there], want[:, :length][there]) <= allowed
    assert error(answer.logits[1], want[:, length]) <= allowed


# Families that take patches with their places have tests of their own (test_pixels.py), and so have
# those in whose encoder tokens can leave (test_reduced_towers.py).
REFUSED = [
    (name, family)
    for family in FAMILIES
    for name in (
        *([] if family in REDUCED else INSIDE),
        *([] if family in TAKE_PATCHES else BEFORE),
    )
]


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_what_acts_inside_an_encoder_is_refused(name: str, family: str, models: Any) -> None:
    assert refused(name, family, models(family))


# Stages that merge, unless all that may merge is kept.
MERGES = (
    *("visionzip", "pool", "prumerge", "prumerge_plus", "trim", "vscan", "flashvid"),
    *("sparsevlm", "lightkv", "pact", "vitcop"),
)


@pytest.mark.parametrize(("name", "family"), [(n, f) for f in FAMILIES for n in MERGES])
@torch.no_grad()
def test_merging_equals_the_layers_with_the_maps_between(
    name: str, family: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = models(family), tiny.inputs(family, [[4, "A", 7]])
    if refused(name, family, model):
        return
    stages: Stages = []
    layers = len(find_adapter(model).layers)

    def note(site: Any, tokens: Any, ctx: Any, selection: Selection, seconds: float) -> None:
        stages.append((0 if site.kind == "projector" else site.resolve(layers), selection))

    found: list[Any] = []
    plain = DecoderHooks._layouts
    monkeypatch.setattr(DecoderHooks, "_layouts", lambda self: found.extend(plain(self)) or found)
    wide = {"cutoff": 0.6} if name == "pact" else {}  # so that clusters form in every family
    with visprune.prune(model, name, **{**few(name, family), **wide}) as run:
        run.observe(note)
        logits, trace = model(**inputs).logits[0], run.trace
    (layout,) = found
    assert any(s.merges for _, s in stages) or (name, family) == ("vscan", "gemma3")
    free = set(layout.positions[layout.picture.free].tolist())
    weighs = any(act.weighs for act in run.plan.acts)
    want, stands = replayed(models(family, "eager"), inputs, free, stages, weighs=weighs)
    assert weighs == (name == "pact")
    assert not weighs or float(trace.sizes[0].max()) > 1
    assert trace.index is not None
    assert sorted(stands.tolist()) == (trace.index[0] >= 0).nonzero()[:, 0].tolist()
    assert error(logits[stands], want) <= TOLERANCE
