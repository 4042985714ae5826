# SPDX-License-Identifier: Apache-2.0
"""HiLo and neighborhood attention put into ViTs of timm."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import visprune
from tests.vit.shrunk import images, stir
from visprune.backbones.vit import AgentAttention, with_attention
from visprune.backbones.vit.with_attention_contmix import GridContMix
from visprune.errors import ConfigError, UnsupportedModel

# One per way in which timm's plain ViTs differ.
VITS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "distillation token": ("deit_tiny_distilled_patch16_224", {}),
    "layer scale, class apart from positions": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}),
    "average pooling, no prefix": ("vit_base_patch16_siglip_gap_224", {}),
    "map pooling": ("vit_base_patch16_siglip_224", {}),
    "query and key norms": ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True}),
    "parallel blocks": ("vit_small_patch16_18x2_224", {}),
    "rotary": ("eva02_tiny_patch14_224", {"patch_size": 16}),
    "rotary, registers": ("vit_small_patch16_dinov3", {}),
}
HILO = [n for n in VITS if "rotary" not in n]  # whose attention HiLo and agents take over
KINDS: dict[str, dict[str, Any]] = {
    "agent": {"agent_num": 4},
    "contmix": {"kernel_size": 3, "small_kernel_size": 2},
    "hilo": {},
    "neighborhood": {"rel_pos_bias": True, "kernel_size": 3},
}
# Of the last block, which is read at the class token alone.
UNUSED = {
    "agent": ["na_bias", "ha_bias", "wa_bias", "dwc.weight", "dwc.bias"],
    "contmix": ["weight_proj.weight", "weight_proj.bias", "rpb1", "rpb2"],
    "hilo": [],
    "neighborhood": ["rpb"],
}


def build(which: str, **kwargs: Any) -> Any:
    name, extra = VITS[which]
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 5}
    model = timm.create_model(name, **{**sizes, **extra, **kwargs})
    stir(model)
    with torch.no_grad():
        for module in model.modules():  # attention sharp enough that its pattern matters
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=1.5 * module.in_features**-0.5)
    return model.eval()


@pytest.mark.parametrize("which", VITS)
def test_a_window_as_large_as_the_grid_is_the_model(which: str) -> None:
    model, x = build(which), images()
    names = set(model.state_dict())
    with torch.no_grad():
        want = model(x)
        assert with_attention(model, "neighborhood", kernel_size=4) is model
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
        assert set(model.state_dict()) == names
        whole = with_attention(build(which), "neighborhood", kernel_size=9)
        torch.testing.assert_close(whole(x), want, rtol=1e-4, atol=1e-4)
        near = with_attention(build(which), "neighborhood", kernel_size=2)
        assert not torch.allclose(near(x), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("which", HILO)
def test_hilo_of_window_one_is_the_model(which: str) -> None:
    model, x = build(which), images()
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(
            with_attention(model, "hilo", window_size=1)(x), want, rtol=1e-4, atol=1e-4
        )
        two = with_attention(build(which), "hilo", window_size=2, alpha=0.5)
        assert two(x).shape == want.shape
        assert not torch.allclose(two(x), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("norms", [True, False])
def test_hilo_of_one_window_is_the_model(norms: bool) -> None:
    # All heads high, all patches in one window: queries, keys and outputs under their norms.
    plain = {"class_token": False, "global_pool": "avg", "qk_norm": norms, "scale_attn_norm": norms}
    model, x = build("query and key norms", **plain), images()
    fresh = with_attention(build("query and key norms", **plain), "hilo", copy_weights=False)
    with torch.no_grad():
        want = model(x)
        with_attention(model, "hilo", window_size=4, alpha=0.0)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
        assert fresh(x).shape == want.shape
    norm = {n for n, _ in fresh.blocks[0].attn.named_parameters() if "norm" in n}
    assert len(norm) == 6 * norms
    assert all(fresh.blocks[0].attn.get_parameter(n).std() == 0 for n in norm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["query and key norms", "registers"])
def test_autocast(kind: str, which: str) -> None:
    model, x = with_attention(build(which), kind, **KINDS[kind]), images()
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    assert (got.float() - want).norm() < 0.05 * want.norm()
    got.float().sum().backward()


def dense(attn: Any, x: Tensor, seen: Tensor) -> Tensor:
    """timm's attention under a mask [N, N], with its own projections."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q @ k.transpose(-1, -2) * attn.scale).masked_fill(~seen, -torch.inf)
    return attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("which", ["class token", "registers", "average pooling, no prefix"])
