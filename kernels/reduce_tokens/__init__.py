# SPDX-License-Identifier: Apache-2.0
"""Gather, weighted merge and un-merge of tokens, and ToMe's bipartite matching."""
