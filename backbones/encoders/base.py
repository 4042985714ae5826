# SPDX-License-Identifier: Apache-2.0
"""What the machine asks of an image encoder: its layers, and what else is indexed by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from visprune.core.method import ModelSpec
from visprune.core.threads import PerThread
from visprune.cost.layers import EncoderLayer
from visprune.errors import UnsupportedModel

ShownQK = Callable[[Tensor, Tensor, float], None]


class Instead:
    """An attribute of one instance in place of what was there, until it is removed."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._owner, self._name, self._value = owner, name, value
        self._had = name in vars(owner)
        self._before = vars(owner).get(name)
        vars(owner)[name] = value

    def remove(self) -> None:
        """Put back what was there, or the class's own, unless another took the place."""
        own = vars(self._owner)
        if own.get(self._name) is not self._value:
            return
        if self._had:
            own[self._name] = self._before
        else:
            del own[self._name]


class Noticed:
    """A module's ``forward`` as an attribute of the instance, so that compiled code is made anew.

    ``torch.compile`` trusts that a module without hooks gets none
    (``torch._dynamo.config.skip_nnmodule_hook_guards``): code from before a method was attached, or
    of another instance, would run on as if there were none. A ``forward`` on the instance it does
    look for. One that is there already stays (Accelerate's).
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._forward = module, None if "forward" in vars(module) else module.forward
        if self._forward is not None:
            vars(module)["forward"] = self._forward

    def remove(self) -> None:
        """Take it off, unless another took its place."""
        own = vars(self._module)
        if self._forward is not None and own.get("forward") is self._forward:
            del own["forward"]


class _Call(PerThread):
    """What hooks hold in the forward of a thread."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []


class Hooks:
    """Hooks that hand tensors to each other within one forward, in ``call.held``.

    They are methods and not functions inside a function, so that a copy of the model has copies of
    them, which act on the copy alone. It starts without what is held.
    """

    def __init__(self) -> None:
        self.call = _Call()


def refuse_scripting(model: nn.Module) -> NoReturn:
    """Raise ``UnsupportedModel`` where ``torch.jit.script`` is to compile a reduced encoder."""
    raise UnsupportedModel(
        f"TorchScript cannot compile this {type(model).__name__} while a method is in force: what "
        f"its layers run is not of its language. Use torch.export, torch.compile, torch.jit.trace "
        f"or visprune.onnx.export, or script it after run.remove()."
    )


def refuse_proxy(pixels: Any, model: nn.Module) -> None:
    """Raise ``UnsupportedModel`` where ``torch.fx`` traces a reduced encoder by a stand-in."""
    if isinstance(pixels, torch.fx.Proxy):
        raise UnsupportedModel(
            f"torch.fx traces this {type(model).__name__} without pixels, and how many tokens "
            f"leave depends on their number. Take features by hooks (timm: method='hook', "
            f"forward_intermediates), export with torch.export, or trace before visprune.prune or "
            f"after run.remove()."
        )


@dataclass(frozen=True)
class Layer:
    """One layer of an encoder, seen from its residual stream.

    A layer computes ``y = x + branch(...attention(entry(x)))`` and ``y + mlp(y)``. Tokens leave
    between the two lines: the layer is given a placeholder of zeros for ``x``, ``entry`` the real
    one, and the output of ``branch`` becomes the reduced ``y``. The layer's own forward runs, so
    that whatever it holds (layer scale, norms, gates, stochastic depth) stays.

    Attributes:
        block: the module that maps the sequence to the sequence.
        attention: the module that computes attention, for signals.
        entry: the one module that reads the layer's input; ``None`` where attention and MLP run in
            parallel: tokens then leave at the layer's end.
        branch: the last module of the attention branch, whose output is added to the input.
        attention_weights: multiply-adds per token before tokens leave (the projections).
        mlp_weights: the same after they leave.
        attention_width: features of all heads of queries and keys, and of values.
        head_width: features of one head.
        gain: name of the parameter that the layer multiplies the branch by before it is added;
            it is taken to be 1 in the layer's own forward, see :meth:`added`.
        pair_weights: multiply-adds of each pair of tokens beside scores and values.
    """

    block: nn.Module
    attention: nn.Module
    entry: nn.Module | None
    branch: nn.Module | None
    attention_weights: int
    mlp_weights: int
    attention_width: int
    head_width: int
    gain: str | None = None
    pair_weights: int = 0

    def added(self, x: Tensor, branch: Tensor) -> Tensor:
        """The input with the output of the attention branch."""
        if self.gain is None:
            return x + branch
        gain: Any = self.block._parameters[self.gain]
        return x + gain * branch

    @property
    def cost(self) -> EncoderLayer:
        """What it costs by token and by pair."""
        pair = 2 * self.attention_width + self.pair_weights
        return EncoderLayer(self.attention_weights, self.mlp_weights, pair)


