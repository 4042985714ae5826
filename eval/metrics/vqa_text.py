# SPDX-License-Identifier: Apache-2.0
"""The three normalisers of VQA answers, slips included: published numbers depend on them.

Facts from GT-Vision-Lab/VQA at a013f00 (``vqaEval.py``), LLaVA at c121f04 (``m4c_evaluator.py``)
and VLMEvalKit at e8e78f0 (``vqa_eval.py``); ``tests/golden/vqa_accuracy`` holds what they return.
"""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = [
    "NORMALISERS",
    "normalise_evalai",
    "normalise_official",
    "normalise_vlmevalkit",
    "tidy",
    "vlmevalkit_punctuation",
]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
# "none" is a number here, "eleven" is not.
_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS.split())}

# The official evaluator is Python 2, where \d on text means the ten ASCII digits.
_COMMA = re.compile(r"(\d)(,)(\d)", re.ASCII)
_COMMA_KIT = re.compile(r"(\d)(,)(\d)")  # VLMEvalKit is Python 3: digits of every script
# Slip 1: "(?!<=\d)" was meant to be "(?<!\d)"; it is always true, so "3." loses its period and a
# period before a digit stays. Slip 2: re.UNICODE (32) stands where `count` belongs, in all three.
_PERIOD_OFFICIAL = re.compile(r"(?!<=\d)(\.)(?!\d)", re.ASCII)
_PERIOD_FIXED = re.compile(r"(?<!\d)\.(?!\d)")
_PERIODS = 32
_COMMA_EVALAI = re.compile(r"(?<=\d)(\,)+(?=\d)")

# Pairs: what is written, what it becomes. Applied after lower-casing; "lets" is not in the table,
# and "somebody'd" loses its apostrophe, as in the original.
_PAIRS = """
aint ain't arent aren't cant can't couldve could've couldnt couldn't couldn'tve couldn't've
couldnt've couldn't've didnt didn't doesnt doesn't dont don't hadnt hadn't hadnt've hadn't've
hadn'tve hadn't've hasnt hasn't havent haven't hed he'd hed've he'd've he'dve he'd've hes he's
howd how'd howll how'll hows how's isnt isn't itd it'd itd've it'd've it'dve it'd've itll it'll
maam ma'am mightnt mightn't mightnt've mightn't've mightn'tve mightn't've mightve might've
mustnt mustn't mustve must've neednt needn't notve not've oclock o'clock oughtnt oughtn't
ow's'at 'ow's'at 'ows'at 'ow's'at 'ow'sat 'ow's'at shant shan't shed've she'd've she'dve she'd've
shouldve should've shouldnt shouldn't shouldnt've shouldn't've shouldn'tve shouldn't've
somebody'd somebodyd somebodyd've somebody'd've somebody'dve somebody'd've somebodyll somebody'll
somebodys somebody's someoned someone'd someoned've someone'd've someone'dve someone'd've
someonell someone'll someones someone's somethingd something'd somethingd've something'd've
something'dve something'd've somethingll something'll thats that's thered there'd
thered've there'd've there'dve there'd've therere there're theres there's theyd they'd
theyd've they'd've they'dve they'd've theyll they'll theyre they're theyve they've twas 'twas
wasnt wasn't wed've we'd've we'dve we'd've weve we've werent weren't whatll what'll
whatre what're whats what's whatve what've whens when's whered where'd wheres where's
whereve where've whod who'd whod've who'd've who'dve who'd've wholl who'll whos who's whove who've
whyll why'll whyre why're whys why's wont won't wouldve would've wouldnt wouldn't
wouldnt've wouldn't've wouldn'tve wouldn't've yall y'all yall'll y'all'll y'allll y'all'll
yall'd've y'all'd've y'alld've y'all'd've y'all'dve y'all'd've youd you'd youd've you'd've
you'dve you'd've youll you'll youre you're youve you've
"""
_CONTRACTIONS = dict(zip(_PAIRS.split()[::2], _PAIRS.split()[1::2], strict=True))


def tidy(text: str) -> str:
    """Line ends and tabs to blanks, no blanks at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise_official(text: str) -> str:
    """The official VQA evaluator: punctuation, then numbers, articles and contractions."""
    return _words(_punctuation(tidy(text), _COMMA, _PERIOD_OFFICIAL))


def normalise_vlmevalkit(text: str) -> str:
    """The official steps with the period rule that was meant, as VLMEvalKit has it."""
    return _words(_punctuation(tidy(text), _COMMA_KIT, _PERIOD_FIXED))


def vlmevalkit_punctuation(text: str) -> str:
    """VLMEvalKit's punctuation step alone; its yes/no parser applies it."""
    return _punctuation(text, _COMMA_KIT, _PERIOD_FIXED)


def normalise_evalai(text: str) -> str:
    """EvalAI's processor (LLaVA, TextVQA, VizWiz): a tokenizing step, then the official ones."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(tidy(text), _COMMA_EVALAI, _PERIOD_OFFICIAL))


NORMALISERS: dict[str, Callable[[str], str]] = {
    "official": normalise_official,
    "evalai": normalise_evalai,
    "vlmevalkit": normalise_vlmevalkit,
    "lmms-eval": normalise_official,
}


def _punctuation(text: str, comma: re.Pattern[str], period: re.Pattern[str]) -> str:
    """Delete each sign that touches a blank somewhere; a sign that never does becomes a blank."""
    out, has_comma = text, comma.search(text) is not None
    for sign in _PUNCTUATION:
        beside_blank = f"{sign} " in text or f" {sign}" in text
        out = out.replace(sign, "" if beside_blank or has_comma else " ")
    return period.sub("", out, count=_PERIODS)


def _words(text: str) -> str:
    """Lower-case, number words to digits, no articles, apostrophes back into contractions."""
    numbered = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)
