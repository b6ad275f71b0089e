"""Knowledge bases at size: building, memory, latency, changes and versions, with bm25s, tantivy, LanceDB and rank-bm25.

    python -m benchmarks.retrieval [--docs N] [--queries N] [--peers bm25s tantivy lancedb rank_bm25] [--skip dense ...]

N (1M) documents of about 60 words, drawn by Zipf's law (retrieval_data.py), and as many 384-d vectors, clustered with
isotropic noise (retrieval_vectors.py), are written to a temporary directory first. Every measured part then runs in a
process of its own, so that its peak of resident memory (with mapped files) is its own. Documents go in by one
`kb.add(generator)`; stop words are the 100 most frequent words. All times in ms unless they say s; queries of 4 words,
one at a time, 10 hits, ours with the documents' texts, peers with their ids. Columns:

    build s, MB     ours: documents, checksums and a version, fsynced (dense: given the vectors); peers: index on disk
    cpu s           of all threads, with imports; well below `build s`, it waited for the disk or for other processes
    open, first     opening, and then the first search, in a new process whose imports are done
    content         queries without stop words
    fused           hybrid: the same without the reranker that it has by default
    stop            queries as documents are drawn, two fifths stop words; the analyser knows them, a query drops them
    raw             the same queries, but nobody knows stop words: all four words are searched
    recall          of the exact ten nearest; `overlap`: of bm25s's ten for content queries
    fetch, probe    dense index alone: rows nominated by 1-bit codes, then compared exactly; lists visited (0: default)

Peers search the same words: unstemmed, no word left out, k1 = 1.2, b = 0.75 where that can be set; tantivy keeps only
row numbers (what the knowledge base adds to it is the ratio); bm25s uses numba where that is installed, `bm25s_numpy`
is its default; rank-bm25 gets at most 100,000 documents and 20 queries. The faster of two passes counts for each query.
Ratios; those named `_vs_` are the peer's time over ours, above 1 when ours is faster:

    bm25_p50_vs_<peer>, bm25_raw_p50_vs_<peer>, build_vs_<peer>     rank-bm25's from as many documents as it got
    dense_recall_at_10, hybrid_p50_ms, hybrid_fused_p50_ms          of content queries, without the embedding
    <kind>_add_1000_s         adding 1,000 documents and finding ten of them; also update and delete
    <kind>_old_vs_newest      p50 of the slowest earlier version over the newest's, after those changes (1 is best)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common import report

KINDS = ("bm25", "dense", "hybrid")
PEERS = {"bm25s": "bm25s", "tantivy": "tantivy", "lancedb": "lancedb", "rank_bm25": "rank-bm25"}  # module -> package
PEER_PARTS = {  # bm25s_numpy searches the index that bm25s built; rank-bm25 has no file format
    "bm25s": ("bm25s-build", "bm25s-query", "bm25s_numpy-query"),
    "tantivy": ("tantivy-build", "tantivy-query"),
    "lancedb": ("lancedb-build", "lancedb-query"),
    "rank_bm25": ("rank_bm25-query",),
}
SIDES = ("bm25s", "bm25s_numpy", "tantivy", "lancedb", "rank_bm25")
ROOT = Path(__file__).parents[1]

Results = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Knowledge bases at size")
    parser.add_argument("--docs", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--skip", nargs="*", choices=(*KINDS, "changes"), default=[], help="parts to leave out")
    parser.add_argument("--part", nargs=2, metavar=("NAME", "DIRECTORY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_here(args.part[0], Path(args.part[1]))
        return
    if args.docs < 100 or args.queries < 1:
        parser.error("at least --docs 100 and --queries 1")
    kinds = [kind for kind in KINDS if kind not in args.skip]
    with tempfile.TemporaryDirectory(prefix="nanochat-retrieval-") as folder:
        results = run_all(Path(folder), args, kinds, "changes" not in args.skip)
    report("retrieval", rows(results, args.docs), ratios(results))


def run_all(folder: Path, args: argparse.Namespace, kinds: list[str], changes: bool) -> Results:
    """Each part's figures by its name. A peer that is not installed, or that fails, is left out with a line."""
    config = {"docs": args.docs, "queries": args.queries, "vectors": bool({"dense", "hybrid"} & set(kinds))}
    (folder / "config.json").write_text(json.dumps(config))
    run("prepare", folder)
    results: Results = {}
    for kind in kinds:
        for step in ("build", "query", *(["changes"] if changes else [])):
            results[f"{kind}-{step}"] = run(f"{kind}-{step}", folder)
    for peer in args.peers:
        if find_spec(peer) is None:
            print(f"no {PEERS[peer]}: not installed (pip install {PEERS[peer]})")
            continue
        try:
            for part in PEER_PARTS[peer]:
                results[part] = run(part, folder)
        except RuntimeError as error:
            print(f"no {PEERS[peer]}: {error}")
    return results


