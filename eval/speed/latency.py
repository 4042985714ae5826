# SPDX-License-Identifier: Apache-2.0
"""Time several things side by side, so that what slows the machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from visprune.errors import ConfigError

__all__ = ["Case", "Timings", "interleaved", "synchronize"]


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        name: unique among the cases.
        run: what is timed; it gets the number of the round, so rounds may use other inputs.
        around: entered before and left after each timed run, outside the time (attach a method).
    """

    name: str
    run: Callable[[int], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Timings:
    """Seconds by case name; entry i of every list was taken in round i."""

    seconds: dict[str, list[float]]

    def median_ms(self, name: str) -> float:
        """Median time of a case in milliseconds."""
        return 1e3 * median(self.seconds[name])

    def iqr_ms(self, name: str) -> float:
        """Distance between the quartiles in milliseconds."""
        quartiles = torch.tensor(self.seconds[name]).quantile(torch.tensor([0.25, 0.75]))
        return 1e3 * float(quartiles[1] - quartiles[0])

    def ratio(self, name: str, other: str) -> float:
        """Median over rounds of time(name) / time(other): a drift of the machine cancels."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return median(a / b for a, b in pairs)


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    cases: Sequence[Case],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    after: Callable[[Case, int, Any], None] | None = None,
    settle: bool = False,
) -> Timings:
    """Run every case once per round, even rounds through the list forwards, odd ones backwards.

    So cases that are neighbours in the list are timed next to each other, each first half of the
    time, and a steady drift within a round cancels.

    Args:
        cases: what to time.
        rounds: timed runs of each case.
        warmup: untimed rounds before.
        device: where they run.
        after: called with the case, the round and what it returned, outside the time; the number
            of a warm-up round is negative.
        settle: run each once more before it is timed, as one that has just been attached and runs
            for the first time since another had the machine is no model that answers all day.

    Raises:
        ConfigError: no case, a name twice, or no round.
    """
    names = [case.name for case in cases]
    if not cases or len(set(names)) != len(names) or rounds < 1 or warmup < 0:
        raise ConfigError(
            f"interleaved takes cases of different names and at least one round; got "
            f"{', '.join(names) or 'no case'}, rounds={rounds}, warmup={warmup}."
        )
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for case in cases[:: -1 if number % 2 else 1]:
            with case.around():
                if settle:
                    case.run(max(number, 0))
                taken, result = _timed(case, max(number, 0), device)
            if number >= 0:
                seconds[case.name].append(taken)
            if after is not None:
                after(case, number, result)
    return Timings(seconds)


def _timed(case: Case, turn: int, device: torch.device | str) -> tuple[float, Any]:
    synchronize(device)
    begin = time.perf_counter()
    result = case.run(turn)
    synchronize(device)
    return time.perf_counter() - begin, result
