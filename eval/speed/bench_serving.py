# SPDX-License-Identifier: Apache-2.0
"""`visprune bench serving`: requests a second and time to the first token in vLLM.

Dense beside pruned, by clients that wait for their answers, in one engine and taking turns. What a
shorter prompt promises is measured there too: a prompt of words alone, as long as the pruned one,
and on top of it what the picture costs the dense model beyond as many words (reading, encoding; the
median over rounds).
No picture comes twice, and nothing is answered from a cache.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from rich.table import Table

from visprune.backbones.vlm.embedded import WEIGHTS, build_processor
from visprune.core.method import PruningMethod
from visprune.errors import ConfigError, VispruneError
from visprune.eval.environment import quiet_loading, set_threads
from visprune.eval.speed.bench_prefill import publish
from visprune.eval.speed.ideal import SHAPES, build
from visprune.eval.speed.latency import Case, Timings, interleaved
from visprune.serving.asked import METHOD, as_settings, read
from visprune.serving.engine import Prompt, check_installed
from visprune.serving.places import shown_layers, spec_of
from visprune.serving.stream import Arrived, Stream

__all__ = ["Asking", "main", "measure", "row"]

_TEXT = 40  # words of a prompt beside its picture
_SPECIAL = 8  # ids that stand for no word
DENSE, LONG, SHORT = "dense", "words, as many as dense", "words, as many as pruned"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark as the options say; print a table, write CSV and JSON."""
    options = _parser().parse_args(argv)
    check_installed("visprune bench serving", "")
    before = torch.get_num_threads()
    try:
        set_threads(None)
        with tempfile.TemporaryDirectory() as made:
            folder = WEIGHTS if options.quick else write(options.shape, Path(made), options.dtype)
            with closing(Stream(folder, dtype=options.dtype, options=_engine(options))) as stream:
                rows = measure(
                    stream, Asking(folder), options.methods, options.clients,
                    keep_ratio=options.keep_ratio, requests=options.requests,
                    new_tokens=options.new_tokens, rounds=options.rounds, warmup=options.warmup,
                )  # fmt: skip
        _report(rows, options)
    finally:
        torch.set_num_threads(before)


def _parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    made = argparse.ArgumentParser("visprune bench serving", description=__doc__.split("\n")[0])
    add = made.add_argument
    add("--shape", choices=[s for s in SHAPES if s != "quick"], default="small",
        help="7b: LLaVA-1.5-7B's sizes (14 GB are written for it)")  # fmt: skip
    add("--methods", nargs="+", default=["random", "divprune"], metavar="METHOD",
        help="methods that a server takes, see visprune serve-info")  # fmt: skip
    add("--keep-ratio", type=float, default=0.25, help="of the visual tokens, kept")
    add("--clients", type=int, nargs="+", default=[1, 4, 16], help="requests at once")
    add("--requests", type=int, default=2, help="of each client in a round")
    add("--new-tokens", type=int, default=16, help="of an answer")
    add("--rounds", type=int, default=3, help="timed runs of each case")
    add("--warmup", type=int, default=1, help="runs of each case before them")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        default="bfloat16" if cuda else "float32")  # fmt: skip
    add("--out", type=Path, default=Path("bench-out"), help="folder for CSV and JSON")
    add("--quick", action="store_true",
        help="the embedded model: shows that it runs, measures nothing")  # fmt: skip
    return made


def _engine(options: argparse.Namespace) -> dict[str, Any]:
    """How the engine is started, beside its defaults."""
    if torch.cuda.is_available():
        return {"max_num_seqs": max(options.clients)}
    # On a CPU vLLM takes nearly all of the memory unless it is told, and compiles for minutes.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    return {"max_num_seqs": max(options.clients), "enforce_eager": True}


