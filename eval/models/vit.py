# SPDX-License-Identifier: Apache-2.0
"""Image classifiers: timm models, and open_clip models zero-shot; they answer class numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from visprune.core.method import PruningMethod
from visprune.cost.cost import Cost
from visprune.errors import ConfigError, UnsupportedModel, did_you_mean
from visprune.eval.models.base import (
    NO_IMAGE,
    NONE,
    Answerer,
    Choice,
    Output,
    Request,
)
from visprune.eval.models.held import Held
from visprune.eval.models.identity import (
    structure_hash,
    tensors_hash,
    transform_hash,
    weights_hash,
)
from visprune.eval.models.kept import bits_of
from visprune.eval.models.learned import about_learned, taught
from visprune.eval.models.seen import describe_seen, seen_by_transform, seen_of_record
from visprune.eval.tasks.base import PromptStyle, Task
from visprune.eval.tasks.imagenet import ImageNet, ranking_text
from visprune.machine.run import prune

__all__ = ["Classifier", "TimmClassifier", "ZeroShot"]

_ROOM = 2**29  # bytes of prepared pictures


class Classifier:
    """A model that ranks classes.

    Args:
        name: what tables call it.
        tower: the vision transformer that methods act on.
        transform: makes a picture the input ``[3, H, W]``.
        about: what identifies it beside name, weights and dtype.
        count: how many classes it ranks.
        labels: their names in its order; ``None``: not known.
    """

    generates = False
    style: PromptStyle = "plain"

    def __init__(
        self,
        name: str,
        tower: nn.Module,
        transform: Callable[[Any], Tensor],
        about: dict[str, Any],
        count: int,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.name, self.tower, self.transform, self._about = name, tower, transform, about
        self.count, self.labels = count, labels
        self.learned: Mapping[str, Tensor] | None = None
        self._pixels: Held[Tensor] = Held(_ROOM, lambda pixels: pixels.nbytes)
        self._weights = weights_hash(tower)
        first = next(tower.parameters())
        self.device, self.dtype = first.device, first.dtype

    @property
    def together(self) -> int:
        """One by one."""
        return 1

    def describe(self) -> dict[str, Any]:
        """What identifies the model; see :class:`visprune.eval.models.base.EvalModel`."""
        dtype = str(self.dtype).removeprefix("torch.")
        structure = structure_hash(self.tower)
        return {"name": self.name, "weights": self._weights, "structure": structure,
                "dtype": dtype, **self._about}  # fmt: skip

    def refusal(self, choice: Choice, task: Task) -> str | None:
        """Why it cannot run a method or a task, or ``None``."""
        if task.generates:
            return (
                f"{task.name} wants answers in words; {self.name} gives class numbers. A folder of "
                f"class folders is the data of the task imagenet (data=FOLDER)."
            )
        if choice == NO_IMAGE:
            return "Without the picture an image classifier has no input."
        try:
            self._numbers(task)
            if isinstance(choice, PruningMethod):
                self._attach(choice).remove()
        except (ConfigError, UnsupportedModel) as error:
            return str(error)
        return None

    def _numbers(self, task: Task) -> list[int]:
        """The task's number of each class of the model.

        Raises:
            ConfigError: the model tells other classes apart.
        """
        if not isinstance(task, ImageNet):
            return list(range(self.count))
        number, held = task.classes
        if self.labels is None:
            if self.count != len(number):
                raise ConfigError(
                    f"{self.name} tells {self.count} classes apart, and does not say which; "
                    f"{task.name} here numbers {len(number)}."
                )
            return list(range(self.count))
        strange = [name for name in held if name not in set(self.labels)]
        if strange:
            raise ConfigError(
                f"{self.name} tells {self.count} classes apart ({', '.join(self.labels[:3])} ...); "
                f"{task.name} here holds others: {', '.join(strange[:5])}."
            )
        # A class that the data lacks gets a number that no picture has.
        return [number.get(name, len(number) + i) for i, name in enumerate(self.labels)]

    def _attach(self, choice: PruningMethod) -> Any:
        """Prune the tower, with what the method of its folder has learned.

        Raises:
            ConfigError: the method wants a predictor, and the model came without one that fits.
            UnsupportedModel: the method does not act on this model.
        """
        return taught(prune(self.tower, choice), self.learned, self.name)

    def generation(self, task: Task, options: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing is generated."""
        return {}

    def encodes(self, choice: Choice) -> Hashable:
        """Methods act inside the encoder: what they share is the prepared picture."""
        return None

    def forget(self) -> None:
        """Drop what is held of pictures."""
        self._pixels.forget()

    def no_turns(self, *, query_aware: bool = True) -> str | None:
        """There is no cache."""
        return f"{self.name} is an image classifier, which has no cache."

    def prompt_length(self, prompt: str) -> int:
        """There are no prompts."""
        return 0

    @contextmanager
    def answering(
        self, choice: Choice, task: Task, style: str, generation: Mapping[str, Any]
    ) -> Iterator[Answerer]:
        """Attach a method for as long as the context lasts."""
        numbers = torch.tensor(self._numbers(task), device=self.device)
        if isinstance(choice, PruningMethod):
            with self._attach(choice) as run:
                yield lambda requests: self._answer(requests, run, numbers)
        elif choice == NONE:
            yield lambda requests: self._answer(requests, None, numbers)
        else:
            raise ConfigError(f"{choice!r} is no method.{did_you_mean(choice, (NONE,))}")

    def logits(self, pixels: Tensor) -> Tensor:
        """Class scores ``[B, C]`` of pictures ``[B, 3, H, W]``."""
        return self.tower(pixels)

    @torch.inference_mode()
    def _answer(self, requests: Sequence[Request], run: Any, numbers: Tensor) -> list[Output]:
        pixels = torch.stack([self._prepare(r) for r in requests]).to(self.device, self.dtype)
        texts = ranking_text(self.logits(pixels).float(), numbers)
        if run is None:
            tokens, macs = self._whole
            return [
                Output(text, tokens=tokens, macs=macs, kept=self._seen(request) or None)
                for text, request in zip(texts, requests, strict=True)
            ]
        cost: Cost = run.cost()
        share = {part: value // cost.samples for part, value in cost.parts.items()}
        trace = run.trace
        return [
            Output(text, tokens=count, macs=share, kept=self._kept(trace, row, requests[row]))
            for row, (text, count) in enumerate(zip(texts, trace.mean_tokens, strict=True))
        ]

    def _prepare(self, request: Request) -> Tensor:
        """A picture as the model takes it, ``[3, H, W]``; made once for all methods."""
        if request.digest is None:
            return self.transform(request.image)
        return self._pixels.get(request.digest, lambda: self.transform(request.image))

    @cached_property
    def _whole(self) -> tuple[float | None, dict[str, int] | None]:
        """Tokens and multiply-adds of the untouched model, where an adapter can count them."""
        try:
            with prune(self.tower, "keep_all") as run:
                cost: Cost = run.cost()
                height, width = run.grid
        except (ConfigError, UnsupportedModel):
            return None, None
        return float(height * width), {**cost.parts, "selection": 0}

    def _kept(self, trace: Any, row: int, request: Request) -> dict[str, Any] | None:
        """Patches that a final slot stands for, and where in the picture they lie."""
        grids: list[tuple[int, int, int]] = list(trace.grids[row])
        if len(grids) != 1 or grids[0][0] != 1:
            return None
        _, height, width = grids[0]
        alive = torch.zeros(height * width, dtype=torch.bool)
        index = trace.kept[row].cpu()
        alive[index[index >= 0]] = True
        found: dict[str, Any] = {"grid": [height, width]}
        found["kept"] = bits_of(alive.reshape(height, width))
        return {**found, **self._seen(request)}

    def _seen(self, request: Request) -> dict[str, Any]:
        """What a record keeps of where the picture was cut."""
        if request.image is None:
            return {}
        return seen_of_record(seen_by_transform(self.transform, request.image.size))

    def unseen(self, size: tuple[int, int]) -> str | None:
        """Say what the transform leaves out of a picture of that size, or puts out of shape."""
        said = describe_seen(seen_by_transform(self.transform, size), size)
        return said and f"{self.name} does not see pictures as they are: the first is {said}."


class TimmClassifier(Classifier):
    """A timm model with a head.

    Args:
        model: the model; its ``pretrained_cfg`` says how pictures are prepared.
        name: what tables call it; ``None``: timm's name.
        learned: state dict of the predictor that was trained with it.
    """

    def __init__(
        self, model: Any, *, name: str | None = None, learned: Mapping[str, Tensor] | None = None
    ) -> None:
        from timm.data import create_transform, resolve_model_data_config

        config = resolve_model_data_config(model)
        transform = create_transform(**config, is_training=False)
        cfg = getattr(model, "pretrained_cfg", None) or {}
        about: dict[str, Any] = {
            "data": {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
        }
        super().__init__(
            name or str(cfg.get("architecture") or type(model).__name__),
            model.eval(),
            transform,
            about,
            int(model.num_classes),
            _labels(cfg.get("label_names"), int(model.num_classes)),
        )
        self.learned = learned
        about |= about_learned(learned)


class ZeroShot(Classifier):
    """An open_clip model that compares a picture with the names of classes.

    The classifier is made once, from the untouched text tower: methods act on the image tower.

    Args:
        model: the model.
        transform: its transform for evaluation.
        classifier: ``[d, C]``, see :func:`visprune.eval.tasks.imagenet.zero_shot_classifier`.
        name: what tables call it.
    """

    def __init__(
        self, model: Any, transform: Callable[[Any], Tensor], classifier: Tensor, *, name: str
    ) -> None:
        about = {
            "classes": classifier.shape[1], "classifier": tensors_hash(classifier),
            "transform": transform_hash(transform),
        }  # fmt: skip
        super().__init__(name, model.visual, transform, about, classifier.shape[1])
        self.model, self.classifier = model, classifier

    def logits(self, pixels: Tensor) -> Tensor:
        """Cosines to the class texts."""
        return self.model.encode_image(pixels, normalize=True) @ self.classifier.to(self.dtype)


def _labels(names: Any, count: int) -> list[str] | None:
    """The names of a classifier's classes as timm keeps them: a list, or a mapping by number."""
    if isinstance(names, Mapping):
        names = [names.get(i, names.get(str(i))) for i in range(count)]
    if not names or len(names) != count or None in names:
        return None
    return [str(name) for name in names]
