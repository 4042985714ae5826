# SPDX-License-Identifier: Apache-2.0
"""Read cost shapes from model configs: a second opinion on what is read from the modules.

A config is read by attribute only, so nothing here imports transformers: any object with the same
attributes will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from visprune.cost.shapes import DecoderShape, ProjectorShape, VisionShape
from visprune.errors import ConfigError, UnsupportedModel

# Families whose MLP has three matrices, whatever activation their config names.
_GATED = frozenset({"llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text"})
# Image encoders without a class token.
_NO_CLS = frozenset({"pixtral", "siglip_vision_model"})
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _read(config: object, *names: str) -> Any:
    """Return the first of the named attributes that ``config`` has and that is not ``None``."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    raise ConfigError(
        f"{type(config).__name__} has no {' or '.join(names)}, which its cost depends on. "
        "Fill the shape by hand."
    )


def _windows(config: object, num_layers: int) -> tuple[int | None, ...]:
    """Return each layer's sliding window; ``()`` where no layer has one."""
    kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModel(
            f"The cost of {', '.join(unknown)} layers is not known. Known: full_attention, "
            "sliding_attention."
        )
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return ()
    if not kinds:  # Mistral: one window for all
        return (window,) * num_layers
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def decoder_shape(config: object, *, gated_mlp: bool | None = None) -> DecoderShape:
    """Read a :class:`DecoderShape` from a text config (``model.config.get_text_config()``).

    Args:
        config: Any object with the attribute names of ``LlamaConfig``.
        gated_mlp: Whether the MLP has three matrices; ``None`` looks the family up by
            ``config.model_type``, since no config says it.

    Raises:
        ConfigError: A size is missing, or the family is not known and ``gated_mlp`` is ``None``.
        UnsupportedModel: The decoder has experts, or layers that are neither full nor
            sliding-window attention.
    """
    family = getattr(config, "model_type", None)
    if any(getattr(config, name, None) for name in _EXPERTS):
        raise UnsupportedModel(f"The cost of a mixture of experts ({family}) is not counted yet.")
    if gated_mlp is None:
        if family not in _GATED:
            raise ConfigError(
                f"Whether the MLP of {family!r} has two or three matrices is not known; pass "
                f"gated_mlp=True or False. Known as gated: {', '.join(sorted(_GATED))}."
            )
        gated_mlp = True
    hidden, heads = _read(config, "hidden_size"), _read(config, "num_attention_heads")
    layers = _read(config, "num_hidden_layers")
    return DecoderShape(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        ffn_size=_read(config, "intermediate_size"),
        vocab_size=_read(config, "vocab_size"),
        gated_mlp=gated_mlp,
        windows=_windows(config, layers),
    )


def _patch_dim(config: object, *, frames: int = 1) -> int:
    """Return the input numbers of one patch: channels × pixels × frames."""
    patch = _read(config, "patch_size")
    height, width = (patch, patch) if isinstance(patch, int) else tuple(patch)
    channels: int = _read(config, "num_channels", "in_channels")
    return channels * height * width * frames


