# SPDX-License-Identifier: Apache-2.0
"""What needs a server is collected where one is installed: `make serving`."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("vllm") else ["vllm"]
