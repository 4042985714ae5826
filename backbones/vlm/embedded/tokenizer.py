# SPDX-License-Identifier: Apache-2.0
"""Word-level tokenizer of the embedded model."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from visprune.errors import ConfigError

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] }} {% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word.

    Text is lowered (the two role marks excepted) and split at blanks; a question mark stands alone.

    Args:
        words: Vocabulary beside :data:`SPECIAL`; its order gives the ids.

    Returns:
        Tokenizer that puts ``<s>`` in front and pads on the left.

    Raises:
        ConfigError: If a word is repeated.
    """
    vocabulary = [*SPECIAL, *words]
    if len(set(vocabulary)) != len(vocabulary):
        raise ConfigError("The vocabulary repeats a word; every word must be given once.")
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    core.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL[:5]])
    core.add_tokens([AddedToken(t, normalized=False) for t in SPECIAL[5:]])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )
