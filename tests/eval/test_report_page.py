# SPDX-License-Identifier: Apache-2.0
"""The report's page in a real browser, from disk, without a network: it draws, answers, escapes."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import ActionChains, Keys

from tests.eval.browser import Page, browser, missing
from tests.eval.made_results import made_results
from visprune.eval.records.folder import ResultsFolder, write_json
from visprune.eval.records.record import Cell, Record
from visprune.eval.report import write_report

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser"),
    pytest.mark.xdist_group("browser"),
]

ATTACKS = (
    "</script><script>window.pwned=1</script>",
    '<img src=x onerror="window.pwned=1">',
    "\"'><svg onload=window.pwned=1>",
    "<!--<script>",
    "javascript:window.pwned=1",
    "%%DATA%%%%SCRIPT%%",
    "{{constructor.constructor('window.pwned=1')()}}",
    "\u2028\u2029\x00 __proto__",
)
ATTACK = " ".join(ATTACKS)
BROKEN = f"{ATTACK} \ud800"  # half of a surrogate pair: records may hold it


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    made = made_results(
        folder / "results", pictures=14, methods=("random", "todre", "fastv"), budgets=(128, 32)
    )
    published = {"source": "A paper, table 1", "rows": [
        {"label": "todre 32", "task": "embedded", "score": 88.1, "metric": "score"},
        {"label": "todre 32", "task": "gqa", "score": 59.4, "metric": "score"},
    ]}  # fmt: skip
    write_json(made.path / "study.json", {**made.study, "published": published})
    return write_report(made.path, samples=40, resamples=200)["page"]


@pytest.fixture
def drawn(page: Page, report: Path) -> Iterator[Page]:
    page.open(report)
    yield page
    assert page.complaints() == []


def test_the_plots_are_there_and_hold_every_arm(drawn: Page) -> None:
    for plot in ("#plot-0", "#plot-1"):
        assert len(drawn.all(f"{plot} .pt")) == 7
        assert len(drawn.all(f"{plot} path.front")) == 1
        assert 1 < len(drawn.all(f"{plot} .pt.on-front")) < 7
        # Every point stands inside its plot, and no two texts of an axis fall together.
        assert drawn.run(
            "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [...document.querySelectorAll(arguments[0] + ' .pt .ring')].every((dot) => {"
            "const r = dot.getBoundingClientRect();"
            "return r.left >= box.left && r.right <= box.right && r.top >= box.top - 2 &&"
            " r.bottom <= box.bottom; })",
            plot,
        )
    label = drawn.one("#plot-0 .pt[data-arm='0']").get_attribute("aria-label")
    assert label.startswith("untouched, all tokens; score 100.0 %")


def test_hover_shows_method_budget_and_paired_difference(drawn: Page) -> None:
    drawn.choose("#task", "embedded")
    arm = drawn.run(
        "return JSON.parse(document.getElementById('data').textContent)"
        ".arms.findIndex((arm) => arm.label === 'todre 32')"
    )
    point = drawn.one(f"#plot-0 .pt[data-arm='{arm}']")
    drawn.run("arguments[0].scrollIntoView({block: 'center'})", point)
    assert not drawn.one("#tip").is_displayed()
    ActionChains(drawn.driver).move_to_element(point).perform()
    tip = drawn.one("#tip")
    assert tip.is_displayed()
    row = drawn.run(
        "const data = JSON.parse(document.getElementById('data').textContent);"
        "return data.tables[0].rows.find((row) => row.arm === arguments[0])", arm,
    )  # fmt: skip
    low, high = (f"{x:+.1f}".replace("-", "\u2212") for x in row["delta"][1:])
    assert "todre 32" in tip.text
    assert "32 tokens kept" in tip.text
    assert f"[{low}, {high}]" in tip.text
    # The same arm lights up in the other plot and in the table.
    assert len(drawn.all(f".lit[data-arm='{arm}']")) == 3


def test_the_keyboard_reaches_every_point(drawn: Page) -> None:
    points = drawn.all("#plot-0 .pt")
    assert [point.get_attribute("tabindex") for point in points].count("0") == 1
    drawn.run("arguments[0].focus()", points[0])
    seen = set()
    for _ in points:
        seen.add(drawn.one("#tip strong").text)
        drawn.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert len(seen) == len(points)
    drawn.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not drawn.one("#tip").is_displayed()


def test_everything_can_be_reached_by_tab_and_has_a_name(drawn: Page) -> None:
    nameless = drawn.run(
        "return [...document.querySelectorAll('button, select, input, a')].filter((node) =>"
        " !(node.textContent.trim() || node.getAttribute('aria-label') || node.labels?.length))"
        ".map((node) => node.outerHTML)"
    )
    assert nameless == []
    reached = []
    for _ in range(20):
        ActionChains(drawn.driver).send_keys(Keys.TAB).perform()
        node = drawn.driver.switch_to.active_element
        reached += (node.get_attribute("id") or node.get_attribute("class") or "-").split()
    assert {"skip", "theme", "task", "key", "axis-0", "axis-1", "pt"} <= set(reached)


def test_the_legend_hides_a_method_and_axes_can_be_chosen(drawn: Page) -> None:
    drawn.choose("#task", "embedded")
    drawn.one("[data-key='random']").click()
    assert len(drawn.all("#plot-0 .pt")) == 5
    assert drawn.one("[data-key='random']").get_attribute("aria-pressed") == "false"
    drawn.choose("#axis-1", "total_ms@4")
    assert "batch 4" in drawn.one("#plot-1").text
    drawn.one("[data-key='random']").click()
    assert len(drawn.all("#plot-0 .pt")) == 7


def test_the_table_sorts_and_unfolds(drawn: Page) -> None:
    drawn.choose("#task", "embedded")

    def column() -> list[float]:
        return [float(cell.text.split()[0]) for cell in drawn.all("#results-table td:nth-child(2)")]

    before = len(drawn.all("#results-table thead th"))
    drawn.one("[data-sort='score']").click()
    assert column() == sorted(column(), reverse=True)
    drawn.one("[data-sort='score']").click()
    assert column() == sorted(column())
    drawn.one("#unfold-flops").click()
    drawn.one("#unfold-time").click()
    heads = [head.text for head in drawn.all("#results-table thead th")]
    assert len(heads) > before + 6
    for name in ("vision", "selection", "prefill", "decode", "output head", "first token",
                 "per new token", "agreement %", "unparsed %", "errors", "KV cache"):  # fmt: skip
        assert name in heads


def test_breakdowns_by_kind_by_task_and_published(drawn: Page) -> None:
    assert len(drawn.all("#tasks-table thead th")) == 4  # method, all tasks, two tasks
    drawn.choose("#task", "embedded")
    assert {"count", "read"} <= {h.text.split("\n")[0] for h in drawn.all("#kinds-table thead th")}
    drawn.one("#by-published").click()
    text = drawn.one("#published-table").text
    assert "88.1" in text
    assert "A paper, table 1" in text
    assert "not run here" in text


def test_samples_filter_search_and_show_what_was_kept(drawn: Page) -> None:
    def shown() -> int:
        return len(drawn.all("#sample-list [role=option]"))

    whole = shown()
    assert whole == 80
    drawn.choose("#sample-filter", "disagree")
    disagree = shown()
    assert 0 < disagree < whole
    answers = {
        node.text.lstrip("✓✗! \n") for node in drawn.all("#sample-detail .said") if node.text
    }
    assert len(answers) > 1
    drawn.choose("#sample-filter", "all")
    drawn.choose("#sample-kind", "count")
    assert 0 < shown() < whole
    drawn.choose("#sample-kind", "")
    drawn.choose("#sample-task", "1")
    assert shown() == 40
    drawn.one("#sample-search").send_keys("is it no")
    assert 0 < shown() < 40
    assert "Is it no?" in drawn.one("#sample-detail h3").text
    # Three methods at two budgets keep something; the untouched model has no veil.
    assert len(drawn.all("#sample-detail .shot")) == 7
    assert len(drawn.all("#sample-detail canvas")) == 6
    clear = drawn.run(
        "const shot = [...document.querySelectorAll('.shot')].find((node) =>"
        " node.textContent.includes('todre 32'));"
        "const canvas = shot.querySelector('canvas');"
        "const bytes = canvas.getContext('2d').getImageData(0, 0, 24, 24).data;"
        "let clear = 0; for (let i = 3; i < bytes.length; i += 4) clear += bytes[i] === 0;"
        "return clear;"
    )
    assert clear == 32
    drawn.one("#veil").click()
    assert not drawn.one("#sample-detail canvas").is_displayed()
    drawn.one("#sample-search").send_keys("zzz")
    assert "No sample fits" in drawn.one("#sample-detail").text


def test_samples_by_arrow_keys(drawn: Page) -> None:
    first = drawn.one("#sample-detail h3").text
    drawn.one("#sample-list").send_keys(Keys.END)
    last = drawn.one("[aria-selected=true]").get_attribute("id")
    assert last == "sample-79"
    drawn.one("#sample-list").send_keys(Keys.HOME)
    assert drawn.one("#sample-detail h3").text == first
    drawn.one("[aria-label='next sample']").click()
    assert drawn.one("[aria-selected=true]").get_attribute("id") == "sample-1"


def _luminance(color: str) -> float:
    """Relative luminance as WCAG has it, of ``rgb(0, 1, 2)`` or ``color(srgb 0 0.1 0.2)``."""
    numbers = [float(x) for x in re.findall(r"[\d.]+", color)[:3]]
    channels = numbers if color.startswith("color") else [x / 255 for x in numbers]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_dark_follows_the_system_and_a_button(page: Page, report: Path) -> None:
    background = "return getComputedStyle(document.body).backgroundColor"
    for dark in (False, True):
        page.open(report, dark=dark)
        assert (_luminance(page.run(background)) < 0.2) is dark
        page.one("#theme").click()
        assert (_luminance(page.run(background)) < 0.2) is not dark
    assert page.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_against_what_it_stands_on(page: Page, report: Path, dark: bool) -> None:
    page.open(report, dark=dark)
    page.choose("#task", "embedded")
    found = page.run(
        "const under = (node) => { for (let n = node; n; n = n.parentElement) {"
        "const color = getComputedStyle(n).backgroundColor;"
        "if (!color.startsWith('rgba') && !color.includes('/')) return color; }"
        "return 'rgb(255, 255, 255)'; };"
        "return [...document.querySelectorAll('body *')].filter((node) =>"
        " node.getClientRects().length && !node.closest('.heat, .dim') &&"
        " [...node.childNodes].some((x) => x.nodeType === 3 && x.data.trim())).map((node) => {"
        "const style = getComputedStyle(node);"
        "return [node.ownerSVGElement ? style.fill : style.color, under(node), node.textContent];"
        "});"
    )
    assert len(found) > 200
    weak = [row for row in found if _contrast(row[0], row[1]) < 3.0]
    assert weak == []
    ordinary = [_contrast(row[0], row[1]) for row in found]
    assert sorted(ordinary)[len(ordinary) // 10] >= 4.5


@pytest.mark.parametrize("width", [360, 768])
def test_a_phone_scrolls_down_and_never_sideways(page: Page, report: Path, width: int) -> None:
    page.open(report, width=width, height=780)
    root = "document.documentElement"
    assert page.run(f"return {root}.scrollWidth - {root}.clientWidth") == 0
    boxes = page.run(
        "return [...document.querySelectorAll('.chart, .card, select, input')].filter((node) =>"
        " node.getClientRects().length).map((node) => node.getBoundingClientRect().right)"
    )
    assert max(boxes) <= width
    assert len(page.all("#plot-0 .pt")) == 7
    small = page.run(
        "return [...document.querySelectorAll('#plot-0 text')].map((node) =>"
        " parseFloat(getComputedStyle(node).fontSize) * node.getCTM().a)"
    )
    assert min(small) >= 11.5  # nothing was shrunk to fit
    page.run("document.querySelectorAll('#sample-list [role=option]')[3].click()")
    if width == 360:
        detail = "document.getElementById('sample-detail')"
        assert -5 <= page.run(f"return {detail}.getBoundingClientRect().top") <= 780
    assert page.complaints() == []


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in which every text that a model, data set or user can choose is hostile."""
    where = tmp_path_factory.mktemp("attack")
    folder = ResultsFolder(where / '<b onmouseover="pwned=1">', create=True)
    env = folder.add_environment({"command": ATTACK, "cpu": ATTACK, "versions": {ATTACK: ATTACK}})
    cells = [
        Cell(model={"name": ATTACK, ATTACK: ATTACK}, method={"method": method, ATTACK: ATTACK},
             task={"task": ATTACK, "version": 1, ATTACK: ATTACK}, prompt_style=ATTACK,
             label=f"{method} {ATTACK}", num_keep=4, control=True, refused=refused)
        for method, refused in (
            ("none", None), ("__proto__", None), ("constructor", None), (ATTACK, None),
            ("refused", ATTACK),
        )
    ]  # fmt: skip
    folder.add_cells(cells)
    kinds = ("__proto__", ATTACK)
    with folder.writer() as writer:
        for cell in cells[:-1]:
            folder.add_speed(cell.id, {ATTACK: ATTACK, "batch": {ATTACK: {ATTACK: {"median": 1}}}})
            for number in range(6):
                error = {"type": ATTACK, "message": ATTACK} if number == 5 else None
                writer.write([Record(
                    cell=cell.id, sample=f"{ATTACK}{number}", kind=kinds[number % 2],
                    cluster=f"{ATTACK}{number}", question=BROKEN, prompt=BROKEN, answers=[BROKEN],
                    choices=[ATTACK], text=f"{BROKEN} {number}",
                    answer=None if error else ATTACK, rule=ATTACK,
                    score=None if error else number / 5, error=error, tokens=4.0,
                    macs={"prefill": 10**9, ATTACK: 5}, picture=ATTACK, env=env,
                    kept={"grid": [2, 2], "kept": ATTACK}, meta={ATTACK: ATTACK},
                )])  # fmt: skip
    write_json(
        folder.path / "study.json",
        {"name": ATTACK, ATTACKS[0]: ATTACKS[1],
         "published": {"source": ATTACKS[1], "rows": [
             {"label": ATTACKS[1], "task": ATTACKS[0], "score": 1.0, "metric": ATTACKS[1]}]}},
    )  # fmt: skip
    return write_report(folder.path, where / "<out>", resamples=100)["page"]


