# SPDX-License-Identifier: Apache-2.0
"""The guard in conftest.py: tests cannot reach another machine, even when a library hides it."""

from __future__ import annotations

import contextlib
import os
import socket
import urllib.request

import pytest


def _hidden_attempt() -> None:
    with contextlib.suppress(Exception):  # as a library does that can go on without the network
        urllib.request.urlopen("http://192.0.2.1/", timeout=1)


def test_a_hidden_connection_fails_the_test() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"reached for the network: '192\.0\.2\.1'"):
        _hidden_attempt()


def test_looking_up_a_name_fails_the_test() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"'example\.invalid'"):
        socket.create_connection(("example.invalid", 80), timeout=1)


def test_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            client.sendall(b"x")
            peer, _ = server.accept()
        with peer:
            assert peer.recv(1) == b"x"


def test_hub_clients_are_told_to_stay_offline() -> None:
    import huggingface_hub.constants as hub

    assert hub.HF_HUB_OFFLINE
    assert os.environ["HF_DATASETS_OFFLINE"] == "1"
