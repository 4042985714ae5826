# SPDX-License-Identifier: Apache-2.0
"""``python -m visprune.train CONFIG --out DIR [--resume] [KEY=VALUE ...]``."""

from __future__ import annotations

import argparse
import sys

import yaml

from visprune.errors import VispruneError
from visprune.train.start import train


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and train.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(prog="visprune.train", description="Train from a recipe.")
    parser.add_argument("config", help="recipe, a YAML file")
    parser.add_argument("--out", required=True, help="folder for checkpoints and weights")
    parser.add_argument("--resume", action="store_true", help="go on from OUT's checkpoints")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE, keys dotted: decoder.steps=100")
    args = parser.parse_intermixed_args(argv)
    pairs = [item.partition("=") for item in args.overrides]
    try:
        train(args.config, args.out, {k: yaml.safe_load(v) for k, _, v in pairs}, args.resume)
    except VispruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
