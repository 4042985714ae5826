# SPDX-License-Identifier: Apache-2.0
"""ACMIL's heads (arXiv 2311.07125): several attention branches, and what keeps them apart.

Each branch pools the tokens and classifies; the bag branch pools with the mean of their weights and
is the answer. In training a random part of the tokens that a branch likes best is hidden from it
(STKIM), and branches that look at the same tokens pay for it (:func:`branch_loss`). Names of
parameters are those of dazhangyu123/ACMIL at e53d19c, ``architecture/transformer.py``, which takes
one bag at a time; here batches, masks and sizes of merged tokens.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visprune.backbones.vit.heads.tokens import check_tokens, score_bias
from visprune.errors import ConfigError

HIDDEN = -1e9  # score of a hidden token, as in the official code


class BranchOutput(NamedTuple):
    """What training reads of a forward.

    Attributes:
        logits: of the bag, [B, classes].
        branches: [B, branches, classes].
        scores: before their softmax, [B, branches, N] or [B, heads, branches, N]; -1e9 where a
            token was hidden.
    """

    logits: Tensor
    branches: Tensor
    scores: Tensor


def mask_top_tokens(
    scores: Tensor, count: int, drop: float, uniform: Tensor | None = None
) -> Tensor:
    """Hide a random part of the best tokens: stochastic top-k instance masking.

    Args:
        scores: [..., N].
        count: how many of the best tokens are in danger (all, if there are fewer).
        drop: share of them that is hidden, rounded down.
        uniform: [..., min(count, N)] numbers in place of random ones; those of the smallest are
            hidden, the j-th number being of the j-th best token.

    Returns:
        ``scores`` with -1e9 in the places that were drawn.

    Raises:
        ConfigError: a share outside 0..1, or numbers of another shape.
    """
    if not 0 <= drop <= 1 or count < 0:
        raise ConfigError(f"mask_top_tokens: drop must be in 0..1 and count at least 0; got "
                          f"drop={drop}, count={count}.")  # fmt: skip
    among = min(count, scores.shape[-1])
    hidden = int(among * drop)
    if hidden == 0:
        return scores
    best = scores.topk(among, dim=-1).indices
    if uniform is None:
        uniform = torch.rand(best.shape, device=scores.device)
    elif uniform.shape != best.shape:
        raise ConfigError(f"mask_top_tokens: uniform must be {list(best.shape)}; got "
                          f"{list(uniform.shape)}.")  # fmt: skip
    drawn = best.gather(-1, uniform.argsort(-1)[..., :hidden])
    return scores.scatter(-1, drawn, HIDDEN)


def branch_loss(out: BranchOutput, target: Tensor) -> Tensor:
    """Cross-entropy of the bag and of the branches, and how alike the branches' weights are.

    Args:
        out: of a head's ``forward_train``.
        target: class indices [B].

    Returns:
        The sum of the three (of one branch: the first), averaged over the batch.
    """
    count = out.branches.shape[1]
    loss = F.cross_entropy(out.logits, target)
    if count == 1:
        return loss
    loss = loss + F.cross_entropy(out.branches.flatten(0, 1), target.repeat_interleave(count))
    weights = out.scores.softmax(-1)
    first, second = torch.triu_indices(count, count, 1, device=weights.device)
    alike = F.cosine_similarity(
        weights.index_select(-2, first), weights.index_select(-2, second), dim=-1
    )
    return loss + alike.mean()


class Reduction(nn.Module):
    """A linear layer without bias and ReLU; ``fc1`` as published."""

    def __init__(self, dim: int, out: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, out, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., out]."""
        return self.fc1(x).relu()


