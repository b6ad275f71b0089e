"""Markdown from models and documents as HTML that is safe to show.

Whoever wrote the text may be hostile: a document can make a model say anything. So nothing here trusts it. HTML in the
text stays text, markdown-it-py makes the elements, Pygments colours the code, and nh3 (ammonia) lets through what is
listed below and nothing else. Images are never fetched (their address could carry a secret away): they become links.
The page that shows the result forbids scripts, styles and pictures from elsewhere besides (`CONTENT_SECURITY_POLICY`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, MutableMapping, Sequence
from functools import lru_cache
from html import escape
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES
from pygments.util import ClassNotFound

from nanochat.errors import UsageError
from nanochat.retrieval.document import clean_text
from nanochat.serving import formulas

CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types markdown",
    ]
)

MAX_TEXT = 200_000  # characters; more than any context holds
MAX_CODE = 20_000  # characters of a block that are coloured: some lexers take more than linear time
# No others: the lexers of rare languages are those that take long on hostile text.
_LANGUAGES = """bash c cpp c++ c# csharp css diff docker dockerfile go golang haskell html ini java javascript js json
jsx julia kotlin latex lua make makefile markdown md matlab perl php powershell py python python3 r ruby rb rs rust
scala scss sh shell sql swift tex toml ts tsx typescript xml yaml yml zsh"""
LANGUAGES = frozenset(_LANGUAGES.split())

_CITATION = re.compile(r"\[(\d{1,4})\](?!\()")
_CODE_CLASSES = frozenset(name for name in STANDARD_TYPES.values() if name)
_TAGS = "p br hr h3 h4 h5 h6 strong em s code pre blockquote ul ol li table thead tbody tr th td a span div"
_ATTRIBUTES = {
    "a": {"href", "title", "target", "data-citation", "aria-label"},
    "ol": {"start"},
    "code": {"data-language"},
    "pre": {"tabindex"},
    "div": {"tabindex", "role", "aria-label"},
    "td": {"align"},
    "th": {"align"},
}
_CLASSES: dict[str, set[str]] = {
    "a": {"citation"},
    "span": set(_CODE_CLASSES),
    "div": {"scroll"},
    "pre": {"code"},
}
_FORMATTER = HtmlFormatter(nowrap=True)


def render(text: str, citations: Collection[int] = ()) -> str:
    """HTML of a Markdown text: tables, code, formulas, lists, links; a line break is a line break.

    citations: numbers whose `[n]` in the text become links `<a class="citation" data-citation="n">` to a source that
    the page shows. Headings start at level 3, below those of the page. Raises UsageError for a text of more than
    MAX_TEXT characters.
    """
    if len(text) > MAX_TEXT:
        raise UsageError(f"the text has {len(text):,} characters; Markdown is rendered up to {MAX_TEXT:,}")
    return clean(_parser().render(clean_text(text), {"citations": frozenset(citations)}))


def clean(html: str) -> str:
    """What is listed above, and nothing else."""
    return nh3.clean(
        html,
        tags={*_TAGS.split(), *formulas.TAGS.split()},
        attributes=_ATTRIBUTES | formulas.ATTRIBUTES,
        allowed_classes=_CLASSES | formulas.CLASSES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    """CommonMark with tables and strike-through; threads may share it."""
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": 40})
    parser.enable(["table", "strikethrough"])
    # `[1]: ...` is how a small model lists its sources, and would vanish as a definition
    parser.disable(["html_block", "html_inline", "reference"])
    parser.inline.ruler.before("link", "citation", _citation)
    formulas.add_formulas(parser)
    for name, rule in {
        "citation": _render_citation,
        "fence": _render_code,
        "code_block": _render_code,
        "image": _render_image,
        "heading_open": _render_heading,
        "heading_close": _render_heading,
        "link_open": _render_link,
        "table_open": _render_table,
        "table_close": _render_table,
        "th_open": _render_cell,
        "td_open": _render_cell,
    }.items():
        parser.add_render_rule(name, rule)
    return parser


def _citation(state: StateInline, silent: bool) -> bool:
    """`[n]` for a known n, wherever Markdown may stand (so not in code)."""
    found = _CITATION.match(state.src, state.pos)
    if not found or int(found[1]) not in state.env.get("citations", ()):
        return False
    if not silent:
        state.pending = state.pending.rstrip(" ")  # a line must not break before it
        token = state.push("citation", "a", 0)
        token.content = str(int(found[1]))
    state.pos = found.end()
    return True


def _render_citation(self: RendererHTML, tokens: Sequence[Token], index: int, *_: Any) -> str:
    n = tokens[index].content
    return f'<a class="citation" href="#source-{n}" data-citation="{n}" aria-label="Source {n}">{n}</a>'


def _render_code(self: RendererHTML, tokens: Sequence[Token], index: int, *_: Any) -> str:
    code = tokens[index].content
    info = tokens[index].info.split()
    language = info[0].lower() if info else ""
    # in the order of the keyboard, so that it can be scrolled
    opening = f'<pre class="code" tabindex="0"><code data-language="{escape(language[:30])}">'
    return f"{opening}{_coloured(code, language)}</code></pre>\n"


def _coloured(code: str, language: str) -> str:
    if language not in LANGUAGES or len(code) > MAX_CODE:
        return escape(code)
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return escape(code)
    return highlight(code, lexer, _FORMATTER)


def _render_image(self: RendererHTML, tokens: Sequence[Token], index: int, *_: Any) -> str:
    token = tokens[index]
    label = escape(token.content or "picture")
    return f'<a href="{escape(str(token.attrs.get("src", "")))}" target="_blank">[picture: {label}]</a>'


def _render_heading(self: RendererHTML, tokens: Sequence[Token], index: int, *_: Any) -> str:
    token = tokens[index]
    level = min(6, int(token.tag[1]) + 2)
    return f"<h{level}>" if token.nesting == 1 else f"</h{level}>\n"


def _render_link(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: MutableMapping) -> str:
    tokens[index].attrSet("target", "_blank")
    return self.renderToken(tokens, index, options, env)


def _render_table(self: RendererHTML, tokens: Sequence[Token], index: int, *_: Any) -> str:
    if tokens[index].nesting == 1:
        return '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>\n'
    return "</table></div>\n"


def _render_cell(self: RendererHTML, tokens: Sequence[Token], index: int, *_: Any) -> str:
    """Alignment as an attribute: the page allows no inline styles."""
    tag, style = tokens[index].tag, str(tokens[index].attrs.get("style", ""))
    side = style.removeprefix("text-align:")
    return f'<{tag} align="{escape(side)}">' if style else f"<{tag}>"
