# SPDX-License-Identifier: Apache-2.0
"""timm's image towers of vision-language models: Qwen3's, DeepSeek's and Gemma 4's."""

from __future__ import annotations

import functools
import math
from typing import Any

from timm.layers import AttentionRope
from timm.models.deepseek_vit import DeepseekVitBlock
from timm.models.gemma4_vit import Gemma4Attention, Gemma4Block, apply_multidimensional_rope
from torch import Tensor, nn

from visprune.backbones.cost.matrices import matrix_weights
from visprune.backbones.encoders.base import (
    Hooks,
    Instead,
    Layer,
    Reduction,
    ShownQK,
    no_mask,
    refuse_proxy,
)
from visprune.backbones.encoders.macs import embedding_macs
from visprune.backbones.encoders.timm_eva import TimmEva
from visprune.errors import UnsupportedModel


class TimmTower(TimmEva):
    """Base of the three: rotary places, no class token, and a map of all patches behind the layers.

    What leaves the last layer has a value for every patch, since it becomes a map, or one token of
    each block of them: methods that leave patches without one are refused.

    Args:
        model: the encoder.
        outer: the classifier around it, or none.
    """

    gives_whole = True
    projector: str  # what makes one token of a block of patches

    def __init__(self, model: Any, outer: Any = None) -> None:
        self.model, self.outer, self.embed = model, outer, model.patch_embed
        self.prefix, self.has_cls = 0, False
        self.width = int(model.embed_dim)
        self.layers = [self._layer(number, block) for number, block in enumerate(model.blocks)]

    @property
    def lacking(self) -> dict[str, str]:
        """No dropping."""
        why = "a map of all patches, or one token of each block of them, is made of what comes out"
        return {**super().lacking, "dropping": why}

    def by_layout(self, number: int) -> bool:
        """Its stream lies feature by feature, and a mean may be taken of it as it is."""
        return True

    def fixed_macs(self, grid: tuple[int, ...], last: int) -> int:
        """Embedding, projector and classifier: of all patches."""
        tokens, projected = self._projected(grid)
        total = self._embedding_macs(grid) + projected
        if self.outer is not None:
            tokens = 1 if self.outer.global_pool == "avg" else tokens
            total += tokens * matrix_weights(self.outer.head)
        return total

    def _projected(self, grid: tuple[int, ...]) -> tuple[int, int]:
        """Tokens behind the projector, or behind the layers where there is none, and its cost."""
        projector = getattr(self.model, self.projector)
        if projector is None:
            return math.prod(grid), 0
        return self._blocks(grid), self._blocks(grid) * matrix_weights(projector)

    def _embedding_macs(self, grid: tuple[int, ...]) -> int:
        return embedding_macs(self.embed, grid)

    def _blocks(self, grid: tuple[int, ...]) -> int:
        """Tokens that the projector makes."""
        raise NotImplementedError  # pragma: no cover - abstract

    def overrides(self, reduction: Reduction) -> list[Any]:
        """Features on the whole grid."""
        model: Any = self.model
        dense = functools.partial(self._dense, model.forward_intermediates, reduction)
        return [Instead(model, "forward_intermediates", dense)]


class TimmQwen3(TimmTower):
    """Adapter of ``timm.models.qwen3_vit.Qwen3VitEncoder``."""

    family = "timm.Qwen3VitEncoder"
    projector = "merger"

    def _blocks(self, grid: tuple[int, ...]) -> int:
        return math.prod(grid) // int(self.model.merger.merge_size) ** 2


