// Text of answers, rendered and sanitised by the server. The only place where HTML becomes elements.

import * as api from "./api.js";
import { h, icon } from "./dom.js";

const policy = globalThis.trustedTypes?.createPolicy("markdown", { createHTML: (html) => html }) ?? {
  createHTML: (html) => html,
};
const LEAST_PAUSE = 120; // milliseconds between two renderings of an answer that is being written
const BATCH = 50; // answers of a conversation in one request

/** Puts HTML of the server into an element, with a head over each block of code. */
function put(element, html) {
  const open = [...element.querySelectorAll(".code")].map((block) => block.scrollLeft);
  element.innerHTML = policy.createHTML(html);
  element.classList.remove("plain");
  element.querySelectorAll("pre.code").forEach((block, i) => {
    const language = block.querySelector("code").dataset.language;
    const frame = h("div", { class: "code-block" });
    block.replaceWith(frame);
    block.setAttribute("role", "region");
    block.setAttribute("aria-label", `Code${language ? ` in ${language}` : ""}`);
    frame.append(
      h(
        "div",
        { class: "code-head" },
        h("span", {}, language || "text"),
        copyButton(() => block.textContent),
      ),
      block,
    );
    if (open[i]) block.scrollLeft = open[i];
  });
}

function putPlain(element, text) {
  element.classList.add("plain");
  element.textContent = text;
}

/** A button that copies what `text()` returns and says so. */
export function copyButton(text, label = "Copy", props = {}) {
  const button = h(
    "button",
    {
      type: "button",
      class: "icon-button small",
      ...props,
      onclick: async () => {
        await copy(text());
        button.replaceChildren(icon("check", 15), ...(props["aria-label"] ? [] : ["Copied"]));
        setTimeout(() => button.replaceChildren(icon("copy", 15), ...(props["aria-label"] ? [] : [label])), 1600);
      },
    },
    icon("copy", 15),
    !props["aria-label"] && label,
  );
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // no permission, or no https: the old way
    const area = h("textarea", { value: text, class: "visually-hidden", "aria-hidden": "true" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

const REMEMBERED = 400; // answers whose HTML is kept while the page is open
const rendered = new Map();
const name = ({ text, citations }) => `${citations.join()}:${text}`;

/** Renders finished answers: jobs are { element, text, citations }. Without the server they stay plain text. */
export async function renderAll(jobs) {
  const missing = [];
  for (const job of jobs) {
    const html = rendered.get(name(job));
    if (html === undefined) missing.push(job);
    else put(job.element, html);
  }
  for (const { element, text } of missing) if (!element.childNodes.length) putPlain(element, text);
  for (let i = 0; i < missing.length; i += BATCH) {
    const some = missing.slice(i, i + BATCH);
    try {
      const html = await api.markdown(some.map(({ text, citations }) => ({ text, citations })));
      some.forEach((job, j) => {
        put(job.element, html[j]);
        rendered.set(name(job), html[j]);
        if (rendered.size > REMEMBERED) rendered.delete(rendered.keys().next().value);
      });
    } catch {
      some.forEach(({ element, text }) => putPlain(element, text));
    }
  }
}

/** Renders an answer while it is being written: one request at a time, always the newest text. */
export class LiveText {
  constructor(element, drawn) {
    this.element = element;
    this.drawn = drawn; // called after each change of the page
    this.text = "";
    this.citations = [];
    this.running = null;
    this.html = false;
  }

  update(text, citations) {
    this.text = text;
    this.citations = citations;
    if (!this.html) putPlain(this.element, text);
    this.running ??= this.#run();
  }

  async #run() {
    let shown;
    while (shown !== this.text) {
      shown = this.text;
      try {
        const [html] = await api.markdown([{ text: shown, citations: this.citations }]);
        this.html = true;
        put(this.element, html);
      } catch {
        putPlain(this.element, this.text);
      }
      this.drawn();
      await new Promise((resolve) => setTimeout(resolve, LEAST_PAUSE));
    }
    this.running = null;
  }

  /** The whole text, with the citations that are now known. */
  async finish(text, citations) {
    await this.running;
    this.text = text;
    await renderAll([{ element: this.element, text, citations }]);
    this.drawn();
  }
}
