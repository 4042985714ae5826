# SPDX-License-Identifier: Apache-2.0
"""Run the Triton source of every small case; started with ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path

import torch


def main() -> int:
    """Check all small cases with the rules of ``test_kernels.py``; print and count failures."""
    torch.set_num_threads(1)
    path = Path(__file__).with_name("test_kernels.py")
    spec = importlib.util.spec_from_file_location("kernel_rules", path)
    assert spec is not None
    assert spec.loader is not None
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    small = {key: case for key, case in rules.CASES.items() if case.triton}
    failed = 0
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    for key, case in small.items():
        try:
            if case.exact:
                inputs = case.inputs()
                truth = case.reference(**rules.cast(inputs, torch.float64))
                assert torch.equal(case.op(**inputs, backend="triton"), truth)
                bent = case.op(**rules.twisted(inputs), backend="triton")
                assert torch.equal(bent, truth)
            else:
                rules.check_errors(case, torch.float32, "triton")
        except Exception:  # all cases are reported, then the exit code
            failed += 1
            print("FAILED", key)
            traceback.print_exc()
    print(f"{len(small)} cases, {failed} failures")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
