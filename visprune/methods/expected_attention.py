# SPDX-License-Identifier: Apache-2.0
"""Expected attention: what queries to come will look at (arXiv:2510.00636)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, CacheSeen, Eviction, Scope, Score
from visprune.core.cache.seen import turned
from visprune.errors import UnsupportedModel


@dataclass(frozen=True)
class Expected(Score):
    """The mean weight that a query to come gives to a slot, if queries are normal.

    Attributes:
        future: positions behind the prompt that the rotary embedding is averaged over.
        sinks: first queries that are left out, and first slots that stay.
        covariance: whether the spread of queries counts.
        values: whether the norm of the value counts.
        epsilon: added before that.
    """

    turns: ClassVar[bool] = True

    future: int = 512
    sinks: int = 4
    covariance: bool = True
    values: bool = True
    epsilon: float = 0.0

    def read(self, seen: CacheSeen) -> Tensor:
        """Mean and covariance of the queries, turned on to the positions to come."""
        if seen.turn is None or seen.places is None:
            raise UnsupportedModel(
                "expected_attention turns queries back to before their rotary embedding, which is "
                "known for decoders that turn whole heads, half against half, along a line."
            )
        query = seen.query.float()[:, : seen.prompt - seen.stored]
        cos, sin = seen.turn(seen.places[: query.shape[1]])
        scaling = cos.square() + sin.square()  # some families scale the embedding
        plain = turned(query, cos, -sin) / scaling
        plain = plain[:, min(self.sinks, plain.shape[1] - 1) :]
        mean = plain.mean(1)  # [H, d]
        ahead = int(seen.places[query.shape[1] - 1]) + 1
        steps = torch.arange(ahead, ahead + self.future, device=query.device)
        cos, sin = (x.mean(0) for x in seen.turn(steps))
        size = query.shape[-1]
        rotation = turned(torch.eye(size, device=query.device), cos, sin).T  # mean of R, [d, d]
        mean = mean @ rotation.T
        group = query.shape[0] // seen.key.shape[0]
        key = seen.key.float().repeat_interleave(group, 0)
        logit = torch.einsum("hld,hd->hl", key, mean) * size**-0.5
        if self.covariance:
            spread = plain - plain.mean(1, keepdim=True)
            cov = torch.einsum("hnd,hne->hde", spread, spread) / spread.shape[1]
            cov = rotation @ cov @ rotation.T
            logit = logit + torch.einsum("hld,hde,hle->hl", key, cov, key) / size / 2
        seen.spent += key.numel() * (size if self.covariance else 1)
        return self._weighed(seen, logit)

    def _weighed(self, seen: CacheSeen, logit: Tensor) -> Tensor:
        weight = seen.grouped(logit[:, self.sinks :].softmax(-1))
        if self.values:
            norm = seen.value[:, self.sinks :].float().norm(dim=-1)
            weight = (weight + self.epsilon) * norm
        top = float(weight.max()) + 1 if weight.numel() else 1.0
        return torch.nn.functional.pad(weight, (self.sinks, 0), value=top)[:, -seen.length :]


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(CacheMethod):
    """Each key head keeps the slots that queries behind the prompt are expected to attend to.

    **Score**: the mean of ``exp(q.k)`` over normal queries with the mean and covariance of the
    prompt's, turned on to the ``future`` positions behind it, times the norm of the value.
    **Budget**: the same everywhere. **Action**: drop. **Scope**: as given. As in kvpress.

    It asks for rotary embeddings along a line that turn the halves of whole heads.

    Args:
        future: positions that are averaged over.
        sinks: first slots of the prompt that are left out of the statistics and stay.
        covariance: whether the spread of queries counts.
        values: whether the norm of the value counts.
    """

    name: ClassVar[str] = "expected_attention"

    future: int = 512
    sinks: int = 4
    covariance: bool = True
    values: bool = True

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Expected weights, same everywhere, drop."""
        if spec.multi_axis_rope:
            raise UnsupportedModel(
                f"expected_attention averages over positions along a line; {spec.family} gives "
                f"tokens (t, h, w) places. Use snapkv or knorm."
            )
        score = Expected(self.future, self.sinks, self.covariance, self.values)
        return Eviction(score, self.amount, scope=Scope(self.scope))
