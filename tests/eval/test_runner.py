# SPDX-License-Identifier: Apache-2.0
"""The runner: every sample once, errors as records, another study refused, batches that stay."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.eval.instant import Instant, Tile, Tiling, instant_study, loader
from visprune.errors import ConfigError
from visprune.eval.models.base import ModelEntry
from visprune.eval.records import files as record_files
from visprune.eval.records.folder import ResultsFolder, write_json
from visprune.eval.run.album import picture_hash
from visprune.eval.run.batches import batches_of, blocks_of
from visprune.eval.run.progress import Silent
from visprune.eval.run.runner import process_number, run_study
from visprune.eval.study.grid import Study, build_study
from visprune.eval.tasks.base import SampleError

FORK = multiprocessing.get_context("fork")


def run(study: Study, out: Path, model: Instant | None = None, **options: Any) -> ResultsFolder:
    return run_study(study, out, loader=loader(model or Instant()), **options)


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def lines(folder: ResultsFolder) -> list[tuple[str, str]]:
    return [(values["cell"], values["sample"]) for values in folder.lines()]


def test_every_sample_of_every_cell_has_one_record(tmp_path: Path) -> None:
    study = instant_study(
        limit=10, methods=["todre", "fastv"], budgets=[4, 8], seeds=[0, 1], controls=True
    )
    folder = run(study, tmp_path)
    cells = folder.cells()
    # none, keep_all, no_image and five methods at two budgets; two seeds
    assert len(cells) == 2 * (3 + 5 * 2)
    assert list(cells) == folder.study["cells"]
    assert sorted(lines(folder)) == sorted(
        (cell.id, f"{cell.seed}/{i}") for cell in cells.values() for i in range(10)
    )
    record = folder.records(next(iter(cells)))[3]
    assert (record.sample, record.text, record.answer, record.score) == ("0/3", "3", "3", 1.0)
    assert (record.kind, record.cluster, record.meta) == ("odd", "0/1", {"number": 3})
    assert record.macs == {"vision": 5, "prefill": 103}
    assert folder.picture(record.picture) is not None
    assert record.env in folder.environments()


def test_random_draws_follow_the_seed_and_others_do_not(tmp_path: Path) -> None:
    study = instant_study(limit=2, methods=["random", "uniform"], budgets=[4], seeds=[0, 7])
    cells = run(study, tmp_path).cells().values()
    seeds = [cell.method["seed"] for cell in cells if cell.label == "random 4"]
    assert seeds == [0, 7]
    assert [cell.task["seed"] for cell in cells if cell.label == "random 4"] == [0, 7]


def test_a_second_run_asks_nothing(tmp_path: Path) -> None:
    run(instant_study(), tmp_path)
    before = lines(ResultsFolder(tmp_path))
    again = Instant()
    folder = run(instant_study(), tmp_path, again)
    assert not again.asked
    assert lines(folder) == before


def test_a_corrupt_picture_and_a_failing_model_become_records(tmp_path: Path) -> None:
    study = instant_study(task=Tiling(limit=9, broken=(4,)), batch_size=3)
    folder = run(study, tmp_path, Instant(failing=(7,)))
    records = {record.sample: record for record in folder.records()}
    assert len(records) == 9
    failed = {name: record.error for name, record in records.items() if record.error}
    assert failed == {
        "0/4": {
            "type": "SampleError",
            "message": "The picture cannot be read: pictures/broken.jpg.",
        },
        "0/7": {"type": "RuntimeError", "message": "The shapes of question 7 do not fit."},
    }
    assert all(records[name].score is None for name in failed)
    assert records["0/6"].score is not None  # it was in the batch with 7


def test_errors_are_asked_again_only_on_request(tmp_path: Path) -> None:
    study = instant_study(limit=6)
    run(study, tmp_path, Instant(failing=(2,)))
    mended = Instant()
    folder = run(study, tmp_path, mended)
    assert not mended.asked
    assert folder.records()[2].error is not None
    folder = run(study, tmp_path, mended, retry_errors=True)
    assert mended.asked == [["0/2"]]
    assert folder.records()[2].error is None


def test_what_a_task_raises_ends_the_run_and_names_the_sample(tmp_path: Path) -> None:
    """It is no fault of a picture or a model: every sample of its kind would go wrong."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Odd(Tiling):
        def score(self, sample: Any, parsed: Any) -> float:
            return {"0/1": 2.0}.get(sample.id) or 1 / (sample.id != "0/3")

    with pytest.raises(ConfigError, match=r"tiling scored 2\.0, which is not in \[0, 1\]") as one:
        run(instant_study(task=Odd(limit=5)), tmp_path)
    assert "for its sample '0/1'" in one.value.__notes__[0]
    assert [record.sample for record in ResultsFolder(tmp_path).records()] == ["0/0"]

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Unasked(Tiling):
        def prompt(self, sample: Any, style: Any = "plain") -> str:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(instant_study(task=Unasked(limit=5)), tmp_path / "other")


