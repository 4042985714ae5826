# SPDX-License-Identifier: Apache-2.0
"""`visprune bench cache`: peak memory, bytes and time per token of long prompts, at the cache.

A picture of 2,916 tokens and a clip of 16 frames (3,137 tokens), random weights: what is measured
is what methods cost and save, not what they answer. Methods take turns with the untouched model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of
from visprune.catalog import get_method, list_methods, methods, parameters
from visprune.core.method import PruningMethod
from visprune.errors import ConfigError, did_you_mean
from visprune.eval.environment import set_threads
from visprune.eval.speed import ideal
from visprune.eval.speed.bench_prefill import parser as prefill_parser
from visprune.eval.speed.bench_prefill import publish
from visprune.eval.speed.memory import Peak
from visprune.machine.choose import now
from visprune.machine.plan import acts_on_cache
from visprune.machine.run import prune

__all__ = ["DENSE", "KINDS", "main", "measure"]

DENSE = "none"
# One method of each kind, and what is the same of all heads or layers.
KINDS = {
    "tova": "drop, one set a layer",
    "snapkv": "drop, a set each head",
    "pyramidkv": "drop, more in early layers",
    "adakv": "drop, heads of their own length",
    "h2o": "drop, by all queries",
    "look_m": "merge",
    "think": "drop, and channels of keys",
    "kvquant": "codes of 4 bits",
    "zipcache": "codes of 4 and 2 bits",
    "actqkv": "keep all, read few blocks",
}
FRAMES, POOLED = 16, 14  # of the clip; 27 x 27 patches of a frame become 14 x 14 tokens
_VIDEO = 5  # placeholder id


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark as the options say; print a table, write CSV and JSON."""
    options = _parser().parse_args(argv)
    before = torch.get_num_threads()
    try:
        set_threads(options.threads)
        rows: list[dict[str, Any]] = []
        for name in options.prompts:
            model, inputs = _build(name, options)
            rows += measure(
                model,
                inputs,
                name,
                options.methods,
                keep_ratio=options.keep_ratio,
                new_tokens=4 if options.quick else options.new_tokens,
                rounds=1 if options.quick else options.rounds,
            )
            del model, inputs
        publish(_table(rows), rows, options, "cache", ", ".join(options.prompts), note="")
    finally:
        torch.set_num_threads(before)


def _parser() -> argparse.ArgumentParser:
    made = prefill_parser("cache")
    made.description = __doc__.split("\n")[0]
    add = made.add_argument
    add("--prompts", nargs="+", choices=["picture", "clip"], default=["picture", "clip"])
    add("--keep-ratio", type=float, default=0.1, help="of the visual slots, where a method drops")
    add("--new-tokens", type=int, default=24, help="tokens that are timed one by one")
    made.set_defaults(methods=list(KINDS), rounds=2)
    for action in made._actions:
        if action.dest == "methods":
            action.choices, action.help = None, f"default: {', '.join(KINDS)}"
    return made


def _build(name: str, options: argparse.Namespace) -> tuple[Any, dict[str, Tensor]]:
    where = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    if name == "picture":
        shape = "quick" if options.quick else "wide"
        model = ideal.build(shape, **where)
        return model, ideal.prompt(model, shape, options.batch)
    model = clip_model(**where, quick=options.quick)
    return model, clip_prompt(model, options.batch, quick=options.quick)


