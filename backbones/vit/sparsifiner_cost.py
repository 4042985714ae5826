# SPDX-License-Identifier: Apache-2.0
"""What Sparsifiner saves, as its paper counts it, and as a share of the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.encoders.macs import counted_macs
from visprune.backbones.vit.sparsifiner import Sparsifiner
from visprune.errors import ConfigError


@dataclass(frozen=True)
class SparsifinerCost:
    """Multiply-adds of one image.

    The paper's "MHSA" is scores and weighted values, without the projections of queries, keys,
    values and outputs; the predictor's own work is on the sparse side.

    Attributes:
        dense_mhsa: scores and weighted values of dense attention, all layers.
        sparse_mhsa: the same of the kept pairs.
        predictor: the work of choosing them.
        dense_model: the whole dense model.
    """

    dense_mhsa: int
    sparse_mhsa: int
    predictor: int
    dense_model: int

    @property
    def mhsa_saved(self) -> float:
        """Share of attention saved, as the paper counts."""
        return 1 - (self.sparse_mhsa + self.predictor) / self.dense_mhsa

    @property
    def model_saved(self) -> float:
        """The same multiply-adds as a share of the whole model."""
        return (self.dense_mhsa - self.sparse_mhsa - self.predictor) / self.dense_model

    def __str__(self) -> str:
        return (
            f"MHSA {self.dense_mhsa / 1e6:.1f} -> "
            f"{(self.sparse_mhsa + self.predictor) / 1e6:.1f} MMACs ({self.mhsa_saved:.1%} saved, "
            f"predictor included): {self.model_saved:.1%} of the model's "
            f"{self.dense_model / 1e9:.2f} GMACs"
        )


def sparsifiner_cost(
    model: Sparsifiner, images: Tensor | None = None, basis_density: float | None = None
) -> SparsifinerCost:
    """Count one image, without token pruning.

    The predicted scores are priced as the paper prices them: only non-zero coefficients times
    non-zero entries of the basis.

    Args:
        model: the model.
        images: [B, 3, H, W] to measure the kept pairs on. Without them they are the budget's,
            which a model with ``score_threshold`` does not have.
        basis_density: share of the basis that is not zero; measured on the weights if None.

    Raises:
        ConfigError: a threshold model without images.
    """
    first = model.predictors[0]
    tokens, prefix = first.num_tokens, first.num_prefix
    block: Any = model.blocks[0]
    heads, dim = block.attn.num_heads, block.attn.head_dim
    pairs = _pairs(model, images)
    dense = 0.0
    sparse = 0.0
    predictor = 0.0
    for layer, module in enumerate(model.predictors):
        rows, rank, c = tokens - prefix, module.rank, module.proj_c_q.out_features
        density = basis_density
        if density is None:
            density = float((module.basis(None) > 0).float().mean())
        used = module.sparsity.coef_topk
        used = rank if used is None else min(used, rank)
        dense += 2 * heads * dim * tokens * tokens
        sparse += 2 * heads * dim * (pairs[layer] * rows + prefix * tokens)
        reduce = 2 * tokens * dim * c + tokens * c * rank
        predictor += heads * (reduce + rows * c * rank + rows * used * tokens * density)
    return SparsifinerCost(round(dense), round(sparse), round(predictor), _dense_model(model))


def measured_macs(model: Sparsifiner, images: Tensor) -> int:
    """Multiply-adds of one picture of the whole model, mean over pictures where they differ.

    A budget is the same for every picture: then this is
    :func:`visprune.backbones.encoders.macs.counted_macs`. Under ``score_threshold`` that count has
    room for every key, the most that attention can cost; here only the keys are counted that are
    kept on ``images``. Where attention is dense and masked (``sparse_inference = False``) all of
    them are.

    Args:
        model: the model; its token pruning counts.
        images: [B, 3, H, W], on the model's device.
    """
    most = counted_macs(model, (images.shape[1], images.shape[2], images.shape[3]))
    if model.predictors[0].sparsity.score_threshold is None:
        return most
    unseen: list[Tensor] = []  # (query, key) pairs per picture, times the multiply-adds of one

    def measure(module: Any, args: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> None:
        idx = module.select(*out, pruned=args[2] is not None)
        left = out[1].shape[-1] - (idx >= 0).sum(-1).double()
        unseen.append(2 * args[0].shape[-1] * left.sum((1, 2)).mean())

    blocks: Any = model.blocks
    handles = [
        block.attn.mask_predictor.register_forward_hook(measure)
        for block in blocks
        if block.attn.sparse_inference
    ]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return most - round(float(sum(unseen)))


def _pairs(model: Sparsifiner, images: Tensor | None) -> list[float]:
    """Keys per query in every layer: the budget, or measured on images."""
    if images is None:
        if model.predictors[0].sparsity.score_threshold is not None:
            raise ConfigError("A threshold keeps as many keys as the images ask for: give images "
                              "to sparsifiner_cost.")  # fmt: skip
        return [float(p.budget(p.num_tokens)) for p in model.predictors]
    found: list[float] = []

    def measure(module: Any, args: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> None:
        found.append(float((module.select(*out) >= 0).sum(-1).float().mean()))

    handles = [p.register_forward_hook(measure) for p in model.predictors]
    places, model.token_pruning_loc = model.token_pruning_loc, ()
    try:
        with torch.no_grad():
            model(images)
    finally:
        model.token_pruning_loc = places
        for handle in handles:
            handle.remove()
    return found


def _dense_model(model: Sparsifiner) -> int:
    """Multiply-adds of the ViT itself with dense attention (patches, blocks, head)."""
    tokens, dim = model.predictors[0].num_tokens, model.embed_dim
    patch = model.patch_embed.proj.weight.numel() * model.patch_embed.num_patches
    total = patch + model.num_classes * dim
    blocks: Any = model.blocks
    for block in blocks:
        hidden = block.mlp.fc1.out_features
        total += tokens * dim * (4 * dim + 2 * hidden) + 2 * tokens * tokens * dim
    return int(total)
