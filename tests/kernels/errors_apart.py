# SPDX-License-Identifier: Apache-2.0
"""Check cases by the rules of ``test_kernels.py`` in a process of its own, started by it.

Reads a line ``[case, dtype, backend]`` of JSON after the other, and answers each with one: the
traceback of what is wrong, or an empty string.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch


def load_rules() -> Any:
    """The test's own module; ``tests`` is no package that another process could import."""
    path = Path(__file__).with_name("test_kernels.py")
    spec = importlib.util.spec_from_file_location("kernel_rules", path)
    assert spec is not None
    assert spec.loader is not None
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    return rules


def main() -> None:
    """Answer until the input ends."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    rules = load_rules()
    for line in sys.stdin:
        key, dtype, backend = json.loads(line)
        said = ""
        try:
            rules.check(rules.CASES[key], rules.DTYPES[dtype], backend)
        except Exception:  # told to the test that asked
            said = traceback.format_exc()
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