class Reduction(Protocol):
    """What an adapter's overrides ask of the reduction in force."""

    def sizes(self, count: int) -> Tensor | None:
        """Patches that each of ``count`` tokens stands for, ``[B, N]``; ``None``: one each."""

    def fresh(self) -> bool:
        """Whether sizes are those of a forward since this was last asked, or no method has any.

        Compiled code keeps no pass for what runs behind it in Python.
        """

    def expand(self, layer: int, y: Tensor) -> Tensor:
        """Undo all reductions up to and in ``layer``: ``[B, K, D]`` to ``[B, N, D]``."""

    def key_bias(self) -> Tensor | None:
        """Logarithm of the sizes, zero for prefix tokens, ``[B, T]``, of the layer that runs."""

    def places(self) -> Tensor | None:
        """Place in the grid of each patch ``[B, N]`` of the layer that runs; ``None``: all."""

    def away(self, layer: int) -> bool:
        """Whether patches have left that come back behind a later layer than this one."""


class EncoderAdapter:
    """Base of the adapters; one instance per reduced encoder.

    Attributes:
        model: the encoder.
        layers: its layers.
        prefix: tokens before the patches.
        has_cls: whether the first of them is a class token.
        width: features of a token.
        embed: the module that every forward calls first, with the pixels.
        rotary: whether layers are given the places of their tokens.
        gives_whole: whether what leaves the last layer has a value for every patch.
    """

    family: str = ""
    model: Any
    layers: list[Layer]
    prefix: int
    has_cls: bool
    width: int
    embed: nn.Module
    rotary: bool = False
    gives_whole: bool = False

    @property
    def spec(self) -> ModelSpec:
        """What methods may know."""
        return ModelSpec(
            family=type(self.model).__name__,
            num_layers=0,
            has_cls=self.has_cls,
            multi_axis_rope=False,
            encoder_layers=len(self.layers),
            encoder_width=self.width,
            lacking=self.lacking,
        )

    @property
    def lacking(self) -> dict[str, str]:
        """By capability of signals, why the encoder has it not."""
        why = self.why_no_cls_rows()
        return {} if why is None else {"cls_token": why}

    def run(self, inputs: Any) -> None:
        """Run the encoder once, on pixels or on what it takes by name."""
        if isinstance(inputs, Mapping):
            self.model(**inputs)
        else:
            self.model(inputs)

    def grid(self, pixels: Tensor) -> tuple[int, ...]:
        """Patches along height and width, of clips along time first."""
        raise NotImplementedError  # pragma: no cover - abstract

    def default_grid(self) -> tuple[int, ...]:
        """Patches along height and width of the model's own input size."""
        raise NotImplementedError  # pragma: no cover - abstract

    def fixed_macs(self, grid: tuple[int, ...], last: int) -> int:
        """Multiply-adds outside the layers: embedding, pooling and head for ``last`` tokens."""
        raise NotImplementedError  # pragma: no cover - abstract

    def inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor | None, at: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give a layer the key bias and the places of its tokens.

        Args:
            args: positional arguments of the layer, the sequence first.
            kwargs: keyword arguments.
            bias: ``[B, T]``, see :meth:`Reduction.key_bias`.
            at: place in the grid of each patch token, ``[B, N]``; ``None``: all, in order.
        """
        raise NotImplementedError  # pragma: no cover - abstract

    def shapes(self, args: Any, kwargs: Mapping[str, Any]) -> list[tuple[int, int]] | None:
        """Rows and columns of each picture, where they come as lists of patches, padded behind.

        Args:
            args: what the embedding was given.
            kwargs: the same by name.
        """
        return None

    def take_mask(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], lengths: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        """Take the mask of a padded batch out of what a layer is given.

        Args:
            args: positional arguments of the layer, the sequence first.
            kwargs: keyword arguments.
            lengths: patches of each picture, ``[B]``; what is behind is padding.

        Returns:
            Both without the mask, and the mask by name.

        Raises:
            UnsupportedModel: it hides something else than the padding.
        """
        raise NotImplementedError  # pragma: no cover - where `shapes` gives none

    def by_layout(self, number: int) -> bool:
        """Whether the last bits of what follows a layer depend on how its input lies in memory.

        A model without prefix tokens carries its stream feature by feature. A layer that adds
        features up before a LayerNorm did gets the other layout's last bits.
        """
        return not isinstance(self.layers[number].entry, nn.LayerNorm)

    def watch(self, number: int, record: ShownQK, *, every: bool = True) -> list[Any]:
        """Show queries and keys ``[B, H, T, d]`` of a layer's attention, and the scale.

        Without ``every`` the first token's query is enough: an adapter that projects once more for
        it may leave the others out.
        """
        raise NotImplementedError  # pragma: no cover - abstract

    def signal_macs(self, tokens: int, *, every: bool = True) -> int:
        """Multiply-adds that :meth:`watch` itself spends on one picture of ``tokens`` tokens."""
        return 0

    def overrides(self, reduction: Reduction) -> list[Any]:
        """Install what keeps pooling and dense features right; returns what removes it."""
        return []

    def weigh_keys(self, number: int, policy: Callable[[], Tensor | None]) -> list[Any]:
        """Let keys count as ``policy()`` ``[B, N]`` says, with gradients, in training.

        A patch of weight 0 is no key, but to itself; the others share its part. Where it is
        ``None``, nothing changes. Here: training is refused.
        """
        layer = self.layers[number]
        hook = partial(self._refuse_training, policy, type(layer.attention).__name__)
        # Where one module is all of the layer, the first thing in it: the layer itself is not asked
        # before it has drawn.
        whole = layer.attention is layer.block
        module = next(layer.block.children()) if whole else layer.attention
        return [module.register_forward_pre_hook(hook)]

    def _refuse_training(
        self, policy: Callable[[], Tensor | None], attention: str, module: nn.Module, args: Any
    ) -> None:
        if policy() is None:
            return
        pool = getattr(self.model, "attn_pool", None)
        pooled = "" if pool is None else f" and {type(pool).__name__} pooling"
        raise UnsupportedModel(
            f"A method that learns which tokens to keep has to weigh the keys of every layer in "
            f"training, which is not offered for {type(self.model).__name__} with "
            f"{attention}{pooled}. It trains on timm's VisionTransformer with its "
            f"plain Attention and no attention pooling; with weights that were trained before, "
            f"this model runs it in eval mode (model.eval())."
        )

    def whole(self, reduction: Reduction, output: Any) -> Any:
        """What the encoder gives, with the value of its slot for every patch of the grid."""
        raise NotImplementedError  # pragma: no cover - where a model reads it behind the encoder

    def why_no_cls_rows(self) -> str | None:
        """Why the class token's attention cannot be read, or ``None`` if it can."""
        if self.has_cls:
            return None
        return f"{type(self.model).__name__} has no class token"


