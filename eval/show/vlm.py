# SPDX-License-Identifier: Apache-2.0
"""`visprune show`: draw which patches of any picture a model still sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from visprune.backbones.vlm.regions import WHOLE, Region
from visprune.backbones.vlm.seen import Seen
from visprune.catalog import get_method, parameters
from visprune.catalog import methods as method_registry
from visprune.core.method import PruningMethod
from visprune.errors import ConfigError
from visprune.eval.models.base import ModelEntry, Request
from visprune.eval.models.load_vlm import load
from visprune.eval.models.names import EMBEDDED
from visprune.eval.models.seen import describe_seen
from visprune.eval.models.vlm import VLM
from visprune.eval.show.figures import Panel, shown_picture
from visprune.eval.show.kept import KeptMap, kept_of, mosaic, paint, place, seen_part
from visprune.eval.tasks.base import Sample, SampleError
from visprune.eval.tasks.loading import decode
from visprune.machine.find import find_adapter
from visprune.machine.plan import inside_only
from visprune.machine.run import Run

__all__ = ["open_picture", "show"]

_FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")


def show(
    picture: str | Path,
    *,
    question: str,
    method: str = "todre",
    num_keep: int = 64,
    out: str | Path = "kept.png",
    model: str | tuple[Any, Any] | None = None,
    pad: bool = False,
    max_new_tokens: int = 24,
) -> dict[str, Any]:
    """Ask a model about a picture, whole and pruned, and draw what it still sees.

    Args:
        picture: any image file that Pillow reads; turned as its EXIF data say.
        question: what to ask.
        method: a name of :func:`visprune.list_methods`.
        num_keep: visual tokens to keep.
        out: drawing to write; its ending gives the format.
        model: a folder that transformers' ``save_pretrained`` wrote (LLaVA-1.5, LLaVA-NeXT,
            Qwen2-VL, Qwen2.5-VL), the name of such a model on the Hub, a loaded
            ``(model, processor)``, or ``None`` for the embedded model.
        pad: show the model the picture whole, in a square of the processor's mean colour, as
            LLaVA's own evaluation does; without, its processor may cut the middle out.
        max_new_tokens: longest answer.

    Returns:
        ``answer``, ``answer_unpruned``, ``kept``, ``num_tokens``, ``trace`` and ``out``.

    Raises:
        ConfigError: no such file, not a picture, an unknown method or model, or a drawing that
            cannot be written.
        UnsupportedModel: the model has no adapter, or the method needs what it has not.
    """
    target = _target(out)
    image = open_picture(picture)
    chosen = _method(method, num_keep)
    vlm = _loaded(model, pad)
    loaded, processor = vlm.model, vlm.processor
    vlm.attach(chosen).remove()  # a refusal comes before the first answer
    own_notes = _unseen(vlm, image)
    if model is None or model == EMBEDDED:
        own_notes += _unknown_words(processor, question)
    # "chat": the model's own template, or that of the folder, in place of a benchmark's.
    inputs = vlm.inputs([Request(Sample("0", question, lambda: image), question, image)], "chat")
    unpruned = _answer(loaded, processor, inputs, max_new_tokens)
    with vlm.attach(chosen) as run:
        answer = _answer(loaded, processor, inputs, max_new_tokens)
    kept = kept_of(run.trace)
    notes = _notes(run, chosen, kept) + own_notes
    regions = find_adapter(loaded).regions(len(kept.regions), image.size)
    _draw(image, vlm.seen(image.size), regions, kept, (unpruned, answer), target,
          title=f"“{question}”", note=" ".join(notes))  # fmt: skip
    print(f"{question}\n  all {len(kept.dest)} visual tokens: {unpruned}")
    print(f"  {len(kept.index)} kept by {method}: {answer}", *notes, f"Drawn: {target}", sep="\n")
    return {
        "answer": answer, "answer_unpruned": unpruned, "kept": len(kept.index),
        "num_tokens": len(kept.dest), "trace": run.trace, "out": target,
    }  # fmt: skip


def _draw(
    image: Image.Image, seen: Seen, regions: list[Region], kept: KeptMap, answers: tuple[str, str],
    target: Path, **texts: str,
) -> None:  # fmt: skip
    """Draw the picture with the unpruned answer, and its regions with the pruned one.

    Where the grid covers a part of the picture, or is out of shape, it is drawn where it lies;
    tiles are put together to the picture that they are cut from.
    """
    part = seen_part(image, seen.box)
    places = dict(zip(kept.regions, regions, strict=True))
    whole = [t for t, region in places.items() if region.box == WHOLE]
    boxes = {t: place.box for t, place in places.items() if place.box not in (WHOLE, None)}
    panels = []
    for t in whole:
        painted = paint(part, kept, t, _cell(kept, t))
        if len(kept.regions) == 1:
            painted = place(image, painted, seen.box)
        panels.append(Panel(painted, _caption(kept, [t], places[t].name)))
    if boxes:
        panels.append(Panel(mosaic(part, kept, boxes), _caption(kept, [*boxes], "tiles")))
    panels[-1] = Panel(panels[-1].image, f"{panels[-1].text}: “{answers[1]}”")
    full = np.asarray(image) if seen.box is None else place(image, np.asarray(part), seen.box)
    shown_picture(Panel(full, f"all {len(kept.dest)} tokens: “{answers[0]}”"), panels, target,
                  **texts)  # fmt: skip


def open_picture(path: str | Path) -> Image.Image:
    """Open an image file as RGB, upright, as evaluation shows it to a model.

    Raises:
        ConfigError: there is no such file, Pillow finds no whole picture in it, or its values (of
            more than 8 bits) cannot be shown.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise ConfigError(f"The picture {str(path)!r} is {what}. Give the path of an image file.")
    try:
        return decode(path, str(path))
    except SampleError as error:
        raise ConfigError(
            f"{str(path)!r} is not a picture that Pillow can read, or it is cut short "
            f"({error.__cause__}). Give a PNG, JPEG, WebP or the like."
        ) from error


