"""The page as Chromium shows it, on a real server whose model says what a script tells it to."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny_server import TOKENIZER, Running, tiny_model

from nanochat.engine.batching import Event, Overloaded, Request, Scheduler, Ticket
from nanochat.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

MARKDOWN = """# Reversing a list

```python
def reverse(items):
    return items[::-1]  # a copy
```

- **in place**: `items.reverse()`

| way | copies | speed |
|:--|:-:|--:|
| slice | yes | 1.0 |
| reverse | no | 1.6 |

> Choose, naïve or not.
"""  # fewer bytes than the server's max_tokens


def cite(n: int, sentence: str) -> list[int]:
    """A sentence with its citation before it, as a model writes it."""
    label = [TOKENIZER.special("cite_start"), *TOKENIZER.encode(str(n)), TOKENIZER.special("cite_end")]
    return [*label, *TOKENIZER.encode(sentence)]


@dataclass
class Script:
    """What the model says, by a word of the question; what else it says first."""

    answers: dict[str, list[int]] = field(default_factory=dict)
    pause: float = 0.0  # seconds a token
    busy: int = 0  # so many requests find no room
    fails: bool = False
    asked: int = 0  # answers so far, told in those that nobody scripted
    ended: list[str] = field(default_factory=list)  # why answers ended before their end

    def reset(self) -> None:
        self.answers = {
            "markdown": TOKENIZER.encode(MARKDOWN),
            "founded": [*cite(1, "Mara Velt founded Torwick."), *cite(2, " Nobody knows why, says the harp.")],
        }
        self.pause, self.busy, self.fails, self.asked, self.ended = 0.0, 0, False, 0, []

    def tokens(self, prompt: Sequence[int]) -> list[int]:
        question = TOKENIZER.decode(prompt).rpartition("<|user_start|>")[2].partition("<|user_end|>")[0]
        found = [tokens for word, tokens in self.answers.items() if word in question.lower()]
        self.asked += not found
        return found[0] if found else TOKENIZER.encode(f"Answer {self.asked} to: {question}")


class ScriptedScheduler(Scheduler):
    """Answers as the script says, a thread for each; the model has nothing to do."""

    script = Script()

    def submit(self, request: Request) -> Ticket:
        if self.script.busy:
            self.script.busy -= 1
            raise Overloaded("all seats are taken", 1.0)
        ticket = Ticket(request, lambda: None)
        threading.Thread(target=self._say, args=(ticket, self.script.tokens(request.ids))).start()
        return ticket

    def _say(self, ticket: Ticket, tokens: list[int]) -> None:
        request = ticket.request
        decoder = request.decoder() if request.decoder else StreamDecoder(TOKENIZER, skip_special=True)
        ticket.read_at = time.perf_counter()
        for n, token in enumerate(tokens):
            time.sleep(self.script.pause)
            reason = "length" if n == request.sampling.max_tokens else ticket.stopped(time.perf_counter())
            if self.script.fails and n == 5:
                reason = "error"
            if reason:
                self.script.ended.append(reason)
                return ticket.end(reason)
            ticket.emit(Event(0, decoder.feed(token), [token], [0.0], "", []))
        ticket.emit(Event(0, decoder.flush(), [TOKENIZER.eot], [0.0], "stop", []))


@dataclass
class Site:
    """The server and what it is told to say."""

    server: Running
    script: Script

    @property
    def url(self) -> str:
        return f"{self.server.url}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # of a module, not of the session: while it is open no other event loop runs in this thread
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def start_site(start: Callable[..., Running]) -> Iterator[Callable[..., Site]]:
    """Starts sites: start_site(setting=...)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.serving.models.Scheduler", ScriptedScheduler)

        def go(**settings: Any) -> Site:
            models = {
                "tiny-sft": tiny_model(pattern="M", context=2048),
                "tiny-refrag": tiny_model("refrag", "M", context=2048, seed=1),
            }
            models["tiny-refrag"].meta["suggestions"] = ["Who founded Torwick?"]
            return Site(start(models, **settings), ScriptedScheduler.script)

        yield go


@pytest.fixture(scope="module")
def running_site(start_site: Callable[..., Site]) -> Site:
    return start_site()


@pytest.fixture
def site(running_site: Site) -> Site:
    """The server of a module, with a fresh script."""
    running_site.script.reset()
    return running_site


@dataclass
class Visit:
    """One visitor: a page, and what the browser complained about."""

    page: Page
    url: str
    complaints: list[str] = field(default_factory=list)

    def open(self, url: str = "") -> Page:
        self.page.goto(url or self.url)
        self.page.wait_for_selector("body[data-ready=true]")
        return self.page

    def ask(self, text: str, wait: bool = True) -> None:
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the answer is there."""
        self.page.wait_for_selector("#messages .message.last.assistant:not(.writing) .tools")
        self.page.wait_for_selector("#send[aria-label=Send]")

    def wait_written(self, n: int = 5) -> None:
        """Until the answer has begun. (The page forbids the evaluation of texts, with which Playwright waits.)"""
        self.page.wait_for_selector(".writing .content")
        while len(self.page.text_content("#messages .message.last .content") or "") < n:
            self.page.wait_for_timeout(10)

    def answer(self) -> str:
        return self.page.inner_text("#messages .message.last .content")

    def use_documents(self) -> None:
        self.page.select_option("#knowledge", "towns")


@pytest.fixture
def visit(browser: Browser, site: Site) -> Iterator[Callable[..., Visit]]:
    """Visitors with nothing in their browsers: visit(viewport=..., color_scheme=...). None may complain."""
    contexts: list[BrowserContext] = []
    visits: list[Visit] = []

    def go(url: str = site.url, opened: bool = True, **options: Any) -> Visit:
        context = browser.new_context(reduced_motion="reduce", **options)
        context.set_default_timeout(15_000)
        contexts.append(context)
        made = Visit(context.new_page(), url)
        visits.append(made)
        made.page.on("console", lambda m: made.complaints.append(m.text) if m.type in ("error", "warning") else None)
        made.page.on("pageerror", lambda error: made.complaints.append(str(error)))
        made.page.on("dialog", lambda dialog: (made.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        made.page.on(
            "request", lambda r: made.complaints.append(f"foreign: {r.url}") if is_foreign(r.url, url) else None
        )
        if opened:
            made.open()
        return made

    yield go
    for context in contexts:
        context.close()
    assert [text for made in visits for text in made.complaints] == []


def is_foreign(url: str, own: str) -> bool:
    return not url.startswith((own, f"blob:{own}"))


def saved(download: Any) -> str:
    """What a download holds."""
    return Path(download.path()).read_text(encoding="utf-8")


def text_file(name: str, text: str) -> dict[str, Any]:
    """A file to choose."""
    return {"name": name, "mimeType": "application/octet-stream", "buffer": text.encode()}


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]
