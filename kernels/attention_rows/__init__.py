# SPDX-License-Identifier: Apache-2.0
"""Softmax rows of a few queries, and blockwise column sums of all of them."""
