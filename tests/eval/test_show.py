# SPDX-License-Identifier: Apache-2.0
"""`show`: any picture file, embedded model or a folder's, and one clean line where it cannot be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from tests.eval.small import small_embedded
from visprune.backbones.vlm import embedded
from visprune.backbones.vlm.embedded.tokenizer import SPECIAL, build_tokenizer
from visprune.cli import commands as cli
from visprune.errors import ConfigError
from visprune.eval.show import figures
from visprune.eval.show import vlm as module
from visprune.eval.show.vlm import open_picture, show
from visprune.eval.tasks.embedded import words

QUESTION = "what color is the circle?"


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return small_embedded()


@pytest.fixture(scope="module")
def folder(small: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    for part in small:
        part.save_pretrained(path)
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A wide picture: red left, green middle square, blue right."""
    pixels = np.zeros((40, 120, 3), np.uint8)
    for third, channel in enumerate((0, 1, 2)):
        pixels[:, 40 * third : 40 * third + 40, channel] = 255
    path = tmp_path / "wide.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is handed to the figure, kept while it is still drawn."""
    seen: list[Any] = []

    def draw(original: Any, regions: Any, path: Path, **words: str) -> None:
        seen.append((original, list(regions), words))
        figures.shown_picture(original, regions, path, **words)

    monkeypatch.setattr(module, "shown_picture", draw)
    return seen


