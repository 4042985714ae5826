# SPDX-License-Identifier: Apache-2.0
"""Two runs side by side: pairing, McNemar's test, and what cannot be compared."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.eval.instant import Instant, Tiling, instant_study, loader
from visprune.errors import ConfigError
from visprune.eval.models.base import ModelEntry
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.records.record import Cell, Record
from visprune.eval.report.compare import compare, mcnemar, to_text
from visprune.eval.run.runner import run_study
from visprune.eval.tasks.base import get_task


@pytest.mark.parametrize(
    ("only_first", "only_second"), [(0, 0), (1, 0), (0, 5), (3, 7), (10, 10), (2, 30)]
)
def test_mcnemar_is_the_binomial_test(only_first: int, only_second: int) -> None:
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert mcnemar(only_first, only_second) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_of_many_questions() -> None:
    assert mcnemar(20_000, 20_000) == pytest.approx(1.0)
    # scipy.stats.binomtest(4900, 10000).pvalue
    assert mcnemar(4900, 5100) == pytest.approx(0.04659, rel=1e-3)
    assert 0.0 <= mcnemar(0, 50_000) < 1e-300


class Wrong(Instant):
    """Also wrong at every fifth question."""

    def _answer(self, requests):  # type: ignore[no-untyped-def]
        outputs = super()._answer(requests)
        for number, request in enumerate(requests):
            if int(request.sample.id.split("/")[1]) % 5 == 0:
                object.__setattr__(outputs[number], "text", "9")
        return outputs


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """Two folders; the second model is wrong more often, and failed once."""
    study = instant_study(task=Tiling(limit=70), methods=["todre"], budgets=[4], seeds=[0, 1])
    for name, model in (("a", Instant()), ("b", Wrong(failing=(3,)))):
        run_study(study, tmp_path / name, loader=loader(model))
    return str(tmp_path / "a"), str(tmp_path / "b")


def test_two_folders_are_compared_method_by_method(folders: tuple[str, str]) -> None:
    first, second = compare(*folders, resamples=200)
    assert (first.first, second.second) == (f"{folders[0]}:untouched", f"{folders[1]}:todre 4")
    for found in (first, second):
        # 2 seeds x 70 questions; question 3 failed in both seeds
        assert (found.samples, found.left_out, found.pictures) == (138, 2, 48)
        # wrong in A: every 7th (10 of 70); in B also every 5th (14, 2 of them in both)
        assert found.first_score == pytest.approx(100 * (69 - 10) / 69)
        assert found.second_score == pytest.approx(100 * (69 - 10 - 12) / 69)
        assert (found.only_first, found.only_second) == (24, 0)
        assert found.p_value == pytest.approx(2 / 2**24)
        assert found.difference.delta == pytest.approx(-100 * 24 / 138)
        assert found.difference.low <= found.difference.delta <= found.difference.high < 0
    text = to_text([first])
    assert "138 samples of 48 pictures that both answered (2 left out)" in text
    assert "right in A alone: 24, in B alone: 0" in text


def test_one_picture_has_no_interval(tmp_path: Path) -> None:
    study = instant_study(task=Tiling(limit=3), methods=["todre"], budgets=[4])
    run_study(study, tmp_path, loader=loader(Instant()))
    text = to_text(compare(f"{tmp_path}:none", f"{tmp_path}:todre 4", resamples=100))
    assert "3 samples of 1 pictures" in text
    assert "no interval: all questions are about one picture" in text


def test_two_methods_of_one_folder(folders: tuple[str, str]) -> None:
    (found,) = compare(f"{folders[0]}:none", f"{folders[0]}:todre 4", resamples=100)
    assert (found.first, found.second) == ("untouched", "todre 4")
    assert found.difference.delta == 0.0
    assert found.p_value == 1.0


def test_each_model_is_compared_with_itself(tmp_path: Path) -> None:
    """Several models of a folder share labels and questions: their answers are not one run."""
    both = {"good": Instant(name="good"), "bad": Wrong(name="bad", weights="1" * 16)}
    specs = [ModelEntry(name) for name in both]
    for folder, models in (("two", specs), ("one", specs[:1]), ("other", specs[1:])):
        study = instant_study(
            task=Tiling(limit=70), models=models, methods=["todre"], budgets=[4]
        )  # fmt: skip
        run_study(study, tmp_path / folder, loader=lambda spec: both[spec.name])
    two, one, other = (str(tmp_path / name) for name in ("two", "one", "other"))

    found = compare(f"{two}:none", f"{two}:todre 4", resamples=100)
    assert [x.first for x in found] == ["untouched on good", "untouched on bad"]
    assert [x.samples for x in found] == [70, 70]
    assert [x.first_score for x in found] == pytest.approx([100 * 60 / 70, 100 * 48 / 70])
    (found,) = compare(f"{one}:none", f"{two}:none", resamples=100)
    assert (found.only_first, found.only_second) == (0, 0)  # the same model, not the other one
    # One model each: that is the comparison that was asked for.
    (found,) = compare(f"{one}:none", f"{other}:none", resamples=100)
    assert (found.only_first, found.only_second) == (12, 0)


def test_models_that_cannot_be_paired_are_named(tmp_path: Path) -> None:
    for folder, names in (("two", ("a", "b")), ("one", ("c",))):
        study = instant_study(task=Tiling(limit=4), models=[ModelEntry(name) for name in names])
        run_study(
            study, tmp_path / folder,
            loader=lambda spec: Instant(name=spec.name, weights=spec.name * 16),
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"cannot be paired: the one was run on a .*, b .*on c "):
        compare(str(tmp_path / "two"), str(tmp_path / "one"))


def test_two_methods_of_one_name_are_not_mixed(tmp_path: Path) -> None:
    run_study(
        instant_study(task=Tiling(limit=4), methods=["todre"], budgets=[4, 8]), tmp_path / "a",
        loader=loader(Instant()),
    )  # fmt: skip
    for path in (tmp_path / "a" / "cells").iterdir():
        path.write_text(path.read_text().replace("todre 8", "todre 4"))
    with pytest.raises(ConfigError, match="calls two methods 'todre 4'"):
        compare(f"{tmp_path / 'a'}:none", f"{tmp_path / 'a'}:todre 4")


def test_what_cannot_be_compared_is_named(folders: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no method 'todre 5'. Did you mean 'todre 4'"):
        compare(f"{folders[0]}:todre 5", folders[1])
    with pytest.raises(ConfigError, match="Both sides are the same run"):
        compare(folders[0], folders[0])
    with pytest.raises(ConfigError, match="not there"):
        compare(folders[0], str(tmp_path / "absent"))
    run_study(
        instant_study(task=Tiling(limit=9, words="letter")), tmp_path / "c",
        loader=loader(Instant()),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="no question in common"):
        compare(f"{folders[0]}:none", str(tmp_path / "c"))


def test_names_are_those_of_the_tables(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = compare(f"{folders[0]}:untouched", f"{folders[0]}:todre 4", resamples=100)
    assert found.first == "untouched"
    monkeypatch.chdir(Path(folders[0]).parent)
    with pytest.raises(ConfigError, match="Both sides are the same run"):
        compare("a", folders[0])


def _pope(folder: Path, data: str, method: str, answers: str) -> None:
    """A run of POPE with references yes and no in turn; ``answers`` one letter per question."""
    task = get_task("pope", data=data).to_dict()
    of = Cell(
        model={"name": "m"}, method={"method": method}, task=task, label=method,
        prompt_style="plain",
    )  # fmt: skip
    out = ResultsFolder(folder, create=True)
    out.add_cells([of])
    with out.writer() as writer:
        for number, letter in enumerate(answers):
            want, said = "yes" if number % 2 == 0 else "no", {"y": "yes", "n": "no"}[letter]
            writer.write([Record(
                cell=of.id, sample=str(number), key=str(number), cluster=f"p{number // 2}",
                question=f"q{number}", answers=(want,), answer=said, text=said,
                score=float(said == want), kind="random",
            )])  # fmt: skip


def test_a_task_s_own_figure_stands_beside_the_mean(tmp_path: Path) -> None:
    """POPE's is F1; where the data lies is no option of the benchmark."""
    _pope(tmp_path / "a", "here", "none", "ynynynyn")
    _pope(tmp_path / "b", "there", "none", "yynnyyyn")
    (found,) = compare(str(tmp_path / "a"), str(tmp_path / "b"), resamples=200)
    assert (found.first_score, found.second_score) == (100.0, 62.5)
    assert found.own is not None
    assert (found.own.name, found.own.first) == ("pope_llava", 100.0)
    f1 = get_task("pope").aggregate(list(ResultsFolder(tmp_path / "b").records()))["score"]
    assert found.own.second == pytest.approx(f1)
    assert found.own.difference.low <= found.own.difference.delta <= found.own.difference.high
    text = to_text([found])
    assert "mean per question: A 100.00 %, B 62.50 %" in text
    assert f"pope_llava: A 100.00 %, B {f1:.2f} %" in text
