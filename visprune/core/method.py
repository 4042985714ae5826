# SPDX-License-Identifier: Apache-2.0
"""What a pruning method is: a frozen dataclass with a schedule and a selection rule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from visprune.core.budget import Budget, Schedule
from visprune.core.selection import Selection
from visprune.core.tokens import VisualTokens
from visprune.errors import ConfigError, did_you_mean

PositionRule = Literal["original", "compact"]


@dataclass(frozen=True)
class ModelSpec:
    """What a method may know of a model.

    Attributes:
        family: the transformers ``model_type``.
        num_layers: decoder layers; 0 for a vision transformer alone.
        has_cls: whether the vision encoder has a class token.
        multi_axis_rope: positions are (t, h, w), as in Qwen-VL, not a line.
        vision_layers: layers of the vision encoder, 0 where none can be reduced inside.
        vision_width: its features.
        vision_refusal: why none can be reduced inside, where that is so.
    """

    family: str
    num_layers: int
    has_cls: bool
    multi_axis_rope: bool
    vision_layers: int = 0
    vision_width: int = 0
    vision_refusal: str = ""

    @property
    def is_vit(self) -> bool:
        """Whether the model is a vision transformer alone, without projector and decoder."""
        return self.num_layers == 0


@dataclass(frozen=True)
class Context:
    """What a method is shown at one stage; fields it did not ask for are ``None``.

    Attributes:
        num_keep: K, tokens to keep of each image here.
        stage: number of the stage in the schedule.
        attention: decoder attention to the visual tokens. ``last_query``: ``[B, H, N]``;
            ``text_queries`` of a withdrawal: the share of the text's attention that goes to all
            visual tokens of the sample, mean over heads and queries, ``[B]``.
        cls_attention: class-token attention to the patches, ``[B, H, N]``.
        vision_keys: keys of the encoder's feature layer, mean over heads, ``[B, N, d]``.
        fingerprints: one int per image, from its pixels.
        layer: at a site inside an encoder, its 0-based layer.
        num_layers: the encoder's layers, at such a site.
        prefix: tokens before the patches there (class, distillation, register tokens).
        learned: the stage's own module, of a method that has parameters.
    """

    num_keep: int
    stage: int = 0
    attention: Tensor | None = None
    cls_attention: Tensor | None = None
    vision_keys: Tensor | None = None
    fingerprints: tuple[int, ...] = field(default_factory=tuple)
    layer: int = 0
    num_layers: int = 0
    prefix: int = 0
    learned: nn.Module | None = None

    def shown(self, name: str) -> Tensor:
        """Return a signal that the stage asked for.

        Raises:
            ConfigError: the stage's ``Needs`` do not name it.
        """
        value = getattr(self, name)
        if value is None:
            raise ConfigError(f"The stage was not shown {name!r}; ask for it in its Needs.")
        return value


@dataclass(frozen=True, kw_only=True)
class PruningMethod:
    """Base of all methods.

    Args:
        positions: ``"original"``: survivors keep their position ids; ``"compact"``: ids close up
            over the gaps (1-D rotary models only). ``None``: the method's own default.
        strict: raise if a budget exceeds an image's token count instead of keeping all of it.
    """

    name: ClassVar[str] = ""
    default_positions: ClassVar[PositionRule] = "original"
    # Slots are means of the tokens in them: inside an encoder, attention and average pooling then
    # weigh a slot by the patches that it stands for.
    size_weighted: ClassVar[bool] = False
    # Whether it has a schedule for a vision transformer alone (`spec.is_vit`).
    in_towers: ClassVar[bool] = False
    # Whether it acts inside an image encoder and nowhere else, also on a vision-language model.
    only_in_towers: ClassVar[bool] = False

    positions: PositionRule | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        """Reject values outside their range."""
        if self.positions not in (None, "original", "compact"):
            raise ConfigError(
                f"positions is 'original' or 'compact', got {self.positions!r}."
                + did_you_mean(str(self.positions), ("original", "compact"))
            )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """Return the stages of this method on a model, in order of depth."""
        raise NotImplementedError  # pragma: no cover - abstract

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Choose ``ctx.num_keep`` of N tokens for each of B images."""
        raise ConfigError(f"{self.name} has no selection stage.")

    def decide(self, tokens: VisualTokens, ctx: Context) -> Tensor:
        """In the training of a method that learns: which tokens later layers see.

        Args:
            tokens: all of them; ``size`` is 1 for those still there, 0 for those dropped before.
            ctx: with ``learned``.

        Returns:
            ``[B, N]``, 1 or 0, with a gradient.
        """
        raise ConfigError(f"{self.name} learns nothing.")

    def withdraw(self, ctx: Context) -> Tensor:
        """Return for each of B samples whether all its visual tokens leave: bool ``[B]``."""
        raise ConfigError(f"{self.name} has no withdrawal stage.")

    @property
    def size_bias(self) -> bool:
        """Whether attention adds the logarithm of a key's size (proportional attention)."""
        return self.size_weighted

    def build_learned(self, spec: ModelSpec) -> nn.ModuleList | None:
        """Return the parameters of the method, one module per stage, or ``None``."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"method": name, **parameters}``, enough to build the method again."""
        return {"method": self.name, **dataclasses.asdict(self)}

    @classmethod
    def from_params(cls, **params: Any) -> Self:
        """Build the method from keyword parameters.

        Raises:
            ConfigError: a parameter is unknown (the message suggests the nearest) or missing.
        """
        allowed = [f.name for f in dataclasses.fields(cls)]
        for key in params:
            if key not in allowed:
                raise ConfigError(
                    f"{cls.name} has no parameter {key!r}.{did_you_mean(key, allowed)} "
                    f"Parameters: {', '.join(allowed)}."
                )
        needed = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        missing = [name for name in needed if name not in params]
        if missing:
            raise ConfigError(f"{cls.name} needs {' and '.join(missing)}; give {missing[0]}=...")
        return cls(**params)


@dataclass(frozen=True, kw_only=True)
class BudgetedMethod(PruningMethod):
    """A method that keeps a given number of tokens of each image.

    Args:
        num_keep: tokens of one image that survive the last selection stage.
        keep_ratio: the same as a fraction of the image's own tokens; one of the two is given.
    """

    num_keep: int | None = None
    keep_ratio: float | None = None

    def __post_init__(self) -> None:
        """Check the budget."""
        super().__post_init__()
        _ = self.budget

    @property
    def budget(self) -> Budget:
        """The budget of the last selection stage."""
        return Budget(num_keep=self.num_keep, keep_ratio=self.keep_ratio)