def write(shape: str, folder: Path, dtype: str) -> Path:
    """Write a LLaVA of random weights and its processor.

    Args:
        shape: a key of ``SHAPES``.
        folder: where to.
        dtype: of the weights, a name of torch.

    Returns:
        The folder.
    """
    processor = build_processor((), image=SHAPES[shape].image, patch=SHAPES[shape].patch)
    model = build(shape, dtype=getattr(torch, dtype))
    model.config.image_token_id = processor.image_token_id
    with quiet_loading():
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class Asking:
    """Prompts for a model, no two of which hold the same picture.

    Args:
        folder: the model, a LLaVA whose mark of a picture is one token.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig

        self.config = AutoConfig.from_pretrained(folder, local_files_only=True)
        self._rng = np.random.default_rng(0)

    def __call__(self, settings: dict[str, Any]) -> Prompt:
        """One with a picture."""
        side = self.config.vision_config.image_size
        noise = self._rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        ids = self._words(_TEXT)
        ids.insert(5, self.config.image_token_id)
        return Prompt(ids, Image.fromarray(noise), settings)

    def words(self, length: int) -> Prompt:
        """One of words alone."""
        return Prompt(self._words(length), None, {})

    def method(self, name: str, keep_ratio: float) -> PruningMethod:
        """A method as the server runs it.

        Raises:
            ConfigError: unknown, or a budget that is none.
            UnsupportedModel: a server cannot prune by it.
        """
        given = {METHOD: name, f"{METHOD}_keep_ratio": keep_ratio}
        asked = read(given, {}, spec_of(self.config), shown_layers(self.config))
        assert asked is not None, "a method is named"
        return asked.method

    def _words(self, length: int) -> list[int]:
        return [int(n) for n in self._rng.integers(
            _SPECIAL, self.config.text_config.vocab_size, length)]  # fmt: skip


@dataclass
class Burst:
    """Prompts of one kind, all of which are sent in a timed run.

    Attributes:
        make: one of them.
        number: how many.
        clients: of whom.
    """

    make: Callable[[], Prompt]
    number: int
    clients: int
    ready: Sequence[Prompt] = ()

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Draw pictures outside of the time."""
        self.ready = [self.make() for _ in range(self.number)]
        yield


@dataclass
class Answers:
    """What came back, round by round.

    Attributes:
        rounds: by case.
        shown: called after each, timed or not.
    """

    rounds: dict[str, list[list[Arrived]]]
    shown: Callable[[], None]

    def add(self, case: Case, turn: int, found: list[Arrived]) -> None:
        """Keep those of a timed round."""
        self.shown()
        if turn >= 0:
            self.rounds[case.name].append(found)


