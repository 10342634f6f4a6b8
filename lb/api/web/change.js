// The dialog of a change: shows the plan of a dry run first; the change is then applied only if the service is
// unmodified (If-Match).

import { pathOf } from "./api.js";
import { h, say, set } from "./dom.js";
import { differences, endingSentence, percent, planSentence, plural, whole } from "./words.js";

const TYPING_MS = 300;
const MOST_WEIGHT = 65535;
const STAYING = "connections older than the change stay on their backend.";

// Texts, fields and request of each kind of change. `values`: of the fields.
const KINDS = {
  drain: {
    title: (vip, backend) => `Drain ${backend}`,
    about: "Existing connections stay on this backend; new ones go to the others.",
    button: () => "Drain",
    method: "PATCH",
    body: () => ({ draining: true }),
  },
  undrain: {
    title: (vip, backend) => `Undrain ${backend}`,
    about: "This backend gets new connections again; existing connections do not move.",
    button: () => "Undrain",
    method: "PATCH",
    body: () => ({ draining: false }),
  },
  weight: {
    title: (vip, backend) => `Weight of ${backend}`,
    about: "Share of new connections; existing connections do not move. 0: no new connections.",
    fields: [{ name: "weight", label: "Weight", number: true }],
    button: ({ weight }) => `Set weight to ${weight}`,
    method: "PATCH",
    body: ({ weight }) => ({ weight }),
  },
  remove: {
    title: (vip, backend) => `Remove ${backend}`,
    about: "Existing connections of this backend break. Drain it first to keep them.",
    button: () => "Remove",
    dangerous: true,
    method: "DELETE",
    body: () => undefined,
  },
  add: {
    title: (vip) => `Add a backend to ${vip}`,
    about: "The backend gets its share of new connections; existing connections do not move.",
    fields: [
      { name: "backend", label: "Address", hint: "ADDR or ADDR:PORT; default port: that of the VIP" },
      { name: "weight", label: "Weight", number: true },
    ],
    button: ({ backend }) => `Add ${backend}`,
    method: "POST",
    body: ({ backend, weight }) => ({ backends: [{ backend, weight }] }),
  },
};

export class ChangeDialog {
  // `onDone(vip, sentence)` after a change; `onLost(problem)` if the token is no longer valid.
  constructor(api, onDone, onLost) {
    this.api = api;
    this.onDone = onDone;
    this.onLost = onLost;
    this.title = h("h2", { id: "change-title" });
    this.about = h("p", {});
    this.fields = h("div", { class: "fields" });
    this.conflict = h("div", { class: "conflict", role: "alert" });
    this.plan = h("div", { class: "plan", "aria-live": "polite" });
    this.error = h("p", { class: "error", role: "alert" });
    this.confirm = h("button", { type: "submit", class: "primary" });
    const cancel = h("button", { type: "button", onclick: () => this.element.close() }, "Cancel");
    const buttons = h("div", { class: "buttons" }, cancel, this.confirm);
    const form = h("form", { novalidate: true, onsubmit: (event) => this.submit(event) });
    form.append(this.title, this.about, this.fields, this.conflict, this.plan, this.error, buttons);
    this.element = h("dialog", { "aria-labelledby": "change-title", onclose: () => this.closed() }, form);
  }

  async open(kind, vip, backend = null) {
    Object.assign(this, { kind: KINDS[kind], vip, backend, service: null, etag: null, planned: null });
    this.running = new AbortController();
    say(this.title, this.kind.title(vip, backend));
    say(this.about, this.kind.about);
    set(this.confirm, "class", this.kind.dangerous ? "primary dangerous" : "primary");
    this.conflict.replaceChildren();
    this.inputs = new Map((this.kind.fields ?? []).map((field) => [field.name, new Field(field, () => this.typed())]));
    this.fields.replaceChildren(...[...this.inputs.values()].map((each) => each.element));
    this.unplanned("Reading the service…");
    this.fields.inert = true; // input now would be overwritten
    this.element.showModal();
    await this.guarded(async (signal) => {
      await this.read(signal);
      this.fields.inert = false;
      const known = this.service.backends.find((each) => each.backend === this.backend);
      this.inputs.get("weight")?.give(known?.weight ?? 1);
      const [first] = this.inputs.values();
      if (first) first.focus();
      if (first) this.unplanned("");
      else await this.ask(signal);
    });
  }

  closed() {
    clearTimeout(this.timer);
    this.running?.abort();
  }

  async read(signal) {
    const { document, etag } = await this.api.ask("GET", pathOf(this.vip), { signal });
    this.service = document;
    this.etag = etag;
  }

  typed() {
    clearTimeout(this.timer);
    this.running.abort();
    this.unplanned("");
    if (this.filled()) this.timer = setTimeout(() => this.guarded((signal) => this.ask(signal)), TYPING_MS);
  }

  filled() {
    return [...this.inputs.values()].every((each) => each.value !== "");
  }

  get values() {
    return Object.fromEntries([...this.inputs].map(([name, input]) => [name, input.value]));
  }

  // Dry run with the current values.
  async ask(signal) {
    this.unplanned("Computing the plan…");
    const { document } = await this.send("?dry_run=true", signal);
    this.planned = JSON.stringify(this.values);
    this.plan.replaceChildren(...planView(document));
    say(this.confirm, this.kind.button(this.values));
    this.confirm.disabled = document.changes.length === 0;
  }

  send(query, signal) {
    const path = this.kind.method === "POST" ? `${pathOf(this.vip)}/backends` : pathOf(this.vip, this.backend);
    const { method, body } = this.kind;
    return this.api.ask(method, path + query, { body: body(this.values), ifMatch: this.etag, signal });
  }

