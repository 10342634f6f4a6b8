// The table of services and the backends of expanded ones, with their actions.

import { Keyed, h, say, set } from "./dom.js";
import { STATES, figure, openText, remark, stateOf, tally, tallyWords, whole } from "./words.js";

// Heading, value, width it needs, and the only mode that has it: in the others backends reply directly.
const FIGURES = [
  ["conn/s", (rates) => rates.connections, ""],
  ["retry/s", (rates) => rates.retries, "wide"],
  ["pkt/s", (rates) => rates.packets, ""],
  ["bit/s", (rates) => rates.bits, "wide"],
  ["reply pkt/s", (rates) => rates.replyPackets, "wider", "nat"],
  ["reply bit/s", (rates) => rates.replyBits, "wider", "nat"],
];

export class ServiceList {
  // `act(kind, vip, backend)`: open a change dialog; `toggle(vip)`: expand or collapse a service.
  constructor(act, toggle) {
    this.list = h("ul", { class: "services" });
    this.empty = h("p", { class: "empty", hidden: true });
    this.element = h("div", {}, this.empty, this.list);
    this.views = new Keyed(this.list, (item) => serviceView(item, act, toggle));
  }

  // `shown`: [{service, backends}], the matches of the filter.
  update(shown, state) {
    set(this.empty, "hidden", shown.length > 0);
    say(this.empty, state.status.services.length ? "No services match the filter." : nothingServed(state));
    this.views.update(shown.map((each) => [each.service.vip, { ...each, state }]));
  }

  row(vip, name) {
    return this.views.known.get(vip)?.rows()?.get(name)?.element;
  }

  heading(vip) {
    return this.views.known.get(vip)?.heading;
  }
}

function nothingServed({ status }) {
  if (!status.interfaces.length) return "Not attached, no services: see xdp-lb attach --help.";
  return "No services: see xdp-lb vip add --help.";
}

function serviceView({ service: { vip } }, act, toggle) {
  const name = h("span", { class: "vip-name" }, vip);
  const mode = h("span", { class: "mode" });
  const states = h("span", { class: "states" });
  const figures = h("span", { class: "figures" });
  const attributes = { type: "button", class: "heading", onclick: () => toggle(vip) };
  const heading = h("button", attributes, name, mode, states, figures);
  const element = h("li", {}, h("h3", {}, heading));
  let table = null;
  return {
    element,
    heading,
    rows: () => table?.views.known,
    update({ service, backends, state }) {
      const open = state.open.has(vip);
      const known = state.meter.services.get(vip);
      set(heading, "aria-expanded", open ? "true" : "false");
      say(mode, modeWords(service, known));
      showStates(states, service, state.status.loaded);
      say(figures, serviceFigures(known, state.meter.measured));
      if (open && !table) element.append((table = backendTable(vip, act)).element);
      if (!open && table) table = void table.element.remove();
      table?.update(service, backends, state);
    },
  };
}

function modeWords(service, known) {
  return known?.moving ? `${service.mode}, ${whole(known.moving)} slots in transition` : service.mode;
}

function showStates(element, service, loaded) {
  const counts = tally(service.backends, loaded);
  const present = Object.entries(counts).filter(([, number]) => number);
  const words = tallyWords(counts) || "no backends";
  if (element.title === words) return;
  element.title = words;
  element.replaceChildren(...(present.length ? present.map(stateCount) : [words]));
}

function stateCount([state, number]) {
  const spoken = h("span", { class: "spoken" }, ` ${STATES[state].word}, `);
  return h("span", { class: `state ${state}` }, `${STATES[state].shape} ${whole(number)}`, spoken);
}

function serviceFigures(known, measured) {
  if (!known || !measured) return "-";
  const { connections, packets, bits } = known.rates;
  return `${figure(connections)} conn/s · ${figure(packets)} pkt/s · ${figure(bits)} bit/s`;
}

function backendTable(vip, act) {
  const column = (words, kind = "") => h("th", { scope: "col", class: kind }, words);
  const headings = FIGURES.map(([words, , kind]) => column(words, `number ${kind}`));
  const change = h("th", { scope: "col", class: "write" }, h("span", { class: "spoken" }, "Change"));
  const head = h("tr", {}, column("Backend"), column("State"), column("Weight", "number"), ...headings);
  head.append(column("Open", "number"), column("Conns", "number wide"), change);
  const body = h("tbody", {});
  const caption = h("caption", { class: "spoken" }, `Backends of ${vip}`);
  const add = h("button", { type: "button", onclick: () => act("add", vip) }, "Add a backend…");
  const foot = h("p", { class: "write" }, add);
  const views = new Keyed(body, (item) => backendRow(vip, item, act));
  const scrolling = h("div", { class: "scrolling" }, h("table", {}, caption, h("thead", {}, head), body));
  return {
    element: h("div", { class: "backends" }, scrolling, foot),
    views,
    update(service, backends, state) {
      const known = state.meter.services.get(vip)?.backends;
      const item = (backend) => ({ backend, service, state, known: known?.get(backend.backend) });
      views.update(backends.map((each) => [each.backend, item(each)]));
    },
  };
}

function backendRow(vip, { backend: { backend: name } }, act) {
  const cell = (kind, label) => h("td", { class: kind, "data-label": label });
  const state = cell("state-cell");
  const weight = cell("number", "weight");
  const figures = FIGURES.map(([word, , kind]) => cell(`number ${kind}`, word));
  const open = cell("number", "open");
  const connections = cell("number wide", "conns");
  const drainWord = h("span", {});
  let drains = true;
  const button = (kind, words) => {
    const spoken = h("span", { class: "spoken" }, ` ${name} of ${vip}`);
    return h("button", { type: "button", onclick: () => act(kind(), vip, name) }, words, spoken);
  };
  const drain = button(() => (drains ? "drain" : "undrain"), drainWord);
  const weigh = button(() => "weight", "Weight…");
  const remove = button(() => "remove", "Remove…");
  const actions = h("td", { class: "write actions" }, drain, weigh, remove);
  const heading = h("th", { scope: "row" }, name);
  const element = h("tr", { tabindex: -1 }, heading, state, weight, ...figures, open, connections, actions);
  return {
    element,
    update({ backend, service, state: now, known }) {
      drains = !backend.draining;
      say(drainWord, drains ? "Drain…" : "Undrain…");
      showState(state, backend, now);
      say(weight, whole(backend.weight));
      FIGURES.forEach(([, of, , only], number) => say(figures[number], rateText(of, known, service, now, only)));
      say(open, known ? openText(known.counters.open) : "-");
      say(connections, known ? whole(known.counters.connections) : "-");
    },
  };
}

function rateText(of, known, service, { meter }, only = service.mode) {
  if (service.mode !== only) return "-";
  return known && meter.measured ? figure(of(known.rates)) : "-";
}

function showState(element, backend, { status, nowS }) {
  const state = stateOf(backend, status.loaded);
  const words = `${STATES[state].shape} ${STATES[state].word}`;
  const why = remark(backend, status.loaded, nowS);
  if (element.dataset.shown === `${words} ${why}`) return;
  element.dataset.shown = `${words} ${why}`;
  element.replaceChildren(h("span", { class: `state ${state}` }, words), why ? h("small", {}, why) : "");
}
