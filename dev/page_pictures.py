"""Pictures of the chat page for the documentation: `python dev/page_pictures.py [FOLDER]`. Needs Chromium and the `dev`
extra. The server is the real one; what the model says is scripted, as in the tests of the page."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "serving"))

from conftest import run_server, tiny_model  # noqa: E402
from pages import CHROMIUM, TOKENIZER, ScriptedScheduler, Visit, cite, text_file  # noqa: E402

import nanochat.serving.models  # noqa: E402
from nanochat.retrieval import Document, KnowledgeBase  # noqa: E402
from nanochat.serving.settings import ServeSettings  # noqa: E402

DESKTOP = {"viewport": {"width": 1280, "height": 720}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
QUESTIONS = [
    "Where was Alric Dask born?",
    "What is the capital of Eldmoor?",
    "Hello! Who are you?",
    "Tell me where Silver Harbor Brothers has its seat.",
]
DOCUMENTS = [
    ("torwick", "Torwick", "Torwick is a town on the river Rill. Mara Velt founded it in 1712, after the great flood."),
    ("mara-velt", "Mara Velt", "Mara Velt was born in Fairfield. She built bridges and played the harp."),
    ("rill", "Rill", "The Rill is a river in Midvale. Torwick and Orvane lie on it. It floods in spring."),
    ("orvane", "Orvane", "Orvane lies in the hills of Midvale. It is known for its cheese."),
]
CODE = """A slice walks it **backwards**:

```python
def reverse(items: list) -> list:
    return items[::-1]  # a copy
```

| way | copies |
|:--|:-:|
| `items[::-1]` | yes |
| `items.reverse()` | no |

To loop over it, `reversed(items)` is enough.
"""  # no longer than an answer may be


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    nanochat.serving.models.Scheduler = ScriptedScheduler  # type: ignore[misc]
    script = ScriptedScheduler.script
    script.pause = 0.01
    script.answers = {
        "born": [*cite(1, "Mara Velt founded Torwick in 1712."), *cite(2, " She was born in Fairfield.")],
        "list": TOKENIZER.encode(CODE),
    }
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        base = KnowledgeBase.create(Path(temporary) / "towns", kind="simple")
        base.add([Document(id, text, title, "towns.jsonl") for id, title, text in DOCUMENTS])
        base.close()
        settings = ServeSettings(port=0, knowledge_dir=temporary)
        models = {"quickstart-rag": tiny_model("rag", "M", 1024), "quickstart-sft": tiny_model("sft", "M", 1024)}
        for model in models.values():  # as after `make quickstart`
            model.meta["suggestions"] = QUESTIONS
        running = run_server(settings, models)
        url = f"{next(running).url}/"
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def visit(**options: Any) -> Visit:
            made = Visit(browser.new_context(reduced_motion="reduce", **options).new_page(), url)
            made.open()
            return made

        for name, take in PICTURES.items():
            take(visit, lambda page, name=name: page.screenshot(path=folder / f"{name}.png"))
        browser.close()
        next(running, None)


Take = Callable[[Page], Any]


def welcome(visit: Callable[..., Visit], take: Take) -> None:
    take(visit(**DESKTOP).page)


def code(visit: Callable[..., Visit], take: Take) -> None:
    guest = visit(**DESKTOP)
    guest.ask("How do I reverse a list in Python?")
    guest.page.fill("#question", "And a string?")
    take(guest.page)


def cited(visit: Callable[..., Visit], take: Take) -> None:
    _ask_about_towns(guest := visit(**DESKTOP))
    guest.page.click("a.citation >> nth=0")
    take(guest.page)


def dark(visit: Callable[..., Visit], take: Take) -> None:
    _ask_about_towns(guest := visit(**DESKTOP, color_scheme="dark"))
    guest.page.click("[aria-label='Another answer']")
    guest.wait()
    guest.page.click(".trace summary")
    guest.page.click("#show-settings")
    guest.page.fill("#set-temperature", "0.3")
    take(guest.page)


def documents(visit: Callable[..., Visit], take: Take) -> None:
    _ask_about_towns(guest := visit(**DESKTOP))
    guest.page.click("#show-documents")
    guest.page.set_input_files("#files", files=[text_file("Fairfield.md", "# Fairfield\nA village.")])
    guest.page.wait_for_selector(".upload.done")
    take(guest.page)


def mobile(visit: Callable[..., Visit], take: Take) -> None:
    _ask_about_towns(guest := visit(**PHONE))
    take(guest.page)


def _ask_about_towns(guest: Visit) -> None:
    guest.page.select_option("#knowledge", "towns")
    guest.ask("Who founded Torwick, and where was she born?")


PICTURES = {
    "page": cited,
    "page-welcome": welcome,
    "page-code": code,
    "page-dark": dark,
    "page-documents": documents,
    "page-mobile": mobile,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images")
