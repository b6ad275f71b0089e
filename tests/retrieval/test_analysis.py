"""Terms: the same for documents and queries, whatever the text."""

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import UsageError
from nanochat.retrieval import english
from nanochat.retrieval.analysis import LANGUAGES, MAX_WORD_BYTES, Analyser, fold, prepare

ANY_TEXT = st.text(st.characters(), max_size=60)  # lone surrogates too


def test_a_document_keeps_its_stop_words_and_a_query_drops_them():
    analyser = Analyser()
    assert analyser.terms("The wings of Icarus") == ["the", "wing", "of", "icarus"]
    assert analyser.query_terms("What are the wings of an aircraft?") == ["wing", "aircraft"]
    assert analyser.query_terms("To be, or not to be") == ["to", "be", "or", "not", "to", "be"]
    assert analyser.query_terms("doesn't") == ["doesn", "t"], "nothing else remains"


@pytest.mark.parametrize("text", ["", " ", "?!", "\n\t", "\ud800", "\u0301", "()[]{}+-\"'*:^~\\/"])
def test_without_words_there_are_no_terms(text):
    assert Analyser().terms(text.replace("\ud800", "")) == Analyser().query_terms(text) == []


def test_accents_cases_and_forms_fall_together():
    analyser = Analyser()
    for text in ("RÉSUMÉ", "résumé", "re\u0301sume\u0301", "ｒésumé"):
        assert analyser.terms(text) == analyser.terms("resume")
    assert fold("straße") == "strasse"
    assert fold("Łódź".lower()) == "lodz"
    assert fold("ёлка") == "елка"
    assert Analyser(fold_accents=False).terms("résumé") != Analyser(fold_accents=False).terms("resume")
    assert Analyser(lower_case=False, stem=False).terms("Moon moon") == ["Moon", "moon"]


def test_scripts_without_spaces_are_cut_into_characters_and_pairs():
    found = set(Analyser().terms("東京都に行く"))
    assert set(Analyser().terms("東京")) <= found
    assert "猫" not in found
    assert Analyser().terms("हिन्दी भाषा") == ["हिन्दी", "भाषा"], "marks belong to their word"
    assert Analyser().terms("שָׁלוֹם עולם")[1] == "עולם"


def test_words_that_are_no_words_are_left_out():
    long = "x" * MAX_WORD_BYTES
    assert Analyser().terms(f"moon {long} {long[1:]}") == ["moon", long[1:]]
    assert Analyser().terms("é" * (MAX_WORD_BYTES // 2) + " é") == ["e"]


@given(ANY_TEXT)
def test_any_text_has_terms_that_an_index_can_hold(text):
    for analyser in (Analyser(), Analyser("none"), Analyser(stem=False, fold_accents=False, lower_case=False)):
        terms = analyser.terms(text)
        assert all(term and not re.search(r"\s", term) and term.encode() for term in terms)
        assert set(analyser.query_terms(text)) <= set(terms)
        assert bool(analyser.query_terms(text)) == bool(terms)


@given(st.text("abcXYZ09 .,-\n\x1c\x85", max_size=60))
def test_ascii_and_unicode_are_cut_alike(text):
    assert Analyser().terms(text + " é")[:-1] == Analyser().terms(text)


@given(ANY_TEXT)
def test_preparing_twice_changes_nothing_in_scripts_with_spaces(text):
    once = prepare(text)
    if not re.search("[\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f]", once):
        assert prepare(once) == once


def test_stemmer_equals_tantivys():
    """Both follow Snowball; made-up words reach the rules that no text in reach uses."""
    tantivy = pytest.importorskip("tantivy")
    reference = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.raw()).filter(tantivy.Filter.stemmer("english")).build()
    words = set()
    for file in Path(__file__).parents[2].glob("docs/*.md"):
        words.update(re.findall("[a-z]+", file.read_text().lower()))
    chance = random.Random(0)
    endings = ["s", "es", "ed", "ing", "ingly", "eed", "eedly", "y", "ly", "e", "ll", "ies", "ss"]
    endings += [*english._STEP2, *english._STEP3, *english._STEP4]
    beginnings = ["", "", "", "gener", "commun", "past", "inter", "organ", "later", "y"]
    for _ in range(20_000):
        middle = "".join(chance.choice("abcdeiouylrstnw") for _ in range(chance.randint(0, 5)))
        words.add(chance.choice(beginnings) + middle + chance.choice(endings) + chance.choice(["", *endings]))
    assert len(words) > 15_000
    assert [word for word in words if [english.stem(word)] != reference.analyze(word)] == []


@pytest.mark.parametrize("language", ["german", "french", "russian", "spanish", "arabic", "turkish"])
def test_other_languages(language):
    pytest.importorskip("tantivy")
    analyser = Analyser(language)
    words = {
        "german": ("das Haus und die Häuser", ["haus", "haus"]),
        "french": ("les maisons de la ville", ["maison", "vill"]),
        "russian": ("книги и книга", ["книг", "книг"]),
        "spanish": ("las casas de la ciudad", ["cas", "ciud"]),
    }
    if language in words:
        text, terms = words[language]
        assert analyser.query_terms(text) == terms
    assert analyser.query_terms("42") == ["42"]


@given(
    st.sampled_from((*LANGUAGES, "none")), st.booleans(), st.booleans(), st.none() | st.lists(ANY_TEXT, max_size=3)
)
def test_settings_come_back_from_json(language, stem, lower_case, stop_words):
    words = None if stop_words is None else tuple(stop_words)
    analyser = Analyser(language, stem, lower_case=lower_case, stop_words=words)
    assert Analyser.of(json.loads(json.dumps(analyser.settings()))) == analyser
    assert hash(Analyser.of(analyser.settings())) == hash(analyser)


def test_short_forms_of_settings():
    assert Analyser.of(None) == Analyser.of({}) == Analyser.of("english") == Analyser()
    assert Analyser.of({"stop_words": ["moon"]}).query_terms("the moon") == ["the"]


@pytest.mark.parametrize(
    "settings",
    ["klingon", {"language": "klingon"}, {"language": 3}, {"stem": "yes"}, {"stop_words": "the"}, {"stop_words": [1]},
     {"stop_words": 5}, {"stemm": True}, ["english"]],
)  # fmt: skip
def test_bad_settings_are_refused(settings):
    with pytest.raises(UsageError):
        Analyser.of(settings)


def test_a_full_table_of_words_is_emptied_not_wrong(monkeypatch):
    monkeypatch.setattr("nanochat.retrieval.analysis.MAX_KNOWN_WORDS", 3)
    text = "wings winged winging flies flying flown moons"
    assert Analyser().terms(text) == [english.stem(word) for word in text.split()]
