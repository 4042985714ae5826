# SPDX-License-Identifier: Apache-2.0
"""`visprune bench --draw neighborhood_attention`: draw which keys a query sees.

The picture is taken from the operator itself, by its gradient: a key is seen by a query exactly
if the query's output moves with the key's value.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from visprune import ops
from visprune.errors import ConfigError
from visprune.ops.check import per_axis

__all__ = ["draw", "main", "seen_keys"]

_COLOURS = ListedColormap(["#F2F2F2", "#56B4E9", "#D55E00"])  # not seen, seen, the query
_CROSS = "\N{MULTIPLICATION SIGN}"
_ENDINGS = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Window:
    """The picture's side lengths and the parameters of the window, one value for each axis."""

    size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    def __str__(self) -> str:
        """One line for the title."""
        words = [f"kernel {_short(self.kernel_size)}", f"dilation {_short(self.dilation)}"]
        if set(self.stride) != {1}:
            words.append(f"stride {_short(self.stride)}")
        if any(self.is_causal):
            axes = ", ".join(str(i) for i, flag in enumerate(self.is_causal) if flag)
            words.append(f"causal on axis {axes}")
        return f"{_CROSS.join(map(str, self.size))} tokens, {', '.join(words)}"


def _short(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else _CROSS.join(map(str, values))


def seen_keys(window: Window, query: Sequence[int]) -> np.ndarray:
    """Keys that the query at this position sees: bool of shape ``window.size``."""
    values = torch.zeros(1, *window.size, 1, 1, requires_grad=True)
    count = int(np.prod(window.kernel_size))
    params = (window.kernel_size, window.stride, window.dilation, window.is_causal)
    out = ops.na_av(torch.ones(1, *window.size, 1, count), values, *params)
    (grad,) = torch.autograd.grad(out[(0, *query)].sum(), values)
    return (grad[0, ..., 0, 0] != 0).numpy()


def draw(window: Window, queries: Sequence[Sequence[int]], out: str | Path) -> Path:
    """Draw a panel for each query: its keys blue, itself orange. Planes of 3-D go side by side.

    Args:
        window: size and parameters.
        queries: positions, one number for each axis.
        out: file to write; its ending gives the format.

    Returns:
        The file.

    Raises:
        ConfigError: parameters that do not fit the size, a position outside, an unknown ending.
    """
    target = Path(out)
    if target.suffix.lower() not in _ENDINGS:
        raise ConfigError(f"--out must end in {', '.join(_ENDINGS)}; got {str(target)!r}.")
    for query in queries:
        inside = (0 <= i < n for i, n in zip(query, window.size, strict=False))
        if len(query) != len(window.size) or not all(inside):
            raise ConfigError(
                f"--query takes {len(window.size)} numbers, each at least 0 and below the size "
                f"{_CROSS.join(map(str, window.size))}; got {list(query)}."
            )
    rank = len(window.size)
    planes = window.size[0] if rank == 3 else 1
    height, width = (1, *window.size)[-2:]
    scale = 2.6 / max(height, width)
    columns = planes if rank == 3 else min(len(queries), 3) if rank == 2 else 1
    rows = -(-len(queries) * planes // columns)
    figure = Figure(
        figsize=(columns * (width * scale + 0.5) + 0.4, rows * (height * scale + 0.5) + 0.6),
        dpi=150, layout="constrained",
    )  # fmt: skip
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for query in queries:
        seen = seen_keys(window, query).reshape(planes, height, width)
        place = (0,) * (3 - rank) + tuple(query)
        for plane, grid in enumerate(seen):
            shown = grid.astype(int)
            if plane == place[0]:
                shown[place[1], place[2]] = 2
            where = f", plane {plane}" if rank == 3 else ""
            _panel(next(axes), shown, f"query {', '.join(map(str, query))}{where}")
    for spare in axes:
        spare.set_axis_off()
    figure.suptitle(str(window), fontsize=10)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def _panel(axes: Axes, shown: np.ndarray, title: str) -> None:
    axes.imshow(shown, cmap=_COLOURS, vmin=0, vmax=2)
    height, width = shown.shape
    axes.set_xticks(np.arange(-0.5, width), minor=True)
    axes.set_yticks(np.arange(-0.5, height), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(which="both", length=0, labelsize=6)
    axes.set_title(title, fontsize=8)


def _default_queries(size: Sequence[int]) -> list[tuple[int, ...]]:
    """A corner, the middle of a border, the middle."""
    middle = tuple(n // 2 for n in size)
    return list(dict.fromkeys([(0,) * len(size), (0, *middle[1:]), middle]))


def main() -> int:
    """Read the command line, draw, print where and how many keys each query sees."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs="+", help="tokens per axis; default 20 20")
    parser.add_argument("--kernel-size", type=int, nargs="+", default=[7])
    parser.add_argument("--stride", type=int, nargs="+", default=[1])
    parser.add_argument("--dilation", type=int, nargs="+", default=[1])
    parser.add_argument("--causal", type=int, nargs="*", default=[], metavar="AXIS")
    parser.add_argument("--query", type=int, nargs="+", action="append", metavar="POSITION")
    parser.add_argument("--out", type=Path, default=Path("neighborhood.png"))
    args = parser.parse_args()
    least = [k * d for k, d in zip(args.kernel_size, args.dilation, strict=False)]
    size = tuple(args.size or [max(20, *least)] * 2)
    if len(size) > 3:
        raise ConfigError(f"--size takes one to three numbers; got {list(size)}.")
    rank = len(size)
    numbers = {
        name: tuple(per_axis("--draw", name, value[0] if len(value) == 1 else value, rank))
        for name, value in (
            ("kernel_size", args.kernel_size), ("stride", args.stride), ("dilation", args.dilation)
        )
    }  # fmt: skip
    if not set(args.causal) <= set(range(len(size))):
        raise ConfigError(f"--causal takes axes 0 to {len(size) - 1}; got {args.causal}.")
    causal = tuple(axis in args.causal for axis in range(len(size)))
    window = Window(size, **numbers, is_causal=causal)
    queries = args.query or _default_queries(size)
    target = draw(window, queries, args.out)
    for query in queries:
        print(f"query {', '.join(map(str, query))}: {int(seen_keys(window, query).sum())} keys")
    print(f"Drawn: {target}")
    return 0
