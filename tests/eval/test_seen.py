# SPDX-License-Identifier: Apache-2.0
"""Where the grid of kept patches lies on a picture, found again in the pixels that models get."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from timm.data import create_transform
from transformers import (
    CLIPImageProcessor,
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    PixtralImageProcessor,
)

import visprune
from tests import tiny
from tests.eval.small import small_embedded
from visprune.backbones.vlm.seen import Canvas, Seen
from visprune.errors import ConfigError
from visprune.eval.models.base import ModelEntry, Output, Request
from visprune.eval.models.load import load_model
from visprune.eval.models.seen import pad_to_square, seen_by_transform
from visprune.eval.models.vit import TimmClassifier
from visprune.eval.models.vlm import PLAIN, VLM
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.records.record import Record
from visprune.eval.report import write_report
from visprune.eval.run.progress import Silent
from visprune.eval.run.runner import run_study
from visprune.eval.study.grid import build_study
from visprune.eval.tasks.base import Sample, get_task
from visprune.eval.tasks.embedded.task import EmbeddedTask
from visprune.eval.tasks.imagenet import ImageNet
from visprune.machine.find import find_adapter

SIZES = [(400, 100), (100, 400), (301, 200), (224, 224), (97, 333)]
SMALL: dict[str, Any] = {"do_normalize": False, "do_rescale": False}


def ramp(size: tuple[int, int]) -> Image.Image:
    """Red grows from left to right, green from top to bottom, blue says: this is picture."""
    across, down = np.meshgrid(*(np.linspace(0, 255, side) for side in size))
    return Image.fromarray(np.stack([across, down, np.full_like(across, 255)], -1).astype(np.uint8))


def ends(pixels: Any) -> list[float]:
    """Left, top, right, bottom of the pixels ``[3, H, W]``, in fractions of the ramp.

    Lines are laid through what is picture, so that padding is found by going on beyond it.
    """
    red, green, blue = np.asarray(pixels, np.float64)
    inside = blue > 250
    found = []
    for values, axis in ((red, 1), (green, 0)):
        line = np.where(inside, values, np.nan)
        line = np.nanmean(line[:, inside.any(0)] if axis else line[inside.any(1)], axis=1 - axis)
        place = np.flatnonzero(inside.any(1 - axis))
        keep = slice(len(place) // 4, max(len(place) // 4 + 2, 3 * len(place) // 4))
        slope, start = np.polyfit(place[keep], line[keep] / 255, 1)
        count = inside.shape[axis]
        found.append((start - slope / 2, start + slope * (count - 0.5)))
    return [found[0][0], found[1][0], found[0][1], found[1][1]]


def close(seen: Seen, pixels: Any) -> None:
    assert (seen.box or [0, 0, 1, 1]) == pytest.approx(ends(pixels), abs=0.025)


def by_family(processor: Any, family: str, size: tuple[int, int]) -> Seen:
    """What the adapter of a family says of a processor."""
    canvas = Canvas.of(size)
    find_adapter(tiny.build(family)).fit(processor, canvas)
    return canvas.seen()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessor(size={"shortest_edge": 84}, crop_size=84, **SMALL),
        CLIPImageProcessor(size={"shortest_edge": 96}, crop_size=84, **SMALL),
        CLIPImageProcessor(size={"height": 84, "width": 84}, crop_size=84, **SMALL),
        CLIPImageProcessor(size={"height": 84, "width": 84}, do_center_crop=False, **SMALL),
        LlavaImageProcessor(do_pad=True, size={"shortest_edge": 84}, crop_size=84,
                            image_mean=[0, 0, 0], image_std=[1, 1, 1], **SMALL),
    ],
    ids=["crop", "crop within", "squeeze", "squeeze alone", "pad"],
)  # fmt: skip
def test_the_grid_of_llava_lies_where_its_pixels_come_from(
    processor: Any, size: tuple[int, int]
) -> None:
    pixels = processor(ramp(size), return_tensors="pt")["pixel_values"][0]
    seen = by_family(processor, "llava", size)
    close(seen, pixels)
    squeezes = "height" in processor.size
    assert seen.stretch == pytest.approx(size[1] / size[0] if squeezes else 1.0, rel=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_a_thumbnail_of_llava_next_is_the_whole_picture(size: tuple[int, int]) -> None:
    """Its processor speaks of a crop, of tiles that have that size already."""
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": 84}, crop_size=84, image_grid_pinpoints=[[84, 168], [168, 84]],
        **SMALL,
    )  # fmt: skip
    assert processor.do_center_crop
    pixels = processor(ramp(size), return_tensors="pt")["pixel_values"][0, 0]
    seen = by_family(processor, "llava_next", size)
    close(seen, pixels)
    assert seen == Seen()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{"crop_pct": 0.9}, {"crop_pct": 1.0, "crop_mode": "squash"}])
def test_the_grid_of_a_classifier_lies_where_its_pixels_come_from(
    options: dict[str, Any], size: tuple[int, int]
) -> None:
    transform = create_transform(
        (3, 96, 96), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear", **options
    )
    close(seen_by_transform(transform, size), 255 * transform(ramp(size)).numpy())


def test_steps_that_are_not_known_claim_nothing() -> None:
    transform = create_transform((3, 96, 96), crop_pct=0.9, crop_mode="border")
    assert seen_by_transform(transform, (400, 100)) == Seen()


def test_a_classifier_s_record_says_where_its_grid_lies() -> None:
    model = TimmClassifier(timm.create_model("vit_tiny_patch16_224", depth=2))
    sample = Sample(id="0", question="", image=lambda: ramp((200, 100)))
    request = Request(sample, "", sample.image())
    method = visprune.get_method("evit", keep_ratio=0.5)
    with model.answering(method, ImageNet(), "plain", {}) as answerer:
        (output,) = answerer([request])
    assert output.kept is not None
    left, top, right, bottom = output.kept["box"]
    assert (1 - right, 1 - bottom) == pytest.approx((left, top))
    assert 0.25 < left < 0.3  # a square of nine tenths of the height
    assert 0.04 < top < 0.06


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_qwen_s_grid_covers_the_picture(family: str) -> None:
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=336 * 336, patch_size=14,
                                      merge_size=2, temporal_patch_size=1, **SMALL)  # fmt: skip
    made = processor(ramp((301, 200)), return_tensors="pt")
    _, rows, columns = made["image_grid_thw"][0].tolist()
    # Patches of one merged token lie together: [rows/2, columns/2, 2, 2, channel, y, x].
    tiles = made["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 14, 14)
    whole = tiles.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * 14, columns * 14)
    close(by_family(processor, family, (301, 200)), whole)


def test_boxes_in_pixels_are_read_only_of_the_size_that_the_model_sees() -> None:
    from transformers import Qwen2VLImageProcessor

    seen = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=50176, **SMALL)
    processor = SimpleNamespace(image_processor=seen)
    model = VLM(tiny.build("qwen2_5_vl"), processor, name="q")
    fitting = get_task("refcoco_rec", scale="pixels", min_pixels=3136, max_pixels=50176)
    assert model.refusal("none", fitting) is None
    assert model.refusal("none", get_task("refcoco_rec")) is None
    other = get_task("refcoco_rec", scale="pixels", min_pixels=3136, max_pixels=1003520)
    assert "processor of q has 3136 to 50176" in (model.refusal("none", other) or "")


@pytest.mark.parametrize("size", SIZES)
def test_pixtral_sees_all_of_a_picture(size: tuple[int, int]) -> None:
    processor = PixtralImageProcessor(size={"longest_edge": 128}, patch_size=16)
    made = processor(images=ramp(size), **SMALL, return_tensors="np")
    height, width = made["image_sizes"][0]
    seen = by_family(processor, "llava", size)
    assert seen == Seen()
    close(seen, made["pixel_values"][0][:, :height, :width])


class Wide(Sequence[Sample]):
    """Questions about a square picture, and then wide ones."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < 4:
            raise IndexError(index)
        size = (60, 60) if index == 0 else (120, 40)
        question = "what color is the circle?"
        return Sample(str(index), question, lambda: ramp(size), answers=("red",),
                      cluster=str(index))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WideTask(EmbeddedTask):
    """Four questions of the embedded model's words."""

    def samples(self) -> Sequence[Sample]:
        return Wide()


