# SPDX-License-Identifier: Apache-2.0
"""What changes a model's answers beside its weights: configuration, words, pictures, adapters.

All of it enters the identity of a cell, so that a folder of results never takes the answers of one
model for those of another of the same weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from visprune.eval.records.record import canonical

__all__ = [
    "config_hash",
    "digest",
    "plain",
    "processor_hash",
    "structure_hash",
    "tensors_hash",
    "transform_hash",
    "weights_hash",
]

_SAMPLED = 65_536

# Says where something lies, by which version it was written, or what training alone reads.
_NOTHING = frozenset({
    "name_or_path", "processor_class", "auto_map", "transformers_version", "dtype", "torch_dtype",
    "architectures", "use_cache", "id2label", "label2id", "problem_type", "return_dict",
    "output_attentions", "output_hidden_states", "initializer_range", "initializer_factor",
    "base_model_name_or_path", "inference_mode", "peft_version", "revision",
})  # fmt: skip
_SCALARS = (bool, int, float, str)
_SWITCHES = ("training", "fused_attn", "grad_checkpointing", "weight_init_mode", "fix_init",
             "inplace", "p", "drop_prob", "scale_by_keep")  # fmt: skip


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a value, as JSON with what JSON has not as text."""
    return hashlib.sha256(canonical(plain(value))).hexdigest()[:16]


def plain(value: Any) -> Any:
    """JSON values alone: keys as text, sets in order, what JSON has not as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    known = value is None or isinstance(value, str | int | bool)
    known = known or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)


def config_hash(model: Any) -> str:
    """Hash of a transformers model's configuration and of its PEFT adapters.

    The layer that visual features are taken from, rotary bases, an adapter's ``lora_alpha``: none
    of them is a weight.
    """
    adapters = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapters", None) if adapters else None
    found = {
        "config": model.config.to_dict(),
        "adapters": {name: config.to_dict() for name, config in adapters.items()},
        "active": active() if callable(active) else active,
    }
    return digest(_telling(found))


def processor_hash(processor: Any) -> str:
    """Hash of how pictures are prepared and words become tokens, chat template included.

    A processor's ``to_dict`` has neither its tokenizer nor its template.
    """
    found: dict[str, Any] = {"template": getattr(processor, "chat_template", None)}
    if hasattr(processor, "to_dict"):
        found["processor"] = _telling(processor.to_dict())
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        found["words"] = _words(tokenizer)
    return digest(found)


def _words(tokenizer: Any) -> Any:
    """Everything a tokenizer does; padding and truncation are set anew by every call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        found = json.loads(backend.to_str())
        return {k: v for k, v in found.items() if k not in ("padding", "truncation")}
    return tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None


def _telling(value: Any) -> Any:
    """Without what says nothing about answers."""
    if isinstance(value, Mapping):
        return {
            key: _telling(part)
            for key, part in value.items()
            if str(key) not in _NOTHING and not str(key).startswith("_")
        }
    return [_telling(part) for part in value] if isinstance(value, list | tuple) else value


def structure_hash(model: nn.Module) -> str:
    """Hash of a model's modules: names, classes, and the numbers and words set on them.

    Pooling, window sizes and dilations change answers and are no weights.
    """
    return digest(
        [
            [name, type(module).__name__, *sorted(_set_on(module).items())]
            for name, module in model.named_modules()
        ]
    )


def _set_on(module: nn.Module) -> dict[str, Any]:
    found = {}
    for name, value in vars(module).items():
        parts = value if isinstance(value, tuple) else (value,)
        if name.startswith("_") or name in _SWITCHES or not parts:
            continue
        if all(isinstance(part, _SCALARS) or part is None for part in parts):
            found[name] = value
    return found


def transform_hash(transform: Any) -> str:
    """Hash of a torchvision transform as it describes itself; places in memory left out."""
    return digest(re.sub(r" at 0x[0-9a-f]+", "", str(transform)))


@torch.no_grad()
def weights_hash(model: nn.Module) -> str:
    """SHA-256 over every parameter and buffer: name, shape, dtype, and up to 65,536 of its values.

    The values are evenly spaced, first and last among them, so that a model of any size is hashed
    in seconds, on any device. Training changes (nearly) every value; an edit of a few numbers in
    the midst of a large matrix may go unseen.

    Returns:
        16 hex digits.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(model):
        flat = tensor.detach().reshape(-1)
        if len(flat) > _SAMPLED:
            place = torch.linspace(0, len(flat) - 1, _SAMPLED, dtype=torch.float64)
            flat = flat[place.round().long().to(flat.device)]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.is_meta:  # offloaded by Accelerate: there is nothing to read
            continue
        raw = flat.cpu().contiguous()
        digest.update(raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    return digest.hexdigest()[:16]


def tensors_hash(*tensors: torch.Tensor) -> str:
    """The same over tensors in their order."""
    holder = nn.Module()
    for number, tensor in enumerate(tensors):
        holder.register_buffer(f"tensor{number}", tensor)
    return weights_hash(holder)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield name, buffer
