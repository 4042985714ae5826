# SPDX-License-Identifier: Apache-2.0
"""Sparsifiner's predicted connectivity (arXiv 2303.13755) and the attention that obeys it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from visprune import ops
from visprune.backbones.vit.refusals import refuse_mask, refuse_scripting
from visprune.errors import BudgetError, ConfigError

MaskGradient = Literal["none", "straight_through"]


@dataclass(frozen=True)
class Sparsity:
    """What Sparsifiner keeps; the defaults are the official configuration.

    Attributes:
        keep_rate: share of the keys that a query keeps, ``ceil(keep_rate * tokens)`` of them.
        score_threshold: instead of ``keep_rate``, keep the keys whose predicted score is above it
            (officially 1e-4); rows then differ in length, and a row may be empty.
        coef_topk: coefficients kept per query; None takes ``coef_threshold`` instead.
        coef_threshold: coefficients at or below it are dropped (officially 0.05).
        basis_threshold: entries of the basis whose size is at or below it are dropped.
        mask_gradient: ``"none"``: the mask is a constant, as in the official code, so that
            classification teaches the predictor nothing. ``"straight_through"``: the mask's
            gradient goes to a sigmoid around the row's cut, in training.
        temperature: width of that sigmoid, in standard deviations of the row's scores.
    """

    keep_rate: float = 0.25
    score_threshold: float | None = None
    coef_topk: int | None = 8
    coef_threshold: float = 0.05
    basis_threshold: float = 0.02
    mask_gradient: MaskGradient = "none"
    temperature: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep_rate <= 1:
            raise BudgetError(f"Sparsifiner: keep_rate must be in (0, 1]; got {self.keep_rate}.")
        if self.score_threshold is not None and self.score_threshold < 0:
            raise BudgetError(f"Sparsifiner: score_threshold must not be negative; "
                              f"got {self.score_threshold}.")  # fmt: skip
        if self.coef_topk is not None and self.coef_topk < 1:
            raise BudgetError(f"Sparsifiner: coef_topk must be at least 1 or None; "
                              f"got {self.coef_topk}.")  # fmt: skip
        if self.mask_gradient not in ("none", "straight_through"):
            raise ConfigError(f"Sparsifiner: mask_gradient must be 'none' or 'straight_through'; "
                              f"got {self.mask_gradient!r}.")  # fmt: skip


class ConnectivityPredictor(nn.Module):
    """Low-rank guess of the attention matrix: which keys are worth a query's while.

    With c = head_dim / 2 and rank K: coefficients ``softmax(q' (k'^T W_down) / sqrt(H))`` over K,
    a basis ``W_up^T`` [K, N], scores = coefficients x basis. Parameter names are those of
    lim142857/Sparsifiner at 9a11e26, ``src/models/sparsifiner.py`` (``MaskPredictor``):
    ``proj_c_q``, ``proj_c_k`` (shared by the heads), ``proj_n`` = W_down, ``proj_back_n`` = W_up.

    As in that code, the scale is ``num_heads ** -0.5``, not that of the head dimension, and the
    basis is used by its absolute value, except for reconstruction.

    Args:
        num_tokens: N, prefix tokens included.
        num_prefix: class and register tokens; they query everything and get no row here.
        num_heads: H.
        head_dim: channels per head.
        rank: K.
        reduce_c_factor: head_dim / c.
        share_inout_proj: use one matrix for W_down and W_up.
        sparsity: see :class:`Sparsity`.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_tokens: int,
        num_prefix: int,
        num_heads: int,
        head_dim: int,
        rank: int,
        reduce_c_factor: int,
        share_inout_proj: bool,
        sparsity: Sparsity,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if not 1 <= rank <= num_tokens or not 1 <= reduce_c_factor <= head_dim:
            raise ConfigError(
                f"Sparsifiner: the rank must be in 1..{num_tokens} (the tokens) and "
                f"reduce_c_factor in 1..{head_dim} (the head dimension); "
                f"got {rank} and {reduce_c_factor}."
            )
        self.num_tokens = num_tokens
        self.num_prefix = num_prefix
        self.rank = rank
        self.scale = num_heads**-0.5
        self.sparsity = sparsity
        self.proj_c_q = nn.Linear(head_dim, head_dim // reduce_c_factor, **dd)
        self.proj_c_k = nn.Linear(head_dim, head_dim // reduce_c_factor, **dd)
        self.proj_n = nn.Parameter(torch.empty(num_tokens, rank, **dd))
        if not share_inout_proj:
            self.proj_back_n = nn.Parameter(torch.empty(num_tokens, rank, **dd))
        self.shared = share_inout_proj
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal of 0.02, biases zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                trunc_normal_(parameter, std=0.02)

    @property
    def up(self) -> Tensor:
        """W_up, [N, K]."""
        return self.proj_n if self.shared else self.proj_back_n

    def budget(self, tokens: int, pruned: bool = False) -> int:
        """Keys per query among ``tokens``; after token pruning at most the patches left."""
        most = tokens - self.num_prefix if pruned else tokens
        return min(math.ceil(self.sparsity.keep_rate * self.num_tokens), most)

    def coefficients(self, q: Tensor, k: Tensor, kept: Tensor | None) -> Tensor:
        """[B, H, N, d] twice -> softmax [B, H, N - prefix, K]."""
        down = self.proj_n if kept is None else self.proj_n[kept][:, None]  # [N, K], [B, 1, N, K]
        reduced = self.proj_c_k(k).transpose(-1, -2) @ down  # [B, H, c, K]
        logits = self.proj_c_q(q[:, :, self.num_prefix :]) @ reduced
        return (logits * self.scale).softmax(-1)

    def sparse_coefficients(self, coef: Tensor) -> Tensor:
        """Zero all but the largest (or those above the threshold), without renormalising."""
        rule = self.sparsity
        if rule.coef_topk is None:
            return F.threshold(coef, rule.coef_threshold, 0.0) if rule.coef_threshold else coef
        top = coef.topk(min(rule.coef_topk, self.rank), sorted=False)
        return torch.zeros_like(coef).scatter(-1, top.indices, top.values)

    def basis(self, kept: Tensor | None) -> Tensor:
        """|W_up| above its threshold: [K, N], or [B, 1, K, N'] of the kept tokens."""
        up = F.threshold(self.up.abs(), self.sparsity.basis_threshold, 0.0)
        return up.t() if kept is None else up[kept].transpose(1, 2)[:, None]

    def reconstruction(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores of the first stage, dense and signed: [B, H, N - prefix, N]."""
        return self.coefficients(q, k, None) @ self.up.t()

    def forward(self, q: Tensor, k: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(coefficients [B, H, N - prefix, K], basis) whose product are the predicted scores."""
        return self.sparse_coefficients(self.coefficients(q, k, kept)), self.basis(kept)

    def select(self, coef: Tensor, basis: Tensor, pruned: bool = False) -> Tensor:
        """Keys of every query: int64 [B, H, N - prefix, budget], rising, -1 for none.

        Under a threshold the last axis is as long as the longest row. Where values are not known
        (meta tensors, a compiled graph) it has room for all N tokens: what is counted on shapes
        alone is the most that the attention can cost.
        """
        threshold = self.sparsity.score_threshold
        tokens = basis.shape[-1]
        keep = self.budget(tokens, pruned) if threshold is None else tokens
        wide = torch.promote_types(coef.dtype, basis.dtype)  # autocast makes them two
        idx = ops.lowrank_topk(coef.to(wide), basis.to(wide), keep, threshold)
        if threshold is not None and not (idx.is_meta or torch.compiler.is_compiling()):
            longest = int((idx >= 0).sum(-1).max())  # most rows are far shorter than N
            idx = idx[..., : max(longest, 1)]
        return idx

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"num_tokens={self.num_tokens}, rank={self.rank}, {self.sparsity}"


@dataclass
class AttentionOutput:
    """What one attention gives.

    Attributes:
        x: [B, N, C].
        predicted: reconstructed attention [B, H, N - prefix, N] in the first stage.
        class_scores: the first token's attention to the patches, mean over heads, where asked for.
    """

    x: Tensor
    predicted: Tensor | None = None
    class_scores: Tensor | None = None


@register_notrace_module
class SparsifinerAttention(nn.Module):
    """Self-attention of which every patch sees only the keys that the predictor chose.

    The prefix tokens (class, registers) see everything. In eval mode the work is really sparse
    (``ops.sparse_attention``). The official code computes all scores and masks them: that is the
    way of training mode here, and of inference with ``sparse_inference = False``, which at a few
    hundred tokens can be faster. The values are the same. ``sparse_training = True`` trains through
    the sparse operator (no attention dropout there; a straight-through mask needs all scores and
    keeps to them).

    Args:
        dim: channels.
        num_heads: heads.
        predictor: arguments of :class:`ConnectivityPredictor` but heads and head dimension.
        qkv_bias: whether queries, keys and values have a bias.
        attn_drop: dropout of attention weights, in training.
        proj_drop: dropout of the output.
        device: of the parameters.
        dtype: of the parameters.
    """

    __prepare_scriptable__ = refuse_scripting

    sparse_inference = True
    sparse_training = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        predictor: dict[str, Any],
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.mask_predictor = ConnectivityPredictor(
            num_heads=num_heads, head_dim=self.head_dim, **predictor, **dd
        )

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, C] -> the same, like any attention of timm."""
        refuse_mask(attn_mask, is_causal)
        return self.full(x).x

    def full(
        self,
        x: Tensor,
        kept: Tensor | None = None,
        reconstruct: bool = False,
        class_scores: bool = False,
    ) -> AttentionOutput:
        """Attention with what training and token pruning ask for.

        Args:
            x: [B, N', C].
            kept: original position of each token, int64 [B, N'], prefix included; None: all.
            reconstruct: dense attention and, in ``predicted``, its low-rank reconstruction.
            class_scores: also give the first token's attention.

        Raises:
            ConfigError: the number of tokens is not the predictor's.
        """
        predictor = self.mask_predictor
        if kept is None and x.shape[1] != predictor.num_tokens:
            raise ConfigError(
                f"Sparsifiner predicts for {predictor.num_tokens} tokens; got {x.shape[1]}. "
                f"Call set_input_size on the model for another image size."
            )
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, d]
        predicted = None
        if reconstruct:
            predicted = predictor.reconstruction(q, k)
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            out = self._sparse(q, k, v, kept)
        scores = None
        if class_scores:
            scores = ops.attention_rows(q[:, :, :1], k, scale=self.scale, reduce="mean")
            scores = scores[:, 0, predictor.num_prefix :]
        y = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return AttentionOutput(y, predicted, scores)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None) -> Tensor:
        predictor = self.mask_predictor
        coef, basis = predictor(q, k, kept)
        idx = predictor.select(coef, basis, pruned=kept is not None)
        learn = self.training and predictor.sparsity.mask_gradient == "straight_through"
        if (self.sparse_training and not learn) if self.training else self.sparse_inference:
            first = predictor.num_prefix
            return ops.sparse_attention(q, k, v, idx, scale=self.scale, dense_queries=first)
        seen = _as_mask(idx, k.shape[2], predictor.num_prefix)
        if learn:
            return self._learned(q, k, v, seen, _soft_mask(coef @ basis, idx, predictor.sparsity))
        empty = ~seen.any(-1, keepdim=True)  # a row that sees nothing gives zeros
        drop = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen | empty, dropout_p=drop, scale=self.scale
        )
        return out.masked_fill(empty, 0.0)

    def _learned(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, soft: Tensor) -> Tensor:
        """Dense attention under a mask [B, H, N, N] whose gradient is that of ``soft``."""
        scores = _wide((q * self.scale) @ k.transpose(-1, -2))  # as fused attention does
        # Against the largest score that is seen: what is not seen may exceed it, and is capped so
        # that its weight, which is zero, has a finite gradient.
        top = scores.detach().masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
        top = top.masked_fill(top.isinf(), 0.0)
        weight = (scores - top).clamp(max=0.0).exp()
        first, mask = self.mask_predictor.num_prefix, seen.to(weight.dtype)
        mask = torch.cat((mask[:, :, :first], mask[:, :, first:] + (soft - soft.detach())), 2)
        weight = weight * mask
        total = weight.sum(-1, keepdim=True)
        weight = weight / total.masked_fill(total == 0, 1.0)
        return self.attn_drop(weight).to(v.dtype) @ v


def _wide(t: Tensor) -> Tensor:
    """Half types as fp32."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _as_mask(idx: Tensor, tokens: int, prefix: int) -> Tensor:
    """Indices [B, H, N - prefix, K] -> bool [B, H, N, N]; prefix rows see everything."""
    b, h, rows, _ = idx.shape
    mask = idx.new_zeros((b, h, rows, tokens + 1), dtype=torch.bool)
    mask = mask.scatter(-1, torch.where(idx < 0, tokens, idx), True)[..., :tokens]
    return torch.cat((mask.new_ones((b, h, prefix, tokens)), mask), 2)


def _soft_mask(scores: Tensor, idx: Tensor, rule: Sparsity) -> Tensor:
    """Sigmoid of the distance to the row's cut: [B, H, N - prefix, N] in (0, 1), at least fp32."""
    scores = _wide(scores)
    if rule.score_threshold is None:
        chosen = scores.detach().gather(-1, idx.clamp(min=0)).masked_fill(idx < 0, torch.inf)
        cut = chosen.amin(-1, keepdim=True)
    else:
        cut = torch.full_like(scores[..., :1], rule.score_threshold)
    width = rule.temperature * scores.detach().std(-1, keepdim=True)
    return torch.sigmoid((scores - cut.detach()) / width.clamp(min=1e-12))
