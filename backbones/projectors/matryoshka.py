# SPDX-License-Identifier: Apache-2.0
"""Matryoshka Query Transformer: a projector whose first m tokens stand alone (arXiv:2405.19315)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from visprune.errors import BudgetError, ConfigError, first_line


class MatryoshkaProjector(nn.Module):
    """Reads an encoder's patches with as many learned queries as tokens are wanted.

    One cross-attention: queries are the norm of a learned vector plus the position of its number
    on a square grid, keys the norm of the patches' positions (the same table, resized to their
    grid), values the norm of the patches. Keys know nothing of the content, so a token is a mean
    of patches that is fixed per head. The first m queries give m tokens, whatever m is in use;
    they learn to stand alone by being drawn so in training (:meth:`draw`). Names of parameters are
    those of the official code; unlike there the position table is kept in the dtype of the rest.

    Args:
        width: features of a patch.
        out_width: features of a token of the language model.
        num_heads: of the attention.
        num_queries: most tokens; a square number.
    """

    pos_embed: Tensor

    def __init__(
        self, width: int, out_width: int, *, num_heads: int = 16, num_queries: int = 256
    ) -> None:
        super().__init__()
        side = math.isqrt(num_queries)
        if side * side != num_queries:
            raise ConfigError(f"num_queries is a square number, got {num_queries}.")
        if width % 4 or width % num_heads:
            raise ConfigError(
                f"width must be divisible by 4 (sines and cosines of two axes) and by num_heads; "
                f"got width={width}, num_heads={num_heads}."
            )
        self.register_parameter(
            "pos_embed", nn.Parameter(sine_table(width, side), requires_grad=False)
        )
        self.query = nn.Parameter(torch.empty(num_queries, width))
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(out_width**-0.5 * torch.randn(width, out_width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.num_keep = num_queries

    @property
    def num_queries(self) -> int:
        """Most tokens."""
        return len(self.query)

    def draw(self, generator: torch.Generator | None = None) -> int:
        """Draw how many tokens the next forward gives, an even number, as training does.

        The prompt has as many placeholders as tokens, so the number is drawn before it is written.
        """
        self.num_keep = 2 * int(
            torch.randint(1, self.num_queries // 2 + 1, (), generator=generator)
        )
        return self.num_keep

    def forward(
        self, x: Tensor, num_keep: int | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Make tokens of patches.

        Args:
            x: ``[B, h * w, width]``.
            num_keep: tokens, 1 to ``num_queries``; ``None``: :attr:`num_keep`.
            grid: (h, w); ``None``: square.

        Returns:
            ``[B, num_keep, out_width]``.

        Raises:
            BudgetError: more tokens than queries.
            ConfigError: the grid does not have as many patches.
        """
        wanted = self.num_keep if num_keep is None else num_keep
        if not 1 <= wanted <= self.num_queries:
            raise BudgetError(
                f"num_keep is a number of tokens, 1 to {self.num_queries} (the queries that were "
                f"learned); got {wanted}."
            )
        side = math.isqrt(x.shape[1])
        grid = (side, side) if grid is None else grid
        if grid[0] * grid[1] != x.shape[1]:
            raise ConfigError(
                f"{x.shape[1]} patches are no grid of {grid[0]} x {grid[1]}; give grid=(h, w)."
            )
        batch = len(x)
        query = self.ln_q(self.query[:wanted] + self.pos_embed[:wanted])
        key = self.ln_k(resized(self.pos_embed, grid))
        tokens, _ = self.attn(
            query.expand(batch, -1, -1), key.expand(batch, -1, -1), self.ln_v(x), need_weights=False
        )
        return tokens @ self.proj

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], *, num_heads: int = 16) -> MatryoshkaProjector:
        """Build one from weights with the official names, alone or among those of a whole model.

        Args:
            state: names may begin with anything that ends in ``mm_projector.``.
            num_heads: 16 in the published models.

        Raises:
            ConfigError: names are missing, or are not of such a projector.
        """
        inside = any(_MARK in name for name in state)
        own = {
            name.rpartition(_MARK)[2]: value
            for name, value in state.items()
            if _MARK in name or not inside
        }
        if "proj" not in own or "query" not in own:
            raise ConfigError(
                f"These weights hold no Matryoshka projector (query, pos_embed, proj, attn, ln_q, "
                f"ln_k, ln_v); got {', '.join(list(state)[:5]) or 'nothing'}."
            )
        (width, out_width), queries = own["proj"].shape, len(own["query"])
        built = cls(width, out_width, num_heads=num_heads, num_queries=queries)
        built = built.to(own["proj"].dtype)
        try:
            built.load_state_dict(own)
        except RuntimeError as error:
            raise ConfigError(f"Weights of another projector: {first_line(error)}") from error
        return built

    @classmethod
    def from_file(cls, path: str | Path, *, num_heads: int = 16) -> MatryoshkaProjector:
        """Build one from a safetensors file, of the projector or of a whole model.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"Cannot read {path} as safetensors: {first_line(error)} A .bin of PyTorch is "
                f"converted by safetensors.torch.save_file."
            ) from error
        return cls.from_state(state, num_heads=num_heads)


_MARK = "mm_projector."


def sine_table(width: int, side: int) -> Tensor:
    """Sines and cosines of a token's column, then of its row, ``[side * side, width]``."""
    rate = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    places = torch.arange(side, dtype=torch.float64)
    angle = places[:, None] * rate
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, width / 2]
    column, row = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat([column, row], dim=1).float()


def resized(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A table of a square grid on another one, by bicubic interpolation: ``[h * w, width]``."""
    side = math.isqrt(len(table))
    image = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    image = functional.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)
