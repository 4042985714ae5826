# SPDX-License-Identifier: Apache-2.0
"""What the backbones of stages share: timm's surface over ``stem -> stages -> norm -> head``.

Inside, features are channels-last maps ``[B, H, W, C]``. The published LITv2 and NAT models put the
layer that halves the map at the *end* of a stage; the features of a stage are taken before it, so
that four stages give strides 4, 8, 16 and 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from visprune.errors import ConfigError

POOLS = ("avg", "max", "avgmax", "")


class ViTStage(nn.Module):
    """The blocks of one stage and the layer that halves the map after them.

    Args:
        blocks: modules from a map to a map of the same shape.
        downsample: [B, H, W, C] -> [B, H // 2, W // 2, 2 C], None for the last stage.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = nn.Identity() if downsample is None else downsample
        self.grad_checkpointing = False

    def features(self, x: Tensor) -> Tensor:
        """Run the blocks alone: the features of this stage."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def forward(self, x: Tensor) -> Tensor:
        """Blocks, then downsampling."""
        return self.downsample(self.features(x))


class StagedViT(nn.Module):
    """Base of LITv2 and NAT. A subclass calls :meth:`_finish` at the end of its ``__init__``.

    Attributes:
        stages_name: attribute that holds the stages, as in the published checkpoints.
        output_fmt: what ``forward_features`` returns, for timm.
        feature_info: channels and stride of each stage.
    """

    stages_name: ClassVar[str]
    patch_embed: Any
    in_chans: int
    output_fmt = "NHWC"

    def _finish(
        self,
        stages: Sequence[ViTStage],
        dims: Sequence[int],
        stride: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        dd: dict[str, Any],
    ) -> None:
        """Set stages, norm and head, then initialise as the official code does."""
        self.num_classes = num_classes
        self.global_pool = checked_pool(global_pool)
        self.num_features = self.head_hidden_size = dims[-1]
        self.embed_dim = dims[0]
        setattr(self, self.stages_name, nn.Sequential(*stages))
        self.feature_info = [
            {"num_chs": dim, "reduction": stride * 2**i, "module": f"{self.stages_name}.{i}.blocks"}
            for i, dim in enumerate(dims)
        ]
        self.norm: nn.Module = nn.LayerNorm(dims[-1], **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._classifier(dd)
        self.init_weights()

    @property
    def stages(self) -> Any:
        """The stages, under whatever name they have."""
        return getattr(self, self.stages_name)

    def init_weights(self) -> None:
        """Initialise in place: truncated normal of 0.02 for linear layers, as both papers do."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            else:
                getattr(module, "init_own_weights", lambda: None)()

    def _check_input(self, x: Tensor) -> None:
        """Raise ``ConfigError`` where the model cannot take these images."""
        raise NotImplementedError  # pragma: no cover - abstract

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of the chosen stages, before each stage's downsampling.

        Args:
            x: images [B, 3, H, W].
            indices: the last n stages if an int, all if None.
            norm: apply the final norm to the last stage (it fits no other).
            stop_early: leave out the stages after the last one asked for.
            output_fmt: ``"NCHW"`` or ``"NHWC"`` for the intermediates.
            intermediates_only: return the list alone.

        Returns:
            (final features [B, H', W', C], list of maps), or the list.

        Raises:
            ConfigError: an unknown ``output_fmt``, or an image that the model cannot take.
        """
        if str(getattr(output_fmt, "value", output_fmt)) not in ("NCHW", "NHWC"):
            raise ConfigError(f"output_fmt must be 'NCHW' or 'NHWC'; got {output_fmt!r}.")
        channels_first = str(getattr(output_fmt, "value", output_fmt)) == "NCHW"
        take, last = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last + 1] if stop_early else self.stages
        self._check_input(x)
        x = self.forward_stem(x)
        found = []
        for i, stage in enumerate(stages):
            x = stage.features(x)
            if i in take:
                out = self.norm(x) if norm and i == len(self.stages) - 1 else x
                found.append(out.permute(0, 3, 1, 2).contiguous() if channels_first else out)
            if i < len(stages) - 1:
                x = stage.downsample(x)
        if intermediates_only:
            return found
        return (self.norm(x) if len(stages) == len(self.stages) else x), found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what is behind the last stage asked for; return the indices kept."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        setattr(self, self.stages_name, self.stages[: last + 1])
        if shortened:
            self.stages[-1].downsample = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def forward_stem(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, H', W', C]."""
        return self.patch_embed(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> normalised features [B, H', W', C] of the last stage."""
        self._check_input(x)
        return self.norm(self.stages(self.forward_stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool (``global_pool``) and classify; ``pre_logits`` stops before the linear layer."""
        x = self.head_drop(_pool(x, self.global_pool))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def _classifier(self, dd: dict[str, Any]) -> nn.Module:
        if self.num_classes <= 0:
            return nn.Identity()
        return nn.Linear(self.num_features, self.num_classes, **dd)

    def get_classifier(self) -> nn.Module:
        """The linear layer of the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; 0 classes leave the pooled (``""``: unpooled) features."""
        if global_pool is not None:
            self.global_pool = checked_pool(global_pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = self._classifier({"device": like.device, "dtype": like.dtype})
        self.head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from the input to the output, for layer-wise learning rates."""
        name = self.stages_name
        previous = (99999,)  # timm: counts with the group before it
        fine = [
            (rf"^{name}\.(\d+)\.downsample", previous),
            (rf"^{name}\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", previous),
        ]
        return {"stem": r"^patch_embed", "blocks": rf"^{name}\.(\d+)" if coarse else fine}

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed, besides those of one dimension."""
        return set()


def record_input_size(model: nn.Module, img_size: Any, patch_size: Any = None) -> None:
    """Tell timm of a new size, where it keeps such a record (1.0.31 does, 1.0.24 may not)."""
    try:
        from timm.models._input import update_model_input_size
    except ImportError:
        return
    update_model_input_size(model, img_size, patch_size=patch_size)


def checked_pool(global_pool: str) -> str:
    """The kind of pooling, if it is one."""
    if global_pool not in POOLS:
        raise ConfigError(f"global_pool must be one of {', '.join(map(repr, POOLS))}; "
                          f"got {global_pool!r}.")  # fmt: skip
    return global_pool


def _pool(x: Tensor, kind: str) -> Tensor:
    """[B, H, W, C] -> [B, C]; ``""`` leaves the map."""
    if kind == "avg":
        return x.mean((1, 2))
    if kind == "max":
        return x.amax((1, 2))
    if kind == "avgmax":
        return 0.5 * (x.amax((1, 2)) + x.mean((1, 2)))
    return x
