r"""Formulas in Markdown: $a$, $$a$$, \(a\) and \[a\] become MathML, which browsers typeset themselves.

math-core reads LaTeX strictly: what it does not know, and what is no formula (two prices in one line), stays text. Its
MathML holds no links and no HTML; `markdown.render` lets through what is listed here and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from math_core import LatexError, LatexToMathML

MAX_FORMULA = 1000  # characters
MAX_BRACES = 50  # one in the other: the reader calls itself at each, and a thread may have 1 MB of stack
MAX_MATHML = 20_000  # characters: a few commands become much longer than they are

TAGS = """math mrow mi mn mo ms mtext mspace mfrac msqrt mroot mstyle msub msup msubsup munder mover munderover
mmultiscripts mprescripts mpadded mphantom mtable mtr mtd"""
_OPERATOR = """stretchy symmetric lspace rspace form fence separator minsize maxsize largeop
movablelimits"""
ATTRIBUTES = {
    "math": {"display"},
    "mi": {"mathvariant"},
    "mo": set(_OPERATOR.split()),
    "mspace": {"width", "height", "depth"},
    "mpadded": {"width", "height", "depth", "lspace", "voffset"},
    "mfrac": {"linethickness"},
    "mstyle": {"displaystyle", "scriptlevel"},
    "mover": {"accent"},
    "munder": {"accentunder"},
    "munderover": {"accent", "accentunder"},
    "mtable": {"displaystyle", "scriptlevel"},
}
CLASSES = {"mtd": {"left", "right", "close-left", "close-right"}}

_BETWEEN = rf".{{1,{MAX_FORMULA}}}?"
_FORMULA = re.compile(
    rf"\$\$(?P<block>{_BETWEEN})\$\$"
    rf"|\$(?![\s$])(?P<inline>(?:\\.|[^\\$]){{1,{MAX_FORMULA}}}?)(?<!\s)\$(?!\d)"
    rf"|\\\((?P<round>{_BETWEEN})\\\)"
    rf"|\\\[(?!\d+\\\])(?P<square>{_BETWEEN})\\\]",  # not a citation whose brackets were escaped
    re.DOTALL,
)
_STYLE = re.compile(r' style="([^"]*)"')
_SIDES = {
    "text-align: left": "left",
    "text-align: right": "right",
    "padding-left: 0": "close-left",
    "padding-right: 0": "close-right",
}


def add_formulas(parser: MarkdownIt) -> None:
    """Teach it formulas."""
    parser.inline.ruler.before("escape", "formula", _read)
    parser.add_render_rule("formula", _render)


def mathml(latex: str, block: bool) -> str | None:
    """The formula as MathML without inline styles; None where it is none, or too long."""
    if len(latex) > MAX_FORMULA or _braces(latex) > MAX_BRACES:
        return None
    try:
        found = LatexToMathML(fancy_error=False).convert_with_local_state(latex, displaystyle=block)
    except LatexError:
        return None
    return _STYLE.sub(_as_class, found) if len(found) <= MAX_MATHML else None


def _braces(latex: str) -> int:
    """How many stand one in the other."""
    return max(accumulate((letter == "{") - (letter == "}") for letter in latex), default=0)


def _as_class(style: re.Match[str]) -> str:
    """The page allows no inline styles: columns of equations are aligned by its style sheet."""
    sides = [side for part in style[1].split(";") if (side := _SIDES.get(part.strip()))]
    return f' class="{" ".join(sides)}"' if sides else ""


def _read(state: StateInline, silent: bool) -> bool:
    found = _FORMULA.match(state.src, state.pos) if state.src[state.pos] in "$\\" else None
    if found is None:
        return False
    made = mathml(found[found.lastgroup or 0].strip(), found.lastgroup in ("block", "square"))
    if made is None:
        return False
    if not silent:
        state.push("formula", "math", 0).content = made
    state.pos = found.end()
    return True


def _render(self: RendererHTML, tokens: Sequence[Token], index: int, *_: Any) -> str:
    return tokens[index].content
