# SPDX-License-Identifier: Apache-2.0
"""Tasks: what a model is asked, one module or package per benchmark."""
