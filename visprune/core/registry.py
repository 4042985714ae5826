# SPDX-License-Identifier: Apache-2.0
"""Tables of names: what each stands for is imported only when it is asked for."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any

from visprune.errors import ConfigError, did_you_mean


class Registry:
    """A frozen table from names to lazily imported objects.

    Rows are strings, ``"package.module:Attribute"``, so that listing the names imports nothing.
    Other packages add rows through an entry-point group; they cannot replace one of ours.

    Args:
        kind: What the rows are, in the singular, for messages (``"method"``).
        table: Name to ``"package.module:Attribute"``; copied, so later changes do not reach it.
        group: Entry-point group that other packages add rows through (``"visprune.methods"``).

    Raises:
        ConfigError: A row of ``table`` is not of the form ``"package.module:Attribute"``.
    """

    def __init__(self, kind: str, table: Mapping[str, str], *, group: str | None = None) -> None:
        self.kind = kind
        self.group = group
        for name, target in table.items():
            _check_target(kind, name, target)
        self._table: Mapping[str, str] = MappingProxyType(dict(table))

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {list(self.names())})"

    def __contains__(self, name: object) -> bool:
        return name in self._rows()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._rows())

    def names(self) -> tuple[str, ...]:
        """Return all names: ours in the table's order, then those of other packages, sorted.

        Raises:
            ConfigError: Two packages claim one name.
        """
        return tuple(self._rows())

    def get(self, name: str) -> Any:
        """Import and return what ``name`` stands for.

        Raises:
            ConfigError: The name is unknown (the message lists those that are known), or the row
                points at an attribute that its module does not have.
        """
        return _load(self.kind, name, self._target(name))

    def items(self) -> Iterator[tuple[str, Any]]:
        """Import and return everything, by name; other packages' rows are looked up once."""
        for name, target in self._rows().items():
            yield name, _load(self.kind, name, target)

    def check(self, name: str) -> None:
        """Raise what :meth:`get` raises of an unknown name, without importing anything."""
        self._target(name)

    def summary(self, name: str) -> str:
        """The first line of the docstring of what ``name`` stands for.

        It is read from the source, so that a list of names waits for no library; only what is no
        class or function of its module is imported.
        """
        module, _, attribute = self._target(name).partition(":")
        doc = _docstring(module, attribute)
        if doc is None:
            doc = self.get(name).__doc__ or ""
        return doc.strip().partition("\n")[0]

    def _target(self, name: str) -> str:
        """The row of a name; raises ``ConfigError`` where there is none."""
        rows = self._rows()
        if name not in rows:
            raise ConfigError(
                f"Unknown {self.kind} {name!r}.{did_you_mean(name, rows)} "
                f"Known: {', '.join(rows) or 'none'}."
            )
        return rows[name]

    def _rows(self) -> dict[str, str]:
        """Return the table and, after it, the rows of installed packages."""
        rows = dict(self._table)
        if self.group is None:
            return rows
        for point in _points(self.group, _search_path()):
            # One distribution can be seen twice: an editable install and its built metadata.
            if rows.get(point.name) == point.value:
                continue
            if point.name in rows:
                raise ConfigError(
                    f"Two packages define the {self.kind} {point.name!r}: {rows[point.name]} and "
                    f"{point.value} ({_owner(point)}, entry-point group {self.group!r}). "
                    f"Rename the row of {_owner(point)}, or uninstall it."
                )
            _check_target(self.kind, point.name, point.value)
            rows[point.name] = point.value
        return rows


def _search_path() -> tuple[tuple[str, int | None], ...]:
    """Where packages are looked for, and when each place last changed."""
    return tuple((place, _changed(place)) for place in sys.path)


def _changed(place: str) -> int | None:
    try:
        return os.stat(place or os.curdir).st_mtime_ns
    except OSError:
        return None


# Reading the entry points of all that is installed takes 5 to 15 ms, and a call of ``prune`` asks
# some twenty times.
@lru_cache(maxsize=32)
def _points(group: str, where: tuple[tuple[str, int | None], ...]) -> tuple[EntryPoint, ...]:
    """The entry points of a group, sorted by name, as long as ``where`` stays the same."""
    return tuple(sorted(entry_points(group=group), key=lambda point: point.name))


def _docstring(module: str, attribute: str) -> str | None:
    """Docstring of a class or function, from its module's source; ``None`` where it has none."""
    try:
        spec = importlib.util.find_spec(module)
        text = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
        body = ast.parse(text).body
    except (ImportError, OSError, SyntaxError, ValueError):
        return None
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = [node for node in body if isinstance(node, kinds) and node.name == attribute]
    return ast.get_docstring(found[-1]) if found else None


def _owner(point: EntryPoint) -> str:
    """Return the name of the distribution that an entry point came with."""
    return point.dist.name if point.dist is not None else "an unknown package"


def _check_target(kind: str, name: str, target: str) -> None:
    """Raise ``ConfigError`` unless ``target`` reads ``"package.module:Attribute"``."""
    module, _, attribute = target.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise ConfigError(
            f"The {kind} {name!r} points at {target!r}; write it as 'package.module:Attribute'."
        )


def _load(kind: str, name: str, target: str) -> Any:
    """Import ``"package.module:Attribute"``; errors of the import itself pass through."""
    module_name, _, attribute = target.partition(":")
    module = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        raise ConfigError(
            f"The {kind} {name!r} points at {target!r}, but {module_name} has no {attribute!r}."
            f"{did_you_mean(attribute, vars(module))}"
        )
    return getattr(module, attribute)
