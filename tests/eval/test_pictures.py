# SPDX-License-Identifier: Apache-2.0
"""Pictures as they are shown: turned as EXIF says, and of more than 8 bits a pixel."""

from __future__ import annotations

import base64
import csv
import io
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from tests.eval.hub_fixtures import write_hub
from tests.eval.task_fixtures import LOCAL, dump_lines
from visprune.eval.tasks.base import SampleError, get_task
from visprune.eval.tasks.loading import decode, open_image, picture_size

# For each orientation, where a picture's stored top left corner is shown.
CORNERS = {
    1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0),
}  # fmt: skip


def _marked(size: tuple[int, int] = (60, 40)) -> Image.Image:
    """Black, its top left quarter white."""
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), (0, 0, size[0] // 2, size[1] // 2))
    return picture


def _photo(orientation: int, form: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    _marked().save(buffer, form, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_a_photo_is_turned_as_its_exif_says(form: str, orientation: int) -> None:
    data = _photo(orientation, form)
    shown = decode(io.BytesIO(data), "a")
    assert shown.size == ((40, 60) if orientation >= 5 else (60, 40))
    assert picture_size(io.BytesIO(data), "a") == shown.size
    row, column = CORNERS[orientation]
    assert np.asarray(shown)[row, column].min() > 200
    assert np.asarray(shown)[-1 - row, -1 - column].max() < 50
    if form != "TIFF":  # which Pillow turns by itself
        stored = decode(io.BytesIO(data), "a", orient=False)
        assert stored.size == picture_size(io.BytesIO(data), "a", orient=False) == (60, 40)
        assert np.asarray(stored)[0, 0].min() > 200


def test_the_pixels_are_those_that_datasets_shows() -> None:
    for orientation in CORNERS:
        data = _photo(orientation)
        theirs = datasets.Image().decode_example({"bytes": data, "path": None}).convert("RGB")
        assert decode(io.BytesIO(data), "a").tobytes() == theirs.tobytes()


def test_every_way_to_a_picture_turns_it_and_can_be_told_not_to(tmp_path: Path) -> None:
    photo = _photo(6)
    own = tmp_path / "own"
    dump_lines(own / "x.jsonl", [{"image": "a.jpg", "question": "?", "answers": "x"}])
    (own / "a.jpg").write_bytes(photo)
    classes = tmp_path / "classes"
    for label in ("cat", "dog"):
        (classes / label).mkdir(parents=True)
        (classes / label / "1.jpg").write_bytes(photo)
    files = tmp_path / "vizwiz"
    LOCAL["vizwiz"](files)
    for file in (files / "val").iterdir():
        file.write_bytes(photo)
    table = tmp_path / "mmbench"
    LOCAL["mmbench_en"](table)
    _swap_pictures(table / "mmbench_dev_20230712.tsv", photo)
    hub = tmp_path / "hub"
    write_hub("vizwiz", hub, picture=photo)
    for name, where in (
        ("folder", {"path": str(own)}),
        ("folder", {"path": str(classes)}),
        ("imagenet", {"data": str(classes)}),
        ("vizwiz", {"data": str(files)}),
        ("mmbench_en", {"data": str(table)}),
        ("vizwiz", {"data": str(hub)}),
    ):
        task = get_task(name, **where)
        assert task.samples()[0].image().size == (40, 60), (name, where)
        flat = get_task(name, orient=False, **where)
        assert flat.samples()[0].image().size == (60, 40), (name, where)
        assert task.to_dict() != flat.to_dict()  # other pictures, other records


def _swap_pictures(path: Path, photo: bytes) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    place = rows[0].index("image")
    for row in rows[1:]:
        row[place] = base64.b64encode(photo).decode() if len(row[place]) > 9 else row[place]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows(rows)


def test_boxes_are_parts_of_the_picture_as_it_is_shown(tmp_path: Path) -> None:
    write_hub("refcoco_rec", tmp_path, picture=_photo(6))
    options = {"data": str(tmp_path), "split": "testA"}
    assert get_task("refcoco_rec", **options).samples()[0].meta["size"] == [40, 60]
    flat = get_task("refcoco_rec", orient=False, **options)
    assert flat.samples()[0].meta["size"] == [60, 40]


def test_a_picture_with_broken_exif_is_shown_as_it_lies(tmp_path: Path) -> None:
    photo = _photo(6)
    at = photo.index(b"Exif\0\0") + 6
    (tmp_path / "a.jpg").write_bytes(photo[:at] + b"garbage!" + photo[at + 8 :])
    assert open_image(tmp_path / "a.jpg").size == (60, 40)
    assert picture_size(tmp_path / "a.jpg", "a.jpg") == (60, 40)
    (tmp_path / "b.jpg").write_bytes(_photo(9))
    assert open_image(tmp_path / "b.jpg").size == (60, 40)


def _saved(values: np.ndarray, form: str) -> io.BytesIO:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form)
    return buffer


RAMP = np.arange(256, dtype=np.float64).reshape(16, 16)


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ((RAMP * 257).astype(np.uint16), "PNG"),
        ((RAMP * 257).astype(np.uint16), "TIFF"),
        ((RAMP * 16 + 5).astype(np.uint16), "PNG"),  # 12 bits of an X-ray
        (RAMP.astype(np.uint16), "PNG"),  # 8 bits, stored in 16
        ((RAMP * 70_000 - 9).astype(np.int32), "TIFF"),
        ((RAMP / 255).astype(np.float32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 0.04 - 3).astype(np.float32), "TIFF"),
    ],
)
def test_deep_pictures_are_scaled(values: np.ndarray, form: str) -> None:
    shown = decode(_saved(values, form), "a")
    assert shown.mode == "RGB"
    assert np.array_equal(np.asarray(shown)[..., 0], RAMP)


def test_deep_pictures_that_cannot_be_shown_are_errors() -> None:
    with pytest.raises(SampleError, match=r"a\.tif \(its values are not all finite"):
        decode(_saved(np.full((4, 4), np.nan, np.float32), "TIFF"), "a.tif")
    with pytest.raises(SampleError, match=r"every pixel of its I;16 values is 30000"):
        decode(_saved(np.full((4, 4), 30_000, np.uint16), "PNG"), "a.png")


def test_what_a_decoder_raises_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's AVIF decoder raises RuntimeError on damaged files."""
    _marked().save(tmp_path / "a.png")

    def fail(picture: Image.Image) -> None:
        raise RuntimeError("Failed to decode frame 0")

    monkeypatch.setattr(PngImageFile, "load", fail)
    with pytest.raises(SampleError, match=r"a\.png.*Failed to decode frame 0"):
        open_image(tmp_path / "a.png")


def test_the_fixture_s_exif_is_what_cameras_write() -> None:
    photo = _photo(6)
    tiff = photo[photo.index(b"Exif\0\0") + 6 :]
    order = "<" if tiff[:2] == b"II" else ">"
    (entries,) = struct.unpack_from(f"{order}H", tiff, 8)
    tag, kind, count, value = struct.unpack_from(f"{order}HHIH", tiff, 10)
    assert (entries, tag, kind, count, value) == (1, 0x0112, 3, 1, 6)
