"""The chat page in Chromium: asking, answers, branches, history."""

from __future__ import annotations

import json

from pages import MARKDOWN, TOKENIZER, numbers, saved, text_file


def test_an_answer_streams_in_and_is_rendered(visit, site):
    site.script.pause = 0.004
    guest = visit()
    guest.ask("Show me markdown", wait=False)
    page = guest.page
    guest.wait_written()
    assert len(page.inner_text(".content")) < len(MARKDOWN) / 2
    guest.wait()
    assert page.inner_text(".content h3") == "Reversing a list"
    assert page.locator(".content .code-block .k").first.inner_text() == "def"
    assert page.locator(".content td").all_inner_texts() == ["slice", "yes", "1.0", "reverse", "no", "1.6"]
    assert "naïve" in page.inner_text(".content blockquote")
    tokens, rate, first = numbers(page.inner_text(".stats"))
    assert tokens == len(TOKENIZER.encode(MARKDOWN)) + 1
    assert rate > 0
    assert first > 0
    assert "of 2,048 tokens of context used" in page.inner_text("#hint")


def test_questions_that_the_chosen_model_learnt_to_answer_are_suggested(visit):
    page = visit().page
    buttons = page.locator(".suggestions button")
    assert "Why is the sky blue?" in buttons.first.inner_text()
    page.select_option("#model", "tiny-refrag")
    page.wait_for_selector(".suggestions >> text=Who founded Torwick?")
    assert buttons.count() == 1
    buttons.first.click()
    assert page.input_value("#question") == "Who founded Torwick?"


def test_formulas_are_typeset(visit, site):
    """The browser lays them out: powers are raised, fractions stacked, and a long formula scrolls by itself."""
    long = "+".join(f"x_{{{n}}}^2" for n in range(18))
    formula = rf"So $e^2$, and: $$\frac{{a}}{{b}}$$ Costs \$5. \[{long}\]"
    site.script.answers["formula"] = TOKENIZER.encode(formula)
    guest = visit(viewport={"width": 390, "height": 844})
    guest.ask("formula")
    content = guest.page.locator("#messages .message.last .content")
    assert "Costs $5." in content.inner_text()
    assert "frac" not in content.inner_text()
    power, fraction, wide = (content.locator("math").nth(i) for i in range(3))
    base, exponent = power.locator("mi").bounding_box(), power.locator("mn").bounding_box()
    assert exponent["y"] < base["y"]
    assert exponent["height"] < base["height"]
    over, under = (fraction.locator("mi").nth(i).bounding_box() for i in range(2))
    assert over["y"] + over["height"] <= under["y"]
    assert fraction.bounding_box()["width"] > 100  # a block of its own, in the middle
    assert abs(over["x"] + over["width"] / 2 - 195) < 40
    assert guest.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    scrolls = "e.scrollWidth > e.clientWidth"
    assert wide.evaluate(f"e => {scrolls} || (e = e.parentElement, {scrolls})")


def test_code_and_answers_are_copied(visit):
    guest = visit(permissions=["clipboard-read", "clipboard-write"])
    guest.ask("Show me markdown")
    guest.page.click(".code-head button")
    assert guest.page.evaluate("navigator.clipboard.readText()").startswith("def reverse(items):")
    assert "Copied" in guest.page.inner_text(".code-head")
    guest.page.click(".message.assistant .tools [aria-label=Copy]")
    assert guest.page.evaluate("navigator.clipboard.readText()").strip() == MARKDOWN.strip()


def test_stop_keeps_what_there_is_and_frees_the_model(visit, site):
    site.script.pause = 0.02
    guest = visit()
    guest.ask("Show me markdown", wait=False)
    guest.wait_written()
    guest.page.click("#send[aria-label=Stop]")
    guest.wait()
    assert "Stopped." in guest.page.inner_text(".message.last")
    assert MARKDOWN.replace("# ", "").startswith(guest.answer()[:5])
    while not site.script.ended:
        guest.page.wait_for_timeout(20)
    assert site.script.ended == ["cancelled"]
    site.script.pause = 0
    guest.ask("And now?")
    assert guest.answer() == "Answer 1 to: And now?"


def test_escape_stops_too(visit, site):
    site.script.pause = 0.02
    guest = visit()
    guest.ask("Show me markdown", wait=False)
    guest.page.wait_for_selector(".writing")
    guest.page.keyboard.press("Escape")
    guest.wait()
    assert "Stopped." in guest.page.inner_text(".message.last")