def test_a_parser_that_cannot_take_a_picture_is_an_error_of_its_sample(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Long(Tiling):
        def parse(self, text: str, sample: Any) -> Any:
            if sample.id == "0/1":
                raise SampleError("The picture is too long.")
            return super().parse(text, sample)

    folder = run(instant_study(task=Long(limit=3)), tmp_path)
    errors = [record.error["type"] if record.error else None for record in folder.records()]
    assert errors == [None, "SampleError", None]
    assert folder.records()[1].text == "1"  # what the model said is kept


def test_a_mistake_of_this_package_ends_the_run(tmp_path: Path) -> None:
    """A model's own TypeError is one sample's; ours would be every sample's, one by one."""

    class Theirs(Instant):
        def _answer(self, requests: Any) -> Any:
            if requests[0].sample.id == "0/1":
                raise TypeError("forward() got an unexpected keyword")
            return super()._answer(requests)

    folder = run(instant_study(limit=3), tmp_path / "theirs", Theirs())
    assert [bool(record.error) for record in folder.records()] == [False, True, False]

    class Ours(Instant):
        def _answer(self, requests: Any) -> Any:
            if requests[0].sample.id == "0/1":
                picture_hash(None)  # type: ignore[arg-type]  # an AttributeError in visprune
            return super()._answer(requests)

    with pytest.raises(AttributeError):
        run(instant_study(limit=3), tmp_path / "ours", Ours())

    class Refusing(Instant):
        def _answer(self, requests: Any) -> Any:
            if requests[0].sample.id == "0/1":
                raise ConfigError("This picture has no patches left.")
            return super()._answer(requests)

    folder = run(instant_study(limit=3), tmp_path / "refusing", Refusing())
    assert [bool(record.error) for record in folder.records()] == [False, True, False]


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_rank_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, text)
    for name in ("PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert process_number() == (0, 1, 0)
    monkeypatch.setenv("PMI_RANK", "3")
    assert process_number()[0] == 3
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(ConfigError, match="RANK is 'two'; launchers set it to a whole number"):
        process_number()


def test_another_study_is_refused_and_one_that_extends_it_is_not(tmp_path: Path) -> None:
    small = instant_study(methods=["todre"], budgets=[4])
    run(small, tmp_path)
    before = lines(ResultsFolder(tmp_path))
    for other in (
        instant_study(methods=["fastv"], budgets=[4]),
        instant_study(methods=["todre"], budgets=[8]),
        instant_study(methods=["todre"], budgets=[4], generation={"max_new_tokens": 9}),
    ):
        with pytest.raises(ConfigError, match=r"holds another study.*Use another folder"):
            run(other, tmp_path)
    assert lines(ResultsFolder(tmp_path)) == before
    with pytest.raises(ConfigError, match=r"asks 24 samples of none .* 23. A limit can grow, not"):
        run(instant_study(methods=["todre"], budgets=[4], limit=23), tmp_path)
    large = instant_study(methods=["todre", "fastv"], budgets=[4, 8], batch_size=5)
    model = Instant()
    folder = run(large, tmp_path, model)
    assert sum(map(len, model.asked)) == 3 * 24  # what was there is not asked again
    assert len(lines(folder)) == len(set(lines(folder))) == 5 * 24


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(("first", "then"), [(24, 60), (24, None)])
def test_a_limit_can_grow(tmp_path: Path, first: int, then: int | None, seed: int) -> None:
    """What was answered is not asked again, and the tables hold all of it."""
    study = instant_study(task=Drawn(limit=first), methods=["todre"], budgets=[4], seeds=[seed])
    asked = set(run(study, tmp_path, Instant()).study["cells"])
    assert len(lines(ResultsFolder(tmp_path))) == 2 * first
    model = Instant()
    study = instant_study(task=Drawn(limit=then), methods=["todre"], budgets=[4], seeds=[seed])
    folder = run(study, tmp_path, model)
    total = then or 80
    assert sum(map(len, model.asked)) == 2 * (total - first)
    assert len(lines(folder)) == len(set(lines(folder))) == 2 * total
    assert set(folder.cells()) == asked
    assert {cell.task["limit"] for cell in folder.cells().values()} == {then}
    assert folder.study["tasks"][0]["limit"] == then


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn(Tiling):
    """Eighty samples, of which a limit takes some as every task does."""

    def samples(self) -> Any:
        every = Tiling(limit=80).samples()
        return [every[i] for i in self._chosen([sample.id for sample in every])]


def test_a_first_try_that_asked_nothing_binds_nobody(tmp_path: Path) -> None:
    """A wrong model, a task whose data is not there, a broken row: the mended command runs."""

    class Away(Tiling):
        def samples(self) -> Any:
            raise ConfigError("There is no folder 'data'.")

    wrong = instant_study(models=[ModelEntry("instnat")], methods=["todre"], budgets=[4], limit=6)
    away = instant_study(task=Away(words="elsewhere"), methods=["fastv"], budgets=[4])
    for study, message in ((wrong, "Unknown model"), (away, "no folder")):
        with pytest.raises(ConfigError, match=message):
            run(study, tmp_path)
    folder = run(instant_study(methods=["todre"], budgets=[4], limit=6), tmp_path)
    assert [cell.label for cell in folder.cells().values()] == ["none", "todre 4"]
    assert len(folder.records()) == 2 * 6
    assert [spec["name"] for spec in folder.study["models"]] == ["instant"]


def test_what_was_never_asked_can_be_left_out_and_what_was_asked_cannot(tmp_path: Path) -> None:
    two = [ModelEntry("instant"), ModelEntry("instnat")]
    with pytest.raises(ConfigError, match="Unknown model"):
        run(instant_study(models=two, limit=6), tmp_path)
    assert len(run(instant_study(limit=6), tmp_path).records()) == 6
    other = instant_study(models=[ModelEntry("other")], limit=6)
    with pytest.raises(ConfigError, match=r"holds another study.*such as none \(instant, tiling"):
        run(other, tmp_path, Instant(name="other"))


def test_a_folder_that_is_being_filled_is_not_taken_for_another_study(tmp_path: Path) -> None:
    """Nothing is recorded yet, but a process is at work: a second study would mix with its own."""

    class Starting(Instant):
        def describe(self) -> dict[str, Any]:
            other = FORK.Process(target=refused_elsewhere, args=(tmp_path,))
            other.start()
            other.join(60)
            assert other.exitcode == 0
            return super().describe()

    folder = run(instant_study(limit=4), tmp_path, Starting())
    assert len(folder.records()) == 4


def refused_elsewhere(out: Path) -> None:
    with pytest.raises(ConfigError, match="is at work for another study"):
        run(instant_study(limit=4, controls=["keep_all"]), out)
    run(instant_study(limit=4, controls=["none", "keep_all"]), out / "elsewhere")


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_study_file_that_a_power_cut_emptied_names_the_way_out(tmp_path: Path, text: str) -> None:
    run(instant_study(limit=4), tmp_path)
    before = lines(ResultsFolder(tmp_path))
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(ConfigError, match=r"study.json'.*Delete this one file: the records"):
        run(instant_study(limit=4), tmp_path)
    (tmp_path / "study.json").unlink()
    again = Instant()
    folder = run(instant_study(limit=4), tmp_path, again)
    assert not again.asked
    assert lines(folder) == before
    assert len(folder.records()) == 4


def test_json_is_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *args: (calls.append("replace"), replace(*args)))
    write_json(tmp_path / "study.json", {"a": 1})
    assert calls == ["fsync", "replace"]
    assert (tmp_path / "study.json").read_text() == '{\n  "a": 1\n}\n'


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path) -> None:
    run(instant_study(), tmp_path)
    with pytest.raises(ConfigError, match=r"another 'instant': weights differ"):
        run(instant_study(), tmp_path, Instant(weights="1" * 16))


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    folder = run(instant_study(limit=4), tmp_path / "a")

    class Same(Tiling):  # a task that calls other questions the same
        def to_dict(self) -> dict[str, Any]:
            return {**super().to_dict(), "words": "number"}

    study = instant_study(task=Same(limit=4, words="changed"))
    with pytest.raises(ConfigError, match="answer to another question"):
        run(study, folder.path)