def test_patches_see_their_neighbours_and_the_prefix(which: str) -> None:
    model = build(which)
    attn = copy.deepcopy(model.blocks[0].attn)
    first = model.num_prefix_tokens
    with_attention(model, "neighborhood", kernel_size=3)
    with torch.no_grad():
        model(images())  # the grid is known from here on
        x = torch.randn(2, first + 16, 32)
        seen = torch.ones(first + 16, first + 16, dtype=torch.bool)
        for i in range(16):
            row, column = (min(max(p, 1), 2) for p in (i // 4, i % 4))
            near = [
                r * 4 + c
                for r in range(row - 1, row + 2)
                for c in range(column - 1, column + 2)
            ]  # fmt: skip
            seen[first + i, first:] = False
            seen[first + i, [first + n for n in near]] = True
        torch.testing.assert_close(
            model.blocks[0].attn(x), dense(attn, x, seen), rtol=1e-4, atol=1e-5
        )


def test_hilo_with_prefix_tokens_by_hand() -> None:
    model = with_attention(build("registers"), "hilo", window_size=2, alpha=0.5)
    attn, first = model.blocks[0].attn, 5
    with torch.no_grad():
        model(images())
        x = torch.randn(2, first + 16, 32)
        pooled = x[:, first:].view(2, 2, 2, 2, 2, 32).mean((2, 4)).flatten(1, 2)
        q = attn.l_q(x)
        k, v = attn.l_kv(torch.cat((x[:, :first], pooled), 1)).chunk(2, -1)
        low = attn.l_proj((q @ k.transpose(1, 2) / 4).softmax(-1) @ v)
        q, k, v = attn.h_qkv(x).chunk(3, -1)
        window = torch.full((first + 16,), -1)
        for i in range(16):
            window[first + i] = (i // 8) * 2 + (i % 4) // 2
        same = window[:, None] == window
        scores = (q @ k.transpose(1, 2) / 4).masked_fill(~same, -torch.inf)
        high = attn.h_proj(scores.softmax(-1) @ v)
        torch.testing.assert_close(attn(x), torch.cat((high, low), -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", HILO)
def test_agents_by_hand(which: str) -> None:
    model = build(which)
    plain = copy.deepcopy(model.blocks[0])
    with_attention(model, "agent", agent_num=4)
    attns = [m for m in model.blocks[0].modules() if isinstance(m, AgentAttention)]
    assert len(attns) == sum(isinstance(m, timm.layers.Attention) for m in plain.modules())
    attn, first = attns[0], model.num_prefix_tokens
    with torch.no_grad():
        model(images())
        x = torch.randn(2, first + 16, 32)
        qkv = attn.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        q, k, v = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
        quarters = q[:, :, first:].unflatten(2, (2, 2, 2, 2)).mean((3, 5))  # 2 x 2 patches each
        agents = quarters.flatten(2, 3)
        to_agents, from_agents = torch.zeros(1, 2, 4, first + 16), torch.zeros(1, 2, first + 16, 4)
        for n in range(first + 16):
            if n < first:
                to_agents[..., n] = attn.ac_bias[..., n]
                from_agents[..., n, :] = attn.ca_bias[..., n, :]
                continue
            i, j = divmod(n - first, 4)
            sizes = {"size": (4, 4), "mode": "bilinear", "align_corners": False}
            an, na = (nn.functional.interpolate(t, **sizes) for t in (attn.an_bias, attn.na_bias))
            to_agents[..., n] = an[:, :, i, j] + attn.ah_bias[..., i, 0] + attn.aw_bias[..., 0, j]
            from_agents[..., n, :] = (
                na[:, :, i, j] + attn.ha_bias[:, :, i, 0] + attn.wa_bias[:, :, 0, j]
            )
        seen = (agents @ k.mT / 4 + to_agents).softmax(-1) @ v
        out = ((q @ agents.mT / 4 + from_agents).softmax(-1) @ seen).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attn(x), attn.proj(attn.norm(out)), rtol=1e-4, atol=1e-5)
        # The convolution started at zero; with the identity in it, it adds the patches' values.
        attn.dwc.weight[:, :, 1, 1] = 1
        out[:, first:] += v.transpose(1, 2).flatten(2)[:, first:]
        torch.testing.assert_close(attn(x), attn.proj(attn.norm(out)), rtol=1e-4, atol=1e-5)


def places(i: int, side: int) -> list[int]:
    """The patches of a 4 x 4 grid in the window of one of them."""
    rows, columns = (
        range(first, first + side)
        for first in (min(max(p - side // 2, 0), 4 - side) for p in divmod(i, 4))
    )
    return [4 * r + c for r in rows for c in columns]


@pytest.mark.parametrize("which", HILO)
def test_context_mixing_by_hand(which: str) -> None:
    model = with_attention(build(which), "contmix", kernel_size=3, small_kernel_size=2)
    attn = next(m for m in model.modules() if isinstance(m, GridContMix))
    first = model.num_prefix_tokens
    with torch.no_grad():
        for parameter in (attn.weight_proj.weight, attn.weight_proj.bias, attn.rpb1, attn.rpb2):
            parameter.normal_()
        model(images())
        x = torch.randn(2, first + 16, 32)
        q, k, v = attn.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        q, k = attn.q_norm(q) / 4, attn.k_norm(k)
        pooled = nn.functional.adaptive_avg_pool2d(
            k[:, first:].flatten(2).unflatten(1, (4, 4)).permute(0, 3, 1, 2), 7
        )
        context = pooled.permute(0, 2, 3, 1).flatten(1, 2).unflatten(-1, (2, 16))
        whole = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1) @ v.transpose(1, 2)
        want = whole.transpose(1, 2).flatten(2)  # right for the prefix tokens
        for i in range(16):
            at = first + i
            affinity = torch.einsum("bgd,bpgd->bgp", q[:, at], context)
            logits = affinity @ attn.weight_proj.weight.flatten(1).t() + attn.weight_proj.bias
            for side, channels, rpb in (
                (2, slice(0, 16), attn.rpb1),
                (3, slice(16, 32), attn.rpb2),
            ):
                seen = places(i, side)
                part = logits[..., :4] if side == 2 else logits[..., 4:]
                bias = [rpb[:, j // 4 - i // 4 + side - 1, j % 4 - i % 4 + side - 1] for j in seen]
                part = part + torch.stack(bias, -1)
                tokens = [first + j for j in seen]
                if side == 3:  # the large kernel sees the prefix tokens too
                    scores = torch.einsum("bgd,bpgd->bgp", q[:, at], k[:, :first])
                    part, tokens = torch.cat((part, scores), -1), tokens + list(range(first))
                values = v.flatten(2)[:, tokens, channels].unflatten(-1, (2, 8))
                mixed = torch.einsum("bgp,bpgd->bgd", part.softmax(-1), values)
                want[:, at, channels] = mixed.flatten(1)
        torch.testing.assert_close(attn(x), attn.proj(attn.norm(want)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [3, 7])  # the second is larger than the grid
def test_context_mixing_of_one_patch_everywhere_is_that_patch(kernel: int) -> None:
    model = build("average pooling, no prefix")
    with_attention(model, "contmix", kernel_size=kernel, small_kernel_size=3)
    attn = model.blocks[0].attn
    with torch.no_grad():
        model(images(1, 64, 64))
        x = torch.randn(1, 1, 32).expand(1, 16, 32)
        want = attn.proj(attn.qkv(x)[..., 64:])
        torch.testing.assert_close(attn(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_compiles_copies_and_checkpoints(kind: str) -> None:
    options = KINDS[kind]
    model, x = with_attention(build("registers"), kind, **options), images()
    model(x).square().sum().backward()
    zero = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert set(zero) == {f"blocks.1.attn.{name}" for name in UNUSED[kind]}
    with torch.no_grad():
        want = model(x)
        assert torch.equal(copy.deepcopy(model)(x), want)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-5)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), want, rtol=1e-4, atol=1e-5)
        again = with_attention(build("registers"), kind, **options)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x), want)
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert [m.shape for m in maps] == [(2, 32, 4, 4)] * 2
    model.set_grad_checkpointing()
    model(x).sum().backward()
    model.set_input_size((96, 64))
    assert model(images(1, 96, 64)).shape == (1, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_change_from_call_to_call(kind: str) -> None:
    model = with_attention(build("class token", dynamic_img_size=True), kind, **KINDS[kind])
    with torch.no_grad():
        for height, width in ((64, 64), (96, 48), (48, 80), (64, 64)):
            assert model(images(1, height, width)).shape == (1, 5)
        a = model(images(1, 96, 48))
        model(images(1, 48, 96))
        assert torch.equal(model(images(1, 96, 48)), a)


def test_some_blocks_only_and_options_per_block() -> None:
    model = build("class token")
    plain = type(model.blocks[0].attn)
    with_attention(model, "neighborhood", blocks=[1], kernel_size=2, dilation=2)
    assert type(model.blocks[0].attn) is plain
    assert model.blocks[1].attn.dilation == (2, 2)
    with_attention(model, "hilo", blocks=[0])
    assert len(model.patch_embed._forward_hooks) == 1
    assert model.blocks[0].attn.grid is model.blocks[1].attn.grid
    with torch.no_grad():
        assert model(images()).shape == (2, 5)


def test_a_dilation_too_large_for_one_size_only() -> None:
    model = build("class token", dynamic_img_size=True)
    with_attention(model, "neighborhood", dilation=3)
    with torch.no_grad():
        assert model(images(1, 96, 96)).shape == (1, 5)
        with pytest.raises(ConfigError, match=r"half the grid of 4 x 6 .* got dilation \(3, 3\)"):
            model(images(1, 64, 96))


def test_bad_input() -> None:
    model = build("class token")
    with pytest.raises(ConfigError, match=r"Unknown attention 'hillo'. Did you mean 'hilo'\?"):
        with_attention(model, "hillo")
    with pytest.raises(ConfigError, match="no option 'window'"):
        with_attention(model, "hilo", window=2)
    with pytest.raises(ConfigError, match=r"blocks must be in 0\.\.1; got \[2\]"):
        with_attention(model, "hilo", blocks=[2])
    for blocks in (1, "01", [0.5]):
        with pytest.raises(ConfigError, match=r"blocks must be numbers of blocks, such as"):
            with_attention(model, "hilo", blocks=blocks)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="kernel_size must be at least 2"):
        with_attention(model, "neighborhood", kernel_size=1)
    with pytest.raises(ConfigError, match=r"stride in 1\.\.kernel_size; got \(7, 7\).*\(1, 9\)"):
        with_attention(model, "neighborhood", kernel_size=7, stride=(1, 9))
    for value in (2.5, (3, 3, 3), "7"):
        with pytest.raises(ConfigError, match="kernel_size must be one int or two"):
            with_attention(model, "neighborhood", kernel_size=value)
    with pytest.raises(ConfigError, match=r"half the grid of 4 x 4 .* \(2, 3\) with .* \(7, 7\)"):
        with_attention(model, "neighborhood", kernel_size=7, dilation=(2, 3))
    with pytest.raises(ConfigError, match="larger alpha"):
        with_attention(model, "hilo", alpha=0.1)
    with pytest.raises(UnsupportedModel, match="EvaAttention"):
        with_attention(build("rotary"), "hilo")
    with pytest.raises(UnsupportedModel, match=r"without rotary .* not EvaAttention"):
        with_attention(build("rotary"), "agent")
    with pytest.raises(ConfigError, match="square number such as 49; got 5"):
        with_attention(model, "agent", agent_num=5)
    with pytest.raises(UnsupportedModel, match=r"without gates, not EvaAttention"):
        with_attention(build("rotary"), "contmix")
    with pytest.raises(ConfigError, match="2 to kernel_size, both whole numbers; got 5 and 3"):
        with_attention(model, "contmix", kernel_size=3)
    with pytest.raises(UnsupportedModel, match="ResNet is none"):
        with_attention(timm.create_model("resnet18"), "hilo")
    fused = timm.create_model("vit_base_patch16_224", embed_dim=32, num_heads=2, depth=2)
    fused.blocks[1] = nn.Identity()
    with pytest.raises(UnsupportedModel, match=r"Block 1 \(Identity\) has no attention"):
        with_attention(fused, "neighborhood")
    assert not fused.patch_embed._forward_hooks, "a refusal leaves the model as it was"
    assert type(fused.blocks[0].attn).__name__ == "Attention"
    with_attention(model, "neighborhood")
    with pytest.raises(UnsupportedModel, match="was replaced before"):
        with_attention(model, "hilo")
    model(images())
    with pytest.raises(ConfigError, match=r"needs all tokens: 1 \+ 4 x 4; got 9"):
        model.blocks[0](torch.randn(1, 9, 32))
    with pytest.raises(ConfigError, match="its own pattern"):
        model.forward_features(images(), is_causal=True)


@pytest.mark.parametrize("kind", ["hilo", "neighborhood"])
@pytest.mark.parametrize("method", ["tome", "evit", "random", "dynamicvit"])
def test_a_pruned_model_is_refused(kind: str, method: str) -> None:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **args).eval()
    params = {"tome": {"r": 2}}.get(method, {"keep_ratio": 0.5})
    with visprune.prune(model, method, **params):
        before = [type(block.attn) for block in model.blocks]
        with pytest.raises(ConfigError, match=rf"pruned by '{method}'.*run.remove\(\) first"):
            with_attention(model, kind)
        assert [type(block.attn) for block in model.blocks] == before
        model(torch.randn(1, 3, 32, 32))
    with_attention(model, kind)
