"""Formulas on the page: what becomes MathML, what stays text, and what hostile ones cannot do."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.serving import formulas
from nanochat.serving.markdown import clean, render

ATTRIBUTES = {"class"}.union(*formulas.ATTRIBUTES.values())


@pytest.mark.parametrize("text", ["$x^2$", r"\(x^2\)", "so $x^2$, and", "- $x^2$", "| a |\n|--|\n| $x^2$ |"])
def test_formulas_in_a_line(text):
    assert "<math><msup><mi>x</mi><mn>2</mn></msup></math>" in render(text)


@pytest.mark.parametrize("text", ["$$x^2$$", "\\[x^2\\]", "$$\nx^2\n$$", "Thus\n\\[\n  x^2\n\\]\nholds."])
def test_formulas_by_themselves(text):
    assert '<math display="block"><msup><mi>x</mi><mn>2</mn></msup></math>' in render(text)


@pytest.mark.parametrize(
    "text",
    ["$5 and $6", "from $5-$6", "US$ 3 $", "a $ b $ c", "`$x$`", r"\$x\$", r"$\nonsense$", r"$\frac{$", "$$", "$"],
)
def test_what_is_no_formula_stays_text(text):
    assert "<math" not in render(text)


def test_text_that_is_no_formula_is_unchanged():
    assert render(r"$\nonsense *x*$") == "<p>$\\nonsense <em>x</em>$</p>\n"
    assert render("```\n$x$\n```").count("$x$") == 1
    assert render(r"\[1\]", {1}) == "<p>[1]</p>\n"


def test_equations_are_aligned_without_inline_styles():
    html = render(r"$$\begin{aligned}a&=b\\c&=d\end{aligned}$$")
    assert '<mtd class="right close-right"><mi>a</mi></mtd><mtd class="left close-left">' in html
    assert " style=" not in html


class Reader(HTMLParser):
    """Elements and attributes inside of formulas."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.mark.parametrize(
    "latex",
    [
        r"\href{javascript:alert(1)}{x}",
        r"\text{<img src=x onerror=alert(1)>}",
        r"\text{</math><script>alert(1)</script>}",
        r"\style{background:url(//e.org)}{x}",
        r"\class{citation}{x} \id{a}{x}",
        r"\color{red;background:url(//e.org)}{x}",
        r'\color{"onload="alert(1)}x',
        r"<annotation-xml encoding='text/html'><script>alert(1)</script>",
        "\"onclick='alert(1)'",
        r"\def\x{\x\x}\x",
    ],
)
def test_hostile_formulas_are_harmless(latex):
    for text in (f"${latex}$", f"$${latex}$$"):
        found = Reader(render(text))
        assert found.tags <= {"p", "em", *formulas.TAGS.split()}
        assert found.attributes <= ATTRIBUTES


PIECES = ["$", "$$", "\\", "{", "}", "x", "^", "_", "<b>", '"', "&", r"\text{", r"\(", r"\)", "\n"]


@given(st.lists(st.sampled_from(PIECES)))
def test_any_formula_is_harmless(pieces):
    found = Reader(render("".join(pieces)))
    assert found.tags <= {"p", "br", "hr", "em", "strong", *formulas.TAGS.split()}
    assert found.attributes <= ATTRIBUTES


@pytest.mark.parametrize(
    "html",
    [
        '<math href="javascript:alert(1)"><mi>x</mi></math>',
        '<math><mi xlink:href="javascript:alert(1)" style="color:red" onclick="alert(1)" class="k">x</mi></math>',
        '<math><annotation-xml encoding="text/html"><script>alert(1)</script></annotation-xml></math>',
        '<math><maction actiontype="statusline#http://e.org" xlink:href="javascript:alert(1)">x</maction></math>',
        "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
        "<math><mi><svg><script>alert(1)</script></svg></mi></math>",
    ],
)
def test_the_second_wall_stops_what_the_first_let_through(html):
    cleaned = clean(html)
    found = Reader(cleaned)
    assert not found.tags & {"script", "style", "img", "svg", "annotation-xml", "maction", "mglyph"}
    assert found.attributes <= ATTRIBUTES
    assert clean(cleaned) == cleaned


DEEPEST = r"""
import threading
from nanochat.serving.formulas import MAX_FORMULA, mathml
threading.stack_size(1 << 20)
PAIRS = [("{", "}"), ("x^{", "}"), (r"\sqrt", ""), (r"\left(", r"\right)"), (r"\frac1{", "}")]
def read():
    for opening, closing in PAIRS:
        n = (MAX_FORMULA - 1) // len(opening + closing)
        mathml(opening * n + "x" + closing * n, True)
        mathml(opening * (MAX_FORMULA // len(opening)), True)
thread = threading.Thread(target=read)
thread.start()
thread.join()
print("alive")
"""


def test_the_deepest_formula_fits_into_a_small_stack():
    done = subprocess.run([sys.executable, "-c", DEEPEST], capture_output=True, text=True, check=False)
    assert done.stdout == "alive\n", done.stderr


def test_too_much_is_no_formula():
    assert formulas.mathml("x" * (formulas.MAX_FORMULA + 1), False) is None
    assert formulas.mathml("'" * formulas.MAX_FORMULA, False) is None  # 50 characters of MathML for each


@pytest.mark.parametrize("text", ["$x" * 9000, r"\(x" * 9000, "$$x" * 9000, r"\[x" * 9000, "$ " * 9000, "$x$" * 9000])
def test_hostile_numbers_of_formulas_end(text):
    assert render(text)
