// Writing: columns of text that stream, stop, go on and fork; and the list of stored states.

import { ApiError, bytes, call, count, getKey, make, setKey, showProblem, stream } from "./api.js";
import { showInside } from "./inspector.js";

const MOST_COLUMNS = 4;
const READ_AT_ONCE = 480; // characters that "Look inside" reads token by token

const $ = (id) => document.getElementById(id);
const columns = [];
let model = null;

/**
 * One text. `parts` is what it is made of, in order: {kind, text}, kind "given" (typed), "written"
 * (by the model) or "shared" (what a fork began with). `marks` are the stored states along it:
 * {at, id}, `at` in characters. What stands behind the last mark is read again by the next run.
 */
class Column {
  constructor({ parts = [], marks = [], from = null, settings = null } = {}) {
    Object.assign(this, { parts, marks, from, controller: null });
    this.name = [..."ABCD"].find((letter) => columns.every((c) => c.name !== letter));
    this.root = $("column").content.cloneNode(true).firstElementChild;
    this.find = (selector) => this.root.querySelector(selector);
    this.form = this.find("form");
    this.text = this.find(".text");
    this.range = this.find("input[type=range]");
    this.root.setAttribute("aria-label", `Column ${this.name}`);
    this.text.setAttribute("aria-label", `Text of column ${this.name}`);
    this.find("h3").textContent = this.name;
    for (const [name, value] of Object.entries(settings ?? {})) this.form.elements[name].value = value;
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.run(); });
    this.form.addEventListener("input", () => this.summarise());
    this.range.addEventListener("input", () => this.draw());
    this.find(".stop").addEventListener("click", () => this.stop());
    this.find(".clear").addEventListener("click", () => this.clear());
    this.find(".close").addEventListener("click", () => this.close());
    this.find(".fork-here").addEventListener("click", () => this.fork());
    this.find(".look").addEventListener("click", () => this.look());
    columns.push(this);
    $("columns").append(this.root);
    this.range.max = this.range.value = this.length;
    this.summarise();
    this.draw();
    columnsChanged();
  }

  get whole() { return this.parts.map((part) => part.text).join(""); }
  get length() { return this.parts.reduce((n, part) => n + part.text.length, 0); }

  /** Where the slider stands, never inside a character of two code units. */
  get cut() {
    const at = this.range.valueAsNumber;
    return /^[\uDC00-\uDFFF]/.test(this.whole.slice(at, at + 1)) ? at + 1 : at;
  }

  settings() {
    return Object.fromEntries([...this.form.querySelectorAll(".settings input")].map((x) => [x.name, x.value]));
  }

  summarise() {
    const { temperature, top_p, top_k, repetition_penalty: penalty, seed, max_tokens } = this.settings();
    this.find(".summary").textContent = [`temperature ${temperature}`, Number(top_p) !== 1 && `top-p ${top_p}`,
      top_k > 0 && `top-k ${top_k}`, penalty > 1 && `penalty ${penalty}`, seed && `seed ${seed}`,
      `${max_tokens} tokens`].filter(Boolean).join(", ");
  }

  say(text) { this.find(".status").textContent = text; }
  problem(message) { showProblem(this.find(".problem"), message); }

  /** Add text at the end without touching what stands there: a long stream stays cheap. */
  add(kind, text) {
    if (!text) return;
    const followsEnd = this.cut === this.length;
    const atBottom = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 8;
    const last = this.parts.at(-1);
    if (last?.kind === kind) last.text += text;
    else this.parts.push({ kind, text });
    this.range.max = this.length;
    if (followsEnd) this.range.value = this.length;
    const node = this.text.lastElementChild;
    if (followsEnd && node?.className === kind) node.lastChild.appendData(text);
    else this.draw();
    this.sayFork();
    if (atBottom) this.text.scrollTop = this.text.scrollHeight;
  }

  draw() {
    let start = 0;
    const spans = [];
    for (const { kind, text } of this.parts) {
      const inner = Math.max(0, Math.min(text.length, this.cut - start));
      if (inner) spans.push(make("span", { className: kind }, text.slice(0, inner)));
      if (inner < text.length) spans.push(make("span", { className: `${kind} beyond` }, text.slice(inner)));
      start += text.length;
    }
    this.text.replaceChildren(...spans);
    this.find(".fork").hidden = !this.length && !this.marks.length;
    this.find(".prompt-label").textContent = this.length || this.marks.length ? "Text to add before going on (may be empty)" : "Prompt";
    this.sayFork();
  }

  sayFork() {
    const mark = this.markBefore(this.cut);
    const again = this.cut - (mark?.at ?? 0);
    this.find("output").textContent = `${count(this.cut)} of ${count(this.length)} characters` +
      (again ? ` (${count(again)} of them are read again)` : "");
    this.range.setAttribute("aria-valuetext", this.find("output").textContent);
  }

  markBefore(at) { return this.marks.findLast((mark) => mark.at <= at); }

  async run() {
    if (this.controller) return;
    this.problem("");
    const settings = Object.entries(this.settings()).filter(([, value]) => value !== "");
    const mark = this.marks.at(-1);
    const added = this.find(".prompt").value;
    const prompt = this.whole.slice(mark?.at ?? 0) + added;
    const body = { model, prompt, store_state: true, stream_options: { include_usage: true },
      ...Object.fromEntries(settings.map(([name, value]) => [name, Number(value)])) };
    if (mark) body.state = mark.id;
    this.controller = new AbortController();
    this.busy(true);
    this.range.value = this.length;
    const started = performance.now();
    let reason = null, usage = null, shown = false;
    try {
      for await (const event of stream(body, this.controller.signal)) {
        if (!shown) {
          // Only now is it certain that the server took the prompt.
          shown = true;
          this.say("writing …");
          this.add("given", added);
          this.find(".prompt").value = "";
        }
        const choice = event.choices?.[0];
        this.add("written", choice?.text);
        if (choice?.state) this.marks.push({ at: this.length, id: choice.state });
        if (choice?.state_error) this.problem(`No state was stored: ${choice.state_error.message}`);
        reason = choice?.finish_reason ?? reason;
        usage = event.usage ?? usage;
      }
      const seconds = ((performance.now() - started) / 1000).toFixed(1);
      this.say(`${reason === "stop" ? "the text ended: " : ""}${count(usage.completion_tokens)} tokens, ${seconds} s`);
    } catch (cause) {
      this.say(cause.name === "AbortError" ? "stopped" : "failed");
      if (cause.name !== "AbortError") this.failed(cause, mark);
    }
    this.controller = null;
    this.busy(false);
    this.draw();
    listStates();
  }

  /** Tell of an error; a stored state that is gone is forgotten where its text can be read again. */
  failed(cause, mark) {
    const replaceable = cause.code === "state_not_found" && mark && (mark.at > 0 || !this.from);
    if (replaceable) this.marks.splice(this.marks.indexOf(mark), 1);
    this.problem(cause.message + (replaceable ? ". Try again: the text is then read anew" : ""));
    this.sayFork();
  }

  busy(is) {
    this.find(".run").disabled = is;
    this.find(".stop").disabled = !is;
    this.text.setAttribute("aria-busy", is);
    if (is) this.say("reading …");
  }

  stop() { this.controller?.abort(); }

  clear() {
    this.stop();
    Object.assign(this, { parts: [], marks: [], from: null });
    this.range.max = this.range.value = 0;
    this.say("");
    this.problem("");
    this.draw();
    this.find(".prompt").focus();
  }

  close() {
    this.stop();
    columns.splice(columns.indexOf(this), 1);
    this.root.remove();
    columnsChanged();
    columns[0].find(".prompt").focus();
  }

  /** Open a column that begins with this one's text up to the cut and a copy of its state there. */
  async fork() {
    this.problem("");
    if (columns.length === MOST_COLUMNS) return this.problem(`${MOST_COLUMNS} columns are open; close one first.`);
    const text = this.whole.slice(0, this.cut), mark = this.markBefore(this.cut);
    const button = this.find(".fork-here");
    button.disabled = true; // a second click would open a column more than there are
    try {
      const marks = [];
      if (mark) {
        const answer = await call(`v1/states/${mark.id}/fork`, { method: "POST" });
        marks.push({ at: mark.at, id: (await answer.json()).id });
      }
      const parts = text ? [{ kind: "shared", text }] : [];
      const settings = { ...this.settings(), seed: "" };
      new Column({ parts, marks, from: this.from, settings }).find(".prompt").focus();
      listStates();
    } catch (cause) {
      this.failed(cause, mark);
    } finally {
      button.disabled = false;
    }
  }

  /** Inspect the longest end of the text that can be read at once, up to the cut. */
  look() {
    const starts = [...(this.from ? [] : [{ at: 0, id: "" }]), ...this.marks];
    const start = starts.find((mark) => mark.at <= this.cut && this.cut - mark.at <= READ_AT_ONCE) ?? this.markBefore(this.cut);
    $("inspect-text").value = this.whole.slice(start?.at ?? 0, this.cut);
    fillFrom(start?.id ?? "");
    look();
  }
}

