# SPDX-License-Identifier: Apache-2.0
"""`visprune check`: the contract of pruning on the user's own model."""
