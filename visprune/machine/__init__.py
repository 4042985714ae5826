# SPDX-License-Identifier: Apache-2.0
"""What happens while a model runs: plans, choices, hooks, and their undoing."""
