# SPDX-License-Identifier: Apache-2.0
"""What a user chooses a method by, read from the method itself: where, what it sees, what it costs.

All of one model, the sizes of LLaVA-1.5-7B: 576 tokens, 32 decoder layers, an encoder of 24 layers
and 1,024 features, 4,096 features behind the projector.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from visprune.catalog import get_method, methods, parameters
from visprune.core.budget import Stage
from visprune.core.method import ModelSpec, PruningMethod
from visprune.core.signals import EncoderSignal, Signal
from visprune.errors import ConfigError

TOKENS, KEEP, LAYERS, WIDTH = 576, 64, 32, 4096
SPEC = ModelSpec("llava", num_layers=LAYERS, has_cls=True, multi_axis_rope=False,
                 encoder_layers=24, encoder_width=1024)  # fmt: skip

_ASKS = {
    "cls_token": "a class token",
    "encoder_attention": "attention of its encoder",
    "encoder_features": "features of its encoder",
}


@dataclass(frozen=True)
class Facts:
    """One row of the page of methods.

    Attributes:
        name: as registered.
        keeps: the first line of its docstring.
        where: its sites.
        sees: the signals that it is shown, by name.
        asks: what of a model it cannot do without, in words; empty: any family.
        adaptive: whether pictures decide how many of their tokens stay.
        kernel: whether the model's attention kernels stay as they are, FlashAttention too. A
            method that weighs tokens by their size inside the encoder adds a term to its scores.
        macs: multiply-adds of rule and encoder signals on one picture.
        mean: tokens a decoder layer sees on average; ``None``: the method decides.
    """

    name: str
    keeps: str
    where: tuple[str, ...]
    sees: tuple[str, ...]
    asks: tuple[str, ...]
    adaptive: bool
    kernel: bool
    macs: int
    mean: float | None


@dataclass(frozen=True)
class Measured:
    """A column of the page that is no fact of the code.

    Attributes:
        head: its name.
        cells: by method.
        about: what it is, where it comes from, and what it must not be compared with.
    """

    head: str
    cells: Mapping[str, str]
    about: str


def facts(name: str) -> Facts:
    """Read a method's schedule at ``num_keep=64``, or at its published setting."""
    method = _built(name)
    stages = method.schedule(SPEC)
    kinds = dict.fromkeys(stage.site.kind for stage in stages)
    signals = list(dict.fromkeys(s for stage in stages for s in stage.signals))
    needs = {x for stage in stages for s in stage.needs for x in s.requires}
    asks = [words for capability, words in _ASKS.items() if capability in needs]
    if any(stage.site.kind == "encoder" for stage in stages):
        asks = ["an encoder that can be reduced"]
    if any(stage.site.kind == "pixels" for stage in stages):
        asks = ["an encoder that takes patches with their places"]
    return Facts(
        name,
        methods.summary(name),
        tuple(_where(kind, [s for s in stages if s.site.kind == kind]) for kind in kinds),
        tuple(dict.fromkeys(type(signal).__name__ for signal in signals)),
        tuple(asks),
        any(stage.budget is None and stage.site.kind != "cache" for stage in stages),
        not method.size_bias,
        _macs(method, signals),
        mean_tokens(method),
    )  # fmt: skip


def _built(name: str) -> PruningMethod:
    """A method at the page's budget, or at its own setting where it takes none."""
    if "num_keep" in parameters(name):
        with suppress(ConfigError):  # it has the parameter, and another that decides instead
            return get_method(name, num_keep=KEEP)
        return get_method(name)
    kind: type[PruningMethod] = methods.get(name)
    return kind.example()


def _where(kind: str, stages: Sequence[Stage]) -> str:
    layers = [stage.site.layer for stage in stages if stage.site.layer is not None]
    if not layers:
        return "before the encoder" if kind == "pixels" else kind
    if kind == "encoder" and len(layers) == SPEC.encoder_layers:
        return "every encoder layer"
    depth = SPEC.encoder_layers if kind == "encoder" else LAYERS
    return f"{kind} {', '.join(str(stage.site.resolve(depth)) for stage in stages)}"


