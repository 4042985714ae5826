# SPDX-License-Identifier: Apache-2.0
"""The command line that the benches of all kernels share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .timing import CLOCKS


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """``--rounds``, ``--threads``, ``--device``, ``--clock`` and ``--csv``.

    The device is CUDA where there is one, and there the clock is that of captured graphs: a call
    of some microseconds would be the launch's own time otherwise.
    """
    cuda = torch.cuda.is_available()
    made = argparse.ArgumentParser(description=doc)
    made.add_argument("--rounds", type=int, default=20 if cuda else rounds)
    made.add_argument("--threads", type=int, default=2, help="CPU threads")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    made.add_argument(
        "--clock",
        choices=CLOCKS,
        default="graph" if cuda else "wall",
        help="wall; cpu: processor time of one thread; graph: a CUDA graph of the call, replayed",
    )
    made.add_argument("--csv", type=Path, help="add the rows to this file")
    return made


def read(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse; refuse a clock that the device has not."""
    args = made.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: there is no CUDA device here.")
    if args.clock == "graph" and args.device != "cuda":
        made.error("--clock graph needs --device cuda; on a CPU take wall or cpu.")
    return args
