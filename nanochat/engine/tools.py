"""What a model may call while it speaks: the protocol of a tool, and the calculator.

A call is what the model writes between a tool's start and end token; the result comes back as parts of its message
(`conversation.PARTS`), never produced by it and never trained on. `rag.multihop.SearchTool` searches.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol


class Call(NamedTuple):
    """A call that a row made. Its result's tokens are `ids[at : at + n_tokens]` of the rollout, right behind the
    call."""

    at: int
    text: str  # what stood between start and end token, special tokens left out
    result: Any  # `Result.value` of the tool
    n_tokens: int
    tool: str = ""
    seconds: float = 0.0  # of the batch of calls that this one was part of


class Request(NamedTuple):
    """A call on its way to a tool."""

    text: str
    prompt: int = 0  # which prompt the row belongs to
    earlier: tuple[Call, ...] = ()  # the row's calls before
    max_tokens: int = 0  # the result is cut to so many tokens (0: no limit known)


class Result(NamedTuple):
    """What comes back: parts for the model to read (of types that the assistant does not produce), a value for whoever
    looks at the rollout, and whether this was the row's last call: it gets no more, as if it had reached max_calls."""

    parts: list[dict[str, Any]]
    value: Any = None
    last: bool = False


class Tool(Protocol):
    """Something to call. One object may serve several threads, and holds nothing about a row."""

    name: str
    start: str  # special tokens around a call
    end: str

    def run(self, requests: Sequence[Request]) -> Sequence[Result]:
        """A result for each request. An exception ends the row whose request, given alone, raises it."""


# ---- calculator

MAX_LENGTH = 200  # characters of an expression
MAX_VALUE = 1e30
MAX_EXPONENT = 128
MAX_BITS = 2048  # of a denominator; finer fractions are rounded

_ALLOWED = re.compile(r"[0-9.+\-*/%() ]*")
_REWRITES = (
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),  # 1,000
    (re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*%(?!\s*[\d.(])"), r"(\1/100)"),  # 20% of something; 7 % 3 is a remainder
    (re.compile(r"(?<![\d.])0+(?=\d)"), ""),  # 007
)
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "$": ""})
_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression: + - * / // % ** and brackets over decimal numbers, `1,000`, `$5` and `20%`
    as people write them. Exact, but for roots; shown with 10 digits. Its syntax tree is walked; nothing is executed.
    Raises ValueError that says what is wrong: an expression that is too long or no arithmetic, a division by zero, a
    number beyond 10^30."""
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH} characters")
    text = expression.translate(_SIGNS).rstrip("= ").strip()
    for pattern, into in _REWRITES:
        text = pattern.sub(into, text)
    if not text or not _ALLOWED.fullmatch(text):
        raise ValueError("not arithmetic")
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (SyntaxError, RecursionError, MemoryError, OverflowError):
        raise ValueError("not arithmetic") from None
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def _value(node: ast.expr) -> Fraction:
    value: Any
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = Fraction(repr(node.value))  # 0.1 is a tenth
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        value = _UNARY[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > MAX_EXPONENT:
            raise ValueError(f"an exponent beyond {MAX_EXPONENT}")
        value = _BINARY[type(node.op)](left, right)
    else:
        raise ValueError("not arithmetic")
    if isinstance(value, complex) or not abs(value) <= MAX_VALUE:
        raise ValueError("not a number up to 10^30")
    value = Fraction(value)
    return value if value.denominator.bit_length() <= MAX_BITS else Fraction(float(value))


class Calculator:
    """Arithmetic: `<|tool_call_start|>48/2<|tool_call_end|>` gives 24. What is no arithmetic gives a text that says so,
    and the row goes on."""

    name: str = "calculator"
    start: str = "tool_call_start"
    end: str = "tool_call_end"

    def run(self, requests: Sequence[Request]) -> list[Result]:
        return [self.answer(request.text) for request in requests]

    def answer(self, expression: str) -> Result:
        """The output; its value is the text, or None for what could not be calculated."""
        try:
            value: str | None = calculate(expression)
            shown = str(value)
        except ValueError as error:
            value, shown = None, f"error: {error}"
        return Result([{"type": "tool_output", "text": shown}], value)
