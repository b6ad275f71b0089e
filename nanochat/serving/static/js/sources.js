// The passages that an answer rests on.

import { h } from "./dom.js";
import { records } from "./tree.js";

const COMMON = new Set(
  "the and for was are that this with from what who when where which how did does his her its has have had not but".split(
    " ",
  ),
);

/** Shows the sources of one answer; `shown` is the one that is brought into view. */
export class Sources {
  constructor(panel) {
    this.panel = panel;
    this.node = null;
    this.extra = null; // a passage that was found but is not cited
    this.shown = null;
    panel.add("sources", "Sources", (body) => this.#draw(body));
  }

  /** Cited source n of an answer. */
  showCited(node, n) {
    this.#show(node, null, records(node.citations).find((source) => source.n === n) ?? null);
  }

  /** Passage `i` that search `step` of an answer found. */
  showHit(node, step, i) {
    const hit = records(records(node.trace)[step]?.documents)[i];
    const cited = records(node.citations).find((source) => source.n === hit.n && source.id === hit.id);
    this.#show(node, cited ? null : hit, cited ?? hit);
  }

  /** What the panel shows when nobody chose: the newest answer. */
  follow(node) {
    Object.assign(this, { node, extra: null, shown: null });
    this.panel.refresh("sources");
  }

  #show(node, extra, shown) {
    Object.assign(this, { node, extra, shown });
    this.panel.open("sources", false);
    const card = document.querySelector(".source.shown");
    card?.scrollIntoView({ block: "nearest", behavior: "smooth" });
    card?.focus({ preventScroll: true });
  }

  #draw(body) {
    const cited = records(this.node?.citations);
    if (this.extra) body.append(h("h3", {}, "Found, but not cited"), this.card(this.extra));
    if (this.extra && cited.length) body.append(h("h3", {}, "Cited"));
    body.append(...cited.map((source) => this.card(source)));
    if (!cited.length && !this.extra) {
      const found = records(this.node?.trace).some((step) => records(step.documents).length);
      body.append(
        h(
          "p",
          { class: "none" },
          found
            ? "The answer cites none of the passages that were found."
            : "When an answer cites documents, their passages appear here. Choose a knowledge base below the message box.",
        ),
      );
    }
  }

  /** A passage with its title and where it comes from. */
  card(source) {
    const title = h(
      "h4",
      {},
      source.n !== undefined && h("span", { class: "n" }, String(source.n)),
      String(source.title || source.id || "untitled"),
    );
    const where = [source.source, source.title && source.id].filter(Boolean).join(" · ");
    const passage = h("p", { class: "passage" }, marked(String(source.passage ?? ""), this.node?.text ?? ""));
    return h(
      "article",
      { class: `source${source === this.shown ? " shown" : ""}`, tabindex: -1 },
      title,
      where && h("p", { class: "where" }, where),
      passage,
    );
  }
}

/** The passage with the words that the answer shares marked: where to look. */
function marked(passage, answer) {
  const words = (text) => text.toLowerCase().match(/[\p{L}\p{N}]{3,}/gu) ?? [];
  const said = new Set(words(answer).filter((word) => !COMMON.has(word)));
  return passage
    .split(/([\p{L}\p{N}]{3,})/u)
    .map((part, i) => (i % 2 && said.has(part.toLowerCase()) ? h("mark", {}, part) : part));
}
