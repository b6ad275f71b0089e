// How one message looks, and what can be done with it.

import { $, grow, h, icon, iconButton, plural } from "./dom.js";
import { copyButton } from "./markdown.js";
import { records } from "./tree.js";

const SUPPORTED = 0.5; // as nanochat.rag.support has it

/**
 * The element of a node. `place` is { index, count } among its branches; `act` holds what the buttons do:
 * regenerate(node), edit(node, text), turn(node, step), showSource(node, n), showHit(node, step, i).
 */
export function messageView(node, place, act) {
  return node.role === "user" ? userView(node, place, act) : assistantView(node, place, act);
}

function userView(node, place, act) {
  const bubble = h("div", { class: "bubble" }, node.text);
  const edit = iconButton("edit", "Edit and send again", () => openEditor(item, node, act));
  const tools = h(
    "div",
    { class: "tools" },
    h(
      "span",
      { class: "on-demand" },
      copyButton(() => node.text, "", { "aria-label": "Copy", title: "Copy" }),
      edit,
    ),
    branches(node, place, act),
  );
  const item = h(
    "li",
    { class: "message user", "data-id": node.id },
    h("h2", { class: "visually-hidden" }, "You"),
    bubble,
    tools,
  );
  return item;
}

function openEditor(item, node, act) {
  const area = h("textarea", { "aria-label": "Edit your message", value: node.text });
  const close = () => {
    editor.replaceWith(...shown);
    $(".tools button:last-of-type", item)?.focus();
  };
  const submit = () => area.value.trim() && act.edit(node, area.value.trim());
  const editor = h(
    "div",
    {
      class: "editor",
      onkeydown: (event) => {
        if (event.key === "Escape") {
          event.stopPropagation();
          close();
        }
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
          event.preventDefault();
          submit();
        }
      },
    },
    area,
    h(
      "div",
      { class: "buttons" },
      h("button", { class: "button", type: "button", onclick: close }, "Cancel"),
      h("button", { class: "button primary", type: "button", onclick: submit }, "Send"),
    ),
  );
  const shown = [$(".bubble", item), $(".tools", item)];
  shown[0].replaceWith(editor);
  shown[1].remove();
  area.addEventListener("input", () => grow(area));
  area.focus();
  grow(area);
}

export function beginEditing(item) {
  $(".tools button[aria-label^=Edit]", item)?.click();
}

function assistantView(node, place, act) {
  const body = h(
    "div",
    { class: "body" },
    h("h2", { class: "visually-hidden" }, "Assistant"),
    traceView(node, act),
    h("div", { class: "content" }),
    citedView(node, act),
    noticesView(node, act),
    assistantTools(node, place, act),
  );
  const avatar = h("img", { class: "avatar", src: "static/icon.svg", alt: "", width: 28, height: 28 });
  const item = h("li", { class: "message assistant", "data-id": node.id }, avatar, body);
  body.addEventListener("click", (event) => {
    const link = event.target.closest("a.citation");
    if (!link) return;
    event.preventDefault();
    act.showSource(node, Number(link.dataset.citation));
  });
  return item;
}

function assistantTools(node, place, act) {
  return h(
    "div",
    { class: "tools" },
    branches(node, place, act),
    h(
      "span",
      { class: "on-demand" },
      copyButton(() => node.text, "", { "aria-label": "Copy", title: "Copy" }),
      iconButton("redo", "Another answer", () => act.regenerate(node)),
      statsView(node),
    ),
  );
}

function branches(node, place, act) {
  if (place.count < 2) return null;
  const back = iconButton("left", "Earlier version", () => act.turn(node, -1), { disabled: place.index === 0 });
  const forth = iconButton("right", "Later version", () => act.turn(node, 1), {
    disabled: place.index === place.count - 1,
  });
  const where = h(
    "span",
    { "aria-label": `Version ${place.index + 1} of ${place.count}`, role: "img" },
    `${place.index + 1}/${place.count}`,
  );
  return h("span", { class: "branches", role: "group", "aria-label": "Versions" }, back, where, forth);
}

