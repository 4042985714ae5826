# SPDX-License-Identifier: Apache-2.0
"""What a model's own modules do with a token, counted from their shapes, family by no family."""
