// Puts the page together.

import * as api from "./api.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { $, h, icon, isMac } from "./dom.js";
import { Knowledge } from "./knowledge.js";
import { showShortcuts, toast } from "./notices.js";
import { Panel } from "./panel.js";
import { Settings, askKey } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Sources } from "./sources.js";
import { Store, preferences, savePreferences } from "./store.js";

const COMMAND = isMac ? "⌘" : "Ctrl";
const SHORTCUTS = [
  ["Enter", "Send"],
  ["Shift Enter", "New line"],
  ["↑", "Edit the last question (in an empty box)"],
  ["Esc", "Stop the answer, or close the panel"],
  [`${COMMAND} Shift O`, "New chat"],
  [`${COMMAND} K`, "Search chats"],
  [`${COMMAND} /`, "This list"],
];
const narrow = matchMedia("(max-width: 820px)");

/** The server's settings, asking for the key when it wants one. */
async function readConfig() {
  for (let text = "This server wants a key."; ; text = "That is none of this server's keys.") {
    try {
      return await api.config();
    } catch (error) {
      if (error.status !== 401 || !(await askKey(`${text} It is kept in this browser.`))) throw error;
    }
  }
}

class Page {
  async start() {
    this.#decorate();
    const store = new Store();
    const [server, stored] = await Promise.all([readConfig(), store.open((id) => this.#changedElsewhere(id))]);
    server.models = server.models.filter((model) => model.chat);
    if (!stored) toast("This browser keeps no chats: they are gone when the page is closed.");
    Object.assign(this, { store, server });
    this.panel = new Panel(() => this.#cover());
    this.sources = new Sources(this.panel);
    this.settings = new Settings(this.panel, store, server, {
      systemChanged: (text) => this.#setSystem(text),
      imported: (all) => this.#import(all),
      cleared: async () => {
        await store.clear();
        this.chat.open();
      },
    });
    this.chat = new Chat(store, server, this.sources, {
      changed: () => this.#changed(),
      suggest: (text) => this.composer.fill(text),
      modes: () => this.knowledge.modes(),
    });
    this.composer = new Composer({
      send: (text) => this.chat.send(text),
      stop: () => this.chat.stop(),
      editLast: () => this.chat.editLast(),
      knowledgeChosen: () => this.knowledge.follow(),
    });
    this.sidebar = new Sidebar(store, {
      open: (id) => {
        this.#go(id);
        this.#hideOverlay();
      },
      create: () => {
        this.#go("");
        this.#hideOverlay();
        this.composer.focus();
      },
      changed: (chat) => {
        store.save(chat);
        this.#changed();
      },
      remove: async (id) => {
        await store.remove(id);
        if (id === this.chat.conversation.id) this.#go("");
        else this.#changed();
      },
    });
    this.knowledge = new Knowledge(this.panel, server, {
      changed: () => this.#showRetrieval(),
      passage: (hit) => this.sources.card(hit),
    });
    this.#fillModels();
    this.#listen();
    this.#route();
    if (server.retrieval.available) this.knowledge.load().catch((error) => toast(error.message, "error"));
    if (!narrow.matches) this.composer.focus();
    document.body.dataset.ready = "true";
  }

  #decorate() {
    for (const [name, text] of [
      ["documents", "Documents"],
      ["sources", "Sources"],
      ["settings", "Settings"],
    ]) {
      const button = $(`#show-${name}`);
      button.append(icon(name), h("span", { class: "label" }, text));
      button.setAttribute("aria-label", text);
      button.title = text;
    }
    for (const name of ["#open-sidebar", "#close-sidebar"]) $(name).append(icon("sidebar"));
    $(".model-picker").append(icon("down", 16));
    $("#sidebar-foot").append(
      h(
        "button",
        { type: "button", class: "icon-button", onclick: () => showShortcuts(SHORTCUTS) },
        icon("keyboard"),
        "Keyboard",
      ),
    );
    this.#showSidebar(preferences.sidebar && !narrow.matches, false);
  }

  #listen() {
    $("#open-sidebar").addEventListener("click", () => this.#showSidebar(true));
    $("#close-sidebar").addEventListener("click", () => this.#showSidebar(false));
    $("#backdrop").addEventListener("click", () => this.#showSidebar(false));
    addEventListener("hashchange", () => this.#route());
    addEventListener("keydown", (event) => this.#key(event));
    narrow.addEventListener("change", () => this.#showSidebar(!narrow.matches && preferences.sidebar, false));
  }

  #key(event) {
    const command = isMac ? event.metaKey : event.ctrlKey;
    const key = event.key.toLowerCase();
    if (key === "escape" && !document.querySelector("dialog[open]")) {
      if (this.chat.busy) this.chat.stop();
      else if (this.panel.name) this.panel.close();
      else if (narrow.matches) this.#hideOverlay();
    } else if (command && event.shiftKey && key === "o") this.sidebar.act.create();
    else if (command && key === "k") {
      this.#showSidebar(true);
      $("#search-chats").focus();
    } else if (command && key === "/") showShortcuts(SHORTCUTS);
    else return;
    event.preventDefault();
  }

  #showSidebar(shown, byHand = true) {
    $("#app").classList.toggle("no-sidebar", !shown);
    this.#cover();
    if (!byHand) return;
    if (!narrow.matches) savePreferences({ sidebar: shown });
    $(shown ? "#close-sidebar" : "#open-sidebar").focus();
  }

  /** On a small screen the list and the panel lie over the conversation, which then is out of reach. */
  #cover() {
    const list = narrow.matches && !$("#app").classList.contains("no-sidebar");
    $("#backdrop").hidden = !list;
    $("#main").inert = list || (narrow.matches && Boolean(this.panel?.name));
  }

  #hideOverlay() {
    if (narrow.matches) this.#showSidebar(false);
  }

  #fillModels() {
    const { models } = this.server;
    if (!models.length) toast("This server has only base models. They continue texts: use /v1/completions.", "error");
    if (!models.some((model) => model.id === preferences.model)) savePreferences({ model: models[0]?.id ?? "" });
    const select = $("#model");
    select.replaceChildren(
      ...models.map((model) => h("option", { value: model.id, selected: model.id === preferences.model }, model.id)),
    );
    select.addEventListener("change", () => {
      savePreferences({ model: select.value });
      this.#showRetrieval();
      this.chat.draw();
    });
  }

  #showRetrieval() {
    const model = this.server.models.find((one) => one.id === preferences.model);
    this.composer.showRetrieval(
      this.server.retrieval.available ? this.knowledge.bases : null,
      Boolean(model?.multi_hop),
    );
    this.chat.hint();
  }

  // -- which chat is shown: the address says so, so that reloading and going back work

  #go(id) {
    const hash = id ? `#chat=${id}` : "#new";
    if (location.hash !== hash) history.pushState(null, "", hash);
    this.#route();
  }

  #route() {
    const id = location.hash.startsWith("#chat=") ? location.hash.slice(6) : "";
    if (id && id === this.chat.conversation.id) return;
    this.chat.open(this.store.all.get(id));
    this.settings.showSystem(this.chat.conversation.system);
  }

  /** A conversation changed, or what is running. */
  #changed() {
    const { conversation, busy } = this.chat;
    if (this.store.all.has(conversation.id) && location.hash !== `#chat=${conversation.id}`)
      history.pushState(null, "", `#chat=${conversation.id}`);
    this.composer.setBusy(busy);
    this.sidebar.draw(conversation.id);
    $("#title").textContent = conversation.title || "New chat";
    document.title = conversation.title ? `${conversation.title} · nanochat` : "nanochat";
  }

  #changedElsewhere(id) {
    if (!this.chat) return;
    if (id === this.chat.conversation.id && !this.chat.busy) {
      const now = this.store.all.get(id);
      if (now) this.chat.open(now);
    }
    this.sidebar.draw();
  }

  #setSystem(text) {
    savePreferences({ system: text });
    this.chat.conversation.system = text;
    if (this.store.all.has(this.chat.conversation.id)) this.store.save(this.chat.conversation);
  }

  async #import(all) {
    for (const one of all) await this.store.save(one);
    this.#changed();
  }
}

new Page().start().catch((error) => {
  document.body.dataset.ready = "failed";
  toast(error.message, "error");
});
