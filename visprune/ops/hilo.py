# SPDX-License-Identifier: Apache-2.0
"""HiLo attention and its pooling (see ``visprune.ops``)."""

from __future__ import annotations

from torch import Tensor

from visprune.errors import ConfigError
from visprune.kernels.hilo_attention import op as hilo_op
from visprune.ops.check import choose, floating, integer, shape

_NAME = "hilo_attention"
Linear = hilo_op.Linear  # (weight [out, in], bias or None)


def hilo_attention(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    low_q: Tensor | None,
    low_k: Tensor | None,
    low_v: Tensor | None,
    window_size: int = 2,
    scale: float | None = None,
    masked: bool = False,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """HiLo attention (LITv2, arXiv 2205.13213) of projected tokens, heads last.

    High-frequency heads attend inside windows of ``window_size`` x ``window_size`` tokens,
    low-frequency heads from every token to the pooled keys. The projections stay outside: the
    low keys come from pooled *inputs* (``l_kv(hilo_pool(x))``), a quarter of the work of
    pooling keys at window 2. :func:`hilo_layer` is the whole layer.

    H and W need not be multiples of the window: the grid is padded right and bottom. As in the
    official dense-prediction code a padded token is a key like any other, ``pad_k`` and
    ``pad_v``: the projection of a zero, so the biases (None: zeros). ``masked=True`` leaves
    padding out instead. Differentiable in every tensor.

    Args:
        q: [B, H, W, Hh, d], the high heads; None (with ``k``, ``v``): there are none.
        k: like ``q``.
        v: like ``q``.
        low_q: [B, H, W, Hl, d], the low heads; None (with ``low_k``, ``low_v``): none.
        low_k: [B, h, w, Hl, d], any h and w (``hilo_pool`` gives ceil(H / window_size)).
        low_v: like ``low_k``.
        window_size: tokens along one side of a window.
        scale: of the scores; None means ``d ** -0.5``.
        masked: hide padded tokens from the high heads.
        pad_k: [Hh, d], the key of a padded token.
        pad_v: [Hh, d], its value.
        backend: see ``visprune.ops``.

    Returns:
        [B, H, W, Hh + Hl, d], high heads first, in the dtype of the input.

    Raises:
        ConfigError: a wrong shape, dtype or window.
        UnsupportedKernel: ``backend="triton"`` where it cannot run.
    """
    window_size = _window(_NAME, window_size)
    _check_branch("q, k and v", q, k, v, same=True)
    _check_branch("low_q, low_k and low_v", low_q, low_k, low_v, same=False)
    like = q if q is not None else low_q
    if like is None:
        raise ConfigError(f"{_NAME}: give q, k, v or low_q, low_k, low_v (or all six); got none.")
    given = [t for t in (q, k, v, low_q, low_k, low_v, pad_k, pad_v) if t is not None]
    if any(t.dtype != like.dtype for t in given):
        raise ConfigError(
            f"{_NAME}: all tensors must have one dtype; got {[str(t.dtype) for t in given]}."
        )
    if q is not None and low_q is not None:
        want, got = list(q.shape), list(low_q.shape)
        if want[:3] != got[:3] or want[4] != got[4]:
            raise ConfigError(
                f"{_NAME}: q and low_q must agree in B, H, W and d; got {want} and {got}."
            )
    for key, pad in (("pad_k", pad_k), ("pad_v", pad_v)):
        if pad is not None and q is None:
            raise ConfigError(f"{_NAME}: {key} belongs to the high heads, but q is None.")
        shape(_NAME, key, pad, tuple(like.shape[3:]))
    tensors = (q, k, v, low_q, low_k, low_v, pad_k, pad_v)
    choice = choose(_NAME, backend, like.device, lambda: hilo_op.why_not(window_size, *tensors))
    scale = like.shape[-1] ** -0.5 if scale is None else scale
    return hilo_op.hilo_attention(*tensors, window_size, scale, masked, choice)


def hilo_pool(x: Tensor, window_size: int, masked: bool = False) -> Tensor:
    """Mean of every window: the input of the low branch's key and value projection.

    Args:
        x: [B, H, W, C]; H and W need not be multiples of the window.
        window_size: tokens along one side of a window.
        masked: the mean of a window at the border is over its tokens alone. Otherwise padding
            counts as zeros, as in the official dense-prediction code.

    Returns:
        [B, ceil(H / window_size), ceil(W / window_size), C].

    Raises:
        ConfigError: a wrong shape, dtype or window.
    """
    name = "hilo_pool"
    window_size = _window(name, window_size)
    floating(name, x=x)
    if x.ndim != 4:
        raise ConfigError(f"{name}: x must be [B, H, W, C]; got {list(x.shape)}.")
    return hilo_op.hilo_pool(x, window_size, masked)


def hilo_layer(
    x: Tensor,
    head_dim: int,
    h_qkv: Linear | None = None,
    h_proj: Linear | None = None,
    l_q: Linear | None = None,
    l_kv: Linear | None = None,
    l_proj: Linear | None = None,
    window_size: int = 2,
    scale: float | None = None,
    masked: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The whole HiLo layer with its projections, named as in the official state dict.

    A branch without heads passes None for its projections. ``window_size=1`` is plain attention
    through ``l_q`` and ``l_kv``, for which the official module keeps no high heads. There is no
    linear map across the two branches.

    Args:
        x: [B, H, W, C].
        head_dim: channels per head.
        h_qkv: (weight [3 * Hh * head_dim, C], bias or None): queries, keys, values.
        h_proj: (weight, bias or None) over the high heads' output.
        l_q: (weight [Hl * head_dim, C], bias or None).
        l_kv: (weight [2 * Hl * head_dim, C], bias or None), applied to the pooled input.
        l_proj: (weight, bias or None) over the low heads' output.
        window_size: see :func:`hilo_attention`.
        scale: see :func:`hilo_attention`.
        masked: leave padding out of windows and means.
        backend: see ``visprune.ops``.

    Returns:
        [B, H, W, channels of h_proj + channels of l_proj], high first.

    Raises:
        ConfigError: a wrong shape, dtype or window, or a branch given in part.
        UnsupportedKernel: ``backend="triton"`` where it cannot run.
    """
    name = "hilo_layer"
    window_size = _window(name, window_size)
    floating(name, x=x)
    if x.ndim != 4:
        raise ConfigError(f"{name}: x must be [B, H, W, C]; got {list(x.shape)}.")
    _check_projections(name, head_dim, h_qkv, h_proj, l_q, l_kv, l_proj)
    heads_of = x[..., :head_dim]  # what the kernel will see: the device, the dtype, the head dim
    choice = choose(name, backend, x.device, lambda: hilo_op.why_not(window_size, heads_of))
    scale = head_dim**-0.5 if scale is None else scale
    projections = (h_qkv, h_proj, l_q, l_kv, l_proj)
    return hilo_op.hilo_layer(x, head_dim, *projections, window_size, scale, masked, choice)


def _check_projections(
    name: str,
    head_dim: int,
    h_qkv: Linear | None,
    h_proj: Linear | None,
    l_q: Linear | None,
    l_kv: Linear | None,
    l_proj: Linear | None,
) -> None:
    """Refuse a branch that is given in part, and weights that do not divide into heads."""
    if (h_qkv is None) != (h_proj is None) or (l_q is None) + (l_kv is None) + (
        l_proj is None
    ) not in (0, 3):
        raise ConfigError(
            f"{name}: h_qkv and h_proj belong together, and so do l_q, l_kv and l_proj; "
            "give a branch whole, or None for all of it."
        )
    if h_qkv is None and l_q is None:
        raise ConfigError(f"{name}: give the projections of at least one branch; got none.")
    if h_qkv is not None and h_qkv[0].shape[0] % (3 * head_dim):
        raise ConfigError(
            f"{name}: h_qkv must have 3 * heads * head_dim = a multiple of {3 * head_dim} rows; "
            f"got {h_qkv[0].shape[0]}."
        )
    if l_q is not None and l_kv is not None:
        rows = l_q[0].shape[0]
        if rows % head_dim or l_kv[0].shape[0] != 2 * rows:
            raise ConfigError(
                f"{name}: l_q must have a multiple of head_dim = {head_dim} rows and l_kv twice "
                f"as many; got {rows} and {l_kv[0].shape[0]}."
            )


def _window(name: str, window_size: int) -> int:
    """The window as a checked integer."""
    size = None if isinstance(window_size, bool) else integer(window_size)
    if size is None or size < 1:
        raise ConfigError(
            f"{name}: window_size must be an integer of at least 1; got {window_size!r}."
        )
    return size


def _check_branch(
    names: str, q: Tensor | None, k: Tensor | None, v: Tensor | None, same: bool
) -> None:
    """Refuse a branch that is given in part or has the wrong shapes."""
    if q is None and k is None and v is None:
        return
    if q is None or k is None or v is None:
        raise ConfigError(f"{_NAME}: give all of {names}, or none; got some of them.")
    floating(_NAME, **dict(zip(names.replace(" and", ",").split(", "), (q, k, v), strict=True)))
    got = [list(t.shape) for t in (q, k, v)]
    layout = "[B, H, W, heads, d]"
    if any(len(s) != 5 for s in got):
        raise ConfigError(f"{_NAME}: {names} must be {layout}; got {got[0]}, {got[1]}, {got[2]}.")
    fits = got[0] == got[1] if same else [*got[0][:1], *got[0][3:]] == [*got[1][:1], *got[1][3:]]
    if got[1] != got[2] or not fits:
        rule = "one shape" if same else "the same B, heads and d, and keys and values one shape"
        raise ConfigError(f"{_NAME}: {names} must have {rule}; got {got[0]}, {got[1]}, {got[2]}.")
    if not same and 0 not in got[0] and 0 in got[1]:
        raise ConfigError(f"{_NAME}: low_k must hold at least one key; got {got[1]}.")