def _loaded(model: str | tuple[Any, Any] | None, pad: bool) -> VLM:
    """The model with its processor: the embedded pair, a folder's, the Hub's, or the given one."""
    if isinstance(model, tuple):
        return VLM(*model, pad=pad)
    return load(ModelEntry(EMBEDDED if model is None else model, pad=pad))


def _target(out: str | Path) -> Path:
    target = Path(out)
    if target.suffix.lower() not in _FORMATS:
        raise ConfigError(
            f"The drawing {str(out)!r} has the ending {target.suffix!r}; write one of "
            f"{', '.join(_FORMATS)}."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new = not target.exists()
        target.open("ab").close()
        if new:
            target.unlink()
    except OSError as error:
        raise ConfigError(
            f"Cannot write the drawing {str(target)!r}: {error.strerror or error}."
        ) from error
    return target


def _method(name: str, num_keep: int) -> PruningMethod:
    """Build the method; one without a budget (keep_all) is given none."""
    if all(inside_only(method_registry.get(part)) for part in name.split("+")):
        raise ConfigError(
            f"{name} acts inside an image encoder; visprune.eval.show.vit.show_vit draws what it "
            f"keeps and merges there. Here: a method that acts behind the encoder, such as todre."
        )
    return get_method(name, **({"num_keep": num_keep} if "num_keep" in parameters(name) else {}))


@torch.inference_mode()
def _answer(model: Any, processor: Any, inputs: dict[str, Any], max_new_tokens: int) -> str:
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def _notes(run: Run, method: PruningMethod, kept: KeptMap) -> list[str]:
    """What happened, from the trace: counts, mean over layers, whether a stage fired."""
    mean = sum(run.trace.tokens_per_layer[0]) / len(run.trace.tokens_per_layer[0])
    guessed = run.trace.placed[:1] == ["guessed"]
    notes = ["The grid is guessed from the number of tokens."] * guessed + [
        f"{method.name}: {len(kept.index)} of {len(kept.dest)} visual tokens kept, {mean:.1f} in "
        f"the mean over decoder layers."
    ]
    for stage in run.trace.stages:
        if "share" in stage:
            does = "they stay" if stage["after"][0] else "all leave"
            share = stage["share"][0]
            notes.append(f"At {stage['site']}: {share:.1%} of the text's attention, {does}.")
    return notes


def _unknown_words(processor: Any, question: str) -> list[str]:
    """What to say of the embedded model and a question."""
    notes = ["Embedded model: knows coloured shapes with digits, no photos."]
    ids = processor.tokenizer(question, add_special_tokens=False)["input_ids"]
    unknown = ids.count(processor.tokenizer.unk_token_id)
    if unknown:
        words = (
            "1 word of the question is" if unknown == 1 else f"{unknown} words of the question are"
        )
        notes.append(f"{words} not in its vocabulary.")
    return notes


def _unseen(vlm: VLM, image: Image.Image) -> list[str]:
    """What to say of a picture that the model does not see as it is."""
    said = describe_seen(vlm.seen(image.size), image.size)
    return [f"Picture: {said}; --pad shows it whole, in a square."] if said else []


def _cell(kept: KeptMap, region: int) -> int:
    """Pixels per patch that make the painting about 700 high."""
    return max(8, 700 // kept.grid(region)[0])


def _caption(kept: KeptMap, regions: list[int], name: str) -> str:
    here = torch.isin(kept.pos[:, 0], torch.tensor(regions))
    slots = torch.zeros(len(kept.pos), dtype=torch.bool)
    slots[kept.index] = True
    count = int((slots & here).sum())
    if len(kept.regions) == 1:
        return f"{count} kept"
    return f"{name}, {count} of {int(here.sum())} kept"