def ask_wide(tmp_path: Path, **options: Any) -> tuple[list[str], list[Record], ResultsFolder]:
    """A study of two methods on the four: notes, records and folder."""
    notes: list[str] = []
    progress = Silent()
    progress.note = notes.append  # type: ignore[method-assign]
    model, processor = small_embedded()
    entry = ModelEntry("small", **options)
    vlm = VLM(model, processor, name="small", style="plain", template=PLAIN, pad=entry.pad)
    study = build_study({"models": [entry], "tasks": [WideTask(limit=4)], "budgets": [32],
                         "methods": ["random"], "controls": ["none", "no_image"]})  # fmt: skip
    folder = run_study(study, tmp_path, loader=lambda spec: vlm, progress=progress)
    return notes, folder.records(), folder


def test_what_is_not_seen_is_said_once_and_stands_in_records_and_report(tmp_path: Path) -> None:
    notes, records, folder = ask_wide(tmp_path)
    assert [n for n in notes if "see pictures" in n] == [
        "small does not see pictures as they are: the first is 120 x 40, cut to the middle (67% of "
        "it is not seen). pad (a key of the model, --pad) shows it whole in a square, as LLaVA's "
        "own evaluation does."
    ]
    cells = folder.cells()
    middle = [0.333333, 0.0, 0.666667, 1.0]
    for record in records:
        box = (record.kept or {}).get("box")
        blind = cells[record.cell].method["method"] == "no_image"
        assert box == (None if record.sample == "0" or blind else middle)
    page = write_report(tmp_path)
    data = json.loads(page["page"].read_text().partition('id="data">')[2].partition("</script>")[0])
    (note,) = [n for t in data["tables"] for n in t["notes"] if "pictures the model" in n]
    assert note == ("Of 4 pictures the model saw 3 cut to the middle (up to 67% of one is not seen)"
                    "; samples show where.")  # fmt: skip
    untouched = next(i for i, arm in enumerate(data["arms"]) if arm["untouched"])
    sample = next(s for s in data["samples"] if s["id"] == "1")
    assert sample["got"][str(untouched)]["kept"] == [0, 0, "", 1, middle]


