# SPDX-License-Identifier: Apache-2.0
"""Time a HiLo layer beside the official module's structure and beside self-attention.

``visprune bench hilo_attention``: projections included, because the comparison is between
layers. The results must agree first; then medians of interleaved rounds. ``--csv FILE`` adds the
rows with device, versions, date and command.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from visprune.kernels.common import options, results, timing

from . import cases, op

Row = dict[str, object]
Shape = tuple[str, int, int, int, int, float, int]


class Projections(nn.Module):
    """The parameters of a layer; a branch without heads has none."""

    def __init__(self, dim: int, heads: int, window_size: int, alpha: float) -> None:
        super().__init__()
        self.head_dim, self.window_size = dim // heads, window_size
        self.low = heads if window_size == 1 else int(heads * alpha)
        self.high = heads - self.low
        l_dim, h_dim = self.low * self.head_dim, self.high * self.head_dim
        if self.low:
            self.l_q, self.l_kv = nn.Linear(dim, l_dim), nn.Linear(dim, 2 * l_dim)
            self.l_proj = nn.Linear(l_dim, l_dim)
        if self.high:
            self.h_qkv, self.h_proj = nn.Linear(dim, 3 * h_dim), nn.Linear(h_dim, h_dim)


class Baseline(Projections):
    """HiLo by the official rule and structure: windows of the input, plain softmax attention."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        parts = ([self.windows(x)] if self.high else []) + ([self.pooled(x)] if self.low else [])
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Scores, softmax, values."""
        return torch.softmax(q @ k.transpose(-2, -1) * self.head_dim**-0.5, -1) @ v

    def windows(self, x: Tensor) -> Tensor:
        """Attention of every window on its own."""
        b, height, width, c = x.shape
        ws, d = self.window_size, self.head_dim
        rows, cols = height // ws, width // ws
        x = x.reshape(b, rows, ws, cols, ws, c).transpose(2, 3)
        qkv = self.h_qkv(x).reshape(b, rows * cols, ws * ws, 3, self.high, d)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)
        out = self.attend(q, k, v).transpose(2, 3).reshape(b, rows, cols, ws, ws, self.high * d)
        return self.h_proj(out.transpose(2, 3).reshape(b, height, width, self.high * d))

    def pooled(self, x: Tensor) -> Tensor:
        """Every token over the pooled keys."""
        b, height, width, c = x.shape
        d, n = self.head_dim, height * width
        q = self.l_q(x).reshape(b, n, self.low, d).transpose(1, 2)
        if self.window_size > 1:
            x = nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), self.window_size)
            x = x.reshape(b, c, -1).transpose(1, 2)
        k, v = self.l_kv(x).reshape(b, -1, 2, self.low, d).permute(2, 0, 3, 1, 4)
        out = self.attend(q, k, v).transpose(1, 2).reshape(b, height, width, self.low * d)
        return self.l_proj(out)


class SelfAttention(nn.Module):
    """Plain self-attention of the same width over PyTorch's fused kernel."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        b, height, width, c = x.shape
        qkv = self.qkv(x).view(b, height * width, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, height, width, c))


def ours(layer: Projections, x: Tensor, backend: str) -> Tensor:
    """The same layer through ``hilo_layer``."""

    def pair(name: str) -> op.Linear | None:
        linear = layer._modules.get(name)
        return (linear.weight, linear.bias) if isinstance(linear, nn.Linear) else None

    return op.hilo_layer(
        x, layer.head_dim, pair("h_qkv"), pair("h_proj"), pair("l_q"), pair("l_kv"),
        pair("l_proj"), layer.window_size, layer.head_dim**-0.5, False, backend,
    )  # fmt: skip


