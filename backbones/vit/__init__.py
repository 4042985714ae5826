# SPDX-License-Identifier: Apache-2.0
"""Efficient vision transformers, registered in timm by importing this package.

``litv2_*`` (HiLo attention), ``nat_*`` and ``dinat_*`` (neighborhood attention),
``sparsifiner_deit_*`` (learned sparse attention), ``agent_deit_*`` (agent attention),
``van_*`` (large kernels), ``overlock_*`` (kernels made per pixel); then
``timm.create_model(name)`` as for any other model. The attention modules :class:`HiLo` and
:class:`NeighborhoodAttention2d` take and give channels-last maps and can be used alone;
:func:`with_attention` puts them, agents and kernels made per pixel into any ViT of timm.
:mod:`~visprune.backbones.vit.heads` reads all tokens of a frozen encoder.
"""

from __future__ import annotations

from visprune.backbones.vit import dinat as _dinat  # noqa: F401 - registers its models
from visprune.backbones.vit import heads
from visprune.backbones.vit.agent import AgentAttention
from visprune.backbones.vit.agent_deit import AgentViT
from visprune.backbones.vit.contmix import ContMixBlock
from visprune.backbones.vit.grid_attention import with_attention
from visprune.backbones.vit.hilo import HiLo
from visprune.backbones.vit.litv2 import LITv2
from visprune.backbones.vit.nat import NAT
from visprune.backbones.vit.neighborhood import NeighborhoodAttention2d
from visprune.backbones.vit.overlock import OverLoCK
from visprune.backbones.vit.sparsifiner import Sparsifiner
from visprune.backbones.vit.sparsifiner_cost import sparsifiner_cost
from visprune.backbones.vit.sparsifiner_training import stage_parameters
from visprune.backbones.vit.van import VAN, LargeKernelAttention

__all__ = [
    "NAT",
    "VAN",
    "AgentAttention",
    "AgentViT",
    "ContMixBlock",
    "HiLo",
    "LITv2",
    "LargeKernelAttention",
    "NeighborhoodAttention2d",
    "OverLoCK",
    "Sparsifiner",
    "heads",
    "sparsifiner_cost",
    "stage_parameters",
    "with_attention",
]
