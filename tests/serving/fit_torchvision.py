# SPDX-License-Identifier: Apache-2.0
"""Let a torchvision that was built for CUDA be imported beside a torch that was built without.

PyPI has no torchvision for the CPU alone, and vLLM imports it. Its Python part works once the two
operators are declared that its library would have brought; nothing here calls them. Run by the
Python of the environment: does nothing where torchvision loads by itself.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

_DECLARED = """
import sys


class Declare:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(operator + "(Tensor dets, Tensor scores, float iou) -> Tensor")
            sys._torchvision_declared = library
        return None


sys.meta_path.insert(0, Declare())
"""


def main() -> None:
    """Write the declaration into this environment, if it is needed and helps."""
    if _loads():
        return
    packages = Path(sysconfig.get_paths()["purelib"])
    (packages / "torchvision_declared.py").write_text(_DECLARED)
    (packages / "torchvision_declared.pth").write_text("import torchvision_declared\n")
    if not _loads():
        sys.exit("torchvision cannot be imported here; install the one of PyTorch's CPU index.")


def _loads() -> bool:
    command = [sys.executable, "-c", "import torchvision"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    main()
