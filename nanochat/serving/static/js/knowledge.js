// Knowledge bases: choosing, filling, searching and deleting them.

import * as api from "./api.js";
import { $, h, icon, iconButton, plural } from "./dom.js";
import { announce, confirm, toast } from "./notices.js";
import { preferences, savePreferences } from "./store.js";

const FIRST_NAME = "documents"; // of the knowledge base that a first upload makes

const POLL_EVERY = 250; // milliseconds, while the server indexes a file

const megabytes = (bytes) => `${Math.round(bytes / (1 << 20))} MB`;

/** act: changed(bases), passage(hit): the element that shows a passage. */
export class Knowledge {
  constructor(panel, server, act) {
    Object.assign(this, { panel, server, act, bases: [], target: "", jobs: [], working: false });
    panel.add("documents", "Documents", (body) => this.#draw(body));
  }

  /** Reads the list from the server. */
  async load() {
    this.bases = await api.bases();
    if (!this.bases.some((base) => base.id === this.target))
      this.target = preferences.knowledge || this.bases[0]?.id || "";
    this.act.changed(this.bases);
    this.panel.refresh("documents");
  }

  #draw(body) {
    if (!this.server.retrieval.available) {
      body.append(h("p", { class: "none" }, "This server has no search over documents."));
      return;
    }
    body.append(h("p", { class: "none" }, "Answers can rest on your documents, and cite them."), this.#list());
    if (this.#writable) body.append(...this.#creation(), ...this.#uploading());
    const base = this.#base();
    if (base?.documents) body.append(...this.#search(base), ...this.#contents(base));
  }

  /** Whether the server lets clients change its knowledge bases. */
  get #writable() {
    return this.server.retrieval.uploads;
  }

  get #most() {
    return this.server.limits.max_upload_bytes;
  }

  #base() {
    return this.bases.find((base) => base.id === this.target);
  }

