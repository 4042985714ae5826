# SPDX-License-Identifier: Apache-2.0
"""Attention of a few queries over keys and values whose number differs from head to head."""