def test_no_text_of_a_model_or_data_set_becomes_markup(page: Page, attacked: Path) -> None:
    page.open(attacked)
    state = "return [window.pwned, document.images.length, document.scripts.length]"
    assert page.run(state) == [None, 0, 2]
    assert page.one("h1").text.startswith("</script><script>window.pwned=1</script> <img src=x")
    for selector in ("#unfold-flops", "#by-published", "#by-task", "#by-kind"):
        page.run("document.querySelector(arguments[0])?.click()", selector)
    for key in ("disagree", "lost", "gained", "unparsed", "errors", "all"):
        page.choose("#sample-filter", key)
    for point in page.all("#plot-0 .pt"):
        page.run("arguments[0].focus()", point)
    page.run("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    page.run("document.querySelectorAll('[data-key]')[1].click()")
    assert page.run(state) == [None, 0, 2]
    assert "onerror" not in {
        name
        for names in page.run(
            "return [...document.querySelectorAll('*')].map((node) => node.getAttributeNames())"
        )
        for name in names
    }
    assert page.run("return ({}).polluted") is None
    detail = "return document.getElementById('sample-detail').textContent.toWellFormed()"
    assert '<img src=x onerror="window.pwned=1">' in page.run(detail)
    assert page.run("return document.documentElement.scrollWidth") <= 1280
    assert page.complaints() == []


def test_the_policy_of_the_page_stops_a_script_that_is_not_its_own(
    page: Page, report: Path, tmp_path: Path
) -> None:
    text = report.read_text(encoding="utf-8")
    other = tmp_path / "other.html"
    added = "<script>window.pwned = 1</script><img src='http://192.0.2.1/x.png'>"
    other.write_text(text.replace("<footer", f"{added}<footer"), encoding="utf-8")
    page.open(other)
    assert page.run("return window.pwned") is None
    refused = [line for line in page.complaints() if "Content Security Policy" in line]
    assert len(refused) == 2


def test_a_folder_without_costs_pictures_or_baseline_still_draws(
    page: Page, tmp_path: Path
) -> None:
    folder = ResultsFolder(tmp_path / "bare", create=True)
    cell = Cell(model={"name": "m"}, method={"method": "todre", "num_keep": 8},
                task={"task": "t"}, prompt_style="plain", label="todre 8", num_keep=8)  # fmt: skip
    folder.add_cells([cell])
    with folder.writer() as writer:
        writer.write([
            Record(cell=cell.id, sample=str(i), score=0.0, answer="a", answers=["b"])
            for i in range(3)
        ])  # fmt: skip
    page.open(write_report(folder.path, resamples=100)["page"])
    assert "These records hold no cost" in page.one("#results").text
    assert "No untouched run" in page.one("#table").text
    assert "not run" in page.one("#glance").text
    assert len(page.all(".shot")) == 1
    assert page.complaints() == []


def test_what_was_cut_off_does_not_look_kept(page: Page, tmp_path: Path) -> None:
    """A wide picture of which the model saw the middle: the sides are veiled, the middle is not."""
    folder = ResultsFolder(tmp_path / "cut", create=True)
    cell = Cell(model={"name": "m"}, method={"method": "todre"}, task={"task": "t"},
                prompt_style="plain", label="todre")  # fmt: skip
    folder.add_cells([cell])
    name = folder.add_picture(Image.new("RGB", (320, 80), (255, 0, 0)), "0" * 16)
    bits = base64.b64encode(np.packbits(np.ones((4, 4), bool)).tobytes()).decode()
    kept = {"grid": [4, 4], "kept": bits, "box": [0.375, 0.0, 0.625, 1.0]}
    with folder.writer() as writer:
        writer.write([Record(cell=cell.id, sample="s", cluster="s", score=1.0, answer="a",
                             text="a", answers=["a"], picture=name, kept=kept)])  # fmt: skip
    page.open(write_report(folder.path, resamples=100)["page"])
    page.run("document.querySelector('.shot .pic').scrollIntoView({block: 'center'})")
    shown = Image.open(io.BytesIO(page.one(".shot .pic").screenshot_as_png)).convert("RGB")
    across = [shown.getpixel((shown.width * part // 16, shown.height // 2)) for part in (2, 8, 14)]
    left, middle, right = (pixel[1] for pixel in across)  # green: none in the picture
    assert middle < 40
    assert min(left, right) > 150


def test_the_untouched_tile_shows_what_was_cut_off_too(page: Page, tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "cut", create=True)
    cell = Cell(model={"name": "m"}, method={"method": "none"}, task={"task": "t"},
                prompt_style="plain", label="none")  # fmt: skip
    folder.add_cells([cell])
    name = folder.add_picture(Image.new("RGB", (320, 80), (255, 0, 0)), "0" * 16)
    with folder.writer() as writer:
        writer.write([Record(cell=cell.id, sample="s", cluster="s", score=1.0, answer="a",
                             text="a", answers=["a"], picture=name,
                             kept={"box": [0.375, 0.0, 0.625, 1.0]})])  # fmt: skip
    page.open(write_report(folder.path, resamples=100)["page"])
    page.run("document.querySelector('.shot .pic').scrollIntoView({block: 'center'})")
    shown = Image.open(io.BytesIO(page.one(".shot .pic").screenshot_as_png)).convert("RGB")
    across = [shown.getpixel((shown.width * part // 16, shown.height // 2)) for part in (2, 8, 14)]
    left, middle, right = (pixel[1] for pixel in across)
    assert middle < 40
    assert min(left, right) > 150
    assert "what is not seen of it veiled" in page.one(".shot img").get_attribute("alt")
    assert page.complaints() == []


@pytest.mark.parametrize("width", [320, 390])
def test_one_word_without_an_end_does_not_widen_a_phone(
    page: Page, tmp_path: Path, width: int
) -> None:
    word = "Pneumonoultramicroscopicsilicovolcanoconiosis" * 9
    folder = ResultsFolder(tmp_path / "word", create=True)
    cell = Cell(model={"name": "m"}, method={"method": "none"}, task={"task": "t"},
                prompt_style="plain", label="none")  # fmt: skip
    folder.add_cells([cell])
    with folder.writer() as writer:
        writer.write([
            Record(cell=cell.id, sample=f"{i}{word}", cluster=str(i), score=1.0, answer=word,
                   kind=word, text=f"{word}!", answers=[word], choices=[word, word],
                   question=word, prompt=f"{word}?")
            for i in range(4)
        ])  # fmt: skip
    page.open(write_report(folder.path, resamples=100)["page"], width=width, height=844)
    assert page.run("return [innerWidth, document.documentElement.scrollWidth]") == [width, width]
    inside = page.run(
        "const right = document.querySelector('.detail').getBoundingClientRect().right;"
        "return [...document.querySelectorAll('.detail *')].map((node) =>"
        " node.getBoundingClientRect().right - right)"
    )
    assert max(inside) <= 0, "arrows and words stay on their card"
    assert page.complaints() == []


def test_reading_and_grounding_have_a_column_of_their_own(page: Page, tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "groups", create=True)
    for name, share in {"textvqa": 0.5, "chartqa": 0.25, "gqa": 1.0}.items():
        for method, score in (("none", 1.0), ("todre", share)):
            of = Cell(model={"name": "m"}, method={"method": method},
                      task={"task": name, "version": 0}, prompt_style="plain",
                      label=method)  # fmt: skip
            folder.add_cells([of])
            with folder.writer() as writer:
                writer.write([
                    Record(cell=of.id, sample=str(i), cluster=str(i), score=score, answer="a",
                           text="a", answers=["a"]) for i in range(40)
                ])  # fmt: skip
    page.open(write_report(folder.path, resamples=100)["page"])
    page.one("#by-task").click()
    heads = [head.text.split("\n")[0] for head in page.all("#tasks-table thead th")]
    assert heads[:3] == ["method", "All tasks", "Mean of reading and grounding"]
    (row,) = [r for r in page.all("#tasks-table tbody tr") if "todre" in r.text]
    cells = [cell.text for cell in row.find_elements("css selector", "td, th")]
    assert (cells[1][1:], cells[2][1:]) == ("41.7", "62.5")  # behind a minus
    assert page.complaints() == []


def _same_everywhere(path: Path, pictures: int, answers: str = "a") -> Path:
    """Three arms that get everything right, so that floors lie on one height; written as a page."""
    folder = ResultsFolder(path, create=True)
    for method, macs in (("none", 100), ("todre", 50), ("no_image", 5)):
        cell = Cell(model={"name": "m"}, method={"method": method}, task={"task": "t"},
                    prompt_style="plain", label=method, control=method == "no_image")  # fmt: skip
        folder.add_cells([cell])
        with folder.writer() as writer:
            writer.write([
                Record(cell=cell.id, sample=str(i), cluster=str(i), question="a?", answers=[said],
                       text=said, answer=said, score=1.0, macs={"prefill": macs})
                for i, said in zip(range(pictures), itertools.cycle(answers), strict=False)
            ])  # fmt: skip
    return write_report(folder.path, resamples=100)["page"]


@pytest.mark.parametrize(("pictures", "said"), [(1, None), (20, "none"), (400, "todre")])
def test_few_pictures_prove_no_small_loss(
    page: Page, tmp_path: Path, pictures: int, said: str | None
) -> None:
    page.open(_same_everywhere(tmp_path / "same", pictures, answers="ab"))
    cards = [card.text for card in page.all(".cards .card")]
    found = [text.split("\n")[1] for text in cards if text.startswith("Cheapest")]
    assert found == ([] if said is None else [said])  # and never the one without the picture
    assert page.complaints() == []


def test_a_model_no_better_than_its_floor_has_nothing_to_lose(page: Page, tmp_path: Path) -> None:
    page.open(_same_everywhere(tmp_path / "same", 400))
    (card,) = [c.text for c in page.all(".cards .card") if c.text.startswith("Cheapest")]
    assert card.split("\n")[1:] == [
        "none", "The untouched model is not surely above the commonest answer,", "100.0",
    ]  # fmt: skip
    assert page.complaints() == []


def test_names_of_equal_heights_do_not_lie_on_each_other(page: Page, tmp_path: Path) -> None:
    page.open(_same_everywhere(tmp_path / "same", 40))
    boxes = page.run(
        "return [...document.querySelectorAll('#plot-0 text.level')].map((node) => {"
        " const box = node.getBoundingClientRect(); return [box.left, box.right]; })"
    )
    assert len(boxes) >= 3
    assert all(a[1] < b[0] for a, b in itertools.pairwise(sorted(boxes)))


@pytest.mark.parametrize(("answer", "shown"), [("1", "0. cat 1. dog"), ("B", "A. cat B. dog")])
def test_classes_have_numbers_and_options_letters(
    page: Page, tmp_path: Path, answer: str, shown: str
) -> None:
    folder = ResultsFolder(tmp_path / "classes", create=True)
    cell = Cell(model={"name": "m"}, method={"method": "none"}, task={"task": "t"},
                prompt_style="plain", label="none")  # fmt: skip
    folder.add_cells([cell])
    with folder.writer() as writer:
        writer.write([Record(cell=cell.id, sample="s", cluster="s", score=1.0, answer=answer,
                             text=answer, answers=[answer], choices=("cat", "dog"))])  # fmt: skip
    page.open(write_report(folder.path, resamples=100)["page"])
    assert shown in " ".join(page.one("#samples .facts").text.split())


def test_long_names_of_tasks_do_not_widen_a_phone(page: Page, tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "long", create=True)
    for path in ("somewhere/rather/far/away/questions.jsonl", "elsewhere/as/far/away/others.jsonl"):
        task = {"task": "folder", "version": 1, "path": path, "metric_name": "exact_match"}
        cell = Cell(model={"name": "m"}, method={"method": "none"}, task=task,
                    prompt_style="plain", label="none")  # fmt: skip
        folder.add_cells([cell])
        with folder.writer() as writer:
            writer.write([
                Record(cell=cell.id, sample=str(i), cluster=str(i), score=1.0, answer="a",
                       text="a", answers=["a"])
                for i in range(4)
            ])  # fmt: skip
    page.open(write_report(folder.path, resamples=100)["page"], width=390, height=844)
    assert page.run("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    assert page.complaints() == []


def test_levels_outside_a_plot_are_not_drawn(page: Page, tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "low", create=True)
    cell = Cell(model={"name": "m"}, method={"method": "todre"}, task={"task": "t"},
                prompt_style="plain", label="todre")  # fmt: skip
    folder.add_cells([cell])
    with folder.writer() as writer:
        writer.write([
            Record(cell=cell.id, sample=str(i), cluster=str(i // 2), score=float(i % 40 == 0),
                   answer="a", answers=["b"], tokens=8.0)
            for i in range(200)
        ])  # fmt: skip
    page.open(write_report(folder.path, resamples=100)["page"])
    assert "commonest answer: 100.0 · text-only prior: 100.0" in page.one("#table").text
    assert page.all("#plot-0 line.floor") == []
    assert len(page.all("#plot-0 .pt")) == 1
    assert page.complaints() == []


def test_the_scripts_are_one_strict_function_without_markup(report: Path) -> None:
    """A second line of defence beside the policy: no way to turn text into markup or code."""
    assets = Path(sys.modules["visprune.eval.report"].__path__[0]) / "assets"
    for path in assets.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                     "new Function", "fetch(", "XMLHttpRequest", "localStorage"):  # fmt: skip
            assert word not in text, (path.name, word)
    data = report.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data)["tables"]
