# SPDX-License-Identifier: Apache-2.0
"""Modules between an image encoder and a language model that come with a token budget."""

from visprune.backbones.projectors.matryoshka import MatryoshkaProjector

__all__ = ["MatryoshkaProjector"]
