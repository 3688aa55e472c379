"""A part of the package as files that stand by themselves: modules, all that they import, and relative imports.

A kernel of the Hub is loaded under a name that is made up for it, so its code names no package but those it may count
on. Statements that import are found in the syntax tree and rewritten in place; nothing else of a file changes.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path

__all__ = ["ALLOWED", "standalone_sources"]

ALLOWED = ("torch", "triton")  # beside the standard library

_Import = ast.Import | ast.ImportFrom
_Span = tuple[tuple[int, int], tuple[int, int]]  # begin and end of a text, each as its line, from 1, and its column


def standalone_sources(package: Path, moved: Mapping[str, str]) -> dict[str, str]:
    """Files that hold modules of a package, and every module that these import, with relative imports.

    Args:
        package: the package's folder.
        moved: the modules by their names in the package, `"hub_kernel.layers"`, and their names in the copy,
            `"layers"`; `""` for its `__init__.py`. What they import keeps its name.

    Returns:
        The files' texts by their paths in the copy.

    Raises:
        ValueError: for a module that imports what is neither in the package nor allowed, or by a statement that cannot
            be made relative, with its file and line.
    """
    found: dict[str, str] = {}
    waiting, seen = list(moved), set(moved)
    while waiting:
        name = waiting.pop()
        module = _Module(package, name, moved)
        found[module.target_file] = module.rewritten()
        for needed in module.needed - seen:
            seen.add(needed)
            waiting.append(needed)
    return dict(sorted(found.items()))


class _Module:
    """One module of the package: its file, what it imports, its text with relative imports."""

    def __init__(self, package: Path, name: str, moved: Mapping[str, str]) -> None:
        self.package, self.name, self.moved = package, name, moved
        file = _file_of(package, name)
        assert file is not None, name
        self.file, self.is_package = file, file.name == "__init__.py"
        self.target = moved.get(name, name)
        as_package = self.is_package or not self.target
        self.parents = _parts(self.target) if as_package else _parts(self.target)[:-1]  # its package in the copy
        self.target_file = "/".join([*self.parents, "__init__.py" if as_package else f"{_parts(self.target)[-1]}.py"])
        self.lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        self.needed: set[str] = set() if name in moved else set(_packages_of(name))

    def rewritten(self) -> str:
        """The text with relative imports; `needed` has all modules of the package that it imports afterwards."""
        lines = self.lines.copy()
        changes = [change for node in ast.walk(ast.parse("".join(lines))) for change in self._changes(node)]
        for ((row, column), (last, end)), text in sorted(changes, reverse=True):
            rest = lines[last - 1][end:]
            lines[row - 1 : last] = [lines[row - 1][:column] + text + rest]
        return "".join(lines)

    def _changes(self, node: ast.AST) -> Iterator[tuple[_Span, str]]:
        """Parts of the text that a node makes change, and what stands there then."""
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            raise self._refusal(node, f"imports by name, {ast.unparse(node)}; allowed: import statements")
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (inside := self._inside(alias.name)) is None:
                    self._check_outside(node, alias.name)
                elif len(node.names) > 1 or alias.asname is None:
                    raise self._refusal(node, f"says {ast.unparse(node)!r}; allowed: from ... import ...")
                else:
                    source = self._relative(node, *inside.rpartition(".")[::2])
                    end = (node.end_lineno or 0, node.end_col_offset or 0)
                    name = inside.rpartition(".")[2]
                    yield ((node.lineno, node.col_offset), end), f"from {source} import {name} as {alias.asname}"
        if isinstance(node, ast.ImportFrom):
            absolute = self._absolute(node)
            if (inside := self._inside(absolute)) is None:
                self._check_outside(node, absolute)
                return
            sources = {self._relative(node, inside, alias.name) for alias in node.names}
            if len(sources) > 1:
                raise self._refusal(node, f"says {ast.unparse(node)!r}; allowed: names that lie together in a copy")
            yield self._span_of_source(node), sources.pop()

    def _absolute(self, node: ast.ImportFrom) -> str:
        """Where a statement imports from, by its absolute name."""
        if not node.level:
            return node.module or ""
        own = [self.package.name, *_parts(self.name)]
        own = own if self.is_package else own[:-1]
        return ".".join([*own[: len(own) - node.level + 1], *_parts(node.module or "")])

    def _inside(self, absolute: str) -> str | None:
        """The name in the package of what an absolute name means; None for what lies elsewhere."""
        first, _, rest = absolute.partition(".")
        return rest if first == self.package.name else None

    def _check_outside(self, node: _Import, name: str) -> None:
        top = name.partition(".")[0]
        if top not in ALLOWED and top not in sys.stdlib_module_names:
            allowed = ", ".join(ALLOWED)
            raise self._refusal(node, f"imports {name!r}; allowed: the standard library, {allowed} and the package")

    def _relative(self, node: _Import, source: str, name: str) -> str:
        """What `from <source> import <name>` imports from, seen from this module's place in the copy."""
        whole = f"{source}.{name}" if source else name
        is_module = _file_of(self.package, whole) is not None
        needed = whole if is_module else source
        there = _parts(self.moved.get(needed, needed))
        renamed = is_module and there[-1:] != [name]
        if renamed or not needed or _file_of(self.package, needed) is None:
            absolute = ".".join([self.package.name, *_parts(source)])
            raise self._refusal(node, f"imports {name!r} from {absolute!r}, which a copy has not")
        self.needed.add(needed)
        there = there[:-1] if is_module else there
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(there, self.parents, strict=False))))
        return "." * (len(self.parents) - shared + 1) + ".".join(there[shared:])

    def _span_of_source(self, node: ast.ImportFrom) -> _Span:
        """Where the text of a `from` statement says what it imports from."""
        statement = "".join(self.lines[node.lineno - 1 : node.end_lineno])[node.col_offset :]
        tokens = list(tokenize.generate_tokens(io.StringIO(statement).readline))
        end = next(i for i, token in enumerate(tokens) if token.string == "import")

        def place(row: int, column: int) -> tuple[int, int]:
            return node.lineno + row - 1, column + (node.col_offset if row == 1 else 0)

        return place(*tokens[1].start), place(*tokens[end - 1].end)

    def _refusal(self, node: ast.expr | _Import, what: str) -> ValueError:
        return ValueError(f"{self.file.relative_to(self.package.parent)}, line {node.lineno}, {what}.")


def _parts(name: str) -> list[str]:
    return name.split(".") if name else []


def _packages_of(name: str) -> list[str]:
    """The packages that a module lies in, below the package of all."""
    parts = _parts(name)[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _file_of(package: Path, name: str) -> Path | None:
    path = package.joinpath(*_parts(name))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)
