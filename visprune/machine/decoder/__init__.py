# SPDX-License-Identifier: Apache-2.0
"""The decoder of a vision-language model under a run: its sequence, masks, positions, outputs."""
