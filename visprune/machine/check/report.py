# SPDX-License-Identifier: Apache-2.0
"""What a check found: a row a promise, and whether it is safe to prune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Largest difference, relative to the largest value, that sums in another order make of these.
_ROUNDING = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}

_RETRY = "Check in float32, or on a picture and a question that move the answer more."


def rounding(dtype: torch.dtype) -> float:
    """What a dtype allows by itself."""
    return _ROUNDING.get(dtype, 2e-2)


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the scale of what is wanted; infinite where not finite.

    Args:
        got: of any shape.
        want: of the same shape; places where it is not finite itself, or as low as words that a
            model never writes, are left out.
    """
    if got.shape != want.shape:
        return float("inf")
    there = torch.isfinite(want)
    if want.is_floating_point():  # a model may give words that it never writes the lowest number
        there &= want > torch.finfo(want.dtype).min / 2
    if not bool(there.any()):
        return 0.0
    got, want = got[there].double(), want[there].double()
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - want).abs().max()) / max(1.0, float(want.abs().max()))


@dataclass(frozen=True)
class Row:
    """One promise.

    Attributes:
        name: what was compared.
        found: the largest difference; ``None``: it was not checked, ``note`` says why.
        allowed: what the dtype allows, the model's own noise included.
        note: what there is to say of it.
        effect: how far dropping moves the same numbers: a difference is small beside this, or the
            comparison says nothing. ``None``: nothing was dropped.
    """

    name: str
    found: float | None
    allowed: float = 0.0
    note: str = ""
    effect: float | None = None

    @property
    def telling(self) -> bool:
        """Whether what is allowed is less than what a mistake would make."""
        return self.effect is None or self.effect > 2 * self.allowed

    @property
    def holds(self) -> bool | None:
        """Whether the promise is kept; ``None``: not checked, or it cannot be told apart."""
        if self.found is None:
            return None
        if not self.found <= self.allowed:
            return False
        return True if self.telling else None


@dataclass
class Report:
    """What a check found.

    Attributes:
        model: class and ``model_type``.
        setting: version, dtype, device and attention kernel.
        adapter: how the family is known.
        rows: the promises, in order.
        tokens: visual tokens per decoder layer of the first sample: whole, and pruned.
        cache: bytes of the key-value cache after the prompt: whole, and pruned.
        refused: why nothing could be run at all.
    """

    model: str
    setting: str
    adapter: str
    rows: list[Row] = field(default_factory=list)
    tokens: tuple[list[int], list[int]] = ((), ())  # type: ignore[assignment]
    cache: tuple[int, int] = (0, 0)
    refused: str = ""

    @property
    def first_failure(self) -> str | None:
        """The first thing that is not as promised, in a sentence; ``None``: there is none."""
        if self.refused:
            return self.refused
        for row in self.rows:
            if row.holds is False:
                size = f"differs by {row.found:.1e}, allowed are {row.allowed:.1e}"
                if row.found == float("inf"):
                    size = "has another shape, is not finite, or did not run"
                return f"{row.name}: {size}.{' ' + row.note if row.note else ''}"
        return None

    @property
    def safe(self) -> bool:
        """Whether every promise that could be checked is kept, dropping among them."""
        checked = any(row.holds and row.effect is not None for row in self.rows)
        return checked and self.first_failure is None

    def __str__(self) -> str:
        head = [f"{self.model}, {self.setting}", f"adapter: {self.adapter}", ""]
        if self.refused:
            return "\n".join([*head[:2], f"not safe to prune: {self.refused}"])
        lines = [*head, *_table(self.rows), ""]
        whole, pruned = self.tokens
        lines.append(f"visual tokens per decoder layer: {_runs(whole)} -> {_runs(pruned)}")
        if self.cache[0]:
            lines.append(
                f"key-value cache after the prompt: {_bytes(self.cache[0])} -> "
                f"{_bytes(self.cache[1])}"
            )
        return "\n".join([*lines, "", self.verdict])

    @property
    def verdict(self) -> str:
        """The last line: whether it is safe to prune, or the first thing that is not."""
        failure = self.first_failure
        if failure is not None:
            return f"not safe to prune: {failure}"
        left = [row for row in self.rows if row.holds is None]
        if not self.safe:
            why = "; ".join(f"{row.name}: {_why(row)}" for row in left) or "nothing was dropped"
            return f"not shown to be safe: {why}. {_RETRY}"
        but = "".join(f" (not checked: {row.name}, {_why(row)})" for row in left)
        return f"safe to prune{but}"


def _why(row: Row) -> str:
    if row.found is None:
        return row.note.rstrip(".")
    return f"dropping moves it by {row.effect:.1e} only, which rounding may hide"


def _table(rows: Sequence[Row]) -> list[str]:
    width = max(len(row.name) for row in rows)
    lines = [f"{'':<{width}}  {'largest':>9}  {'allowed':>9}  {'effect':>9}"]
    said = {True: "ok", False: "NOT", None: "-"}
    for row in rows:
        cells = [row.found, row.allowed if row.found is not None else None, row.effect]
        numbers = "  ".join(f"{_number(cell):>9}" for cell in cells)
        lines.append(f"{row.name:<{width}}  {numbers}  {said[row.holds]:<3} {row.note}".rstrip())
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def _runs(counts: Sequence[int]) -> str:
    """``[9, 9, 4, 4]`` as ``"9 x 2, 4 x 2"``."""
    found: list[list[int]] = []
    for count in counts:
        if found and found[-1][0] == count:
            found[-1][1] += 1
        else:
            found.append([count, 1])
    return ", ".join(f"{count} x {times}" for count, times in found) or "-"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
