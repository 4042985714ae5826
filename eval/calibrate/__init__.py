# SPDX-License-Identifier: Apache-2.0
"""Settings of a method that its paper reads off each model: ``visprune calibrate``."""
