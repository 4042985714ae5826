# SPDX-License-Identifier: Apache-2.0
"""Methods one after another: what one leaves, the next sees; what does not compose is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import visprune
from tests import tiny
from tests.contract import oracle
from tests.contract.cases import batch, places
from tests.contract.test_removal import state
from visprune.core.chain import Chain
from visprune.core.method import PruningMethod
from visprune.errors import BudgetError, ConfigError, UnsupportedModel

LATER = ("llava", "qwen2_5_vl")
both = pytest.mark.parametrize("family", LATER)


def made(*members: tuple[str, dict[str, Any]]) -> list[PruningMethod]:
    return [visprune.get_method(name, **params) for name, params in members]


CHAINS: dict[str, list[PruningMethod]] = {
    "projector and two depths": made(
        ("todre", {"num_keep": 9, "stage2": False}), ("v2drop", {"num_keep": 2, "layers": (2, 3)})
    ),
    "three, interleaved": made(
        ("fastv", {"num_keep": 6, "layer": 2}),
        ("todre", {"num_keep": 11, "tau": 0.0}),
        ("random_deep", {"num_keep": 3, "layer": 3}),
    ),
    "one layer": made(
        ("fastv", {"num_keep": 9, "layer": 2}), ("dart", {"num_keep": 6, "layer": 2})
    ),
    "withdrawn in the end": made(("uniform", {"num_keep": 7}), ("vtw", {"layer": 3})),
}
every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


@both
@every_chain
@torch.no_grad()
def test_what_leaves_equals_what_is_hidden(
    chain: list[PruningMethod], family: str, models: Any
) -> None:
    model, inputs = models(family), batch(family)
    with oracle.forwards() as seen, visprune.prune(model, chain, positions="original") as run:
        logits = model(**inputs).logits
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, output_logits=True,
                             suppress_tokens=[90, 91, 92, 93],
                             return_dict_in_generate=True)  # fmt: skip
    keep = oracle.alive(seen[0])
    there = keep[-1] & inputs["attention_mask"].bool()
    oracle.assert_close(logits[there], oracle.hidden_logits(model, inputs, keep)[there])
    assert [stage["method"] for stage in run.trace.stages]
    length = inputs["input_ids"].shape[1]
    longer = oracle.extended(inputs, out.sequences[:, length:-1])
    grown = oracle.grown(keep, longer["input_ids"].shape[1])
    want = oracle.hidden_logits(model, longer, grown)[:, length - 1 :]
    for number, row in enumerate(out.logits):
        oracle.assert_close(row, want[:, number])


@both
@torch.no_grad()
def test_stages_run_in_order_of_depth(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    first, second = made(
        ("todre", {"num_keep": 8, "tau": 0.0}), ("v2drop", {"ratios": (0.5,), "layers": (2,)})
    )
    found = []
    for members in ((first, second), (second, first)):
        with visprune.prune(model, list(members)) as run:
            found.append((model(**inputs).logits, run.trace))
    (one, trace), (other, again) = found
    assert torch.equal(one, other)
    assert [s["site"] for s in trace.stages] == ["projector", "decoder(2)", "decoder(0.875)"]
    assert [s["method"] for s in trace.stages] == ["todre", "v2drop", "todre"]
    assert trace.stages == again.stages
    for image, row in enumerate(trace.image_rows):
        assert trace.stages[0]["after"][image] == 8
        assert trace.stages[1]["after"][image] == 4  # half of what was left
        assert trace.tokens_per_layer[row][1] == trace.tokens_per_layer[row][2] * 2


@torch.no_grad()
def test_a_ratio_is_of_what_a_member_is_given(models: Any) -> None:
    model, inputs = models("llava"), batch("llava")
    deep = {"keep_ratio": 0.25, "depths": (0.5, 0.75)}
    chain = made(("uniform", {"num_keep": 12}), ("pyramiddrop", deep))
    with visprune.prune(model, chain) as run:
        model(**inputs)
    assert [s["after"] for s in run.trace.stages] == [[12] * 3, [6] * 3, [3] * 3]
    with visprune.prune(model, "pyramiddrop", **deep) as run:
        model(**inputs)  # alone, of the picture's own
    assert [s["after"] for s in run.trace.stages] == [[18] * 3, [9] * 3]


@both
@torch.no_grad()
def test_two_at_one_layer_see_the_same_map(family: str, models: Any) -> None:
    # The second is shown the map that the layer before drew, of the tokens that are left.
    model, inputs = models(family), batch(family)
    with visprune.prune(model, "fastv", num_keep=5) as run:
        model(**inputs)
        wanted = [kept.tolist() for kept in run.trace.kept]
    chain = made(("fastv", {"num_keep": 10}), ("fastv", {"num_keep": 5}))
    with visprune.prune(model, chain) as run:
        model(**inputs)
        assert [kept.tolist() for kept in run.trace.kept] == wanted


@torch.no_grad()
def test_an_encoder_method_and_one_in_the_decoder(models: Any) -> None:
    model, inputs = models("llava"), batch("llava")
    with visprune.prune(model, "tome", r=4) as run:
        model(**inputs)
        merged, alone = run.trace, run.cost()
    with visprune.prune(model, "tome+fastv", num_keep=6, **{"tome.r": 4}) as run:
        model(**inputs)
        trace, cost = run.trace, run.cost()
    left = len(merged.kept[0])
    assert left < 36
    assert [[r[0], r[1], r[-1]] for r in trace.tokens_per_layer[:1]] == [[left, left, 6]]
    for kept, before in zip(trace.kept, merged.kept, strict=True):
        assert set(kept.tolist()) <= set(before.tolist())
    assert cost.vision == alone.vision
    assert cost.prefill < alone.prefill
    assert cost.selection > alone.selection


@both
@torch.no_grad()
def test_costs_add_up(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    todre = visprune.get_method("todre", num_keep=10, stage2=False)
    uniform = visprune.get_method("uniform", num_keep=10)
    fastv = visprune.get_method("fastv", num_keep=4)
    spent = {}
    for name, chain in {
        "first": [todre, visprune.get_method("keep_all")],
        "second": [uniform, fastv],
        "both": [todre, fastv],
    }.items():
        with visprune.prune(model, chain) as run:
            model(**inputs)
            spent[name] = [*run.trace.selection_per_row, 0, 0][:3]
    assert all(spent["first"][:2])
    assert all(spent["second"][:2])
    for total, a, b in zip(spent["both"], spent["first"], spent["second"], strict=True):
        assert total == a + b


@both
@torch.no_grad()
def test_keeping_all_twice_is_bit_equal(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    want = model(**inputs).logits
    before = state(model)
    with visprune.prune(model, ["keep_all", visprune.get_method("fastv", keep_ratio=1.0)]):
        assert torch.equal(model(**inputs).logits, want)
    assert state(model) == before


@both
@torch.no_grad()
def test_a_batch_equals_its_samples(family: str, models: Any) -> None:
    model = models(family)
    rows = [[3, "a", 6], [2, "b", 9, "a", 1]]
    chain = CHAINS["three, interleaved"]
    with visprune.prune(model, chain) as run:
        inputs = batch(family, rows)
        together, kept = model(**inputs).logits, [k.tolist() for k in run.trace.kept]
        alone = []
        for number, row in enumerate(rows):
            single = model(**batch(family, [row])).logits[0]
            whole = together[number, inputs["attention_mask"][number].bool()]
            assert oracle.error(whole, single) <= 1e-4
            alone += [k.tolist() for k in run.trace.kept]
    assert kept == alone


# By name ----------------------------------------------------------------------------------------


def test_a_budget_of_the_whole_is_what_is_left_in_the_end() -> None:
    chain = visprune.get_method("todre+v2drop+fastv", num_keep=8, tau=0.2, **{"fastv.layer": 3})
    assert isinstance(chain, Chain)
    todre, v2drop, fastv = chain.members
    assert [m.num_keep for m in (todre, v2drop, fastv)] == [32, 16, 8]  # type: ignore[attr-defined]
    assert (todre.tau, fastv.layer) == (0.2, 3)  # type: ignore[attr-defined]
    assert chain.name == "todre+v2drop+fastv"
    assert chain.num_keep == 8
    chain = visprune.get_method("uniform+fastv", keep_ratio=0.25, positions="compact", strict=True)
    assert isinstance(chain, Chain)
    assert [m.keep_ratio for m in chain.members] == [0.5, 0.5]  # type: ignore[attr-defined]
    assert chain.positions == "compact"
    assert all(member.strict for member in chain.members)


def test_a_chain_is_the_same_again_from_its_dict(tmp_path: Path) -> None:
    chain = visprune.get_method("todre+v2drop", num_keep=4, **{"v2drop.layers": (2, 3)})
    stored = json.loads(json.dumps(chain.to_dict()))
    assert visprune.get_method(stored.pop("method"), **stored) == chain
    assert visprune.get_method(chain) is chain
    model = tiny.build("llava")
    with visprune.prune(model, chain) as run:
        visprune.save_pretrained(run, tmp_path / "saved")
    _, again = visprune.load_pretrained(tmp_path / "saved")
    assert again is not None
    assert again.method == chain


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("todre+fastw", {"num_keep": 4}, r"Unknown method 'fastw'.*Did you mean 'fastv'"),
        ("todre+", {"num_keep": 4}, "Unknown method ''"),
        ("todre+fastv", {"num_keep": 4, "seed": 1}, "'seed' is an option of no member"),
        ("v2drop+dart", {"num_keep": 4, "layers": 1, "layer": 1.5, "x": 1}, "'x' is an option of"),
        ("fastv+dart", {"num_keep": 4, "layer": 3}, r"of fastv and dart; say whose .*fastv.layer="),
        ("fastv+dart", {"num_keep": 4, "todre.tau": 3}, "has 0 members called 'todre'"),
        ("fastv+fastv", {"num_keep": 4, "fastv.layer": 3}, "has 2 members called 'fastv'"),
        ("fastv+dart", {"num_keep": 4, "fastv.layr": 3}, "no parameter 'layr'. Did you mean"),
        ("keep_all+vtw", {"num_keep": 4}, "No member takes a budget"),
        (["todre"], {}, "got neither"),
        ([visprune.get_method("keep_all")], {}, "at least two methods, got 1"),
        ([], {}, "at least two methods, got 0"),
    ],
)
def test_words_that_are_no_chain(name: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        visprune.get_method(name, **params)


def test_chains_do_not_nest() -> None:
    chain = visprune.get_method(["keep_all", "vtw"])
    with pytest.raises(ConfigError, match="none of them a chain"):
        visprune.get_method([chain, "vtw"])


# What does not compose --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((("tome", {"r": 2}), ("evit", {})), "tome and evit both act inside the image encoder"),
        ((("tome", {"r": 2}), ("visionzip", {"num_keep": 4})),
         r"visionzip is shown ClsAttention.*and tome leaves fewer patches in the encoder"),
        ((("todre", {"num_keep": 4}), ("fastv", {"num_keep": 9})),
         "fastv keeps 9 of the 4 tokens that todre leaves, so it would never drop any"),
        ((("fastv", {"num_keep": 4}), ("uniform", {"num_keep": 4}), ("random", {"num_keep": 4})),
         "random keeps 4 of the 4 tokens that uniform leaves"),
        ((("fastv", {"num_keep": 4, "layer": 9}), ("vtw", {})), "decoder layer 9 does not exist"),
    ],
)  # fmt: skip
def test_a_conflict_is_refused_with_its_reason(members: Any, message: str, models: Any) -> None:
    model = models("llava")
    before = state(model)
    with pytest.raises(ConfigError, match=message):
        visprune.prune(model, made(*members))
    assert state(model) == before


def test_a_member_that_a_model_cannot_have(models: Any) -> None:
    model = models("qwen2_5_vl")
    with pytest.raises(UnsupportedModel, match=r"visionzip is shown .*Methods that fit"):
        visprune.prune(model, made(("visionzip", {"num_keep": 4}), ("vtw", {})))
    with pytest.raises(UnsupportedModel, match="tome acts inside the image encoder"):
        visprune.prune(model, made(("tome", {"r": 4}), ("vtw", {})))


def test_positions_of_members(models: Any) -> None:
    compact = ("uniform", {"num_keep": 9, "positions": "compact"})
    original = ("fastv", {"num_keep": 4, "positions": "original"})
    with pytest.raises(ConfigError, match="fastv has positions='original', uniform 'compact'"):
        visprune.get_method(made(compact, original))
    for members, more, rule in [
        ((compact, original), {"positions": "compact"}, "compact"),
        ((compact, ("fastv", {"num_keep": 4})), {}, "compact"),
        ((("divprune", {"num_keep": 9}), ("fastv", {"num_keep": 4})), {}, "original"),
        ((("divprune", {"num_keep": 9}), ("pyramiddrop", {"num_keep": 4})), {}, "compact"),
    ]:
        with visprune.prune(models("llava"), made(*members), **more) as run:
            assert run.plan.positions == rule
    with pytest.raises(ConfigError, match="closes up a line of ids; qwen2_5_vl"):
        visprune.prune(models("qwen2_5_vl"), made(compact, ("fastv", {"num_keep": 4})))


def test_two_runs_on_one_model_stay_refused(models: Any) -> None:
    model = models("llava")
    with visprune.prune(model, "todre+fastv", num_keep=4):
        with pytest.raises(ConfigError, match=r"already pruned by 'todre\+fastv'"):
            visprune.prune(model, "vtw")
        with pytest.raises(ConfigError, match="already pruned"):
            visprune.prune(model, "todre+fastv", num_keep=4)


@torch.no_grad()
def test_a_strict_member_refuses_a_picture_that_is_too_small(models: Any) -> None:
    model, inputs = models("llava"), batch("llava")
    chain = made(("uniform", {"num_keep": 500, "strict": True}), ("fastv", {"num_keep": 4}))
    with visprune.prune(model, chain), pytest.raises(BudgetError, match="500 exceeds the 36"):
        model(**inputs)
    assert len(places("llava", inputs)) == 3
