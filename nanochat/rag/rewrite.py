"""Follow-up questions made whole: what a search needs to know of the conversation so far.

    "Who founded Torwick?"  "Mara Velt founded Torwick."  "Where was she born?"
    -> "Where was she born? Torwick Mara Velt"

No model is needed. A question lacks its *topic* when a pronoun stands for it, or when it names nothing itself; then the
names of earlier turns join the query. It lacks its *predicate* when it only continues ("And Orvane?") or holds nothing
but small words ("Why?"); then the content words of the question before join it. The word lists are English; a question
without a Latin letter is searched as it stands. `GroundedChat(rewrite=...)` takes any other function, for example a
model that writes queries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

from nanochat.errors import UsageError
from nanochat.retrieval.english import STOP_WORDS
from nanochat.tasks.task import message_text

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Rewriter: TypeAlias = Callable[[Messages], str]  # a conversation that ends with a question -> a query

MAX_CHARS = 2000  # of a question that goes into a query: of a longer one its beginning and end
MAX_NAMES = 8  # carried from earlier turns


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_PRONOUNS = _set("he she it they him her them his hers its their theirs himself herself itself themselves")
_POINTERS = _set("this that these those there one ones former latter same such other others the")
_FILLERS = _set(
    "tell know say me us please also else more again too yes no ok okay sure well now still really exactly like mean "
    "thing things stuff maybe perhaps let anything something get got would about"
)
_OPENERS = _set(  # words that begin a sentence with a capital and are no names
    "explain describe list give name show define compare find write summarize summarise answer question according "
    "today yesterday tomorrow can could may might must shall many much every another however because since although "
    "first second third finally next then thus hence sorry based let's i'm i'd i've i'll"
)
_SMALL_TALK = _set(
    "hello hi hey good morning evening afternoon night day thanks thank thx you very much bye goodbye great nice cool "
    "ok okay yes no please welcome a lot many so that is was how are fine well done perfect awesome see later there"
)
_CONTINUES = re.compile(r"\s*(and|or|but|also|then|what about|how about)\b", re.IGNORECASE)
_LATIN = re.compile("[A-Za-z]")
_WORD = re.compile(r"\w+(?:[.'’/-]\w+)*")
_JOINED = _set("of the de la van von der den du di da del")  # inside "Bank of Orvane"


@dataclass(frozen=True)
class Question:
    """What a question says by itself."""

    names: tuple[str, ...]
    content: tuple[str, ...]  # words that are neither names nor small words, lower case
    lacks_topic: bool
    lacks_predicate: bool
    is_small_talk: bool


def standalone(messages: Messages) -> str:
    """The query for the last question of a conversation: the question, and what it needs of earlier turns.

    Empty for a greeting, thanks or silence, which ask nothing. Raises UsageError when there is no question.
    """
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise UsageError("the conversation holds no message of the user: there is nothing to search for")
    names: list[str] = []
    content: list[str] = []
    for message in messages[:last]:
        if message["role"] == "assistant":
            names = _distinct([*names, *find_names(message_text(dict(message)))])
        elif message["role"] == "user":
            names, content = _follow(analyse(message_text(dict(message))), names, content)
    text = _shortened(message_text(dict(messages[last])).strip())
    question = analyse(text)
    if question.is_small_talk or not text:
        return ""
    if not _LATIN.search(text):
        return text
    return " ".join([text, *_missing(question, names, content, text)])


def _follow(question: Question, names: list[str], content: list[str]) -> tuple[list[str], list[str]]:
    """Names and content words that a later question may refer to, after this one."""
    if question.is_small_talk:
        return names, content
    kept = names if question.lacks_topic else []
    return _distinct([*kept, *question.names]), content if question.lacks_predicate else list(question.content)


def _missing(question: Question, names: list[str], content: list[str], text: str) -> list[str]:
    """What the question lacks and earlier turns have."""
    found: list[str] = []
    if question.lacks_topic:
        found += names[-MAX_NAMES:]
    if question.lacks_predicate or (question.lacks_topic and not names):
        found += content
    said = {word.lower() for word in _WORD.findall(text)}
    return [each for each in _distinct(found) if not {word.lower() for word in _WORD.findall(each)} <= said]


def analyse(text: str) -> Question:
    """Names and content words of a question, and what it lacks."""
    names = find_names(text)
    named = {word.lower() for name in names for word in _WORD.findall(name)}
    words = [word.lower().removesuffix("'s").removesuffix("’s") for word in _WORD.findall(text)]
    content = tuple(dict.fromkeys(w for w in words if w not in STOP_WORDS | _FILLERS | _PRONOUNS and w not in named))
    first_name = min((text.find(name) for name in names), default=len(text))
    # "Where did Mara Velt meet her husband?": a pronoun behind a name stands for that name
    before = {word.lower() for word in _WORD.findall(text[:first_name])}
    vague = len(content) < 3 or not _POINTERS.isdisjoint(words)
    no_topic = not _PRONOUNS.isdisjoint(before) or (not names and vague)
    # "Who is Mara Velt?" is whole without content words, "And Mara Velt?" and "Mara Velt?" are not
    short = not names or len(words) == len(named) or _CONTINUES.match(text) is not None
    is_small_talk = bool(words) and _SMALL_TALK.issuperset(words)
    return Question(tuple(names), content, no_topic, not content and short, is_small_talk)


def find_names(text: str) -> list[str]:
    """Names in a text, in order: runs of capitalised words ("Bank of Orvane"), and words that look like identifiers
    (`json.dumps`, `HTTPServer`, `max_len`)."""
    names: list[str] = []
    run: list[str] = []
    joined: list[str] = []  # small words since the last capitalised one
    end, may_begin = 0, True

    def close() -> None:
        if run:
            names.append(" ".join(run))
        run.clear()
        joined.clear()

    for match in _WORD.finditer(text):
        word, between = match[0], text[end : match.start()]
        starts_sentence = may_begin or any(mark in between for mark in ".!?:;\n\"“”(")
        if between.strip():
            close()
        end, may_begin = match.end(), False
        if _is_identifier(word) or (word[0].isupper() and not _is_common(word, starts_sentence)):
            run += [*joined, word.removesuffix("'s").removesuffix("’s")]
            joined.clear()
        elif run and word in _JOINED and len(joined) < 2:
            joined.append(word)
        else:
            close()
    close()
    return _distinct(names)


def _is_identifier(word: str) -> bool:
    letters = [c for c in word if c.isalpha()]
    inner_capital = any(a.islower() and b.isupper() for a, b in pairwise(word))
    dotted = "." in word and any(c.isalpha() for c in word)
    mixed = bool(letters) and any(c.isdigit() for c in word)
    return "_" in word.strip("_") or inner_capital or dotted or mixed or (len(letters) > 1 and word.isupper())


def _is_common(word: str, starts_sentence: bool) -> bool:
    """Whether a capitalised word is none of a name: the pronoun I, or a small word where a capital means nothing."""
    lower = word.lower().split("'")[0].split("’")[0]
    if lower in STOP_WORDS or lower in _PRONOUNS:
        return True
    return starts_sentence and (lower in _OPENERS or lower in _FILLERS or lower in _SMALL_TALK)


def _distinct(items: Iterable[str]) -> list[str]:
    """Each once, at the place where it was said last."""
    return list(dict.fromkeys(list(items)[::-1]))[::-1]


def _shortened(text: str) -> str:
    if len(text) <= MAX_CHARS:
        return text
    half = MAX_CHARS // 2
    return f"{text[:half]} {text[-half:]}"
