# SPDX-License-Identifier: Apache-2.0
"""Metrics beyond the golden cases: parse rules by name, boxes, rankings, refusals, invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from visprune.errors import ConfigError
from visprune.eval.metrics import (
    MME,
    POPE,
    ExactMatch,
    GQAAccuracy,
    LetterMatch,
    RECAccuracy,
    TopK,
    VQAAccuracy,
    vqa_accuracy,
)
from visprune.eval.metrics.boxes import iou, parse_box, read_box, seen_size
from visprune.eval.metrics.letters import parse_letter
from visprune.eval.metrics.text import gqa_match, plain_text
from visprune.eval.metrics.vqa_text import NORMALISERS
from visprune.eval.tasks.base import Sample

CHOICES = ("a cat", "a dog", "Cats")


def _score(metric: Any, predictions: list[str], references: list[Any]) -> dict[str, float]:
    metric.update(predictions, references)
    return metric.compute()


# --- VQA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_vqa_counts_the_other_people(matches: int, score: float) -> None:
    answers = ["cat"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy("cat", answers) == pytest.approx(score)


def test_vqa_official_compares_unanimous_answers_as_they_are() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10, "official") == 0.0
    assert vqa_accuracy("Yes", ["yes"] * 10, "lmms-eval") == 1.0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"], "official") == 1.0


def test_vqa_takes_annotations_as_they_are_published() -> None:
    people = [{"answer": "red", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    assert _score(VQAAccuracy(), ["red", "blue"], [people, people])["score"] == 50.0


def test_vqa_none_is_zero_and_lets_stays() -> None:
    assert NORMALISERS["official"]("none") == "0"
    assert NORMALISERS["official"]("lets go, dont") == "lets go don't"


@given(st.text(max_size=30), st.sampled_from(sorted(NORMALISERS)))
def test_vqa_accuracy_stays_in_its_range_and_is_full_for_ten_equal_answers(
    text: str, variant: Any
) -> None:
    assert vqa_accuracy(text, [text] * 10, variant) == 1.0
    assert 0.0 <= vqa_accuracy(text, ["red"] * 5 + ["blue"] * 5, variant) <= 1.0


# --- texts ----------------------------------------------------------------------------------------


_PIECES = [
    *"a5xI-+%$.#'/<>,:_ \u20ac\u2019\u2212\u0301\u0130",
    "five",
    " percent",
    "per cent",
    "1,000",
    "the ",
]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  The two dogs. ", "2 dogs"),
        ("On the man's head.", "on man's head"),
        ("It\u2019s 3.5, about 10:30!", "it's 3.5 about 10:30"),
        ("1,200 people", "1200 people"),
        ("black-and-white / grey", "black and white grey"),
        ("'quoted'", "quoted"),
        ("A.", ""),
        ("Zwölf Äpfel", "zwölf äpfel"),
        # Signs that make another answer.
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("3-5", "3 5"),
        ("- 5 dogs", "5 dogs"),
        ("5%", "5%"),
        ("5 %.", "5%"),
        ("five percent", "5%"),
        ("$5", "$5"),
        ("-$1,000.50", "-$1000.50"),
        (".5", "0.5"),
        ("-.5.", "-0.5"),
        ("5.", "5"),
        ("1/2", "1/2"),
        ("< 5", "<5"),
        ("C++.", "c++"),
        ("C#", "c#"),
        ("A+", "a+"),
        ("O-", "o-"),
        # Unicode writes these in two ways.
        ("cafe\u0301", "caf\u00e9"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
    ],
)
def test_plain_text(text: str, plain: str) -> None:
    assert plain_text(text) == plain


@given(st.text(max_size=40) | st.lists(st.sampled_from(_PIECES), max_size=8).map("".join))
def test_plain_text_is_idempotent(text: str) -> None:
    once = plain_text(text)
    assert plain_text(once) == once


def test_exact_match_takes_any_reference_and_counts_silence_as_unparsed() -> None:
    figures = _score(ExactMatch(), ["A dog!", "..."], [["hound", "the dog"], "dog"])
    assert figures == {"score": 50.0, "unparsed": 50.0, "count": 2.0}


@pytest.mark.parametrize(
    ("parser", "right"),
    [("official", 1), ("llava", 3), ("lmms-eval", 5), ("vlmevalkit", 3)],
)
def test_gqa_parsers_differ(parser: Any, right: int) -> None:
    texts = ["yes", "Yes", "yes.", "Yes!", " yes", "woman"]
    references = ["yes"] * 5 + ["man"]
    figures = _score(GQAAccuracy(parser=parser), texts, references)
    assert figures["score"] == pytest.approx(100 * right / 6)


def test_letters_that_grow_in_lower_case_are_cut_as_numpy_cuts_them() -> None:
    """A text of lmms-eval's arrays keeps its width: its last sign is pushed out by the first."""
    assert gqa_match("i\u0307stanbul", "\u0130stanbul-", "lmms-eval") == 1.0
    for parser in ("official", "llava", "vlmevalkit"):
        assert gqa_match("i\u0307stanbul", "\u0130stanbul-", parser) == 0.0


