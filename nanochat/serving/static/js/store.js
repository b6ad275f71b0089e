// Conversations in this browser (IndexedDB); preferences in localStorage. Nothing leaves the machine.

const NAME = "nanochat";

function promised(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** All conversations by id, kept in memory and written through. */
export class Store {
  constructor() {
    this.all = new Map();
    this.db = null; // null: a browser without storage; conversations last as long as the page
    this.channel = "BroadcastChannel" in globalThis ? new BroadcastChannel(NAME) : null;
  }

  /** Reads what there is; `changed(id)` is called when another tab changes a conversation. */
  async open(changed) {
    try {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
      this.db = await promised(request);
      for (const one of await promised(this.#objects("readonly").getAll())) this.all.set(one.id, one);
    } catch {
      this.db = null;
    }
    this.channel?.addEventListener("message", async ({ data: id }) => {
      const now = this.db && (await promised(this.#objects("readonly").get(id)));
      if (now) this.all.set(id, now);
      else this.all.delete(id);
      changed(id);
    });
    return this.db !== null;
  }

  #objects(mode) {
    return this.db.transaction("conversations", mode).objectStore("conversations");
  }

  /** Newest first. */
  list() {
    return [...this.all.values()].sort((a, b) => b.updated - a.updated);
  }

  async save(conversation) {
    this.all.set(conversation.id, conversation);
    await this.#write((objects) => objects.put(conversation), conversation.id);
  }

  async remove(id) {
    this.all.delete(id);
    await this.#write((objects) => objects.delete(id), id);
  }

  async clear() {
    for (const id of [...this.all.keys()]) await this.remove(id);
  }

  async #write(act, id) {
    if (!this.db) return;
    await promised(act(this.#objects("readwrite")));
    this.channel?.postMessage(id);
  }
}

const KEY = "nanochat.preferences"; // theme.js reads it too

const DEFAULTS = {
  theme: "system",
  sidebar: true,
  model: "",
  system: "",
  knowledge: "",
  topK: 5,
  mode: "",
  multiHop: true, // with models that were trained to
  sampling: {},
};

/** What the user chose; `sampling` holds only what differs from the server's defaults. */
export const preferences = { ...DEFAULTS };

try {
  Object.assign(preferences, JSON.parse(localStorage.getItem(KEY) ?? "{}"));
} catch {
  // no storage, or damaged: the defaults
}

export function savePreferences(change = {}) {
  Object.assign(preferences, change);
  try {
    localStorage.setItem(KEY, JSON.stringify(preferences));
  } catch {
    // no storage: they last as long as the page
  }
}
