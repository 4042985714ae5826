# SPDX-License-Identifier: Apache-2.0
"""Agent-DeiT (arXiv 2312.08874): DeiT with agent attention in all or in the first blocks.

State-dict names are DeiT's in timm, plus the agents' biases and convolution as in
LeapLabTHU/Agent-Attention at 207ce3e, ``agent_transformer/models/agent_deit.py``: the published
files load without renaming. The repository has no licence file, so what its files may be used for
is for its authors to say; no address of them stands here. ``pretrained_cfg_overlay={"file": PATH}``
loads one.

Beyond it: rectangles, ``dynamic_img_size``, several prefix tokens or none, and other image sizes
through :meth:`AgentViT.set_input_size`, which resamples the biases like the position embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import Tensor

from visprune.backbones.vit.agent import AgentAttention, resample_bias
from visprune.backbones.vit.with_attention_grid import Grid
from visprune.errors import ConfigError

__all__ = ["AgentViT"]  # register_model appends the names of the models

STAGE_OF = (0, 1, 2, 2, 2, 3)  # of every two blocks: which entry of agent_num they take


class AgentViT(VisionTransformer):
    """A timm ``VisionTransformer`` with agent attention.

    Args:
        args: of ``VisionTransformer``.
        agent_num: agents of the four parts of the depth: blocks 0 and 1, 2 and 3, 4 to 9, the rest.
        agent_layer: only this many blocks, counted from the first; all if 0 or less.
        kwargs: of ``VisionTransformer``.

    Raises:
        ConfigError: a number of agents is no square, or not four are given.
        UnsupportedModel: an option of ``VisionTransformer`` without plain attention.
    """

    def __init__(
        self,
        *args: Any,
        agent_num: Sequence[int] = (49, 49, 49, 49),
        agent_layer: int = -1,
        **kwargs: Any,
    ) -> None:
        if len(agent_num) != 4:
            raise ConfigError(f"Agent-DeiT: agent_num has one entry for each of the four parts of "
                              f"the depth; got {list(agent_num)}.")  # fmt: skip
        super().__init__(*args, **kwargs)
        self.grid = Grid(self.num_prefix_tokens, tuple(self.patch_embed.grid_size))
        blocks: Any = self.blocks
        for i, block in enumerate(blocks):
            if agent_layer <= 0 or i < agent_layer:
                count = agent_num[STAGE_OF[min(i // 2, len(STAGE_OF) - 1)]]
                block.attn = AgentAttention.like(block.attn, self.grid, self.grid.size, count)

    @property
    def agents(self) -> list[AgentAttention]:
        """The agent attentions, from the first block on."""
        return [m for m in self.modules() if isinstance(m, AgentAttention)]

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """Initialise in place, as timm does and the agents as published."""
        super().init_weights(*args, **kwargs)
        for attn in self.agents:
            attn.init_own_weights()

    def _pos_embed(self, x: Tensor) -> Tensor:
        if self.dynamic_img_size:  # the embedding has left the grid: [B, H, W, C]
            self.grid.size = (int(x.shape[1]), int(x.shape[2]))
        return super()._pos_embed(x)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Another image or patch size: position embedding and biases are resampled."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        height, width = self.patch_embed.grid_size
        self.grid.size = (height, width)
        for attn in self.agents:
            attn.set_window_size((height, width))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
    """Convert as timm does; biases of another grid are resampled.

    A dense DeiT is a valid file: what it lacks stays as it is.
    """
    state_dict = state_dict.get("model", state_dict)
    found = vit_filter({n.removeprefix("module."): v for n, v in state_dict.items()}, model)
    own = model.state_dict()
    for name, value in own.items():
        if name.endswith("_bias") or ".dwc." in name:
            given = found.get(name, value)
            rows = name.endswith(("ah_bias", "aw_bias", "ha_bias", "wa_bias"))
            found[name] = resample_bias(given, value.shape) if rows else given
    return found


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "none stated",
        "paper_ids": "arXiv:2312.08874",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "agent_deit_tiny.untrained": _cfg(),
        "agent_deit_small.untrained": _cfg(),
        "agent_deit_small_448.untrained": _cfg(input_size=(3, 448, 448), crop_pct=1.0),
        "agent_deit_base.untrained": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> AgentViT:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        AgentViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{"patch_size": 16, "depth": 12, **kwargs},
    )


TINY = {"embed_dim": 192, "num_heads": 3}
SMALL = {"embed_dim": 384, "num_heads": 6}
BASE = {"embed_dim": 768, "num_heads": 12, "agent_num": (81, 81, 81, 81), "agent_layer": 4}


@register_model
def agent_deit_tiny(pretrained: bool = False, **kwargs: Any) -> AgentViT:
    """Agent-DeiT-Ti: 6.0 M parameters, 1.17 GMACs at 224."""
    return _create("agent_deit_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def agent_deit_small(pretrained: bool = False, **kwargs: Any) -> AgentViT:
    """Agent-DeiT-S: 22.6 M parameters, 4.43 GMACs at 224."""
    return _create("agent_deit_small", pretrained, **{**SMALL, **kwargs})


@register_model
def agent_deit_small_448(pretrained: bool = False, **kwargs: Any) -> AgentViT:
    """Agent-DeiT-S at 448 pixels: 23.1 M parameters, 17.6 GMACs (DeiT-S: 22.6)."""
    return _create("agent_deit_small_448", pretrained, **{**SMALL, "img_size": 448, **kwargs})


@register_model
def agent_deit_base(pretrained: bool = False, **kwargs: Any) -> AgentViT:
    """Agent-DeiT-B: agents in the first four blocks; 87.2 M parameters, 17.5 GMACs at 224."""
    return _create("agent_deit_base", pretrained, **{**BASE, **kwargs})
