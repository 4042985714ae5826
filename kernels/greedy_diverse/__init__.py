# SPDX-License-Identifier: Apache-2.0
"""Greedy diverse selection: k-center, max-sum and DPP-MAP over visual tokens."""
