# SPDX-License-Identifier: Apache-2.0
"""What the benches of all kernels share: interleaved timing and tables."""
