// The map: clients -> VIPs -> backends; the width of a line is its traffic. For mouse users only: the table of services
// has the same data and actions.

import { Keyed, say, set, svg } from "./dom.js";
import { METRICS, STATES, figure, fitting, plural, stateOf, tally, tallyWords, whole, widthOf } from "./words.js";

const MOST_SERVICES = 12;
const MOST_BACKENDS = 30; // individually; of more, only those of the open service
const MOST_OF_ONE = 20;
const CHOOSE_MS = 15000; // the busiest are not chosen again each second, to keep the map stable
const NARROW = 560;
const SIZE = 12; // px, of letters
const WIDEST_LINE = 12;

export class TrafficMap {
  // `onService(vip)`, `onBackend(vip, name)`: a click on one.
  constructor(onService, onBackend) {
    this.edges = svg("g", {});
    this.nodes = svg("g", {});
    this.edgeViews = new Keyed(this.edges, edgeView);
    this.nodeViews = new Keyed(this.nodes, (node) => nodeView(node, onService, onBackend));
    this.element = svg("svg", { class: "map", role: "img" }, this.edges, this.nodes);
    this.chosen = { key: null, atMs: 0, vips: new Set() };
  }

  // `services`: the matches of the filter; `status`: the whole document; `open`: the VIP whose backends are shown.
  update(services, status, meter, metric, open, width) {
    const shown = this.choose(services, status, meter, metric, open);
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

  // The open service, those with unhealthy backends, and the busiest; in the order of the status.
  choose(services, { loaded }, meter, metric, open) {
    if (services.length <= MOST_SERVICES) return services;
    const key = `${services.map((each) => each.vip).join()} ${metric} ${open}`;
    const now = Date.now();
    if (this.chosen.key !== key || now - this.chosen.atMs > CHOOSE_MS) {
      const rate = (each) => meter.services.get(each.vip)?.rates[metric] ?? 0;
      const rank = new Map(services.map((each) => [each, weightOf(each, loaded, open, rate(each))]));
      const first = [...services].sort((a, b) => rank.get(b) - rank.get(a)).slice(0, MOST_SERVICES);
      this.chosen = { key, atMs: now, vips: new Set(first.map((each) => each.vip)) };
    }
    return services.filter((each) => this.chosen.vips.has(each.vip));
  }
}

function weightOf(service, loaded, open, rate) {
  if (service.vip === open) return Infinity;
  const isTroubled = service.backends.some((each) => stateOf(each, loaded) !== "active");
  return isTroubled ? 1e15 + rate : rate;
}

function summary(shown, services, status, meter, metric) {
  const counts = tally(services.flatMap((each) => each.backends), status.loaded);
  const rate = `${figure(meter.total.rates[metric])} ${METRICS[metric].unit}`;
  const some = shown.length < services.length ? `, ${shown.length} shown` : "";
  const words = tallyWords(counts) || "no backends";
  const number = plural(services.length, "service");
  return `Map: clients, ${number}${some}, ${words}; ${rate}. The table below lists everything.`;
}

// The nodes of each service's backends.
function rowsOf(shown, left, status, meter, metric, open) {
  const all = shown.reduce((number, each) => number + each.backends.length, 0);
  const rows = shown.map((service) => {
    const known = meter.services.get(service.vip);
    const rateOf = (backend) => known?.backends.get(backend.backend)?.rates[metric] ?? 0;
    const one = (backend) => backendNode(service, backend, status.loaded, rateOf(backend));
    const some = (backends, name) => groupNode(service, backends, name, status.loaded, rateOf);
    const nodes = children(service, all, open, rateOf, one, some, status);
    return { service, rate: known?.rates[metric] ?? 0, children: nodes };
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
  const client = narrow ? 58 : 84;
  const gap = narrow ? 16 : Math.max(50, 0.14 * width);
  const rest = width - client - 2 * gap - 2;
  return { narrow, gap, client, vip: 0.47 * rest, backend: 0.53 * rest, row: narrow ? 36 : 26 };
}

// Backends in a column, each VIP centred on its backends, the clients centred on all.
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
    const words = each.more ? "use the filter" : vipWords(each, metric, meter, narrow);
    nodes.push([`vip ${key}`, { kind, vip: each.service?.vip, name, words, ...at }]);
    const to = [client + gap, middle];
    if (!each.more) edges.push([`to ${key}`, { from: [client, null], to, rate: each.rate, most }]);
    let top = middle - (each.children.length * (row + 4) - 4) / 2;
    for (const [number, child] of each.children.entries()) {
      const x = client + 2 * gap + vip;
      const box = { x, y: top, width: backend, height: row };
      nodes.push([child.key, { ...child, ...box, narrow, metric, measured: meter.measured }]);
      const to = [x, top + row / 2];
      const from = [client + gap + vip, middle + fanned(number, each.children.length, tall)];
      edges.push([child.key, { from, to, rate: child.rate, most, state: child.state }]);
      top += row + 4;
    }
    y += height + 10;
  }
  const height = Math.max(y - 8, tall + 4);
  const first = edges.filter(([, edge]) => edge.from[1] === null);
  first.forEach(([, edge], number) => (edge.from[1] = height / 2 + fanned(number, first.length, tall)));
  const middle = { x: 1, y: height / 2 - tall / 2, width: client - 1, height: tall };
  const words = meter.measured ? figure(meter.total.rates[metric]) : "-";
  nodes.push(["clients", { kind: "clients", name: "clients", words, ...middle }]);
  return { nodes, edges, height };
}

// Offset of a line from the middle of its node: side by side, so that none hides another.
function fanned(number, lines, height) {
  return (number - (lines - 1) / 2) * Math.min(WIDEST_LINE, (height - 8) / lines);
}

function vipWords({ service, rate }, metric, meter, narrow) {
  const moving = meter.services.get(service.vip)?.moving ?? 0;
  const rates = meter.measured ? `${figure(rate)} ${METRICS[metric].unit}` : "-";
  if (narrow) return moving ? `${rates} ~${figure(moving)}` : rates;
  return `${rates} · ${service.mode}${moving ? ` · ${whole(moving)} slots in transition` : ""}`;
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
  place(name, 8, 16, fitting(node.name, node.width - 12, SIZE, node.kind === "vip"));
  place(words, 8, 30, fitting(node.words, node.width - 12, SIZE));
}

function updateBackend(node, name, words) {
  const { shape, word } = STATES[node.state];
  const state = node.words ?? (node.state === "active" ? "" : word);
  const rate = node.measured ? `${figure(node.rate)}${node.narrow ? "" : ` ${METRICS[node.metric].unit}`}` : "-";
  if (node.narrow) {
    place(name, 8, 15, `${shape} ${fitting(node.name, node.width - 30, SIZE)}`);
    place(words, 8, 29, state ? `${rate} · ${state}` : rate);
    set(words, "text-anchor", null);
    return;
  }
  const right = state ? `${state} · ${rate}` : rate;
  place(name, 8, 17, `${shape} ${fitting(node.name, node.width - 42 - widthOf(right, SIZE), SIZE)}`);
  place(words, node.width - 8, 17, right);
  set(words, "text-anchor", "end");
}

function place(text, x, y, content) {
  set(text, "x", x);
  set(text, "y", y);
  say(text, content);
}
