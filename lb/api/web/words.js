// Values -> displayed text and figures (pure).

const PREFIXES = ["", "k", "M", "G", "T", "P"];
const WHOLE = new Intl.NumberFormat("en");

// States of a backend, the worst first. Each has a shape as well: colour alone is not accessible.
export const STATES = {
  down: { shape: "✕", word: "down" },
  unresolved: { shape: "◇", word: "unresolved" },
  draining: { shape: "◐", word: "draining" },
  active: { shape: "●", word: "active" },
};

export const METRICS = {
  packets: { word: "packets", unit: "pkt/s" },
  bits: { word: "bits", unit: "bit/s" },
  connections: { word: "connections", unit: "conn/s" },
};

// At most five characters, as in `xdp-lb top`: 0, 7.3, 128, 12.3k.
export function figure(rate) {
  if (rate < 0.05) return "0";
  let size = 0;
  let value = rate;
  while (value >= 999.5 && size < PREFIXES.length - 1) {
    value /= 1000;
    size += 1;
  }
  const digits = value < 9.95 ? 1 : value < 99.95 && size > 0 ? 1 : 0;
  return value.toFixed(digits) + PREFIXES[size];
}

export function whole(number) {
  return WHOLE.format(number);
}

export function plural(number, one, more = `${one}s`) {
  return `${whole(number)} ${number === 1 ? one : more}`;
}

export function percent(part, all) {
  return all ? `${((100 * part) / all).toFixed(1)} %` : "0 %";
}

export function clock(seconds) {
  return new Date(1000 * seconds).toLocaleTimeString("en-GB");
}

export function ago(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 129600 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

// As lb.formats.prometheus.backend_state: active, but with an unresolved next hop, is unresolved.
export function stateOf(backend, loaded) {
  return backend.state === "active" && loaded && !backend.resolved ? "unresolved" : backend.state;
}

// Why a backend is not fully active; empty if it is.
export function remark(backend, loaded, nowS) {
  if (backend.state === "down") return `${backend.why}, for ${ago(nowS - backend.since)}`;
  if (backend.share < 100) return `slow start: ${backend.share} % of its weight`;
  if (stateOf(backend, loaded) === "unresolved") return "next hop unresolved";
  return backend.why || "";
}

// Number of backends by state, the worst first: {state: number}.
export function tally(backends, loaded) {
  const found = {};
  for (const state of Object.keys(STATES)) found[state] = 0;
  for (const backend of backends) found[stateOf(backend, loaded)] += 1;
  return found;
}

export function tallyWords(counts) {
  const present = Object.entries(counts).filter(([, number]) => number);
  return present.map(([state, number]) => `${whole(number)} ${STATES[state].word}`).join(", ");
}

const canvas = document.createElement("canvas").getContext("2d");

// In px, of letters of that size.
export function widthOf(text, size, bold = false) {
  canvas.font = `${bold ? 600 : 400} ${size}px system-ui, sans-serif`;
  return canvas.measureText(text).width;
}

// Shortened in the middle to fit.
export function fitting(text, width, size, bold = false) {
  let short = text;
  for (let kept = text.length - 1; kept > 3 && widthOf(short, size, bold) > width; kept -= 1) {
    const head = Math.ceil(kept / 2);
    short = `${text.slice(0, head)}…${text.slice(text.length - (kept - head))}`;
  }
  return short;
}

// Effect of a change on the ring of a service; null: no ring.
export function planSentence(plan) {
  if (!plan) return "Not attached: the change is stored and takes effect at the next attach.";
  if (!plan.moved) return "No slot moves.";
  const moved = `${whole(plan.moved)} of ${whole(plan.slots)} slots move (${percent(plan.moved, plan.slots)})`;
  return `${moved}; the minimum is ${whole(plan.minimum)}.`;
}

// Open connections of a backend or service: 40, ~37 if estimated, - if unknown.
export function openText({ connections, estimated }) {
  return connections === null ? "-" : `${estimated ? "~" : ""}${whole(connections)}`;
}

// What a change does to them.
export function endingSentence({ connections, estimated }) {
  if (connections === null) return "Ends an unknown number of open connections.";
  if (!connections && !estimated) return "Ends no open connections.";
  return `Ends ${estimated ? "~" : ""}${plural(connections, "open connection")}.`;
}

// Differences between two documents of one service, as sentences.
export function differences(before, after) {
  const known = new Map(before.backends.map((each) => [each.backend, each]));
  const found = [];
  for (const each of after.backends) {
    const was = known.get(each.backend);
    known.delete(each.backend);
    if (!was) found.push(`${each.backend} was added, weight ${each.weight}`);
    else found.push(...differencesOfBackend(was, each));
  }
  for (const name of known.keys()) found.push(`${name} was removed`);
  if (JSON.stringify(before.options) !== JSON.stringify(after.options)) found.push("options were changed");
  return found.length ? found : ["other settings were changed"];
}

function differencesOfBackend(was, is) {
  const found = [];
  if (was.weight !== is.weight) found.push(`${is.backend} weight changed from ${was.weight} to ${is.weight}`);
  if (was.draining !== is.draining) found.push(`${is.backend} is ${is.draining ? "draining" : "no longer draining"}`);
  return found;
}