def clip_vision_shape(config: object) -> VisionShape:
    """Read the :class:`VisionShape` of a CLIP tower (LLaVA-1.5, LLaVA-NeXT).

    Raises:
        ConfigError: A size is missing.
        UnsupportedModel: The tower is not CLIP's: others differ in their CLS token or pooling head,
            and would be counted wrongly in silence.
    """
    family = getattr(config, "model_type", "clip_vision_model")
    if family not in ("clip_vision_model", "clip"):
        raise UnsupportedModel(
            f"{family!r} is not a CLIP vision tower; fill a VisionShape by hand for it."
        )
    hidden, heads = _read(config, "hidden_size"), _read(config, "num_attention_heads")
    return VisionShape(
        num_layers=_read(config, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        head_dim=hidden // heads,
        ffn_size=_read(config, "intermediate_size"),
        patch_dim=_patch_dim(config),
        has_cls=True,
    )


def pixtral_vision_shape(config: object) -> VisionShape:
    """Read the :class:`VisionShape` of Pixtral's tower: each picture attends to itself.

    Raises:
        ConfigError: A size is missing.
    """
    hidden, heads = _read(config, "hidden_size"), _read(config, "num_attention_heads")
    return VisionShape(
        num_layers=_read(config, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        head_dim=hidden // heads,
        ffn_size=_read(config, "intermediate_size"),
        patch_dim=_patch_dim(config),
        gated_mlp=True,
    )


def _frames(config: object) -> int:
    """Return how many frames one temporal patch holds."""
    frames = _read(config, "temporal_patch_size")
    return frames if isinstance(frames, int) else frames[0]


def qwen2_vl_vision_shape(config: object) -> VisionShape:
    """Read the :class:`VisionShape` of Qwen2-VL: every layer attends within one frame.

    Raises:
        ConfigError: A size is missing.
    """
    hidden, heads = _read(config, "embed_dim"), _read(config, "num_heads")
    return VisionShape(
        num_layers=_read(config, "depth"),
        hidden_size=hidden,
        num_heads=heads,
        head_dim=hidden // heads,
        ffn_size=int(hidden * _read(config, "mlp_ratio")),
        patch_dim=_patch_dim(config, frames=_frames(config)),
    )


def qwen2_5_vl_vision_shape(config: object) -> VisionShape:
    """Read the :class:`VisionShape` of Qwen2.5-VL: windows, except in a few layers.

    Raises:
        ConfigError: A size is missing.
    """
    hidden, heads, depth = (_read(config, name) for name in ("hidden_size", "num_heads", "depth"))
    merge, full = _read(config, "spatial_merge_size"), _read(config, "fullatt_block_indexes")
    # window_size is in pixels; the model cuts windows on the merged grid, rounding down.
    side = _read(config, "window_size") // merge // _read(config, "patch_size") * merge
    return VisionShape(
        num_layers=depth,
        hidden_size=hidden,
        num_heads=heads,
        head_dim=hidden // heads,
        ffn_size=_read(config, "intermediate_size"),
        patch_dim=_patch_dim(config, frames=_frames(config)),
        gated_mlp=True,
        window=side,
        windowed_layers=tuple(layer for layer in range(depth) if layer not in set(full)),
    )


def llava_projector_shape(config: object) -> ProjectorShape:
    """Read the :class:`ProjectorShape` of a LLaVA-1.5, LLaVA-NeXT or Pixtral config (two layers).

    Raises:
        ConfigError: A size is missing.
    """
    taken = _read(config, "vision_feature_layer")
    features = 1 if isinstance(taken, int) else len(taken)
    vision = _read(config, "vision_config")
    inner = _read(vision, "hidden_size") * features
    has_cls = getattr(vision, "model_type", None) not in _NO_CLS
    outer = _read(_read(config, "text_config"), "hidden_size")
    return ProjectorShape(
        layers=((inner, outer), (outer, outer)),
        keeps_cls=has_cls and _read(config, "vision_feature_select_strategy") == "full",
    )


def qwen_merger_shape(config: object) -> ProjectorShape:
    """Read the :class:`ProjectorShape` of the patch merger of Qwen2-VL or Qwen2.5-VL.

    Args:
        config: The vision config. In Qwen2-VL's, ``embed_dim`` is the tower's width and
            ``hidden_size`` the decoder's; in Qwen2.5-VL's they are called ``hidden_size`` and
            ``out_hidden_size``.

    Raises:
        ConfigError: A size is missing.
    """
    merge = _read(config, "spatial_merge_size")
    block = _read(config, "embed_dim", "hidden_size") * merge**2
    outer = _read(config, "out_hidden_size", "hidden_size")
    return ProjectorShape(layers=((block, block), (block, outer)), merge=merge)
