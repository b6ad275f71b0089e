// Sampling, the system message, how the page looks, and what is kept.

import { exportJson, parseExport } from "./export.js";
import { $, h, icon } from "./dom.js";
import { ask, confirm, toast } from "./notices.js";
import { preferences, savePreferences } from "./store.js";
import { setKey } from "./api.js";

const FIELDS = [
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    step: 0.05,
    help: "0: always the most likely token. Higher: more varied.",
  },
  {
    name: "top_p",
    label: "Top-p",
    min: 0.05,
    max: 1,
    step: 0.05,
    help: "Only the most likely tokens that together have this probability. 1: all.",
  },
  { name: "top_k", label: "Top-k", min: 0, max: 200, step: 1, help: "Only the k most likely tokens. 0: all." },
  {
    name: "min_p",
    label: "Min-p",
    min: 0,
    max: 0.5,
    step: 0.01,
    help: "Drops tokens less likely than this share of the most likely one.",
  },
  { name: "max_tokens", label: "Longest answer, in tokens", min: 16, step: 16 }, // at most: the model's context
];

const MODES = ["simple", "bm25", "dense", "hybrid"]; // a knowledge base has some of them

/** act: systemChanged(text), imported(conversations), cleared(), retrievalChanged(). */
export class Settings {
  constructor(panel, store, server, act) {
    Object.assign(this, { panel, store, server, act, system: "" });
    panel.add("settings", "Settings", (body) => this.#draw(body));
  }

  /** The system message of the chat that is shown. */
  showSystem(text) {
    this.system = text;
    this.panel.refresh("settings");
  }

  #draw(body) {
    body.append(
      this.#theme(),
      ...this.#system(),
      ...this.#sampling(),
      ...(this.server.retrieval.available ? this.#retrieval() : []),
      ...this.#data(),
    );
  }

  #theme() {
    const options = [
      ["system", "System"],
      ["light", "Light"],
      ["dark", "Dark"],
    ].map(([value, label]) =>
      h(
        "label",
        {},
        h("input", {
          type: "radio",
          name: "theme",
          value,
          checked: preferences.theme === value,
          onchange: () => setTheme(value),
        }),
        label,
      ),
    );
    return h(
      "div",
      { class: "field-row" },
      h("div", { class: "label", id: "theme-label" }, "Theme"),
      h("div", { class: "segments", role: "radiogroup", "aria-labelledby": "theme-label" }, options),
    );
  }

