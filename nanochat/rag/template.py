"""Queries by template: a second hop without a model that writes one, and which of its hits to show.

A question of two hops names one end of the chain. What its first documents name is where the chain goes on, and what
the question says beside their titles is what it still asks:

    "Where was the founder of Torwick born?"   finds Torwick: "… was founded by Mara Velt …"
    "Where was the founder of born? Mara Velt …"
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nanochat.rag.multihop import Asking
from nanochat.rag.rewrite import find_names
from nanochat.retrieval.document import Hit

MAX_NAMES = 12  # of a document that go into a query
_WORD = re.compile(r"\w+")
_QUALIFIER = re.compile(r"\s*\([^)]*\)$")  # "Rush (band)"


def template_query(asking: Asking) -> str:
    """The question first; then, for one shown document after the other, best first: the words of the question that its
    title lacks, and the names in its text that the question lacks. Nothing when there is no document left."""
    question = asking.question or asking.written
    if not asking.hops:
        return question
    shown = [document for hop in asking.hops for document in hop.documents]
    if len(asking.hops) > len(shown):
        return ""
    document = shown[len(asking.hops) - 1]
    asked, title = _words(question), _words(document.title)
    rest = [word for word in question.split() if not _words(word) <= title]
    names = [name for name in find_names(document.content) if not _words(name) <= asked]
    return " ".join([*rest, *names[:MAX_NAMES]])


def named_first(asking: Asking, hits: Sequence[Hit], first: int = 2, later: int = 1) -> list[Hit]:
    """Hits whose title the question names come first, then those whose title a shown document names (as a link of an
    encyclopedia would), then the others; of these `first` in the first hop and `later` in each other one."""
    found = " ".join(document.content for hop in asking.hops for document in hop.documents).lower()
    question = (asking.question or asking.written).lower()

    def known(hit: Hit) -> int:
        title = _QUALIFIER.sub("", hit.document.title).lower()
        return 2 * (title in question) + (title in found) if title else 0

    return sorted(hits, key=known, reverse=True)[: later if asking.hops else first]


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
