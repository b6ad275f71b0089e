// The panel at the right shows one of: documents, sources, settings.

import { $, icon } from "./dom.js";

export class Panel {
  /** changed: called when it opens or closes. */
  constructor(changed) {
    this.changed = changed;
    this.views = {}; // name -> { title, draw(body) }
    this.name = "";
    $("#close-panel").append(icon("close"));
    $("#close-panel").addEventListener("click", () => this.close());
  }

  /** A view with the button that opens it. */
  add(name, title, draw) {
    this.views[name] = { title, draw };
    $(`#show-${name}`).addEventListener("click", () => (this.name === name ? this.close() : this.open(name)));
  }

  open(name, focus = true) {
    this.name = name;
    $("#panel").hidden = false;
    $("#panel-title").textContent = this.views[name].title;
    this.draw();
    this.#mark();
    if (focus) $("#panel-title").focus();
  }

  /** Draws the view again when it is `name` that is open. */
  refresh(name) {
    if (this.name === name) this.draw();
  }

  draw() {
    const body = $("#panel-body");
    body.replaceChildren();
    this.views[this.name].draw(body);
  }

  close() {
    if (!this.name) return;
    const opener = $(`#show-${this.name}`);
    this.name = "";
    $("#panel").hidden = true;
    this.#mark();
    opener.focus();
  }

  #mark() {
    for (const name of Object.keys(this.views))
      $(`#show-${name}`).setAttribute("aria-expanded", String(name === this.name));
    this.changed();
  }
}