@pytest.mark.parametrize(
    ("variant", "same"), [("official", False), ("evalai", True), ("vlmevalkit", True)]
)
def test_commas_between_digits_of_other_scripts(variant: str, same: bool) -> None:
    """Python 2's digits are ten, Python 3's are those of every script."""
    normalise = NORMALISERS[variant]
    assert (normalise("\u0663,\u0664") == "\u0663\u0664") is same
    assert normalise("3,4") == "34"


# --- letters --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter", "rule"),
    [
        ("B", "B", "letter"),
        ("(b)", "B", "letter"),
        ("B.", "B", "letter"),
        ("B. a dog", "B", "letter_first"),
        ("(B) a dog", "B", "letter_first"),
        ("B: a dog", "B", "letter_first"),
        ("The answer is B", "B", "answer_is"),
        ("I choose option (B).", "B", "answer_is"),
        ("a dog", "B", "option_text"),
        ("Dog.", "B", "option_text"),
        ("A dog runs", None, ""),  # an article, not a letter
        ("D", None, ""),  # there are three choices
        ("The answer is A or the answer is B", None, ""),
        ("", None, ""),
        ("Because", None, ""),
        # What models write.
        ("**B**", "B", "letter"),
        ("`B`", "B", "letter"),
        ("\\boxed{B}", "B", "letter"),
        ("\uff08B\uff09\u3002", "B", "letter"),
        ("<answer> B </answer>", "B", "letter"),
        ("B is the answer.", "B", "letter_first"),
        ("B\na dog", "B", "letter_first"),
        ("B - a dog", "B", "letter_first"),
        ("**B.** a dog", "B", "letter_first"),
        ("b) a dog", "B", "letter_first"),
        ("B because it barks", "B", "letter_first"),
        ("B a dog", "B", "letter_first"),
        ("Answer: B", "B", "answer_is"),
        ("ANSWER: B", "B", "answer_is"),
        ("Answer is B", "B", "answer_is"),
        ("answer: b", "B", "answer_is"),
        ("The answer is b.", "B", "answer_is"),
        ("Final answer: **B**", "B", "answer_is"),
        ("The correct answer is **B**.", "B", "answer_is"),
        ("The correct option is (B) a dog.", "B", "answer_is"),
        ("The answer is option B.", "B", "answer_is"),
        ("Option B", "B", "answer_is"),
        ("Choice B.", "B", "answer_is"),
        ("It is B.", "B", "answer_is"),
        ("I would go with B", "B", "answer_is"),
        ("The answer is A because it purrs.", "A", "answer_is"),
        ("Option A is wrong, the answer is B.", "B", "answer_is"),
        ("It barks.\nB", "B", "letter_last"),
        ("It barks.\n\n**B.**", "B", "letter_last"),
        ("<think>The answer is A? No.</think>\n\nB", "B", "letter"),
        ("<think>The answer is A? No.</think><answer>B</answer>", "B", "letter"),
        ("Hm, A?</think>a dog", "B", "option_text"),
        ("The answer is a dog.", "B", "option_text"),
        ("**A dog**", "B", "option_text"),
        # What names no option.
        ("The answer is a big one", None, ""),
        ("The answer is A dog that runs", None, ""),
        ("The answer is A or B", None, ""),
        ("A, B", None, ""),
        ("One of\nA\nB", None, ""),
        ("<think>The answer is A, or", None, ""),  # cut in its thought
        ("A/B", None, ""),
        ("I think it's a dog or a cat", None, ""),
        ("It is a pity", None, ""),
        ("Answer: D", None, ""),
    ],
)
def test_lenient_letters(text: str, letter: str | None, rule: str) -> None:
    assert parse_letter(text, CHOICES) == (letter, rule)


