# SPDX-License-Identifier: Apache-2.0
"""The embedded model and what is trained beside it: oracle embeddings and per-patch heads."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from visprune.backbones.vlm.embedded import build_model
from visprune.eval.tasks.embedded import COLORS, DIGITS, SHAPES
from visprune.eval.tasks.embedded.questions import REGIONS, SIDES
from visprune.train.embedded.data import (
    GRID,
    ID,
    IGNORE,
    PREFIX,
    VOCABULARY,
    PatchLabels,
    QuestionBatch,
    block_mask,
)
from visprune.train.embedded.recipe import EmbeddedRecipe

_RAMP = torch.linspace(-1, 1, GRID)


class Oracle(nn.Module):
    """Perfect visual tokens: the sum of the words for what a patch shows and of its place.

    With them the decoder can learn to find and read objects before there is a vision tower, and
    the tower later learns to produce them. Question words match patches by identity.
    """

    shapes: torch.Tensor
    colors: torch.Tensor
    digits: torch.Tensor

    def __init__(self, width: int, std: float) -> None:
        super().__init__()
        self.row = nn.Embedding(GRID, width)
        self.col = nn.Embedding(GRID, width)
        self.extra = nn.Embedding(2, width)  # background, centre of an object
        for table in (self.row, self.col, self.extra):
            nn.init.normal_(table.weight, std=std)
        words = [[ID[w] for w in group] for group in (SHAPES, COLORS, DIGITS)]
        for name, ids in zip(("shapes", "colors", "digits"), words, strict=True):
            self.register_buffer(name, torch.tensor(ids), persistent=False)

    @torch.no_grad()
    def add_ramp(self, size: float, seed: int) -> None:
        """Add a random direction to rows and another to columns, times -1 ... 1 along the axis.

        Args:
            size: Standard deviation of the directions' entries.
            seed: Seed of the directions.
        """
        draw = torch.Generator().manual_seed(seed)
        for table in (self.row, self.col):
            direction = torch.randn(table.embedding_dim, generator=draw) * size
            table.weight += (_RAMP[:, None] * direction).to(table.weight.device)

    @torch.no_grad()
    def add_signposts(self, size: float, table: torch.Tensor) -> None:
        """Add the words for places: ``below`` minus ``above`` down the rows, and so on.

        A side is then read off as the difference of two patches, a quadrant as a patch's own word.

        Args:
            size: Factor of the words.
            table: The decoder's word embeddings ``[V, D]``.
        """
        word = {name: table[ID[name]] for name in (*REGIONS, *SIDES)}
        top_left, top_right, bottom_left, bottom_right = (word[name] for name in REGIONS)
        down = word["below"] - word["above"]
        across = word["right"] - word["left"]
        lower = (bottom_left + bottom_right - top_left - top_right) / 2
        outer = (top_right + bottom_right - top_left - bottom_left) / 2
        ramp = _RAMP[:, None].to(table.device)
        half = torch.tanh(4 * ramp)
        self.row.weight += size * (ramp * down + half * lower)
        self.col.weight += size * (ramp * across + half * outer)

    def forward(self, labels: PatchLabels, table: torch.Tensor) -> torch.Tensor:
        """Embed patches.

        Args:
            labels: Labels ``[B, N]``.
            table: The decoder's word embeddings ``[V, D]``.

        Returns:
            Visual tokens ``[B, N, D]``.
        """
        thing = (labels.shape < len(SHAPES)).long()
        ids = torch.stack(
            [
                self.shapes[labels.shape.clamp(max=len(SHAPES) - 1)],
                self.colors[labels.color.clamp(min=0)],
                self.digits[labels.digit.clamp(min=0)],
            ]
        )
        what = F.embedding(ids, table).sum(0) * thing[..., None]
        ground = self.extra.weight[0] * (1 - thing)[..., None]
        center = self.extra.weight[1] * labels.center[..., None]
        return what + ground + center + self.row(labels.row) + self.col(labels.col)


class PatchHeads(nn.Module):
    """Linear readers of tower features: what each patch shows, and what the picture holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (len(SHAPES) + 1, len(COLORS), len(DIGITS), 2, GRID, GRID)
        self.patch = nn.Linear(width, sum(self.sizes))
        self.picture = nn.Linear(width, len(SHAPES) + len(COLORS) + len(DIGITS))

    def forward(
        self, features: torch.Tensor, cls: torch.Tensor, labels: PatchLabels
    ) -> tuple[torch.Tensor, dict[str, tuple[float, int]]]:
        """Losses and accuracies.

        Args:
            features: Patch features as the projector reads them ``[B, N, D]``.
            cls: CLS feature after the last layer ``[B, D]``.
            labels: Labels ``[B, N]``.

        Returns:
            Loss, and (right, total) per attribute; shape counts object patches only.
        """
        names = ("shape", "color", "digit", "center", "row", "col")
        outputs = self.patch(features).float().split(self.sizes, dim=-1)
        loss = features.new_zeros((), dtype=torch.float32)
        stats = {}
        thing = labels.shape < len(SHAPES)
        for name, logits in zip(names, outputs, strict=True):
            target = getattr(labels, name)
            each = F.cross_entropy(
                logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="none"
            ).view_as(target)
            # Objects cover an eighth of a picture: weigh them as much as all the background.
            weight = thing.float() * 4 + 0.5
            scale = 0.3 if name in ("row", "col") else 1.0
            valid = (target != IGNORE).float() * weight
            loss = loss + scale * (each * valid).sum() / valid.sum().clamp(min=1)
            hit = (logits.argmax(-1) == target) & (thing if name != "center" else target == 1)
            total = int((thing if name != "center" else target == 1).sum())
            stats[name] = (float(hit.sum()), total)
        return loss + self._picture_loss(cls, labels), stats

    def _picture_loss(self, cls: torch.Tensor, labels: PatchLabels) -> torch.Tensor:
        """Which shapes, colours and digits are there: makes the CLS token look at objects."""
        batch = labels.shape.shape[0]
        groups = [
            torch.zeros(batch, size + 1, device=cls.device).scatter_(1, index, 1.0)[:, :size]
            for size, index in (
                (len(SHAPES), labels.shape),
                (len(COLORS), labels.color.masked_fill(labels.color < 0, len(COLORS))),
                (len(DIGITS), labels.digit.masked_fill(labels.digit < 0, len(DIGITS))),
            )
        ]
        logits = self.picture(cls).float()
        return F.binary_cross_entropy_with_logits(logits, torch.cat(groups, dim=1))


