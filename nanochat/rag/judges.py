"""External judges of support, for `support(..., judge=...)`. Each is optional: nothing here runs unless you ask for it.

    FunctionJudge(entails)                        any function (premise, claim) -> probability, such as an NLI model's
    ChatJudge("http://localhost:8000/v1", "m")    a chat model behind an OpenAI-compatible server, asked yes or no

A judge sees one sentence and the documents that it cites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import requests

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Document

PROMPT = """Documents:

{documents}

Question: {question}
Claim: {claim}

Do the documents above state everything that the claim says? Answer with one word, yes or no."""


class FunctionJudge:
    """Judges with a function from (premise, claim) to the probability that the premise entails the claim, each document
    being a premise; the best counts."""

    def __init__(self, entails: Callable[[str, str], float], name: str = "function") -> None:
        self.entails, self.name = entails, name

    def judge(self, question: str, claim: str, documents: Sequence[Document]) -> float:
        """Raises NanochatError when the function returns what is no probability."""
        best = 0.0
        for document in documents:
            value = float(self.entails(document.text, claim))
            if not 0.0 <= value <= 1.0:
                raise NanochatError(f"judge {self.name}: returned {value}, which is no probability")
            best = max(best, value)
        return best


class ChatJudge:
    """Asks a chat model behind an OpenAI-compatible server (`base_url`/chat/completions).

    Its probability is that of "yes" among "yes" and "no" where the server returns log-probabilities, else 0 or 1.
    `headers`: sent with each request, for servers that want a key."""

    def __init__(
        self, base_url: str, model: str, headers: Mapping[str, str] | None = None, timeout: float = 60.0
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise UsageError(f"judge: base_url {base_url!r} must begin with http:// or https://")
        self.url, self.model, self.name = f"{base_url.rstrip('/')}/chat/completions", model, model
        self.headers, self.timeout = dict(headers or {}), timeout

    def judge(self, question: str, claim: str, documents: Sequence[Document]) -> float:
        """Raises NanochatError when the server fails or answers neither yes nor no."""
        shown = "\n\n".join(f"[{n}] {document.text}" for n, document in enumerate(documents, 1))
        body = {
            "model": self.model, "temperature": 0, "max_tokens": 3, "logprobs": True, "top_logprobs": 10,
            "messages": [
                {"role": "user", "content": PROMPT.format(documents=shown, question=question, claim=claim)}
            ],
        }  # fmt: skip
        try:
            response = requests.post(self.url, json=body, headers=self.headers, timeout=self.timeout)
            response.raise_for_status()
            choice = response.json()["choices"][0]
            said = str(choice["message"]["content"])
        except (requests.RequestException, ValueError, KeyError, IndexError, TypeError) as error:
            raise NanochatError(f"judge {self.name} at {self.url}: {error!r}") from error
        weighed = _weigh(choice)
        if weighed is not None:
            return weighed
        word = said.strip().lower()
        if not word.startswith(("yes", "no")):
            raise NanochatError(f"judge {self.name}: answered {said!r:.60}, neither yes nor no")
        return float(word.startswith("yes"))


def _weigh(choice: Mapping[str, Any]) -> float | None:
    """p(yes) / (p(yes) + p(no)) at the first token; None where the server does not tell."""
    try:
        tops = choice["logprobs"]["content"][0]["top_logprobs"]
        mass = {"yes": 0.0, "no": 0.0}
        for top in tops:
            word = str(top["token"]).strip().lower()
            if word in mass:
                mass[word] += math.exp(float(top["logprob"]))
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    total = sum(mass.values())
    return mass["yes"] / total if total else None