def test_regenerate_makes_versions(visit):
    guest = visit()
    guest.ask("Hi")
    first = guest.answer()
    guest.page.click("[aria-label='Another answer']")
    guest.wait()
    guest.page.wait_for_selector(".branches >> text=2/2")
    second = guest.answer()
    assert (first, second) == ("Answer 1 to: Hi", "Answer 2 to: Hi")
    guest.page.click("[aria-label='Earlier version']")
    assert guest.answer() == first
    guest.page.click("[aria-label='Later version']")
    assert guest.answer() == second


def test_an_edited_question_begins_a_branch(visit):
    guest = visit()
    guest.ask("One")
    guest.ask("Two")
    guest.page.hover(".message.user >> nth=0")
    guest.page.click(".message.user >> nth=0 >> [aria-label='Edit and send again']")
    guest.page.fill(".editor textarea", "Uno")
    guest.page.press(".editor textarea", "Enter")
    guest.page.wait_for_selector(".branches >> text=2/2")
    guest.wait()
    assert guest.page.locator(".bubble").all_inner_texts() == ["Uno"]
    assert guest.answer() == "Answer 3 to: Uno"
    guest.page.click("[aria-label='Earlier version']")
    assert guest.page.locator(".bubble").all_inner_texts() == ["One", "Two"]
    guest.page.click(".message.user >> nth=1 >> [aria-label='Edit and send again']")
    guest.page.keyboard.press("Escape")
    assert guest.page.locator(".bubble").all_inner_texts() == ["One", "Two"]


def test_the_model_sees_the_chosen_branch(visit):
    guest = visit()
    sent: list[dict] = []
    guest.page.on("request", lambda r: sent.append(r.post_data_json) if "completions" in r.url else None)
    guest.ask("One")
    guest.page.click("[aria-label='Another answer']")
    guest.wait()
    guest.ask("Two")
    assert sent[-1]["messages"] == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Answer 2 to: One"},
        {"role": "user", "content": "Two"},
    ]


def test_history_is_kept_searched_renamed_and_deleted(visit):
    guest = visit()
    page = guest.page
    guest.ask("A question about whales")
    page.click("#new-chat")
    assert page.is_visible("#welcome")
    guest.ask("Another one on harps")
    assert page.locator("#history .open").all_inner_texts() == ["Another one on harps", "A question about whales"]
    page.reload()
    page.wait_for_selector("body[data-ready=true]")
    assert guest.answer() == "Answer 2 to: Another one on harps"
    page.fill("#search-chats", "whales answer")
    assert len(page.locator("#history .open").all()) == 1
    page.press("#search-chats", "Enter")
    page.wait_for_selector(".bubble >> text=whales")
    page.fill("#search-chats", "giraffe")
    assert "No chat holds these words" in page.inner_text("#history")
    page.fill("#search-chats", "")
    page.hover(".chat-item.current")
    page.click(".chat-item.current .more")
    page.click("[role=menuitem] >> text=Rename")
    page.fill("dialog input", "Sea")
    page.keyboard.press("Enter")
    page.wait_for_selector(".chat-item.current >> text=Sea")
    assert page.title() == "Sea · nanochat"
    page.click(".chat-item.current .more")
    page.click("[role=menuitem] >> text=Delete")
    page.click("dialog .danger")
    page.wait_for_selector("#welcome:not([hidden])")
    assert page.locator("#history .open").all_inner_texts() == ["Another one on harps"]
    page.go_back()


def test_chats_are_exported_and_imported(visit):
    guest = visit()
    page = guest.page
    guest.ask("Show me markdown")
    page.hover(".chat-item.current")
    page.click(".chat-item.current .more")
    with page.expect_download() as markdown:
        page.click("[role=menuitem] >> text=Markdown")
    assert markdown.value.suggested_filename == "show-me-markdown.md"
    text = saved(markdown.value)
    assert text.startswith("# Show me markdown\n\n## You\n\nShow me markdown\n\n## Assistant\n\n# Reversing a list")
    page.click("#show-settings")
    with page.expect_download() as export:
        page.click("text=Export all")
    file = saved(export.value)
    assert json.loads(file)["format"] == "nanochat-conversations"

    other = visit()
    other.page.click("#show-settings")
    other.page.set_input_files("#panel-body input[type=file]", files=[text_file("chats.json", file)])
    other.page.click("#history .open")
    other.page.wait_for_selector(".content h3")
    assert other.page.inner_text(".content h3") == "Reversing a list"
    other.page.set_input_files("#panel-body input[type=file]", files=[text_file("chats.json", "{}")])
    other.page.wait_for_selector(".toast.error >> text=this is no export of nanochat")
    other.page.click("text=Delete all")
    other.page.click("dialog .danger")
    other.page.wait_for_selector("#history .none")


