# SPDX-License-Identifier: Apache-2.0
"""A plug-in of vLLM: budgets of visual tokens by request, on unmodified models.

vLLM finds :func:`register` by its entry point (group ``vllm.general_plugins``) in each of its
processes. Nothing of vLLM is patched: :data:`ARCHITECTURES` are registered anew, as subclasses of
vLLM's own that are imported when a model of theirs is served.
"""

from __future__ import annotations

ARCHITECTURES = {
    "LlavaForConditionalGeneration": "llava:Llava",
    "LlavaNextForConditionalGeneration": "llava:LlavaNext",
    "LlavaOnevisionForConditionalGeneration": "onevision:OneVision",
    "InternVLForConditionalGeneration": "internvl:InternVL",
    "Qwen2VLForConditionalGeneration": "qwen:Qwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "qwen:Qwen25VL",
    "Qwen3VLForConditionalGeneration": "qwen:Qwen3VL",
}
TESTED = ("0.32",)
"""Minor versions of vLLM that the tests were run with."""


def register() -> None:
    """Let vLLM serve :data:`ARCHITECTURES` with visprune; safe to call again."""
    from vllm import ModelRegistry

    for name, where in ARCHITECTURES.items():
        ModelRegistry.register_model(name, f"visprune.serving.vllm.{where}")
