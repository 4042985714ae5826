# SPDX-License-Identifier: Apache-2.0
"""The samples that the page lets a reader look at: which ones, what was answered, the pictures."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from visprune.eval.report.read import Line, Outcome, Results, box_of

__all__ = ["Chosen", "choose", "pictures", "read_samples"]

_SIDE, _QUALITY = 320, 80  # of the copies in the page: about 15 kB each
_TEXT = 600  # characters of an answer or a question that the page shows
_PICTURE_BYTES = 6_000_000  # of all pictures together, as base64
_NAME = re.compile(r"[0-9a-f]{1,64}")


@dataclass(frozen=True)
class Chosen:
    """The samples of one task that the page shows.

    Attributes:
        task: title of the task.
        about: the task with its options, seed included, as text; further seeds are not shown.
        names: ids, in the order of the records.
        of: how many samples there are.
        failed: chosen since some method failed or could not be read on them.
        disagree: chosen since methods answered differently.
    """

    task: str
    about: str
    names: Sequence[str]
    of: int
    failed: int
    disagree: int


def choose(task: str, outcomes: Sequence[Outcome], limit: int) -> Chosen:
    """Choose up to ``limit`` samples: some that failed, half where methods disagree, the rest any.

    Within each group a hash of the id decides: the choice is the same every time and knows nothing
    of who was right.

    Args:
        task: title of the task.
        outcomes: all of it.
        limit: how many samples at most.
    """
    about = outcomes[0].task
    outcomes = [outcome for outcome in outcomes if outcome.task == about]
    answers: dict[str, list[Line]] = {}
    for outcome in outcomes:
        for name, line in outcome.lines.items():
            answers.setdefault(name, []).append(line)
    order = sorted(answers, key=lambda name: hashlib.sha256(name.encode(errors="replace")).digest())
    failed = [n for n in order if any(line.error or line.answer is None for line in answers[n])]
    failed = failed[: max(1, limit // 6)] if len(order) > limit else []
    open_ = [name for name in order if name not in set(failed)]
    differ = [n for n in open_ if len({line.answer for line in answers[n]}) > 1]
    differ = differ[: limit // 2] if len(order) > limit else []
    taken = {*failed, *differ}
    rest = [name for name in order if name not in taken][: max(0, limit - len(taken))]
    names = sorted({*taken, *rest}) if limit else []
    return Chosen(task, about, names, len(order), len(failed), len(differ))


def read_samples(
    results: Results, chosen: Sequence[Chosen], arms: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Read the chosen samples once more, whole, with the answer of every arm.

    Args:
        results: the folder.
        chosen: which samples.
        arms: number of the arm of each cell; of an arm's seeds the first is shown.

    Returns:
        In the order of ``chosen``: ``{"task", "id", "question", ... "got": {arm: answer}}``.
    """
    tasks = {outcome.cell.id: outcome.task for outcome in results.outcomes}
    wanted: dict[tuple[str, str], dict[str, Any]] = {
        (group.about, name): {"task": number, "id": name, "got": {}}
        for number, group in enumerate(chosen) for name in group.names
    }  # fmt: skip
    rank = {outcome.cell.id: place for place, outcome in enumerate(results.outcomes)}
    best: dict[tuple[str, str, int], tuple[bool, int]] = {}
    for values in results.folder.lines():
        cell, name = str(values["cell"]), str(values["sample"])
        sample = wanted.get((tasks.get(cell, ""), name))
        if sample is None:
            continue
        if "question" not in sample:
            sample |= _asked(values)
        # A line without an error before one with; then the cell that comes first.
        place = (bool(values.get("error")), rank[cell])
        key = (tasks[cell], name, arms[cell])
        if key not in best or place < best[key]:
            best[key] = place
            sample["got"][arms[cell]] = _answered(values)
    return list(wanted.values())


def _short(value: Any, limit: int = _TEXT) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} more characters)"


def _asked(values: Mapping[str, Any]) -> dict[str, Any]:
    listed = {name: values.get(name) for name in ("answers", "choices")}
    picture = values.get("picture")
    return {
        "question": _short(values.get("question") or ""),
        "prompt": _short(values.get("prompt") or "", 2 * _TEXT),
        "kind": str(values.get("kind") or ""),
        "cluster": _short(values.get("cluster") or "", 120),
        "picture": picture if isinstance(picture, str) and _NAME.fullmatch(picture) else None,
        **{
            name: [_short(x, 120) for x in found[:30]] if isinstance(found, list) else []
            for name, found in listed.items()
        },
    }


def _answered(values: Mapping[str, Any]) -> dict[str, Any]:
    error, answer, text = (values.get(name) for name in ("error", "answer", "text"))
    got: dict[str, Any] = {}
    if error:
        about = error if isinstance(error, dict) else {"type": "error", "message": error}
        got["error"] = _short(f"{about.get('type')}: {about.get('message')}")
    if answer is not None:
        got["answer"] = _short(answer)
    if text is not None and text != answer:
        got["text"] = _short(text)
    for name in ("score", "tokens"):
        value = values.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            got[name] = value
    beyond = values.get("beyond")
    if isinstance(beyond, int) and beyond > 0:
        got["beyond"] = beyond
    if values.get("rule"):
        got["rule"] = _short(values["rule"], 60)
    kept = _kept(values.get("kept"))
    return {**got, "kept": kept} if kept else got


def _kept(value: Any) -> list[Any]:
    """Return ``[rows, columns, bits, grids, box]``, empty where nothing was noted.

    Of the untouched model the box alone is noted, where it saw a part: no rows, no columns. A
    picture cut into tiles has several grids; the record's own is that of the whole picture. The
    box says where the grid lies, in fractions of the picture; ``None``: it covers it.
    """
    if not isinstance(value, dict):
        return []
    grid, bits, regions = value.get("grid"), value.get("kept"), value.get("regions")
    box = box_of(value)
    if grid is None and box is not None:
        return [0, 0, "", 1, box]
    if not (isinstance(grid, list) and len(grid) == 2 and isinstance(bits, str)):
        return []
    if not all(isinstance(side, int) and 0 < side <= 512 for side in grid):
        return []
    grids = len(regions) if isinstance(regions, list) else 1
    return [*grid, bits[:65536], grids, box]


def pictures(results: Results, samples: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return data URIs of the samples' pictures by name, small copies, within the page's budget.

    Tasks take turns, so that the budget runs out for all of them alike.
    """
    by_task: dict[int, list[str]] = {}
    for sample in samples:
        if sample.get("picture"):
            by_task.setdefault(sample["task"], []).append(sample["picture"])
    found: dict[str, str] = {}
    spent, turn = 0, 0
    longest = max(map(len, by_task.values()), default=0)
    while turn < longest and spent < _PICTURE_BYTES:
        for names in by_task.values():
            if turn < len(names) and names[turn] not in found:
                uri = _data_uri(results, names[turn])
                if uri is not None and spent + len(uri) <= _PICTURE_BYTES:
                    found[names[turn]] = uri
                    spent += len(uri)
        turn += 1
    return found


def _data_uri(results: Results, name: str) -> str | None:
    """A picture as JPEG of at most 320 pixels; ``None`` where there is none, or it is damaged."""
    path = results.folder.picture(name)
    if path is None:
        return None
    try:
        with Image.open(path) as opened:
            small = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    small.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