def test_padded_all_of_a_picture_is_seen_as_llava_s_own_evaluation_shows_it(tmp_path: Path) -> None:
    plain = ask_wide(tmp_path / "cut")[1]
    notes, records, folder = ask_wide(tmp_path / "padded", pad=True)
    assert not [n for n in notes if "see pictures" in n]
    kept = {r.sample: r.kept for r in records if r.kept is not None}
    assert kept["1"]["box"] == [0.0, -1.0, 1.0, 2.0]
    assert "box" not in kept["0"]
    assert all(cell.model["pad"] is True for cell in folder.cells().values())
    assert not {r.cell for r in plain} & {r.cell for r in records}, "other cells"
    square = pad_to_square(ramp((120, 40)), (0.48145466, 0.4578275, 0.40821073))
    assert square.size == (120, 120)
    assert square.getpixel((3, 3)) == (122, 116, 104)  # as LLaVA rounds it
    assert square.crop((0, 40, 120, 80)).tobytes() == ramp((120, 40)).tobytes()
    high = pad_to_square(ramp((40, 61)), (0.5, 0.5, 0.5))
    assert high.crop((10, 0, 50, 61)).tobytes() == ramp((40, 61)).tobytes()  # 10.5: down


class Finder(VLM):
    """Answers with the box of what is red in the pixels that it is shown, in fractions of them."""

    def _answer(self, requests: Any, *rest: Any) -> list[Output]:
        found = []
        for output, request in zip(super()._answer(requests, *rest), requests, strict=True):
            shown = self.processor.image_processor(
                self._padded(request).image, do_normalize=False, return_tensors="np"
            )["pixel_values"][0]
            y, x = ((shown[0] > 0.5) & (shown[2] < 0.5)).nonzero()
            height, width = shown.shape[1:]
            ends = (x.min() / width, y.min() / height,
                    (x.max() + 1) / width, (y.max() + 1) / height)  # fmt: skip
            said = ", ".join(f"{end:.4f}" for end in ends)
            found.append(dataclasses.replace(output, text=f"[{said}]"))
        return found


@pytest.mark.parametrize("pad", [False, True], ids=["cut out", "padded"])
def test_boxes_are_read_in_the_frame_that_the_model_is_shown(tmp_path: Path, pad: bool) -> None:
    """RefCOCO of a model that finds everything, where its processor cuts or pads."""
    rows = []
    for number, (size, box) in enumerate(
        [((240, 240), (40, 60, 120, 150)), ((480, 240), (260, 20, 350, 90)),
         ((240, 480), (10, 250, 80, 350))]
    ):  # fmt: skip
        picture = Image.new("RGB", size, "white")
        picture.paste((255, 0, 0), box)
        picture.save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "sent": "red", "bbox": list(box),
                     "width": size[0], "height": size[1]})  # fmt: skip
    (tmp_path / "refcoco_val.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    model, processor = small_embedded()
    vlm = Finder(model, processor, name="f", style="plain", template=PLAIN, pad=pad)
    asked = {"task": "refcoco_rec", "data": str(tmp_path)}
    for frame, right in (("seen", [1.0, 1.0, 1.0]), ("picture", [1.0, 0.0, 0.0])):
        study = build_study({"models": [ModelEntry("f", pad=pad)], "budgets": [32],
                             "tasks": [asked | {"frame": frame}], "methods": ["random"],
                             "controls": ["none"]})  # fmt: skip
        folder = run_study(study, tmp_path / frame, loader=lambda spec: vlm)
        for cell in folder.cells():
            records = {record.sample: record for record in folder.records(cell)}
            assert [records[name].score for name in sorted(records)] == right
            figures = get_task(asked["task"], data=str(tmp_path), frame=frame).aggregate(
                list(records.values())
            )
            assert (figures["acc@0.9"] == 100.0) is (frame == "seen")


def test_pad_is_refused_for_classifiers_and_old_studies_go_on() -> None:
    with pytest.raises(ConfigError, match="its transform says"):
        load_model(ModelEntry("timm:vit_tiny_patch16_224", pad=True))
    assert "pad" not in ModelEntry("embedded").to_dict()
    assert ModelEntry("embedded", pad=True).to_dict()["pad"] is True