def test_padded_the_embedded_model_sees_the_whole_picture(
    small: tuple[Any, Any], picture: Path, panels: list[Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(embedded, "load", lambda dtype: small)
    out = picture.parent / "new" / "kept.png"
    asked = f"{QUESTION} and a zebra"
    result = show(picture, question=asked, method="divprune", num_keep=64, out=out, pad=True)
    assert (result["kept"], result["num_tokens"]) == (64, 576)
    assert result["trace"].kept[0].shape == (64,)
    with Image.open(out) as drawn:
        assert min(drawn.size) > 300
    original, regions, texts = panels[0]
    side = len(original.image)
    assert original.image.shape == (side, side, 3)
    assert original.image[side // 2, 5, 0] > 250  # red is still there, at the left edge
    assert original.image[side // 2, -5, 2] > 250
    assert (original.image[5, side // 2] == 128).all()  # padding
    assert len(regions) == 1
    assert "Picture" not in texts["note"]
    assert "2 words of the question are not in its vocabulary" in texts["note"]
    show(picture, question="is there a zebra ?", method="divprune", num_keep=64, out=out)
    assert "1 word of the question is not in its vocabulary" in panels[-1][2]["note"]
    assert "divprune: 64 of 576 visual tokens kept, 64.0 in the mean" in texts["note"]
    printed = capsys.readouterr().out
    assert result["answer"] in printed
    assert str(out) in printed


def test_a_folders_llava_shows_what_its_processor_cut_out(
    folder: Path, picture: Path, panels: list[Any]
) -> None:
    show(picture, question=QUESTION, method="random", num_keep=8, out=picture.parent / "kept.png",
         model=str(folder))  # fmt: skip
    original, (kept,), texts = panels[0]
    # The middle square of the wide picture is green; red and blue were cut off, and fade.
    for image in (original.image, kept.image):
        high, wide, _ = image.shape
        assert wide == pytest.approx(3 * high, abs=2)
        left, right = (image[high // 2, round(x * wide)].astype(int) for x in (0.1, 0.9))
        for faded, channel in ((left, 0), (right, 2)):
            assert faded.min() > 100, "the picture as it is"
            assert faded.argmax() == channel or np.ptp(faded) < 60
    high, wide, _ = original.image.shape
    assert original.image[high // 2, wide // 2].tolist() == [0, 255, 0]
    assert "Picture: 120 x 40, cut to the middle (67% of it is not seen)" in texts["note"]


def test_answers_are_the_models_own(small: tuple[Any, Any], picture: Path) -> None:
    model, processor = small
    result = show(picture, question=QUESTION, method="keep_all", out=picture.parent / "kept.png",
                  model=small, max_new_tokens=3)  # fmt: skip
    prompt = embedded.PROMPT.format(question=QUESTION)
    inputs = processor(images=[open_picture(picture)], text=[prompt], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    wanted = processor.tokenizer.decode(
        ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()
    assert result["answer"] == result["answer_unpruned"] == wanted
    assert result["kept"] == 576


def test_a_withdrawal_is_told(small: tuple[Any, Any], picture: Path, panels: list[Any]) -> None:
    show(picture, question=QUESTION, method="todre", num_keep=8, out=picture.parent / "kept.png",
         model=small)  # fmt: skip
    assert "of the text's attention, " in panels[0][2]["note"]


def test_the_model_is_left_as_it_was(small: tuple[Any, Any], picture: Path) -> None:
    model = small[0]
    # The first call leaves the marks of transformers' own recording of outputs.
    show(picture, question=QUESTION, out=picture.parent / "first.png", model=small)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    show(picture, question=QUESTION, out=picture.parent / "kept.png", model=small)
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


@pytest.fixture(scope="module")
def next_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA-NeXT with its processor: tiles of 24 pixels, patches of 4."""
    torch.manual_seed(0)
    vocabulary = words()
    pinpoints = [[24, 48], [48, 24], [48, 48]]
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=24, patch_size=4,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(vocabulary) + len(SPECIAL), hidden_size=32, intermediate_size=48,
        num_hidden_layers=8, num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_id=SPECIAL.index("<image>"),
        image_grid_pinpoints=pinpoints, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24},
        image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    processor = LlavaNextProcessor(
        image_processor=images, tokenizer=build_tokenizer(vocabulary), patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("next")
    LlavaNextForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_a_tiled_picture_is_drawn_as_thumbnail_and_full_grid(
    next_folder: Path, picture: Path, panels: list[Any]
) -> None:
    result = show(picture, question=QUESTION, method="uniform", num_keep=20,
                  out=picture.parent / "kept.png", model=str(next_folder))  # fmt: skip
    _, (thumbnail, full), _ = panels[0]
    assert thumbnail.image.shape[0] == thumbnail.image.shape[1]
    # 120 x 40 pixels, fitted into two tiles side by side: 12 columns of 4 rows.
    assert full.image.shape[1] == 3 * full.image.shape[0]
    regions = result["trace"].pos[0][:, 0]
    assert f"thumbnail, {int((regions == 0).sum())} of 36 kept" in thumbnail.text
    assert f"full picture, {int((regions == 1).sum())} of 48 kept" in full.text
    assert result["num_tokens"] == 36 + 48


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (20, 30)


def test_gray_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "1"):
        Image.new(mode, (8, 8)).save(tmp_path / f"{mode}.png")
        assert open_picture(tmp_path / f"{mode}.png").mode == "RGB"


def test_pictures_of_16_bits_and_of_floats_are_scaled_and_not_cut_at_white(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.float64).reshape(16, 16)
    Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((ramp / 255).astype(np.float32)).save(tmp_path / "shares.tif")
    for name in ("deep.png", "shares.tif"):
        assert np.array_equal(np.asarray(open_picture(tmp_path / name))[..., 1], ramp)
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "holes.tif")
    with pytest.raises(ConfigError, match=r"holes\.tif' .*its values are not all finite"):
        open_picture(tmp_path / "holes.tif")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.png", None, "missing.png' is not there"),
        ("text.png", b"no picture at all", "text.png' is not a picture"),
        ("empty.png", b"", "empty.png' is not a picture"),
    ],
)
def test_what_is_no_picture_is_said_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        open_picture(tmp_path / name)
    words_ = ["visprune", "show", str(tmp_path / name), "--question", "?", "--out"]
    monkeypatch.setattr(sys, "argv", [*words_, str(tmp_path / "out.png")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_picture_cut_short_and_a_folder_are_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="cut short"):
        open_picture(tmp_path / "cut.png")
    with pytest.raises(ConfigError, match="is a folder"):
        open_picture(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "todree"}, "Did you mean 'todre'"),
        ({"num_keep": 0}, "at least 1"),
        ({"out": "kept.txt"}, "ending '.txt'"),
        ({"out": "wide.png/kept.png"}, "Cannot write the drawing"),
        ({"model": "embeded"}, "Did you mean 'embedded'"),
    ],
)
def test_bad_requests_are_refused_before_a_model_is_loaded(
    picture: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "load", lambda dtype: pytest.fail("loaded the model first"))
    monkeypatch.chdir(picture.parent)
    with pytest.raises(ConfigError, match=message):
        show(**{"picture": picture, "question": QUESTION, "out": "kept.png", **change})


def test_a_folder_without_a_model_is_refused(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match=r"cannot load .*nothing"):
        show(picture, question=QUESTION, out=tmp_path / "o.png", model=str(tmp_path / "nothing"))


def test_a_refused_picture_leaves_no_drawing(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no")
    with pytest.raises(ConfigError):
        show(tmp_path / "text.png", question=QUESTION, out=tmp_path / "kept.png")
    assert not (tmp_path / "kept.png").exists()
