"""What Python 3.10 refuses and neither ruff nor mypy tells."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def mixed_tuples(source: str) -> list[str]:
    """Classes that inherit from NamedTuple and something else: Generic came with 3.11."""
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    return [one.name for one in classes if len(one.bases) > 1 and "NamedTuple" in map(ast.unparse, one.bases)]


def test_they_are_found() -> None:
    source = "class A(NamedTuple, Generic[T]): x: T\nclass B(NamedTuple): x: int\nclass C(D, E): ..."
    assert mixed_tuples(source) == ["A"]


@pytest.mark.parametrize("folder", ["nanochat", "benchmarks", "dev", "scripts", "tests"])
def test_named_tuples_have_one_base(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {str(path): mixed_tuples(path.read_text(encoding="utf-8")) for path in files}
    assert not {path: names for path, names in found.items() if names}
