"""Markdown for the page: what is shown, and what hostile texts cannot do."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import UsageError
from nanochat.serving import formulas
from nanochat.serving.markdown import MAX_TEXT, render

ELEMENTS = set(
    [
        "p",
        "br",
        "hr",
        "h3",
        "h4",
        "h5",
        "h6",
        "strong",
        "em",
        "s",
        "code",
        "pre",
        "blockquote",
        "ul",
        "ol",
        "li",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "a",
        "span",
        "div",
    ]
)
ATTRIBUTES = {"href", "title", "target", "rel", "class", "data-citation", "data-language", "aria-label", "tabindex"}
ATTRIBUTES |= {"role", "start", "align"}
ELEMENTS |= set(formulas.TAGS.split())
ATTRIBUTES |= set().union(*formulas.ATTRIBUTES.values())


class Reader(HTMLParser):
    """Elements, attributes and text as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def text_of(html: str) -> str:
    return Reader(html).text.strip()


def is_harmless(html: str) -> bool:
    for tag, attributes in Reader(html).found:
        link = attributes.get("href") or "#"
        if tag not in ELEMENTS or not set(attributes) <= ATTRIBUTES:
            return False
        if (
            not link.startswith(("#source-", "http://", "https://", "mailto:", "#", "/", "?"))
            and ":" in link.split("/")[0]
        ):
            return False
    return True


def test_what_chats_use_is_rendered():
    html = render("# Title\n\n**bold** _it_ ~~no~~ `code`\nsecond line\n\n1. one\n2. two\n\n> quote\n\n---\n")
    for part in (
        "<h3>Title</h3>",
        "<strong>bold</strong>",
        "<em>it</em>",
        "<s>no</s>",
        "<code>code</code><br>",
        "<li>one</li>",
    ):
        assert part in html
    assert "<blockquote>" in html
    assert "<hr>" in html


def test_headings_stand_below_those_of_the_page():
    assert render("###### deep") == "<h6>deep</h6>\n"
    assert "<h4>" in render("Two\n---")


def test_tables_can_be_scrolled_and_keep_their_alignment():
    html = render("| a | b |\n|:-:|--:|\n| 1 | 2 |")
    assert html.startswith('<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>')
    assert '<th align="center">a</th>' in html
    assert '<td align="right">2</td>' in html
    assert "style" not in html


def test_code_is_coloured_by_known_languages_only():
    assert '<span class="k">def</span>' in render("```python\ndef f(): pass\n```")
    assert 'data-language="python"' in render("```Python\nx\n```")
    for language in ("brainfuck", "", "pyth on", "x" * 99, '"><script>'):
        html = render(f"```{language}\n<b>&\n```")
        assert "<span" not in html
        assert "&lt;b&gt;&amp;" in html
    assert "<span" not in render("```python\n" + "x = 1\n" * 5000 + "```")


def test_code_keeps_every_character():
    code = "\n\n  a\t<b> [1]\n# x\n\n"
    for language in ("python", "", "html"):
        assert Reader(render(f"```{language}\n{code}```", [1])).text.rstrip("\n") == code.rstrip("\n")


def test_citations_become_links_where_text_stands():
    html = render("Mara did. [1] [2] Not [3]. `[1]` and [1](http://x.org).\n\n```\n[1]\n```", {1, 2})
    assert html.startswith('<p>Mara did.<a class="citation" href="#source-1" data-citation="1" aria-label="Source 1"')
    assert html.count("data-citation") == 2
    assert "Not [3]." in html
    assert "<code>[1]</code>" in html


def test_a_list_of_sources_is_no_definition():
    assert text_of(render("[1]: Torwick (towns.jsonl)")) == "[1]: Torwick (towns.jsonl)"


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        '<img src=x onerror="alert(1)">',
        "[x](javascript:alert(1))",
        "[x](JaVaScRiPt&#58;alert(1))",
        "[x](data:text/html;base64,PHNjcmlwdD4=)",
        "[x](vbscript:x)",
        "<javascript:alert(1)>",
        '[x](http://a.org "onmouseover=alert(1)")',
        '[x](http://a.org/"onmouseover="alert)',
        "![x](javascript:alert(1))",
        '```"><img src=x onerror=alert(1)>\nx\n```',
        "| <svg onload=alert(1)> |\n|--|\n| <style>*{}</style> |",
        "<details open ontoggle=alert(1)>",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "<a href='x' class='citation' data-citation='1'>1</a>",
        "\u202e<b>\u0000</b>",
    ],
)
def test_hostile_texts_stay_texts(text):
    html = render(text, [1])
    assert is_harmless(html)
    assert 'class="citation"' not in html


def test_images_are_links_that_nobody_fetches():
    html = render("![a cat](https://e.org/x.png?secret=1)")
    assert "<img" not in html
    assert text_of(html) == "[picture: a cat]"
    assert 'rel="noopener noreferrer nofollow"' in html
    assert 'target="_blank"' in html


def test_links_leave_no_trace():
    assert 'target="_blank" rel="noopener noreferrer nofollow"' in render("[x](https://e.org)")
    assert render("https://e.org") == "<p>https://e.org</p>\n"


@given(st.text(max_size=200), st.sets(st.integers(0, 12), max_size=4))
def test_any_text_is_harmless(text, citations):
    assert is_harmless(render(text, citations))


PIECES = [
    "<",
    ">",
    '"',
    "'",
    "[",
    "](",
    ")",
    "!",
    "`",
    "```",
    "\n",
    "\n\n",
    "javascript:",
    "x",
    "|",
    "|-|",
    "*",
    "_",
    "&#58;",
    "#",
    "http://e",
]


@given(
    st.lists(st.sampled_from([*PIECES, "<a ", "onload=", "[1]", "<!--", "\\", "~~", "data:", " "]), max_size=60).map(
        "".join
    )
)
def test_any_markup_is_harmless(text):
    assert is_harmless(render(text, [1]))


def test_half_characters_and_nul_are_replaced():
    assert text_of(render("a\ud800b\0c")) == "a\ufffdb\ufffdc"


@pytest.mark.parametrize(
    "text",
    [
        ">" * 5000,
        "[" * 5000,
        "*a " * 4000,
        "`" * 5001,
        "- " * 3000,
        "![" * 3000,
        "<" * 5000,
        "[1]" * 3000,
        "a\n" * 9000,
        "|" * 3000,
    ],
)
def test_hostile_nesting_ends(text):
    assert is_harmless(render(text, [1]))  # a wrong rule takes minutes


def test_too_long_a_text_is_refused():
    assert render("a" * MAX_TEXT)
    with pytest.raises(UsageError, match="200,001 characters"):
        render("a" * (MAX_TEXT + 1))


def test_the_page_asks_for_many_texts_at_once(client):
    """The route behind the page."""

    def ask(items):
        return client.post("/ui/markdown", json={"items": items})

    answer = ask([{"text": "*a* [1]", "citations": [1]}, {"text": "<b>"}])
    assert answer.json() == {"html": [render("*a* [1]", [1]), "<p>&lt;b&gt;</p>\n"]}
    assert ask([{"text": "x"}] * 101).status_code == 400
    assert ask([{"text": "x" * (MAX_TEXT + 1)}]).status_code == 400
    assert ask([{"text": "x", "citations": [{"n": 1}]}]).status_code == 400
    assert ask([]).json() == {"html": []}
