# SPDX-License-Identifier: Apache-2.0
"""Training of the embedded model, which the demonstration and the tests use."""
