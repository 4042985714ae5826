# SPDX-License-Identifier: Apache-2.0
"""The version, which records and tables carry."""

__version__ = "0.1.0"
