// The server, as /v1 describes it.

const KEY = "nanochat.key";
let key = "";
try {
  key = localStorage.getItem(KEY) ?? "";
} catch {
  // no storage: asked for at each visit
}

export function setKey(value) {
  key = value;
  try {
    if (value) localStorage.setItem(KEY, value);
    else localStorage.removeItem(KEY);
  } catch {
    // no storage
  }
}

/** What went wrong, in the server's words. `status` 0: it could not be reached. */
export class ApiError extends Error {
  constructor(status, message, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const headers = (more = {}) => (key ? { Authorization: `Bearer ${key}`, ...more } : more);

async function failure(response) {
  let message = `the server answered ${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message ?? message;
  } catch {
    // no JSON: the status has to do
  }
  return new ApiError(response.status, message, Number(response.headers.get("Retry-After")) || 0);
}

async function send(path, { method = "GET", body, signal } = {}) {
  const json = body === undefined ? {} : { body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, {
      method,
      signal,
      headers: headers(body === undefined ? {} : { "Content-Type": "application/json" }),
      ...json,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server cannot be reached");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

/** JSON of a route. Throws ApiError. */
export async function request(path, options) {
  const response = await send(path, options);
  return response.status === 204 ? null : response.json();
}

/** The data of server-sent events, however the network cut them. */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() + "\n\n" : decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // the server stops when nobody reads
  }
}

/** The chunks of a streamed answer. Throws ApiError, also for an error that comes after the beginning. */
export async function* chat(body, signal) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    signal,
    body: { ...body, stream: true, stream_options: { include_usage: true } },
  });
  let ended = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      ended = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(500, chunk.error.message ?? "the answer failed");
    yield chunk;
  }
  if (!ended) throw new ApiError(0, "the connection broke off");
}

/** HTML of Markdown texts: items are { text, citations }. */
export async function markdown(items) {
  return (await request("ui/markdown", { method: "POST", body: { items } })).html;
}

export const config = () => request("ui/config");

const base = (name) => `v1/knowledge_bases/${encodeURIComponent(name)}`;
export const deleteBase = (name) => request(base(name), { method: "DELETE" });
export const bases = async () => (await request("v1/knowledge_bases")).data;
export const createBase = (name) => request("v1/knowledge_bases", { method: "POST", body: { name } });
export const searchBase = async (name, query, topK) =>
  (await request(`${base(name)}/search`, { method: "POST", body: { query, top_k: topK } })).data;
export const documents = async (name, limit = 200) => (await request(`${base(name)}/documents?limit=${limit}`)).data;
export const deleteDocument = (name, id) =>
  request(`${base(name)}/documents/${encodeURIComponent(id)}`, { method: "DELETE" });

/** How far an upload is: { status, documents, done, added, updated, unchanged, error }. */
export const uploadState = (name, id, signal) => request(`${base(name)}/uploads/${encodeURIComponent(id)}`, { signal });

/** Sends a file; `progress(share)` goes from 0 to 1. The answer is an upload, which the server then works on. */
export function upload(name, file, progress, signal) {
  return new Promise((resolve, reject) => {
    const call = new XMLHttpRequest(); // fetch cannot tell how far an upload is
    call.open("POST", `${base(name)}/documents`);
    for (const [header, value] of Object.entries(headers())) call.setRequestHeader(header, value);
    call.responseType = "json";
    call.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    call.onerror = () => reject(new ApiError(0, "the server cannot be reached"));
    call.onabort = () => reject(new DOMException("stopped", "AbortError"));
    call.onload = () => {
      if (call.status < 300) resolve(call.response);
      else
        reject(
          new ApiError(
            call.status,
            call.response?.error?.message ?? `the server answered ${call.status}`,
            Number(call.getResponseHeader("Retry-After")) || 0,
          ),
        );
    };
    signal.addEventListener("abort", () => call.abort());
    const form = new FormData();
    form.append("file", file);
    call.send(form);
  });
}
