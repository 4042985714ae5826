# SPDX-License-Identifier: Apache-2.0
"""Registry: lazy rows, suggestions, rows from other packages, collisions."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import pytest

import visprune.core.registry
from visprune.core.registry import Registry
from visprune.errors import ConfigError

TABLE = {"fraction": "fractions:Fraction", "fastv": "no.such.module:FastV"}


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the entry-point file of a distribution that is on the path as if installed."""
    info = tmp_path / "someplugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someplugin\nVersion: 1.0\n")
    (tmp_path / "someplugin.py").write_text("class Mine:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return info / "entry_points.txt"


def test_get_imports_the_attribute() -> None:
    assert Registry("thing", TABLE).get("fraction") is Fraction


def test_names_keep_the_order_and_import_nothing() -> None:
    table = {"b": "wave:Wave_read", "a": "chunk_that_is_not_there:X"}
    before = set(sys.modules)
    registry = Registry("thing", table)
    assert registry.names() == ("b", "a")
    assert list(registry) == ["b", "a"]
    assert len(registry) == 2
    assert "b" in registry
    assert "c" not in registry
    assert set(sys.modules) == before


def test_unknown_name_suggests_and_lists() -> None:
    with pytest.raises(ConfigError) as caught:
        Registry("method", TABLE).get("fast_v")
    assert str(caught.value) == (
        "Unknown method 'fast_v'. Did you mean 'fastv'? Known: fraction, fastv."
    )


def test_unknown_name_without_a_near_one() -> None:
    with pytest.raises(ConfigError, match=r"^Unknown method 'zzz'\. Known: fraction, fastv\.$"):
        Registry("method", TABLE).get("zzz")


def test_empty_table_says_none() -> None:
    with pytest.raises(ConfigError, match=r"Known: none\."):
        Registry("method", {}).get("todre")


def test_missing_attribute_names_the_row() -> None:
    with pytest.raises(ConfigError, match=r"fractions has no 'Fractoin'\. Did you mean 'Fraction'"):
        Registry("thing", {"f": "fractions:Fractoin"}).get("f")


def test_a_broken_import_is_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError, match="no"):
        Registry("thing", TABLE).get("fastv")


@pytest.mark.parametrize("target", ["fractions", "fractions:", ":F", "a b:C", "a..b:C", "a:b.c"])
def test_malformed_row_is_refused_at_once(target: str) -> None:
    with pytest.raises(ConfigError, match=r"package\.module:Attribute"):
        Registry("thing", {"x": target})


def test_table_is_frozen() -> None:
    source = dict(TABLE)
    registry = Registry("thing", source)
    source["later"] = "fractions:Fraction"
    assert "later" not in registry
    with pytest.raises(TypeError):
        registry._table["later"] = "fractions:Fraction"  # type: ignore[index]


def test_other_packages_add_rows(plugin: Path) -> None:
    plugin.write_text("[visprune.things]\nmine = someplugin:Mine\n")
    registry = Registry("thing", TABLE, group="visprune.things")
    assert registry.names() == ("fraction", "fastv", "mine")
    assert registry.get("mine").__name__ == "Mine"
    assert Registry("thing", TABLE).names() == ("fraction", "fastv")


def test_other_packages_cannot_replace_a_row(plugin: Path) -> None:
    plugin.write_text("[visprune.things]\nfraction = someplugin:Mine\n")
    with pytest.raises(ConfigError, match=r"Two packages define the thing 'fraction'.*someplugin"):
        Registry("thing", TABLE, group="visprune.things").names()


def test_installed_packages_are_read_again_only_when_they_change(
    plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin.write_text("[visprune.test_rows]\nfirst = someplugin:Mine\n")
    registry, calls = Registry("thing", TABLE, group="visprune.test_rows"), []
    plain = visprune.core.registry.entry_points
    monkeypatch.setattr(
        "visprune.core.registry.entry_points",
        lambda group: calls.append(group) or plain(group=group),
    )
    assert "first" in registry
    assert registry.names()[-1] == "first"
    assert len(calls) == 1
    later = plugin.parent.with_name("otherplugin-1.0.dist-info")
    later.mkdir()
    (later / "METADATA").write_text("Metadata-Version: 2.1\nName: otherplugin\nVersion: 1.0\n")
    (later / "entry_points.txt").write_text("[visprune.test_rows]\nsecond = someplugin:Mine\n")
    assert "second" in registry  # installed while Python runs
