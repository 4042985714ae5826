# SPDX-License-Identifier: Apache-2.0
"""Attention over the keys that an index or a block mask names, and low-rank top-k."""
