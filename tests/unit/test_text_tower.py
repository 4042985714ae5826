# SPDX-License-Identifier: Apache-2.0
"""cdpruner and trim with CLIP's text tower: the official rule, from the prompt's own words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

import visprune
from tests import tiny
from tests.unit.test_methods_golden import visual
from visprune.core import Context
from visprune.core.signals import TextStates
from visprune.errors import ConfigError
from visprune.methods.cdpruner import pick, relevance
from visprune.methods.trim import TRIM, trim_tokens

BEGIN, END, PLACES = 1, 2, 8
TEXT = {
    "vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": PLACES, "bos_token_id": BEGIN,
    "eos_token_id": 98, "pad_token_id": 0,
}  # fmt: skip


class Words:
    """Both tokenizers: a token is a number."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return " ".join(map(str, ids))

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [BEGIN, *(int(word) % 90 for word in text.split()), 98]}


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny.build("llava")


@pytest.fixture(scope="module")
def clip(llava: Any) -> Any:
    vision = llava.config.vision_config.to_dict()
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=12))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model.eval()


def official(
    clip: Any, model: Any, pixels: Tensor, texts: list[str]
) -> tuple[Tensor, list[Tensor]]:
    """Patches and texts in CLIP's space, by hand; texts of one part."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = states[model.config.vision_feature_layer][:, 1:]
    placed = clip.visual_projection(clip.vision_model.post_layernorm(features))
    ids = [torch.tensor([Words()(text)["input_ids"]]) for text in texts]
    return placed, [clip.get_text_features(input_ids=x).pooler_output for x in ids]


ROWS = [[2, "a", 4], [2, "b", 3, "c", 2]]


@torch.no_grad()
def test_the_official_rule_from_the_words_of_the_prompt(llava: Any, clip: Any) -> None:
    inputs = tiny.inputs("llava", ROWS)
    behind = []
    for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        first = int((row == tiny.IMAGE).nonzero()[0, 0])
        own = [int(n) for n in row[first:][mask[first:].bool()] if n != tiny.IMAGE]
        behind.append(Words().decode(own, skip_special_tokens=True))
    texts = [behind[0], behind[1], behind[1]]  # two pictures of one prompt
    placed, found = official(clip, llava, inputs["pixel_values"], texts)
    projected = llava.model.get_image_features(inputs["pixel_values"]).pooler_output
    tower = (clip, Words(), Words())
    with visprune.prune(llava, "cdpruner", num_keep=6, text_tower=tower) as run:
        llava(**inputs)
        for number, kept in enumerate(run.trace.kept):
            unit, text = normalize(placed[number], dim=-1), normalize(found[number], dim=-1)
            scaled = relevance(-(unit @ text.T).mean(-1)[None])
            want = pick(projected[number][None], scaled, 6)[0].sort().values
            assert kept.tolist() == want.tolist()
    with visprune.prune(llava, "trim", num_keep=6, text_tower=tower) as run:
        llava(**inputs)
        for number, kept in enumerate(run.trace.kept):
            product = -(placed[number] @ found[number][0])[None]
            assert kept.tolist() == trim_tokens(product, 6).index[0].tolist()
    with visprune.prune(llava, "cdpruner", num_keep=6) as run:
        llava(**inputs)
        assert [k.tolist() for k in run.trace.kept] != [want.tolist()] * 3


def test_without_a_tower_the_nearest_word_counts() -> None:
    axes = torch.eye(4)
    text = torch.stack([torch.zeros(4), axes[0], 3 * axes[1]])  # the first row is padding
    features = torch.stack([axes[0] + 2 * axes[1], -axes[0] - axes[1], 0.1 * axes[1], -axes[1]])
    score = axes.new_tensor([2 / 5**0.5, -(0.5**0.5), 1.0, 0.0])
    for number, want in ((0, score), (1, torch.full((4,), -1.0))):
        shown = (text if number == 0 else text[:0])[None]
        ctx = Context(num_keep=3, signals={TextStates(): shown})
        method = TRIM(num_keep=3)
        torch.testing.assert_close(method._by_word(visual(features[None]), ctx)[0], want)
        made = method.select(visual(features[None]), ctx)
        assert made.index[0, :2].tolist() == ([0, 2] if number == 0 else [0, 1])


@torch.no_grad()
def test_trim_by_the_words_of_a_batch(llava: Any) -> None:
    inputs = tiny.inputs("llava", ROWS)
    table = llava.get_input_embeddings()
    projected = llava.model.get_image_features(inputs["pixel_values"]).pooler_output
    owner = [0, 1, 1]
    with visprune.prune(llava, "trim", num_keep=6) as run:
        llava(**inputs)
        for number, kept in enumerate(run.trace.kept):
            ids = inputs["input_ids"][owner[number]]
            there = inputs["attention_mask"][owner[number]].bool() & (ids != tiny.IMAGE)
            words = normalize(table(ids[there]).float(), dim=-1)
            best = (normalize(projected[number], dim=-1) @ words.T).amax(-1)
            assert kept.tolist() == trim_tokens(best[None], 6).index[0].tolist()


@torch.no_grad()
def test_long_texts_are_read_in_parts_and_questions_cut_out(llava: Any, clip: Any) -> None:
    method = visprune.get_method(
        "cdpruner", num_keep=4, text_tower=(clip, Words(), Words(), lambda text: text[:3])
    )
    tower: Any = method.text_tower
    long = " ".join(map(str, range(3, 20)))
    parts = [list(range(3, 9)), list(range(9, 15)), list(range(15, 20))]
    each = [torch.tensor([[BEGIN, *part, 98]]) for part in parts]
    want = torch.cat([clip.get_text_features(input_ids=x).pooler_output for x in each])
    torch.testing.assert_close(tower.embed(long), want, rtol=1e-4, atol=1e-5)
    assert tower.embed("").shape == (1, 12)
    assert tower.texts(torch.tensor([[-1, 5, 7], [4, 5, 6]])) == ["5 7", "4 5"]
    inputs = tiny.inputs("llava", [[2, "a", 4]])
    with visprune.prune(llava, method) as run:
        llava(**inputs)
        assert len(run.trace.kept[0]) == 4
        copied = copy.deepcopy(llava)
    assert visprune.runs(copied)[0].method.text_tower is tower  # type: ignore[attr-defined]
    visprune.remove(copied)


@pytest.mark.parametrize("name", ["cdpruner", "trim"])
def test_what_is_no_tower(name: str, llava: Any, clip: Any, tmp_path: Any) -> None:
    build: Callable[..., Any] = visprune.get_method
    with pytest.raises(ConfigError, match=r"text_tower=\(CLIPModel, its tokenizer"):
        build(name, num_keep=4, text_tower="openai/clip-vit-large-patch14-336")
    with pytest.raises(ConfigError, match="CLIPModel with text_model; CLIPTextModel has none"):
        build(name, num_keep=4, text_tower=(clip.text_model, Words(), Words()))
    method = build(name, num_keep=4, text_tower=(clip, Words(), Words()))
    saved = method.to_dict()
    assert saved["text_tower"] == "TextTower(CLIP)"
    with pytest.raises(ConfigError, match="got 'TextTower"):
        build(saved.pop("method"), **saved)
    again = build(name, num_keep=4, text_tower=method.text_tower)
    assert again == method != build(name, num_keep=4)
    with pytest.raises(visprune.UnsupportedModel, match="EncoderFeatures"):
        visprune.prune(tiny.build("qwen2_vl"), method)
    wide = CLIPModel(CLIPConfig(text_config=TEXT, projection_dim=12,
                                vision_config={"num_hidden_layers": 1, "hidden_size": 48,
                                               "num_attention_heads": 2}))  # fmt: skip
    inputs = tiny.inputs("llava", [[2, "a", 4]])
    other = build(name, num_keep=4, text_tower=(wide, Words(), Words()))
    with visprune.prune(llava, other), pytest.raises(ConfigError, match="of 48 features; this"):
        llava(**inputs)
    embeds = llava.get_input_embeddings()(inputs["input_ids"])
    given = {"pixel_values": inputs["pixel_values"], "attention_mask": inputs["attention_mask"]}
    with visprune.prune(llava, method), pytest.raises(ConfigError, match="Pass input_ids"):
        llava(inputs_embeds=embeds, **given)
