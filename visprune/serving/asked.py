# SPDX-License-Identifier: Apache-2.0
"""What a request, or a server's default, asks to be kept of its pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from visprune.catalog import check_method, get_method, list_methods, methods
from visprune.core.budget import Budget, Stage
from visprune.core.method import ModelSpec, PruningMethod
from visprune.core.numeric import is_number, is_whole
from visprune.core.signals.base import EncoderSignal, PictureSignal, Signal, TokenSignal
from visprune.errors import BudgetError, ConfigError, UnsupportedModel, VispruneError, did_you_mean
from visprune.machine.saved import METHOD_FILE, read_method
from visprune.version import __version__

METHOD, NUM_KEEP, KEEP_RATIO, PARAMS = KEYS = (
    "visprune",
    "visprune_num_keep",
    "visprune_keep_ratio",
    "visprune_params",
)
_BUDGET = (NUM_KEEP, KEEP_RATIO)
_INSIDE = "it acts before or inside the image encoder, which a server runs in code of its own"
_ARTICLE = {"image": "a picture", "video": "a clip"}


@dataclass(frozen=True)
class Asked:
    """A method with its budget, as it runs in a server.

    Attributes:
        method: the method; it acts at the projector alone.
        key: what tells this from every other setting, of another version of visprune too, for
            caches of pictures that outlive a request.
    """

    method: PruningMethod
    key: str

    def count(self, pos: Tensor, kind: str, spec: ModelSpec) -> int:
        """Tokens that are left of a picture, known before it is encoded.

        Args:
            pos: (t, h, w) of its free tokens, ``[N, 3]``.
            kind: ``"image"`` or ``"video"``.
            spec: the model.

        Raises:
            BudgetError: a budget that the method must keep to exceeds the picture's tokens.
            UnsupportedModel: the method sees in this one how many tokens stay.
        """
        left, whole = len(pos), True
        for stage in self.method.schedule(spec):
            if stage.budget is None:
                found = self.method.known_ahead(_tuples(pos), kind) if whole else None
                if found is None:
                    fits = ", ".join(f"{k}={v}" for k, v in self.method.served.items())
                    raise UnsupportedModel(
                        f"{self.method.name} sees in {_ARTICLE[kind]} how many tokens stay, and a "
                        f"server writes their placeholders before it is encoded. Take another "
                        f"method for it{f', or {fits}' if fits else ''}."
                    )
                left, whole = found, False
                continue
            keep = stage.budget.resolve(left, len(pos), strict=self.method.strict)
            # Behind a stage, which places are left is not known ahead.
            left = self.method.survivors(_tuples(pos), keep, kind) if whole else keep
            whole = False
        return left


def read(
    given: Mapping[str, Any], default: Mapping[str, Any], spec: ModelSpec, shows: frozenset[str]
) -> Asked | None:
    """What a request asks for, over a server's default.

    A request that names a method replaces all of the default; one that gives a budget alone
    replaces the default's budget. A budget of its own that exceeds a picture's tokens is an error;
    a default is cut down to what there is.

    Args:
        given: the request's ``mm_processor_kwargs``; keys of others are left alone.
        default: those that the server was started with.
        spec: the model.
        shows: layers of the image encoder whose attention is read in the server, as signals name
            them (``"feature"``, ``"last"``).

    Returns:
        ``None`` where nothing is to be pruned: no settings, or ``{"visprune": None}``.

    Raises:
        ConfigError: unknown names, values of the wrong type, a missing or double budget.
        UnsupportedModel: the method does not fit a server, or this model.
    """
    own = {key: given[key] for key in KEYS if key in given}
    rest = {key: default[key] for key in KEYS if key in default}
    unknown = [key for key in (*given, *default) if key.startswith(METHOD) and key not in KEYS]
    if unknown:
        raise ConfigError(
            f"There is no setting {unknown[0]!r}.{did_you_mean(unknown[0], KEYS)} "
            f"Settings: {', '.join(KEYS)}."
        )
    strict = METHOD in own or any(own.get(key) is not None for key in _BUDGET)
    if METHOD in own:
        rest = {}
    elif any(key in own for key in _BUDGET):
        rest = {key: value for key, value in rest.items() if key not in _BUDGET}
    merged = {key: value for key, value in {**rest, **own}.items() if value is not None}
    if METHOD not in merged:
        if any(key in own for key in KEYS) and merged:
            raise ConfigError(
                f"{', '.join(merged)} came without a method. Name one: "
                f'{{"visprune": "todre", ...}}, or start the server with a default.'
            )
        return None
    return _built(json.dumps(merged, sort_keys=True, default=repr), spec, shows, strict)


def as_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a method that was written as ``{"method": name, **parameters}``."""
    params = {key: value for key, value in saved.items() if value is not None}
    found = {METHOD: params.pop("method"), PARAMS: params}
    budget = {f"{METHOD}_{name}": params.pop(name) for name in ("num_keep", "keep_ratio")
              if name in params}  # fmt: skip
    return {**found, **budget}


def saved_settings(name: str, revision: str | None = None) -> dict[str, Any] | None:
    """The settings of the method that a model was saved with.

    Args:
        name: a folder that :func:`visprune.save_pretrained` wrote, or that folder on the Hub, which
            is asked for one small file.
        revision: of the repository on the Hub.

    Returns:
        ``None`` where it names none, or where the Hub cannot be asked.

    Raises:
        ConfigError: the file is damaged.
    """
    folder = Path(name)
    if not folder.is_dir():
        from transformers.utils import cached_file

        try:
            found = cached_file(name, METHOD_FILE, revision=revision)
        except OSError:
            return None
        if found is None:
            return None
        folder = Path(found).parent
    saved = read_method(folder)
    return None if saved is None else as_settings(saved)


