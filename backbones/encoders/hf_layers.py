# SPDX-License-Identifier: Apache-2.0
"""The layers of transformers' image encoders, recognised by what their own ``forward`` uses.

A plain layer computes ``y = x + branch(attention(norm(x)))`` and ``y + mlp(norm(y))``. Which of its
modules is which is told by the parts that its ``forward`` names, in order: that is one word for
each of the few ways in which transformers writes such a layer, whatever the classes are called. A
layer that names anything else (a window, a second attention, a gate) is another layer.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from visprune.backbones.cost.matrices import linear, matrix_weights
from visprune.backbones.encoders.base import Layer
from visprune.errors import UnsupportedModel


@dataclass(frozen=True)
class Form:
    """One way of writing a plain layer, by names of its parts.

    Attributes:
        entry: the norm that reads the layer's input; none where another module does, too: tokens
            then leave at the layer's end.
        attention: the attention module.
        branch: the last module of the attention branch, or none.
        gain: a parameter that the branch's output is multiplied by, or none.
    """

    entry: str | None
    attention: str
    branch: str | None
    gain: str | None = None


_BEIT = Form("layernorm_before", "attention", "drop_path")
FORMS = {
    # CLIP, SigLIP and their relatives, BLIP, Idefics
    ("layer_norm1", "self_attn", "layer_norm2", "mlp"): Form(
        "layer_norm1", "self_attn", "self_attn"
    ),
    # ViT, DeiT, ViT-MAE, ViT-MSN, I-JEPA, ViViT
    ("layernorm_before", "attention", "dropout", "layernorm_after", "mlp"): Form(
        "layernorm_before", "attention", "dropout"
    ),
    # DINOv2, DINOv3, TIPS
    ("norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2"): Form(
        "norm1", "attention", "drop_path"
    ),
    # VideoMAE
    ("layernorm_before", "attention", "layernorm_after", "intermediate", "output"): Form(
        "layernorm_before", "attention", "attention"
    ),
    # AIMv2
    ("rms_norm1", "attention", "rms_norm2", "ffn"): Form("rms_norm1", "attention", "attention"),
    # Pixio
    ("layernorm_before", "attention", "dropout", "drop_path", "layernorm_after", "mlp"): Form(
        "layernorm_before", "attention", "drop_path"
    ),
    # InternVL
    ("attention", "layernorm_before", "lambda_1", "layernorm_after", "mlp", "dropout",
     "lambda_2"): Form("layernorm_before", "attention", "attention", "lambda_1"),
    # Qianfan-OCR
    ("layernorm_before", "attention", "lambda_1", "drop_path1", "layernorm_after", "mlp", "dropout",
     "lambda_2", "drop_path2"): Form("layernorm_before", "attention", "drop_path1"),
    # BEiT, with and without a bias of its own, and layer scale
    ("relative_position_bias", "layernorm_before", "attention", "dropout", "lambda_1", "drop_path",
     "layernorm_after", "mlp", "lambda_2"): _BEIT,
    ("relative_position_bias", "layernorm_before", "attention", "dropout", "drop_path",
     "layernorm_after", "mlp"): _BEIT,
    ("layernorm_before", "attention", "dropout", "lambda_1", "drop_path", "layernorm_after", "mlp",
     "lambda_2"): _BEIT,
    # X-CLIP, whose message to the other frames is made of the layer's input
    ("message_fc", "drop_path", "message_attn", "message_ln", "layer_norm1", "self_attn",
     "layer_norm2", "mlp"): Form(None, "self_attn", None),
    # Data2Vec, and BEiT of earlier versions
    ("attention", "layernorm_before", "lambda_1", "drop_path", "layernorm_after", "intermediate",
     "output", "lambda_2"): _BEIT,
    ("attention", "layernorm_before", "drop_path", "layernorm_after", "intermediate",
     "output"): _BEIT,
}  # fmt: skip


def parts_used(block: nn.Module) -> tuple[str, ...]:
    """Names of the modules and parameters that a layer's ``forward`` uses, in order."""
    own = {*block._modules, *block._parameters}
    code = inspect.unwrap(type(block).forward).__code__
    return tuple(name for name in code.co_names if name in own)