def _macs(method: PruningMethod, signals: Iterable[Signal]) -> int:
    """The rule at every stage, and encoder signals where they are read behind the encoder."""
    left, spent = TOKENS, 0
    for stage in method.schedule(SPEC):
        if stage.site.kind == "cache":
            continue
        inside = stage.site.kind == "encoder"
        keep = 0 if stage.budget is None else stage.budget.resolve(left, TOKENS)
        spent += method.macs(left, keep, SPEC.encoder_width if inside else WIDTH)
        own = [s for s in stage.signals if isinstance(s, EncoderSignal)]
        spent += sum(s.macs(left + 1, SPEC.encoder_width) for s in own)
        left = left if stage.restores is not None else keep or left
    return spent


def mean_tokens(method: PruningMethod) -> float | None:
    """Tokens a decoder layer sees on average."""
    left, total, done = TOKENS, 0, 0
    for stage in method.schedule(SPEC):
        if stage.site.kind == "cache":
            return float(TOKENS)
        if stage.budget is None:
            return None
        if stage.restores is not None:  # the decoder sees all of them
            continue
        at = stage.site.resolve(LAYERS) if stage.site.kind == "decoder" else 0
        total += (at - done) * left
        kept = stage.budget.slots(left, TOKENS)
        left, done = method.handed_on(left, kept), at
    return (total + (LAYERS - done) * left) / LAYERS


def page(measured: Sequence[Measured] = ()) -> str:
    """The page of methods, Markdown.

    Args:
        measured: further columns.
    """
    columns = [
        "method", "what it is", "where", "is shown", "asks of a model", "tokens that stay",
        "kernels", "multiply-adds", "tokens a layer", *(more.head for more in measured),
    ]  # fmt: skip
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name in methods.names():
        row = facts(name)
        rows.append(
            f"| `{name}` | {row.keeps} | {'; '.join(row.where)} | {', '.join(row.sees) or '-'} | "
            f"{', '.join(row.asks) or 'nothing'} | "
            f"{'its own number' if row.adaptive else 'a number'} | "
            f"{'as they are' if row.kernel else 'with a bias'} | {row.macs / 1e6:,.1f} M | "
            f"{'-' if row.mean is None else format(row.mean, '.1f')} |"
            + "".join(f" {more.cells.get(name, '-')} |" for more in measured)
        )
    about = "".join(f"- **{more.head}**: {more.about}\n" for more in measured)
    return f"{_INTRO}\n{chr(10).join(rows)}\n{_OUTRO}{about}\n{_REST}"


_INTRO = f"""# Methods

Written by `visprune methods --page`; a test holds it to the code. Of a model with the sizes of
LLaVA-1.5-7B ({TOKENS} tokens, {LAYERS} decoder layers, an encoder of {SPEC.encoder_layers} layers),
at `num_keep={KEEP}` where a method takes one, else at its own setting. Layers are those on entering
which tokens are gone.
"""

_OUTRO = """
- **is shown**: signals of `visprune.core.signals`, read beside whatever attention kernel runs.
- **asks of a model**: without it a model is refused, with the reason; `nothing`: every family of
  `visprune models` takes it.
- **tokens that stay**: `its own number`: a stage lets every picture keep what it needs.
- **kernels**: `as they are`: FlashAttention stays possible. `with a bias`: attention, inside the
  encoder or behind the stage in the decoder, weighs a token by what it stands for.
- **multiply-adds**: of the rule and of what it reads of the encoder, on one picture; queries and
  keys that a decoder layer computes for a stage ahead of its run are counted by `run.cost()`, and
  so is the first pass of `gemfilter`, which reads all tokens in 13 of 32 layers.
- **tokens a layer**: what a decoder layer sees on average. It is not `num_keep` where tokens leave
  inside the decoder: compare methods by this column, or by `run.trace.mean_tokens` of a real run.
  What a paper calls its number of tokens may be neither: SparseVLM's 192, 128, 96 and 64 are 206.5,
  145.4, 114.1 and 82.2 on average, what it recycles included.
"""

_REST = """\
Milliseconds: `visprune bench methods` measures selection beside the prefill on your machine.
"""
