# SPDX-License-Identifier: Apache-2.0
"""Agent attention (arXiv 2312.08874): attention through a few averages of the queries.

``agent_num`` agents, the queries averaged over a grid, attend to all keys; then every query attends
to the agents. Both scores carry a bias of positions: a 7 x 7 table resized to the grid, and one
number per row and per column. A depthwise convolution of the values is added to the patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.layers import Attention, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from visprune.backbones.vit.refusals import refuse_mask, refuse_scripting
from visprune.backbones.vit.with_attention_grid import Grid
from visprune.errors import ConfigError, UnsupportedModel

TABLE = 7  # side of the tables that are resized to the grid


@register_notrace_module
class AgentAttention(nn.Module):
    """Agent attention on tokens [B, N, C]: prefix tokens, then the patches of a grid, row by row.

    Parameters have the names of the published checkpoints (LeapLabTHU/Agent-Attention at 207ce3e,
    ``agent_transformer/models/agent_deit.py``). There the window is square and one class token
    stands before it; here any rectangle and any number of prefix tokens, which are averaged into no
    agent, are seen by all agents and see all agents, under one bias each (``ac_bias``,
    ``ca_bias``). On a grid other than ``window_size`` the biases are resampled.

    Args:
        dim: channels, divisible by ``num_heads``.
        num_heads: attention heads.
        window_size: (height, width) of the grid that the biases are made for.
        agent_num: agents, a square number.
        num_prefix_tokens: tokens before the patches.
        qkv_bias: whether queries, keys and values have a bias.
        attn_drop: dropout of both attentions.
        proj_drop: dropout of the output.
        grid: where the model notes the grid of the running call; ``window_size`` if None.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: ``dim`` is not divisible or ``agent_num`` no square.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, int] = (14, 14),
        agent_num: int = 49,
        num_prefix_tokens: int = 1,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        grid: Grid | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"AgentAttention: dim must be a multiple of num_heads; "
                              f"got dim={dim}, num_heads={num_heads}.")  # fmt: skip
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.attn_drop = nn.Dropout(attn_drop)
        self.grid = grid or Grid(num_prefix_tokens, window_size)
        self._add_agents(dim, agent_num, window_size, dd)
        self.init_own_weights()

    @classmethod
    def like(cls, attn: Any, grid: Grid, window: Sequence[int], agent_num: int = 49) -> Self:
        """Agents for the projections and norms of timm's ``attn``, on ``window`` patches."""
        gated = getattr(attn, "gate", None) is not None
        if not isinstance(attn, Attention) or gated:
            raise UnsupportedModel(
                f"Agents are averages of queries without rotary positions: of timm, agent "
                f"attention takes Attention without gates, not {type(attn).__name__}"
                f"{' with a gate' if gated else ''}. Neighborhood attention can."
            )
        if len(window) != 2:
            raise UnsupportedModel("Agent attention has biases for the rows and columns of one "
                                   "grid of patches; this model knows none.")  # fmt: skip
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.num_heads, new.scale = attn.num_heads, attn.scale
        for name in ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"):
            setattr(new, name, getattr(attn, name))
        like = attn.qkv.weight
        new.grid = grid
        dd = {"device": like.device, "dtype": like.dtype}
        new._add_agents(like.shape[0] // 3, agent_num, (window[0], window[1]), dd)
        new.init_own_weights()
        return new.train(attn.training)

    def _add_agents(
        self, dim: int, count: int, window: tuple[int, int], dd: dict[str, Any]
    ) -> None:
        """The convolution and the biases, for ``num_heads`` and ``grid``."""
        if not isinstance(count, int) or count < 1 or math.isqrt(count) ** 2 != count:
            raise ConfigError(
                f"Agent attention averages the queries over a square grid of agents: agent_num "
                f"must be a square number such as 49; got {count!r}."
            )
        self.agent_num = count
        height, width = self.window_size = (int(window[0]), int(window[1]))
        heads, prefix = self.num_heads, self.grid.num_prefix
        shapes = {
            "an_bias": (heads, count, TABLE, TABLE),
            "na_bias": (heads, count, TABLE, TABLE),
            "ah_bias": (1, heads, count, height, 1),
            "aw_bias": (1, heads, count, 1, width),
            "ha_bias": (1, heads, height, 1, count),
            "wa_bias": (1, heads, 1, width, count),
        }
        if prefix:
            shapes |= {"ac_bias": (1, heads, count, prefix), "ca_bias": (1, heads, prefix, count)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **dd)))
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def init_own_weights(self) -> None:
        """Truncated normal of 0.02 for the biases, as published."""
        self.dwc.reset_parameters()
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                trunc_normal_(parameter, std=0.02)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, C] -> the same."""
        refuse_mask(attn_mask, is_causal)
        size, first = self.grid.check(x), self.grid.num_prefix
        qkv = self.qkv(x)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q).type_as(v), self.k_norm(k).type_as(v)
        agents = self._agents(q[:, :, first:], size)
        to_agents, from_agents = self.biases(size)
        drop = self.attn_drop.p if self.training else 0.0
        attend = F.scaled_dot_product_attention
        seen = attend(agents, k, v, to_agents.type_as(v), drop, scale=self.scale)
        out = attend(q, agents, seen, from_agents.type_as(v), drop, scale=self.scale)
        out = out.transpose(1, 2).flatten(2)
        values = v[:, :, first:].transpose(1, 2).flatten(2).unflatten(1, size)
        local = self.dwc(values.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        out = torch.cat((out[:, :first], out[:, first:] + local), 1) if first else out + local
        return self.proj_drop(self.proj(self.norm(out)))

    def _agents(self, q: Tensor, size: tuple[int, int]) -> Tensor:
        """Queries of the patches [B, heads, H W, d], averaged: [B, heads, agents, d]."""
        # As a channels-last map, which pools fast and leaves heads that fused attention takes.
        side = math.isqrt(self.agent_num)
        maps = q.transpose(1, 2).flatten(2).unflatten(1, size).permute(0, 3, 1, 2)
        pooled = F.adaptive_avg_pool2d(maps, (side, side)).permute(0, 2, 3, 1).flatten(1, 2)
        return pooled.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def biases(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Biases of the two scores: [1, heads, agents, N] and [1, heads, N, agents]."""
        own: Any = self
        agents, (height, width) = (1, self.num_heads, self.agent_num), size
        to_agents = _resized(own.an_bias, size)
        to_agents = to_agents + resample_bias(own.ah_bias, (*agents, height, 1))
        to_agents = (to_agents + resample_bias(own.aw_bias, (*agents, 1, width))).flatten(3)
        from_agents = _resized(own.na_bias, size).movedim(2, -1)
        places = (1, self.num_heads)
        from_agents = from_agents + resample_bias(own.ha_bias, (*places, height, 1, self.agent_num))
        columns = resample_bias(own.wa_bias, (*places, 1, width, self.agent_num))
        from_agents = (from_agents + columns).flatten(2, 3)
        if not self.grid.num_prefix:
            return to_agents, from_agents
        return (
            torch.cat((own.ac_bias, to_agents), -1),
            torch.cat((own.ca_bias, from_agents), -2),
        )

    def set_window_size(self, size: tuple[int, int]) -> None:
        """Make the biases for another grid: those of rows and columns are resampled."""
        for name, axis, length in (
            ("ah_bias", 3, size[0]), ("aw_bias", 4, size[1]),
            ("ha_bias", 2, size[0]), ("wa_bias", 3, size[1]),
        ):  # fmt: skip
            old: Tensor = getattr(self, name)
            shape = (*old.shape[:axis], length, *old.shape[axis + 1 :])
            new = resample_bias(old.detach(), shape)
            if new.shape != old.shape:
                setattr(self, name, nn.Parameter(new, old.requires_grad))
        self.window_size = (int(size[0]), int(size[1]))

    def extra_repr(self) -> str:
        """Heads and agents, for ``print(model)``."""
        size = f"window_size={self.window_size}, agent_num={self.agent_num}"
        return f"num_heads={self.num_heads}, {size}"


