"""Citations: how an answer names the documents of its prompt, and how they are read, checked and shown.

The model writes `<|cite_start|> Mara Velt2<|cite_end|>`, the heading of document 2 of its own prompt, before the
sentence that rests on it. The name counts: a citation of somebody whom no document is about names none, whatever its
number. Read from token ids, so text that merely looks like a citation is none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.data.answers import ABSTENTION
from nanochat.retrieval.document import Document
from nanochat.tokenizer import Tokenizer

_NUMBER = re.compile(r"(?<![0-9])[0-9]{1,4}$")


@dataclass(frozen=True)
class Sentence:
    """A stretch of the answer and the documents (numbers from 1) that were cited right before it."""

    text: str
    cited: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """What the model said: its sentences, whether it abstained, and citations that name no document. `adrift`: one of
    these stands before its first words, so that they rest on something that was not found."""

    sentences: tuple[Sentence, ...]
    abstained: bool
    invalid: tuple[str, ...]
    adrift: bool = False

    @property
    def text(self) -> str:
        """The answer without its citations."""
        return " ".join(sentence.text for sentence in self.sentences if sentence.text)

    @property
    def citations(self) -> tuple[int, ...]:
        """Numbers of the documents that are cited, in order of first mention."""
        return tuple(dict.fromkeys(number for sentence in self.sentences for number in sentence.cited))

    @property
    def unfounded(self) -> bool:
        """It cites, and only what is not there."""
        return bool(self.invalid) and not self.citations

    def render(self) -> str:
        """The text with citations as [n], each behind its sentence."""
        shown = (s.text + "".join(f" [{n}]" for n in s.cited) for s in self.sentences if s.text)
        return " ".join(shown)


ABSTAINED = Answer((Sentence(ABSTENTION, ()),), True, ())  # what is said where the model is not asked or not believed


def number_of(label: str) -> int:
    """The number at the end of what stands in a citation; 0 for none."""
    found = _NUMBER.search(label.strip())
    return int(found[0]) if found else 0


def resolve(label: str, headings: Sequence[str]) -> int:
    """The number of the document that a citation names; 0 for none. `headings`: of the documents (`prompt.heading`).

    A whole heading, or a name that only one document has, whatever the number behind it: models copy names better than
    they tell their places. A bare number names its document. Another name names none.
    """
    label, known = label.strip(), [heading.strip() for heading in headings]
    if label in known:
        return known.index(label) + 1
    name, number = _name(label), number_of(label)
    if not name:
        return number if number <= len(known) else 0
    alike = [i for i, heading in enumerate(known, 1) if _name(heading) == name]
    return alike[0] if len(alike) == 1 else 0


def headings_in(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The headings of the documents in a prompt or a result."""
    start, end = tokenizer.special("doc_start"), tokenizer.special("doc_title_end")
    found: list[str] = []
    begun: int | None = None
    for at, token in enumerate(ids):
        if token == start:
            begun = at + 1
        elif token == end and begun is not None:
            found.append(tokenizer.decode(ids[begun:at]))
            begun = None
    return found


def _name(label: str) -> str:
    """What stands before the number."""
    return _NUMBER.sub("", label).rstrip(": ")


def parse(ids: Sequence[int], tokenizer: Tokenizer, headings: Sequence[str]) -> Answer:
    """Read an answer from the ids that the model produced (an end token may be among them).

    A citation holds until the next one; several in a row count together. One that names none of the documents with
    these `headings` (see `resolve`) is invalid. What an abstention looked at before is no citation.
    """
    start, end, abstain = (tokenizer.special(name) for name in ("cite_start", "cite_end", "abstain"))
    sentences: list[Sentence] = []
    invalid: list[str] = []
    cited: list[int] = []
    text: list[int] = []
    inside: list[int] | None = None
    abstained = adrift = False

    def close() -> None:
        said = tokenizer.decode(text).strip()
        if said:
            sentences.append(Sentence(said, tuple(dict.fromkeys(cited))))
            cited.clear()
        text.clear()

    for token in ids:
        if token == start:
            close()
            inside = []
        elif token == end and inside is not None:
            label = tokenizer.decode(inside).strip()
            number = resolve(label, headings)
            if number:
                cited.append(number)
            else:
                invalid.append(label)
                adrift |= not (sentences or text)
            inside = None
        elif inside is not None:
            inside.append(token)
        elif token == abstain and not (sentences or text):  # later it would be rambling
            abstained, adrift = True, False
            cited.clear()
            invalid.clear()
        elif not tokenizer.is_special(token):
            text.append(token)
    if inside is not None:
        invalid.append(tokenizer.decode(inside).strip())
    close()
    return Answer(tuple(sentences), abstained, tuple(invalid), adrift)


def sources(answer: Answer, documents: Sequence[Document]) -> list[str]:
    """One line for each cited document: `[2] Title (source)`."""
    lines = []
    for number in answer.citations:
        document = documents[number - 1]
        where = f" ({document.source})" if document.source else ""
        lines.append(f"[{number}] {document.title or document.id}{where}")
    return lines
