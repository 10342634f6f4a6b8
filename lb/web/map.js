// The map: clients -> VIPs -> backends, where a line is as wide as what goes along it. For the eye and the mouse alone: all
// that it tells and does is in the table of services too.

import { Keyed, say, set, svg } from "./dom.js";
import { METRICS, STATES, figure, plural, shortened, stateOf, tally, tallyWords, whole } from "./words.js";

const MOST_SERVICES = 12;
const MOST_BACKENDS = 30; // one by one; of more, those of the open service alone
const MOST_OF_ONE = 20;
const CHOOSE_MS = 15000; // the busiest are not chosen anew each second, lest the map jumps
const NARROW = 560;
const CHARACTER = 6.9; // px, of the widest usual one
const WIDEST_LINE = 12;

export class TrafficMap {
  // `onService(vip)`, `onBackend(vip, name)`: a click on one.
  constructor(onService, onBackend) {
    this.edges = svg("g", {});
    this.nodes = svg("g", {});
    this.edgeViews = new Keyed(this.edges, edgeView);
    this.nodeViews = new Keyed(this.nodes, (node) => nodeView(node, onService, onBackend));
    this.element = svg("svg", { class: "map", role: "img" }, this.edges, this.nodes);
    this.chosen = { key: null, atMs: 0, services: [] };
  }

  // `services`: those that pass the filter; `status`: the whole document; `open`: the VIP whose backends are wanted.
  update(services, status, meter, metric, open, width) {
    const shown = this.choose(services, meter, metric, open);
    const rows = rowsOf(shown, services.length - shown.length, status, meter, metric, open);
    const places = placesFor(width);
    const { nodes, edges, height } = laidOut(rows, meter, metric, places);
    set(this.element, "viewBox", `0 0 ${width} ${height}`);
    set(this.element, "width", width);
    set(this.element, "height", height);
    set(this.element, "aria-label", summary(shown, services, status, meter, metric));
    this.nodeViews.update(nodes);
    this.edgeViews.update(edges);
  }

  choose(services, meter, metric, open) {
    if (services.length <= MOST_SERVICES) return services;
    const key = `${services.map((each) => each.vip).join()} ${metric} ${open}`;
    const now = Date.now();
    if (this.chosen.key !== key || now - this.chosen.atMs > CHOOSE_MS) {
      const rank = (each) => (each.vip === open ? Infinity : (meter.services.get(each.vip)?.rates[metric] ?? 0));
      const busiest = [...services].sort((a, b) => rank(b) - rank(a)).slice(0, MOST_SERVICES);
      this.chosen = { key, atMs: now, vips: new Set(busiest.map((each) => each.vip)) };
    }
    return services.filter((each) => this.chosen.vips.has(each.vip));
  }
}

function summary(shown, services, status, meter, metric) {
  const counts = tally(services.flatMap((each) => each.backends), status.loaded);
  const rate = `${figure(meter.total.rates[metric])} ${METRICS[metric].unit}`;
  const some = shown.length < services.length ? `, the ${shown.length} busiest shown` : "";
  const words = tallyWords(counts) || "no backends";
  return `Map: clients, ${plural(services.length, "service")}${some}, ${words}; ${rate}. The table below has all of it.`;
}

// What is shown of the backends of each service.
function rowsOf(shown, left, status, meter, metric, open) {
  const all = shown.reduce((number, each) => number + each.backends.length, 0);
  const rows = shown.map((service) => {
    const known = meter.services.get(service.vip);
    const rateOf = (backend) => known?.backends.get(backend.backend)?.rates[metric] ?? 0;
    const one = (backend) => backendNode(service, backend, status.loaded, rateOf(backend));
    const some = (backends, name) => groupNode(service, backends, name, status.loaded, rateOf);
    return { service, rate: known?.rates[metric] ?? 0, children: children(service, all, open, rateOf, one, some, status) };
  });
  if (left > 0) rows.push({ more: left, rate: 0, children: [] });
  return rows;
}

function children(service, all, open, rateOf, one, some, status) {
  const { backends } = service;
  if (all <= MOST_BACKENDS || backends.length === 1) return backends.map(one);
  if (service.vip !== open) return backends.length ? [some(backends, plural(backends.length, "backend"))] : [];
  if (backends.length <= MOST_OF_ONE) return backends.map(one);
  const rank = (each) => (stateOf(each, status.loaded) === "active" ? rateOf(each) : Infinity);
  const busiest = new Set([...backends].sort((a, b) => rank(b) - rank(a)).slice(0, MOST_OF_ONE));
  const rest = backends.filter((each) => !busiest.has(each));
  return [...backends.filter((each) => busiest.has(each)).map(one), some(rest, `${whole(rest.length)} more`)];
}

function backendNode(service, backend, loaded, rate) {
  const state = stateOf(backend, loaded);
  const key = `${service.vip} ${backend.backend}`;
  return { key, kind: "backend", vip: service.vip, backend: backend.backend, name: backend.backend, state, rate };
}

function groupNode(service, backends, name, loaded, rateOf) {
  const counts = tally(backends, loaded);
  const state = Object.keys(STATES).find((each) => counts[each]);
  const rate = backends.reduce((all, each) => all + rateOf(each), 0);
  const trouble = { ...counts, active: 0 };
  return { key: `${service.vip} *`, kind: "group", vip: service.vip, name, state, rate, words: tallyWords(trouble) };
}

