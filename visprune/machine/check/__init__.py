# SPDX-License-Identifier: Apache-2.0
"""The contract of pruning on a user's own model: what a dropped token is, shown by numbers."""
