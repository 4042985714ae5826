# SPDX-License-Identifier: Apache-2.0
"""Pruning where models are served: what a request asks for, and one picture made shorter.

What is known of one server lies in a folder of its own (:mod:`visprune.serving.vllm`); what lies
here knows none.
"""
