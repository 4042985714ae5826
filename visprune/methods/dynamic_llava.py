# SPDX-License-Identifier: Apache-2.0
"""Dynamic-LLaVA: a small trained network picks inside the decoder (ICLR 2025, arXiv:2412.00876)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from visprune.core import (
    BudgetedMethod,
    Context,
    ModelSpec,
    Rounding,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.core.numeric import is_whole
from visprune.errors import ConfigError, first_line

_BLOCKS = 2
_MARKS = ("image_score_predictor.", "output_text_score_predictor.")


class _Attention(nn.Module):
    """Attention of all tokens to all, queries, keys and values without bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, d]`` to the same."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """A transformer block with norms before its parts."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, d]`` to the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class ImagePredictor(nn.Module):
    """How much each visual token speaks for being kept and for being dropped.

    Two transformer blocks on narrowed states; then half of a token's features meet the mean of the
    other half over the picture. Parameter names are those of the official ``VisionPredictor``, so
    that its state loads as it is.

    Args:
        features: of a token in the decoder.
        width: of the blocks.
        heads: of their attention.
        hidden: features within their MLP.
    """

    def __init__(self, features: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.checked = False
        self.down_mlp = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width), nn.GELU())
        self.transformer = nn.Sequential(*(_Block(width, heads, hidden) for _ in range(_BLOCKS)))
        self.output_mlp = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def weight(self) -> Tensor:
        """Of the first linear layer."""
        return self.down_mlp.get_parameter("1.weight")

    def warn_if_new(self) -> None:
        """Say once that nothing was learned or loaded, where that is so."""
        if self.checked or self.weight.is_meta:
            return
        self.checked = True
        # They begin at zero; no trained state has all of them there.
        biases = [m.bias for m in self.modules() if isinstance(m, nn.Linear) and m.bias is not None]
        if not any(bool(bias.any()) for bias in biases):
            warnings.warn(
                "dynamic_llava's predictor is new and picks tokens at random: load a trained state "
                "into run.learned[0], or give learned=... a trained one. (method 'random_deep' is "
                "the control that means to.)",
                stacklevel=2,
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` to logits of keeping and of dropping, ``[B, N, 2]``."""
        x = self.transformer(self.down_mlp(x.to(self.weight.dtype)))
        own, shared = x.chunk(2, dim=-1)
        shared = shared.mean(dim=1, keepdim=True).expand_as(shared)
        return self.output_mlp(torch.cat([own, shared], dim=-1))


class TextPredictor(nn.Module):
    """How much a generated token speaks for being stored and for being dropped.

    Names are those of the official ``TextPredictor``.

    Args:
        features: of a token in the decoder.
        width: of the first layer behind them.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.output_mlp = nn.Sequential(
            nn.LayerNorm(features),
            nn.Linear(features, width),
            nn.GELU(),
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to logits of storing and of dropping, ``[..., 2]``."""
        return self.output_mlp(x.to(self.output_mlp.get_parameter("1.weight").dtype))


def _named(state: Mapping[str, Tensor], mark: str) -> dict[str, Tensor]:
    """The weights whose names hold ``mark``, by what stands behind it."""
    return {name.rpartition(mark)[2]: value for name, value in state.items() if mark in name}


@dataclass(frozen=True, kw_only=True)
class DynamicLLaVA(BudgetedMethod):
    """Keeps the visual tokens that a small trained network picks inside the decoder.

    On entering ``layer`` the ``int(keep_ratio n)`` tokens of largest log-probability of being kept
    stay, in spatial order and with their position ids; ties keep the lower index. Official settings
    are ``keep_ratio=0.2`` (115 of 576), layer 2, width 512, 8 heads, 2048 features in the MLPs. The
    predictor sees one picture at a time, as there.

    With ``text``, a second predictor decides of each generated token whether that layer and later
    ones store it: where it speaks more for dropping, later tokens do not see this one there. (It
    sees itself, and its own next word is not touched.) ``run.trace.unstored`` counts them.

    Predictors are new, and pick at random, with a warning, until a trained state is loaded:
    :meth:`from_state` takes published weights, ``run.learned[0].load_state_dict(...)`` those of one
    predictor under its official names, ``learned`` what an earlier run had. They are a sub-module
    of the model while the run is in force, and :func:`visprune.save_pretrained` keeps them. A
    choice has no gradient here, so they are not trained under the run.

    Args:
        layer: 0-based decoder layer on entering which the tokens are gone, or a fraction of the
            depth.
        width: features of the predictor's blocks, a multiple of 4 and of ``heads``.
        heads: of their attention.
        hidden: features within their MLP.
        text: whether answers are thinned out too.
        learned: predictors of an earlier run, to go on with.
    """

    name: ClassVar[str] = "dynamic_llava"
    rounding: ClassVar[Rounding] = "floor"

    layer: int | float = 2
    width: int = 512
    heads: int = 8
    hidden: int = 2048
    text: bool = False
    learned: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the predictor's numbers."""
        super().__post_init__()
        given = {"width": self.width, "heads": self.heads, "hidden": self.hidden}
        wrong = [name for name, value in given.items() if not is_whole(value) or value < 1]
        if wrong or self.width % 4 or self.width % self.heads:
            raise ConfigError(
                f"width, heads and hidden are whole numbers of at least 1, and width is a multiple "
                f"of 4 and of heads; got width={self.width!r}, heads={self.heads!r}, "
                f"hidden={self.hidden!r}."
            )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage inside the decoder."""
        return (Stage(Site.decoder(self.layer), self.budget),)

    def build_learned(self, spec: ModelSpec) -> nn.ModuleList:
        """The predictor of pictures, and with ``text`` that of answers behind it.

        Raises:
            ConfigError: ``learned`` is not that many modules in a list.
        """
        count = 1 + self.text
        if self.learned is None:
            width = spec.decoder_width
            made = nn.ModuleList([ImagePredictor(width, self.width, self.heads, self.hidden)])
            if self.text:
                made.append(TextPredictor(width, self.width))
            return made
        if not isinstance(self.learned, nn.ModuleList) or len(self.learned) != count:
            raise ConfigError(
                f"learned is the run.learned of an earlier run, a ModuleList of {count} "
                f"predictor{'s' * self.text}; got {type(self.learned).__name__}."
            )
        return self.learned

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """The most probable."""
        batch, count = tokens.features.shape[:2]
        if ctx.num_keep == count:
            return Selection.identity(batch, count, tokens.features.device)
        if ctx.learned is None:
            raise ConfigError(f"{self.name} was given no predictor for its stage at {ctx.site}.")
        if isinstance(ctx.learned, ImagePredictor):
            ctx.learned.warn_if_new()
        logits = ctx.learned(tokens.features)
        return Selection.top(logits.float().log_softmax(dim=-1)[..., 0], ctx.num_keep)

    @property
    def thins_answers(self) -> bool:
        """With ``text``."""
        return self.text

    def stores(self, states: Tensor, learned: nn.ModuleList | None) -> Tensor:
        """Where the second predictor speaks more for keeping, ``[B]``."""
        if learned is None:
            raise ConfigError(f"{self.name} was given no predictor for answers.")
        logits = learned[1](states)
        return logits[..., 0] > logits[..., 1]

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], *, heads: int = 8, text: bool = True, **params: Any
    ) -> DynamicLLaVA:
        """The method with published weights, found by name among those of a whole model.

        Args:
            state: names end in ``image_score_predictor.`` or ``output_text_score_predictor.`` and
                the name of a parameter.
            heads: of the predictor's attention, 8 in the published models.
            text: whether answers are thinned out too.
            **params: of the method; ``keep_ratio`` is 0.2 without a budget.

        Raises:
            ConfigError: there are no such names, or they are not of such predictors.
        """
        image, answer = (_named(state, mark) for mark in _MARKS)
        if text and not answer:
            raise ConfigError(
                f"These weights hold no predictor of answers ({_MARKS[1]}...). Pass text=False."
            )
        try:
            width, features = image["down_mlp.1.weight"].shape
            hidden = len(image["transformer.0.mlp.fc1.weight"])
        except KeyError as error:
            raise ConfigError(
                f"These weights hold no {_MARKS[0]}{error.args[0]}; got "
                f"{', '.join(list(state)[:5]) or 'nothing'}."
            ) from error
        built = nn.ModuleList([ImagePredictor(features, width, heads, hidden)])
        if text:
            built.append(TextPredictor(features, width))
        for module, own in zip(built, (image, answer), strict=False):
            try:
                module.load_state_dict(own)
            except RuntimeError as error:
                raise ConfigError(f"Weights of another predictor: {first_line(error)}") from error
        shape: dict[str, Any] = {"width": width, "heads": heads, "hidden": hidden, "text": text}
        budget: dict[str, Any] = {}
        if not {"num_keep", "keep_ratio"} & set(params):
            budget["keep_ratio"] = 0.2
        return cls(**budget, **shape, learned=built, **params)

    def to_dict(self) -> dict[str, Any]:
        """Without the predictor: it is weights, and is saved as such."""
        names = (
            *("num_keep", "keep_ratio", "layer", "width", "heads", "hidden", "text", "positions"),
        )
        fields = {name: getattr(self, name) for name in names}
        return {"method": self.name, **fields, "strict": self.strict}

    def macs(self, count: int, keep: int, width: int) -> int:
        """The predictor's linear layers and attention."""
        if keep == count:
            return 0
        own, half, quarter = self.width, self.width // 2, self.width // 4
        block = 4 * own * own + 2 * own * self.hidden + 2 * count * own
        ends = width * own + own * half + half * quarter + 2 * quarter
        return count * (ends + _BLOCKS * block)
