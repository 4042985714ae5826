# SPDX-License-Identifier: Apache-2.0
"""Batches that depend on seed and step alone: not on what ran before, nor on who else runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visprune.errors import ConfigError
from visprune.train.image.pictures import CorruptPicture, Pictures
from visprune.train.image.recipe import AugmentConfig, ImageRecipe
from visprune.train.image.seeds import AUGMENT, LIMIT, ORDER, seeded
from visprune.train.image.sources import open_pictures

__all__ = ["Batch", "ImageData"]


@dataclass
class Batch:
    """Pictures of one forward pass.

    Attributes:
        images: ``[B, 3, H, W]``.
        labels: ``[B]``.
        numbers: Places of the pictures in their source ``[B]``; in training, the place asked for.
        broken: Names of pictures that could not be read. In training another one stands in its
            place, in validation it is not in the batch.
    """

    images: Tensor
    labels: Tensor
    numbers: Tensor
    broken: list[str]


class _Samples(Dataset[tuple[Tensor, int, int, list[str]]]):
    """Decoded and transformed pictures by (epoch, index)."""

    def __init__(
        self, pictures: Pictures, places: np.ndarray, transform: Any, seed: int, skip: bool
    ) -> None:
        self.pictures, self.places, self.transform = pictures, places, transform
        self.seed, self.skip = seed, skip
        self.replace = True

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, int, list[str]]:
        epoch, index = item
        broken: list[str] = []
        for shift in range(len(self)):
            place = int(self.places[(index + shift) % len(self)])
            try:
                image = self.pictures.read(place)
            except CorruptPicture as error:
                broken.append(str(error))
                if self.replace and self.skip:
                    continue
                break
            with seeded(self.seed, AUGMENT, epoch, index):
                tensor = self.transform(image)
            return tensor, int(self.pictures.labels[place]), index, broken
        return torch.empty(0), -1, index, broken


def _collate(items: Sequence[tuple[Tensor, int, int, list[str]]]) -> Batch:
    good = [item for item in items if item[1] >= 0]
    return Batch(
        torch.stack([item[0] for item in good]) if good else torch.empty(0),
        torch.tensor([item[1] for item in good], dtype=torch.long),
        torch.tensor([item[2] for item in good], dtype=torch.long),
        [name for item in items for name in item[3]],
    )


@dataclass
class _Plan:
    """What a function yields, made as it is asked for: the items of a long run fit no memory."""

    make: Callable[..., Iterator[list[tuple[int, int]]]]
    args: tuple[int, ...]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.make(*self.args)


class ImageData:
    """Training and validation pictures of a recipe.

    Args:
        recipe: The recipe.
        config: timm's data configuration of the model: ``input_size``, ``mean``, ``std``,
            ``interpolation``, ``crop_pct``.
        train: Already opened training pictures, or None to open them.

    Attributes:
        classes: Names of the classes.
        steps_per_epoch: Whole batches in the training pictures.

    Raises:
        ConfigError: The data cannot be used; see :func:`open_pictures`.
    """

    def __init__(
        self, recipe: ImageRecipe, config: dict[str, Any], train: Pictures | None = None
    ) -> None:
        self.recipe = recipe
        data = recipe.data
        train, val = train or open_pictures(data, "train"), open_pictures(data, "val")
        self.classes = train.classes
        strange = sorted(set(val.classes) - set(train.classes))
        if strange:
            raise ConfigError(
                f"{val.where} has classes that {train.where} has not: {', '.join(strange[:5])}."
            )
        if val.classes != train.classes:  # fewer: the same names must get the same numbers
            number = np.array([train.classes.index(name) for name in val.classes])
            val.labels, val.classes = number[val.labels], train.classes
        skip = data.on_corrupt == "skip"
        places = [
            self._limited(p, n) for p, n in ((train, data.train_limit), (val, data.val_limit))
        ]
        self.train = _Samples(
            train, places[0], _transform(recipe.augment, config), recipe.seed, skip
        )
        self.val = _Samples(val, places[1], _plain_transform(config), recipe.seed, skip)
        self.val.replace = False
        self.steps_per_epoch = len(self.train) // recipe.batch
        if not self.steps_per_epoch:
            raise ConfigError(
                f"batch is {recipe.batch}, but {train.where} has {len(self.train)} pictures in use."
            )

    def _limited(self, pictures: Pictures, limit: int | None) -> np.ndarray:
        if limit is None or limit >= len(pictures):
            return np.arange(len(pictures))
        rng = np.random.default_rng([self.recipe.seed, LIMIT])
        return np.sort(rng.permutation(len(pictures))[:limit])

    def order(self, epoch: int) -> np.ndarray:
        """The order in which an epoch goes through the training pictures."""
        return np.random.default_rng([self.recipe.seed, ORDER, epoch]).permutation(len(self.train))

    def micro_batches(
        self, first: int, last: int, size: int, rank: int, world: int
    ) -> Iterator[list[tuple[int, int]]]:
        """Items (epoch, index) of this process's micro-batches in steps ``first`` to ``last - 1``.

        A micro-batch takes its first half from one end of the batch and its second from the other,
        so that mixup's partner (the picture as far from the end as this one is from the beginning)
        is in the same micro-batch, whatever their number.
        """
        batch = self.recipe.batch
        epoch, order = -1, np.empty(0)
        for step in range(first, last):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self.order(epoch)
            begin = step % self.steps_per_epoch * batch
            numbers = order[begin : begin + batch]
            for k in range(rank, batch // size, world):
                low, high = k * (size // 2), (k + 1) * (size // 2)
                chosen = [*numbers[low:high], *numbers[batch - high : batch - low]]
                if size % 2:  # nothing is mixed then, see Mixer
                    chosen = [*numbers[k * size : (k + 1) * size]]
                yield [(epoch, int(i)) for i in chosen]

    def train_loader(
        self, first: int, last: int, size: int, rank: int, world: int
    ) -> Iterator[Batch]:
        """Micro-batches of this process, in the order of :meth:`micro_batches`."""
        return self._loader(self.train, _Plan(self.micro_batches, (first, last, size, rank, world)))

    def val_loader(self, size: int, rank: int, world: int) -> Iterator[Batch]:
        """Validation pictures of this process: each is in one process once."""
        mine = [(0, i) for i in range(rank, len(self.val), world)]
        return self._loader(self.val, [mine[i : i + size] for i in range(0, len(mine), size)])

    def _loader(self, samples: _Samples, plan: Iterable[list[tuple[int, int]]]) -> Iterator[Batch]:
        """Batches of a plan.

        Pictures that cannot be read are refused here, not where they are read: an error of a
        worker process comes with the whole of its traceback as the message.

        Raises:
            CorruptPicture: One cannot be read, and the recipe says to refuse, or none can.
        """
        workers = self.recipe.data.workers
        loader = DataLoader(
            samples,
            batch_sampler=plan,
            collate_fn=_collate,
            num_workers=workers,
            persistent_workers=False,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            if batch.broken and not samples.skip:
                raise CorruptPicture(
                    f"{batch.broken[0]} To go on without such pictures: data.on_corrupt=skip."
                )
            if samples.replace and not len(batch.labels):
                raise CorruptPicture(f"Not one picture of {samples.pictures.where} can be read.")
            yield batch


def _transform(augment: AugmentConfig, config: dict[str, Any]) -> Any:
    given = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in augment.transform.items()
    }
    try:
        return create_transform(**{**_shared(config), "is_training": True, **given})
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"augment.transform: {error}.") from error


def _plain_transform(config: dict[str, Any]) -> Any:
    return create_transform(
        **_shared(config), crop_pct=config["crop_pct"], crop_mode=config["crop_mode"]
    )


def _shared(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("input_size", "interpolation", "mean", "std")}