def test_sampling_system_prompt_and_model_are_sent(visit):
    guest = visit()
    page = guest.page
    sent: list[dict] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if "completions" in r.url else None)
    guest.ask("One")
    assert set(sent[0]) == {"model", "messages", "stream", "stream_options"}
    page.select_option("#model", "tiny-refrag")
    page.click("#show-settings")
    page.fill("#system", "Be brief.")
    chosen = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "max_tokens": 32}
    for name, value in chosen.items():
        page.fill(f"#set-{name}", str(value))
    page.fill("#seed", "7")
    page.fill("#stop", "Foo, bar")
    page.press("#stop", "Tab")
    guest.ask("Two")
    rest = {name: value for name, value in sent[1].items() if name not in ("messages", "stream", "stream_options")}
    assert rest == {"model": "tiny-refrag", **chosen, "seed": 7, "stop": ["Foo", "bar"]}
    assert sent[1]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.click("text=Use the server's defaults")
    page.reload()
    page.wait_for_selector("body[data-ready=true]")
    guest.ask("Three")
    assert "temperature" not in sent[2]
    assert sent[2]["model"] == "tiny-refrag"


def test_answers_that_are_cut_off_say_so(visit):
    guest = visit()
    guest.page.click("#show-settings")
    guest.page.fill("#set-max_tokens", "16")
    guest.ask("A long question about many things")
    assert "Cut off" in guest.page.inner_text(".message.last .notice")


def test_a_busy_server_is_asked_again(visit, site):
    site.script.busy = 1
    guest = visit()
    guest.ask("Hi", wait=False)
    guest.page.wait_for_selector("text=The server is busy. Trying again in 1 s")
    guest.wait()
    assert guest.answer() == "Answer 1 to: Hi"
    assert "429" in guest.complaints.pop()


def test_a_failure_says_so_and_can_be_tried_again(visit, site):
    site.script.fails = True
    guest = visit()
    guest.ask("Hello there")
    assert guest.answer() == "Answe"[: len(guest.answer())]
    assert "the model failed on this request" in guest.page.inner_text(".notice.error")
    site.script.fails = False
    guest.page.click("text=Try again")
    guest.page.wait_for_selector("text=Answer 2 to: Hello there")


def test_two_chats_are_answered_at_once(visit, site):
    site.script.pause = 0.01
    guest = visit()
    guest.ask("Show me markdown", wait=False)
    guest.page.wait_for_selector(".writing")
    guest.page.click("#new-chat")
    guest.ask("Meanwhile")
    assert guest.answer() == "Answer 1 to: Meanwhile"
    guest.page.click("#history .open >> text=Show me markdown")
    guest.wait()
    assert guest.page.inner_text(".content h3") == "Reversing a list"


def test_two_tabs_share_the_chats(visit):
    guest = visit()
    tab = guest.page.context.new_page()
    tab.goto(guest.url)
    tab.wait_for_selector("body[data-ready=true]")
    guest.ask("From the first tab")
    tab.click("#history .open >> text=From the first tab")
    tab.wait_for_selector("text=Answer 1 to: From the first tab")


def test_events_survive_any_cut(visit):
    """Server-sent events, cut in two at every byte."""
    text = 'data: {"a": "é"}\r\n\r\n: ping\n\ndata: one\ndata: two\n\ndata:three\n'
    found = visit().page.evaluate(
        """async (text) => {
            const { events } = await import('/static/js/api.js');
            const bytes = new TextEncoder().encode(text);
            const all = new Set();
            for (let cut = 0; cut <= bytes.length; cut++) {
                const parts = [bytes.slice(0, cut), bytes.slice(cut)];
                const stream = new ReadableStream({ pull: (c) => parts.length ? c.enqueue(parts.shift()) : c.close() });
                const found = [];
                for await (const event of events(stream)) found.push(event);
                all.add(JSON.stringify(found));
            }
            return [...all].map(JSON.parse);
        }""",
        text,
    )
    assert found == [['{"a": "é"}', "one\ntwo", "three"]]


def test_names_of_knowledge_bases(visit):
    slugs = visit().page.evaluate(
        "async (names) => { const { slug } = await import('/static/js/knowledge.js'); return names.map(slug); }",
        ["My Notes!", "  Ünïcode  ", "__a--b__", "…", "x" * 99, "CON"],
    )
    assert slugs == ["my-notes", "unicode", "a-b__", "", "x" * 64, "con"]