def weighted_mean(x: Tensor, size: Tensor) -> Tensor:
    """Mean over tokens ``[B, N, D]``, each as often as the patches it stands for ``[B, N]``."""
    share = size / size.sum(1, keepdim=True)
    return (x * share[..., None].to(x.dtype)).sum(1)


def no_mask(mask: Any, causal: Any) -> None:
    """Refuse a mask that the user gives: it is over tokens that a reduction takes away.

    Raises:
        UnsupportedModel: there is one.
    """
    if mask is not None or causal:
        raise UnsupportedModel(
            "An attention mask (attn_mask, is_causal) is over the encoder's whole sequence, and "
            "does not fit one that is reduced. Call the model without a mask, or remove the run."
        )


def check_padding(mask: Tensor | None, lengths: Tensor, prefix: int) -> None:
    """Compare a mask with the padding of a batch.

    Args:
        mask: ``[B, T]``, or ``[B, 1, Q, T]`` of which a patch's row is looked at; bool or additive.
        lengths: patches of each picture, ``[B]``.
        prefix: tokens before them.

    Raises:
        UnsupportedModel: it hides something else.
    """
    total = int(lengths.max())
    if mask is not None:
        row = mask if mask.dim() == 2 else mask[:, 0, 0]
        seen = row.bool() if row.dtype in (torch.bool, torch.int64) else row == 0
        there = torch.arange(row.shape[1], device=row.device) < (prefix + lengths)[:, None]
        if bool((seen == there).all()):
            return
    raise UnsupportedModel(
        f"The pictures of this batch have {lengths.tolist()} patches, and its mask does not hide "
        f"exactly what is behind them, up to {total} and more. Give the mask and the sizes as the "
        f"processor returns them, padding behind the patches, or pictures of one size."
    )


def refuse_normed(reduction: Reduction, layers: Iterable[int]) -> None:
    """Refuse features behind a norm, where patches that have left come back by states before it.

    Raises:
        UnsupportedModel: there are such among the layers.
    """
    away = [layer for layer in layers if reduction.away(layer)]
    if away:
        raise UnsupportedModel(
            f"Features of layers {away} are asked for behind the final norm, and patches that have "
            f"left there follow the states before it. Ask for them as they are (norm=False, "
            f"normalize_intermediates=False), or for the last layer."
        )


def places(table: Tensor, at: Tensor) -> Tensor:
    """Rows ``at`` ``[B, N]`` of rotary embeddings over the grid.

    Args:
        table: ``[N, d]``, ``[H, N, d]`` or, of every picture, ``[B, 1 or H, N, d]``.
        at: places.

    Returns:
        ``[B, 1, K, d]`` or ``[B, H, K, d]``.
    """
    if table.dim() == 2:
        return torch.nn.functional.embedding(at, table)[:, None]
    if table.dim() == 3:
        return table[:, at].transpose(0, 1)
    return table.gather(2, at[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[-1]))
