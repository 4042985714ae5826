# SPDX-License-Identifier: Apache-2.0
"""The words that go with a question: LLaVA-1.5's published instructions, and plain forms.

The instructions are those of LLaVA's ``docs/Evaluation.md`` (arXiv:2310.03744) and its evaluation
files. ``"llava15"`` and ``"chat"`` give the text of the user's turn; the markup around it comes
from the model's own chat template, or from :data:`VICUNA_V1` where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

from visprune.backbones.vlm.markup import VICUNA_V1
from visprune.errors import ConfigError, did_you_mean

__all__ = [
    "LETTER",
    "SHORT_ANSWER",
    "STYLES",
    "UNANSWERABLE",
    "VICUNA_V1",
    "check_style",
    "instructed",
    "letters",
    "multiple_choice",
    "option_lines",
    "short_answer",
]

STYLES = ("llava15", "chat", "plain")

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
UNANSWERABLE = (
    "When the provided information is insufficient, respond with 'Unanswerable'.\n" + SHORT_ANSWER
)


def check_style(style: str) -> None:
    """Raise ``ConfigError`` for an unknown prompt style."""
    if style not in STYLES:
        raise ConfigError(
            f"Unknown prompt style {style!r}.{did_you_mean(str(style), STYLES)} "
            f"Allowed: {', '.join(STYLES)}."
        )


def instructed(
    lines: Sequence[str], default: str, style: str, instruction: str | None = None
) -> str:
    """Return lines and, unless the style is ``"plain"``, the instruction as the last one.

    Args:
        lines: question, options, hint, in order.
        default: the published instruction.
        style: one of :data:`STYLES`.
        instruction: said instead of the default, in every style; ``""``: nothing is said.
    """
    check_style(style)
    last = instruction if instruction is not None else "" if style == "plain" else default
    return "\n".join([*lines, last] if last else lines)


def short_answer(question: str, style: str, instruction: str = SHORT_ANSWER) -> str:
    """Return a question that wants a word or a phrase."""
    return instructed([question], instruction, style)


def multiple_choice(question: str, choices: Sequence[str], style: str, hint: str = "") -> str:
    """Return a question with lettered options, the hint (if any) before it."""
    lines = [hint] if hint else []
    return instructed([*lines, question, *option_lines(choices)], LETTER, style)


def letters(count: int) -> str:
    """Return the letters of ``count`` options: ``"ABCD"``.

    Raises:
        ConfigError: more options than letters.
    """
    if count > 26:
        raise ConfigError(f"{count} choices; letters reach to 26. Ask for the text of the answer.")
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count]


def option_lines(choices: Sequence[str]) -> list[str]:
    """Return ``["A. first", "B. second"]``."""
    return [
        f"{letter}. {choice}" for letter, choice in zip(letters(len(choices)), choices, strict=True)
    ]