def test_a_method_that_the_model_cannot_run_is_left_out_with_the_reason(tmp_path: Path) -> None:
    heard = Heard()
    study = instant_study(limit=4, methods=["visionzip", "todre"], budgets=[4])
    folder = run(study, tmp_path, progress=heard)
    refused = [cell for cell in folder.cells().values() if cell.refused]
    assert [(cell.label, cell.refused) for cell in refused] == [
        ("visionzip 4", "It has no class token.")
    ]
    assert not folder.records(refused[0].id)
    assert heard.said == ["left out: tiling: visionzip 4: It has no class token."]


def test_what_is_one_cell_is_asked_once(tmp_path: Path) -> None:
    """A control under a label of its own, and a model on two devices, are no second cell."""
    study = instant_study(
        models=[ModelEntry("instant"), ModelEntry("instant", device="cpu")], limit=4, budgets=[4],
        methods=[{"method": "random", "label": "chance"}], controls=["none", "random"],
    )  # fmt: skip
    model = Instant()
    folder = run(study, tmp_path, model)
    assert sum(map(len, model.asked)) == 2 * 4
    assert len(lines(folder)) == len(set(lines(folder))) == 2 * 4
    assert [cell.label for cell in folder.cells().values()] == ["none", "random 4"]


def test_a_study_of_which_nothing_can_run_says_why_once(tmp_path: Path) -> None:
    heard = Heard()

    class Other(Instant):
        def refusal(self, choice: Any, task: Any) -> str | None:
            return f"{task.name} wants class numbers."

    study = instant_study(limit=4, methods=["todre"], budgets=[4], controls=True, seeds=[0, 1])
    with pytest.raises(ConfigError, match=r"^Nothing of the study can run: tiling wants class nu"):
        run(study, tmp_path, Other(), progress=heard)
    assert not heard.said
    two = instant_study(
        models=[ModelEntry("instant"), ModelEntry("other")], limit=4, controls=["none", "keep_all"]
    )
    models = {"instant": Instant(), "other": Other(name="other")}
    run_study(two, tmp_path / "b", loader=lambda spec: models[spec.name], progress=heard)
    assert heard.said == ["left out: tiling: none, keep_all: tiling wants class numbers."]


