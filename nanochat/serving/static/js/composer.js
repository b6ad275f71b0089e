// The box where questions are written.

import { $, grow, h, icon } from "./dom.js";
import { preferences, savePreferences } from "./store.js";

/** act: send(text), stop(), editLast(). */
export class Composer {
  constructor(act) {
    this.act = act;
    this.form = $("#composer");
    this.area = $("#question");
    this.button = $("#send");
    this.busy = false;
    this.offers = null;
    this.area.addEventListener("input", () => this.#update());
    this.area.addEventListener("keydown", (event) => this.#key(event));
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.form.addEventListener("click", (event) => event.target === this.form && this.area.focus());
    this.setBusy(false);
  }

  #key(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      if (!this.busy) this.#submit();
    } else if (event.key === "ArrowUp" && !this.area.value) {
      event.preventDefault();
      this.act.editLast();
    }
  }

  #submit() {
    if (this.busy) return this.act.stop();
    const text = this.area.value.trim();
    if (!text) return;
    this.area.value = "";
    this.#update();
    this.act.send(text);
  }

  #update() {
    grow(this.area);
    this.button.disabled = !this.busy && !this.area.value.trim();
  }

  setBusy(busy) {
    this.busy = busy;
    this.button.setAttribute("aria-label", busy ? "Stop" : "Send");
    this.button.title = busy ? "Stop (Esc)" : "Send (Enter)";
    this.button.replaceChildren(icon(busy ? "stop" : "send", 19));
    this.#update();
  }

  /** Puts a text into the box, for the user to change. */
  fill(text) {
    this.area.value = text;
    this.#update();
    this.area.focus();
  }

  focus() {
    this.area.focus({ preventScroll: true });
  }

  /** The choice of a knowledge base, and of multi-hop search where a model can do it. */
  showRetrieval(bases, multiHop) {
    const place = $("#retrieval");
    place.hidden = bases === null;
    if (bases === null) return;
    const filled = bases.filter((base) => base.documents > 0);
    const known = filled.some((base) => base.id === preferences.knowledge);
    if (!known && preferences.knowledge) savePreferences({ knowledge: "" });
    const select = h(
      "select",
      {
        id: "knowledge",
        "aria-label": "Answer from documents",
        onchange: () => {
          savePreferences({ knowledge: select.value });
          this.showRetrieval(bases, multiHop);
          $("#knowledge").focus();
          this.act.knowledgeChosen();
        },
      },
      h("option", { value: "" }, filled.length ? "No documents" : "No documents yet"),
      filled.map((base) => h("option", { value: base.id, selected: base.id === preferences.knowledge }, base.id)),
    );
    const chosen = Boolean(preferences.knowledge);
    const chips = [h("span", { class: `chip${chosen ? " on" : ""}` }, icon("documents", 15), select, icon("down", 13))];
    if (chosen && multiHop) {
      const button = h(
        "button",
        {
          type: "button",
          class: "chip",
          id: "multi-hop",
          "aria-pressed": String(preferences.multiHop),
          title: "The model searches several times, with queries of its own",
          onclick: () => {
            savePreferences({ multiHop: !preferences.multiHop });
            button.setAttribute("aria-pressed", String(preferences.multiHop));
          },
        },
        icon("steps", 15),
        "Multi-hop",
      );
      chips.push(button);
    }
    place.replaceChildren(...chips);
    this.area.placeholder = chosen ? `Ask about ${preferences.knowledge}` : "Ask anything";
  }
}
