# SPDX-License-Identifier: Apache-2.0
"""From a study to records: jobs, claims between processes, questions asked."""
