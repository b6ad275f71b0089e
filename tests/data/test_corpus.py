"""Corpora: every format, a fixed validation split, streaming from any start, one clear error for every damage."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.corpus import VAL_EVERY, Corpus, FileCorpus, WorldCorpus, dialogue_text, open_corpus
from nanochat.data.download import MAX_SHARD, shard_name
from nanochat.data.files import PIECE_MAX, PIECE_MIN, Faults, list_files, read_text
from nanochat.data.spec import split_spec
from nanochat.data.world import World
from nanochat.errors import NanochatError, UsageError

SHAKESPEARE = Path(__file__).parents[2] / ".." / "shared" / "data" / "text" / "tinyshakespeare.txt"
TEXTS = [f"Document number {i} says something of its own." for i in range(400)]


def both(corpus: Corpus) -> tuple[list[str], list[str]]:
    return list(corpus.documents("train")), list(corpus.documents("val"))


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    lines = "".join(json.dumps({field: t}) + "\n" for t in texts)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def write_parquet(path: Path, texts: list[str | None], column: str = "text", group: int = 50) -> Path:
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), path, row_group_size=group)
    return path


def check_resume(corpus: Corpus) -> None:
    for split in ("train", "val"):
        everything = list(corpus.documents(split))
        for start in (0, 1, len(everything) // 2, len(everything), len(everything) + 5):
            assert list(corpus.documents(split, start)) == everything[start:]


# Formats --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["text", "content"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_each_format_gives_all_documents(tmp_path: Path, name: str, field: str) -> None:
    (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name, TEXTS, field)
    for spec in (str(tmp_path), str(tmp_path / name)):
        corpus = open_corpus(spec)
        train, val = both(corpus)
        assert [t for t in TEXTS if t in set(train)] == train
        assert sorted(train + val) == sorted(TEXTS)
        assert 0 < len(val) < 30
        check_resume(corpus)
        check_resume(open_corpus(spec))


def test_a_directory_of_text_files(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS[:100]):
        folder = tmp_path / f"part{i % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"{i:03}.{('txt', 'md', 'rst')[i % 3]}").write_text(text)
    with gzip.open(tmp_path / "z.txt.gz", "wt") as file:
        file.write("the packed one")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("hidden")
    train, val = both(open_corpus(str(tmp_path)))
    assert sorted(train + val) == sorted([*TEXTS[:100], "the packed one"])


def test_the_validation_split_does_not_depend_on_the_other_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:200])
    _, val = both(open_corpus(str(tmp_path)))
    write_parquet(tmp_path / "b.parquet", TEXTS[200:])
    train_more, val_more = both(open_corpus(str(tmp_path)))
    assert val == [t for t in val_more if t in set(TEXTS[:200])]
    assert not set(train_more) & set(val_more)
    (tmp_path / "a.jsonl").rename(tmp_path / "z.jsonl")
    assert set(both(open_corpus(str(tmp_path)))[1]) == set(val_more)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_a_tiny_corpus_has_one_validation_document(tmp_path: Path, n: int) -> None:
    corpus = open_corpus(str(write_jsonl(tmp_path / "a.jsonl", TEXTS[:n])))
    train, val = both(corpus)
    assert len(val) == 1
    assert sorted(train + val) == sorted(TEXTS[:n])


def test_one_document_is_too_few(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("alone\n" * 20)
    with pytest.raises(NanochatError, match=r"only one document.*val=tail10"):
        list(open_corpus(str(path)).documents("train"))
    train, val = both(open_corpus(f"{path}?val=tail10"))
    assert "".join(train + val) == "alone\n" * 20


def test_white_space_is_no_document(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", " \n", *TEXTS[:5]])
    train, val = both(open_corpus(str(tmp_path)))
    assert sorted(train + val) == sorted(TEXTS[:5])


# Long texts -----------------------------------------------------------------------------------------------------------


SNIPPETS = ["word ", "é", "\n", "\n\n", "x" * 5000, "\r\n\r\n", "日本語" * 900, "🙂" * 700]


@given(st.lists(st.sampled_from(SNIPPETS), max_size=60))
@settings(max_examples=40, deadline=None)
def test_pieces_join_to_the_text(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes("".join(parts).encode())
    pieces = list(read_text(path, Faults()))
    assert "".join(pieces) == "".join(parts)
    assert all(len(p.encode()) <= PIECE_MAX for p in pieces)
    assert all(len(p.encode()) > PIECE_MIN for p in pieces[:-1])


def test_pieces_end_at_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"Paragraph {i}. {'word ' * 100}\n\n" for i in range(200)))
    pieces = list(read_text(path, Faults()))
    assert len(pieces) > 10
    assert all(p.startswith("Paragraph") and p.endswith("\n\n") for p in pieces)


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert list(read_text(tmp_path / "a.txt", Faults())) == ["hello"]


def test_the_tail_is_cut_where_nanogpt_cuts(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(5000))
    (tmp_path / "a.txt").write_text(text)
    corpus = open_corpus(f"{tmp_path / 'a.txt'}?val=tail10")
    train, val = both(corpus)
    assert "".join(train) == text[: int(len(text) * 0.9)]
    assert "".join(val) == text[int(len(text) * 0.9) :]
    check_resume(corpus)


def test_the_tail_never_cuts_a_character(tmp_path: Path) -> None:
    for n in range(10, 30):
        (tmp_path / "a.txt").write_text("é日🙂" * n, encoding="utf-8")
        train, val = both(open_corpus(f"{tmp_path / 'a.txt'}?val=tail33"))
        assert "".join(train) + "".join(val) == "é日🙂" * n


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="shared data not there")
def test_tinyshakespeare() -> None:
    text = SHAKESPEARE.read_text()
    _, val = both(open_corpus(f"{SHAKESPEARE}?val=tail10"))
    assert "".join(val) == text[int(len(text) * 0.9) :]
    train, val = both(open_corpus(str(SHAKESPEARE)))
    assert len(train) + len(val) > 100
    assert len(val) >= 1


# Damage ---------------------------------------------------------------------------------------------------------------


def fails(spec: str | Path, message: str, kind: type[NanochatError] = NanochatError) -> None:
    with pytest.raises(kind, match=message):
        both(open_corpus(str(spec)))


def test_missing_and_empty_directories(tmp_path: Path) -> None:
    fails(tmp_path / "none", "no such file or directory", UsageError)
    fails(tmp_path, "the directory is empty", UsageError)
    (tmp_path / "a.png").write_bytes(b"x")
    fails(tmp_path, r"none of its 1 files.*\.txt", UsageError)
    fails(tmp_path / "a.png", "cannot tell how to read it", UsageError)


def test_only_unreadable_files(tmp_path: Path) -> None:
    os.symlink(tmp_path / "gone", tmp_path / "a.txt")
    fails(tmp_path, r"a\.txt: cannot be read")
    fails(f"{tmp_path}?on_error=skip", "no text in any of its 1 files; 1 damaged")


def test_links_in_circles_and_to_the_same_file_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "text.txt").write_text(TEXTS[0])
    (tmp_path / "b" / "deep" / "more.rst").write_text(TEXTS[1])
    os.symlink(tmp_path, tmp_path / "b" / "deep" / "up", target_is_directory=True)
    os.symlink(tmp_path / "b", tmp_path / "a", target_is_directory=True)
    os.symlink("text.txt", tmp_path / "b" / "again.txt")
    os.symlink("itself.txt", tmp_path / "b" / "circle.txt")
    assert [str(p.relative_to(tmp_path)) for p in list_files(tmp_path)] == [
        "a/again.txt", "a/circle.txt", "a/deep/more.rst"
    ]  # fmt: skip
    os.symlink("circle.txt", tmp_path / "b" / "itself.txt")
    fails(tmp_path, r"\.txt: cannot be read")
    train, val = both(open_corpus(f"{tmp_path}?on_error=skip"))
    assert sorted(train + val) == sorted(TEXTS[:2])


def test_manual_pages_pipes_and_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "man3").mkdir()
    (tmp_path / "man3" / "ls.3pm.gz").write_bytes(gzip.compress(b".TH LS 3\nlists things"))
    (tmp_path / "man3" / "other.1").write_text("of another section")
    (tmp_path / "lib.so.3").write_bytes(b"\x7fELF")
    (tmp_path / "empty.md").write_text("")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")
    assert [p.name for p in list_files(tmp_path)] == ["empty.md", "ls.3pm.gz"]
    (tmp_path / "plain.rst").write_text("of its own")
    train, val = both(open_corpus(str(tmp_path)))
    assert sorted(train + val) == [".TH LS 3\nlists things", "of its own"]
    (tmp_path / "wide.txt").write_bytes("of Windows".encode("utf-16-le"))
    fails(tmp_path, r"wide\.txt: not text, a zero at byte 1")


def test_no_text_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    fails(tmp_path, "no text in any of its 1 files")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut of', "line 3: not valid JSON"),
        ("[1]", "line 3: expected a JSON object, got list"),
        ('{"title": "x"}', "line 3: no field 'text' or 'content' .it has 'title'"),
        ('{"text": 5}', "line 3: 'text' is int, not text"),
        ('{"text": null}', "line 3: 'text' is NoneType, not text"),
        ('{"text": "a\\ud800b"}', r"line 3: 'text' holds a lone surrogate \(U\+D800\) at character 1"),
    ],
)
def test_damaged_lines_are_named_or_skipped(tmp_path: Path, line: str, message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:2])
    path.write_text(path.read_text() + line + "\n" + json.dumps({"text": "after it"}) + "\n")
    fails(path, rf"a\.jsonl, {message}.*on_error=skip")
    corpus = open_corpus(f"{path}?on_error=skip")
    assert isinstance(corpus, FileCorpus)
    train, val = both(corpus)
    assert corpus.n_skipped == 1
    assert sorted(train + val) == sorted([*TEXTS[:2], "after it"])


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine " * 2000 + b"\xff rest")
    fails(tmp_path, r"a\.txt: not UTF-8 at byte 10000 \(0xff\)")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    fails(tmp_path, r"b\.jsonl, line 2: not UTF-8 at byte 10 of the line")


def test_deep_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n' + "[" * 100_000 + "\n")
    fails(tmp_path, r"line 2: not valid JSON \(nested too deeply\)")


def test_damaged_packed_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl.gz", TEXTS)
    path.write_bytes(path.read_bytes()[:-200])
    fails(path, r"a\.jsonl\.gz: cannot be read")
    path.write_bytes(b"no gzip at all")
    fails(path, r"a\.jsonl\.gz: cannot be read")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    fails(tmp_path, r"a\.parquet: cannot be read")
    path.write_bytes(b"")
    fails(tmp_path, r"a\.parquet: cannot be read")
    path.write_bytes(whole[:100] + b"\xff" * 2000 + whole[2100:])
    fails(tmp_path, r"a\.parquet")
    write_parquet(path, TEXTS, column="body")
    fails(tmp_path, r"a\.parquet: no column 'text' or 'content' \(it has 'body'\)")
    write_parquet(path, [*TEXTS[:70], None, *TEXTS[70:]])
    fails(tmp_path, r"a\.parquet, row 71: 'text' is NoneType")


def test_a_damaged_shard_is_skipped_and_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    write_parquet(tmp_path / "c.parquet", ["no such"], column="body")
    corpus = open_corpus(str(tmp_path), on_error="skip")
    assert isinstance(corpus, FileCorpus)
    assert len(list(corpus.documents("train"))) > 300
    assert corpus.n_skipped == 2


# The public shards ----------------------------------------------------------------------------------------------------


def test_the_last_shard_is_for_validation(tmp_path: Path) -> None:
    write_parquet(tmp_path / shard_name(0), TEXTS[:120])
    write_parquet(tmp_path / shard_name(1), TEXTS[120:200])
    write_parquet(tmp_path / shard_name(MAX_SHARD), TEXTS[200:])
    corpus = open_corpus(f"climbmix:path={tmp_path}")
    assert both(corpus) == (TEXTS[:200], TEXTS[200:])
    check_resume(corpus)


def test_one_shard_is_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(tmp_path / shard_name(0), TEXTS)
    train, val = both(open_corpus(f"climbmix:path={tmp_path}"))
    assert sorted(train + val) == sorted(TEXTS)
    assert val
    assert f"one document in {VAL_EVERY}" in caplog.text


def test_no_shards_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DATA", str(tmp_path / "data"))
    fails("climbmix", "nanochat download -n 8", UsageError)


# The world ------------------------------------------------------------------------------------------------------------


def test_world_corpus_is_every_document_once_and_dialogues() -> None:
    corpus = open_corpus("world:seed=2,known=50,wordings=4,dialogues=0.2")
    assert isinstance(corpus, WorldCorpus)
    train, val = both(corpus)
    world = World(seed=2, n_known=50)
    documents = [d["content"] for d in world.documents("known", wordings=4)]
    chats = [t for t in train if t.startswith("User: ")]
    assert sorted(t for t in train if t not in chats) == sorted(documents)
    assert [t for t in train if t not in chats] != documents
    assert len(chats) == 50
    assert dialogue_text(world.dialogue(0)) in chats
    assert len(val) == 50
    assert not set(val) & set(train)
    check_resume(corpus)
    assert both(open_corpus("world:seed=2,known=50,wordings=4,dialogues=0.2")) == (train, val)


def test_world_is_the_default_world() -> None:
    assert open_corpus("world").name == WorldCorpus(World()).name


# Specs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("world:knwon=5", "unknown option 'knwon'; did you mean 'known'"),
        ("world:known=many", "known='many' is not a whole number"),
        ("world:known", "expected key=value, got 'known'"),
        ("world:known=50,known=60", "'known' is given twice"),
        ("world:known=50,dialogues=1", r"must be in \[0, 1\)"),
        ("world:known=50,wordings=0", "wordings=0"),
        ("wrold", "did you mean 'world'"),
        ("", "no such file"),
        (f"{__file__}?val=tail10", "val=tail needs one plain text file"),
        (f"{__file__}?tail", "expected key=value after"),
        (f"{__file__}?vla=hash", "did you mean 'val'"),
        (f"{__file__}?val=random", "'hash' or 'tailN'"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_corpus(spec)


def test_bad_splits_and_tails(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(NanochatError, match="1 bytes are too few"):
        open_corpus(f"{tmp_path / 'a.txt'}?val=tail10")
    with pytest.raises(UsageError, match="between 0 and 100"):
        open_corpus(f"{tmp_path / 'a.txt'}?val=tail100")
    with pytest.raises(UsageError, match="'train' or 'val'"):
        list(open_corpus("world").documents("test"))
    with pytest.raises(UsageError, match="on_error must be"):
        open_corpus(str(tmp_path), on_error="ignore")


def test_spec_grammar() -> None:
    assert split_spec("a") == ("a", {})
    assert split_spec("a:b=c, d = e=f,") == ("a", {"b": "c", "d": "e=f"})