def measure(
    stream: Any, asking: Asking, methods: Sequence[str], clients: Sequence[int], *,
    keep_ratio: float, requests: int, new_tokens: int, rounds: int, warmup: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time the dense model, every method and prompts of words alone, side by side.

    Args:
        stream: the engine, a :class:`visprune.serving.stream.Stream`.
        asking: its prompts.
        methods: names.
        clients: how many ask at once.
        keep_ratio: of the visual tokens.
        requests: of each client in a round.
        new_tokens: of an answer.
        rounds: timed runs of each case.
        warmup: runs of each case before them.

    Returns:
        See :func:`row`; one per number of clients and method, the dense model among them.

    Raises:
        ConfigError: numbers below one, or a method that a server does not take.
        VispruneError: a prompt has another length than its budget says.
    """
    if min(requests, new_tokens, rounds, *clients) < 1:
        raise ConfigError(
            f"A benchmark of a server takes at least one client, request, new token and round; got "
            f"{min(clients)}, {requests}, {new_tokens}, {rounds}."
        )
    settings: dict[str, dict[str, Any]] = {DENSE: {METHOD: None}}
    for name in methods:
        settings[name] = as_settings(asking.method(name, keep_ratio).to_dict())
    lengths = _lengths(stream, asking, settings, keep_ratio)
    kinds: dict[str, Callable[[], Prompt]] = {
        LONG: lambda: asking.words(lengths[DENSE]),
        **{name: partial(asking, own) for name, own in settings.items()},
        SHORT: lambda: asking.words(lengths[methods[0]]),
    }
    rows = []
    with Progress(transient=True) as bars:
        bar = bars.add_task("taking turns", total=len(clients) * len(kinds) * (rounds + warmup))
        for number in clients:
            cases = [_case(stream, name, Burst(make, number * requests, number), new_tokens)
                     for name, make in kinds.items()]  # fmt: skip
            answers = Answers({name: [] for name in kinds}, lambda: bars.advance(bar))
            timings = interleaved(cases, rounds=rounds, warmup=warmup, after=answers.add)
            rows += [row(name, number, number * requests, timings, answers.rounds)
                     for name in settings]  # fmt: skip
    return rows


def _case(stream: Any, name: str, burst: Burst, new_tokens: int) -> Case:
    def run(_: int) -> Any:
        return stream.burst(burst.ready, clients=burst.clients, new_tokens=new_tokens)

    return Case(name, run, burst.prepared)


def _lengths(
    stream: Any, asking: Asking, settings: dict[str, dict[str, Any]], keep_ratio: float
) -> dict[str, int]:
    """Tokens of the prompt under each of some settings, which must be what the budget says.

    Raises:
        VispruneError: they are not: whatever the time is, it is another prompt's.
    """
    prompts = [asking(own) for own in settings.values()]
    found = stream.burst(prompts, clients=1, new_tokens=1)
    lengths = {name: one.prompt for name, one in zip(settings, found, strict=True)}
    wanted = _TEXT + max(1, round(keep_ratio * (lengths[DENSE] - _TEXT)))
    for name, length in lengths.items():
        if name != DENSE and length != wanted:
            raise VispruneError(
                f"{name}: its prompt has {length} tokens, at {keep_ratio:g} of the visual ones it "
                f"would have {wanted}. Name methods that keep to a budget."
            )
    return lengths


def row(
    name: str, clients: int, requests: int, timings: Timings,
    answers: dict[str, list[list[Arrived]]],
) -> dict[str, Any]:  # fmt: skip
    """Figures of one case.

    Args:
        name: of the case.
        clients: at once.
        requests: in a round.
        timings: seconds of each round of every case.
        answers: the requests of each round of every case.

    Returns:
        ``prompt`` tokens, ``requests_per_s``, ``ttft_ms``, ``ttft_p90_ms``, ``speedup`` over dense,
        ``promised`` (the same of a prompt that is as short from the start, see the module),
        ``share`` (of ``promised``, and its quartiles); the last four are medians over rounds of
        what was timed within a round. ``promised`` and ``share`` are ``None`` for dense.
    """
    first = torch.tensor([x.first for answered in answers[name] for x in answered])
    seconds = timings.seconds
    found: dict[str, Any] = {
        "clients": clients,
        "method": name,
        "prompt": answers[name][0][0].prompt,
        "requests_per_s": requests / median(seconds[name]),
        "ttft_ms": 1e3 * float(first.median()),
        "ttft_p90_ms": 1e3 * float(first.quantile(0.9)),
        "speedup": timings.ratio(DENSE, name),
        "promised": None, "share": None, "share_q1": None, "share_q3": None,
    }  # fmt: skip
    if name == DENSE:
        return found
    # A small difference of two long times: of one round it is mostly noise.
    pairs = zip(seconds[DENSE], seconds[LONG], strict=True)
    picture = median(dense - words for dense, words in pairs)
    ideal = [short + picture for short in seconds[SHORT]]
    promised = [dense / one for dense, one in zip(seconds[DENSE], ideal, strict=True)]
    share = torch.tensor([one / own for one, own in zip(ideal, seconds[name], strict=True)])
    return found | {
        "promised": median(promised), "share": median(share.tolist()),
        "share_q1": float(share.quantile(0.25)), "share_q3": float(share.quantile(0.75)),
    }  # fmt: skip


def _report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    shape = "embedded" if options.quick else options.shape
    options.batch, options.device = options.clients, "cuda" if torch.cuda.is_available() else "cpu"
    title = f"In vLLM, {options.new_tokens} tokens an answer: shape {shape}, " \
            f"{options.keep_ratio:.0%} kept, {options.dtype}"  # fmt: skip
    table = Table(title=title, title_justify="left")
    table.add_column("clients", justify="right")
    table.add_column("method")
    for name in ("prompt", "requests/s", "first token ms", "p90", "speed-up", "promised", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in rows:
        promise = ["-", "-"] if one["share"] is None else [
            f"{one['promised']:.2f}x", f"{100 * one['share']:.1f} %"]  # fmt: skip
        table.add_row(
            str(one["clients"]), one["method"], str(one["prompt"]),
            f"{one['requests_per_s']:.2f}", f"{one['ttft_ms']:.0f}", f"{one['ttft_p90_ms']:.0f}",
            f"{one['speedup']:.2f}x", *promise,
        )  # fmt: skip
    note = "Lengths of the prompts were checked before timing; load of the machine: " \
           f"{os.getloadavg()[0]:.1f}. "  # fmt: skip
    publish(table, rows, options, "serving", shape, note)


if __name__ == "__main__":
    main()
