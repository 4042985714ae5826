# SPDX-License-Identifier: Apache-2.0
"""A processor for tiny models of any family: words become ids, and a picture its pixels."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchFeature, PreTrainedTokenizerFast

from tests.families import tiny
from tests.families.tiny import parts


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(parts.VOCAB)}
    words |= {"[PAD]": 0, "<s>": 1, "</s>": 2, "[UNK]": 3, "<image>": parts.IMAGE}
    for number in (0, 1, 2, 3, parts.IMAGE):
        del words[f"w{number}"]
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", bos_token="<s>",
        eos_token="</s>", padding_side="left",
    )  # fmt: skip
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


class FamilyProcessor:
    """Of a family that :mod:`tests.families.tiny` builds; build its model first."""

    image_token = "<image>"
    chat_template = None

    def __init__(self, family: str) -> None:
        self.family, self.tokenizer = family, _tokenizer()

    def __call__(self, text: list[str], images: Any = None, **options: Any) -> BatchFeature:
        """Prompts with at most one picture each."""
        spec = tiny.FAMILIES[self.family]
        rows, pixels = [], []
        given = iter(images or [])
        for one in text:
            ids: list[int] = []
            own = []
            for token in self.tokenizer(one)["input_ids"]:
                if token != parts.IMAGE:
                    ids.append(token)
                    continue
                picture = next(given)[0]
                marks = [parts.IMAGE] * parts._COUNTS[self.family, "a"]
                ids += marks if spec.prompt is None else spec.prompt(marks, False)
                own.append(
                    parts._pixels(spec, chr(97 + sum(picture.resize((1, 1)).tobytes()) % 26))
                )
            rows.append(ids)
            pixels.append(own)
        made = {**parts._padded(rows, "left"), **self._pixels(spec, pixels)}
        return BatchFeature({**made, **(spec.extra(made) if spec.extra is not None else {})})

    @staticmethod
    def _pixels(spec: Any, pixels: list[list[Any]]) -> dict[str, torch.Tensor]:
        return (parts._by_row if spec.by_row else parts._flat)(pixels)