def clip_model(*, device: str, dtype: torch.dtype, quick: bool = False) -> Any:
    """A LLaVA-OneVision with a decoder of the size of the other benchmarks', and four key heads."""
    vision = SiglipVisionConfig(
        hidden_size=32 if quick else 256, intermediate_size=64 if quick else 1024,
        num_hidden_layers=2 if quick else 6, num_attention_heads=4,
        image_size=64 if quick else 384, patch_size=14,
    )  # fmt: skip
    text = Qwen2Config(
        hidden_size=64 if quick else 1024, intermediate_size=128 if quick else 2752,
        num_hidden_layers=4 if quick else 12, num_attention_heads=4 if quick else 16,
        num_key_value_heads=2 if quick else 4, vocab_size=200 if quick else 32000,
        max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=3, video_token_index=_VIDEO,
        vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return LlavaOnevisionForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def clip_prompt(model: Any, batch: int, *, quick: bool = False) -> dict[str, Tensor]:
    """Random text around one random clip."""
    frames, side, pooled = (3, 64, 2) if quick else (FRAMES, 384, POOLED)
    generator = torch.Generator().manual_seed(1)
    high = model.config.get_text_config().vocab_size
    ids = torch.randint(6, high, (batch, 40), generator=generator)
    clip = torch.full((batch, frames * pooled * pooled + 1), _VIDEO)  # one newline behind it
    ids = torch.cat([ids[:, :5], clip, ids[:, 5:]], dim=1)
    pixels = torch.randn(batch, frames, 3, side, side, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values_videos": pixels.to(model.device, model.dtype),
    }


@dataclass
class _Taken:
    """What one case took, by round.

    Attributes:
        prefill: seconds.
        tokens: seconds of each token, of all rounds.
        peak: most bytes while the prompt was read.
        stored: bytes of keys and values behind it.
        allocated: bytes of all that stores them.
        form: how layers store them.
    """

    prefill: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    stored: int = 0
    allocated: int = 0
    form: str = "whole"


def measure(
    model: Any, inputs: dict[str, Tensor], prompt: str, names: Sequence[str], *,
    keep_ratio: float, new_tokens: int, rounds: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Read the prompt and generate under every method, and under none.

    Raises:
        ConfigError: an unknown name, or a method that does not act at the cache.
    """
    known = [n for n in list_methods() if acts_on_cache(methods.get(n))]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{name!r} does not act at the cache.{did_you_mean(name, known)} Known: "
                f"{', '.join(known)}."
            )
    cases: dict[str, PruningMethod | None] = {DENSE: None}
    cases |= {name: _chosen(name, keep_ratio) for name in names}
    found = {name: _Taken() for name in cases}
    with Progress(transient=True) as bars, torch.inference_mode():
        bar = bars.add_task("taking turns", total=len(cases) * rounds)
        for number in range(rounds):
            for name in list(cases)[:: -1 if number % 2 else 1]:
                _once(model, inputs, cases[name], new_tokens, found[name])
                bars.advance(bar)
    dense, length = found[DENSE], int(inputs["input_ids"].shape[1])
    return [_row(prompt, length, name, taken, dense) for name, taken in found.items()]


def _chosen(name: str, keep_ratio: float) -> PruningMethod:
    """A method that drops at the share, one that stores or reads otherwise as it is."""
    plain = getattr(methods.get(name), "decides", False) and name != "think"
    if plain or "keep_ratio" not in parameters(name):
        return get_method(name)
    return get_method(name, keep_ratio=keep_ratio)


@contextmanager
def _attached(model: Any, method: PruningMethod | None) -> Iterator[Any]:
    with nullcontext() if method is None else prune(model, method) as run:
        yield run


def _once(
    model: Any, inputs: dict[str, Tensor], method: PruningMethod | None, new_tokens: int,
    taken: _Taken,
) -> None:  # fmt: skip
    """One prompt and so many tokens."""
    with _attached(model, method) as run:
        peak = Peak(model.device)
        begin = now(model.device)
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        taken.prefill.append(now(model.device) - begin)
        if (most := peak.nbytes) is not None:
            taken.peak.append(most)
        cache, token = cache_of(out), out.logits[:, -1:].argmax(-1)
        trace = None if run is None else run.trace.cache
        if trace is None:
            taken.stored = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
            taken.allocated = taken.stored
        else:
            taken.stored = sum(trace.bytes_of(row) for row in range(len(token)))
            taken.allocated = sum(trace.allocated)
            taken.form = ", ".join(dict.fromkeys(trace.form))
        del out
        for _ in range(new_tokens):
            begin = now(model.device)
            out = model(input_ids=token, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            taken.tokens.append(now(model.device) - begin)


def _row(prompt: str, length: int, name: str, taken: _Taken, dense: _Taken) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "tokens": length,
        "method": name,
        "kind": "untouched" if name == DENSE else KINDS.get(name, ""),
        "form": taken.form,
        "cache_bytes": taken.stored,
        "cache_share": taken.stored / dense.stored,
        "allocated_bytes": taken.allocated,
        "peak_bytes": max(taken.peak) if taken.peak else "",
        "prefill_ms": 1e3 * median(taken.prefill),
        "ms_per_token": 1e3 * median(taken.tokens),
        "speedup": median(dense.tokens) / median(taken.tokens),
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Long prompts: peak memory while the prompt is read (beside the model's "
                        "own), bytes of the cache, time", title_justify="left")  # fmt: skip
    for name in ("prompt", "method", "stored as"):
        table.add_column(name)
    for name in ("peak MiB", "cache MiB", "of dense", "prefill ms", "ms/token", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        peak = f"{row['peak_bytes'] / 2**20:.0f}" if row["peak_bytes"] != "" else ""
        table.add_row(
            f"{row['prompt']}, {row['tokens']}", row["method"], row["form"], peak,
            f"{row['cache_bytes'] / 2**20:.1f}", f"{100 * row['cache_share']:.1f} %",
            f"{row['prefill_ms']:.0f}", f"{row['ms_per_token']:.2f}", f"{row['speedup']:.2f}x",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