function columnsChanged() {
  for (const column of columns) column.find(".close").hidden = columns.length === 1;
}

/** Put the known states into the inspector's menu, `chosen` first of all. */
let states = [];
function fillFrom(chosen = $("inspect-from").value) {
  const known = states.some((state) => state.id === chosen) || !chosen ? [] : [{ id: chosen }];
  $("inspect-from").replaceChildren(make("option", { value: "" }, "nothing"),
    ...[...known, ...states].map((state) => make("option", { value: state.id }, shortName(state))));
  $("inspect-from").value = chosen;
}

const shortName = ({ id, tokens_seen }) =>
  id.slice(0, 14) + (tokens_seen === undefined ? "" : `, ${count(tokens_seen)} tokens`);

async function look() {
  const prompt = $("inspect-text").value, from = $("inspect-from").value;
  showProblem($("inspect-problem"));
  $("inspect-status").textContent = "reading …";
  try {
    if (!prompt && !from) throw new ApiError("Give a text to read, or choose a stored state.");
    const answer = prompt
      ? await call("v1/inspect", { method: "POST", json: { prompt, ...(from && { state: from }) } })
      : await call(`v1/states/${from}/inspect`);
    showInside(await answer.json(), prompt ? "The text, token by token" : `State ${shortName({ id: from })}`);
    $("inspect").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
    $("inspect").focus({ preventScroll: true });
  } catch (cause) {
    showProblem($("inspect-problem"), cause.message);
  }
  $("inspect-status").textContent = "";
}

