# SPDX-License-Identifier: Apache-2.0
"""Time neighborhood attention beside dense SDPA, compiled ``flex_attention`` and natten.

``visprune bench neighborhood_attention``: values and gradients must agree with the reference
first. ``--csv FILE`` adds rows with machine, versions, date and command; on a CUDA machine they
hold the floor too: bytes over bandwidth, operations over rate (``--bandwidth``, ``--rate``).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.exc import InductorError
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from visprune.kernels.common import options, results, timing

from . import cases, op, reference

Row = dict[str, object]
Call = Callable[[], object]
GPU_SHAPES = tuple(
    cases.Shape(f"gpu_{length}_k{kernel}_d{dim}", length, 256 // dim, (1,), dim, kernel, batch)
    for length, batch in ((56, 16), (64, 16), (128, 4))
    for kernel in (7, 13)
    for dim in (32, 64, 128)
)


def _ours(shape: cases.Shape, dilation: int, qkv: list[Tensor], backend: str) -> Call:
    window = ([shape.kernel] * 2, [1, 1], [dilation] * 2, [False, False])
    args = (*qkv, None, None, None, *window, shape.dim**-0.5, False, backend)
    return lambda: op.attend(*args)[0]


def _dense(qkv: list[Tensor]) -> Call:
    """SDPA over all tokens, of the same tensors and with a result laid out like theirs."""

    def call() -> Tensor:
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in qkv)
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(qkv[0].shape)

    return call


def _flex(shape: cases.Shape, dilation: int, qkv: list[Tensor], tile: int = 8) -> Call:
    """Compiled flex attention over tokens in tiles, dilation groups in the batch.

    A block of 64 tokens is then one tile, as in natten's flex backend: raster order would waste
    most of each block. The reordering is not timed.
    """
    side = -(-shape.length // (tile * dilation)) * tile  # places of a group, padded to tiles

    def permuted(t: Tensor) -> Tensor:
        pad = side * dilation - shape.length
        t = torch.nn.functional.pad(t, (0, 0, 0, 0, 0, pad, 0, pad))
        n = side // tile
        t = t.view(len(t), n, tile, dilation, n, tile, dilation, *t.shape[-2:])
        t = t.permute(0, 3, 6, 7, 1, 4, 2, 5, 8)  # B, groups, H, tiles, places, D
        return t.reshape(-1, t.shape[3], side * side, t.shape[-1]).detach()

    lengths = [-(-(shape.length - g) // dilation) for g in range(dilation)]
    count = torch.tensor(lengths, device=qkv[0].device)
    k, n = shape.kernel, side // tile

    def seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        group = b % (dilation * dilation)
        inside = None
        for axis_group, shift, fine in ((group // dilation, n, tile), (group % dilation, 1, 1)):
            a, c = (i // tile**2 // shift % n * tile + i % tile**2 // fine % tile for i in (q, kv))
            last = count[axis_group] - k
            start = torch.minimum((a - k // 2).clamp(min=0), last)
            here = (c >= start) & (c < start + k)
            inside = here if inside is None else inside & here
        assert inside is not None
        return inside

    leaves = [permuted(t).requires_grad_(t.requires_grad) for t in qkv]
    batch, size = len(leaves[0]), side * side
    device = str(qkv[0].device)
    mask = create_block_mask(seen, batch, None, size, size, device=device, BLOCK_SIZE=64)
    torch._dynamo.reset()  # one kernel for one shape, not a slower one for all
    attend = torch.compile(flex_attention, dynamic=False)

    def call() -> Any:
        return attend(leaves[0], leaves[1], leaves[2], block_mask=mask)

    call.leaves = leaves  # type: ignore[attr-defined]
    return call


def _natten(shape: cases.Shape, dilation: int, qkv: list[Tensor]) -> Call | None:
    """What natten makes of these tensors, where it is installed (on a CPU flex, uncompiled)."""
    if importlib.util.find_spec("natten") is None:
        return None
    natten: Any = importlib.import_module("natten")
    return lambda: natten.na2d(*qkv, kernel_size=shape.kernel, dilation=dilation)


def _with_backward(call: Call, leaves: list[Tensor]) -> Call:
    def both() -> None:
        out: Any = call()
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return both


def _agrees(shape: cases.Shape, dilation: int, qkv: list[Tensor], backend: str) -> bool:
    """Values and gradients against the reference, in fp32, on a picture of at most 28 tokens."""
    length = min(shape.length, 28)
    small = [t[:, :length, :length].detach().float().requires_grad_() for t in qkv]
    step = min(dilation, length // shape.kernel)
    window = ([shape.kernel] * 2, [1, 1], [step] * 2, [False, False])
    args = (*small, None, None, None, *window, shape.dim**-0.5)
    results = []
    for out in (reference.neighborhood_attention(*args)[0],
                op.neighborhood_attention(*args, False, backend)[0]):  # fmt: skip
        results.append([out, *torch.autograd.grad(out.square().sum(), small)])
    close = (torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*results, strict=True))
    return all(close)


def _times(calls: dict[str, Call], rounds: int, clock: str, loaded: bool) -> dict[str, object]:
    """Median milliseconds of each contestant; a refusal of flex by its class.

    On a loaded machine, the 90th percentiles of dense and ours too.
    """
    refused: dict[str, object] = {}
    for name in list(calls):
        try:
            calls[name]()
        except (
            NotImplementedError,
            InductorError,
            torch._dynamo.exc.TorchDynamoException,
        ) as error:
            refused[name] = f"no: {type(error).__name__}"
            del calls[name]
    # natten's scores, a GB at 56 x 56, come and go with the memory of whoever is next.
    with timing.loaded(loaded):
        times = timing.interleaved(calls, rounds, clock=clock, settle="natten" in calls)
    found = timing.summary(times, "dense")
    late: dict[str, object] = {f"{x} p90": found[x]["p90"] for x in ("dense", "ours") if loaded}
    return {name: value["ms"] for name, value in found.items()} | refused | late


def _measured(
    shape: cases.Shape, dilation: int, direction: str, flex: bool, rounds: int, clock: str,
    device: str, dtype: torch.dtype, backend: str, loaded: bool,
) -> Row:  # fmt: skip
    gen = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.length, shape.length, shape.heads, shape.dim)
    grad = direction != "forward"
    qkv = [torch.randn(size, generator=gen).to(device, dtype).requires_grad_(grad) for _ in "qkv"]
    row: Row = {"case": f"{shape.length}²", "H": shape.heads, "d": shape.dim, "k": shape.kernel}
    row |= {"B": shape.batch} if shape.batch > 1 or shape in cases.SMALL_SHAPES else {}
    row |= {"dilation": dilation, "direction": direction}
    row["agree"] = _agrees(shape, dilation, qkv, backend)
    if not row["agree"]:
        return row | dict.fromkeys(("dense ms", "flex ms", "natten ms", "ms", "dense / ours"), "-")
    calls = {"dense": _dense(qkv), "ours": _ours(shape, dilation, qkv, backend)}
    refused = grad and device == "cpu"  # flex, natten's too: "does not support backward on CPU"
    if flex and not refused:
        calls["flex"] = _flex(shape, dilation, qkv)
    natten, without = None, "-"
    if flex:
        natten = _natten(shape, dilation, qkv)
        without = "not installed" if natten is None else "no backward"
    if natten is not None and not refused:
        if torch.allclose(torch.as_tensor(natten()), torch.as_tensor(calls["ours"]()), 1e-2, 1e-3):
            calls["natten"] = natten
        else:
            without = "disagrees"
    if grad:
        leaves = {name: getattr(call, "leaves", qkv) for name, call in calls.items()}
        calls = {name: _with_backward(call, leaves[name]) for name, call in calls.items()}
    ms = _times(calls, rounds, clock, loaded)
    row |= {
        "dense ms": ms["dense"],
        "flex ms": ms.get("flex", "no backward" if refused else "-"),
        "natten ms": ms.get("natten", without),
        "ms": ms["ours"],
    }
    row["dense / ours"] = float(str(ms["dense"])) / float(str(ms["ours"]))
    if loaded:
        row |= {"dense p90 ms": ms["dense p90"], "p90 ms": ms["ours p90"]}
    return row


def floor(row: Row, width: int, bandwidth: float, rate: float) -> dict[str, object]:
    """Least milliseconds: tensors moved once (GB/s), the neighbours' products done (TFLOP/s)."""
    n, h, d = int(str(row["case"])[:-1]) ** 2, int(str(row["H"])), int(str(row["d"]))
    n *= int(str(row.get("B", 1)))
    products, tensors = (2, 4) if row["direction"] == "forward" else (7, 12)
    moved = tensors * n * h * d * width / bandwidth / 1e6
    worked = products * 2 * n * h * d * int(str(row["k"])) ** 2 / rate / 1e9
    return {"floor bytes ms": moved, "floor operations ms": worked}