def _resized(table: Tensor, size: tuple[int, int]) -> Tensor:
    """[heads, agents, 7, 7] -> [1, heads, agents, H, W]."""
    return F.interpolate(table, size, mode="bilinear", align_corners=False)[None]


def resample_bias(bias: Tensor, shape: Sequence[int]) -> Tensor:
    """A bias of rows or columns for another number of them; itself where nothing differs.

    Args:
        bias: of the published layout, [1, heads, agents, H, 1] or one like it.
        shape: the same but for one axis.
    """
    axes = [i for i, (a, b) in enumerate(zip(bias.shape, shape, strict=True)) if a != b]
    if not axes:
        return bias
    (axis,) = axes
    last = bias.movedim(axis, -1)
    flat = last.reshape(1, -1, bias.shape[axis])
    new = F.interpolate(flat, shape[axis], mode="linear", align_corners=False)
    return new.reshape(*last.shape[:-1], shape[axis]).movedim(-1, axis).contiguous()


@register_notrace_module
class GridAgentAttention(AgentAttention):
    """What ``with_attention`` puts in the place of timm's ``Attention``.

    Its convolution starts at zero: the start is agent attention with the model's projections.
    """

    def init_own_weights(self) -> None:
        """As published, but for the convolution."""
        super().init_own_weights()
        for parameter in self.dwc.parameters():
            nn.init.zeros_(parameter)

    def arguments(self) -> dict[str, Any]:
        """What :func:`with_attention` made this of, apart from the model."""
        return {"kind": "agent", "agent_num": self.agent_num}
