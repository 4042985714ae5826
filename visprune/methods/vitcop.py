# SPDX-License-Identifier: Apache-2.0
"""ViTCoP: clusters of the encoder steer what merges in the decoder (AAAI 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visprune.core import (
    Budget,
    BudgetedMethod,
    Context,
    ModelSpec,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.core.signals import ClsAttention, EncoderQueriesKeys, KeysValues
from visprune.errors import ConfigError

_SEEN = ClsAttention("feature")
_CODES = EncoderQueriesKeys("feature")


@dataclass(frozen=True, kw_only=True)
class ViTCoP(BudgetedMethod):
    """Three stages: class attention, clusters that share out a budget, and the norm of keys.

    **At the projector** ``int(visual n)`` patches of largest class attention stay (layer whose
    features are read, summed over heads). **Early in the decoder** density peaks of their encoder
    keys are clusters, each of which keeps its part of R tokens: those of *smallest* norm of the
    mean key over heads, in the layer before; the rest of a cluster becomes one token, the mean of
    its members, at the place of the middle one. With more clusters than R the R - 1 of smallest
    norm become a token each, and all others one. **Late** those of smallest norm stay.

    ``num_keep`` is what survives the last stage; R is five times as much. The paper sets R by a
    mean over layers; of the layers of LLaVA-1.5-7B that mean is ``(2 visual n + 20 R + 10 R / 5) /
    32``.

    Differences: the official merged token is the mean *plus* the middle member, about twice the
    size of any other (``official=True``). Position ids stay here, where behind the last stage the
    official ones are places in the shortened sequence.

    Args:
        visual: what stage 1 keeps (0.5, 0.4 and 0.3 in the paper's three settings).
        peaks: centres as a share of those (0.18, 0.15, 0.12).
        early: decoder layer of stage 2, at least 1, or a fraction of the depth.
        late: and of stage 3.
        official: see above.
    """

    name: ClassVar[str] = "vitcop"

    visual: float = 0.4
    peaks: float = 0.15
    early: int | float = 2 / 32
    late: int | float = 22 / 32
    official: bool = False

    def __post_init__(self) -> None:
        """Check the shares."""
        super().__post_init__()
        if not (0.0 < self.visual <= 1.0 and 0.0 < self.peaks <= 1.0):
            raise ConfigError(
                f"vitcop takes visual and peaks in (0, 1]; got {self.visual} and {self.peaks}."
            )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector, two inside the decoder."""
        first = Budget(keep_ratio=self.visual, rounding="floor")
        return (
            Stage(Site.projector(), first, (_SEEN,)),
            Stage(Site.decoder(self.early), self.budget.scaled(5, "round"), (_CODES, KeysValues())),
            Stage(Site.decoder(self.late), self.budget, (KeysValues(),)),
        )

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """By attention, by clusters, by norms."""
        if ctx.num_keep >= tokens.num_tokens:
            batch, device = len(tokens.features), tokens.features.device
            return Selection.identity(batch, tokens.num_tokens, device)
        if ctx.site.kind == "projector":
            return Selection.top(ctx[_SEEN].sum(dim=1), ctx.num_keep)
        keys = ctx[KeysValues()][:, 0].mean(1)
        norm = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
        if ctx.stage == 2:
            return Selection.top(-norm, ctx.num_keep)
        place = tokens.pos[..., 1:].float()
        place = place / (place.amax((0, 1)) + 1.0)
        codes = ctx[_CODES][:, 1].float()
        found = []
        for image in range(len(norm)):
            label = peaks(codes[image], place[image], self.peaks)
            found.append(shared_out(norm[image], label, ctx.num_keep, official=self.official))
        return Selection.stack(found)

    def macs(self, count: int, keep: int, width: int) -> int:
        """Distances of the encoder's keys at the second stage."""
        return count * count * width


def peaks(
    x: Tensor, place: Tensor, share: float, scale: float = 8.0, radius: float = 0.6
) -> Tensor:
    """Density peaks of one picture's tokens ``[n, D]`` at places ``[n, 2]``: labels, ``[n]``.

    -1 where no chain of ever denser neighbours ends at a centre. A local peak that is not taken as
    a centre follows token 0, as in the official code.
    """
    count = len(x)
    dist = (torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square() + 1e-8).sqrt()
    dist = dist.fill_diagonal_(0.0)
    density = (-(dist / scale).square()).exp().sum(1)
    near = torch.cdist(place, place) <= radius
    denser = (density[None] >= density[:, None]) & near
    denser = denser.fill_diagonal_(False)
    masked = dist.masked_fill(~denser, torch.inf)
    delta, parent = masked.min(1)
    parent = torch.where(delta.isinf(), 0, parent)
    order = (delta * density).argsort(descending=True, stable=True)
    centers = order[: max(1, int(share * count))]
    label = torch.full((count,), -1, dtype=torch.int64, device=x.device)
    label[centers] = torch.arange(len(centers), device=x.device)
    for _ in range(count):
        new = torch.where(label < 0, label[parent], label)
        if torch.equal(new, label):
            break
        label = new
    return label


def shared_out(norm: Tensor, label: Tensor, keep: int, *, official: bool = False) -> Selection:
    """Keep ``keep`` tokens of one picture by clusters; see :class:`ViTCoP`.

    Args:
        norm: small is important, ``[n]``.
        label: the cluster of each token, ``[n]``.
        keep: R.
        official: add the middle member to the mean.
    """
    names, members = label.unique(sorted=True), []
    members = [(label == name).nonzero()[:, 0] for name in names]
    total = torch.stack([norm[each].sum() for each in members])
    order = total.argsort(stable=True).tolist()
    plain: list[Tensor] = []
    if len(members) > keep:
        groups = [members[n] for n in order[: keep - 1]]
        groups.append(torch.cat([members[n] for n in order[keep - 1 :]]).sort().values)
    else:
        quota = _quotas([len(each) for each in members], keep, order)
        groups = []
        for each, number in zip(members, quota, strict=True):
            ranked = norm[each].argsort(stable=True)
            plain.append(each[ranked[:number]])
            groups.append(each[ranked[number:].sort().values])
    middle = torch.stack([each[len(each) // 2] for each in groups])
    index = torch.cat([*plain, middle])
    place = index.argsort()
    slots = place.argsort()[len(index) - len(groups) :]
    own = torch.ones(len(index), device=norm.device)
    source, slot, weight = [], [], []
    for at, each, head in zip(slots.tolist(), groups, middle.tolist(), strict=True):
        own[at] = 1.0 / len(each) + (1.0 if official else 0.0)
        others = each[each != head]
        source.append(others)
        slot.append(torch.full_like(others, at))
        weight.append(torch.full(others.shape, 1.0 / len(each), device=norm.device))
    came, to, share = (torch.cat(part)[None] for part in (source, slot, weight))
    return Selection.merge(index[place][None], len(norm), came, to, share, own[None])


def _quotas(sizes: list[int], keep: int, order: list[int]) -> list[int]:
    """Tokens that each cluster keeps as they are, beside the one of the rest."""
    spare, wanted = sum(sizes) - len(sizes), keep - len(sizes)
    quota = [min(round((s - 1) / max(1, spare) * wanted), s - 1) for s in sizes]
    for n in order if sum(quota) < wanted else reversed(order):
        left = wanted - sum(quota)
        if left > 0 and quota[n] < sizes[n] - 1:
            quota[n] += 1
        elif left < 0 and quota[n] > 0:
            quota[n] -= 1
    return quota
