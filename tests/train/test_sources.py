# SPDX-License-Identifier: Apache-2.0
"""Pictures from every kind of source are the same pictures; what cannot be used is refused."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest

from tests.train import small
from visprune.errors import ConfigError
from visprune.train.image.pictures import CorruptPicture, Pictures
from visprune.train.image.recipe import DataConfig
from visprune.train.image.sources import open_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_folder(tmp_path_factory.mktemp("data") / "photos", train=3, val=2)


def content(pictures: Pictures) -> list[tuple[str, bytes]]:
    """Class and pixels of every picture, in no order."""
    return sorted(
        (pictures.classes[pictures.labels[i]], pictures.read(i).tobytes())
        for i in range(len(pictures))
    )


def as_zip(folder: Path, path: Path, top: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("__MACOSX/train/._junk", b"x")
        for source in sorted(folder.rglob("*.png")):
            file.write(source, top + source.relative_to(folder).as_posix())
    return path


def as_tar(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as file:
        file.add(folder, arcname="photos")
    return path


def as_npz(folder: Path, root: Path, encoded: bool) -> Path:
    root.mkdir()
    (root / "classes.txt").write_text("\n".join(small.CLASSES) + "\n")
    for part in ("train", "val"):
        files = sorted((folder / part).rglob("*.png"))
        labels = np.array([small.CLASSES.index(f.parent.name) for f in files], dtype=np.uint8)
        if encoded:
            blobs = [np.frombuffer(f.read_bytes(), np.uint8) for f in files]
            offsets = np.cumsum([0, *map(len, blobs)])
            np.savez(
                root / f"{part}.npz", png=np.concatenate(blobs), offsets=offsets, labels=labels
            )
        else:
            pixels = np.stack([np.asarray(small.Image.open(f)) for f in files])
            np.savez(root / f"{part}.npz", images=pixels, labels=labels)
    return root


def as_data_set(folder: Path, root: Path) -> Path:
    datasets.disable_progress_bars()
    parts = {}
    for part in ("train", "val"):
        files = sorted((folder / part).rglob("*.png"))
        features = datasets.Features(
            {"img": datasets.Image(), "kind": datasets.ClassLabel(names=list(small.CLASSES))}
        )
        rows = {
            "img": [{"bytes": f.read_bytes(), "path": None} for f in files],
            "kind": [f.parent.name for f in files],
        }
        parts[part] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(root))
    return root


@pytest.mark.parametrize(
    "kind", ["zip", "zip in a folder", "tar", "npz, encoded", "npz, pixels", "datasets"]
)
def test_every_source_gives_the_same_pictures(kind: str, folder: Path, tmp_path: Path) -> None:
    made = {
        "zip": lambda: as_zip(folder, tmp_path / "a.zip"),
        "zip in a folder": lambda: as_zip(folder, tmp_path / "a.zip", "photos/"),
        "tar": lambda: as_tar(folder, tmp_path / "a.tar"),
        "npz, encoded": lambda: as_npz(folder, tmp_path / "a", encoded=True),
        "npz, pixels": lambda: as_npz(folder, tmp_path / "a", encoded=False),
        "datasets": lambda: as_data_set(folder, tmp_path / "a"),
    }[kind]()
    for part, count in (("train", 9), ("val", 6)):
        want = open_pictures(DataConfig(str(folder)), part)
        got = open_pictures(DataConfig(str(made)), part)
        assert len(got) == len(want) == count
        assert got.classes == want.classes == list(small.CLASSES)
        assert content(got) == content(want)


def test_parquet(folder: Path, tmp_path: Path) -> None:
    saved = datasets.load_from_disk(str(as_data_set(folder, tmp_path / "a")))
    (tmp_path / "b").mkdir()
    for part in ("train", "val"):
        saved[part].to_parquet(str(tmp_path / "b" / f"{part}.parquet"))
    got = open_pictures(DataConfig(str(tmp_path / "b")), "val")
    assert content(got) == content(open_pictures(DataConfig(str(folder)), "val"))


def test_greyscale_and_transparent_pictures_become_rgb(folder: Path, tmp_path: Path) -> None:
    root = small.make_folder(tmp_path / "photos", train=1, val=1)
    first = root / "train" / "red" / "000.png"
    with small.Image.open(first) as image:
        image.convert("L").save(first)
    with small.Image.open(root / "train" / "blue" / "000.png") as image:
        image.convert("RGBA").save(root / "train" / "blue" / "000.png")
    pictures = open_pictures(DataConfig(str(root)), "train")
    assert {pictures.read(i).mode for i in range(3)} == {"RGB"}


def test_pictures_are_those_that_evaluation_shows(tmp_path: Path) -> None:
    """A model that learns of photos on their side would be asked of upright ones."""
    root = small.make_folder(tmp_path / "photos", train=2, val=1)
    exif = small.Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    turned, deep = root / "train" / "blue" / "000.jpg", root / "train" / "blue" / "001.png"
    small.Image.new("RGB", (30, 20)).save(turned, exif=exif)
    ramp = np.arange(256, dtype=np.float64).reshape(16, 16)
    small.Image.fromarray((ramp * 257).astype(np.uint16)).save(deep)
    pictures = open_pictures(DataConfig(str(root)), "train")
    read = {pictures.name(i).rpartition("/")[2]: pictures.read(i) for i in range(len(pictures))
            if "blue" in pictures.name(i)}  # fmt: skip
    assert read["000.jpg"].size == (20, 30)
    assert np.array_equal(np.asarray(read["001.png"])[..., 0], ramp)


def test_archives_are_opened_by_each_process(folder: Path, tmp_path: Path) -> None:
    pictures = open_pictures(DataConfig(str(as_zip(folder, tmp_path / "a.zip"))), "train")
    want = content(pictures)
    parent = pictures.files.handle()  # type: ignore[attr-defined]

    def work(rank: int) -> None:
        assert content(pictures) == want
        assert pictures.files.handle() is not parent  # type: ignore[attr-defined]

    assert small.in_children(work, count=2) == [0, 0]


def refused(message: str, path: Path, part: str = "train", **more: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_pictures(DataConfig(str(path), **more), part)  # type: ignore[arg-type]


def test_folders_that_cannot_be_classified_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    refused("There is no data at.*Give data.path=FOLDER with train/CLASS/PICTURE", root)
    (root / "train").mkdir(parents=True)
    refused("There is no picture in", root)
    refused("holds no 'vall'.*It holds: train", root, "val", val="vall")
    small.picture(0, 0).save(root / "train" / "loose.png")
    refused("There is no picture in", root)
    (root / "train" / "red").mkdir()
    small.picture(0, 0).save(root / "train" / "red" / "0.png")
    refused("one class only, \\['red'\\]", root)
    (root / "train" / "green").mkdir()
    refused("No picture of class green", root)
    (root / "train" / "green" / "notes.txt").write_text("no picture")
    refused("No picture of class green", root)


def test_archives_that_cannot_be_used_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"no zip")
    refused("is not an archive", tmp_path / "a.zip")
    (tmp_path / "a.rar").write_bytes(b"")
    refused("Cannot tell what", tmp_path / "a.rar")
    path = as_zip(folder, tmp_path / "b.zip")
    refused("no folder 'trian'. Did you mean 'train'", path, train="trian")
    np.savez(tmp_path / "c.npz", x=np.zeros(3))
    refused("expected `labels`", tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", images=np.zeros((3, 4, 4, 3), np.uint8), labels=np.zeros(2))
    refused("do not fit", tmp_path / "d.npz")
    path = as_data_set(folder, tmp_path / "e")
    refused("no split 'vla'. Did you mean 'val'", path, "val", val="vla")
    refused("no column 'image'", path, image_key="image")


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_picture_that_cannot_be_read_is_named(damage: str, tmp_path: Path) -> None:
    root = small.make_folder(tmp_path / "photos", train=2, val=1)
    path = root / "train" / "green" / "001.png"
    data = {"cut": path.read_bytes()[:200], "empty": b"", "text": b"not a picture"}[damage]
    path.write_bytes(data)
    pictures = open_pictures(DataConfig(str(root)), "train")
    with pytest.raises(CorruptPicture, match=r"green/001\.png"):
        pictures.read(3)
    assert pictures.read(2).size == (small.SIDE, small.SIDE)


def test_a_damaged_member_of_an_archive_is_named(folder: Path, tmp_path: Path) -> None:
    path = as_zip(folder, tmp_path / "a.zip")
    with zipfile.ZipFile(path) as file:
        info = next(i for i in file.infolist() if i.filename == "train/green/001.png")
    raw = bytearray(path.read_bytes())
    raw[info.header_offset + 60 : info.header_offset + 80] = b"\0" * 20
    path.write_bytes(raw)
    pictures = open_pictures(DataConfig(str(path)), "train")
    with pytest.raises(CorruptPicture, match=r"green/001\.png"):
        pictures.read(4)
    assert pictures.read(0).size == (small.SIDE, small.SIDE)
