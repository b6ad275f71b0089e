"""Known-item questions: the first sentence of a documentation string asks for the object that it describes.

    json.dumps, "Serialize ``obj`` to a JSON formatted ``str``."   asks   "Serialize obj to a JSON formatted str."

The object's name is taken out, and what several objects say is not asked. The document holds the words of its question,
so these questions are easy for a search by words; they measure whether one object is told from all others like it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from nanochat.data.docstring_sources import Record

KINDS = ("module", "class", "function", "method", "attribute")
WORDS = range(5, 41)  # of a question
_CALL = re.compile(r"^[\w.]+\s*\(.*|^.* -> .*")  # how it is called, as texts of C functions begin
_END = re.compile(r"(?<=[.!?])\s+(?=[\"'`(A-Z])")
_MARKUP = re.compile(r":\w+:(?=`)|[`*]+|\s*\[\d+\](?=\.)")


def questions(records: Iterable[Record]) -> list[dict[str, Any]]:
    """A question for each record that can be asked for, in their order, in the form of questions.py without an id. The
    answer is the object's name."""
    asked = [(record, question_text(record)) for record in records if record.kind in KINDS]
    counts = Counter(text.lower() for _, text in asked)
    return [
        {
            "question": text,
            "answers": list(dict.fromkeys((record.name, record.name.rpartition(".")[2]))),
            "sentence": f"{record.name}: {first_sentence(record.text)}",
            "gold": [record.name],
        }
        for record, text in asked
        if text and counts[text.lower()] == 1
    ]


def question_text(record: Record) -> str:
    """The first sentence without the object's name; nothing when too few or too many words are left."""
    name = re.escape(record.name.rpartition(".")[2])
    text = re.sub(rf"(?<![\w.])(?:\w+\.)*{name}(?:\(\))?(?!\w)", " ", first_sentence(record.text), flags=re.IGNORECASE)
    text = re.sub(r"\s+(?=[.,;:!?])", "", " ".join(text.split())).strip(" ,;:-")
    return text if len(re.findall(r"[^\W\d_]{2,}", text)) in WORDS else ""


def first_sentence(text: str) -> str:
    """The first sentence of the first paragraph that is not about how the object is called, without markup."""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in paragraph.splitlines()]
        while lines and _CALL.match(lines[0]):
            del lines[0]
        if lines:
            return _END.split(" ".join(_MARKUP.sub("", " ".join(lines)).split()))[0]
    return ""