@pytest.mark.parametrize(
    ("parser", "text", "letter"),
    [
        ("scienceqa-lmms-eval", "B", "B"),
        ("scienceqa-lmms-eval", "B.dog", "B"),
        ("scienceqa-lmms-eval", "b", "B"),
        ("scienceqa-lmms-eval", "b.", None),
        ("scienceqa-lmms-eval", "The answer is B.", None),
        ("scienceqa-llava", "B. dog", "B"),
        ("scienceqa-llava", "B.dog", None),
        ("scienceqa-llava", "The answer is B.", "B"),
        ("scienceqa-llava", "The answer is A. The answer is B.", None),
        ("seed-lmms-eval", "Because", "B"),  # slip and all
        ("seed-lmms-eval", "b", "B"),
        ("seed-lmms-eval", "", None),
        ("seed-llava", "B", "B"),
        ("seed-llava", "B.", "B."),
        ("vlmevalkit", "The answer is a dog", "A"),
        ("vlmevalkit", "b", None),
        ("vlmevalkit", "a dog", "B"),
        ("vlmevalkit", "Cannot determine the answer", "Z"),
    ],
)
def test_published_letter_rules(parser: Any, text: str, letter: str | None) -> None:
    assert parse_letter(text, CHOICES, parser)[0] == letter


def test_a_long_run_of_blanks_takes_no_time() -> None:
    # Patterns with several runs of blanks in a row would try every way to share them out.
    for blank in (" ", "\n", "\t \n", " *"):
        assert parse_letter(f"The answer{blank * 20_000}is{blank * 20_000}B", CHOICES)[0] == "B"
        assert parse_letter(f"answer{blank * 20_000}", CHOICES) == (None, "")


def test_letter_match_takes_letters_and_texts() -> None:
    references = ["B", ("a dog", CHOICES), ("c", CHOICES)]
    figures = _score(LetterMatch(), ["b", "B. a dog", "what?"], references)
    assert figures["score"] == pytest.approx(200 / 3)
    assert figures["unparsed"] == pytest.approx(100 / 3)


def test_an_answer_that_is_no_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match="'a horse' is neither a letter of A to C nor one of"):
        LetterMatch().update(["A"], [("a horse", CHOICES)])


# --- POPE, MME ------------------------------------------------------------------------------------


def test_pope_of_a_model_that_prints_garbage() -> None:
    texts, labels = ["?"] * 10, ["yes", "no"] * 5
    llava = _score(POPE(parser="llava"), texts, labels)
    assert (llava["recall"], llava["accuracy"], llava["yes_rate"]) == (100.0, 50.0, 100.0)
    assert llava["f1"] == pytest.approx(200 / 3)
    kit = _score(POPE(parser="vlmevalkit"), texts, labels)
    assert (kit["f1"], kit["unparsed"], kit["yes_rate"]) == (0.0, 100.0, 0.0)


@pytest.mark.parametrize(
    ("parser", "score"), [("llava", 100.0), ("lmms-eval", 0.0), ("vlmevalkit", 100.0)]
)
def test_pope_reads_right_answers_with_a_full_stop_by_its_parser(parser: Any, score: float) -> None:
    figures = _score(POPE(parser=parser), ["Yes.", "No."] * 3, ["yes", "no"] * 3)
    assert (figures["f1"], figures["accuracy"]) == (score, score)


def test_pope_of_llava_is_the_mean_of_the_splits() -> None:
    metric = POPE()
    splits = ["random"] * 2 + ["popular"] * 4
    metric.update(
        ["yes", "no", "yes", "yes", "no", "no"], ["yes", "no", "yes", "no", "yes", "no"], splits
    )
    figures = metric.compute()
    assert (figures["f1/random"], figures["f1/popular"]) == (100.0, 50.0)
    assert figures["score"] == 75.0
    assert figures["f1"] == pytest.approx(200 / 3)


