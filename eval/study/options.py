# SPDX-License-Identifier: Apache-2.0
"""What a study can be told, written once: the keys of its YAML, their types, and their flags.

A new option is a field here (and what is done with it). Nothing heavy is imported: the command line
is made from this before anything runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FLAGS", "KEYS", "Flag", "Options"]


@dataclass(frozen=True)
class Flag:
    """An option of the command line.

    Attributes:
        kind: its type; a list can be given several times.
        help: a line about it.
        more: what else typer is told: ``min``, ``metavar``, ``show_default``.
    """

    kind: Any
    help: str
    more: Mapping[str, Any] = field(default_factory=dict)


def _flags(**flags: Flag) -> dict[str, Any]:
    """The flags that say a key or a part of it, as a field holds them."""
    return {"flags": flags}


def _flag(kind: Any, text: str, **more: Any) -> Flag:
    return Flag(kind, text, more)


_EVERY = "Of every model, whatever the study says."


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of a study; what they mean stands at :func:`visprune.eval.study.grid.build_study`.

    The types of those that are no ``Any`` are checked as they stand here.
    """

    name: str = field(default="", metadata=_flags())
    status: str = field(default="", metadata=_flags())
    models: Any = field(
        default=None,
        metadata=_flags(
            model=_flag(
                list[str],
                "embedded, a folder, a name on the Hub, timm:NAME or open_clip:NAME/PRETRAINED.",
            ),
            dtype=_flag(str, _EVERY, show_default="auto"),
            device=_flag(str, _EVERY, show_default="auto"),
            attention=_flag(str, "Attention of every model: sdpa, eager ..."),
            pad=_flag(
                bool,
                "Show pictures whole, in squares, as LLaVA's own evaluation does.",
                show_default="no-pad",
            ),
            engine=_flag(
                str,
                "What answers: transformers, or vllm, which batches questions.",
                show_default="transformers",
            ),
            engine_option=_flag(list[str], "KEY=VALUE of the engine vllm; repeat."),
        ),
    )
    tasks: Any = field(
        default=None,
        metadata=_flags(
            task=_flag(
                list[str],
                "A name from `visprune tasks`; repeat.",
                show_default="a standard set, reading and grounding in it",
            ),
            task_option=_flag(list[str], "KEY=VALUE of every task; repeat."),
        ),
    )
    methods: Any = field(
        default=None,
        metadata=_flags(
            method=_flag(
                list[str],
                "A name from `visprune methods`, with parameters (tome,r=13); repeat.",
                metavar="NAME[,KEY=VALUE...]",
            )
        ),
    )
    budgets: Any = field(
        default=None,
        metadata=_flags(
            num_keep=_flag(list[int], "Visual tokens to keep; repeat.", min=1),
            keep_ratio=_flag(list[float], "Fraction of tokens to keep; repeat."),
            num_keep_per_frame=_flag(
                list[int], "Visual tokens to keep for each frame of a clip; repeat.", min=1
            ),
        ),
    )
    limit: int | None = field(
        default=None,
        metadata=_flags(limit=_flag(int, "Samples of each task, whatever the study says.", min=1)),
    )
    seeds: Any = field(default=0, metadata=_flags(seed=_flag(list[int], "Seed; repeat.", min=0)))
    batch_size: int | None = field(
        default=None,
        metadata=_flags(
            batch_size=_flag(
                int,
                "Samples asked together.",
                min=1,
                show_default="1; 16 of a small model on the CPU, 64 of the engine vllm",
            )
        ),
    )
    controls: Any = field(
        default=True,
        metadata=_flags(
            controls=_flag(
                bool,
                "Also run the untouched model, keep_all, random, uniform, pool, no_image.",
                show_default="controls",
            )
        ),
    )
    speed: Any = field(
        default=None,
        metadata=_flags(speed=_flag(bool, "Measure latency by part.", show_default="no-speed")),
    )
    prompt_style: str | None = field(
        default=None, metadata=_flags(prompt_style=_flag(str, "llava15, chat or plain."))
    )
    generation: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=_flags(
            max_new_tokens=_flag(int, "Longest answer.", min=1, show_default="the task's")
        ),
    )
    turns: int | None = field(
        default=None,
        metadata=_flags(
            turns=_flag(
                int,
                "Questions of a picture on one cache, which the prompt of the first makes.",
                min=1,
                show_default="a prompt each",
            )
        ),
    )
    query_aware: bool = field(
        default=True,
        metadata=_flags(
            query_aware=_flag(
                bool,
                "Methods see the question; without, they cut a cache that ends with the picture.",
                show_default="query-aware",
            )
        ),
    )
    pictures: bool = field(
        default=True,
        metadata=_flags(
            pictures=_flag(bool, "Keep small copies of pictures.", show_default="pictures")
        ),
    )
    published: Any = field(default=None, metadata=_flags())


KEYS = tuple(f.name for f in dataclasses.fields(Options))
FLAGS: dict[str, Flag] = {
    name: flag for f in dataclasses.fields(Options) for name, flag in f.metadata["flags"].items()
}