class TimmDeepseek(TimmTower):
    """Adapter of ``timm.models.deepseek_vit.DeepseekVitEncoder``."""

    family = "timm.DeepseekVitEncoder"
    projector = "aligner"

    def _layer(self, number: int, block: Any) -> Layer:
        if type(block) is not DeepseekVitBlock or type(block.attn) is not AttentionRope:
            raise self._unknown(number, block, getattr(block, "attn", None))
        return self._plain(block, "norm1")

    def _blocks(self, grid: tuple[int, ...]) -> int:
        step = int(self.model.aligner.downsample_ratio)
        return math.prod(-(-side // step) for side in grid)

    def inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor | None, at: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Rotary places; a block takes no mask, so the bias goes to the attention itself."""
        return super().inputs(args, kwargs, None, at)

    def overrides(self, reduction: Reduction) -> list[Any]:
        """The bias of each key, too."""
        handles = super().overrides(reduction)
        for layer in self.layers:
            forward = functools.partial(_with_bias, layer.attention, reduction)
            handles.append(Instead(layer.attention, "forward", forward))
        return handles


def _with_bias(attention: Any, reduction: Reduction, x: Tensor, rope: Any = None) -> Tensor:
    """In place of the attention's forward as the block calls it."""
    bias = reduction.key_bias()
    mask = None if bias is None else bias[:, None, None].to(x.dtype)
    return AttentionRope.forward(attention, x, rope=rope, attn_mask=mask)


class TimmGemma4(TimmTower):
    """Adapter of ``timm.models.gemma4_vit.Gemma4VitEncoder``, on pictures of one size."""

    family = "timm.Gemma4VitEncoder"

    def _layer(self, number: int, block: Any) -> Layer:
        attention = getattr(block, "attn", None)
        if type(block) is not Gemma4Block or type(attention) is not Gemma4Attention:
            raise self._unknown(number, block, attention)
        before = matrix_weights(attention)
        return Layer(
            block=block,
            attention=attention,
            entry=block.norm1,
            branch=block.drop_path,
            attention_weights=before,
            mlp_weights=matrix_weights(block) - before,
            attention_width=int(attention.num_heads * attention.head_dim),
            head_width=int(attention.head_dim),
        )

    def grid(self, pixels: Any) -> tuple[int, int]:
        """Patches along height and width.

        Raises:
            UnsupportedModel: patches are given in place of pictures.
        """
        refuse_proxy(pixels, self.model)
        if not isinstance(pixels, Tensor) or pixels.dim() != 4:
            raise UnsupportedModel(
                f"A reduced {type(self.model).__name__} takes pictures [B, C, H, W]; it was given "
                f"patches, of which some may be padding. Give pictures of one size, or remove the "
                f"run."
            )
        height, width = self.model.patch_size
        return int(pixels.shape[-2]) // height, int(pixels.shape[-1]) // width

    def default_grid(self) -> tuple[int, int]:
        """Of the size that its configuration names; its own default where it has none."""
        whole = self.model if self.outer is None else self.outer
        size = getattr(whole, "pretrained_cfg", {"input_size": (3, 768, 768)})["input_size"][-2:]
        height, width = self.model.patch_size
        return size[0] // height, size[1] // width

    def _embedding_macs(self, grid: tuple[int, ...]) -> int:
        """Its places are looked up by a product with a table, its angles by one with rates."""
        tokens = math.prod(grid)
        embed: Any = self.embed
        each: int = embed.input_proj.weight.numel() + embed.position_embedding_table.numel()
        return tokens * (each + 2 * self.model.rotary_emb.inv_freq.numel())

    def _projected(self, grid: tuple[int, ...]) -> tuple[int, int]:
        """The pooler is a product over all patches."""
        patches = math.prod(grid)
        if self.model.global_pool != "soft":
            return patches, 0
        tokens = patches // int(self.model.pooler.pooling_kernel_size) ** 2
        return tokens, tokens * patches * self.width

    def inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor | None, at: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cosines and sines of the tokens that are left, and the bias as a mask."""
        x, *tables = args[:3]
        no_mask(args[3] if len(args) > 3 else kwargs.get("attn_mask"), None)
        if at is not None:
            rows = at[..., None]
            tables = [table.gather(1, rows.expand(-1, -1, table.shape[-1])) for table in tables]
        mask = None if bias is None else bias[:, None, None].to(x.dtype)
        return (x, *tables), {"attn_mask": mask}

    def watch(self, number: int, record: ShownQK, *, every: bool = True) -> list[Any]:
        """The norms come before the rotation: it is applied to what they show."""
        return _TurnedTwice(self.layers[number].attention, record).install()


class _TurnedTwice(Hooks):
    """The hooks of :meth:`TimmGemma4.watch` on one attention module."""

    def __init__(self, attention: Any, record: ShownQK) -> None:
        super().__init__()
        self.attention, self.record = attention, record

    def install(self) -> list[Any]:
        """Put them on."""
        handle = self.attention.register_forward_pre_hook(self._before)
        return [handle, self.attention.q_norm.register_forward_hook(self._hold),
                self.attention.k_norm.register_forward_hook(self._show)]  # fmt: skip

    def _before(self, module: nn.Module, args: Any) -> None:
        self.call.held = list(args[1:3])

    def _hold(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.call.held = [*self.call.held, output]

    def _show(self, module: nn.Module, args: Any, output: Tensor) -> None:
        (cos, sin, query), self.call.held = self.call.held, []
        turned = (apply_multidimensional_rope(part, cos, sin) for part in (query, output))
        query, key = (part.transpose(1, 2) for part in turned)
        self.record(query, key, 1.0)