def run(part: str, folder: Path) -> dict[str, Any]:
    """A part in a process of its own. Raises RuntimeError with the end of what it said when it fails."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.retrieval", "--part", part, str(folder)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{part} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    print(f"{part}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    result: dict[str, Any] = json.loads((folder / f"{part}.json").read_text())
    return result


def run_here(part: str, folder: Path) -> None:
    from benchmarks import retrieval_parts, retrieval_peers

    name, _, step = part.partition("-")
    owner = retrieval_peers.PARTS if name in SIDES else retrieval_parts.PARTS
    config = json.loads((folder / "config.json").read_text())
    (folder / f"{part}.json").write_text(json.dumps(owner[step or name](folder, config, name)))


def rows(results: Results, docs: int) -> list[dict[str, Any]]:
    """A line for each side, and for each setting of the dense index."""
    names = list(dict.fromkeys(part.partition("-")[0] for part in results))
    reference = results.get("bm25s-query", {}).get("top", [])
    found: list[dict[str, Any]] = []
    for name in names:
        merged = {**results.get(f"{name}-build", {}), **results.get(f"{name}-query", {})}
        top, settings = merged.pop("top", []), merged.pop("settings", [])
        row = {"side": name if name in SIDES else f"ours {name}", "docs": docs, **merged}
        if top and reference and row["docs"] == docs and name not in ("dense", "hybrid", "bm25s"):
            row["overlap"] = overlap(top, reference)
        found += [row, *settings]
    return found


def overlap(answers: list[list[str]], others: list[list[str]]) -> float:
    """Mean share of an answer's hits that the other side has too."""
    shares = [len(set(a) & set(b)) / len(b) for a, b in zip(answers, others) if b]
    return sum(shares) / len(shares) if shares else 0.0


def ratios(results: Results) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    ours = {**results.get("bm25-build", {}), **results.get("bm25-query", {})}
    for peer in SIDES:
        theirs = {**results.get(f"{peer}-build", {}), **results.get(f"{peer}-query", {})}
        if "content p50" not in ours or "content p50" not in theirs:
            continue
        found[f"bm25_p50_vs_{peer}"] = theirs["content p50"] / ours["content p50"]
        if "raw p50" in theirs:
            found[f"bm25_raw_p50_vs_{peer}"] = theirs["raw p50"] / ours["raw p50"]
        if "build s" in theirs:
            found[f"build_vs_{peer}"] = theirs["build s"] / ours["build s"]
    if "dense-query" in results:
        found["dense_recall_at_10"] = results["dense-query"]["recall"]
    if "hybrid-query" in results:
        found["hybrid_p50_ms"] = results["hybrid-query"]["content p50"]
        found["hybrid_fused_p50_ms"] = results["hybrid-query"]["fused p50"]
    for kind in KINDS:
        found |= {f"{kind}_{name}": value for name, value in results.get(f"{kind}-changes", {}).items()}
    return found


if __name__ == "__main__":
    main()
