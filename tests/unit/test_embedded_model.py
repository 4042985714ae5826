# SPDX-License-Identifier: Apache-2.0
"""The embedded model: shipped weights, processor and prompt work the ordinary way, offline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers import LlavaForConditionalGeneration as Llava
from transformers import LlavaProcessor as Processor

from visprune.backbones.vlm import embedded
from visprune.backbones.vlm.embedded import PROMPT, WEIGHTS, build_model, build_processor, load
from visprune.errors import ConfigError
from visprune.eval.tasks.embedded import KINDS, Scene, words
from visprune.eval.tasks.embedded import load as load_questions

Loaded = tuple[Llava, Processor]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load()


@pytest.fixture(scope="module")
def pictures() -> list[Scene]:
    return load_questions("test", 98)


def prompts(picture: Scene) -> list[str]:
    return [PROMPT.format(question=q.text) for q in picture.questions]


def answers(loaded: Loaded, picture: Scene) -> list[str]:
    model, processor = loaded
    texts = prompts(picture)
    images = [picture.image] * len(texts)
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(output, skip_special_tokens=True)


def test_shape_of_the_model(loaded: Loaded) -> None:
    model, processor = loaded
    config = model.config
    assert isinstance(model, Llava)
    assert isinstance(processor, Processor)
    assert config.text_config.num_hidden_layers >= 8
    assert config.image_seq_length == 576
    assert config.vision_feature_layer == -2
    assert config.vision_feature_select_strategy == "default"
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config.text_config._attn_implementation == "sdpa"
    assert processor.tokenizer.padding_side == "left"
    assert (WEIGHTS / "model.safetensors").stat().st_size <= 12_000_000


def test_weights_hold_every_parameter(loaded: Loaded) -> None:
    _, report = Llava.from_pretrained(WEIGHTS, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


def test_answers_are_mostly_right(loaded: Loaded, pictures: list[Scene]) -> None:
    right = {kind: [] for kind in KINDS}
    for picture in pictures:
        for question, answer in zip(picture.questions, answers(loaded, picture), strict=True):
            right[question.kind].append(answer == question.answer)
    every = [hit for hits in right.values() for hit in hits]
    assert sum(every) / len(every) > 0.85
    for kind, hits in right.items():
        assert sum(hits) / len(hits) > 0.5, kind


def test_without_the_picture_it_is_near_the_floor(loaded: Loaded, pictures: list[Scene]) -> None:
    model, processor = loaded
    right = total = 0
    for picture in pictures[:12]:
        texts = prompts(picture)
        images = [picture.image] * len(texts)
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
        output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        said = processor.batch_decode(output, skip_special_tokens=True)
        right += sum(a == q.answer for a, q in zip(said, picture.questions, strict=True))
        total += len(said)
    assert right / total < 0.5


def test_a_padded_batch_answers_like_single_prompts(loaded: Loaded, pictures: list[Scene]) -> None:
    model, processor = loaded
    picture = pictures[0]
    texts = prompts(picture)
    images = [picture.image] * len(texts)
    batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert len({int(row.sum()) for row in batch["attention_mask"]}) > 1
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        for row, text in enumerate(texts):
            one = processor(images=picture.image, text=text, return_tensors="pt")
            torch.testing.assert_close(model(**one).logits[0, -1], together[row], atol=1e-4, rtol=0)


def test_an_answer_is_one_word_and_an_end(loaded: Loaded, pictures: list[Scene]) -> None:
    model, processor = loaded
    inputs = processor(images=pictures[0].image, text=prompts(pictures[0])[0], return_tensors="pt")
    output = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert len(output) == 2
    assert output[-1] == processor.tokenizer.eos_token_id


def test_auto_classes_and_pipeline(loaded: Loaded, pictures: list[Scene]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(WEIGHTS)
    processor = AutoProcessor.from_pretrained(WEIGHTS)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    picture, question = pictures[1].image, pictures[1].questions[0]
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question.text}]
    said = pipe(text=[{"role": "user", "content": content}], return_full_text=False)
    assert said[0]["generated_text"].strip() == answers(loaded, pictures[1])[0]


def test_chat_template_writes_the_prompt(loaded: Loaded) -> None:
    processor = loaded[1]
    content = [{"type": "image"}, {"type": "text", "text": "is there a red circle?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert text == PROMPT.format(question="is there a red circle?")


def test_processor_feeds_the_pixels_it_is_given(loaded: Loaded, pictures: list[Scene]) -> None:
    inputs = loaded[1](images=pictures[0].image, text="USER: <image>", return_tensors="pt")
    plain = torch.from_numpy(pictures[0].pixels).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(inputs["pixel_values"][0], plain, atol=1e-6, rtol=0)
    assert int((inputs["input_ids"] == loaded[0].config.image_token_id).sum()) == 576


def test_every_word_is_one_known_token(loaded: Loaded) -> None:
    tokenizer = loaded[1].tokenizer
    for word in words():
        (token,) = tokenizer.encode(word, add_special_tokens=False)
        assert tokenizer.decode([token]) == word
    assert tokenizer.encode("Is there?", add_special_tokens=False) == tokenizer.encode(
        "is there ?", add_special_tokens=False
    )
    assert tokenizer.unk_token_id in tokenizer.encode("zeppelin")


def test_shipped_processor_is_what_the_code_builds(loaded: Loaded) -> None:
    built = build_processor(words())
    assert built.tokenizer.get_vocab() == loaded[1].tokenizer.get_vocab()
    assert built.chat_template == loaded[1].chat_template
    assert built.to_dict() == loaded[1].to_dict()


def test_built_model_has_the_shipped_shape(loaded: Loaded) -> None:
    built = build_model(len(loaded[1].tokenizer))
    shapes = {name: p.shape for name, p in loaded[0].named_parameters()}
    assert {name: p.shape for name, p in built.named_parameters()} == shapes


def test_half_precision_loads() -> None:
    model, _ = load(torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_missing_weights_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    with pytest.raises(ConfigError, match="visprune train"):
        load()


def test_repeated_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="repeats a word"):
        build_processor(["red", "red"])
