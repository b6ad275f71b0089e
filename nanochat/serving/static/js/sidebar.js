// The list of chats: by date, searched by title and text.

import { exportJson, exportMarkdown } from "./export.js";
import { $, h, icon, iconButton } from "./dom.js";
import { ask, confirm } from "./notices.js";
import { path } from "./tree.js";

const DAY = 24 * 3600 * 1000;

/** act: open(id), create(), changed(conversation), remove(id). */
export class Sidebar {
  constructor(store, act) {
    this.store = store;
    this.act = act;
    this.current = "";
    $("#new-chat").prepend(icon("plus"));
    $("#new-chat").addEventListener("click", () => act.create());
    $(".search").prepend(icon("search", 16));
    $("#search-chats").addEventListener("input", () => this.draw());
    $("#search-chats").addEventListener("keydown", (event) => {
      if (event.key === "Enter") $("#history .open")?.click();
    });
  }

  /** Draws the list; `current` is the chat that is shown. */
  draw(current = this.current) {
    this.current = current;
    const words = $("#search-chats").value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = this.store
      .list()
      .map((chat) => ({ chat, match: matching(chat, words) }))
      .filter(({ match }) => match !== null);
    const groups = new Map();
    for (const one of found) {
      const when = age(one.chat.updated);
      groups.set(when, [...(groups.get(when) ?? []), one]);
    }
    const lists = [...groups].map(([when, some]) => [
      h("h2", {}, when),
      h(
        "ul",
        {},
        some.map(({ chat, match }) => this.#item(chat, match)),
      ),
    ]);
    const none = h(
      "p",
      { class: "none" },
      words.length ? "No chat holds these words." : "Your chats appear here. They stay in this browser.",
    );
    $("#history").replaceChildren(...(found.length ? lists.flat() : [none]));
  }

  #item(chat, match) {
    const current = chat.id === this.current;
    const open = h(
      "button",
      { type: "button", class: "open", "aria-current": current ? "true" : null, onclick: () => this.act.open(chat.id) },
      chat.title || "New chat",
      match && h("span", { class: "match" }, match),
    );
    const more = iconButton("more", `More about ${chat.title || "this chat"}`, () => this.#menu(chat, more), {
      class: "icon-button small more",
      "aria-haspopup": "menu",
      "aria-expanded": "false",
    });
    return h("li", { class: `chat-item${current ? " current" : ""}` }, open, more);
  }

  #menu(chat, opener) {
    const entry = (name, text, act, kind = "") =>
      h(
        "button",
        {
          type: "button",
          role: "menuitem",
          tabindex: -1,
          class: kind,
          onclick: () => {
            close();
            act();
          },
        },
        icon(name, 16),
        text,
      );
    const menu = h(
      "div",
      { class: "menu", role: "menu", "aria-label": "Chat" },
      entry("edit", "Rename", () => this.#rename(chat)),
      entry("download", "Save as Markdown", () => exportMarkdown(chat)),
      entry("download", "Save as JSON", () => exportJson([chat], chat.title || "chat")),
      entry("trash", "Delete", () => this.#remove(chat), "danger"),
    );
    const close = () => {
      menu.remove();
      opener.setAttribute("aria-expanded", "false");
      document.removeEventListener("pointerdown", outside, true);
      opener.focus();
    };
    const outside = (event) => !menu.contains(event.target) && close();
    menu.addEventListener("keydown", (event) => {
      const entries = [...menu.children];
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (step) {
        event.preventDefault();
        entries.at((entries.indexOf(document.activeElement) + step) % entries.length).focus();
      }
      if (event.key === "Escape" || event.key === "Tab") {
        event.preventDefault();
        event.stopPropagation();
        close();
      }
    });
    document.addEventListener("pointerdown", outside, true);
    document.body.append(menu);
    const box = opener.getBoundingClientRect();
    menu.style.left = `${Math.max(8, Math.min(box.left, innerWidth - menu.offsetWidth - 8))}px`;
    menu.style.top = `${Math.min(box.bottom + 4, innerHeight - menu.offsetHeight - 8)}px`;
    opener.setAttribute("aria-expanded", "true");
    menu.firstChild.focus();
  }

  async #rename(chat) {
    const title = await ask("Rename the chat", "", "Title", chat.title);
    if (!title) return;
    chat.title = title.slice(0, 200);
    this.act.changed(chat);
  }

  async #remove(chat) {
    if (await confirm("Delete this chat?", `“${chat.title || "New chat"}” will be gone for good.`))
      this.act.remove(chat.id);
  }
}

/** "" for a match in the title, the place in the text for one there, null for none. */
function matching(chat, words) {
  if (!words.length || words.every((word) => chat.title.toLowerCase().includes(word))) return "";
  const texts = Object.values(chat.nodes).map((node) => node.text);
  const all = `${chat.title}\n${texts.join("\n")}`.toLowerCase();
  if (!words.every((word) => all.includes(word))) return null;
  const text = texts.find((one) => words.some((word) => one.toLowerCase().includes(word))) ?? "";
  const at = Math.min(...words.map((word) => text.toLowerCase().indexOf(word)).filter((i) => i >= 0));
  return `…${text.slice(Math.max(0, at - 12), at + 40).replace(/\s+/g, " ")}…`;
}

function age(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY) return "Yesterday";
  if (time >= midnight - 7 * DAY) return "Last 7 days";
  return time >= midnight - 30 * DAY ? "Last 30 days" : "Earlier";
}

/** A title for a chat that has none: how its first question begins. */
export function titleOf(conversation) {
  const first =
    path(conversation)[0]
      ?.text.split("\n")
      .find((line) => line.trim()) ?? "";
  return first.trim().length > 60 ? `${first.trim().slice(0, 58).trimEnd()}…` : first.trim();
}