def test_pope_refuses_what_is_no_label_and_no_split() -> None:
    with pytest.raises(ConfigError, match="labels are 'yes' and 'no', got 'maybe'"):
        POPE().update(["yes"], ["maybe"])
    with pytest.raises(ConfigError, match=r"no split 'popula'\. Did you mean 'popular'"):
        POPE().update(["yes"], ["yes"], ["popula"])


def test_mme_refuses_a_third_question_and_an_unknown_category() -> None:
    metric = MME()
    metric.update(["yes"] * 3, ["Yes"] * 3, ["count"] * 3, ["a"] * 3)
    with pytest.raises(ConfigError, match="two questions per picture; count has a picture with"):
        metric.compute()
    with pytest.raises(ConfigError, match=r"no category 'colour'\. Did you mean 'color'"):
        MME().update(["yes"], ["Yes"], ["colour"], ["a"])


# --- boxes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scale", "box", "rule"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", "unit", (0.1, 0.2, 0.3, 0.4), "brackets"),
        ("at [100,200,300,400] and [1,2,3,4]", "per_mille", (0.1, 0.2, 0.3, 0.4), "brackets"),
        ("(100,200),(300,400)", "per_mille", (0.1, 0.2, 0.3, 0.4), "pairs"),
        ("[10, 20, 30, 40]", "pixels", (0.1, 0.1, 0.3, 0.2), "brackets"),
        ("[0.1, 0.2, 0.3]", "unit", None, ""),
        ("left", "unit", None, ""),
    ],
)
def test_boxes_are_read(text: str, scale: Any, box: Any, rule: str) -> None:
    found = parse_box(text, scale, (100, 200))
    assert found == (pytest.approx(box) if box else None, rule)


@pytest.mark.parametrize(
    ("box", "value"),
    [
        ((0.0, 0.0, 1.0, 1.0), 1.0),
        ((0.0, 0.0, 0.5, 1.0), 0.5),
        ((0.5, 0.0, 1.5, 1.0), 1 / 3),
        ((2.0, 2.0, 3.0, 3.0), 0.0),
        ((0.0, 0.0, 0.0, 0.0), 0.0),
        ((1.0, 1.0, 0.0, 0.0), 0.0),  # corners swapped
    ],
)
def test_iou(box: Any, value: float) -> None:
    assert iou((0.0, 0.0, 1.0, 1.0), box) == pytest.approx(value)


def test_rec_accuracy() -> None:
    texts = ["[0,0,1,1]", "[0,0,0.5,1]", "[0,0,0.4,1]", "nothing"]
    figures = _score(RECAccuracy(), texts, [[0, 0, 1, 1]] * 4)
    assert figures["score"] == figures["acc@0.5"] == 50.0
    assert (figures["acc@0.3"], figures["acc@0.9"], figures["unparsed"]) == (75.0, 25.0, 25.0)
    assert figures["iou"] == pytest.approx(100 * 1.9 / 4)


def test_boxes_in_pixels_need_a_size() -> None:
    with pytest.raises(ConfigError, match="need the size of the picture"):
        RECAccuracy(scale="pixels").update(["[1,2,3,4]"], [[0, 0, 1, 1]])


def test_boxes_in_pixels_are_those_of_the_picture_that_the_model_saw() -> None:
    assert seen_size((2000, 1500), 200704, 1003520) == (1148, 840)
    assert seen_size((100, 50), 200704, 1003520) == (644, 336)
    sample = Sample("1", "", lambda: None, meta={"box": [0, 0, 0.5, 1], "size": [2000, 1500]})  # type: ignore[arg-type, return-value]
    metric = RECAccuracy(scale="pixels", limits=(200704, 1003520))
    assert _score(metric, ["[0, 0, 574, 840]"], [sample])["iou"] == pytest.approx(100)
    # What the picture itself measures says nothing of what the model saw.
    with pytest.raises(ConfigError, match="the picture that the model saw"):
        RECAccuracy(scale="pixels").update(["[0, 0, 574, 840]"], [sample])
    with pytest.raises(ConfigError, match="no picture of 5000 x 10 pixels"):
        seen_size((5000, 10), 200704, 1003520)