/** Tokens, speed, time to the first token. */
function statsView(node) {
  const [tokens, rate, first] = [
    node.usage?.completion_tokens,
    node.timings?.tokens_per_second,
    node.timings?.first_token,
  ].map(Number);
  if (!tokens) return null;
  const cached = node.usage.prompt_tokens_details?.cached_tokens;
  const prompt = `prompt ${plural(node.usage.prompt_tokens, "token")}${cached ? `, ${cached} of them remembered` : ""}`;
  const parts = [
    plural(tokens, "token"),
    rate && `${rate.toFixed(rate < 10 ? 1 : 0)} tok/s`,
    first && `first after ${first < 1 ? `${Math.round(first * 1000)} ms` : `${first.toFixed(1)} s`}`,
  ];
  return h(
    "span",
    { class: "stats", title: `${node.model}: ${prompt}` },
    parts.filter(Boolean).map((part) => h("span", {}, part)),
  );
}

/** The sources that an answer cites. */
function citedView(node, act) {
  const cited = records(node.citations);
  if (!cited.length) return null;
  return h(
    "ul",
    { class: "cited", "aria-label": "Sources" },
    cited.map((source) =>
      h(
        "li",
        {},
        h(
          "button",
          {
            type: "button",
            onclick: () => act.showSource(node, source.n),
            title: String(source.title || source.id || ""),
          },
          h("span", { class: "n" }, String(source.n)),
          h("span", { class: "name" }, String(source.title || source.id || "untitled")),
        ),
      ),
    ),
  );
}

/** What was searched for, and what was found. */
function traceView(node, act) {
  const trace = records(node.trace);
  if (!trace.length) return null;
  const found = trace.reduce((sum, step) => sum + records(step.documents).length, 0);
  const what = trace.length > 1 ? `Searched ${trace.length} times` : `Searched “${shorten(trace[0].query, 60)}”`;
  const text = `${what}: ${found ? plural(found, "passage") : "nothing found"}`;
  const steps = trace.map((step, i) =>
    h(
      "li",
      {},
      h("span", { class: "query" }, `${trace.length > 1 ? `${i + 1}. ` : ""}“${step.query}”`),
      h(
        "ul",
        { class: "hits", "aria-label": "Found" },
        records(step.documents).map((hit, j) =>
          h(
            "li",
            {},
            h(
              "button",
              { type: "button", onclick: () => act.showHit(node, i, j) },
              String(hit.title || hit.id || "untitled"),
            ),
          ),
        ),
      ),
    ),
  );
  return h(
    "details",
    { class: "trace" },
    h("summary", {}, icon("search", 15), text, icon("down", 14)),
    h("ol", {}, steps),
  );
}

const shorten = (text, most) => (String(text).length > most ? `${String(text).slice(0, most - 1)}…` : String(text));

/** What the reader should know about an answer: an error, a low support, what was left out, why it ended. */
function noticesView(node, act) {
  const warn = (text) => h("div", { class: "notice warn" }, text);
  const found = [];
  if (node.error) {
    const again = h("button", { type: "button", class: "button", onclick: () => act.regenerate(node) }, "Try again");
    found.push(h("div", { class: "notice error" }, h("span", {}, node.error), again));
  } else if (node.finish === "stopped") found.push(warn("Stopped."));
  else if (node.finish === "length")
    found.push(warn("Cut off: the answer reached its limit of tokens, or the end of the model's context."));
  const weak = weakest(node);
  if (weak)
    found.push(
      warn(
        `The sources hardly bear this out (support ${weak.support.toFixed(2)}): “${shorten(weak.text, 120)}” Read them before you rely on it.`,
      ),
    );
  if (node.truncated?.turns)
    found.push(
      warn(
        `The model no longer saw the oldest ${plural(node.truncated.turns, "turn")}: the chat is too long for its context.`,
      ),
    );
  else if (node.truncated?.tokens)
    found.push(
      warn(
        `The model saw only a part of the question: ${plural(node.truncated.tokens, "token")} did not fit into its context.`,
      ),
    );
  return found;
}

/** The sentence that its documents support least, when that is too little. */
function weakest(node) {
  const judged = records(node.grounding?.sentences).filter((sentence) => typeof sentence.support === "number");
  const least = judged.sort((a, b) => a.support - b.support)[0];
  return least && least.support < SUPPORTED ? least : null;
}

/** Draws a finished answer's surroundings anew, around its text. */
export function refresh(item, node, place, act) {
  const fresh = messageView(node, place, act);
  $(".content", fresh)?.replaceWith($(".content", item) ?? "");
  fresh.className = item.className;
  item.replaceWith(fresh);
  return fresh;
}
