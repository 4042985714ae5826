# SPDX-License-Identifier: Apache-2.0
"""timm's manners: every registered name, small, through everything that timm asks of a model."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules, group_parameters
from timm.models._features import FeatureGetterNet
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from tests.vit.shrunk import (
    AGENT,
    DINAT,
    DISTINCT,
    NAMES,
    NAT,
    PLAIN,
    STAGED,
    VAN,
    build,
    images,
    small_kwargs,
)
from visprune.errors import ConfigError, UnsupportedModel

# For what takes seconds each.
FEW = ["litv2_s", "nat_small", "sparsifiner_deit_tiny", "agent_deit_tiny", "van_b0"]
FEW += ["overlock_xt"]
NODES = {
    "van_b0": "norm4",
    "overlock_xt": "head.2",
}  # the last node that fx shows, where it is not the norm


@pytest.mark.parametrize("name", NAMES)
def test_forward_features_and_head(name: str) -> None:
    model, x = build(name), images()
    with torch.no_grad():
        features = model.forward_features(x)
        logits = model(x)
        assert logits.shape == (2, 5)
        assert torch.isfinite(logits).all()
        assert torch.equal(logits, model.forward_head(features))
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.num_features) == (2, model.head_hidden_size)
        # One image's result does not depend on the other's.
        torch.testing.assert_close(model(x[1:]), logits[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_backward_reaches_every_parameter(name: str) -> None:
    model = build(name).train()
    model(images()).square().sum().backward()
    if name in AGENT:  # whose last agents tell the patches what the class token does not read
        model.forward_features(images()).square().sum().backward()
    # Sparsifiner's mask is a constant, as published: its predictors learn in a stage of their own.
    # The context's head of OverLoCK learns by forward_train.
    apart = (".mask_predictor.", "aux_head.")
    learned = {n: p for n, p in model.named_parameters() if not any(a in n for a in apart)}
    assert [n for n, p in learned.items() if p.grad is None] == []
    assert [n for n, p in learned.items() if not p.grad.any()] == []


@pytest.mark.parametrize("name", DISTINCT)
def test_checkpointing_recomputes_the_same_gradients(name: str) -> None:
    plain, x = build(name).train(), images()
    recomputed = copy.deepcopy(plain)
    recomputed.set_grad_checkpointing()
    for model in (plain, recomputed):
        model(x).square().sum().backward()
    assert recomputed.forward_features(x).grad_fn is not None
    for (n, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=n)


@pytest.mark.parametrize("name", STAGED)
def test_intermediates_are_the_stages(name: str) -> None:
    model, x = build(name), images()
    with torch.no_grad():
        final, found = model.forward_intermediates(x)
        assert torch.equal(final, model.forward_features(x))
        shapes = [tuple(f.shape[1:]) for f in found]
        assert shapes == [(16, 16, 16), (32, 8, 8), (64, 4, 4), (128, 2, 2)]
        assert [i["num_chs"] for i in model.feature_info] == [s[0] for s in shapes]
        assert [64 // i["reduction"] for i in model.feature_info] == [s[1] for s in shapes]
        last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        torch.testing.assert_close(last[0].permute(0, 2, 3, 1), final)
        early, two = model.forward_intermediates(
            x, indices=[0, 1], stop_early=True, output_fmt="NHWC"
        )
        assert torch.equal(two[1].permute(0, 3, 1, 2), found[1])
        assert torch.equal(early, two[1])


@pytest.mark.parametrize("name", [n for n in DISTINCT if n in STAGED])
def test_features_only_prunes_what_is_behind(name: str) -> None:
    torch.manual_seed(0)
    kwargs = {k: v for k, v in small_kwargs(name).items() if k != "num_classes"}
    net = timm.create_model(name, features_only=True, out_indices=(0, 2), **kwargs).eval()
    assert isinstance(net, FeatureGetterNet)
    with torch.no_grad():
        found = net(images())
    assert [tuple(f.shape) for f in found] == [(2, 16, 16, 16), (2, 64, 4, 4)]
    assert net.feature_info.channels() == [16, 64]
    assert net.feature_info.reduction() == [4, 16]
    assert len(net.model.stages) == 3
    assert not any("head" in n or n.startswith("norm.") for n, _ in net.model.named_parameters())
    whole = build(name, seed=0)
    whole.load_state_dict(net.model.state_dict(), strict=False)
    with torch.no_grad():
        want = whole.forward_intermediates(images(), indices=[0, 2], intermediates_only=True)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_classifier_is_replaced(name: str) -> None:
    model, x = build(name), images()
    cfg = model.pretrained_cfg
    assert f"{cfg['classifier']}.weight" in model.state_dict()
    assert f"{cfg['first_conv']}.weight" in model.state_dict()
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
        assert not any(n.startswith(cfg["classifier"]) for n in model.state_dict())
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        assert isinstance(model.get_classifier(), nn.Linear | nn.Conv2d)
        features = model.forward_features(x)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), features)


@pytest.mark.parametrize("name", [n for n in DISTINCT if n in STAGED])
def test_pooling(name: str) -> None:
    model, x = build(name, num_classes=0), images()
    with torch.no_grad():
        maps = model.forward_features(x).flatten(1, 2)
        for pool, want in {
            "avg": maps.mean(1),
            "max": maps.amax(1),
            "avgmax": 0.5 * (maps.mean(1) + maps.amax(1)),
        }.items():
            model.reset_classifier(0, pool)
            torch.testing.assert_close(model(x), want)
    with pytest.raises(ConfigError, match="global_pool"):
        model.reset_classifier(0, "token")


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.input_size[0] == 3
    assert cfg.pool_size == tuple(s // 32 for s in cfg.input_size[1:]) or name in PLAIN
    assert cfg.license
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", cfg.paper_ids)
    assert timm.is_model(name)
    without = name in ("litv2_s_384", "litv2_m_384", "van_b4", "van_b5", "van_b6", *PLAIN)
    assert bool(cfg.url or (name in VAN and cfg.hf_hub_id)) != without


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups_cover_the_model(name: str) -> None:
    model = build(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert set(groups) == {n for n, _ in model.named_parameters()}
    fine = group_parameters(model, model.group_matcher(), reverse=True)
    order = [n.split(".")[0] for n in sorted(fine, key=lambda n: fine[n])]
    assert order[0] in ("patch_embed", "patch_embed1", "cls_token", "pos_embed")
    assert order[-1] == "head"
    if name in NAT + DINAT:
        assert model.no_weight_decay() == {n for n in fine if n.endswith("rpb")} != set()


@pytest.mark.parametrize("name", [n for n in DISTINCT if n in STAGED])
def test_layers_are_ordered_from_input_to_output(name: str) -> None:
    model = build(name)
    group = group_parameters(model, model.group_matcher(), reverse=True)
    stages = model.stages_name

    def at(part: str) -> int:
        return next(g for n, g in group.items() if n.startswith(part))

    last = len(model.stages[0].blocks) - 1
    parts = ["patch_embed", f"{stages}.0.blocks.{last}", f"{stages}.0.downsample"]
    parts += [f"{stages}.1.blocks.0", f"{stages}.3.blocks.0", "head"]
    places = [at(part) for part in parts]
    assert places == sorted(places)
    assert places[1] == places[2], "what halves the map counts with the block before it"
    assert places[0] < places[1] < places[3] < places[4] <= places[5]


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip_through_a_file(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, x = build(name, seed=1), images()
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    kwargs = {**small_kwargs(name), "checkpoint_path": str(path)}
    again = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        assert torch.equal(model(x), again(x))


@pytest.mark.parametrize("name", DISTINCT)
def test_a_checkpoint_of_another_size_is_refused(name: str) -> None:
    model = build(name)
    wrong = {n: v[..., :-1] if n.startswith("patch_embed") and v.ndim else v
             for n, v in model.state_dict().items()}  # fmt: skip
    with pytest.raises(RuntimeError, match="size mismatch for patch_embed"):
        build(name).load_state_dict(wrong)


@pytest.mark.parametrize("name", DISTINCT)
def test_dtype_device_and_meta_initialisation(name: str) -> None:
    model = build(name, dtype=torch.bfloat16)
    floating = {v.dtype for v in model.state_dict().values() if v.is_floating_point()}
    assert floating == {torch.bfloat16}
    with torch.no_grad():
        low = model(images().bfloat16())
        assert low.dtype == torch.bfloat16
        high = copy.deepcopy(model).float()(images().bfloat16().float())
    assert (low.float() - high).norm() < 0.15 * high.norm()
    meta = timm.create_model(name, device="meta", **small_kwargs(name))
    assert all(p.is_meta for p in meta.parameters())
    filled = meta.to_empty(device="cpu")
    for parameter in filled.parameters():
        nn.init.constant_(parameter, torch.nan)
    filled.init_weights()
    left = {n for n, p in filled.named_parameters() if p.isnan().any()}
    assert all("proj" in n or "conv" in n or "reduction" in n or "norm_layer" in n for n in left)


@pytest.mark.parametrize("name", FEW)
def test_compiles_without_a_break(name: str) -> None:
    model, x = build(name), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()
    assert model.get_classifier().weight.grad is not None


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
def test_traces_with_a_free_batch(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        model(images())  # OverLoCK keeps biases per size, and makes them in its first forward
        traced = torch.jit.trace(model, images())  # which itself compares it
        torch.testing.assert_close(traced(images(5)), model(images(5)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "backend"), [("litv2_s", "eager"), ("nat_mini", "eager"), ("dinat_mini", "aot_eager")]
)
def test_graphs_do_not_grow_with_the_sizes(name: str, backend: str) -> None:
    """From a size on where PyTorch has no other convolution for small maps.

    Tracing sees the sizes; what a backend lowers may add a graph, and takes most of the time.
    """
    model = build(name)
    counter = CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for side in range(288, 480, 32):
            compiled(images(1, side, side + 32))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", FEW)
def test_exports(name: str) -> None:
    model, x = build(name), images()
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FEW)
def test_scripting_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"TorchScript cannot compile .* torch\.export"):
        torch.jit.script(build(name))


@pytest.mark.parametrize("name", DISTINCT)
def test_fx_traces_it_with_our_modules_as_leaves(name: str) -> None:
    leaves = {"leaf_modules": list(get_notrace_modules()),
              "autowrap_functions": list(get_notrace_functions())}  # fmt: skip
    model, x = build(name), images()
    last = get_graph_node_names(model, tracer_kwargs=leaves)[1][-1]
    traced = create_feature_extractor(model, [last], tracer_kwargs=leaves)
    with torch.no_grad():
        torch.testing.assert_close(traced(x)[last], model(x))


def test_a_traced_sparsifiner_refuses_masks() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, path: str) -> bool:
            return type(m) in get_notrace_modules() or super().is_leaf_module(m, path)

    model = build("sparsifiner_deit_tiny")
    tracer = Tracer(autowrap_functions=tuple(get_notrace_functions()))
    graph = torch.fx.GraphModule(model, tracer.trace(model))
    with torch.no_grad():
        torch.testing.assert_close(graph(images()), model(images()))
        with pytest.raises(ConfigError, match="its own mask"):
            graph(images(), attn_mask=torch.ones(1, 1))


@pytest.mark.parametrize("name", [n for n in FEW if n != "sparsifiner_deit_tiny"])
def test_feature_graph(name: str) -> None:
    from timm.models._features_fx import GraphExtractNet

    model = build(name)
    with torch.no_grad():
        node = NODES.get(name, "norm")
        found = GraphExtractNet(model, return_nodes={node: "features"})(images())
        found = found.permute(0, 3, 1, 2) if name == "van_b0" else found
        torch.testing.assert_close(found, model.forward_features(images()))


@pytest.mark.parametrize("name", FEW)
def test_pickles_and_copies(name: str) -> None:
    model, x = build(name), images()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))
