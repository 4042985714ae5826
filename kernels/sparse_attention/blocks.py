# SPDX-License-Identifier: Apache-2.0
"""PyTorch path of sparse attention by block mask: rows of blocks grouped by how many they see."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MAX_GATHERED = 1 << 22  # key numbers gathered at once (fp32: 16 MiB)


def padded_blocks(t: Tensor, block: int) -> Tensor:
    """[B, H, n, d] -> [B * H * blocks, block, d]; the last block padded with zeros."""
    n, d = t.shape[2:]
    count = -(-n // block)
    if count * block != n:
        t = torch.nn.functional.pad(t, (0, 0, 0, count * block - n))
    return t.reshape(-1, block, d)


class Groups:
    """Rows of blocks (batch, head, query block) that see equally many keys."""

    def __init__(self, q: Tensor, k: Tensor, blocks: Tensor, block_q: int, block_k: int) -> None:
        batch, heads, n, _ = q.shape
        self.keys = k.shape[2]
        self.block_k = block_k
        self.down, self.across = -(-n // block_q), -(-self.keys // block_k)
        self.blocks = blocks.expand(batch, heads, -1, -1).reshape(-1, self.across)
        self.width = k.shape[3]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield (rows [g], their key blocks [g, c] as rows of padded blocks, keys they see)."""
        seen = self.blocks.sum(1) * 2  # even: without, odd: with a shortened last block
        short = self.across * self.block_k - self.keys
        if short:
            seen += self.blocks[:, -1].long()
        for value in seen.unique().tolist():
            count = value // 2
            if count == 0:
                continue
            rows = (seen == value).nonzero()[:, 0]
            lists = self.blocks[rows].nonzero()[:, 1].view(-1, count)
            head = rows.div(self.down, rounding_mode="floor")
            lists = lists + head[:, None] * self.across
            visible = count * self.block_k - (short if value % 2 else 0)
            step = max(1, MAX_GATHERED // (count * self.block_k * self.width))
            for at in range(0, len(rows), step):
                yield rows[at : at + step], lists[at : at + step], visible


def gathered(blocks: Tensor, lists: Tensor, visible: int) -> Tensor:
    """[S, block, d] at ``lists`` [g, c] -> [g, 1, visible, d]."""
    return blocks[lists].flatten(1, 2)[:, None, :visible]


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_q: int, block_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """[B, H, N, dv] and its log-sum-exp [B, H, N]."""
    batch, heads, n, _ = q.shape
    out = v.new_zeros(batch, heads, -(-n // block_q) * block_q, v.shape[3])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_zeros(out.shape[:3], dtype=wide)
    if 0 not in (batch, heads, n, k.shape[2]):
        qb, kb, vb = padded_blocks(q, block_q), padded_blocks(k, block_k), padded_blocks(v, block_k)
        ob, lb = out.view(-1, block_q, v.shape[3]), lse.view(-1, block_q)
        for rows, lists, visible in Groups(q, k, blocks, block_q, block_k):
            kg, vg = gathered(kb, lists, visible), gathered(vb, lists, visible)
            got, log = attend(qb[rows][:, None], kg, vg, scale)
            ob[rows], lb[rows] = got[:, 0], log[:, 0]
    return out[:, :, :n].contiguous(), lse[:, :, :n].contiguous()


def widened(t: Tensor, dim: int) -> Tensor:
    """Zeros up to ``dim`` features: the fused kernel knows one width for keys and values."""
    return torch.nn.functional.pad(t, (0, dim - t.shape[3])) if t.shape[3] < dim else t


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Fused CPU attention with its log-sum-exp; elsewhere two products."""
    if q.device.type == "cpu":
        fa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        dim = max(q.shape[3], v.shape[3])
        out, lse = fa(widened(q, dim), widened(k, dim), widened(v, dim), scale=scale)
        return out[..., : v.shape[3]], lse
    s = q.float() @ k.float().transpose(2, 3) * scale
    return (torch.softmax(s, -1) @ v.float()).to(v.dtype), s.logsumexp(-1)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    if q.device.type == "cpu":
        back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dim = max(q.shape[3], v.shape[3])
        wide = (widened(t, dim) for t in (grad, q, k, v, out))
        parts = back(*wide, lse, 0.0, False, scale=scale)
        a, b, c = (g[..., : t.shape[3]] for g, t in zip(parts, (q, k, v), strict=True))
        return a, b, c
    qf, kf, vf, g = (t.float() for t in (q, k, v, grad))
    p = torch.exp(qf @ kf.transpose(2, 3) * scale - lse[..., None])
    grad_s = p * (g @ vf.transpose(2, 3) - (g * out.float()).sum(-1, keepdim=True)) * scale
    return grad_s @ kf, grad_s.transpose(2, 3) @ qf, p.transpose(2, 3) @ g


def block_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor,
    block_q: int, block_k: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; those of a key block add up in the order of the rows."""
    if 0 in (*q.shape[:3], k.shape[2]):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    gb, ob, qb = (padded_blocks(t, block_q) for t in (grad, out, q))
    lb = padded_blocks(lse[..., None], block_q)[..., 0]
    kb, vb = padded_blocks(k, block_k), padded_blocks(v, block_k)
    wide = lse.dtype
    grad_q = torch.zeros_like(qb)
    grad_k, grad_v = torch.zeros_like(kb, dtype=wide), torch.zeros_like(vb, dtype=wide)
    for rows, lists, visible in Groups(q, k, blocks, block_q, block_k):
        kg, vg = gathered(kb, lists, visible), gathered(vb, lists, visible)
        tensors = (gb[rows][:, None], qb[rows][:, None], kg, vg, ob[rows][:, None])
        a, b, c = attend_backward(*tensors, lb[rows][:, None], scale)
        grad_q[rows] = a[:, 0].to(q.dtype)
        missing = lists.shape[1] * block_k - visible
        for whole, part in ((grad_k, b), (grad_v, c)):
            part = torch.nn.functional.pad(part[:, 0].to(wide), (0, 0, 0, missing))
            whole.index_add_(0, lists.flatten(), part.view(-1, block_k, part.shape[2]))
    a, b, c = (
        g.view(*t.shape[:2], -1, t.shape[3])[:, :, : t.shape[2]].to(t.dtype).contiguous()
        for g, t in ((grad_q, q), (grad_k, k), (grad_v, v))
    )
    return a, b, c
