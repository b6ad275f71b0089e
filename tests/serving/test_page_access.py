"""The chat page in Chromium: keyboard, screen readers, small screens, light and dark; behind a key; hostile texts."""

from __future__ import annotations

import json

import pytest
from pages import TOKENIZER, cite, text_file

from nanochat.retrieval import Document

SMALL = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def problems(page) -> list[str]:
    """What axe finds, of serious or critical impact."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page).response["violations"]
    return [
        f"{rule['id']}: {node['html'][:160]}"
        for rule in found
        for node in rule["nodes"]
        if rule["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, SMALL], ids=["light", "dark", "small"])
def test_axe_finds_nothing_serious(visit, options):
    guest = visit(**options)
    page = guest.page
    assert problems(page) == []
    guest.ask("Show me markdown")
    guest.use_documents()
    guest.ask("Who founded Torwick on the Rill?")
    page.click("[aria-label='Another answer'] >> nth=-1")
    guest.wait()
    page.click(".trace summary >> nth=-1")
    for name in ("documents", "sources", "settings"):
        page.click(f"#show-{name}")
        assert problems(page) == []
        page.click("#close-panel")


def test_axe_finds_nothing_serious_in_menus_and_dialogs(visit):
    guest = visit(**SMALL)
    page = guest.page
    guest.ask("Hi")
    page.click("#open-sidebar")
    assert problems(page) == []
    page.click(".chat-item .more")
    assert problems(page) == []
    page.click("[role=menuitem] >> text=Rename")
    assert problems(page) == []


def test_everything_by_keyboard(visit):
    guest = visit()
    page = guest.page
    press = page.keyboard.press
    page.keyboard.type("One line")
    press("Shift+Enter")
    page.keyboard.type("and another")
    press("Enter")
    guest.wait()
    assert page.inner_text(".bubble") == "One line\nand another"
    press("ArrowUp")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Edit your message"
    press("Escape")
    press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search-chats"
    press("Control+Shift+o")
    assert page.is_visible("#welcome")
    assert page.evaluate("document.activeElement.id") == "question"
    press("Control+/")
    assert "Shift Enter" in page.inner_text("dialog")
    press("Escape")
    page.focus("#show-settings")
    press("Enter")
    assert page.evaluate("document.activeElement.id") == "panel-title"
    press("Escape")
    assert page.evaluate("document.activeElement.id") == "show-settings"
    page.focus("#history .more")
    press("Enter")
    press("ArrowDown")
    assert page.evaluate("document.activeElement.textContent") == "Save as Markdown"
    press("Escape")
    assert page.evaluate("document.activeElement.classList.contains('more')")


def test_the_order_of_the_keyboard_reaches_all(visit):
    guest = visit()
    guest.ask("Hi")
    page = guest.page
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
    assert {
        "new-chat",
        "search-chats",
        "model",
        "show-documents",
        "show-settings",
        "Another answer",
        "question",
    } <= reached
    assert {"Copy", "Edit and send again", "knowledge"} <= reached


def test_screen_readers_are_told(visit, site):
    site.script.pause = 0.005
    guest = visit()
    page = guest.page
    guest.ask("Hi", wait=False)
    page.wait_for_selector("#status >> text=Writing an answer.", state="attached")
    page.wait_for_selector("#status >> text=The answer: Answer 1 to: Hi", state="attached")
    assert page.locator("#messages h2").all_text_contents() == ["You", "Assistant"]
    assert page.locator("[role=alert]").count() == 1


def test_small_screens(visit):
    guest = visit(**SMALL)
    page = guest.page
    guest.ask("Show me markdown")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert not page.is_visible("#sidebar")
    page.click("#open-sidebar")
    assert page.evaluate("document.querySelector('#main').inert")
    page.click("#history .open")
    assert not page.is_visible("#sidebar")
    assert not page.evaluate("document.querySelector('#main').inert")
    page.click("#show-settings")
    assert page.evaluate("document.querySelector('#panel').getBoundingClientRect().width") == 390
    page.click("#close-panel")
    too_small = """() => [...document.querySelectorAll('button, select, a')].filter((e) => e.checkVisibility())
        .map((e) => e.getBoundingClientRect()).filter((r) => r.width && (r.width < 24 || r.height < 24)).length"""
    assert page.evaluate(too_small) == 0


def test_the_theme_is_chosen_and_kept(visit):
    guest = visit(color_scheme="light")
    page = guest.page
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.click("#show-settings")
    page.check("input[value=dark]")
    dark = page.evaluate(background)
    assert dark != light
    page.reload()
    assert page.evaluate(background) == dark
    page.wait_for_selector("body[data-ready=true]")
    page.click("#show-settings")
    page.check("input[value=system]")
    assert page.evaluate(background) == light


def test_long_chats_follow_their_end(visit, site):
    site.script.answers["long"] = TOKENIZER.encode("word\n\n" * 40)
    guest = visit()
    page = guest.page
    guest.ask("long")
    box = "document.querySelector('#scroller')"
    gap = f"{box}.scrollHeight - {box}.scrollTop - {box}.clientHeight"
    assert page.evaluate(gap) < 5
    page.evaluate("document.querySelector('#scroller').scrollTo(0, 0)")
    page.click("#to-bottom")
    page.wait_for_selector("#to-bottom", state="hidden")
    assert page.evaluate(gap) < 60


def test_the_key_is_asked_for(visit, start_site):
    key = "a-key-of-more-than-16"
    site = start_site(api_key=(key,))
    guest = visit(site.url, opened=False)
    page = guest.page
    page.goto(site.url)
    for given, why in (("wrong", "This server wants a key."), (key, "That is none of this server's keys.")):
        page.wait_for_selector(f"dialog >> text={why}")
        page.fill("dialog input", given)
        page.keyboard.press("Enter")
    page.wait_for_selector("body[data-ready=true]")
    guest.ask("Hi")
    assert guest.answer().endswith("to: Hi")
    page.reload()
    page.wait_for_selector("body[data-ready=true]")
    assert {text for text in guest.complaints if "401" not in text} == set()
    guest.complaints.clear()


# ---- hostile texts: every visitor complains about dialogs, foreign requests and what the policy had to stop

HOSTILE = (
    '<img src=x onerror="alert(1)"><script>alert(1)</script> [click](javascript:alert(1)) '
    "![p](https://evil.example/x.png?secret)\n\n```<img/src=x/onerror=alert(1)>\ncode\n```\n"
)


def test_answers_cannot_run_anything(visit, site):
    site.script.answers["hostile"] = TOKENIZER.encode(HOSTILE)
    guest = visit()
    page = guest.page
    guest.ask(f"hostile {HOSTILE}")
    assert "<img src=x" in guest.answer()
    unwanted = ("script", ".content img", "[onerror]", "a[href^=javascript]")
    assert page.locator(", ".join(f"#messages {selector}" for selector in unwanted)).count() == 0
    assert page.locator(".content a").get_attribute("rel") == "noopener noreferrer nofollow"
    page.reload()
    page.wait_for_selector(".content a")


def test_documents_cannot_run_anything(visit, site):
    base = site.server.service.shelf.open("towns")
    base.add(
        [Document("<b>id</b>", f"Zorro {HOSTILE}", "<img src=x onerror=alert(1)>", "<script>alert(1)</script>.md")]
    )
    site.script.answers["zorro"] = cite(1, "Zorro did.")
    guest = visit()
    page = guest.page
    guest.use_documents()
    guest.ask("Who is Zorro?")
    page.click(".trace summary")
    page.click(".cited button")
    assert page.inner_text(".source.shown .passage").startswith("Zorro <img")
    page.click("#show-documents")
    page.click("summary >> text=All")
    page.wait_for_selector(".documents li")
    page.set_input_files("#files", files=[text_file("<img src=x onerror=alert(1)>.txt", "Zorro")])
    page.wait_for_selector(".upload.done")
    base.refresh()
    base.delete([document.id for document in base.documents() if "Zorro" in document.content])


def test_an_import_cannot_run_anything(visit):
    page = visit().page
    answer = {
        "role": "assistant", "text": "<script>alert(1)</script> [1]", "children": [], "grounding": 3,
        "citations": [{"n": 1, "title": {}, "passage": 7}, 3], "trace": [{"query": {}, "documents": 5}],
        "usage": {"completion_tokens": "x"}, "error": "<script>alert(1)</script>",
    }  # fmt: skip
    question = {"role": "user", "text": "<b>x</b>", "children": ["b"]}
    chat = {"nodes": {"root": {"children": ["a"], "chosen": 7}, "a": question, "b": answer}}
    chat["title"] = "<img src=x onerror=alert(1)>"
    text = json.dumps({"format": "nanochat-conversations", "version": 1, "conversations": [chat]})
    page.click("#show-settings")
    page.set_input_files("#panel-body input[type=file]", files=[text_file("x.json", text)])
    page.click("#history .open")
    page.wait_for_selector(".content >> text=<script>alert(1)</script>")
    page.click(".cited button")
    bad = text.replace('"text": "<b>x</b>"', '"text": 7')
    page.click("#show-settings")
    page.set_input_files("#panel-body input[type=file]", files=[text_file("x.json", bad)])
    page.wait_for_selector(".toast.error >> text=a message is damaged")


def test_the_policy_stops_what_slips_through(visit):
    guest = visit()
    attacks = [
        "const s = document.createElement('script'); s.textContent = 'window.stolen = 1'; document.body.append(s)",
        "document.body.setAttribute('onclick', 'window.stolen = 1')",
        "document.querySelector('#hint').innerHTML = '<img src=x onerror=window.stolen=1>'",
        "setTimeout(() => eval('window.stolen = 1'))",  # at once it is the debugger's, which may
        "setTimeout('window.stolen = 1')",
        "trustedTypes.createPolicy('another', { createHTML: (text) => text })",
    ]
    for attack in attacks:
        guest.page.evaluate(f"() => {{ try {{ {attack} }} catch {{}} }}")
        guest.page.click("#welcome h2")
        assert guest.page.evaluate("window.stolen") is None, attack
    assert guest.complaints
    guest.complaints.clear()