async function listStates() {
  try {
    states = (await (await call("v1/states")).json()).data;
  } catch (cause) {
    showProblem($("states-problem"), cause.message);
    return;
  }
  showProblem($("states-problem"));
  fillFrom();
  $("delete-all").hidden = states.length < 2;
  $("state-list").replaceChildren(...states.toReversed().map(stateRow));
  if (!states.length) $("state-list").append(make("li", { className: "note" }, "No state is stored. Every run stores one at its end."));
}

function stateRow(state) {
  const act = (text, action) => make("button", { type: "button", "aria-label": `${text} ${state.id}`,
    onclick: () => action().catch((cause) => showProblem($("states-problem"), cause.message)) }, text);
  const when = new Date(1000 * state.created).toLocaleTimeString();
  return make("li", {},
    make("div", {}, make("span", { className: "id" }, state.id), make("div", { className: "note" },
      `${count(state.tokens_seen)} tokens, ${bytes(state.bytes)}, ${when}`)),
    make("div", { className: "row" },
      act("Continue", async () => openState(state)),
      act("Inspect", async () => { $("inspect-text").value = ""; fillFrom(state.id); await look(); }),
      act("Download", () => download(state)),
      act("Delete", () => remove(state))));
}

function openState(state) {
  const empty = columns.find((c) => !c.length && !c.marks.length && !c.controller);
  if (!empty && columns.length === MOST_COLUMNS) throw new ApiError(`${MOST_COLUMNS} columns are open; close one first.`);
  const column = empty ?? new Column();
  Object.assign(column, { marks: [{ at: 0, id: state.id }], from: state.id });
  column.say(`goes on from ${shortName(state)}`);
  column.draw();
  column.find(".prompt").focus();
}

async function download({ id }) {
  const content = await (await call(`v1/states/${id}/file`)).blob();
  const link = make("a", { href: URL.createObjectURL(content), download: `${id}.safetensors` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function remove({ id }) {
  if (!confirm(`Delete ${id}? It cannot be brought back.`)) return;
  await call(`v1/states/${id}`, { method: "DELETE" });
  await listStates();
}

async function removeAll() {
  if (!confirm(`Delete all ${count(states.length)} states? They cannot be brought back.`)) return;
  try {
    for (const { id } of states) await call(`v1/states/${id}`, { method: "DELETE" });
    await listStates();
  } catch (cause) {
    await listStates();
    showProblem($("states-problem"), cause.message);
  }
}

async function upload(file) {
  try {
    await call("v1/states/upload", { method: "POST", body: file });
    await listStates();
  } catch (cause) {
    showProblem($("states-problem"), cause.message);
  }
}

async function askModel() {
  showProblem($("problem"));
  try {
    const [first] = (await (await call("v1/models")).json()).data;
    model = first.id;
    $("model").textContent = model;
    await listStates();
  } catch (cause) {
    $("model").textContent = "";
    showProblem($("problem"), cause.message);
  }
}

$("key").value = getKey();
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  askModel();
});
$("inspect-form").addEventListener("submit", (event) => { event.preventDefault(); look(); });
$("refresh").addEventListener("click", listStates);
$("delete-all").addEventListener("click", removeAll);
$("upload").addEventListener("change", async (event) => {
  if (event.target.files.length) await upload(event.target.files[0]);
  event.target.value = ""; // the same file may be chosen again
});
document.addEventListener("keydown", (event) => {
  const own = columns.find((c) => c.root.contains(event.target));
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if ($("inspect").contains(event.target)) look();
    else (own ?? columns[0]).run();
  } else if (event.key === "Escape") {
    for (const column of own?.controller ? [own] : columns) column.stop();
  }
});

new Column();
askModel();