def test_controls_that_were_left_out_are_said(tmp_path: Path) -> None:
    heard = Heard()
    study = instant_study(limit=2, methods=[{"method": "tome", "r": 2}], controls=True)
    run(study, tmp_path, progress=heard)
    assert heard.said == list(study.notes)
    assert len(heard.said) == 1


@pytest.mark.parametrize(
    ("dtype", "first"),
    [("bfloat16", ["0/0", "0/1", "0/2", "0/3"]), ("float32", ["0/2", "0/3"])],
)
def test_a_batch_that_was_cut_is_asked_whole_where_answers_depend_on_it(
    tmp_path: Path, dtype: str, first: list[str]
) -> None:
    study = instant_study(limit=8, batch_size=4)
    folder = run(study, tmp_path, Instant(dtype=dtype))
    path = folder.record_files()[0]
    kept = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept[:2]) + kept[2][:30])
    model = Instant(dtype=dtype)
    folder = run(study, tmp_path, model)
    assert model.asked == [first, ["0/4", "0/5", "0/6", "0/7"]]
    assert sorted(name for _, name in lines(folder)) == [f"0/{i}" for i in range(8)]


def test_batches_hold_questions_of_about_one_length() -> None:
    lengths = [5, 9, 5, 7, 9, 5, 7]
    assert batches_of(lengths, 3) == [[0, 2, 5], [3, 6], [1, 4]]  # no length is mixed
    assert batches_of(lengths, 6) == [[0, 2, 5], [3, 6, 1, 4]]  # too few of 7 to stand alone
    assert batches_of([3, 1, 2, 5, 4], 3) == [[1, 2, 0], [4, 3]]
    assert batches_of(lengths, 1) == [[0], [2], [5], [3], [6], [1], [4]]
    # Two short ones do not stand among the many of one length, which would all be padded.
    assert batches_of([1, 1, *[2] * 8, 3], 4) == [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9], [10]]
    assert batches_of([1, *[2] * 8, 3], 4) == [[1, 2, 3, 4], [5, 6, 7, 8], [0, 9]]
    assert batches_of([0] * 5, 2) == [[0, 1], [2, 3], [4]]
    # Nothing is padded to a multiple of its length: 16 prompts of 20,000 tokens fill a memory.
    assert batches_of([5, 700, 6, 20_000, 300, 9], 16) == [[0, 2, 5], [4, 1], [3]]


