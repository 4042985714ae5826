# SPDX-License-Identifier: Apache-2.0
"""timm's surface over backbones whose published names are flat: ``patch_embed1``, ``blocks1``, ...

Features are maps ``[B, C, H, W]``, in channels-last memory, which convolutions on a CPU are faster
in. A stage is one method, :meth:`FlatStages.run_stage`, from what the stage before it left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import checkpoint, register_notrace_function
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from visprune.backbones.vit.refusals import refuse_scripting
from visprune.backbones.vit.staged import checked_pool, record_input_size
from visprune.errors import ConfigError


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution as the matrix product that it is on a channels-last map.

    PyTorch's own takes a slow path on a CPU at batch 1.
    """

    def __init__(self, dim: int, out: int, bias: bool = True, **dd: Any) -> None:
        super().__init__(dim, out, 1, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, H, W]."""
        x = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return x.permute(0, 3, 1, 2)


class FlatStages(nn.Module):
    """Base of VAN and OverLoCK. A subclass sets what is declared here and calls ``_finish``.

    Attributes:
        stage_parts: of each stage, the names of its modules.
        title: name of the architecture, for errors.
        output_fmt: what ``forward_features`` returns, for timm.
        feature_info: channels, stride and last module of each stage.
    """

    __prepare_scriptable__ = refuse_scripting

    stage_parts: ClassVar[Sequence[tuple[str, ...]]]
    title: ClassVar[str]
    output_fmt = "NCHW"
    feature_info: list[dict[str, Any]]
    num_features: int
    head_hidden_size: int
    head: Any
    in_chans: int
    img_size: tuple[int, int]

    def _finish(
        self, dims: Sequence[int], num_classes: int, global_pool: str, drop_rate: float
    ) -> None:
        """Set what timm reads, then initialise as the official code does."""
        self.num_classes = num_classes
        self.global_pool = checked_pool(global_pool)
        self.embed_dim = dims[0]
        self.num_stages = len(dims)
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": self.stage_parts[i][-1]}
            for i, dim in enumerate(dims)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise in place, as the official code does."""
        raise NotImplementedError  # pragma: no cover - abstract

    def run_stage(self, index: int, state: Any) -> Any:
        """One stage: from what the stage before it left, an image at first."""
        raise NotImplementedError  # pragma: no cover - abstract

    def stage_map(self, state: Any) -> Tensor:
        """The features in what a stage left."""
        found: Tensor = state
        return found

    def final_map(self, state: Any) -> Tensor:
        """What ``forward_features`` returns of what the last stage left."""
        return self.stage_map(state)

    def run_block(self, block: nn.Module, *args: Tensor) -> Any:
        """One block, recomputed in the backward pass where that is switched on."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(block, *args)
        return block(*args)

    def run_blocks(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        """Blocks in order, from a map to a map."""
        for block in blocks:
            x = self.run_block(block, x)
        return x

    def _start(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans, self.title)
        return x.contiguous(memory_format=torch.channels_last)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> features [B, num_features, H', W'] of the last stage."""
        state: Any = self._start(x)
        for i in range(self.num_stages):
            state = self.run_stage(i, state)
        return self.final_map(state)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool (``global_pool``) and classify; ``pre_logits`` stops before the classifier."""
        x = self.head_drop(_pool(x, self.global_pool))
        return x if pre_logits else self._classify(x)

    def _classify(self, x: Tensor) -> Tensor:
        logits: Tensor = self.get_classifier()(x)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of the chosen stages, before the next stage halves them.

        Args:
            x: images [B, 3, H, W].
            indices: the last n stages if an int, all if None.
            norm: of no effect: no norm follows the last stage.
            stop_early: leave out the stages after the last one asked for.
            output_fmt: ``"NCHW"`` or ``"NHWC"`` for the intermediates.
            intermediates_only: return the list alone.

        Returns:
            (final features, list of maps), or the list; with ``stop_early`` the final features are
            those of the last stage that ran.

        Raises:
            ConfigError: an unknown ``output_fmt``, or an image that the model cannot take.
        """
        fmt = str(getattr(output_fmt, "value", output_fmt))
        if fmt not in ("NCHW", "NHWC"):
            raise ConfigError(f"output_fmt must be 'NCHW' or 'NHWC'; got {output_fmt!r}.")
        take, last = feature_take_indices(self.num_stages, indices)
        count = last + 1 if stop_early else self.num_stages
        state: Any = self._start(x)
        found = []
        for i in range(count):
            state = self.run_stage(i, state)
            if i in take:
                out = self.stage_map(state)
                found.append(out if fmt == "NCHW" else out.permute(0, 2, 3, 1))
        if intermediates_only:
            return found
        whole = count == len(self.stage_parts)
        return (self.final_map(state) if whole else self.stage_map(state)), found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what is behind the last stage asked for; return the indices kept."""
        take, last = feature_take_indices(self.num_stages, indices)
        shortened = last < len(self.stage_parts) - 1
        for parts in self.stage_parts[last + 1 :]:
            for part in parts:
                setattr(self, part, nn.Identity())
        self.num_stages = last + 1
        if prune_head or shortened:
            self._remove_head(last)
        return take

    def _remove_head(self, last: int) -> None:
        """Leave the features of a stage as they are."""
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        self.reset_classifier(0, "")

    def get_classifier(self) -> nn.Module:
        """The last layer of the head."""
        found: nn.Module = self.head
        return found

    def _set_classifier(self, layer: nn.Module) -> None:
        self.head = layer

    def _new_classifier(self, dd: dict[str, Any]) -> nn.Module:
        return nn.Linear(self.head_hidden_size, self.num_classes, **dd)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes leave the pooled (``""``: unpooled) features."""
        if global_pool is not None:
            self.global_pool = checked_pool(global_pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        dd = {"device": like.device, "dtype": like.dtype}
        layer = self._new_classifier(dd) if num_classes > 0 else nn.Identity()
        self._set_classifier(layer.train(self.training))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the nominal image size: no parameter depends on it."""
        if patch_size is not None and to_2tuple(patch_size) != (4, 4):
            raise ConfigError(f"{self.title}: the stem has a fixed stride of 4; "
                              f"got patch_size={patch_size}.")  # fmt: skip
        if img_size is not None:
            self.img_size = to_2tuple(img_size)
        record_input_size(self, self.img_size)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed, besides those of one dimension."""
        return set()


@torch.fx.wrap
@register_notrace_function
def check_images(x: Tensor, channels: int, title: str) -> None:
    """Raise ``ConfigError`` unless the model can take these images."""
    if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
        raise ConfigError(f"{title} takes images [B, {channels}, H, W]; got {list(x.shape)}.")


def _pool(x: Tensor, kind: str) -> Tensor:
    """[B, C, H, W] -> [B, C]; ``""`` leaves the map."""
    if kind == "avg":
        return x.mean((2, 3))
    if kind == "max":
        return x.amax((2, 3))
    if kind == "avgmax":
        return 0.5 * (x.amax((2, 3)) + x.mean((2, 3)))
    return x
