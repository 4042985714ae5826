# SPDX-License-Identifier: Apache-2.0
"""Sparsifiner the model: budgets, training, token pruning, sizes, names, cost, refusals."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelThingsBlock
from torch import Tensor

from tests.vit.shrunk import build, images, small_kwargs, stir
from visprune.backbones.encoders.macs import counted_macs
from visprune.backbones.vit import Sparsifiner, sparsifiner_cost
from visprune.backbones.vit.sparsifiner import checkpoint_filter_fn
from visprune.backbones.vit.sparsifiner_attention import _as_mask
from visprune.backbones.vit.sparsifiner_cost import measured_macs
from visprune.errors import BudgetError, ConfigError

NAME = "sparsifiner_deit_small"


def model(**kwargs: Any) -> Any:
    return build(NAME, **kwargs)


def dense_twin(sparse: Any) -> Any:
    """timm's own ViT with the same weights."""
    kwargs = small_kwargs(NAME)
    twin = timm.create_model("deit_small_patch16_224", **kwargs).eval()
    twin.load_state_dict(
        {n: v for n, v in sparse.state_dict().items() if ".mask_predictor." not in n}
    )
    return twin


def test_keeping_every_key_is_the_dense_model() -> None:
    sparse = model(attn_keep_rate=1.0)
    dense = dense_twin(sparse)
    with torch.no_grad():
        torch.testing.assert_close(sparse(images()), dense(images()), rtol=1e-4, atol=1e-5)
        few = model(attn_keep_rate=0.2)
        assert not torch.allclose(few(images()), dense(images()), rtol=1e-2)


@pytest.mark.parametrize("score_threshold", [None, 0.02, 1e9])
def test_training_and_inference_agree(score_threshold: float | None) -> None:
    # 1e9: no key passes, patches attend to nothing, the class token to all.
    net = model(score_threshold=score_threshold)
    x = images()
    with torch.no_grad():
        still = net(x)
        assert torch.isfinite(still).all()
        for block in net.blocks:
            block.attn.sparse_inference = False
        torch.testing.assert_close(net(x), still, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net.train()(x), still, rtol=1e-4, atol=1e-5)


