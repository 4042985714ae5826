# SPDX-License-Identifier: Apache-2.0
"""What of transformers itself the machine holds on to: cache layers, masks, attention functions."""
