"""Sums: a task whose answers are checked exactly, small enough to watch reinforcement learning work on a CPU.

    What is 7 + 8?    15
    What is 17 - 40?  <|tool_call_start|>17 - 40<|tool_call_end|><|tool_output_start|>-23<|tool_output_end|>-23
"""

from __future__ import annotations

from typing import Any

from nanochat.data.shuffle import Draws, mix
from nanochat.errors import UsageError
from nanochat.tasks.task import chat, check_index

SIGNS = "+-*"
_QUESTIONS = ("What is {}?", "{} =", "Work out {}.", "How much is {}?")


class Arithmetic:
    """`n` problems; a quarter of all expressions is kept for evaluation (`part="heldout"`).

    digits: of each number, at most. terms: numbers in an expression. operations: of + - *. tool: the solutions call the
    calculator. Raises UsageError for options out of range.
    """

    eval_type = "generative"

    def __init__(
        self,
        seed: int = 0,
        n: int = 10_000,
        digits: int = 1,
        terms: int = 2,
        operations: str = "+-",
        tool: bool = False,
        part: str = "train",
    ) -> None:
        if n < 1 or not 1 <= digits <= 6 or not 2 <= terms <= 6:
            raise UsageError(f"arithmetic: n={n}, digits={digits}, terms={terms}: at least 1; 1 to 6; 2 to 6")
        if not operations or not set(operations) <= set(SIGNS):
            raise UsageError(f"arithmetic: operations={operations}: must be some of {SIGNS}")
        if part not in ("train", "heldout"):
            raise UsageError(f"arithmetic: part={part}: must be train or heldout")
        self.seed, self.n, self.digits, self.terms, self.operations = seed, n, digits, terms, operations
        self.tool, self.part = tool, part
        self.name = f"arithmetic-{part}-{digits}x{terms}" + ("-tool" if tool else "")

    def __len__(self) -> int:
        return self.n

    def expression(self, draws: Draws) -> str:
        """One of this part's expressions."""
        while True:
            numbers = [draws.below(10 ** (1 + draws.below(self.digits))) for _ in range(self.terms)]
            signs = [draws.choice(self.operations) for _ in numbers[1:]]
            text = str(numbers[0]) + "".join(f" {sign} {number}" for sign, number in zip(signs, numbers[1:]))
            key = mix(0xA21, int.from_bytes(text.encode(), "big") % (1 << 61))
            if (key % 4 == 0) == (self.part == "heldout"):
                return text

    def __getitem__(self, i: int) -> dict[str, Any]:
        draws = Draws(mix(mix(0x5A7, self.seed), check_index(i, self.n)))
        text = self.expression(draws)
        value = str(evaluate_expression(text))
        answer: Any = value
        if self.tool:
            call = {"type": "tool_call", "text": text}
            answer = [call, {"type": "tool_output", "text": value}, {"type": "text", "text": value}]
        return chat(draws.choice(_QUESTIONS).format(text), answer, answers=[value])

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """Whether what stands behind the last tool output (or all of it) is the number, and nothing else."""
        return completion.rpartition("<|tool_output_end|>")[2].strip() == conversation["answers"][0]


def evaluate_expression(text: str) -> int:
    """`3 + 4 * 5` by the usual precedence; numbers and signs stand apart."""
    total, product, sign = 0, 0, "+"
    words = text.split()
    for operation, number in zip(["+", *words[1::2]], map(int, words[::2])):
        if operation == "*":
            product *= number
            continue
        total += product if sign == "+" else -product
        product, sign = number, operation
    return total + (product if sign == "+" else -product)
