# SPDX-License-Identifier: Apache-2.0
"""An image encoder under a run, alone or inside a vision-language model."""
