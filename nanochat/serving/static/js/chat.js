// The conversation that is shown, and the answers that are being written.

import * as api from "./api.js";
import { $, h, icon } from "./dom.js";
import { LiveText, renderAll } from "./markdown.js";
import { beginEditing, messageView, refresh } from "./messages.js";
import { announce } from "./notices.js";
import { askKey } from "./settings.js";
import { titleOf } from "./sidebar.js";
import { preferences } from "./store.js";
import { BROUGHT, add, ancestors, newConversation, path, place, records, turn } from "./tree.js";

const SAVE_EVERY = 2000; // milliseconds, while an answer is being written
const TRIES = 4; // when the server is busy
const SUGGESTIONS = [
  ["Explain something", "Why is the sky blue?"],
  ["Tell a story", "Tell me a short story about a lighthouse."],
  ["Make a list", "List three ideas for a rainy afternoon."],
  ["Write code", "Write a Python function that reverses a list."],
];

/** act: changed() after every change of a conversation or of what is running, suggest(text), modes(): how the chosen
 * knowledge base can be searched. */
export class Chat {
  constructor(store, server, sources, act) {
    Object.assign(this, { store, server, sources, act, running: new Map(), pinned: true });
    this.conversation = newConversation(preferences.system);
    this.scroller = $("#scroller");
    this.scroller.addEventListener("scroll", () => this.#scrolled());
    $("#to-bottom").append(icon("down", 20));
    $("#to-bottom").addEventListener("click", () => {
      this.pinned = true;
      this.#follow();
    });
    this.handlers = {
      regenerate: (node) => this.#answer(this.conversation, node.parent),
      edit: (node, text) => this.#ask(this.conversation, node.parent, text),
      turn: (node, step) => this.#turn(node, step),
      showSource: (node, n) => sources.showCited(node, n),
      showHit: (node, step, i) => sources.showHit(node, step, i),
    };
  }

  get busy() {
    return this.running.has(this.conversation.id);
  }

  /** Shows a conversation; none: a new one. */
  open(conversation = newConversation(preferences.system)) {
    this.conversation = conversation;
    this.pinned = true;
    this.draw();
    this.act.changed();
  }

  draw() {
    const nodes = path(this.conversation);
    const busy = this.running.get(this.conversation.id);
    $("#welcome").hidden = nodes.length > 0;
    if (!nodes.length) this.#welcome();
    $("#messages").replaceChildren(
      ...nodes.map((node) => messageView(node, place(this.conversation, node.id), this.handlers)),
    );
    const jobs = [];
    for (const node of nodes) {
      const element = $(".content", this.#item(node));
      if (node === busy?.node) this.#live(busy);
      else if (element) jobs.push({ element, text: node.text, citations: numbers(node) });
    }
    this.#markLast();
    this.#follow();
    renderAll(jobs).then(() => this.#follow());
    this.sources.follow(nodes.findLast((node) => records(node.trace).length) ?? null);
    this.hint();
  }

  #welcome() {
    const model = this.server.models.find((one) => one.id === preferences.model);
    const learnt = model?.suggestions?.map((text) => ["Ask", text]);
    const buttons = (learnt?.length ? learnt : SUGGESTIONS).map(([title, text]) =>
      h(
        "button",
        { type: "button", onclick: () => this.act.suggest(text) },
        h("strong", {}, title),
        h("span", {}, text),
      ),
    );
    const facts = [
      model && model.stage !== model.id && model.stage && `stage ${model.stage}`,
      model?.parameters && `${short(model.parameters)} parameters`,
      model?.context && `${model.context.toLocaleString("en")} tokens of context`,
    ];
    $("#welcome").replaceChildren(
      h("img", { src: "static/icon.svg", alt: "", width: 52, height: 52 }),
      h("h2", {}, "What would you like to know?"),
      h(
        "p",
        {},
        model
          ? `You are talking to ${model.id}: ${facts.filter(Boolean).join(", ")}.`
          : "A model of your own, on your own machine.",
      ),
      h("div", { class: "suggestions" }, buttons),
    );
  }

  #item(node) {
    return $(`#messages [data-id="${CSS.escape(node.id)}"]`);
  }

  #markLast() {
    $("#messages .last")?.classList.remove("last");
    $("#messages")?.lastElementChild?.classList.add("last");
  }

  #live(busy) {
    const item = this.#item(busy.node);
    item.classList.add("writing");
    const content = $(".content", item);
    if (busy.hints.length) content.dataset.wait = "Reading the documents";
    busy.live = new LiveText(content, () => this.#follow());
    if (busy.node.text) busy.live.update(busy.node.text, busy.hints);
  }

  // -- asking

  send(text) {
    const last = path(this.conversation).at(-1);
    this.#ask(this.conversation, last?.id ?? "root", text);
  }

  editLast() {
    const last = path(this.conversation).findLast((node) => node.role === "user");
    if (last && !this.busy) beginEditing(this.#item(last));
  }

  stop() {
    this.running.get(this.conversation.id)?.controller.abort();
  }

  #turn(node, step) {
    if (this.busy) return;
    const shown = turn(this.conversation, node.id, step);
    this.draw();
    this.#save(this.conversation);
    const buttons = [...this.#item(shown).querySelectorAll(".branches button")];
    (step < 0 ? buttons : buttons.reverse()).find((button) => !button.disabled)?.focus();
    announce(`Version ${place(this.conversation, shown.id).index + 1}`);
  }

  #ask(conversation, parent, text) {
    if (this.busy) return;
    const node = add(conversation, parent, "user", text);
    conversation.title ||= titleOf(conversation);
    this.#answer(conversation, node.id);
  }

