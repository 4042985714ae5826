# SPDX-License-Identifier: Apache-2.0
"""How a letter is read from an output: the rules of four published scorers, and lenient ones.

Facts from LLaVA at c121f04 (``eval_science_qa.py``, ``convert_seed_for_submission.py``), lmms-eval
at 75571cf (``scienceqa/utils.py``, ``seedbench/utils.py``) and VLMEvalKit at e8e78f0
(``matching_util.py``); ``tests/golden/letters_*`` holds what they return.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from visprune.eval.metrics.text import plain_text

__all__ = ["ALL", "RULES", "Rule"]

ALL = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Rule = tuple[str, Callable[[str, Sequence[str]], str | None]]
"""The rule's name, and what reads a letter from a stripped output and the options' texts."""

# --- lenient --------------------------------------------------------------------------------------

_OPEN = r"[\s(\[{<\"']*"
_CLOSE = r"[)\]}>\"'.:,;!]"
_MARKS = re.compile(
    r"\\\(|\\\)|\\(?:boxed|text(?:bf)?|mathrm)\b|[*`$]|</?(?i:answer)>|(?<!\w)_+|_+(?!\w)"
)
# Typographic and East Asian signs as ASCII has them; NFKC does the full-width ones.
_SIGNS = str.maketrans(
    "\u2018\u2019\u201c\u201d\u300c\u300d\u3010\u3011\u2013\u2014\u3002\u3001", "''\"\"[][]--.,"
)
# "A" and "I" are words too: what may follow them as letters before the sentence goes on.
_GOES_ON = r"because|since|as|is|and|or|which|that|for|due|from|in"
_ARTICLE = rf"(?!(?<=[AI])\s+(?!(?:{_GOES_ON})\b)[a-z])"
# "A or B", "A, B" and "A/B" name no single letter.
_ONE = rf"(?!\s*(?:or|and|,|/|&)\s*{_OPEN}[A-Z]\b)"
_CAPITAL = rf"{_OPEN}([A-Z])\b(?!'\w){_ARTICLE}{_ONE}"
_LOWER_LAST = rf"{_OPEN}([a-z]){_CLOSE}*\s*(?:$|\n)"

_ALONE = re.compile(rf"{_OPEN}([A-Za-z])(?:\s*{_CLOSE})*")
# Something must follow: "A dog" begins with an article.
_START = re.compile(
    rf"(?:[(\[{{<]\s*([A-Za-z])\s*[)\]}}>]|([A-Za-z])(?:[.:)](?=\s|$)|\s*\n|\s+-\s)"
    rf"|([A-Z]),(?=\s|$)(?!\s*[A-HJ-Z]\b)){_ONE}"
)
_START_BECAUSE = re.compile(
    r"([A-Z])\s+(?:because|since|as\s+it|is\s+(?:the\s+)?(?:correct|right|answer))\b"
)
_START_TEXT = re.compile(r"([A-Z])\s+(\S.*)", re.DOTALL)
_SAYS = r"\s*(?:(?:is|was|would\s+be|should\s+be|must\s+be)\b|[:=]|-\s)?\s*:?\s*"
_NAMED = r"(?:(?:the\s+)?(?:option|choice|letter)\b\s*:?\s*)?"


def _announced(words: str) -> re.Pattern[str]:
    """A pattern of a letter after some words: the words in any case, "a" only at the end."""
    return re.compile(rf"(?i:\b(?:{words}){_SAYS}{_NAMED})(?:{_CAPITAL}|{_LOWER_LAST})")


# The first that finds something decides: "Option B is wrong; the answer is C" says C.
_SAID = (
    _announced("answer"),
    _announced("option|choice"),
    _announced(r"it\s+is|it's|(?:i\s+)?(?:choose|chose|pick|select)|go(?:ing)?\s+with"),
)
_ANSWER_IS = re.compile(
    r"(?i:(?:the\s+)?(?:(?:correct|right|final|best)\s+)?answer)(?:\s+is\b|\s*:)\s*"
)


def _spoken(text: str) -> str:
    """What is said behind a thought; nothing where the thought has no end."""
    _, end, said = text.rpartition("</think>")
    return said if end or "<think>" not in text else ""


def _bare(text: str) -> str:
    """A text without thought and markup, its signs in ASCII, one blank or line end at a time.

    Of many in a row, the patterns would try every way to share them out.
    """
    text = unicodedata.normalize("NFKC", _spoken(text)).translate(_SIGNS)
    text = _MARKS.sub("", text)
    return "\n".join(
        line for line in (" ".join(words.split()) for words in text.splitlines()) if line
    )


def _alone(text: str, choices: Sequence[str]) -> str | None:
    found = _ALONE.fullmatch(_bare(text))
    return found[1].upper() if found else None


def _first(text: str, choices: Sequence[str]) -> str | None:
    text = _bare(text)
    if found := _START.match(text):
        return (found[1] or found[2] or found[3]).upper()
    if found := _START_BECAUSE.match(text):
        return found[1]
    # "B a dog": the letter and the whole text of its option.
    found = _START_TEXT.match(text)
    number = ALL.index(found[1]) if found else len(choices)
    if found and number < len(choices) and plain_text(found[2]) == plain_text(choices[number]):
        return found[1]
    return None


def _said(text: str, choices: Sequence[str]) -> str | None:
    text = _bare(text)
    for pattern in _SAID:
        letters = {(capital or small).upper() for capital, small in pattern.findall(text)}
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return None


def _last(text: str, choices: Sequence[str]) -> str | None:
    """A last line that is a letter, behind lines that are none."""
    *before, last = _bare(text).split("\n")
    found = _ALONE.fullmatch(last)
    if not found or any(map(_ALONE.fullmatch, before)):
        return None
    return found[1].upper()


def _option_text(text: str, choices: Sequence[str]) -> str | None:
    """The one option whose text is the whole output, or what follows "the answer is"."""
    given = {plain_text(_spoken(text)), plain_text(_ANSWER_IS.sub("", _bare(text), count=1))}
    same = [ALL[i] for i, choice in enumerate(choices) if plain_text(choice) in given - {""}]
    return same[0] if len(same) == 1 else None


# --- published ------------------------------------------------------------------------------------


def _same_letter(text: str, choices: Sequence[str]) -> str | None:
    """lmms-eval's ScienceQA lower-cases output and letter; a Kelvin sign is a k."""
    letter = text.lower().upper()
    return letter if letter in tuple(ALL) else None


