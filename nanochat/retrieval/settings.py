"""Settings of the commands of `nanochat retrieval`, a class each; commands.py runs them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class IngestSettings:
    """What reading documents has in common."""

    documents: tuple[str, ...] = ()
    """JSONL files (.jsonl, .jsonl.gz), directories of them, a BEIR folder, or Cranfield's folder"""
    on_error: str = "raise"
    """a line that is no document: raise (stop and name it) or skip (leave it out and count it)"""
    commit_every: int | None = None
    """documents a version; an interrupted ingestion goes on after the last one (default: 1,000,000, or 100,000 where
    they are embedded)"""


@dataclass(frozen=True)
class BuildSettings(IngestSettings):
    """Make a knowledge base of documents: nanochat retrieval build --documents FILE --output DIR

    When DIR holds one of the same settings, the documents that it lacks are added: so an interrupted call goes on."""

    output: str = ""
    """directory of the knowledge base"""
    type: str = "hybrid"
    """simple (TF-IDF), bm25, dense, or hybrid (bm25 and dense)"""
    embedder: str = ""
    """of dense and hybrid: minilm (the default), minilm-fp32, hashed:256, a directory, sentence-transformers:NAME"""
    language: str = "english"
    """whose stemmer and stop words apply, or none"""
    chunk_words: int = 200
    """longer documents are cut into passages of so many words (0: never)"""
    overlap_words: int = 40
    """words that neighbouring passages share"""
    fusion: str = "weighted"
    """hybrid: how the two rankings become one, weighted or rrf"""
    on_duplicate: str = "skip"
    """a document with title, content and metadata of another one: skip, keep or raise"""


@dataclass(frozen=True)
class UpdateSettings(IngestSettings):
    """Add documents, and replace those with the same id: nanochat retrieval update KB FILE ..."""

    kb: str = ""
    """directory of the knowledge base"""


@dataclass(frozen=True)
class AddSettings(UpdateSettings):
    """Add documents; those that are there already stay: nanochat retrieval add KB FILE ..."""

    on_duplicate: str = "skip"
    """a document with title, content and metadata of another one: skip, keep or raise"""


@dataclass(frozen=True)
class DeleteSettings:
    """Delete documents; earlier versions keep them: nanochat retrieval delete KB ID ..."""

    kb: str = ""
    """directory of the knowledge base"""
    ids: tuple[str, ...] = ()
    """ids of the documents"""


@dataclass(frozen=True)
class ListSettings:
    """What all reading commands have in common."""

    kb: str = ""
    """directory of the knowledge base"""
    json: bool = False
    """print JSON instead of a table"""


@dataclass(frozen=True)
class ReadSettings(ListSettings):
    """What commands about one version have in common."""

    at: str = ""
    """an earlier version, by number or tag (default: the newest)"""


@dataclass(frozen=True)
class FindSettings(ReadSettings):
    """What searching and evaluating have in common."""

    k: int | None = None
    """passages to find (default: 5; for an evaluation as many as its metrics look at)"""
    mode: str = ""
    """one index of a hybrid knowledge base: bm25 or dense (default: both)"""
    filter: tuple[str, ...] = ()
    """conditions on metadata, all of which must hold: lang=en year>=1990 part!=draft, or a filter as JSON"""
    reranker: str = "auto"
    """auto (feedback for hybrid searches), none, feedback (needs no model), or cross-encoder:DIRECTORY"""


@dataclass(frozen=True)
class SearchSettings(FindSettings):
    """Search: nanochat retrieval search KB QUERY"""

    query: tuple[str, ...] = ()
    """words to search for"""
    queries: str = ""
    """a file of queries instead: JSONL, TSV, TREC topics or Cranfield's"""
    unique: bool = False
    """only the best passage of each document"""
    normalize: str = ""
    """scores from 0 to 1 by minmax, max or rank (default: as the index gives them)"""
    full: bool = False
    """print passages whole"""


@dataclass(frozen=True)
class EvaluateSettings(FindSettings):
    """Measure a knowledge base: nanochat retrieval evaluate --kb KB --queries FILE --qrels FILE"""

    queries: str = ""
    """a file of queries: JSONL, TSV, TREC topics or Cranfield's"""
    qrels: str = ""
    """a file of judgements: TREC, BEIR, Cranfield's, or JSONL with gold (default: the file of queries)"""
    metrics: tuple[str, ...] = ()
    """recall@K, precision@K, mrr, ndcg@K, all_gold@K, any_gold@K (default: a selection at 10)"""
    run_file: str = ""
    """write the rankings there, in TREC's format"""
    seed: int = 0
    """of the bootstrap behind the intervals"""


@dataclass(frozen=True)
class GetSettings:
    """Print a whole document as a line of JSONL: nanochat retrieval get KB ID"""

    kb: str = ""
    """directory of the knowledge base"""
    id: str = ""
    """id of the document"""
    at: str = ""
    """an earlier version, by number or tag (default: the newest)"""


@dataclass(frozen=True)
class TagSettings:
    """Name a version, so that it can be searched by that name and is kept: nanochat retrieval tag KB NAME"""

    kb: str = ""
    """directory of the knowledge base"""
    name: str = ""
    """the name; a name that exists moves"""
    at: str = ""
    """the version, by number or another tag (default: the newest)"""
    delete: bool = False
    """take the name away instead"""


@dataclass(frozen=True)
class CompactSettings:
    """Forget earlier versions and what only they hold; tagged ones stay: nanochat retrieval compact KB"""

    kb: str = ""
    """directory of the knowledge base"""
    keep: int = 1
    """latest versions to keep"""


@dataclass(frozen=True)
class ReindexSettings:
    """Build the indexes anew from the stored documents; mends damaged indexes: nanochat retrieval reindex KB"""

    kb: str = ""
    """directory of the knowledge base"""
    embedder: str = ""
    """another embedder (see build)"""
    language: str = ""
    """another language (see build)"""
