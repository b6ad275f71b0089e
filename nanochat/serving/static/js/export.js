// Conversations as files.

import { path, records, validated } from "./tree.js";

export function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const fileName = (title) =>
  title
    .normalize("NFKD")
    .replace(/[^\w\- ]+/g, "")
    .trim()
    .replace(/\s+/g, "-")
    .slice(0, 60)
    .toLowerCase() || "chat";

/** The chosen branch as Markdown, with the sources of each answer. */
export function toMarkdown(conversation) {
  const parts = [`# ${conversation.title || "Chat"}`];
  if (conversation.system) parts.push(`> System: ${conversation.system.replaceAll("\n", "\n> ")}`);
  for (const node of path(conversation)) {
    parts.push(`## ${node.role === "user" ? "You" : "Assistant"}`, node.text);
    const cited = records(node.citations).map(
      (c) => `- [${c.n}] ${c.title || c.id}${c.source ? ` (${c.source})` : ""}`,
    );
    if (cited.length) parts.push(`Sources:\n\n${cited.join("\n")}`);
  }
  return `${parts.join("\n\n")}\n`;
}

export function exportMarkdown(conversation) {
  download(`${fileName(conversation.title)}.md`, "text/markdown", toMarkdown(conversation));
}

export function exportJson(conversations, name = "") {
  const text = JSON.stringify({ format: "nanochat-conversations", version: 1, conversations }, null, 1);
  download(`${name ? fileName(name) : "nanochat-chats"}.json`, "application/json", text);
}

/** The conversations of a file that `exportJson` wrote. Throws an Error that says what is wrong. */
export function parseExport(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error("this is no JSON file");
  }
  if (value?.format !== "nanochat-conversations" || !Array.isArray(value.conversations))
    throw new Error("this is no export of nanochat");
  return value.conversations.map(validated);
}
