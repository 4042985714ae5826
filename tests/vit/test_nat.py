# SPDX-License-Identifier: Apache-2.0
"""``NeighborhoodAttention2d`` against a mask, and NAT against transformers' own DiNAT."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import DinatConfig
from transformers.models.dinat import modeling_dinat

from tests.vit.shrunk import build, images, small_kwargs, stir
from visprune import ops
from visprune.backbones.vit import NeighborhoodAttention2d
from visprune.errors import ConfigError


def start(i: int, length: int, kernel: int, dilation: int) -> range:
    """Keys of query ``i`` along one axis, from the definition in the paper."""
    group = range(i % dilation, length, dilation)
    place = min(max(i // dilation - kernel // 2, 0), len(group) - kernel)
    return group[place : place + kernel]


def by_hand(attn: NeighborhoodAttention2d, x: Tensor) -> Tensor:
    """Query by query, without any operator of ours; odd kernels, stride 1, not causal."""
    b, height, width, _ = x.shape
    (kh, kw), (dh, dw) = attn.kernel_size, attn.dilation
    pad_h, pad_w = max(0, kh * dh - height), max(0, kw * dw - width)
    x = nn.functional.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    q, k, v = attn.qkv(x).view(*x.shape[:3], 3, attn.num_heads, attn.head_dim).unbind(3)
    out = torch.zeros(b, height, width, attn.num_heads, attn.head_dim)
    for i in range(height):
        for j in range(width):
            rows, columns = start(i, x.shape[1], kh, dh), start(j, x.shape[2], kw, dw)
            keys = torch.stack([k[:, r, c] for r in rows for c in columns], 1)
            values = torch.stack([v[:, r, c] for r in rows for c in columns], 1)
            score = torch.einsum("bhd,bkhd->bhk", q[:, i, j], keys) * attn.head_dim**-0.5
            if attn.rpb is not None:
                at = [((r - i) // dh + kh - 1, (c - j) // dw + kw - 1)
                      for r in rows for c in columns]  # fmt: skip
                score = score + torch.stack([attn.rpb[:, y, z] for y, z in at], -1)
            out[:, i, j] = torch.einsum("bhk,bkhd->bhd", score.softmax(-1), values)
    return attn.proj(out.flatten(-2))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kernel", "dilation", "size"),
    [(3, 1, (5, 6)), ((5, 3), 1, (7, 5)), (3, 2, (7, 8)), (3, (1, 3), (4, 9)),
     (7, 1, (3, 10)), (3, 2, (2, 2))],
)  # fmt: skip
def test_equals_the_definition(kernel: Any, dilation: Any, size: Any, bias: bool) -> None:
    torch.manual_seed(0)
    attn = NeighborhoodAttention2d(12, 3, kernel, dilation, rel_pos_bias=bias)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    x = torch.randn(2, *size, 12, requires_grad=True)
    out, want = attn(x), by_hand(attn, x)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    inputs = [x, *attn.parameters()]
    weight = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, inputs, weight), torch.autograd.grad(want, inputs, weight),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_published_names() -> None:
    attn = NeighborhoodAttention2d(12, 3, 7)
    shapes = {name: tuple(p.shape) for name, p in attn.named_parameters()}
    assert shapes == {
        "qkv.weight": (36, 12),
        "qkv.bias": (36,),
        "rpb": (3, 13, 13),
        "proj.weight": (12, 12),
        "proj.bias": (12,),
    }


def test_dropout_of_weights_takes_the_unfused_pair() -> None:
    torch.manual_seed(0)
    attn = NeighborhoodAttention2d(12, 3, 3, attn_drop=0.5)
    x = torch.randn(4, 8, 8, 12)
    still = attn.eval()(x)
    attn.train()
    dropped = torch.stack([attn(x) for _ in range(400)])
    assert not torch.equal(dropped[0], dropped[1])
    assert (dropped.mean(0) - still).abs().mean() < 0.03 * dropped.std(0).mean() + 0.02
    attn.attn_drop.p = 1e-9  # drops nothing: the unfused pair equals the fused operator
    torch.testing.assert_close(attn(x), still, rtol=1e-4, atol=1e-5)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="multiple of num_heads"):
        NeighborhoodAttention2d(12, 5)
    with pytest.raises(ConfigError, match="kernel_size must be at least 2"):
        NeighborhoodAttention2d(12, 3, 1)
    with pytest.raises(ConfigError, match="dilation at least 1"):
        NeighborhoodAttention2d(12, 3, 3, dilation=0)
    with pytest.raises(ConfigError, match="stride"):
        NeighborhoodAttention2d(12, 3, 3, stride=4)
    with pytest.raises(ConfigError, match=r"maps \[B, H, W, 12\]"):
        NeighborhoodAttention2d(12, 3, 3)(torch.randn(1, 64, 12))


# --- transformers' DiNAT, an independent writing of the same network ------------------------------


@pytest.fixture
def natten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give transformers' DiNAT the attention that it wants of natten 0.14, through our operators.

    Its whole ``forward`` is replaced: transformers 5.23 hands natten [B, W, H, heads, d] where
    natten 0.14 takes [B, heads, H, W, d] (earlier releases permuted right).
    """

    def forward(self: Any, x: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
        heads = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (f(x).unflatten(-1, heads) for f in (self.query, self.key, self.value))
        scores = ops.na_qk(q, k, self.kernel_size, dilation=self.dilation, rpb=self.rpb)
        out = ops.na_av(scores.softmax(-1), v, self.kernel_size, dilation=self.dilation)
        return (out.flatten(-2),)

    monkeypatch.setattr(modeling_dinat, "requires_backends", lambda *_: None)
    monkeypatch.setattr(modeling_dinat.NeighborhoodAttention, "forward", forward)


@pytest.mark.usefixtures("natten")
@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_transformers_checkpoints_load_and_agree(scale: float) -> None:
    torch.manual_seed(0)
    dilations = [[1, 3], [1, 2], [1], [1]]
    kwargs = small_kwargs("dinat_mini")
    config = DinatConfig(
        embed_dim=kwargs["embed_dim"], depths=list(kwargs["depths"]),
        num_heads=list(kwargs["num_heads"]), kernel_size=3, dilations=dilations, mlp_ratio=3.0,
        layer_scale_init_value=scale, num_labels=5,
    )  # fmt: skip
    theirs = modeling_dinat.DinatForImageClassification(config).eval()
    stir(theirs)
    from visprune.backbones.vit.nat import checkpoint_filter_fn

    ours = timm.create_model(
        "dinat_mini", **kwargs, dilations=dilations, layer_scale=scale or None
    ).eval()
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))  # strict
    with torch.no_grad():
        for size in ((64, 64), (72, 96)):
            want = theirs(images(2, *size)).logits
            torch.testing.assert_close(ours(images(2, *size)), want, rtol=1e-4, atol=1e-5)


def test_biases_of_another_window_are_interpolated() -> None:
    from visprune.backbones.vit.nat import checkpoint_filter_fn

    model, wider = build("nat_mini"), build("nat_mini", kernel_size=5)
    converted = checkpoint_filter_fn(model.state_dict(), wider)
    wider.load_state_dict(converted)
    rpb = wider.levels[0].blocks[0].attn.rpb
    assert rpb.shape[1:] == (9, 9)
    centre = model.levels[0].blocks[0].attn.rpb[:, 2, 2]  # the offset zero stays the middle
    torch.testing.assert_close(rpb[:, 4, 4], centre, rtol=1e-4, atol=1e-5)


def test_official_checkpoints_keep_their_names() -> None:
    from visprune.backbones.vit.nat import checkpoint_filter_fn

    model = build("nat_small")
    wrapped = {"model": {f"module.{n}": v for n, v in model.state_dict().items()}}
    again = build("nat_small", seed=3)
    again.load_state_dict(checkpoint_filter_fn(wrapped, again))
    with torch.no_grad():
        assert torch.equal(model(images()), again(images()))
