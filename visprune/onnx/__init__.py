# SPDX-License-Identifier: Apache-2.0
"""ONNX files of pruned vision transformers and of the architectures here.

``export`` is ``torch.onnx.export`` with what it lacks: our operators written in plain ones, and the
stable sort by which methods rank tokens. Needs ``onnxscript`` and ``onnx``: ``pip install
'visprune[onnx]'``.
"""

from visprune.onnx.export import export, translations
from visprune.ops.plain import decompositions

__all__ = ["decompositions", "export", "translations"]
