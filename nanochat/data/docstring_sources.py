"""Documentation strings from source code that is read, never run; and comments."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

LEAST_WORDS = 8  # of comments that are worth a document
Definition: TypeAlias = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Node: TypeAlias = Definition | ast.Module


class Unit(NamedTuple):
    """A module. `path`: its source, or nothing."""

    name: str
    path: str


class Record(NamedTuple):
    """An object and what is said of it."""

    name: str  # as users write it
    kind: str  # module, class, function, method, attribute, topic (of `help`), or comment
    module: str
    home: str  # module:qualified name of the definition
    signature: str
    text: str


def definitions(unit: Unit) -> Iterator[Record]:
    """The module, its classes and functions, also those inside of others: each by its documentation string, and by its
    comments. Nothing when the source cannot be read."""
    if not unit.path:
        return
    try:
        with tokenize.open(unit.path) as file:
            source = file.read()
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    yield from _definitions(tree, "", unit.name, source.splitlines())


def _definitions(node: Node, name: str, module: str, lines: Sequence[str], kind: str = "module") -> Iterator[Record]:
    """`name`: qualified name of the node inside of the module, empty for the module itself."""
    shown, home = ".".join(filter(None, (module, name))), f"{module}:{name}"
    if text := ast.get_docstring(node):
        yield Record(shown, kind, module, home, _signature(node), text)
    if text := comments(node, lines):
        yield Record(f"{shown}#comments", "comment", module, f"{home}#comments", _signature(node), text)
    for child in _nearest(node):
        inner = f"{name}.{child.name}" if name else child.name
        is_class, in_class = isinstance(child, ast.ClassDef), isinstance(node, ast.ClassDef)
        kind = "class" if is_class else "method" if in_class else "function"
        yield from _definitions(child, inner, module, lines, kind)


def _nearest(node: ast.AST) -> Iterator[Definition]:
    """Definitions inside of a node, but not those inside of them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child
        else:
            yield from _nearest(child)


def _signature(node: Node) -> str:
    """The parameters; of a class its bases."""
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"({bases})" if bases else ""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def comments(node: Node, lines: Sequence[str]) -> str:
    """Comments right above a definition and on lines of their own inside, one paragraph a block; without code that was
    commented out, and without those of definitions inside. Nothing when they hold fewer than LEAST_WORDS words."""
    inner = {number for child in _nearest(node) for number in _extent(child, lines)}
    blocks: list[list[str]] = [[]]
    for number in _extent(node, lines):
        line = lines[number].strip() if number not in inner else ""
        if line.startswith("#"):
            blocks[-1].append(line.strip("#-=*~ \t"))
        elif blocks[-1]:
            blocks.append([])
    prose = [text for block in blocks if (text := "\n".join(block).strip()) and not _is_code(text)]
    return "\n\n".join(prose) if len(re.findall(r"[A-Za-z]{2,}", " ".join(prose))) >= LEAST_WORDS else ""


def _extent(node: Node, lines: Sequence[str]) -> range:
    """The numbers of a node's lines from 0, with the comments and decorators above it."""
    if isinstance(node, ast.Module):
        return range(len(lines))
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    while first and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return range(first, node.end_lineno or node.lineno)


def _is_code(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True