def test_boxes_of_what_was_shown_lie_on_the_picture() -> None:
    cut = {"box": [0.25, 0, 0.5, 1], "size": [200, 100], "seen": [0.25, 0.0, 0.75, 1.0]}
    sample = Sample("1", "", lambda: None, meta=cut)  # type: ignore[arg-type, return-value]
    said = "[0, 0, 0.5, 1]"
    assert read_box(said, cut)[0] == (0.25, 0.0, 0.5, 1.0)
    assert read_box(said, cut, frame="picture")[0] == (0.0, 0.0, 0.5, 1.0)
    assert _score(RECAccuracy(), [said], [sample])["iou"] == pytest.approx(100)
    assert _score(RECAccuracy(frame="picture"), [said], [sample])["iou"] == pytest.approx(50)
    # A picture of 200 x 100, padded to a square, of which Qwen2.5-VL sees 336 x 336 pixels.
    padded = {"size": [200, 100], "seen": [0.0, -0.5, 1.0, 1.5]}
    box, _ = read_box("[168, 84, 336, 252]", padded, "pixels", (336 * 336, 336 * 336))
    assert box == pytest.approx((0.5, 0.0, 1.0, 1.0))
    assert read_box("nothing", cut) == (None, "")


def test_seen_size_is_that_of_the_processor() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    limits = (56 * 56, 336 * 336)
    processor = Qwen2VLImageProcessor(min_pixels=limits[0], max_pixels=limits[1])
    for size in ((640, 480), (30, 90), (1000, 37), (427, 640)):
        grid = processor(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"]
        _, rows, columns = grid[0].tolist()
        assert seen_size(size, *limits) == (14 * columns, 14 * rows)


# --- rankings -------------------------------------------------------------------------------------


def test_top_k_of_logits_equals_that_of_texts_and_of_the_library() -> None:
    import torchmetrics

    torch.manual_seed(0)
    logits, labels = torch.randn(64, 10), torch.randint(10, (64,))
    figures = _score(TopK(), logits, labels)
    texts = [" ".join(map(str, row)) for row in logits.argsort(descending=True)[:, :5].tolist()]
    assert _score(TopK(), texts, labels.tolist()) == figures
    for k in (1, 5):
        theirs = torchmetrics.functional.accuracy(
            logits, labels, task="multiclass", num_classes=10, top_k=k
        )
        assert figures[f"top{k}"] == pytest.approx(100 * float(theirs))


# --- all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (VQAAccuracy, "variant"),
        (GQAAccuracy, "parser"),
        (POPE, "parser"),
        (MME, "parser"),
        (LetterMatch, "parser"),
        (RECAccuracy, "scale"),
        (RECAccuracy, "frame"),
    ],
)
def test_unknown_variants_are_refused(make: Any, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{make.__name__} has no {option} 'lava'.*Allowed: "):
        make(**{option: "lava"})


@pytest.mark.parametrize("make", [VQAAccuracy, GQAAccuracy, POPE, LetterMatch, RECAccuracy])
def test_lengths_that_differ_and_single_texts_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="2 predictions and 1 references"):
        make().update(["a", "b"], ["yes"])
    with pytest.raises(ConfigError, match="pass a list"):
        make().update("yes", "y")


def test_batches_and_reset_do_not_change_the_result() -> None:
    texts, answers = ["red", "x", "Two", "blue"], [["red"] * 5 + ["2"] * 5] * 4
    whole, parts = VQAAccuracy(), VQAAccuracy()
    whole.update(texts, answers)
    for text, answer in zip(texts, answers, strict=True):
        parts.update([text], [answer])
    assert whole.compute() == pytest.approx(parts.compute())
    parts.reset()
    parts.update(texts[:1], answers[:1])
    assert parts.compute()["score"] == 100.0
    assert parts(texts[1:2], answers[1:2])["score"] == 0.0  # forward: this batch alone
    assert parts.compute()["score"] == 50.0
