// The page: a login form, and with a token a session that polls the daemon once a second. The token is kept in
// sessionStorage of this tab only; logging out removes all data from the document.

import { Api, Problem } from "./api.js";
import { ChangeDialog } from "./change.js";
import { Chart } from "./chart.js";
import { Keyed, h, say, set } from "./dom.js";
import { TrafficMap } from "./map.js";
import { Meter } from "./rates.js";
import { ServiceList } from "./services.js";
import { METRICS, clock, figure, plural, stateOf, tally, tallyWords, whole } from "./words.js";

const TOKEN = "xdp-lb token";
const THEME = "xdp-lb theme";
const SAMPLE_MS = 1000;
const STATUS_MS = 10000; // for what has no events: slots in transition, neighbours
const RETRY_MS = [1000, 2000, 5000, 10000];
const SPANS_MS = [60000, 300000, 900000];
const EVENTS_KEPT = 200;
const BACKENDS_DRAWN = 8;
const OPEN_AT_FIRST = 20; // backends, in all
const GROUPS = {
  drops: "dropped",
  passes: "passed to the host",
  answered: "answered by the balancer",
  noted: "forwarded with a remark",
};

const byId = (id) => document.getElementById(id);

let session = null;

class Session {
  constructor(api, caller) {
    this.api = api;
    this.ending = new AbortController();
    this.meter = new Meter();
    this.status = null;
    this.open = new Set();
    this.scope = null; // the VIP shown in map and charts; null: all
    this.metric = "packets";
    this.spanMs = 900000;
    this.lastEvent = null;
    byId("main").replaceChildren(byId("view").content.cloneNode(true));
    byId("main").classList.toggle("reader", caller.role !== "write");
    say(byId("caller"), caller.role === "write" ? caller.who : `${caller.who}, read-only`);
    this.build();
  }

  build() {
    this.map = new TrafficMap((vip) => this.select(vip), (vip, name) => this.showBackend(vip, name));
    this.list = new ServiceList((...change) => this.dialog.open(...change), (vip) => this.toggle(vip));
    this.dialog = new ChangeDialog(this.api, (vip, said) => this.changed(vip, said), (problem) => end(problem.message));
    this.charts = [0, 1, 2, 3].map(() => new Chart());
    this.drops = new Keyed(byId("reasons"), reasonRow);
    byId("map").append(this.map.element);
    byId("services").append(this.list.element);
    byId("charts").append(...this.charts.map((each) => each.element));
    byId("main").append(this.dialog.element);
    byId("filter").addEventListener("input", () => this.show());
    byId("troubled").addEventListener("change", () => this.show());
    byId("metric").addEventListener("change", (event) => this.show((this.metric = event.target.value)));
    byId("span").addEventListener("change", (event) => this.show((this.spanMs = 60000 * event.target.value)));
    byId("all").addEventListener("click", () => this.select(null));
    this.sized = new ResizeObserver(() => this.show());
    this.sized.observe(byId("map"));
  }

  run() {
    const { signal } = this.ending;
    this.keepOn(signal, () => this.sample(signal));
    this.listen(signal);
  }

  stop() {
    this.ending.abort();
    this.sized.disconnect();
    byId("main").replaceChildren();
  }

  // One sample per second, or fewer if responses are slow.
  async keepOn(signal, work) {
    while (!signal.aborted) {
      const begun = performance.now();
      await work();
      const took = performance.now() - begun;
      await pause(Math.max(SAMPLE_MS - took, 2 * took), signal);
    }
  }

  async sample(signal) {
    try {
      if (!this.status || performance.now() - this.readMs > STATUS_MS) await this.read(signal);
      const { document } = await this.api.ask("GET", "/v1/stats", { signal });
      if (signal.aborted) return;
      this.meter.take(document, performance.now());
      if (this.isOutOfDate(document)) await this.read(signal);
      this.heard(null);
    } catch (problem) {
      if (!signal.aborted) this.heard(problem);
    }
    if (!signal.aborted) this.show();
  }

  async read(signal) {
    const { document } = await this.api.ask("GET", "/v1/status", { signal });
    const isFirst = !this.status;
    this.status = document;
    this.readMs = performance.now();
    const few = document.services.reduce((all, each) => all + each.backends.length, 0) <= OPEN_AT_FIRST;
    if (isFirst && few) this.open = new Set(document.services.map((each) => each.vip));
    if (!document.services.some((each) => each.vip === this.scope)) this.scope = null;
  }

  // Whether services or backends differ from those in the status.
  isOutOfDate(stats) {
    const names = (services) => services.map((each) => `${each.vip} ${each.backends.map((b) => b.backend)}`).join();
    return names(stats.services) !== names(this.status.services);
  }

  // Called after each request: null on success, else the problem.
  heard(problem) {
    if (problem && !(problem instanceof Problem)) throw problem;
    if (problem?.status === 401) end("The token is no longer valid.");
    else if (problem) this.since ??= Date.now();
    else this.since = null;
    if (this.ending.signal.aborted) return;
    const words = problem ? `${problem.message}: no data since ${clock(this.since / 1000)}, retrying` : "";
    say(byId("trouble"), words);
    set(byId("trouble"), "hidden", !problem);
    byId("main").classList.toggle("stale", Boolean(problem));
  }

