"""Which generation serves a version, which are kept, and what is said of their files."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import UsageError
from nanochat.retrieval import generation
from nanochat.retrieval.generation import SMALL, describe, problems, retained, serving
from nanochat.retrieval.manifest import GenerationInfo, Version


def version(number: int, rows: int, passages: int | None = None) -> Version:
    return Version(number, 0.0, "", rows, rows if passages is None else passages, rows - 1)


def built(name: str, rows: int, since: int = 0, passages: int | None = None) -> GenerationInfo:
    return GenerationInfo(name, rows - 1, rows if passages is None else passages, since, {})


@given(st.lists(st.integers(0, 300_000), min_size=1, max_size=40))
def test_every_version_is_served_by_a_generation_of_at_most_twice_its_size(steps: list[int]) -> None:
    versions = [version(0, 0)]
    kept: tuple[GenerationInfo, ...] = ()
    for number, step in enumerate(steps, 1):
        rows = versions[-1].last_row + 1 + step
        versions.append(version(number, rows))
        before = kept
        kept = retained([*kept, built(f"gen-{number}", rows)], versions)
        assert kept[-1].name == f"gen-{number}"
        assert {one.name for one in kept} <= {one.name for one in (*before, kept[-1])}
        for one in versions:
            found = serving(kept, one)
            assert found is not None
            assert found.last_row >= one.last_row
            if one.passages:
                assert found.passages <= max(2 * one.passages, SMALL)


def test_a_generation_without_dead_rows_does_not_serve_what_saw_them() -> None:
    old, new = built("old", 100_000), built("new", 100_100, since=5, passages=20_000)
    versions = [version(4, 100_000), version(5, 100_100, 20_000)]
    assert serving([old, new], versions[0]) == old
    assert serving([old, new], versions[1]) == new
    assert retained([old, new], versions) == (old, new)
    assert retained([old, new], versions[1:]) == (new,)
    assert serving([], versions[0]) is None


def test_files_are_hashed_once_and_every_damage_is_named(tmp_path: Path) -> None:
    base, fresh = tmp_path / "base", tmp_path / "fresh"
    (base / "bm25").mkdir(parents=True)
    (base / "bm25" / "a.idx").write_bytes(b"abc")
    (base / "bm25" / ".tantivy-meta.lock").touch()
    files = describe(base)
    assert list(files) == ["bm25/a.idx"]
    (fresh / "bm25").mkdir(parents=True)
    os.link(base / "bm25" / "a.idx", fresh / "bm25" / "a.idx")
    (fresh / "bm25" / "b.idx").write_bytes(b"")
    told = {"bm25/a.idx": (3, "told"), "bm25/b.idx": (0, "told")}
    again = describe(fresh, base, told)
    assert again["bm25/a.idx"] == (3, "told")  # the very file: taken at its word
    assert again["bm25/b.idx"] != (0, "told")
    assert not list(problems(base, files))
    (base / "bm25" / "a.idx").write_bytes(b"abd")
    assert "damaged" in next(problems(base, files))
    (base / "bm25" / "a.idx").write_bytes(b"ab")
    assert "2 bytes instead of 3" in next(problems(base, files))
    (base / "bm25" / "a.idx").unlink()
    assert "missing" in next(problems(base, files))


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match="choose from simple, bm25, dense"):
        generation.index_class("sparse")
    with pytest.raises(UsageError, match="choose from simple, bm25, dense, hybrid"):
        generation.check_kind("sparse")
    for kind in generation.INDEXES:
        assert generation.index_class(kind).kind == kind