class Classifier(nn.Module):
    """Dropout and a linear layer; ``fc`` as published."""

    def __init__(self, dim: int, classes: int, drop: float, dd: dict[str, Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, classes, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., classes]."""
        return self.fc(self.drop(x))


class BranchHead(nn.Module):
    """Base of the two heads: the reduction, the classifiers, masking.

    Args:
        dim: channels of the tokens.
        num_classes: classes.
        inner_dim: channels after the reduction.
        num_branches: branches.
        masked_tokens: how many of the best tokens of a branch are in danger in training; 0: none.
        mask_drop: share of them that is hidden.
        drop_rate: dropout before the classifiers.
        dd: device and dtype of the parameters.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        inner_dim: int,
        num_branches: int,
        masked_tokens: int,
        mask_drop: float,
        drop_rate: float,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        if min(dim, num_classes, inner_dim, num_branches) < 1 or masked_tokens < 0:
            raise ConfigError(
                f"{type(self).__name__}: channels, classes and branches are at least 1 and "
                f"masked_tokens at least 0; got dim={dim}, num_classes={num_classes}, inner_dim="
                f"{inner_dim}, num_branches={num_branches}, masked_tokens={masked_tokens}."
            )
        if not 0 <= mask_drop <= 1:
            raise ConfigError(f"{type(self).__name__}: mask_drop must be in 0..1; "
                              f"got {mask_drop}.")  # fmt: skip
        self.dim, self.num_branches = dim, num_branches
        self.masked_tokens, self.mask_drop = masked_tokens, mask_drop
        self.dimreduction = Reduction(dim, inner_dim, dd)
        self.classifier = nn.ModuleList(
            Classifier(inner_dim, num_classes, drop_rate, dd) for _ in range(num_branches)
        )
        self.Slide_classifier = Classifier(inner_dim, num_classes, drop_rate, dd)

    def _masked(self, scores: Tensor, uniform: Tensor | None) -> Tensor:
        if not self.training or not self.masked_tokens:
            return scores
        return mask_top_tokens(scores, self.masked_tokens, self.mask_drop, uniform)

    def _classified(self, pooled: Tensor) -> Tensor:
        """[B, branches, inner] -> [B, branches, classes]."""
        parts = zip(self.classifier, pooled.unbind(1), strict=True)
        return torch.stack([classify(x) for classify, x in parts], 1)

    def forward_train(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        sizes: Tensor | None = None,
        uniform: Tensor | None = None,
    ) -> BranchOutput:
        """All branches, under masking in training mode: what :func:`branch_loss` reads.

        Args:
            x: tokens [B, N, dim].
            mask: bool [B, N], False for padding.
            sizes: [B, N], how many patches a merged token stands for.
            uniform: numbers for :func:`mask_top_tokens`.
        """
        raise NotImplementedError  # pragma: no cover - abstract

    def forward(self, x: Tensor, mask: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """Tokens [B, N, dim] -> logits of the bag [B, classes]; see :meth:`forward_train`."""
        return self.forward_train(x, mask, sizes).logits


class GatedAttention(nn.Module):
    """A score per token and branch: tanh times sigmoid of linear layers, and a linear layer."""

    def __init__(self, dim: int, hidden: int, branches: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.attention_V = nn.Sequential(nn.Linear(dim, hidden, **dd), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(dim, hidden, **dd), nn.Sigmoid())
        self.attention_weights = nn.Linear(hidden, branches, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, branches, N]."""
        scores = self.attention_weights(self.attention_V(x) * self.attention_U(x))
        return scores.transpose(1, 2)


class MultiBranchAttention(BranchHead):
    """ACMIL with gated attention (``ACMIL_GA``). The defaults are those of its README.

    Args:
        dim: channels of the tokens.
        num_classes: classes.
        inner_dim: channels after the reduction; half of ``dim`` if None.
        hidden_dim: channels of the gate.
        num_branches: branches.
        masked_tokens: how many of the best tokens of a branch are in danger in training; 0: none.
        mask_drop: share of them that is hidden.
        drop_rate: dropout before the classifiers.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        inner_dim: int | None = None,
        hidden_dim: int = 128,
        num_branches: int = 5,
        masked_tokens: int = 10,
        mask_drop: float = 0.6,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        inner = dim // 2 if inner_dim is None else inner_dim
        super().__init__(
            dim, num_classes, inner, num_branches, masked_tokens, mask_drop, drop_rate, dd
        )
        self.attention = GatedAttention(inner, hidden_dim, num_branches, dd)

    def forward_train(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        sizes: Tensor | None = None,
        uniform: Tensor | None = None,
    ) -> BranchOutput:
        """See the base; ``uniform`` is [B, branches, min(masked_tokens, N)]."""
        check_tokens(type(self).__name__, x, self.dim)
        bias = score_bias(x, mask, sizes)
        x = self.dimreduction(x)
        scores = self.attention(x)
        scores = self._masked(scores if bias is None else scores + bias[:, None], uniform)
        weights = scores.softmax(-1).type_as(x)
        bag = (weights.mean(1, keepdim=True) @ x)[:, 0]
        return BranchOutput(self.Slide_classifier(bag), self._classified(weights @ x), scores)


class BranchQuery(nn.Module):
    """Multi-head attention of one query, then a norm; of given weights without ``own`` ones."""

    def __init__(self, dim: int, heads: int, drop: float, own: bool, dd: dict[str, Any]) -> None:
        super().__init__()
        self.heads = heads
        if own:
            self.q_proj, self.k_proj = nn.Linear(dim, dim, **dd), nn.Linear(dim, dim, **dd)
        self.v_proj = nn.Linear(dim, dim, **dd)
        self.out_proj = nn.Linear(dim, dim, **dd)
        self.layer_norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.dropout = nn.Dropout(drop)

    def _split(self, x: Tensor) -> Tensor:
        """[B, n, dim] -> [B, heads, n, d]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def scores(self, query: Tensor, x: Tensor) -> Tensor:
        """[1, 1, dim] and [B, N, dim] -> [B, heads, 1, N]."""
        q, k = self._split(self.q_proj(query)), self._split(self.k_proj(x))
        return q @ k.transpose(-1, -2) / math.sqrt(k.shape[-1])

    def pool(self, weights: Tensor, x: Tensor) -> Tensor:
        """[B, heads, 1, N] and [B, N, dim] -> [B, dim]."""
        out = (weights.type_as(x) @ self._split(self.v_proj(x)))[:, :, 0].flatten(1)
        return self.layer_norm(self.dropout(self.out_proj(out)))


class MultiHeadBranches(BranchHead):
    """ACMIL with multi-head attention (``ACMIL_MHA``): a learned query per branch.

    Args:
        dim: channels of the tokens.
        num_classes: classes.
        inner_dim: channels after the reduction, a multiple of ``num_heads``; half of ``dim`` if
            None.
        num_heads: heads of each branch.
        num_branches: branches.
        masked_tokens: how many of the best tokens of a head are in danger in training; 0: none.
        mask_drop: share of them that is hidden.
        attn_drop: dropout of a branch's output.
        drop_rate: dropout before the classifiers.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        inner_dim: int | None = None,
        num_heads: int = 8,
        num_branches: int = 5,
        masked_tokens: int = 10,
        mask_drop: float = 0.6,
        attn_drop: float = 0.1,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        inner = dim // 2 if inner_dim is None else inner_dim
        super().__init__(
            dim, num_classes, inner, num_branches, masked_tokens, mask_drop, drop_rate, dd
        )
        if num_heads < 1 or inner % num_heads:
            raise ConfigError(f"MultiHeadBranches: inner_dim must be a multiple of num_heads; got "
                              f"{inner} and {num_heads}.")  # fmt: skip
        self.q = nn.Parameter(torch.empty(1, num_branches, inner, **dd))
        nn.init.normal_(self.q, std=1e-6)
        self.sub_attention = nn.ModuleList(
            BranchQuery(inner, num_heads, attn_drop, True, dd) for _ in range(num_branches)
        )
        self.bag_attention = BranchQuery(inner, num_heads, attn_drop, False, dd)

    def forward_train(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        sizes: Tensor | None = None,
        uniform: Tensor | None = None,
    ) -> BranchOutput:
        """See the base; ``uniform`` is [B, heads, branches, min(masked_tokens, N)]."""
        check_tokens(type(self).__name__, x, self.dim)
        bias = score_bias(x, mask, sizes)
        x = self.dimreduction(x)
        queries = self.q.split(1, 1)
        branches: Any = self.sub_attention
        scores = torch.cat([b.scores(q, x) for b, q in zip(branches, queries, strict=True)], 2)
        scores = self._masked(scores if bias is None else scores + bias[:, None, None], uniform)
        weights = scores.softmax(-1)
        per_branch = weights.split(1, 2)
        pooled = [b.pool(w, x) for b, w in zip(branches, per_branch, strict=True)]
        bag: Any = self.bag_attention
        logits = self.Slide_classifier(bag.pool(weights.mean(2, keepdim=True), x))
        return BranchOutput(logits, self._classified(torch.stack(pooled, 1)), scores)