  #system() {
    const area = h("textarea", {
      class: "field",
      id: "system",
      value: this.system,
      placeholder: "You are a helpful assistant.",
      onchange: () => {
        this.system = area.value.trim();
        this.act.systemChanged(this.system);
      },
    });
    return [
      h(
        "div",
        { class: "field-row" },
        h("label", { for: "system" }, "System prompt"),
        area,
        h("p", { class: "help" }, "Said to the model before this chat, and before new ones."),
      ),
    ];
  }

  #sampling() {
    const most = Math.max(64, this.server.models.find((model) => model.id === preferences.model)?.context ?? 0);
    const rows = FIELDS.map((field) => this.#slider(field.name === "max_tokens" ? { ...field, max: most } : field));
    const seed = h("input", {
      type: "number",
      id: "seed",
      min: 0,
      step: 1,
      placeholder: "different each time",
      value: preferences.sampling.seed ?? "",
      onchange: () => this.#set("seed", seed.value === "" ? undefined : Math.trunc(Number(seed.value))),
    });
    const stop = h("input", {
      type: "text",
      id: "stop",
      placeholder: "none",
      value: (preferences.sampling.stop ?? []).join(", "),
      onchange: () => {
        const all = stop.value
          .split(",")
          .map((s) => s.trim())
          .filter(Boolean)
          .slice(0, 4);
        this.#set("stop", all.length ? all : undefined);
      },
    });
    const reset = h(
      "button",
      {
        type: "button",
        class: "button",
        onclick: () => {
          savePreferences({ sampling: {} });
          this.panel.draw();
          $("#panel-title").focus();
        },
      },
      "Use the server's defaults",
    );
    return [
      h("h3", {}, "Sampling"),
      ...rows,
      h(
        "div",
        { class: "field-row" },
        h("label", { for: "seed" }, "Seed"),
        seed,
        h("p", { class: "help" }, "The same seed and question give the same answer."),
      ),
      h(
        "div",
        { class: "field-row" },
        h("label", { for: "stop" }, "Stop at"),
        stop,
        h("p", { class: "help" }, "Texts, with commas between, that end the answer."),
      ),
      reset,
    ];
  }

  #slider({ name, label, min, max, step, help }) {
    const fallback = this.server.sampling[name];
    const id = `set-${name}`;
    const shown = h("output", { for: id });
    const input = h("input", {
      type: "range",
      id,
      min,
      max,
      step,
      oninput: () => {
        this.#set(name, Number(input.value));
        say();
      },
    });
    const say = () => {
      shown.textContent =
        preferences.sampling[name] === undefined ? `${fallback} (default)` : String(preferences.sampling[name]);
    };
    input.value = preferences.sampling[name] ?? fallback;
    say();
    return h(
      "div",
      { class: "field-row" },
      h("label", { for: id }, label, shown),
      input,
      help && h("p", { class: "help" }, help),
    );
  }

  #set(name, value) {
    const sampling = { ...preferences.sampling, [name]: value };
    if (value === undefined || Number.isNaN(value)) delete sampling[name];
    savePreferences({ sampling });
  }

  #retrieval() {
    const most = Math.min(20, this.server.retrieval.max_top_k);
    const shown = h("output", { for: "top-k-documents" }, String(preferences.topK));
    const count = h("input", {
      type: "range",
      id: "top-k-documents",
      min: 1,
      max: most,
      step: 1,
      oninput: () => {
        savePreferences({ topK: Number(count.value) });
        shown.textContent = count.value;
      },
    });
    count.value = preferences.topK;
    const mode = h(
      "select",
      { class: "field", id: "mode", onchange: () => savePreferences({ mode: mode.value }) },
      h("option", { value: "" }, "As the knowledge base was built"),
      MODES.map((one) => h("option", { value: one, selected: one === preferences.mode }, one)),
    );
    return [
      h("h3", {}, "Documents"),
      h(
        "div",
        { class: "field-row" },
        h("label", { for: "top-k-documents" }, "Passages for each question", shown),
        count,
      ),
      h("div", { class: "field-row" }, h("label", { for: "mode" }, "How to search"), mode),
    ];
  }

  #data() {
    const file = h("input", {
      type: "file",
      accept: ".json,application/json",
      class: "visually-hidden",
      tabindex: -1,
      "aria-label": "File of chats",
      onchange: () => this.#import(file),
    });
    const button = (name, text, onclick, kind = "") =>
      h("button", { type: "button", class: `button ${kind}`, onclick }, name && icon(name, 16), text);
    return [
      h("h3", {}, "Your chats"),
      h("p", { class: "none" }, "They are kept in this browser only."),
      h(
        "div",
        { class: "row" },
        button("download", "Export all", () => exportJson(this.store.list())),
        button("upload", "Import", () => file.click()),
        file,
        button("trash", "Delete all", () => this.#clear(), "danger"),
      ),
      h("h3", {}, "Connection"),
      button("", "Change the API key", () => askKey("The key is kept in this browser.")),
    ];
  }

  async #import(input) {
    try {
      const found = parseExport(await input.files[0].text());
      this.act.imported(found);
      toast(`Imported ${found.length} chat${found.length === 1 ? "" : "s"}.`);
    } catch (error) {
      toast(error.message, "error");
    }
    input.value = "";
  }

  async #clear() {
    if (
      await confirm("Delete all chats?", "They are kept in this browser only, and will be gone for good.", "Delete all")
    )
      this.act.cleared();
  }
}

export function setTheme(theme) {
  savePreferences({ theme });
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

/** Asks for the key; whether one was given. */
export async function askKey(text) {
  const key = await ask("API key", text, "Key", "", "password");
  if (key !== null) setKey(key);
  return key !== null;
}
