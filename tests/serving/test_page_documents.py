"""The chat page in Chromium: knowledge bases, citations, sources, the trace of queries."""

from __future__ import annotations

import json

import pytest
from pages import Site, text_file
from tiny_server import DOCUMENTS

from nanochat.retrieval import KnowledgeBase


@pytest.fixture
def towns(site: Site) -> KnowledgeBase:
    return site.server.service.shelf.open("towns")


def test_citations_lead_to_their_passages(visit):
    guest = visit()
    page = guest.page
    guest.use_documents()
    assert page.get_attribute("#question", "placeholder") == "Ask about towns"
    guest.ask("Who founded Torwick on the Rill?")
    assert guest.answer() == "Mara Velt founded Torwick.1 Nobody knows why, says the harp.2"
    assert page.locator(".cited button").all_inner_texts() == ["1\nTorwick", "2\nOrvane"]
    page.click("a.citation >> nth=0")
    shown = page.locator(".source.shown")
    assert shown.locator(".passage").inner_text() == DOCUMENTS[0].content
    assert shown.locator(".where").inner_text() == "towns.jsonl · torwick"
    assert {"Torwick", "Mara", "Velt"} <= set(shown.locator("mark").all_inner_texts())
    page.click(".cited button >> text=Orvane")
    assert page.inner_text(".source.shown .passage") == DOCUMENTS[1].content
    assert page.evaluate("document.activeElement.className") == "source shown"
    assert "The sources hardly bear this out" in page.inner_text(".notice.warn")
    assert "Nobody knows why" in page.inner_text(".notice.warn")


def test_the_trace_shows_queries_and_what_they_found(visit):
    guest = visit()
    page = guest.page
    guest.use_documents()
    guest.ask("Who founded Torwick on the Rill?")
    assert "Searched “Who founded Torwick on the Rill?”: 2 passages" in page.inner_text(".trace summary")
    page.click(".trace summary")
    page.click(".trace .hits button >> text=Orvane")
    assert page.inner_text(".source.shown h4") == "2\nOrvane"
    page.reload()
    page.wait_for_selector("a.citation")
    page.click("a.citation >> nth=0")
    assert page.inner_text(".source.shown h4") == "1\nTorwick"


def test_a_question_that_nothing_answers(visit):
    guest = visit()
    guest.use_documents()
    guest.ask("Xylophone?")
    assert guest.answer() == "I do not know."
    assert "nothing found" in guest.page.inner_text(".trace summary")
    assert "never trained to read documents" in guest.page.inner_text("#hint")


def test_passages_that_are_not_cited_are_shown_too(visit):
    guest = visit()
    guest.page.select_option("#model", "tiny-refrag")
    guest.use_documents()
    guest.page.click("#multi-hop")  # one search, of ours
    guest.ask("Torwick?")
    assert "check what matters" in guest.page.inner_text("#hint")
    guest.page.click("#show-sources")
    assert "cites none of the passages" in guest.page.inner_text("#panel-body")
    guest.page.click(".trace summary")
    guest.page.click(".trace .hits button")
    assert "Found, but not cited" in guest.page.inner_text("#panel-body")
    assert guest.page.inner_text(".source.shown .passage") == DOCUMENTS[0].content


def test_switches_are_sent(visit):
    guest = visit()
    page = guest.page
    sent: list[dict] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if "completions" in r.url else None)
    guest.use_documents()
    assert page.locator("#multi-hop").count() == 0
    page.select_option("#model", "tiny-refrag")
    assert page.get_attribute("#multi-hop", "aria-pressed") == "true"  # which such a model has learnt
    page.click("#multi-hop")
    assert page.get_attribute("#multi-hop", "aria-pressed") == "false"
    page.click("#show-settings")
    page.fill("#top-k-documents", "1")
    page.select_option("#mode", "simple")
    guest.ask("Who founded Torwick?")
    assert sent[0]["retrieval"] == {"knowledge_base": "towns", "top_k": 1, "multi_hop": False, "mode": "simple"}
    page.select_option("#mode", "dense")  # which this knowledge base does not have
    page.select_option("#knowledge", "")
    guest.ask("Hi")
    assert "retrieval" not in sent[1]


