# SPDX-License-Identifier: Apache-2.0
"""Sparsifiner (arXiv 2303.13755): DeiT whose attention sees only keys predicted per image.

State-dict names are DeiT's in timm, plus ``blocks.i.attn.mask_predictor.*`` as in
lim142857/Sparsifiner at 9a11e26, ``src/models/sparsifiner.py``. No checkpoint is published:
``pretrained=True`` loads the dense DeiT that training starts from, and the predictors keep their
initial values (see ``sparsifiner_training`` for the two stages).

Where it differs from that code: attention is really sparse at inference, there it is dense and
masked; tokens that token pruning drops leave the sequence, there they stay as zeros, which every
class-token row goes on attending to; other image sizes through :meth:`Sparsifiner.set_input_size`,
which resamples the predictors' matrices over the grid like a position embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import Tensor, nn

from visprune import ops
from visprune.backbones.vit.refusals import refuse_mask
from visprune.backbones.vit.sparsifiner_attention import (
    AttentionOutput,
    ConnectivityPredictor,
    SparsifinerAttention,
)
from visprune.backbones.vit.sparsifiner_options import (
    default_rank,
    make_rule,
    refuse_options,
    refuse_parts,
)
from visprune.errors import BudgetError, ConfigError

__all__ = ["Sparsifiner"]  # register_model appends the names of the models


@dataclass
class SparsifinerOutput:
    """What training reads of a forward.

    Attributes:
        logits: [B, classes].
        tokens: normalised patch tokens [B, N', C].
        kept: original position of each of them, int64 [B, N'], patches counted from 0; None: all.
        predicted: per layer, reconstructed attention [B, H, N - prefix, N]; empty but in the
            first stage.
    """

    logits: Tensor
    tokens: Tensor
    kept: Tensor | None
    predicted: list[Tensor]


class _Run(NamedTuple):
    x: Tensor  # [B, N', C], before the final norm
    kept: Tensor | None  # [B, N'], prefix included
    taken: list[tuple[Tensor, Tensor | None]]
    predicted: list[Tensor]


class Sparsifiner(VisionTransformer):
    """A timm ``VisionTransformer`` with predicted sparse attention.

    The mask is a constant, as published, so a loss on the output gives the predictors no gradient:
    ``sparsifiner_training.stage_parameters`` says what each stage trains, also to DDP.

    Args:
        args: of ``VisionTransformer``.
        attn_keep_rate: share of the keys that a query keeps.
        score_threshold: keep keys by this score instead; see :class:`Sparsity`.
        reduce_n_factor: tokens per rank of the predictor (6 in the official configuration, 8 in
            its constructor).
        rank: the rank itself, instead of ``reduce_n_factor``.
        reduce_c_factor: head dimension over the predictor's.
        share_inout_proj: one matrix for both ends of the predictor.
        sparsity: further fields of :class:`Sparsity`.
        token_pruning_loc: blocks (counted from 0) after which patches are dropped by the class
            token's attention.
        token_keep_rate: share r of the patches kept there: r, r^2, ... of all.
        kwargs: of ``VisionTransformer``.

    Raises:
        BudgetError: a rate is out of range.
        ConfigError: another value is not allowed, or an option of ``VisionTransformer`` that fixed
            predictors of plain attention cannot follow.
    """

    def __init__(
        self,
        *args: Any,
        attn_keep_rate: float = 0.25,
        score_threshold: float | None = None,
        reduce_n_factor: int = 6,
        rank: int | None = None,
        reduce_c_factor: int = 2,
        share_inout_proj: bool = False,
        sparsity: dict[str, Any] | None = None,
        token_pruning_loc: Sequence[int] = (),
        token_keep_rate: float = 1.0,
        **kwargs: Any,
    ) -> None:
        refuse_options(kwargs)
        rule = make_rule(attn_keep_rate, score_threshold, sparsity)
        super().__init__(*args, **kwargs)
        refuse_parts(self.blocks)
        tokens = self.patch_embed.num_patches + self.num_prefix_tokens
        predictor = {
            "num_tokens": tokens,
            "num_prefix": self.num_prefix_tokens,
            "rank": default_rank(tokens, reduce_n_factor) if rank is None else rank,
            "reduce_c_factor": reduce_c_factor,
            "share_inout_proj": share_inout_proj,
            "sparsity": rule,
        }
        for block in self.blocks:
            block.attn = _replacement(block.attn, predictor)
        self._set_token_pruning(token_pruning_loc, token_keep_rate)

    def _set_token_pruning(self, places: Sequence[int], rate: float) -> None:
        if not 0 < rate <= 1:
            raise BudgetError(f"Sparsifiner: token_keep_rate must be in (0, 1]; got {rate}.")
        listed = isinstance(places, Sequence) and all(isinstance(i, int) for i in places)
        wrong = not listed or any(not 0 <= i < len(self.blocks) for i in places)
        if wrong or sorted(set(places)) != list(places):
            raise ConfigError(
                f"Sparsifiner: token_pruning_loc must be a list of rising block numbers in "
                f"0..{len(self.blocks) - 1}; got {places!r}."
            )
        if places and not self.has_class_token:
            raise ConfigError("Sparsifiner: token pruning ranks patches by the class token's "
                              "attention; this model has no class token.")  # fmt: skip
        self.token_keep_rate = rate
        self.token_pruning_loc = tuple(places) if rate < 1 else ()

    def token_budgets(self) -> dict[int, int]:
        """Patches left after each pruning block."""
        patches = self.patch_embed.num_patches
        return {
            block: math.ceil(self.token_keep_rate ** (i + 1) * patches)
            for i, block in enumerate(self.token_pruning_loc)
        }

    @property
    def predictors(self) -> list[ConnectivityPredictor]:
        """The predictor of every block."""
        blocks: Any = self.blocks
        return [block.attn.mask_predictor for block in blocks]

    def _block(
        self, index: int, x: Tensor, kept: Tensor | None, reconstruct: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One block, and the pruning after it: tokens, their positions, reconstruction."""
        block: Any = self.blocks[index]
        budget = None if reconstruct else self.token_budgets().get(index)
        y = block.norm1(x)
        if kept is None and budget is None and not reconstruct:
            got = AttentionOutput(block.attn(y))  # as a module, which torch.fx need not look into
        else:
            got = block.attn.full(y, kept, reconstruct, class_scores=budget is not None)
        x = x + block.drop_path1(block.ls1(got.x))
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        if budget is None or got.class_scores is None:
            return x, kept, got.predicted
        best = got.class_scores.sort(dim=-1, descending=True, stable=True).indices[:, :budget]
        first = self.num_prefix_tokens
        prefix = torch.arange(first, device=x.device).expand(len(x), first)
        index_of = torch.cat((prefix, best.sort(-1).values + first), 1)
        kept = index_of if kept is None else kept.gather(1, index_of)
        return ops.gather_tokens(x, index_of), kept, got.predicted

    def _run(self, x: Tensor, take: Sequence[int] = (), last: int = -1,
             reconstruct: bool = False) -> _Run:  # fmt: skip
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        run = _Run(x, None, [], [])
        count = len(self.blocks) if last < 0 else last + 1
        for i in range(count):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                got = checkpoint(self._block, i, run.x, run.kept, reconstruct)
            else:
                got = self._block(i, run.x, run.kept, reconstruct)
            run = _Run(got[0], got[1], run.taken, run.predicted)
            if got[2] is not None:
                run.predicted.append(got[2])
            if i in take:
                run.taken.append((run.x, run.kept))
        return run

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Images -> normalised tokens [B, N', C]; N' is smaller after token pruning."""
        refuse_mask(attn_mask, is_causal)
        return self.norm(self._run(x).x)

    def forward_train(self, x: Tensor, reconstruct: bool = False) -> SparsifinerOutput:
        """Forward with what the losses of ``sparsifiner_training`` read.

        Args:
            x: images [B, 3, H, W].
            reconstruct: the first stage: dense attention, no token pruning, and the predicted
                attention of every layer.
        """
        run = self._run(x, reconstruct=reconstruct)
        features = self.norm(run.x)
        first = self.num_prefix_tokens
        kept = None if run.kept is None else run.kept[:, first:] - first
        return SparsifinerOutput(
            self.forward_head(features), features[:, first:], kept, run.predicted
        )

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Intermediates as timm's; patches that were dropped are zeros in the maps.

        Args:
            x: images [B, 3, H, W].
            indices: the last n blocks if an int, all if None.
            return_prefix_tokens: give (map, prefix tokens) per block.
            norm: apply the final norm.
            stop_early: leave out the blocks after the last one asked for.
            output_fmt: ``"NCHW"`` or ``"NLC"``.
            intermediates_only: return the list alone.
            output_dict: return a dictionary: ``image_intermediates``, with
                ``return_prefix_tokens`` also ``image_intermediates_prefix``, and unless
                ``intermediates_only`` the final ``image_features``.
            attn_mask: None; the mask is predicted.
            is_causal: False.

        Raises:
            ConfigError: an unknown ``output_fmt``, or a mask.
        """
        refuse_mask(attn_mask, is_causal)
        fmt = str(getattr(output_fmt, "value", output_fmt))
        if fmt not in ("NCHW", "NLC"):
            raise ConfigError(f"output_fmt must be 'NCHW' or 'NLC'; got {output_fmt!r}.")
        take, last = feature_take_indices(len(self.blocks), indices)
        grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        run = self._run(x, take, last if stop_early else -1)
        first, found, prefixes = self.num_prefix_tokens, [], []
        for tokens, kept in run.taken:
            tokens = self.norm(tokens) if norm else tokens
            patches = tokens[:, first:]
            if kept is not None:
                whole = patches.new_zeros(len(patches), grid[0] * grid[1], patches.shape[2])
                at = (kept[:, first:] - first)[..., None].expand_as(patches)
                patches = whole.scatter(1, at, patches)
            if fmt == "NCHW":
                patches = patches.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
            found.append(patches)
            prefixes.append(tokens[:, :first])
        with_prefix = return_prefix_tokens and first > 0  # as timm: where there are such tokens
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": found}
            result |= {"image_intermediates_prefix": prefixes} if with_prefix else {}
            return result if intermediates_only else {**result, "image_features": self.norm(run.x)}
        pairs = list(zip(found, prefixes, strict=True)) if with_prefix else found
        return pairs if intermediates_only else (self.norm(run.x), pairs)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Another image or patch size: position embedding and predictors are resampled."""
        before = self.patch_embed.grid_size
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        after, first = self.patch_embed.grid_size, self.num_prefix_tokens
        for predictor in self.predictors:
            for name in ("proj_n", "proj_back_n"):
                old = getattr(predictor, name, None)
                if old is not None and before != after:
                    new = resample_abs_pos_embed(
                        old.data[None], list(after), list(before), num_prefix_tokens=first
                    )
                    setattr(predictor, name, nn.Parameter(new[0], old.requires_grad))
            predictor.num_tokens = after[0] * after[1] + first


def _replacement(attn: Any, predictor: dict[str, Any]) -> SparsifinerAttention:
    """Sparse attention of the shape (and with the weights) of timm's."""
    like = attn.qkv.weight
    new = SparsifinerAttention(
        like.shape[1], attn.num_heads, predictor, attn.qkv.bias is not None,
        attn.attn_drop.p, attn.proj_drop.p, device=like.device, dtype=like.dtype,
    )  # fmt: skip
    new.qkv, new.proj = attn.qkv, attn.proj
    return new


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
    """Convert as timm does; predictors that the file lacks stay as they are, others resample.

    A dense DeiT is a valid file: training starts from it.
    """
    state_dict = {n.removeprefix("module."): v
                  for n, v in state_dict.get("model", state_dict).items()}  # fmt: skip
    found = vit_filter(state_dict, model)
    own = model.state_dict()
    first = model.num_prefix_tokens
    for name, value in own.items():
        if ".mask_predictor." not in name:
            continue
        given = found.setdefault(name, value)
        per_token = name.endswith("_n") and given.ndim == 2
        if per_token and given.shape != value.shape and given.shape[1] == value.shape[1]:
            grid = list(model.patch_embed.grid_size)
            found[name] = resample_abs_pos_embed(given[None], grid, num_prefix_tokens=first)[0]
    # A shared matrix is in the official file twice.
    return {n: v for n, v in found.items() if n in own or not n.endswith(".proj_back_n")}


def _cfg(start: str, **kwargs: Any) -> dict[str, Any]:
    """``start``: the dense DeiT on the Hub that training starts from."""
    return {
        "hf_hub_id": f"timm/{start}",
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
        "license": "apache-2.0",
        "paper_ids": "arXiv:2303.13755",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        f"sparsifiner_deit_{size}.dense_start": _cfg(f"deit_{size}_patch16_224.fb_in1k")
        for size in ("tiny", "small", "base")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Sparsifiner:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        Sparsifiner,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{"patch_size": 16, "depth": 12, **kwargs},
    )


@register_model
def sparsifiner_deit_tiny(pretrained: bool = False, **kwargs: Any) -> Sparsifiner:
    """Sparsifiner on DeiT-Ti."""
    args = {"embed_dim": 192, "num_heads": 3, **kwargs}
    return _create("sparsifiner_deit_tiny", pretrained, **args)


@register_model
def sparsifiner_deit_small(pretrained: bool = False, **kwargs: Any) -> Sparsifiner:
    """Sparsifiner on DeiT-S."""
    args = {"embed_dim": 384, "num_heads": 6, **kwargs}
    return _create("sparsifiner_deit_small", pretrained, **args)


@register_model
def sparsifiner_deit_base(pretrained: bool = False, **kwargs: Any) -> Sparsifiner:
    """Sparsifiner on DeiT-B."""
    args = {"embed_dim": 768, "num_heads": 12, **kwargs}
    return _create("sparsifiner_deit_base", pretrained, **args)
