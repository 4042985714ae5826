# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: offline, one thread, no network, the GPU only where there is one."""

from __future__ import annotations

import os

# Before anything imports torch, transformers or matplotlib: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import socket
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# Autograd counts the kinds of devices at its first backward, and starts threads for each but the
# CPU; a process that has them cannot be forked. torch.export and torch.compile bring a kind along
# ("meta"), so the first backward comes before them, and tests that fork may run after them.
torch.ones(1, requires_grad=True).sum().backward()

# Times on a busy two-core machine say nothing, and a failure should be the same one tomorrow.
hypothesis.settings.register_profile("visprune", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("visprune")

_LOCAL = {"localhost", "127.0.0.1", "::1", ""}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked ``gpu`` where there is no CUDA device; pytest counts them."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Fail any test that reaches for another machine.

    ``pytest.fail`` raises outside ``Exception``, so a library that swallows connection errors and
    goes on without the network cannot hide the attempt.
    """

    def refuse(host: object) -> None:
        if host not in _LOCAL:
            pytest.fail(f"A test reached for the network: {host!r}. Tests run offline.")

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            refuse(address[0])
        real_connect(self, address)

    def connect_ex(self: socket.socket, address: Any) -> int:
        if self.family != socket.AF_UNIX:
            refuse(address[0])
        return real_connect_ex(self, address)

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse("" if host is None else host.decode() if isinstance(host, bytes) else host)
        return real_getaddrinfo(host, *args, **kwargs)

    real_connect, real_connect_ex = socket.socket.connect, socket.socket.connect_ex
    real_getaddrinfo = socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        patch.setattr(socket.socket, "connect_ex", connect_ex)
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield
