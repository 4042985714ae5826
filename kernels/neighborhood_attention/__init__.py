# SPDX-License-Identifier: Apache-2.0
"""Neighborhood attention in one, two and three dimensions, and its unfused pair."""
