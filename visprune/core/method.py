# SPDX-License-Identifier: Apache-2.0
"""What a pruning method is: a frozen dataclass with a schedule and a selection rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from visprune.core.budget import Budget, Rounding, Schedule, per_clip
from visprune.core.selection import Selection
from visprune.core.signals.base import Signal
from visprune.core.site import Site
from visprune.core.tokens import VisualTokens
from visprune.errors import ConfigError, did_you_mean

_PROJECTOR = Site.projector()

PositionRule = Literal["original", "compact"]


@dataclass(frozen=True)
class ModelSpec:
    """What a method may know of a model.

    Attributes:
        family: the transformers ``model_type``, or library and class of an encoder alone.
        num_layers: decoder layers; 0 for a vision transformer alone.
        has_cls: whether the image encoder has a class token.
        multi_axis_rope: positions are (t, h, w), as in Qwen-VL, not a line.
        encoder_layers: layers of the image encoder, 0 where none can be reduced inside.
        encoder_width: its features.
        decoder_width: features of a token in the decoder.
        encoder_end: the encoder layer whose output is read, 0-based; ``None``: the last.
        encoder_refusal: why none can be reduced inside, where that is so.
        patch_refusal: why patches cannot be left out before the encoder; empty where they can.
        lacking: by capability (:class:`visprune.core.signals.Signal`), why the model has it not, as
            a clause: "its encoder packs all pictures into one sequence".
        recurrent: decoder layers that carry a state from token to token and have no attention.
        deepest: the last decoder layer at which tokens can leave, where it is not the last of all:
            layers behind it attend to keys of this one.
        key_heads: of a decoder layer; 0 where its cache holds no keys of single heads.
        key_width: features of a key and its value together.
    """

    family: str
    num_layers: int
    has_cls: bool
    multi_axis_rope: bool
    encoder_layers: int = 0
    encoder_width: int = 0
    encoder_end: int | None = None
    encoder_refusal: str = ""
    patch_refusal: str = "whether its encoder can do without some of its patches is not known"
    lacking: Mapping[str, str] = field(default_factory=dict, hash=False)
    recurrent: frozenset[int] = frozenset()
    deepest: int | None = None
    decoder_width: int = 0
    key_heads: int = 0
    key_width: int = 0

    @property
    def is_vit(self) -> bool:
        """Whether the model is a vision transformer alone, without projector and decoder."""
        return self.num_layers == 0

    def why_not(self, capability: str) -> str | None:
        """Return why the model has not a capability, ``None`` where it has."""
        if capability == "decoder" and self.is_vit:
            return f"{self.family} is an image encoder alone, without a decoder"
        if capability == "cls_token" and not self.has_cls:
            return self.lacking.get(capability, f"the encoder of {self.family} has no class token")
        return self.lacking.get(capability)


@dataclass(frozen=True)
class Context:
    """What a method is shown at one stage, beside the tokens.

    Attributes:
        num_keep: K, tokens to keep of each image here; 0 where the method decides itself.
        site: where the stage is.
        stage: its number in the schedule.
        signals: what the stage asked for, of the B images, by signal; see :meth:`__getitem__`.
        original: tokens that each image had before the first stage.
        layer: at a site inside an encoder, its 0-based layer.
        num_layers: the encoder's layers, at such a site.
        prefix: tokens before the patches there (class, distillation, register tokens).
        learned: the stage's own module, of a method that has parameters.
        carried: inside an encoder, what the method's stage before gave to the tokens that are left
            (:meth:`Selection.carrying`), ``[B, N]``; ``None``: nothing.
    """

    num_keep: int = 0
    site: Site = _PROJECTOR
    stage: int = 0
    signals: Mapping[Signal, Any] = field(default_factory=dict)
    original: int = 0
    layer: int = 0
    num_layers: int = 0
    prefix: int = 0
    learned: nn.Module | None = None
    carried: Tensor | None = None

    def __getitem__(self, signal: Signal) -> Any:
        """Return a signal that the stage needs.

        Raises:
            ConfigError: its ``needs`` do not name it.
        """
        if signal not in self.signals:
            raise ConfigError(
                f"The stage at {self.site} was not shown {signal}; name it in the stage's needs."
            )
        return self.signals[signal]

    def get(self, signal: Signal) -> Any:
        """Return a signal that the stage wants, ``None`` where the model has it not."""
        return self.signals.get(signal)


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
    # Inside an encoder every patch has a slot that is a mean with it in, or comes back: behind the
    # encoder, the grid can be given back, each patch with a value.
    gives_back: ClassVar[bool] = False
    # Parameters under which the method fits a server: it acts at the projector alone and says ahead
    # how many tokens stay. Those that it has by default are not among them.
    served: ClassVar[Mapping[str, Any]] = {}

    positions: PositionRule | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        """Take numpy's numbers as Python's, and reject values outside their range."""
        for name, value in vars(self).items():
            if _is_scalar(value):
                object.__setattr__(self, name, value.item())
            elif isinstance(value, list | tuple) and any(map(_is_scalar, value)):
                plain = type(value)(x.item() if _is_scalar(x) else x for x in value)
                object.__setattr__(self, name, plain)
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
        raise NotImplementedError  # pragma: no cover - abstract

    def survivors(self, places: Sequence[tuple[int, int, int]], keep: int, kind: str) -> int:
        """Tokens that a stage with a budget leaves of an image, which its places alone tell.

        Args:
            places: (t, h, w) of the tokens that enter it.
            keep: K, what the budget allows.
            kind: ``"image"`` or ``"video"``.
        """
        return keep

    def of_clip(self, frames: Sequence[int]) -> PruningMethod:
        """Return the method for one picture or clip: itself, unless its budget counts frames.

        Args:
            frames: tokens that each frame of the clip has; none of a picture.

        Raises:
            BudgetError: it counts frames, and there are none, or none that are alike.
        """
        by_frame = getattr(self, "num_keep_per_frame", None)
        if by_frame is None:
            return self
        count = per_clip(by_frame, frames)
        return dataclasses.replace(self, num_keep=count, num_keep_per_frame=None)  # type: ignore[call-arg]

    def known_ahead(self, places: Sequence[tuple[int, int, int]], kind: str) -> int | None:
        """Tokens that a stage without a budget leaves of an image, where its places alone tell.

        Args:
            places: (t, h, w) of the tokens that enter it.
            kind: ``"image"`` or ``"video"``.

        Returns:
            ``None`` where the number is seen in the image.
        """
        return None

    def macs(self, count: int, keep: int, width: int) -> int:
        """Multiply-adds that the rule itself takes on one image: N tokens, K kept, D features."""
        return 0

    def handed_on(self, count: int, keep: int) -> int:
        """Tokens left of N where K are kept, with those that the rule makes of the others."""
        return keep

    def decide(self, tokens: VisualTokens, ctx: Context) -> Tensor:
        """In the training of a method that learns: which tokens later layers see.

        Args:
            tokens: all of them; ``size`` is 1 for those still there, 0 for those dropped before.
            ctx: with ``learned``.

        Returns:
            ``[B, N]``, 1 or 0, with a gradient.
        """
        raise ConfigError(f"{self.name} learns nothing.")

    @property
    def size_bias(self) -> bool:
        """Whether attention adds the logarithm of a key's size (proportional attention)."""
        return self.size_weighted

    @property
    def thins_answers(self) -> bool:
        """Whether its stage in the decoder decides which generated tokens later layers store."""
        return False

    def stores(self, states: Tensor, learned: nn.ModuleList | None) -> Tensor:
        """Of a method that thins answers: which tokens its layer and later ones store, ``[B]``.

        Args:
            states: of each row's new token, as they enter the layer, ``[B, D]``.
            learned: the method's modules.
        """
        raise ConfigError(f"{self.name} leaves the tokens of an answer alone.")

    @property
    def asks_the_last_token(self) -> bool:
        """Without a cache, whether tokens are chosen anew by every token that is generated."""
        return False

    def build_learned(self, spec: ModelSpec) -> nn.ModuleList | None:
        """Return the parameters of the method, one module per stage, or ``None``."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"method": name, **parameters}``, enough to build the method again."""
        found = {"method": self.name, **dataclasses.asdict(self)}
        if found.get("num_keep_per_frame", 0) is None:  # records of other budgets do not name it
            del found["num_keep_per_frame"]
        return found

    @classmethod
    def example(cls) -> Self:
        """The method with the least that it can be built with, to look at its schedule."""
        least = {"num_keep": 1, "keep_ratio": 1.0, "r": 1}
        fields = dataclasses.fields(cls)
        needed = [
            f.name
            for f in fields
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        names = {f.name: f.default for f in fields}
        if not needed and names.get("num_keep", 0) is None and not names.get("keep_ratio"):
            needed = ["num_keep"]
        given: dict[str, Any] = {name: least[name] for name in needed}
        return cls(**given)

    @classmethod
    def from_params(cls, **params: Any) -> Self:
        """Build the method from keyword parameters.

        Raises:
            ConfigError: a parameter is unknown (the message suggests the nearest) or missing.
        """
        allowed = [f.name for f in dataclasses.fields(cls)]
        for key in params:
            if key == "num_keep_per_frame" and not {key, "num_keep"} & {*allowed}:
                raise ConfigError(
                    f"{cls.name} has no parameter {key!r}: it takes no number of tokens that stay "
                    f"of a picture, so it knows none of a frame. "
                    f"Parameters: {', '.join(allowed)}."
                )
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
        keep_ratio: the same as a fraction of the image's own tokens.
        num_keep_per_frame: of a clip, tokens for each of its frames, as the model has frames (some
            make one of two): ``T`` times as many for the whole clip, which the method chooses
            among all of its tokens. Pictures are refused. One of the three is given.
    """

    # How a fraction of the tokens becomes a number.
    rounding: ClassVar[Rounding] = "round"

    num_keep: int | None = None
    keep_ratio: float | None = None
    num_keep_per_frame: int | None = None

    def __post_init__(self) -> None:
        """Check the budget."""
        super().__post_init__()
        _ = self.budget

    @property
    def budget(self) -> Budget:
        """The budget of the last selection stage."""
        return Budget(
            num_keep=self.num_keep,
            keep_ratio=self.keep_ratio,
            num_keep_per_frame=self.num_keep_per_frame,
            rounding=self.rounding,
        )


def _is_scalar(value: object) -> bool:
    """Whether ``value`` is one number of numpy; this layer knows no numpy."""
    kind = type(value)
    return kind.__module__ == "numpy" and getattr(value, "ndim", None) == 0