def run(
    rounds: int = 5,
    threads: int = 2,
    shapes: Iterable[cases.Shape] = cases.BENCH_SHAPES,
    clock: str = "wall",
    flex: bool = True,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    loaded: bool = False,
) -> list[Row]:
    """One row per shape, dilation and direction; times are missing where results disagree."""
    backend = "triton" if device == "cuda" else "torch"
    with timing.threads(threads):
        return [
            _measured(
                shape, dilation, direction, flex, rounds, clock, device, dtype, backend, loaded
            )
            for shape in shapes
            for dilation in shape.dilations
            for direction in ("forward", "forward + backward")
        ]


def main() -> int:
    """Print the table; exit 1 if any result disagrees."""
    made = options.parser(__doc__, rounds=5)
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    made.add_argument("--no-flex", action="store_true", help="leave flex_attention and natten out")
    made.add_argument("--sides", type=int, nargs="+", help="sides of the pictures; default all")
    made.add_argument("--kernels", type=int, nargs="+", help="kernel sizes; default all")
    made.add_argument("--dims", type=int, nargs="+", help="head dims; default all")
    made.add_argument("--small", action="store_true", help="pictures of 7 to 28 tokens a side")
    made.add_argument("--loaded", action="store_true", help="beside a busy loop on each core")
    made.add_argument("--bandwidth", type=float, help="GB/s of the device, for the floor")
    made.add_argument("--rate", type=float, help="TFLOP/s of the device, for the floor")
    args = options.read(made)
    on_gpu = args.device == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    shapes = GPU_SHAPES if on_gpu else cases.BENCH_SHAPES
    shapes = cases.SMALL_SHAPES if args.small else shapes
    wanted = ((args.sides, "length"), (args.kernels, "kernel"), (args.dims, "dim"))
    for values, name in wanted:
        shapes = tuple(s for s in shapes if not values or getattr(s, name) in values)
    rows = run(
        args.rounds, args.threads, shapes, args.clock, not args.no_flex, args.device, dtype,
        args.loaded,
    )  # fmt: skip
    if args.bandwidth and args.rate:
        rows = [row | floor(row, dtype.itemsize, args.bandwidth, args.rate) for row in rows]
    about = results.machine(args.device, args.threads)
    about |= {"rounds": args.rounds, "clock": args.clock, "dtype": str(dtype)}
    results.show(rows, about, args.csv)
    return int(not all(row["agree"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