def _capital_period(text: str, choices: Sequence[str]) -> str | None:
    """lmms-eval's ScienceQA: any capital and a period at the start, no blank needed."""
    return text[0].lower().upper() if text[1:2] == "." and text[0].isupper() else None


_LLAVA_LETTERS = ALL[:5]
# The period is not escaped: "The answer is Because" says B, "The answer is B" at the end nothing.
_LLAVA_SAID = re.compile(r"The answer is ([A-Z]).")


def _llava_letter(text: str, choices: Sequence[str]) -> str | None:
    return text if len(text) == 1 and text in _LLAVA_LETTERS else None


def _llava_first(text: str, choices: Sequence[str]) -> str | None:
    return text[0] if text[1:3] == ". " and text[0] in _LLAVA_LETTERS else None


def _llava_said(text: str, choices: Sequence[str]) -> str | None:
    found = _LLAVA_SAID.findall(text)
    return found[0] if len(found) == 1 else None


def _first_character(text: str, choices: Sequence[str]) -> str | None:
    """lmms-eval's SEED-Bench: slips and all, "Because" says B and "a cat" says A."""
    letter = text[:1].lower()
    return letter.upper() if letter.upper() in tuple(ALL) else letter or None


def _whole(text: str, choices: Sequence[str]) -> str | None:
    """LLaVA's SEED-Bench compares the whole text with the letter."""
    return text or None


_KIT_SPLIT = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_KIT_FAILED = "Failed to obtain answer via API"
_KIT_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
# No boundary after the letter ("The answer is a dog" says A), and no letter beyond D.
_KIT_SAID = re.compile(r"answer is\s*\**([A-D])", re.IGNORECASE)


def _kit_refusal(text: str, choices: Sequence[str]) -> str | None:
    """VLMEvalKit's letter for what answers nothing."""
    failed = _KIT_FAILED in text
    return "Z" if not failed and any(said in text for said in _KIT_REFUSALS) else None


def _kit_letter(text: str, choices: Sequence[str]) -> str | None:
    """VLMEvalKit: the one option letter that is a word, among the last four; a lone Z."""
    if _KIT_FAILED in text:
        return None
    words = text.translate(_KIT_SPLIT).split()
    letters = [letter for letter in _allowed(choices) if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - 4:
        return letters[0]
    return "Z" if not letters and "Z" in words else None


def _kit_said(text: str, choices: Sequence[str]) -> str | None:
    if _KIT_FAILED in text:
        return None
    found = _KIT_SAID.search(text)
    letter = found[1].upper() if found else ""
    return letter if letter and letter in _allowed(choices) else None


def _kit_text(text: str, choices: Sequence[str]) -> str | None:
    """VLMEvalKit: the one option whose text the output, if not too long, contains."""
    said = text.lower()
    if len(said) > 2 * sum(map(len, choices)):
        return None
    inside = [ALL[i] for i, choice in enumerate(choices) if choice.lower() in said]
    return inside[0] if len(inside) == 1 else None


def _allowed(choices: Sequence[str]) -> str:
    return ALL[: len(choices)] if choices else ALL


RULES: dict[str, tuple[Rule, ...]] = {
    "lenient": (
        ("letter", _alone),
        ("letter_first", _first),
        ("answer_is", _said),
        ("letter_last", _last),
        ("option_text", _option_text),
    ),
    "scienceqa-lmms-eval": (("letter", _same_letter), ("letter_first", _capital_period)),
    "scienceqa-llava": (
        ("letter", _llava_letter),
        ("letter_first", _llava_first),
        ("answer_is", _llava_said),
    ),
    "seed-lmms-eval": (("first_character", _first_character),),
    "seed-llava": (("whole", _whole),),
    "vlmevalkit": (
        ("refusal", _kit_refusal),
        ("letter", _kit_letter),
        ("answer_is", _kit_said),
        ("option_text", _kit_text),
    ),
}