def gradients(net: Any, sparse: bool) -> dict[str, Tensor]:
    net.zero_grad()
    net.train()
    for block in net.blocks:
        block.attn.sparse_training = sparse
    net(images()).square().sum().backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def test_the_sparse_operator_trains_alike() -> None:
    net = model()
    masked, sparse = gradients(net, False), gradients(net, True)
    assert masked.keys() == sparse.keys()
    assert not any(".mask_predictor." in n for n in masked), "the mask is a constant"
    for name, value in masked.items():
        torch.testing.assert_close(sparse[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_straight_through_reaches_the_predictor() -> None:
    rule = {"mask_gradient": "straight_through"}
    net, plain = model(sparsity=rule), model()
    learned, constant = gradients(net, False), gradients(plain, False)
    reached = [n for n in learned if ".mask_predictor." in n]
    assert len(reached) == 6 * len(net.blocks)
    assert all(torch.isfinite(g).all() for g in learned.values())
    # In the last block only the class token's row is read, and that is not masked.
    still = [n for n in reached if not learned[n].any()]
    assert still == [n for n in reached if n.startswith(f"blocks.{len(net.blocks) - 1}.")]
    # The value is the same; so is the gradient of the last layer, which is behind every mask.
    torch.testing.assert_close(learned["head.weight"], constant["head.weight"])


def test_straight_through_points_downhill() -> None:
    # A step of the predictors alone along their gradient lowers a loss that depends on the mask
    # smoothly on average: over several seeds it goes down more often than chance.
    lower = 0
    for seed in range(10):
        net = build(NAME, seed=seed, sparsity={"mask_gradient": "straight_through"}).train()
        x, target = images(4, seed=seed), torch.randn(4, 5)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(".mask_predictor." in name)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(12):
            loss = (net(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        lower += min(losses[-3:]) < losses[0]
    assert lower >= 8


@pytest.mark.parametrize("loc", [(0,), (0, 1)])
def test_token_pruning_removes_patches(loc: tuple[int, ...]) -> None:
    net = model(token_pruning_loc=loc, token_keep_rate=0.5)
    patches = 16
    want = {0: 8, 1: 4}
    assert net.token_budgets() == {i: want[i] for i in loc}
    with torch.no_grad():
        features = net.forward_features(images())
        assert features.shape == (2, 1 + want[loc[-1]], 32)
        output = net.forward_train(images())
        assert torch.equal(output.logits, net(images()))
        assert output.kept.shape == output.tokens.shape[:2]
        assert bool((output.kept.diff(dim=1) > 0).all())
        maps = net.forward_intermediates(images(), intermediates_only=True)
        assert [m.shape[2:] for m in maps] == [(4, 4), (4, 4)]
        last = maps[-1].flatten(2)
        zero = (last == 0).all(1)
        assert zero.sum(1).tolist() == [patches - want[loc[-1]]] * 2
        assert not zero.gather(1, output.kept).any()
        everything = net.forward_train(images(), reconstruct=True)
        assert everything.kept is None
        assert everything.predicted[0].shape == (2, 2, patches, patches + 1)


def test_token_pruning_keeps_what_the_class_token_sees() -> None:
    net = model(token_pruning_loc=(0,), token_keep_rate=0.25)
    whole = model()
    with torch.no_grad():
        x = whole.norm_pre(whole._pos_embed(whole.patch_embed(images())))
        attn = whole.blocks[0].attn
        q, k, _ = (attn.qkv(whole.blocks[0].norm1(x)).unflatten(-1, (3, 2, 16))
                   .permute(2, 0, 3, 1, 4))  # fmt: skip
        row = (q[:, :, :1] @ k.transpose(-1, -2) / 4).softmax(-1)[:, :, 0, 1:].mean(1)
        best = row.topk(4).indices.sort(-1).values
        assert torch.equal(net.forward_train(images()).kept, best)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"score_threshold": 0.02},
        {"sparsity": {"mask_gradient": "straight_through"}},
        {"token_pruning_loc": (0,), "token_keep_rate": 0.5},
    ],
    ids=["budget", "threshold", "straight through", "token pruning"],
)
def test_half_precision(
    dtype: torch.dtype, autocast: bool, training: bool, kwargs: dict[str, Any]
) -> None:
    net, x = model(**kwargs).train(training), images()
    want, taught = net(x), net.forward_train(x, reconstruct=True).predicted
    net, x = (net, x) if autocast else (net.to(dtype), x.to(dtype))
    with torch.autocast("cpu", dtype, enabled=autocast):
        got, guessed = net.forward_train(x), net.forward_train(x, reconstruct=True).predicted
    assert got.logits.dtype == dtype
    # The class token's attention may rank two patches the other way round.
    assert (got.logits.float() - want).norm() < 0.05 * want.norm()
    for a, b in zip(guessed, taught, strict=True):
        assert (a.float() - b).norm() < 0.02 * b.norm()
    (got.logits.float().sum() + sum(a.float().sum() for a in guessed)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_intermediates_the_way_timm_asks() -> None:
    net, x = model(), images()
    with torch.no_grad():
        final, maps = net.forward_intermediates(x)
        lists = net.get_intermediate_layers(x, n=2)
        assert [t.shape for t in lists] == [(2, 16, 32)] * 2
        assert torch.equal(lists[1].transpose(1, 2).unflatten(2, (4, 4)), maps[1])
        got = net.forward_intermediates(x, output_dict=True)
        assert set(got) == {"image_intermediates", "image_features"}
        assert torch.equal(got["image_features"], final)
        options: dict[str, Any] = {"return_prefix_tokens": True, "intermediates_only": True}
        pairs = net.forward_intermediates(x, **options)
        got = net.forward_intermediates(x, output_dict=True, **options)
        assert set(got) == {"image_intermediates", "image_intermediates_prefix"}
        for (patches, prefix), a, b in zip(pairs, *got.values(), strict=True):
            assert torch.equal(patches, a)
            assert torch.equal(prefix, b)
        bare = model(class_token=False, global_pool="avg")
        assert [t.shape for t in bare.forward_intermediates(x, **options)] == [(2, 32, 4, 4)] * 2
    for mask in ({"attn_mask": torch.ones(17, 17, dtype=torch.bool)}, {"is_causal": True}):
        with pytest.raises(ConfigError, match="its own mask"):
            net.forward_intermediates(x, **mask)


def test_another_image_size() -> None:
    net = model()
    before = net.predictors[0].proj_n.clone()
    net.set_input_size((96, 64))
    assert net.predictors[0].proj_n.shape == (6 * 4 + 1, before.shape[1])
    assert torch.equal(net.predictors[0].proj_n[0], before[0]), "the class token's row stays"
    assert net.predictors[0].budget(25) == 7
    with torch.no_grad():
        assert net(images(1, 96, 64)).shape == (1, 5)
    fresh = build(NAME, img_size=(96, 64), rank=before.shape[1])
    fresh.load_state_dict(checkpoint_filter_fn(model().state_dict(), fresh))
    torch.testing.assert_close(fresh.predictors[0].proj_n, net.predictors[0].proj_n)
    net.set_input_size(64)
    wrong = net.blocks[0].attn
    with pytest.raises(ConfigError, match=r"predicts for 17 tokens; got 9\. Call set_input_size"):
        wrong(torch.randn(1, 9, 32))


def test_a_dense_checkpoint_is_a_start() -> None:
    net, start = model(), model(seed=5)
    dense = dense_twin(start).state_dict()
    own = {n: v.clone() for n, v in net.state_dict().items() if ".mask_predictor." in n}
    net.load_state_dict(checkpoint_filter_fn(dense, net))
    assert torch.equal(net.blocks[0].attn.qkv.weight, dense["blocks.0.attn.qkv.weight"])
    assert all(torch.equal(net.state_dict()[n], v) for n, v in own.items())


def test_official_names() -> None:
    shapes = {
        n: tuple(v.shape) for n, v in timm.create_model(NAME, device="meta").named_parameters()
    }
    plain = timm.create_model("deit_small_patch16_224", device="meta")
    want = {n: tuple(v.shape) for n, v in plain.named_parameters()}
    for i in range(12):
        at = f"blocks.{i}.attn.mask_predictor."
        want |= {f"{at}proj_n": (197, 32), f"{at}proj_back_n": (197, 32)}
        for side in "qk":
            want |= {f"{at}proj_c_{side}.weight": (32, 64), f"{at}proj_c_{side}.bias": (32,)}
    assert shapes == want
    shared = build(NAME, share_inout_proj=True)
    twice = shared.state_dict()
    twice |= {n.replace("proj_n", "proj_back_n"): v for n, v in twice.items() if "proj_n" in n}
    shared.load_state_dict(checkpoint_filter_fn(twice, shared))


@pytest.mark.parametrize(
    ("keep_rate", "low", "high"), [(0.25, 0.44, 0.50), (0.10, 0.59, 0.65), (0.05, 0.64, 0.70)]
)
def test_cost_as_the_paper_counts(keep_rate: float, low: float, high: float) -> None:
    net = timm.create_model(NAME, attn_keep_rate=keep_rate)
    full, thin = sparsifiner_cost(net, basis_density=1.0), sparsifiner_cost(net, basis_density=0.1)
    assert full.mhsa_saved == pytest.approx(low, abs=0.0055)
    assert thin.mhsa_saved == pytest.approx(high, abs=0.0105)
    assert full.dense_model == pytest.approx(4.599e9, rel=1e-3)
    # Attention is 7.8 % of DeiT-S at 224, so much saved of it is little saved of the model.
    assert full.dense_mhsa / full.dense_model == pytest.approx(0.078, abs=0.0005)
    assert full.model_saved == pytest.approx(full.mhsa_saved * 0.0778, rel=0.01)
    assert "GMACs" in str(full)


def test_cost_measures_what_a_threshold_keeps() -> None:
    net = model(score_threshold=0.02)
    with pytest.raises(ConfigError, match="give images"):
        sparsifiner_cost(net)
    cost = sparsifiner_cost(net, images())
    budget = sparsifiner_cost(model(), images())
    assert budget == sparsifiner_cost(model())
    assert 0 < cost.sparse_mhsa < cost.dense_mhsa
    everything = sparsifiner_cost(model(attn_keep_rate=1.0))
    assert everything.sparse_mhsa == everything.dense_mhsa
    assert everything.mhsa_saved < 0, "the predictor is not free"


@pytest.mark.parametrize("kwargs", [{}, {"token_pruning_loc": (0,), "token_keep_rate": 0.5}])
def test_a_threshold_is_counted_on_pictures(kwargs: dict[str, Any]) -> None:
    size = (3, 64, 64)
    budget = model(**kwargs)
    assert measured_macs(budget, images()) == counted_macs(budget, size)
    net = model(score_threshold=0.02, **kwargs)
    most = counted_macs(net, size)  # on shapes alone: room for every key
    if not kwargs:
        assert most == counted_macs(model(attn_keep_rate=1.0), size)
    kept: list[float] = []
    for predictor in net.predictors:
        plain = predictor.select

        def count(*args: Any, plain: Any = plain, **options: Any) -> Tensor:
            idx = plain(*args, **options)
            kept.append(float((idx >= 0).sum()) / len(idx))
            return idx

        predictor.select = count
    with torch.no_grad():
        net(images())
    for predictor in net.predictors:
        del predictor.select
    rows = [16, 8 if kwargs else 16]  # and two heads; 16 channels each, in scores and in values
    pairs = sum(2 * n * (n + 1) for n in rows)
    assert measured_macs(net, images()) == round(most - 2 * 16 * (pairs - sum(kept)))
    assert measured_macs(model(score_threshold=1e9, **kwargs), images()) == most - 2 * 16 * pairs
    for block in net.blocks:
        block.attn.sparse_inference = False
    assert measured_macs(net, images()) == counted_macs(net, size)


def test_bad_input() -> None:
    for rate in (0.0, 1.5):
        with pytest.raises(BudgetError, match=r"keep_rate must be in \(0, 1\]"):
            model(attn_keep_rate=rate)
    with pytest.raises(BudgetError, match="token_keep_rate"):
        model(token_pruning_loc=(0,), token_keep_rate=0)
    with pytest.raises(ConfigError, match="rising block numbers"):
        model(token_pruning_loc=(5,), token_keep_rate=0.5)
    with pytest.raises(ConfigError, match="no class token"):
        model(token_pruning_loc=(0,), token_keep_rate=0.5, class_token=False, global_pool="avg")
    with pytest.raises(ConfigError, match="dynamic_img_size"):
        model(dynamic_img_size=True)
    with pytest.raises(ConfigError, match="mask_gradient"):
        model(sparsity={"mask_gradient": "gumbel"})
    for rank in (0, 99):
        with pytest.raises(ConfigError, match=rf"rank must be in 1\.\.17 .* got {rank} and 2"):
            model(rank=rank)
    with pytest.raises(ConfigError, match=r"reduce_c_factor in 1\.\.16 .* got 2 and 0"):
        model(reduce_c_factor=0)
    for factor in (0, 1.5):
        with pytest.raises(ConfigError, match=f"reduce_n_factor must .* got {factor}"):
            model(reduce_n_factor=factor)
    with pytest.raises(ConfigError, match=r"no field 'coef_topks'\. Did you mean 'coef_topk'\?"):
        model(sparsity={"coef_topks": 1})
    with pytest.raises(ConfigError, match="keep_rate as the argument attn_keep_rate"):
        model(sparsity={"keep_rate": 0.5})
    with pytest.raises(ConfigError, match="must be a dictionary of coef_topk"):
        model(sparsity=["coef_topk"])
    for name in ("attn_layer", "block_fn"):
        part = {"attn_layer": "diff", "block_fn": ParallelThingsBlock}[name]
        if name not in inspect.signature(timm.models.VisionTransformer).parameters:
            continue  # an older timm
        with pytest.raises(ConfigError, match="leave attn_layer and block_fn out"):
            model(**{name: part})
    for places in (0, ["0"], "01"):
        with pytest.raises(ConfigError, match="must be a list of rising block numbers"):
            model(token_pruning_loc=places, token_keep_rate=0.5)
    with pytest.raises(BudgetError, match="score_threshold"):
        model(score_threshold=-1.0)
    with pytest.raises(ConfigError, match="its own mask"):
        model().forward_features(images(), is_causal=True)
    assert issubclass(Sparsifiner, timm.models.VisionTransformer)


def test_registers_see_everything_and_average_pooling_works() -> None:
    net = model(reg_tokens=2, global_pool="avg", attn_keep_rate=0.3)
    stir(net)
    assert net.predictors[0].num_prefix == 3
    with torch.no_grad():
        assert net(images()).shape == (2, 5)
        mask = _as_mask(net.predictors[0].select(*net.predictors[0](
            torch.randn(1, 2, 19, 16), torch.randn(1, 2, 19, 16))), 19, 3)  # fmt: skip
    assert mask[:, :, :3].all()
    assert mask[:, :, 3:].sum(-1).unique().tolist() == [6]