def fitting(spec: ModelSpec, shows: frozenset[str]) -> dict[str, str | None]:
    """Every method by name: ``None`` where it fits a server of this model, else why not."""
    found: dict[str, str | None] = {}
    for name in list_methods():
        kind = methods.get(name)
        try:
            method = kind.example()
            if kind.served:
                method = type(method)(**{**vars(method), **kind.served})
            found[name] = why_not(method, spec, shows)
        except VispruneError as error:
            found[name] = str(error)
    return found


def _fits(spec: ModelSpec, shows: frozenset[str]) -> list[str]:
    return [name for name, why in fitting(spec, shows).items() if why is None]


def why_not(method: PruningMethod, spec: ModelSpec, shows: frozenset[str]) -> str | None:
    """Return why a server cannot prune by a method, ``None``: it can."""
    try:
        schedule = method.schedule(spec)
    except VispruneError as error:
        return str(error)
    if getattr(method, "num_keep_per_frame", None) is not None:
        return "num_keep_per_frame counts frames, which a server is not told of; give num_keep"
    if not schedule:  # a stage in each layer of an encoder
        return _INSIDE
    for stage in schedule:
        reason = _stage(method, stage, spec, shows)
        if reason is not None:
            return reason
    return _positions(method, spec)


def _tuples(pos: Tensor) -> tuple[tuple[int, int, int], ...]:
    return tuple((t, h, w) for t, h, w in pos.tolist())


def _stage(
    method: PruningMethod, stage: Stage, spec: ModelSpec, shows: frozenset[str]
) -> str | None:
    kind = stage.site.kind
    if kind == "decoder":
        return (
            "it acts inside the decoder, and a block of a server's cache holds the same tokens for "
            "all layers"
        )
    if kind == "cache":
        return (
            "it acts on stored keys and values, and a server's cache is the server's own: a block "
            "of it holds the same tokens for all layers"
        )
    if kind != "projector":
        return _INSIDE
    told = type(method).known_ahead is not PruningMethod.known_ahead
    if not told and not isinstance(stage.budget, Budget):
        return (
            "it decides itself how many tokens stay, and a server writes their placeholders before "
            "a picture is encoded"
        )
    for signal in stage.needs:
        reason = missing(signal, spec, shows)
        if reason is not None:
            return reason
    return None


def missing(signal: Signal, spec: ModelSpec, shows: frozenset[str]) -> str | None:
    """Return why a server cannot show a signal, ``None``: it can."""
    if isinstance(signal, PictureSignal | TokenSignal):
        return None
    if not isinstance(signal, EncoderSignal):
        return f"it is shown {signal}, and a server encodes a picture, and keeps it, without a text"
    lacking = signal.missing(spec)
    if lacking is not None:
        return f"it is shown {signal}, but {lacking}"
    if signal.layer not in shows or (signal.uses == "output" and signal.layer != "feature"):
        return f"it is shown {signal}, which is not read in the server's own image encoder"
    return None


def _positions(method: PruningMethod, spec: ModelSpec) -> str | None:
    if spec.multi_axis_rope:
        if method.positions == "compact":
            return "positions='compact' closes up a line of ids, and its tokens have (t, h, w)"
        return None
    if method.positions == "original":
        return (
            "positions='original' leaves gaps, and a server counts the positions of this model's "
            "tokens without them"
        )
    return None


@lru_cache(maxsize=4096)
def _built(settings: str, spec: ModelSpec, shows: frozenset[str], strict: bool) -> Asked:
    """Build and check what was asked for; equal settings are checked once."""
    merged = json.loads(settings)
    name, params = merged[METHOD], merged.get(PARAMS, {})
    if not isinstance(name, str):
        raise ConfigError(f"visprune is the name of a method, got {name!r}.")
    if not isinstance(params, Mapping) or not all(isinstance(key, str) for key in params):
        raise ConfigError(
            f"visprune_params are a method's parameters by name, got {params!r}. "
            f'Example: {{"visprune_params": {{"objective": "max_sum"}}}}.'
        )
    num_keep, ratio = merged.get(NUM_KEEP), merged.get(KEEP_RATIO)
    if num_keep is not None and not is_whole(num_keep):
        raise BudgetError(f"visprune_num_keep is a whole number of tokens, got {num_keep!r}.")
    if ratio is not None and not is_number(ratio):
        raise BudgetError(f"visprune_keep_ratio is a fraction in (0, 1], got {ratio!r}.")
    budget = {"num_keep": num_keep, "keep_ratio": ratio}
    budget = {key: value for key, value in budget.items() if value is not None}
    double = sorted(set(budget) & set(params))
    if double:
        raise ConfigError(f"visprune_{double[0]} and visprune_params both give {double[0]}.")
    if "+" in name:
        check_method(name)
        raise UnsupportedModel(
            f"{name} is several methods, one after another, and a server prunes by one. Methods "
            f"that can: {', '.join(_fits(spec, shows))}."
        )
    strictly = {"strict": True} if strict and num_keep is not None else {}
    served = {**methods.get(name).served}
    method = get_method(name, **{**strictly, **served, **params, **budget})
    reason = why_not(method, spec, shows)
    if reason is not None:
        raise UnsupportedModel(
            f"{name} cannot prune {spec.family} in a server: {reason}. Methods that can: "
            f"{', '.join(_fits(spec, shows))}."
        )
    return Asked(method, json.dumps([__version__, method.to_dict()], sort_keys=True, default=repr))
