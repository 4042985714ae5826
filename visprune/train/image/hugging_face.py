# SPDX-License-Identifier: Apache-2.0
"""Pictures of a Hugging Face data set: on the Hub, saved to disk, or in parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from visprune.errors import ConfigError, did_you_mean
from visprune.train.image.pictures import Pictures
from visprune.train.image.recipe import DataConfig

__all__ = ["DataSetPictures", "open_data_set"]


class DataSetPictures(Pictures):
    """A data set with a column of pictures and a column of class labels.

    Args:
        data: A ``datasets.Dataset``.
        where: What it was opened from.
        image_key: Column of the pictures, or None: the one of type ``Image``.
        label_key: Column of the labels, or None: the one of type ``ClassLabel``.

    Raises:
        ConfigError: There is no such column.
    """

    def __init__(self, data: Any, where: str, image_key: str | None, label_key: str | None) -> None:
        from datasets import ClassLabel, Image

        self.where = where
        self.image_key = image_key or _column(data, Image, "image_key", where)
        label_key = label_key or _column(data, ClassLabel, "label_key", where)
        for key in (self.image_key, label_key):
            if key not in data.features:
                hint = did_you_mean(key, data.features)
                raise ConfigError(
                    f"{where} has no column {key!r}.{hint} It has {[*data.features]}."
                )
        # Undecoded, so that a picture that cannot be read is met here and can be named.
        self.rows = data.cast_column(self.image_key, Image(decode=False))
        raw = np.asarray(data[label_key])
        feature = data.features[label_key]
        if isinstance(feature, ClassLabel):
            self.classes, self.labels = list(feature.names), raw.astype(np.int64)
        else:
            names, self.labels = np.unique(raw, return_inverse=True)
            self.classes = [str(name) for name in names]

    def name(self, index: int) -> str:
        """See :class:`Pictures`."""
        path = self.rows[index][self.image_key].get("path")
        return f"{self.where}: row {index}" + (f" ({path})" if path else "")

    def data(self, index: int) -> bytes:
        """See :class:`Pictures`."""
        value = self.rows[index][self.image_key]
        if value["bytes"] is not None:
            return value["bytes"]
        return Path(value["path"]).read_bytes()


def open_data_set(config: DataConfig, split: str, file: Path | None = None) -> DataSetPictures:
    """Open one split of a data set.

    Args:
        config: Its ``path``: ``hf:NAME``, or the folder that ``save_to_disk`` wrote.
        split: The split.
        file: A parquet file to read instead.

    Raises:
        ConfigError: `datasets` is not installed, or there is no such data set or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("Hugging Face data sets need `pip install datasets`.") from error
    where = f"{config.path}, {split}"
    try:
        if file is not None:
            loaded = datasets.Dataset.from_parquet(str(file))
            where = str(file)
        elif config.path.startswith("hf:"):
            loaded = datasets.load_dataset(config.path[3:], split=split)
        else:
            loaded = datasets.load_from_disk(str(Path(config.path).expanduser()))
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"Cannot open the data set {config.path!r}, {split!r}: {error}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ConfigError(
                f"{config.path!r} has no split {split!r}.{did_you_mean(split, loaded)} "
                f"It has {', '.join(loaded)}."
            )
        loaded = loaded[split]
    return DataSetPictures(loaded, where, config.image_key, config.label_key)


def _column(data: Any, kind: type, option: str, where: str) -> str:
    """The one column of a type."""
    found = [name for name, feature in data.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise ConfigError(
            f"{where} has {len(found)} columns of type {kind.__name__}; name one by data.{option}. "
            f"Columns: {', '.join(data.features)}."
        )
    return found[0]
