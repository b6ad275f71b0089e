// Making elements. Text becomes text nodes, never HTML.

export const $ = (selector, root = document) => root.querySelector(selector);

/** An element: h("button", { class: "x", onclick: f, "aria-label": "…" }, icon("send"), "Send"). */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (["value", "checked", "disabled", "selected", "htmlFor", "indeterminate"].includes(name))
      element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// 24 x 24, drawn with strokes of 2.
const ICONS = {
  plus: "M12 5v14M5 12h14",
  search: "M10.500 17a6.500 6.500 0 1 0 0-13 6.500 6.500 0 0 0 0 13ZM20 20l-4.800-4.800",
  sidebar: "M4 6a2 2 0 0 1 2-2h12a2 2 0 0 1 2 2v12a2 2 0 0 1-2 2H6a2 2 0 0 1-2-2ZM9.500 4v16",
  close: "M6 6l12 12M18 6 6 18",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h9a2 2 0 0 1 2 2v8a2 2 0 0 1-2 2h-9a2 2 0 0 1-2-2v-8a2 2 0 0 1 2-2ZM4 15V5a2 2 0 0 1 2-2h9",
  check: "M5 12.500 10 17.500 19.500 7",
  redo: "M20 11.500A8 8 0 1 0 18 17M20 5v6.500h-6.500",
  edit: "M4 20l1-4.500L16.500 4a2 2 0 0 1 2.800 0l.7.700a2 2 0 0 1 0 2.800L8.500 19 4 20ZM14.500 6l3.500 3.500",
  left: "M14.500 6 8.500 12l6 6",
  right: "M9.500 6l6 6-6 6",
  down: "M6 9.500l6 6 6-6",
  more: "M5.500 12h.01M12 12h.01M18.500 12h.01",
  trash: "M4 7h16M9.500 7V4.500h5V7M6.500 7l1 13h9l1-13M10 11v5.500M14 11v5.500",
  download: "M12 4v11M7 10.500l5 5 5-5M5 20h14",
  upload: "M12 16V5M7 9.500l5-5 5 5M5 20h14",
  settings:
    "M4 7.500h9M17.500 7.500H20M4 16.500h2.500M11 16.500h9M15.300 9.700a2.200 2.200 0 1 0 0-4.400 2.200 2.200 0 0 0 0 4.400ZM8.700 18.700a2.200 2.200 0 1 0 0-4.400 2.200 2.200 0 0 0 0 4.400Z",
  documents:
    "M12 7c-2-1.700-4.700-2.200-8-2v13c3.300-.2 6 .3 8 2 2-1.700 4.700-2.200 8-2V5c-3.300-.2-6 .3-8 2ZM12 7v13",
  sources:
    "M9.500 8H6a1.500 1.500 0 0 0-1.500 1.500V13H9.500V8ZM9.500 13c0 2.500-1.500 4-4 4.500M19.500 8H16a1.500 1.500 0 0 0-1.500 1.500V13h5V8ZM19.500 13c0 2.500-1.500 4-4 4.500",
  keyboard: "M3 8a2 2 0 0 1 2-2h14a2 2 0 0 1 2 2v8a2 2 0 0 1-2 2H5a2 2 0 0 1-2-2ZM7 10h.01M11 10h.01M15 10h.01M8 14h8",
  sun: "M12 16a4 4 0 1 0 0-8 4 4 0 0 0 0 8ZM12 2.500v2M12 19.500v2M4.500 12h-2M21.500 12h-2M6.500 6.500 5 5M19 19l-1.500-1.500M17.500 6.500 19 5M5 19l1.500-1.500",
  steps: "M6 4v9a3 3 0 0 0 3 3h9M14.500 12.500 18 16l-3.500 3.500",
};

/** A decorative picture; the button around it carries the name. */
export function icon(name, size = 18) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const attributes = {
    viewBox: "0 0 24 24",
    width: size,
    height: size,
    fill: "none",
    stroke: "currentColor",
    "stroke-width": name === "more" ? 3 : 2,
    "stroke-linecap": "round",
    "stroke-linejoin": "round",
    "aria-hidden": "true",
  };
  for (const [key, value] of Object.entries(attributes)) svg.setAttribute(key, value);
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  if (name === "stop") path.setAttribute("fill", "currentColor");
  svg.append(path);
  if (name === "down") svg.classList.add("down");
  return svg;
}

export function iconButton(name, label, onclick, props = {}) {
  return h(
    "button",
    { type: "button", class: "icon-button small", "aria-label": label, title: label, onclick, ...props },
    icon(name, 16),
  );
}

/** Let a text area grow with its text, up to what CSS allows. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

export function plural(n, one, many = `${one}s`) {
  return `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
}

export const isMac = /Mac|iPhone|iPad/.test(navigator.platform);