class Parts(nn.Module):
    """Everything that a recipe trains.

    Attributes:
        model: The embedded model.
        oracle: Symbolic visual tokens.
        heads: Per-patch readers of the tower.
    """

    def __init__(self, recipe: EmbeddedRecipe) -> None:
        super().__init__()
        torch.manual_seed(recipe.seed)
        self.model: LlavaForConditionalGeneration = build_model(
            len(VOCABULARY), recipe.vision, recipe.text
        )
        self.model.set_attn_implementation(recipe.attention)
        config = self.model.config
        self.oracle = Oracle(config.text_config.hidden_size, config.text_config.initializer_range)
        self.heads = PatchHeads(config.vision_config.hidden_size)

    def see(
        self, pixels: torch.Tensor, labels: PatchLabels | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the tower, on a whole picture or on a window of the 24 x 24 grid.

        Args:
            pixels: ``[B, 3, H, W]`` in [-1, 1].
            labels: Where the rows and columns of a window are read from; None for whole pictures.

        Returns:
            Patch features before the last layer ``[B, N, D]`` and CLS feature after it ``[B, D]``.
        """
        tower = self.model.model.vision_tower
        # In older transformers (5.4, for one) the tower's parts lie one level deeper.
        tower = getattr(tower, "vision_model", tower)
        embed = tower.embeddings
        patches = embed.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B, N, D]
        cls = embed.class_embedding.expand(len(pixels), 1, -1)
        place = embed.position_embedding.weight[1:]
        if labels is not None:
            place = place[labels.row * GRID + labels.col]
        hidden = torch.cat([cls + embed.position_embedding.weight[0], patches + place], dim=1)
        hidden = tower.pre_layrnorm(hidden)
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        last = tower.encoder.layers[-1](hidden, None)
        return hidden[:, 1:], tower.post_layernorm(last[:, 0])


def answer_logits(
    model: LlavaForConditionalGeneration,
    visual: torch.Tensor,
    index: torch.Tensor,
    questions: QuestionBatch,
) -> torch.Tensor:
    """Run the decoder on visual tokens and several questions at once.

    Args:
        model: The embedded model.
        visual: Visual tokens ``[B, n, D]``, all 576 or fewer.
        index: Their places in raster order ``[B, n]``; positions stay those of the whole picture.
        questions: Questions ``[B, T]``; each sees the picture and itself alone.

    Returns:
        Logits of the question tokens, fp32 ``[B, T, V]``.
    """
    llava = model.model
    batch, count = index.shape
    table = llava.get_input_embeddings()
    first = index.new_tensor([ID["<s>"], ID["USER:"]]).expand(batch, PREFIX)
    words = table(torch.cat([first, questions.ids], dim=1))
    embeds = torch.cat([words[:, :PREFIX], visual.to(words.dtype), words[:, PREFIX:]], dim=1)
    place = torch.arange(PREFIX, device=index.device).expand(batch, PREFIX)
    position = torch.cat([place, index + PREFIX, questions.position], dim=1)
    mask = block_mask(questions.segment, PREFIX + count)
    if llava.language_model.config._attn_implementation == "eager":  # it adds its mask
        mask = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill_(~mask, -1e9)
    hidden = llava.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[:, PREFIX + count :]).float()