def projections(layer: Projections, x: Tensor) -> Tensor:
    """The linear maps of ``ours`` and nothing between them: what no attention can undercut."""
    b, height, width, c = x.shape
    tokens, ws = x.reshape(-1, c), layer.window_size
    high = layer.h_qkv(tokens)[:, : layer.high * layer.head_dim] if layer.high else None
    if not layer.low:
        return layer.h_proj(high)
    low = layer.l_q(tokens)
    layer.l_kv(tokens[: b * -(-height // ws) * -(-width // ws)])
    if high is None:
        return layer.l_proj(low)
    pairs = [(p.weight, p.bias) for p in (layer.h_proj, layer.l_proj)]
    return op.side_by_side(high, pairs[0], low, pairs[1])


def _with_backward(call: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call().sum(), inputs)


def _contestants(
    shape: Shape, device: str, dtype: torch.dtype, backend: str
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, list[Tensor]]]:
    """(calls, what their gradients are taken of)."""
    _, side, dim, heads, ws, alpha, batch = shape
    torch.manual_seed(0)
    layer = Baseline(dim, heads, ws, alpha).to(device, dtype)
    attention = SelfAttention(dim, heads).to(device, dtype)
    x = torch.randn(batch, side, side, dim, device=device, dtype=dtype, requires_grad=True)
    calls = {
        "self-attention": lambda: attention(x),
        "official": lambda: layer(x),
        "ours": lambda: ours(layer, x, backend),
        "projections": lambda: projections(layer, x),
    }
    own, other = [x, *layer.parameters()], [x, *attention.parameters()]
    return calls, {"self-attention": other, "official": own, "ours": own, "projections": own}


def run(
    rounds: int = 15,
    threads: int = 2,
    shapes: Iterable[Shape] = cases.BENCH_SHAPES,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
    clock: str = "wall",
) -> list[Row]:
    """One row per shape; times are missing where the results disagree.

    Args:
        rounds: timed rounds; in each every contestant runs once.
        threads: CPU threads.
        shapes: see ``cases.BENCH_SHAPES``.
        device: ``cpu`` or ``cuda``.
        dtype: of inputs and weights.
        backward: time the forward and the gradients of input and weights.
        clock: see ``timing.interleaved``.
    """
    rows: list[Row] = []
    backend = "triton" if device == "cuda" else "torch"
    loose = 1e-4 if dtype == torch.float32 else 2e-2
    mode = torch.enable_grad() if backward else torch.inference_mode()
    with timing.threads(threads), mode:
        for shape in shapes:
            name, side, dim, heads, ws, alpha, batch = shape
            calls, leaves = _contestants(shape, device, dtype, backend)
            row: Row = {"case": name, "tokens": f"{side}x{side}", "dim": dim, "heads": heads}
            row |= {"ws": ws, "alpha": alpha, "batch": batch}
            row["agree"] = torch.allclose(calls["official"](), calls["ours"](), loose, loose)
            if row["agree"]:
                timed: dict[str, Callable[[], object]] = dict(calls)
                if backward:  # the projections alone leave keys and values without a gradient
                    del calls["projections"]
                    timed = {key: _with_backward(c, leaves[key]) for key, c in calls.items()}
                few = max(3, rounds // 4) if side > 28 else rounds
                times = timing.interleaved(timed, few, warmup=2, clock=clock)
                by_official = timing.summary(times, "official")
                row["self-attention ms"] = by_official["self-attention"]["ms"]
                row["official ms"] = by_official["official"]["ms"]
                row["ms"] = by_official["ours"]["ms"]
                row["/ official"] = by_official["ours"]["ratio"]
                by_attention = timing.summary(times, "self-attention")
                row["/ self-attention"] = by_attention["ours"]["ratio"]
                if not backward:
                    row["bound"] = by_attention["projections"]["ratio"]
            else:
                keys = ("self-attention ms", "official ms", "ms", "/ official", "/ self-attention")
                row |= dict.fromkeys(keys if backward else (*keys, "bound"), "-")
            rows.append(row)
    return rows


def main() -> int:
    """Print the table; exit 1 if any result disagrees."""
    made = options.parser(__doc__, rounds=15)
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    made.add_argument("--backward", action="store_true")
    made.add_argument("--batch", type=int, help="pictures in every case, instead of its own")
    args = options.read(made)
    shapes: tuple[Shape, ...] = cases.BENCH_SHAPES
    if args.batch:
        shapes = tuple(dict.fromkeys((*s[:-1], args.batch) for s in shapes))
    rows = run(
        args.rounds, args.threads, shapes, args.device, getattr(torch, args.dtype),
        backward=args.backward, clock=args.clock,
    )  # fmt: skip
    about = results.machine(args.device, args.threads)
    about |= {"rounds": args.rounds, "dtype": args.dtype, "clock": args.clock}
    results.show(rows, about, args.csv)
    return int(not all(row["agree"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
