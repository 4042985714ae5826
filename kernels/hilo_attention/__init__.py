# SPDX-License-Identifier: Apache-2.0
"""HiLo attention: softmax inside small windows beside softmax over pooled keys."""
