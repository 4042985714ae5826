# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend on what they are for, not on what was drawn before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["AUGMENT", "LIMIT", "MIX", "ORDER", "seed_of", "seeded"]

ORDER, AUGMENT, MIX, LIMIT = range(4)  # streams of random numbers that must not meet


def seed_of(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed the three generators that timm's transforms draw from; put them back afterwards."""
    seed = seed_of(*numbers)
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])