function placesFor(width) {
  const narrow = width < NARROW;
  const client = narrow ? 46 : 84;
  const gap = narrow ? 22 : Math.max(50, 0.14 * width);
  const rest = width - client - 2 * gap - 2;
  return { narrow, gap, client, vip: 0.47 * rest, backend: 0.53 * rest, row: narrow ? 36 : 26 };
}

// Backends one below the other, each VIP beside the middle of its own, the clients beside the middle of all.
function laidOut(rows, meter, metric, { narrow, gap, client, vip, backend, row }) {
  const most = Math.max(1e-9, ...rows.map((each) => each.rate));
  const nodes = [];
  const edges = [];
  const tall = 38;
  let y = 2;
  for (const each of rows) {
    const height = Math.max(tall, each.children.length * (row + 4) - 4);
    const middle = y + height / 2;
    const name = each.more ? `${whole(each.more)} more services` : each.service.vip;
    const key = each.more ? "more" : each.service.vip;
    const kind = each.more ? "more" : "vip";
    const at = { x: client + gap, y: middle - tall / 2, width: vip, height: tall };
    const words = each.more ? "filter to see them" : vipWords(each, metric, meter, narrow);
    nodes.push([`vip ${key}`, { kind, vip: each.service?.vip, name, words, ...at }]);
    if (!each.more) edges.push([`to ${key}`, { from: [client, null], to: [client + gap, middle], rate: each.rate, most }]);
    let top = middle - (each.children.length * (row + 4) - 4) / 2;
    for (const child of each.children) {
      const x = client + 2 * gap + vip;
      nodes.push([child.key, { ...child, x, y: top, width: backend, height: row, narrow, metric, measured: meter.measured }]);
      const to = [x, top + row / 2];
      edges.push([child.key, { from: [client + gap + vip, middle], to, rate: child.rate, most, state: child.state }]);
      top += row + 4;
    }
    y += height + 10;
  }
  const height = Math.max(y - 8, tall + 4);
  for (const [, edge] of edges) edge.from[1] ??= height / 2;
  const middle = { x: 1, y: height / 2 - tall / 2, width: client - 1, height: tall };
  const words = meter.measured ? figure(meter.total.rates[metric]) : "-";
  nodes.push(["clients", { kind: "clients", name: "clients", words, ...middle }]);
  return { nodes, edges, height };
}

function vipWords({ service, rate }, metric, meter, narrow) {
  const moving = meter.services.get(service.vip)?.moving ?? 0;
  const rates = meter.measured ? `${figure(rate)} ${METRICS[metric].unit}` : "-";
  const slots = moving ? ` · ${whole(moving)} ${narrow ? "moving" : "slots in transition"}` : "";
  return narrow ? rates + slots : `${rates} · ${service.mode}${slots}`;
}

function edgeView() {
  const element = svg("path", { fill: "none" });
  return {
    element,
    update({ from, to, rate, most, state }) {
      const bend = (from[0] + to[0]) / 2;
      set(element, "d", `M${from[0]} ${from[1]}C${bend} ${from[1]} ${bend} ${to[1]} ${to[0]} ${to[1]}`);
      const idle = rate < 0.05;
      set(element, "stroke-width", idle ? 1 : (1 + (WIDEST_LINE - 1) * Math.sqrt(Math.min(1, rate / most))).toFixed(2));
      set(element, "class", `edge ${state ?? ""}${idle ? " idle" : ""}`);
    },
  };
}

function nodeView(made, onService, onBackend) {
  const box = svg("rect", { rx: 4 });
  const name = svg("text", { class: "name" });
  const words = svg("text", { class: "words" });
  const title = svg("title", {});
  const click = () => (made.kind === "backend" ? onBackend(made.vip, made.backend) : onService(made.vip));
  const element = svg("g", made.vip ? { onclick: click } : {}, title, box, name, words);
  return {
    element,
    update(node) {
      set(element, "transform", `translate(${node.x} ${node.y})`);
      set(element, "class", `node ${node.kind} ${node.state ?? ""}`);
      set(box, "width", node.width);
      set(box, "height", node.height);
      if (node.state) updateBackend(node, name, words);
      else updateOther(node, name, words);
      say(title, `${node.name}${node.state ? `, ${STATES[node.state].word}` : ""}`);
    },
  };
}

function updateOther(node, name, words) {
  place(name, 8, 16, shortened(node.name, Math.floor((node.width - 14) / CHARACTER)));
  place(words, 8, 30, node.words);
}

function updateBackend(node, name, words) {
  const { shape, word } = STATES[node.state];
  const state = node.words ?? (node.state === "active" ? "" : word);
  const rate = node.measured ? `${figure(node.rate)}${node.narrow ? "" : ` ${METRICS[node.metric].unit}`}` : "-";
  if (node.narrow) {
    place(name, 8, 15, `${shape} ${shortened(node.name, Math.floor((node.width - 28) / CHARACTER))}`);
    place(words, 8, 29, state ? `${rate} · ${state}` : rate);
    set(words, "text-anchor", null);
    return;
  }
  const room = Math.floor((node.width - 30) / CHARACTER) - rate.length - state.length - 3;
  place(name, 8, 17, `${shape} ${shortened(node.name, Math.max(8, room))}`);
  place(words, node.width - 8, 17, state ? `${state} · ${rate}` : rate);
  set(words, "text-anchor", "end");
}

function place(text, x, y, content) {
  set(text, "x", x);
  set(text, "y", y);
  say(text, content);
}
