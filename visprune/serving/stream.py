# SPDX-License-Identifier: Apache-2.0
"""vLLM as a server has it: requests of several clients at once, timed token by token.

Nothing is answered from a cache: prefixes and prepared pictures are not kept, so that each request
is worked for.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

from visprune.errors import ConfigError, first_line
from visprune.serving.asked import METHOD
from visprune.serving.engine import Prompt, check_installed, request_of

__all__ = ["Arrived", "Stream"]


@dataclass(frozen=True)
class Arrived:
    """One answered request.

    Attributes:
        prompt: tokens of the prompt as the model got it, pruned placeholders gone.
        tokens: of the answer.
        first: seconds from sending it to its first token.
        whole: seconds to its last.
    """

    prompt: int
    tokens: int
    first: float
    whole: float


class Stream:
    """An engine in a process of its own, asked by clients that wait for their answers.

    Args:
        folder: of the model.
        dtype: a name of torch, such as ``"bfloat16"``.
        options: of ``vllm.AsyncEngineArgs``.

    Raises:
        ConfigError: vLLM is not here, does not find the plug-in, or does not start.
    """

    def __init__(
        self, folder: Path, *, dtype: str, options: Mapping[str, Any] | None = None
    ) -> None:
        check_installed()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        # The caller's process has run torch: its threads do not outlive a fork.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._numbers = count()
        self._runner = asyncio.Runner()
        try:
            arguments = AsyncEngineArgs(
                model=str(folder), dtype=dtype, limit_mm_per_prompt={"image": 1},
                mm_processor_kwargs={METHOD: None}, mm_processor_cache_gb=0,
                enable_prefix_caching=False, disable_log_stats=True, **(options or {}),
            )  # fmt: skip
            self._llm = AsyncLLM.from_engine_args(arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"vLLM does not start with this model: {first_line(error)}"
            ) from error

    def burst(self, prompts: Sequence[Prompt], *, clients: int, new_tokens: int) -> list[Arrived]:
        """Answer prompts, so many at once: each client sends its next when it has its answer.

        Args:
            prompts: the prompts.
            clients: how many there are.
            new_tokens: of each answer, exactly.

        Returns:
            What became of each, in order.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        how = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        return self._runner.run(self._answered(prompts, clients, how))

    def close(self) -> None:
        """End the engine's processes."""
        self._llm.shutdown()
        # It would shut down again when it goes, which may be when half of Python is gone.
        del self._llm
        self._runner.close()

    async def _answered(self, prompts: Sequence[Prompt], clients: int, how: Any) -> list[Arrived]:
        found: dict[int, Arrived] = {}
        waiting = iter(enumerate(prompts))  # of all clients together
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._client(waiting, how, found))
        return [found[number] for number in range(len(prompts))]

    async def _client(
        self, waiting: Iterator[tuple[int, Prompt]], how: Any, found: dict[int, Arrived]
    ) -> None:
        for number, prompt in waiting:
            found[number] = await self._one(prompt, how)

    async def _one(self, prompt: Prompt, how: Any) -> Arrived:
        begin, first, length, tokens = perf_counter(), 0.0, 0, 0
        name = f"visprune-{next(self._numbers)}"
        async for out in self._llm.generate(request_of(prompt), how, name):
            made = len(out.outputs[0].token_ids)
            if made and not tokens:
                first = perf_counter() - begin
            tokens += made
            length = length or len(out.prompt_token_ids or ())
        return Arrived(length, tokens, first, perf_counter() - begin)
