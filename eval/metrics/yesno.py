# SPDX-License-Identifier: Apache-2.0
"""Yes or no: the parsers of three harnesses, which read the same output differently.

Facts from LLaVA at c121f04 (``eval_pope.py``, the same rule as RUCAIBox/POPE's ``evaluate.py``),
lmms-eval at 75571cf (``pope/utils.py``, ``mme/utils.py``) and VLMEvalKit at e8e78f0 (``yorn.py``).
"""

from __future__ import annotations

from collections.abc import Callable

from visprune.eval.metrics.vqa_text import vlmevalkit_punctuation

__all__ = ["MME_PARSERS", "POPE_PARSERS", "parse_yes_no", "yes_no_label"]

Answer = tuple[str | None, str]
"""``"yes"``, ``"no"`` or ``None``, and the name of the rule that said so."""


def _llava(text: str) -> Answer:
    """A word "No", "no" or "not" in the first sentence is no; everything else is yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    if {"No", "no", "not"} & set(words):
        return "no", "negation"
    # Garbage and silence count as yes: a collapsed model has a recall of 1.
    return "yes", "no_negation"


def _lmms_eval(text: str) -> Answer:
    """The whole output must be "yes" or "no"; "Yes." is neither."""
    word = text.lower().strip()
    return (word, "whole") if word in ("yes", "no") else (None, "")


def _vlmevalkit(text: str) -> Answer:
    """One of the words "yes" and "no", not both."""
    words = vlmevalkit_punctuation(text.lower()).split()
    if ("yes" in words) == ("no" in words):
        return None, ""
    return ("yes" if "yes" in words else "no"), "word"


def _mme(text: str) -> Answer:
    """Among the first four characters, "yes" before "no"; a lone letter y or n."""
    start = text.lower().strip().replace(".", "")
    if len(start) == 1:
        return {"y": ("yes", "letter"), "n": ("no", "letter")}.get(start, (None, ""))
    for word in ("yes", "no"):
        if word in start[:4]:
            return word, "prefix"
    return None, ""


_RULES: dict[str, Callable[[str], Answer]] = {
    "llava": _llava,
    "lmms-eval": _lmms_eval,
    "vlmevalkit": _vlmevalkit,
    "mme": _mme,
}
POPE_PARSERS = ("llava", "lmms-eval", "vlmevalkit")
MME_PARSERS = ("lmms-eval", "vlmevalkit")


def parse_yes_no(text: str, parser: str) -> Answer:
    """Return ``"yes"``, ``"no"`` or ``None`` and the rule that found it.

    Args:
        text: a model's output.
        parser: ``"llava"``, ``"lmms-eval"`` (POPE), ``"vlmevalkit"`` or ``"mme"`` (lmms-eval's).
    """
    return _RULES[parser](text)


def yes_no_label(answer: str) -> str | None:
    """Return a reference as ``"yes"`` or ``"no"``; ``None`` where it is neither."""
    label = answer.lower().strip().rstrip(".")
    return label if label in ("yes", "no") else None
