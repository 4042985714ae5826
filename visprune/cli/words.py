# SPDX-License-Identifier: Apache-2.0
"""Words of the command line that several commands read."""

from __future__ import annotations

from typing import Any

from visprune.errors import ConfigError


def overrides_of(pairs: list[str]) -> dict[str, Any]:
    """Return ``["decoder.steps=100"]`` as ``{"decoder.steps": 100}``, values read as YAML."""
    import yaml

    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ConfigError(f"Expected KEY=VALUE, got {pair!r}; such as decoder.steps=100.")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{pair!r}: the value is not YAML ({error}).") from error
    return values
