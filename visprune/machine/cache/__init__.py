# SPDX-License-Identifier: Apache-2.0
"""The site of the key-value cache, after the prompt: look at each layer, share out, store anew."""