@pytest.mark.parametrize("size", [1, 4, 32, 100])
def test_blocks_hold_every_sample_once_and_several_batches(size: int) -> None:
    blocks = blocks_of(1001, size)
    assert [number for block in blocks for number in block] == list(range(1001))
    assert {len(block) for block in blocks[:-1]} <= {max(64, 4 * size)}


def test_cells_are_walked_together_block_by_block(tmp_path: Path) -> None:
    """Every cell sees a block before any sees the next; those of one encoding follow each other."""
    order: list[tuple[str, str]] = []

    class Watched(Instant):
        @contextmanager
        def answering(self, choice: Any, *rest: Any) -> Iterator[Any]:
            name = choice if isinstance(choice, str) else choice.name

            def ask(requests: Any) -> Any:
                order.append((name, requests[0].sample.id))
                return self._answer(requests)

            yield ask

        def forget(self) -> None:
            order.append(("forget", ""))

    study = instant_study(
        limit=100, methods=["todre", {"method": "tome", "r": 2}, "fastv"], budgets=[4]
    )
    run(study, tmp_path, Watched())
    visits = list(dict.fromkeys((name, int(where[2:] or 0) // 64) if where else (name, n)
                                for n, (name, where) in enumerate(order)))  # fmt: skip
    names = [name for name, _ in visits]
    block = ["none", "todre", "fastv", "forget", "tome", "forget", "forget"]
    assert names == block * 2
    asked = [entry for entry in order if entry[1]]
    assert len(asked) == len(set(asked)) == 4 * 100


def test_a_picture_is_read_once_for_all_questions_and_cells(tmp_path: Path) -> None:
    read: list[int] = []

    @dataclasses.dataclass(frozen=True)
    class Loud(Tile):
        def __call__(self) -> Any:
            read.append(self.number)
            return super().__call__()

    class Tilings(Tiling):
        def samples(self) -> Any:
            return [dataclasses.replace(s, image=Loud(s.image.number)) for s in super().samples()]

    study = instant_study(task=Tilings(limit=30), methods=["todre"], budgets=[4, 8])
    folder = run(study, tmp_path)
    assert len(folder.records()) == 3 * 30
    assert read == list(range(10))  # three questions about each


def test_a_full_disk_stops_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = instant_study(limit=40)
    real, room = os.write, 9000

    def full(file: int, data: Any) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(file, bytes(data)[:room])
        room -= count
        return count

    monkeypatch.setattr(record_files.os, "write", full)
    with pytest.raises(ConfigError, match="disk is full"):
        run(study, tmp_path)
    monkeypatch.undo()
    safe = len(ResultsFolder(tmp_path).records())
    assert 5 < safe < 40
    model = Instant()
    folder = run(study, tmp_path, model)
    assert sum(map(len, model.asked)) == 40 - safe
    assert len(lines(folder)) == len(set(lines(folder))) == 40


def test_progress_counts_every_sample_once(tmp_path: Path) -> None:
    run(instant_study(limit=10), tmp_path)

    class Counting(Silent):
        total, done = 0, 0

        def plan(self, total: int, done: int) -> None:
            self.total, self.done = total, done

        def advance(self, count: int) -> None:
            self.done += count

    shown = Counting()
    study = instant_study(limit=10, methods=["todre"], budgets=[4], batch_size=4)
    run(study, tmp_path, progress=shown)
    assert (shown.total, shown.done) == (20, 20)


def test_the_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Cannot write into"):
        run(instant_study(), tmp_path / "file")


def test_a_failing_device_stops_the_run_and_keeps_what_was_answered(tmp_path: Path) -> None:
    """Every later sample would fail too: one clear end, not a thousand records of one error."""

    class Broken(Instant):
        def _answer(self, requests: Any) -> Any:
            if requests[0].sample.id == "0/5":
                raise torch.AcceleratorError("device-side assert triggered", 710)
            return super()._answer(requests)

    study = instant_study(limit=9)
    with pytest.raises(torch.AcceleratorError):
        run(study, tmp_path, Broken())
    assert [r.sample for r in ResultsFolder(tmp_path).records()] == [f"0/{i}" for i in range(5)]
    folder = run(study, tmp_path)
    assert len(folder.records()) == 9


def test_a_misspelt_model_is_refused_before_another_is_asked(tmp_path: Path) -> None:
    study = build_study({"models": ["embedded", "embeded"], "tasks": [{"task": "embedded"}]})
    with pytest.raises(ConfigError, match=r"no model 'embeded'\. Did you mean 'embedded'"):
        run_study(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()
