// What the page tells on its own: to screen readers, as short notes, and as questions.

import { $, h, icon } from "./dom.js";

/** Say something to screen readers once. */
export function announce(text) {
  const region = $("#status");
  region.textContent = "";
  setTimeout(() => {
    region.textContent = text;
  }, 50); // a changed region is read, an equal one is not
}

/** A note that leaves after some seconds; errors stay longer. */
export function toast(text, kind = "") {
  const close = h(
    "button",
    { type: "button", class: "icon-button small", "aria-label": "Close the note", onclick: () => note.remove() },
    icon("close", 14),
  );
  const note = h("div", { class: `toast ${kind}` }, h("span", {}, text), h("span", { class: "spacer" }), close);
  $("#toasts").append(note);
  setTimeout(() => note.remove(), kind === "error" ? 12000 : 5000);
}

/** Opens a dialog and resolves with its return value ("" when it was dismissed). */
function open(dialog) {
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener(
      "close",
      () => {
        dialog.remove();
        resolve(dialog.returnValue);
      },
      { once: true },
    ),
  );
}

function frame(title, text, ...content) {
  return h(
    "dialog",
    { "aria-labelledby": "dialog-title" },
    h("h2", { id: "dialog-title" }, title),
    text && h("p", {}, text),
    h(
      "form",
      {
        method: "dialog",
        onsubmit: (event) => {
          // forms are forbidden to go anywhere: close by hand
          event.preventDefault();
          event.target.closest("dialog").close(event.submitter?.value ?? "yes");
        },
      },
      ...content,
    ),
  );
}

const cancel = () =>
  h(
    "button",
    { class: "button", type: "button", onclick: (event) => event.target.closest("dialog").close("") },
    "Cancel",
  );

/** Whether the user agrees. */
export async function confirm(title, text, action = "Delete") {
  const yes = h("button", { class: "button danger", value: "yes" }, action);
  return (await open(frame(title, text, h("div", { class: "buttons" }, cancel(), yes)))) === "yes";
}

/** A line of text, or null when it was dismissed. */
export async function ask(title, text, label, value = "", type = "text") {
  const field = h("input", { type, value, id: "dialog-field", autocomplete: "off", autofocus: true });
  const dialog = frame(
    title,
    text,
    h("div", {}, h("label", { for: "dialog-field" }, label), field),
    h("div", { class: "buttons" }, cancel(), h("button", { class: "button primary", value: "yes" }, "Save")),
  );
  return (await open(dialog)) === "yes" ? field.value.trim() : null;
}

/** Rows of [keys, what they do]. */
export function showShortcuts(rows) {
  const table = h(
    "table",
    {},
    h(
      "tbody",
      {},
      rows.map(([keys, what]) => h("tr", {}, h("td", {}, h("kbd", {}, keys)), h("td", {}, what))),
    ),
  );
  return open(
    frame(
      "Keyboard",
      "",
      table,
      h("div", { class: "buttons" }, h("button", { class: "button", value: "yes" }, "Close")),
    ),
  );
}