def form_of(block: nn.Module) -> Form | None:
    """How a layer is written; ``None``: it is not a plain one."""
    form = FORMS.get(parts_used(block))
    return None if form is None or core(getattr(block, form.attention)) is None else form


def core(attention: nn.Module) -> nn.Module | None:
    """What computes attention: the module itself, or the one in it; ``None``: it is not known."""
    found = (m for m in attention.modules() if by_function(m) or by_itself(m))
    return next(found, None)


def by_function(attention: nn.Module) -> bool:
    """Whether a module calls the attention function that its config names."""
    names = inspect.unwrap(type(attention).forward).__code__.co_names
    return "ALL_ATTENTION_FUNCTIONS" in names and hasattr(attention, "config")


def by_itself(attention: nn.Module) -> bool:
    """Whether a module's attention is written out: BLIP's, Data2Vec's."""
    return hasattr(attention, "qkv") or hasattr(attention, "has_relative_position_bias")


def read_layer(block: Any, form: Form) -> Layer:
    """A layer as the machine sees it."""
    whole = getattr(block, form.attention)
    attention = core(whole)
    assert attention is not None, "the form was recognised"
    before, width = matrix_weights(whole), _width(attention)
    behind = matrix_weights(block) - before
    if form.entry is None:  # all of it sees the same tokens
        before, behind = before + behind, 0
    return Layer(
        block=block,
        attention=attention,
        entry=None if form.entry is None else getattr(block, form.entry),
        branch=None if form.branch is None else getattr(block, form.branch),
        attention_weights=before,
        mlp_weights=behind,
        attention_width=width,
        head_width=width // _heads(attention),
        gain=form.gain,
    )


def _width(attention: Any) -> int:
    """Features of all heads."""
    fused = getattr(attention, "qkv", None)
    if fused is not None:
        return linear(fused)[1] // 3
    query = next(m for name, m in attention.named_modules() if name.endswith(("q_proj", "query")))
    return linear(query)[1]


def _heads(attention: Any) -> int:
    for part in attention.modules():
        for name in ("num_heads", "num_attention_heads"):
            if isinstance(getattr(part, name, None), int):
                return int(getattr(part, name))
    raise UnsupportedModel(f"{type(attention).__name__} does not say how many heads it has.")


def layer_list(model: nn.Module) -> tuple[list[Any], Form]:
    """The layers of an encoder, and how they are written.

    Raises:
        UnsupportedModel: it has not one list of plain layers.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    found = [(blocks, form) for blocks in lists if (form := _one_form(blocks)) is not None]
    if len(found) != 1:
        kinds = sorted({type(block).__name__ for blocks in lists for block in blocks})
        raise UnsupportedModel(
            f"{type(model).__name__} is not made of one list of plain layers (attention, then an "
            f"MLP, each behind a norm and added to the stream); it holds "
            f"{', '.join(kinds) or 'no list of layers'}. Whether tokens can leave inside it is not "
            f"known."
        )
    blocks, form = found[0]
    return list(blocks), form


def _one_form(blocks: nn.ModuleList) -> Form | None:
    forms = {form_of(block) for block in blocks}
    return forms.pop() if len(forms) == 1 else None


def arguments(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer behind its first, by name."""
    names = list(inspect.signature(forward).parameters)[2:]  # self, the sequence
    return {**dict(zip(names, args, strict=False)), **kwargs}


class Rows:
    """A rotary table with rows of its own for each picture, ``[B, T, d]``.

    MLCD's attention adds the dimension of the batch to a table that all pictures share, by
    ``table.unsqueeze(0)``: here it is there already.
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def unsqueeze(self, dim: int) -> Tensor:
        """The table itself."""
        return self._table