  async #answer(conversation, parent) {
    if (this.running.has(conversation.id)) return;
    // stopped, until it is known better: that is what a page that was closed leaves behind
    const node = add(conversation, parent, "assistant", "", { model: preferences.model, finish: "stopped" });
    const busy = { node, controller: new AbortController(), live: null, hints: [], saved: performance.now() };
    const body = this.#body(conversation, parent);
    if (body.retrieval) busy.hints = Array.from({ length: body.retrieval.top_k }, (_, i) => i + 1);
    this.running.set(conversation.id, busy);
    this.pinned = true;
    this.draw();
    this.#save(conversation);
    announce("Writing an answer.");
    try {
      await this.#patiently(conversation, busy, body);
    } catch (error) {
      if (error.name !== "AbortError") node.error = error.message;
    }
    await this.#finish(conversation, busy);
  }

  #body(conversation, parent) {
    const messages = ancestors(conversation, parent)
      .filter((node) => node.text)
      .map((node) => ({ role: node.role, content: node.text }));
    if (conversation.system) messages.unshift({ role: "system", content: conversation.system });
    const body = { model: preferences.model, messages, ...preferences.sampling };
    if (preferences.knowledge && this.server.retrieval.available) {
      const model = this.server.models.find((one) => one.id === preferences.model);
      body.retrieval = {
        knowledge_base: preferences.knowledge,
        multi_hop: preferences.multiHop && Boolean(model?.multi_hop),
      };
      // each of several searches brings as many documents as the model was trained with
      if (!body.retrieval.multi_hop) body.retrieval.top_k = preferences.topK;
      if (this.act.modes().includes(preferences.mode)) body.retrieval.mode = preferences.mode;
    }
    return body;
  }

  /** Streams the answer; waits when the server is busy, asks for a key when it wants one. */
  async #patiently(conversation, busy, body) {
    for (let tries = 1; ; tries++) {
      try {
        return await this.#stream(conversation, busy, body);
      } catch (error) {
        const begun = busy.node.text !== "";
        if (error.status === 401 && (await askKey(error.message))) continue;
        if (error.status !== 429 || begun || tries >= TRIES) throw error;
        const seconds = Math.min(Math.max(error.retryAfter, 1), 30);
        busy.live?.update(`The server is busy. Trying again in ${seconds} s…`, []);
        await pause(seconds * 1000, busy.controller.signal);
      }
    }
  }

  async #stream(conversation, busy, body) {
    const { node } = busy;
    for await (const chunk of api.chat(body, busy.controller.signal)) {
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) {
        node.text += choice.delta.content;
        busy.live?.update(node.text, busy.hints);
        if (performance.now() - busy.saved > SAVE_EVERY) {
          busy.saved = performance.now();
          this.store.save(conversation);
        }
      }
      if (choice?.finish_reason) node.finish = choice.finish_reason;
      for (const name of BROUGHT) if (chunk[name]) node[name] = chunk[name];
      if (Array.isArray(chunk.grounding)) node.grounding = chunk.grounding[0]; // one for each of n answers
    }
  }

  async #finish(conversation, busy) {
    this.running.delete(conversation.id);
    conversation.updated = Date.now();
    this.#save(conversation);
    if (conversation.id !== this.conversation.id) return;
    const { node } = busy;
    const item = this.#item(node);
    if (item) {
      await busy.live?.finish(node.text, numbers(node));
      const now = this.#item(node) ?? item;
      now.classList.remove("writing");
      refresh(now, node, place(conversation, node.id), this.handlers);
      this.#markLast();
      this.#follow();
    }
    if (records(node.trace).length) this.sources.follow(node);
    this.hint();
    announce(node.error ? `The answer failed: ${node.error}` : `The answer: ${node.text.slice(0, 1000)}`);
  }

  #save(conversation) {
    conversation.updated = Date.now();
    this.store.save(conversation);
    this.act.changed();
  }

  // -- scrolling

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.pinned = scrollHeight - scrollTop - clientHeight < 60;
    $("#to-bottom").hidden = this.pinned;
  }

  #follow() {
    if (this.pinned) this.scroller.scrollTo({ top: this.scroller.scrollHeight, behavior: "instant" });
    $("#to-bottom").hidden = this.pinned;
  }

  /** The line below the message box. */
  hint() {
    const model = (id) => this.server.models.find((one) => one.id === id);
    const last = path(this.conversation).findLast((node) => node.usage);
    const context = model(last?.model)?.context;
    const used = Math.min(Number(last?.usage?.total_tokens), context); // the last token was said, but never read
    const full = used ? `${used.toLocaleString("en")} of ${context.toLocaleString("en")} tokens of context used. ` : "";
    const untrained = preferences.knowledge && model(preferences.model)?.trained_on_documents === false;
    const advice = untrained
      ? "This model was never trained to read documents: it may pass over them."
      : "Small models make things up: check what matters.";
    $("#hint").textContent = full + advice;
  }
}

const numbers = (node) =>
  records(node.citations)
    .map((source) => source.n)
    .filter(Number.isInteger);

const short = (n) =>
  n >= 1e9
    ? `${(n / 1e9).toFixed(1)}B`
    : n >= 1e6
      ? `${(n / 1e6).toFixed(n < 1e7 ? 1 : 0)}M`
      : `${Math.round(n / 1e3)}K`;

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener(
      "abort",
      () => {
        clearTimeout(timer);
        reject(new DOMException("stopped", "AbortError"));
      },
      { once: true },
    );
  });
}
