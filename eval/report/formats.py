# SPDX-License-Identifier: Apache-2.0
"""Numbers and hostile text as Markdown, LaTeX, CSV and JSON want them."""

from __future__ import annotations

import json
import math
import re
from typing import Any

__all__ = ["csv_text", "figure", "html_json", "latex", "markdown", "rounded", "scale"]

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "_": r"\_", "%": r"\%", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def figure(value: tuple[float, float, float] | None, *, digits: int = 1, sign: bool = False) -> str:
    """``"91.5 [89.0, 93.6]"``, or an empty text."""
    if value is None or not math.isfinite(value[0]):
        return ""
    form = f"{'+' if sign else ''}.{digits}f"
    # Adding zero turns a rounded minus zero into zero.
    middle, low, high = (format(round(x, digits) + 0.0, form) for x in value)
    return f"{middle} [{low}, {high}]" if math.isfinite(value[1]) else middle


def scale(values: list[float]) -> tuple[float, str]:
    """Return divisor and prefix that bring the largest of ``values`` to 1 .. 999."""
    most = max(values, default=0.0)
    return next(((size, name) for size, name in _UNITS if most >= size), (1.0, ""))


def one_line(text: str) -> str:
    """Text without line ends and control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, in a table cell too."""
    return re.sub(r"([\\`*_\[\]<>|&~])", r"\\\1", one_line(text))


def latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(_LATEX.get(c, c) for c in one_line(text))


def csv_text(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    line = one_line(text)
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


def html_json(value: Any) -> str:
    """JSON for inside ``<script type="application/json">``: no ``<`` that could end it.

    A non-finite number becomes ``null``; ASCII only, so that half a surrogate pair harms nothing.
    """
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def rounded(value: float | None, digits: int = 6) -> float | None:
    """A number with that many significant digits: bytes of the page, not of precision."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")