  #list() {
    const radio = (id, name, count, remove) =>
      h(
        "div",
        { class: `base${this.#chosen(id) ? " chosen" : ""}` },
        h(
          "label",
          { class: "use" },
          h("input", {
            type: "radio",
            name: "base",
            value: id,
            checked: this.#chosen(id),
            onchange: () => this.choose(id),
          }),
          h("span", {}, h("span", { class: "name" }, name), h("span", { class: "count" }, count)),
        ),
        remove,
      );
    const rows = this.bases.map((base) =>
      radio(
        base.id,
        base.id,
        plural(base.documents, "document"),
        this.#writable && iconButton("trash", `Delete the knowledge base ${base.id}`, () => this.#delete(base)),
      ),
    );
    return h(
      "div",
      { role: "radiogroup", "aria-label": "Answer from", id: "bases" },
      radio("", "No documents", "the model answers by itself"),
      rows,
    );
  }

  #chosen(id) {
    return id === (preferences.knowledge || (this.#base() && !this.#base().documents ? this.target : ""));
  }

  /** How the chosen one can be searched. */
  modes() {
    return this.bases.find((base) => base.id === preferences.knowledge)?.modes ?? [];
  }

  /** Answers rest on this knowledge base from now on, and uploads go to it. An empty one only takes uploads. */
  choose(id) {
    this.target = id;
    savePreferences({ knowledge: this.#base()?.documents ? id : "" });
    this.act.changed(this.bases);
    this.panel.refresh("documents");
    $(`#bases input[value="${CSS.escape(id)}"]`)?.focus();
  }

  /** What was chosen below the message box: uploads and searches go there too. */
  follow() {
    if (preferences.knowledge) this.target = preferences.knowledge;
    this.panel.refresh("documents");
  }

  async #delete(base) {
    if (
      !(await confirm(
        `Delete ${base.id}?`,
        `${plural(base.documents, "document")} will be gone for good, on the server.`,
      ))
    )
      return;
    await this.#tell(async () => {
      await api.deleteBase(base.id);
      if (preferences.knowledge === base.id) savePreferences({ knowledge: "" });
      await this.load();
    });
  }

  async #tell(work) {
    try {
      await work();
    } catch (error) {
      toast(error.message, "error");
    }
  }

  #creation() {
    const field = h("input", {
      type: "text",
      id: "new-base",
      placeholder: "field-notes",
      maxlength: 64,
      autocomplete: "off",
    });
    const form = h(
      "form",
      {
        class: "inline",
        onsubmit: (event) => {
          event.preventDefault();
          this.#create(field.value);
        },
      },
      field,
      h("button", { class: "button" }, icon("plus", 16), "Create"),
    );
    return [h("h3", {}, h("label", { for: "new-base" }, "New knowledge base")), form];
  }

  async #create(text) {
    const name = slug(text);
    if (!name) return toast("A name needs letters or digits.", "error");
    await this.#tell(async () => {
      await api.createBase(name);
      await this.load();
      this.choose(name);
    });
  }

  #uploading() {
    const types = this.server.retrieval.file_types;
    const input = h("input", {
      type: "file",
      multiple: true,
      accept: types.join(","),
      class: "visually-hidden",
      id: "files",
      onchange: () => {
        this.#add([...input.files]);
        input.value = "";
      },
    });
    const drop = h(
      "label",
      {
        class: "drop",
        for: "files",
        ondragover: (event) => {
          event.preventDefault();
          drop.classList.add("over");
        },
        ondragleave: () => drop.classList.remove("over"),
        ondrop: (event) => {
          event.preventDefault();
          drop.classList.remove("over");
          this.#add([...event.dataTransfer.files]);
        },
      },
      icon("upload", 24),
      h("strong", {}, this.target ? `Add documents to ${this.target}` : "Add documents"),
      h("span", {}, "Choose files, or drop them here"),
      h("span", {}, `${types.join(" ")}, up to ${megabytes(this.#most)}`),
      input,
    );
    return [
      h("h3", {}, "Upload"),
      drop,
      h(
        "ul",
        { class: "uploads", id: "uploads", "aria-label": "Uploads" },
        this.jobs.map((job) => job.row),
      ),
    ];
  }

  #add(files) {
    for (const file of files) {
      const job = this.#job(file, this.target || FIRST_NAME);
      this.jobs.unshift(job);
      $("#uploads")?.prepend(job.row);
    }
    this.#work();
  }

  #job(file, base) {
    const types = this.server.retrieval.file_types;
    const controller = new AbortController();
    const bar = h("progress", { max: 1, value: 0, "aria-label": `Upload of ${file.name}` });
    const state = h("span", { class: "state" }, "waiting");
    const cancel = iconButton("close", `Stop the upload of ${file.name}`, () => {
      controller.abort();
      if (!job.begun) this.#end(job, "stopped", "failed");
    });
    const job = {
      file,
      base,
      controller,
      bar,
      state,
      cancel,
      begun: false,
      over: false,
      row: h("li", { class: "upload" }, h("span", { class: "name", title: file.name }, file.name), cancel, bar, state),
    };
    if (!types.some((type) => file.name.toLowerCase().endsWith(type)))
      this.#end(job, `only ${types.join(", ")} can be added`, "failed");
    else if (file.size > this.#most) this.#end(job, `larger than ${megabytes(this.#most)}`, "failed");
    return job;
  }

  #end(job, text, kind) {
    job.over = true;
    job.state.textContent = text;
    job.row.classList.add(kind);
    job.bar.remove();
    job.cancel.remove();
  }

  async #work() {
    if (this.working) return;
    this.working = true;
    for (let job; (job = this.jobs.findLast((one) => !one.begun && !one.over));) await this.#run(job);
    this.working = false;
  }

  async #run(job) {
    job.begun = true;
    try {
      if (!this.bases.some((base) => base.id === job.base)) await api.createBase(job.base);
      const sent = await api.upload(
        job.base,
        job.file,
        (share) => this.#show(job, "sending", share),
        job.controller.signal,
      );
      job.cancel.remove(); // from here on it is the server's
      const told = await this.#indexed(job, sent);
      if (told.status === "failed") throw new Error(told.error);
      const n = told.added + told.updated;
      this.#end(job, n ? `added${n > 1 ? `, ${plural(n, "document")}` : ""}` : "was there already", "done");
      announce(`${job.file.name} was added.`);
      await this.load();
      if (!preferences.knowledge || this.target === job.base) this.choose(job.base);
    } catch (error) {
      this.#end(job, error.name === "AbortError" ? "stopped" : error.message, "failed");
    }
  }

  #show(job, what, share) {
    job.state.textContent = `${what}, ${Math.round(share * 100)} %`;
    job.bar.value = share;
  }

  /** Waits until the server has read and indexed a file. */
  async #indexed(job, sent) {
    let told = sent;
    while (told.status === "waiting" || told.status === "processing") {
      if (told.documents) this.#show(job, "indexing", told.done / told.documents);
      else job.state.textContent = told.status === "waiting" ? "waiting for other files" : "reading";
      await new Promise((resolve) => setTimeout(resolve, POLL_EVERY));
      told = await api.uploadState(job.base, sent.id);
    }
    return told;
  }

  #search(base) {
    const field = h("input", {
      type: "text",
      id: "try-search",
      placeholder: "Words or a question",
      autocomplete: "off",
    });
    const found = h("div", { "aria-live": "polite", class: "found" });
    const form = h(
      "form",
      {
        class: "inline",
        onsubmit: async (event) => {
          event.preventDefault();
          if (!field.value.trim()) return;
          await this.#tell(async () => {
            const hits = await api.searchBase(base.id, field.value.trim(), 5);
            found.replaceChildren(
              ...(hits.length
                ? hits.map((hit) => this.act.passage(hit))
                : [h("p", { class: "none" }, "Nothing found.")]),
            );
          });
        },
      },
      field,
      h("button", { class: "button" }, icon("search", 16), "Search"),
    );
    return [h("h3", {}, h("label", { for: "try-search" }, `Search in ${base.id}`)), form, found];
  }

  #contents(base) {
    const list = h("ul", { class: "documents" });
    const details = h(
      "details",
      {
        ontoggle: async () => {
          if (!details.open || list.childElementCount) return;
          await this.#tell(async () =>
            list.append(...(await api.documents(base.id)).map((document) => this.#document(base, document))),
          );
        },
      },
      h("summary", {}, `All ${plural(base.documents, "document")}`),
      list,
    );
    return [h("h3", {}, "Contents"), details];
  }

  #document(base, document) {
    const name = document.title || document.id;
    const remove =
      this.#writable &&
      iconButton("trash", `Delete ${name}`, async () => {
        await this.#tell(async () => {
          await api.deleteDocument(base.id, document.id);
          row.remove();
          await this.load();
        });
      });
    const row = h("li", {}, h("span", { class: "name", title: document.source || document.id }, name), remove);
    return row;
  }
}

/** A name as the server wants it. */
export const slug = (text) =>
  text
    .normalize("NFKD")
    .replace(/\p{M}/gu, "") // accents
    .toLowerCase()
    .replace(/[^a-z0-9_]+/g, "-")
    .replace(/^[-_]+|-+$/g, "")
    .slice(0, 64);
