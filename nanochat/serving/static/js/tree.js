// A conversation is a tree: an edited question or another answer is a sibling. Plain data, so that it can be stored.
//   conversation: { id, title, created, updated, system, nodes: { [id]: node } }, nodes.root included
//   node: { id, parent, role, text, children: [id], chosen: index into children, ...what the answer brought }

/** What an answer brings besides its text. */
export const BROUGHT = ["model", "finish", "usage", "timings", "citations", "grounding", "trace", "truncated", "error"];

export const newId = () =>
  crypto.randomUUID?.() ??
  Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

export function newConversation(system = "") {
  const now = Date.now();
  const root = { id: "root", parent: null, role: "root", text: "", children: [], chosen: 0 };
  return { id: newId(), title: "", created: now, updated: now, system, nodes: { root } };
}

/** Adds a node below `parent` and makes it the chosen one. */
export function add(conversation, parent, role, text, more = {}) {
  const node = { id: newId(), parent, role, text, children: [], chosen: 0, time: Date.now(), ...more };
  conversation.nodes[node.id] = node;
  const siblings = conversation.nodes[parent].children;
  siblings.push(node.id);
  conversation.nodes[parent].chosen = siblings.length - 1;
  return node;
}

/** The chosen nodes from the first message to the last. */
export function path(conversation) {
  const found = [];
  let node = conversation.nodes.root;
  while (node.children.length) {
    node = conversation.nodes[node.children[node.chosen]];
    found.push(node);
  }
  return found;
}

/** The nodes from the first message to this one. */
export function ancestors(conversation, id) {
  const found = [];
  for (let node = conversation.nodes[id]; node.parent; node = conversation.nodes[node.parent]) found.unshift(node);
  return found;
}

/** { index, count } of a node among the branches that begin where it does. */
export function place(conversation, id) {
  const siblings = conversation.nodes[conversation.nodes[id].parent].children;
  return { index: siblings.indexOf(id), count: siblings.length };
}

/** Chooses the branch `step` further along; the node that is shown instead of `id`. */
export function turn(conversation, id, step) {
  const parent = conversation.nodes[conversation.nodes[id].parent];
  const to = Math.min(Math.max(parent.children.indexOf(id) + step, 0), parent.children.length - 1);
  parent.chosen = to;
  return conversation.nodes[parent.children[to]];
}

/** What a file held, checked and made anew: files come from anywhere. Throws an Error that says what is wrong. */
export function validated(value) {
  const fail = (what) => {
    throw new Error(`this is no conversation of nanochat: ${what}`);
  };
  if (typeof value !== "object" || !value || typeof value.nodes !== "object" || !value.nodes?.root)
    fail("no messages in it");
  const conversation = newConversation(String(value.system ?? ""));
  conversation.title = String(value.title ?? "").slice(0, 200);
  conversation.created = Number(value.created) || conversation.created;
  conversation.updated = Number(value.updated) || conversation.updated;
  const copy = (from, parent, depth) => {
    if (depth > 2000) fail("it is nested too deeply");
    for (const id of Array.isArray(from.children) ? from.children : []) {
      const node = value.nodes[id];
      if (!node || (node.role !== "user" && node.role !== "assistant") || typeof node.text !== "string")
        fail("a message is damaged");
      const more = node.role === "assistant" ? Object.fromEntries(BROUGHT.map((name) => [name, node[name]])) : {};
      const made = add(conversation, parent, node.role, node.text, { ...more, time: Number(node.time) || 0 });
      copy(node, made.id, depth + 1);
    }
    const target = conversation.nodes[parent];
    target.chosen = Math.min(
      Math.max(Math.trunc(Number(from.chosen)) || 0, 0),
      Math.max(target.children.length - 1, 0),
    );
  };
  copy(value.nodes.root, "root", 0);
  return conversation;
}

/** Answers are checked when they are shown: only lists of plain records are cited. */
export const records = (value) =>
  Array.isArray(value) ? value.filter((item) => item && typeof item === "object") : [];