  async listen(signal) {
    for (let failed = 0; !signal.aborted; failed += 1) {
      try {
        await this.api.follow(this.lastEvent, signal, (event) => {
          failed = -1;
          if (event) this.happened(event);
        });
      } catch (problem) {
        if (!signal.aborted && problem.status === 401) end("The token is no longer valid.");
      }
      await pause(RETRY_MS[Math.min(Math.max(failed, 0), RETRY_MS.length - 1)], signal);
    }
  }

  happened({ id, kind, document }) {
    if (id) this.lastEvent = id;
    this.readMs = -Infinity;
    this.note(document.time ?? Date.now() / 1000, kind, eventWords(kind, document));
  }

  note(timeS, kind, words) {
    const time = h("time", {}, clock(timeS));
    byId("events").prepend(h("li", {}, time, h("b", {}, kind), h("span", {}, words)));
    while (byId("events").children.length > EVENTS_KEPT) byId("events").lastChild.remove();
    set(byId("no-events"), "hidden", true);
  }

  async changed(vip, said) {
    say(byId("said"), said);
    this.readMs = -Infinity;
    await this.sample(this.ending.signal);
    // The pressed button may be gone with its backend.
    if (document.activeElement === document.body) this.list.heading(vip)?.focus();
  }

  // Rendering

  toggle(vip) {
    if (this.open.delete(vip)) this.scope = this.scope === vip ? null : this.scope;
    else {
      this.open.add(vip);
      this.scope = vip;
    }
    this.show();
  }

  select(vip) {
    this.scope = vip;
    if (vip) this.open.add(vip);
    this.show();
  }

  showBackend(vip, name) {
    this.select(vip);
    const row = this.list.row(vip, name);
    row?.scrollIntoView({ block: "center" });
    row?.focus();
  }

  show() {
    if (!this.status || this.ending.signal.aborted) return;
    const shown = this.passing();
    const state = { status: this.status, meter: this.meter, open: this.open, nowS: Date.now() / 1000 };
    this.showHead();
    this.list.update(shown, state);
    const width = Math.floor(byId("map").clientWidth);
    const services = shown.map(({ service, backends }) => ({ ...service, backends }));
    if (width) this.map.update(services, this.status, this.meter, this.metric, this.scope, width);
    this.showCharts();
    this.showReasons();
  }

  // Matches of the filter: [{service, backends}].
  passing() {
    const text = byId("filter").value.trim().toLowerCase();
    const troubled = byId("troubled").checked;
    const { services, loaded } = this.status;
    const found = services.map((service) => ({ service, backends: backendsPassing(service, text, troubled, loaded) }));
    const all = !text && !troubled;
    const passes = ({ service, backends }) => all || backends.length || (!troubled && named(service, text));
    const passing = found.filter(passes);
    const number = plural(services.length, "service");
    say(byId("passing"), all ? number : `${whole(passing.length)} of ${number}`);
    return passing;
  }

  showHead() {
    const { status, meter } = this;
    const on = status.interfaces.map((each) => `${each.name} ${each.attached ? each.xdp_mode : "detached"}`);
    say(byId("where"), [status.netns, ...(on.length ? on : ["not attached"])].join(" · "));
    const backends = status.services.flatMap((each) => each.backends);
    say(byId("health"), tallyWords(tally(backends, status.loaded)) || "no backends");
    const { connections, packets, bits, replyBits } = meter.total.rates;
    const rates = { connections, packets, bits, replies: replyBits, drops: meter.total.drops };
    for (const [name, rate] of Object.entries(rates)) say(byId(`total-${name}`), meter.measured ? figure(rate) : "-");
  }

  showCharts() {
    const { meter, scope } = this;
    const service = scope && meter.services.get(scope);
    const window = meter.window(this.spanMs);
    const spanMs = spanFor(window, this.spanMs);
    const { history } = service || meter.total;
    const line = (name, of) => ({ name, values: history.of(of) });
    const two = (name, reply) => [line("to backends", name), line("to clients", reply)];
    const charts = [
      ["Packets per second", two("packets", "replyPackets")],
      ["Bits per second", two("bits", "replyBits")],
      ["Connections per second", [line("opened", "connections"), line("SYN retransmits", "retries")]],
      service
        ? ["Packets per second by backend", backendLines(service, window)]
        : ["Drops per second", [line("dropped", "drops")]],
    ];
    say(byId("scope"), scope ?? "all services");
    set(byId("all"), "hidden", !scope);
    charts.forEach(([title, lines], number) => this.charts[number].update(title, window, spanMs, lines));
  }

  showReasons() {
    const found = [...this.meter.reasons].filter(([, each]) => each.packets);
    set(byId("no-reasons"), "hidden", found.length > 0);
    set(byId("reasons-table"), "hidden", found.length === 0);
    this.drops.update(found.map(([name, each]) => [name, { name, ...each, measured: this.meter.measured }]));
  }
}

