# SPDX-License-Identifier: Apache-2.0
"""Tiny random vision-language models of every family, built from configs: nothing is downloaded."""

from tests.families.tiny import (
    both_ways,
    gemma,
    hybrid,
    inside,
    llava_line,
    marked,
    others,
    qwen,
    windows,
)
from tests.families.tiny.parts import FAMILIES, IMAGE, VIDEO, build, inputs

__all__ = [
    "FAMILIES",
    "IMAGE",
    "VIDEO",
    "both_ways",
    "build",
    "gemma",
    "hybrid",
    "inputs",
    "inside",
    "llava_line",
    "marked",
    "others",
    "qwen",
    "windows",
]