def test_multi_hop_is_asked_for(visit):
    guest = visit()
    page = guest.page
    sent: list[dict] = []

    def answer(route):
        sent.append(route.request.post_data_json)
        documents = [{"n": 1, "id": "a", "title": "Torwick", "source": "", "passage": "Mara Velt founded it."}]
        steps = [{"query": "founder", "documents": documents}, {"query": "born", "documents": documents}]
        chunks = [{"choices": [{"index": 0, "delta": {"content": "In Fairfield. [1]"}, "finish_reason": "stop"}]}]
        chunks.append({"choices": [], "citations": documents, "trace": steps})
        body = "".join(f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks) + "data: [DONE]\n\n"
        route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)  # the trace of a model that searches twice
    page.select_option("#model", "tiny-refrag")
    guest.use_documents()
    guest.ask("Where was the founder born?")
    assert sent[0]["retrieval"] == {"knowledge_base": "towns", "multi_hop": True}  # as many documents as it learnt with
    assert "Searched 2 times: 2 passages" in page.inner_text(".trace summary")
    page.click(".trace summary")
    assert page.locator(".trace .query").all_inner_texts() == ["1. “founder”", "2. “born”"]


def test_files_are_uploaded_searched_and_deleted(visit, site):
    guest = visit()
    page = guest.page
    page.click("#show-documents")
    page.fill("#new-base", "My Notes!")
    page.keyboard.press("Enter")
    page.wait_for_selector(".base.chosen >> text=my-notes")
    assert page.input_value("#knowledge") == ""  # nothing in it to answer from
    files = [
        text_file("rill.txt", "The Rill is a river with many otters."),
        text_file("two.jsonl", '{"id": "a", "content": "Aalto, a hill."}\n{"id": "b", "content": "Brynn, a lake."}'),
        text_file("notes.md", "# Otters\nThey swim."),
    ]
    page.set_input_files("#files", files=files)
    page.wait_for_selector(".uploads >> text=added, 2 documents")
    page.wait_for_selector(".base.chosen >> text=4 documents")
    assert page.input_value("#knowledge") == "my-notes"
    for name in ("towns", "my-notes"):  # what is chosen below the message box takes the uploads
        page.select_option("#knowledge", name)
        page.wait_for_selector(f"text=Add documents to {name}")
    page.fill("#try-search", "otters")
    page.press("#try-search", "Enter")
    page.wait_for_selector(".found .source")
    assert "The Rill is a river with many otters." in page.locator(".found .passage").all_inner_texts()
    page.click("summary >> text=All 4 documents")
    page.wait_for_selector(".documents li >> nth=3")
    page.click("[aria-label='Delete a']")
    page.wait_for_selector(".base.chosen >> text=3 documents")
    page.click("[aria-label='Delete the knowledge base my-notes']")
    page.click("dialog .danger")
    page.wait_for_selector("#bases:not(:has-text('my-notes'))")
    assert "my-notes" not in site.server.service.shelf.names()


def test_a_first_upload_makes_a_knowledge_base(visit, start_site):
    site = start_site()
    site.server.service.shelf.delete("towns")
    page = visit(site.url).page
    page.click("#show-documents")
    page.set_input_files("#files", files=[text_file("rill.txt", "The Rill is a river.")])
    page.wait_for_selector(".base.chosen >> text=documents")
    page.wait_for_selector(".upload.done")
    assert page.input_value("#knowledge") == "documents"


def test_files_are_dropped(visit, towns):
    page = visit().page
    guest_before = len(towns)
    page.click("#show-documents")
    page.click("#bases input[value=towns]")
    data = page.evaluate_handle(
        "() => { const d = new DataTransfer(); d.items.add(new File(['Dropped text.'], 'dropped.txt')); return d; }"
    )
    page.dispatch_event(".drop", "drop", {"dataTransfer": data})
    page.wait_for_selector(".upload.done")
    towns.refresh()
    assert len(towns) == guest_before + 1
    page.dispatch_event(".drop", "drop", {"dataTransfer": data})
    page.wait_for_selector(".upload >> text=was there already")
    towns.delete([document.id for document in towns.documents() if document.source == "dropped.txt"])


def test_bad_files_say_what_is_wrong(visit):
    page = visit().page
    page.click("#show-documents")
    page.click("#bases input[value=towns]")
    bad = {"x.exe": "MZ", "bad.jsonl": "{", "bad.pdf": "no"}
    page.set_input_files("#files", files=[text_file(name, text) for name, text in bad.items()])
    page.wait_for_selector(".upload.failed >> text=only .txt, .md")
    page.wait_for_selector(".upload.failed >> text=line 1")
    page.wait_for_selector(".upload.failed >> text=this is no PDF file")


def test_a_server_without_uploads_offers_none(visit, start_site):
    page = visit(start_site(uploads=False).url).page
    page.click("#show-documents")
    page.wait_for_selector("#bases >> text=towns")
    assert page.locator(".drop, #new-base, #bases button").count() == 0