function named(service, text) {
  return service.vip.toLowerCase().includes(text);
}

function backendsPassing(service, text, troubled, loaded) {
  const some = named(service, text) ? service.backends : service.backends.filter((each) => each.backend.includes(text));
  return troubled ? some.filter((each) => stateOf(each, loaded) !== "active" || each.share < 100) : some;
}

// The shortest span in whole minutes that covers the samples.
function spanFor(window, mostMs) {
  const knownMs = window.length ? window.at(-1).time - window[0].time : 0;
  return SPANS_MS.find((each) => each >= knownMs || each >= mostMs);
}

// The busiest backends as lines of their own, the rest summed up.
function backendLines(service, window) {
  const busy = [...service.backends].filter(([, each]) => each.packets);
  const all = busy.map(([name, each]) => lineOf(name, each.packets.values, window));
  const order = [...all].sort((a, b) => b.sum - a.sum);
  const first = new Set(order.slice(0, order.length > BACKENDS_DRAWN ? BACKENDS_DRAWN - 1 : BACKENDS_DRAWN));
  const lines = all.filter((each) => first.has(each));
  const rest = order.filter((each) => !first.has(each));
  if (!rest.length) return lines;
  const together = new Float32Array(rest[0].values.length);
  for (const { index } of window) together[index] = rest.reduce((n, { values }) => n + values[index], 0);
  return [...lines, { name: plural(rest.length, "other"), values: together }];
}

function lineOf(name, values, window) {
  return { name, values, sum: window.reduce((sum, { index }) => sum + values[index], 0) };
}

function reasonRow() {
  const cells = [h("th", { scope: "row" }), h("td", {}), h("td", { class: "number" }), h("td", { class: "number" })];
  return {
    element: h("tr", {}, ...cells),
    update({ name, group, rate, packets, measured }) {
      const texts = [name, GROUPS[group], measured ? figure(rate) : "-", whole(packets)];
      texts.forEach((text, number) => say(cells[number], text));
    },
  };
}

function eventWords(kind, { summary, detail, interface: name, xdp_mode: mode, ...more }) {
  if (kind === "attach") return `${name}, ${mode} XDP`;
  if (kind === "detach") return name;
  if (summary || detail) return summary ?? detail;
  if (kind === "health") return healthWords(more);
  const { time, ...rest } = more;
  const words = Object.entries(rest).map(([key, value]) => `${key} ${value}`);
  return words.join(", ");
}

function healthWords({ vip, backend, state, why }) {
  return `${vip}: backend ${backend} ${state === "down" ? `is down: ${why}` : "is up"}`;
}

function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => resolve(clearTimeout(timer)), { once: true });
  });
}

// Login

async function begin(token) {
  const api = new Api(token);
  const { document: caller } = await api.ask("GET", "/v1/whoami");
  sessionStorage.setItem(TOKEN, token);
  session = new Session(api, caller);
  prompt(false);
  session.run();
}

function end(why = "") {
  sessionStorage.removeItem(TOKEN);
  session?.stop();
  session = null;
  prompt(true, why);
}

function prompt(isShown, why = "") {
  set(byId("login"), "hidden", !isShown);
  set(byId("main"), "hidden", isShown);
  set(byId("logout"), "hidden", isShown);
  for (const id of ["where", "caller"]) if (isShown) say(byId(id), "");
  say(byId("login-fault"), why);
  set(byId("token"), "aria-invalid", why ? "true" : null);
  byId("token").value = "";
  if (isShown) byId("token").focus();
}

async function login(token) {
  try {
    await begin(token);
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    if (problem.status === 401) end(problem.message);
    else prompt(true, problem.message); // reloading the page tries the same token again
  }
}

// The code in a link printed by `xdp-lb web`; it does not stay in the address bar or the history.
function codeOfLink() {
  const found = new URLSearchParams(location.hash.slice(1)).get("code");
  if (found) history.replaceState(null, "", location.pathname);
  return found;
}

async function open(code) {
  try {
    const { document: opened } = await new Api(null).ask("POST", "/v1/sessions", { body: { code } });
    await login(opened.token);
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    prompt(true, problem.message);
  }
}

// Dark or light

function theme(wanted) {
  set(document.documentElement, "data-theme", wanted);
  say(byId("theme"), { dark: "Dark", light: "Light" }[wanted] ?? "Auto");
}

function nextTheme() {
  const next = { dark: "light", light: null }[localStorage.getItem(THEME)];
  if (next === null) localStorage.removeItem(THEME);
  else localStorage.setItem(THEME, next ?? "dark");
  theme(localStorage.getItem(THEME));
}

theme(localStorage.getItem(THEME));
byId("theme").addEventListener("click", nextTheme);
byId("logout").addEventListener("click", () => end());
byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = byId("token").value.trim();
  if (token) login(token);
});
const code = codeOfLink();
const kept = sessionStorage.getItem(TOKEN);
if (code) open(code);
else if (kept) login(kept);
else prompt(true);