  unplanned(words) {
    this.planned = null;
    this.confirm.disabled = true;
    say(this.confirm, this.kind.fields ? "Apply" : this.kind.button({}));
    this.plan.replaceChildren(words);
    this.fault(null);
  }

  async submit(event) {
    event.preventDefault();
    clearTimeout(this.timer);
    if (!this.filled() || !this.service) return;
    const isPlanned = this.planned === JSON.stringify(this.values);
    if (isPlanned && this.confirm.disabled) return;
    await this.guarded(isPlanned ? (signal) => this.make(signal) : (signal) => this.ask(signal));
  }

  async make(signal) {
    this.confirm.disabled = true;
    const { document } = await this.send("", signal);
    this.element.close();
    this.onDone(this.vip, done(this.kind, this.vip, this.backend, this.values, document));
  }

  // Runs `work`; a newer one, or closing the dialog, aborts it.
  async guarded(work) {
    this.running.abort();
    this.running = new AbortController();
    const { signal } = this.running;
    try {
      await work(signal);
    } catch (problem) {
      if (!signal.aborted) await this.failed(problem);
    }
  }

  async failed(problem) {
    if (problem.status === 401) {
      this.element.close();
      this.onLost(problem);
    } else if (problem.status === 412) {
      await this.guarded((signal) => this.changedMeanwhile(signal));
    } else {
      this.unplanned("");
      this.fault(problem);
    }
  }

  async changedMeanwhile(signal) {
    const before = this.service;
    await this.read(signal);
    const list = h("ul", {}, ...differences(before, this.service).map((each) => h("li", {}, each)));
    const now = this.service.backends.map(backendWords);
    const state = h("p", {}, `Current backends: ${now.join("; ") || "none"}. Review the new plan before applying.`);
    this.conflict.replaceChildren(h("strong", {}, `${this.vip} was modified by someone else:`), list, state);
    await this.ask(signal);
  }

  // Next to the field concerned, or below.
  fault(problem) {
    for (const input of this.inputs?.values() ?? []) input.fault("");
    const steps = problem?.field?.split("/") ?? [];
    const input = this.inputs?.get({ address: "backend" }[steps.at(-1)] ?? steps.at(-1));
    if (input) input.fault(problem.message);
    say(this.error, problem && !input ? problem.message : "");
  }
}

function backendWords({ backend, weight, draining }) {
  return `${backend} weight ${weight}${draining ? ", draining" : ""}`;
}

function planView({ changes, ending, notes, warnings }) {
  if (!changes.length) return [h("p", {}, "Nothing to change.")];
  const about = (plan) => [h("p", {}, planSentence(plan)), ...(plan ? [ring(plan), ...more(plan)] : [])];
  const found = changes.flatMap(({ plan }) => about(plan));
  if (ending) found.unshift(h("p", {}, h("strong", {}, endingSentence(ending))));
  const said = [...notes, ...warnings].map((each) => h("li", {}, each));
  return said.length ? [...found, h("ul", {}, ...said)] : found;
}

function ring(plan) {
  const words = `${percent(plan.moved, plan.slots)} of the ring moves, minimum ${percent(plan.minimum, plan.slots)}`;
  const bar = h("progress", { max: plan.slots, value: plan.moved, "aria-label": words });
  return h("div", { class: "ring" }, bar);
}

function more(plan) {
  if (!plan.in_transition) return [];
  return [h("p", {}, `${plural(plan.in_transition, "slot")} in transition afterwards: ${STAYING}`)];
}

function done(kind, vip, backend, values, report) {
  const [change] = report.changes;
  const moved = change?.plan ? `: ${whole(change.plan.moved)} of ${whole(change.plan.slots)} slots moved` : "";
  const what = kind.fields ? ` (${Object.values(values).join(", ")})` : "";
  return `${kind.title(vip, backend)}${what}, done${moved}.`;
}

// One input with its label and error.
class Field {
  constructor({ name, label, hint, number = false }, onInput) {
    this.number = number;
    this.onInput = onInput;
    const id = `field-${name}`;
    const kind = number ? { type: "number", min: 0, max: MOST_WEIGHT, step: 1 } : { type: "text", spellcheck: "false" };
    const described = { "aria-describedby": `${id}-fault ${id}-hint`, autocomplete: "off" };
    this.input = h("input", { id, name, ...kind, ...described, oninput: onInput });
    this.wrong = h("p", { id: `${id}-fault`, class: "error", role: "alert" });
    const steppers = () => [this.stepper(-1, "decrease", "−"), this.input, this.stepper(1, "increase", "+")];
    const control = number ? steppers() : [this.input];
    const small = hint ? h("small", { id: `${id}-hint` }, hint) : null;
    const heading = h("label", { for: id }, label);
    this.element = h("div", { class: "field" }, heading, h("div", { class: "control" }, ...control), small, this.wrong);
  }

  stepper(by, word, sign) {
    return h("button", { type: "button", "aria-label": word, onclick: () => this.step(by) }, sign);
  }

  get value() {
    const text = this.input.value.trim();
    return this.number && text !== "" ? Number(text) : text;
  }

  give(value) {
    this.input.value = value;
  }

  step(by) {
    this.give(Math.min(MOST_WEIGHT, Math.max(0, (Number(this.input.value) || 0) + by)));
    this.onInput();
  }

  focus() {
    this.input.focus();
    this.input.select();
  }

  fault(words) {
    say(this.wrong, words);
    set(this.input, "aria-invalid", words ? "true" : null);
  }
}
