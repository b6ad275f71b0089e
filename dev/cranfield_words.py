"""nDCG@10 of the word indexes on Cranfield under several analysers: python dev/cranfield_words.py DIRECTORY

DIRECTORY holds cran.all.1400, cran.qry and cranqrel. The table in docs/knowledge-bases.md comes from here.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from nanochat.retrieval import metrics
from nanochat.retrieval.analysis import Analyser
from nanochat.retrieval.bm25 import BM25Index
from nanochat.retrieval.document import Batch
from nanochat.retrieval.formats import cranfield
from nanochat.retrieval.simple import SimpleIndex

LUCENE_STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
ANALYSERS = {
    "default": Analyser(),
    "Lucene's 33 stop words": Analyser(stop_words=tuple(LUCENE_STOP_WORDS.split())),
    "no stop words": Analyser(stop_words=()),
    "no stemming": Analyser(stem=False),
    "neither": Analyser("none"),
}


def main(directory: str) -> None:
    collection = cranfield(directory)
    texts = {
        "title, content": [document.text for document in collection.documents],
        "title twice": [f"{document.title}\n{document.text}" for document in collection.documents],
        "content only": [document.content for document in collection.documents],
    }
    print("| index | text | analyser | nDCG@10 |\n| --- | --- | --- | --- |")
    for kind in (BM25Index, SimpleIndex):
        for field, contents in texts.items():
            for name, analyser in ANALYSERS.items():
                if field != "title, content" and name != "default":
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    place = Path(folder, "index")
                    kind.write(place, {"analyser": analyser.settings()}, [Batch(np.arange(len(contents)), contents)])
                    found = kind.open(place, {}).search(list(collection.queries.values()), 10)
                run = {
                    query: [collection.documents[row].id for row in result.rows.tolist()]
                    for query, result in zip(collection.queries, found)
                }
                value = metrics.measure(collection.qrels, run, ["ndcg@10"])["ndcg@10"].value
                print(f"| {kind.kind} | {field} | {name} | {value:.4f} |")


if __name__ == "__main__":
    main(sys.argv[1])
