// Counters, sampled once a second -> rates, and their history of the last 15 minutes (pure).

export const KEPT = 900; // samples

const NONE = Object.freeze({ connections: 0, packets: 0, bits: 0, replyPackets: 0, replyBits: 0, retries: 0 });
const COUNTERS = ["connections", "packets", "bytes", "reply_packets", "reply_bytes", "repeated_syns"];

// The last values of one figure; 0 before the first sample.
class Series {
  constructor() {
    this.values = new Float32Array(KEPT);
  }
}

// A set of series with one clock: `times`: of the samples, in ms.
export class Meter {
  constructor() {
    this.times = new Float64Array(KEPT);
    this.samples = 0;
    this.takenMs = 0;
    this.total = { rates: NONE, drops: 0, history: new Histories() };
    this.services = new Map(); // vip -> {rates, backends: Map name -> {rates, counters, packets: Series}, history}
    this.reasons = new Map(); // name -> {group, packets, rate}
  }

  // Counters that have decreased were reset to zero.
  take(stats, nowMs) {
    const seconds = this.takenMs ? (nowMs - this.takenMs) / 1000 : 0;
    const slot = this.samples % KEPT;
    this.takenMs = nowMs;
    this.services = new Map(stats.services.map((each) => [each.vip, this.service(each, seconds, slot)]));
    this.reasons = new Map([...reasonsOf(stats)].map(([name, each]) => [name, this.reason(name, each, seconds)]));
    this.total.rates = sum([...this.services.values()].map((each) => each.rates));
    this.total.drops = [...this.reasons.values()].reduce((all, each) => all + (each.group === "drops" && each.rate), 0);
    if (!seconds) return;
    this.times[slot] = nowMs;
    this.total.history.keep(slot, { ...this.total.rates, drops: this.total.drops });
    for (const each of this.services.values()) each.history.keep(slot, each.rates);
    this.samples += 1;
  }

  get measured() {
    return this.samples > 0;
  }

  service(stats, seconds, slot) {
    const before = this.services.get(stats.vip) ?? { backends: new Map(), history: new Histories() };
    const backends = new Map();
    for (const each of stats.backends) {
      backends.set(each.backend, this.backend(before.backends.get(each.backend), each, seconds, slot));
    }
    const rates = sum([...backends.values()].map((each) => each.rates));
    return { rates, backends, history: before.history, moving: stats.slots_in_transition };
  }

  backend(before, counters, seconds, slot) {
    const rates = seconds && before ? ratesOf(before.counters, counters, seconds) : NONE;
    let packets = before?.packets;
    if (!packets && rates.packets) packets = new Series();
    if (packets && seconds) packets.values[slot] = rates.packets;
    return { rates, counters, packets };
  }

  reason(name, { group, packets }, seconds) {
    const before = this.reasons.get(name)?.packets ?? 0;
    const more = packets >= before ? packets - before : packets;
    return { group, packets, rate: seconds ? more / seconds : 0 };
  }

  // The samples not older than `spanMs`: [{time, index}] with the index into the values of each series, oldest first.
  window(spanMs) {
    const found = [];
    const first = Math.max(0, this.samples - KEPT);
    for (let number = first; number < this.samples; number += 1) {
      const index = number % KEPT;
      if (this.takenMs - this.times[index] <= spanMs) found.push({ time: this.times[index], index });
    }
    return found;
  }
}

// One series per figure.
class Histories {
  constructor() {
    this.series = {};
  }

  keep(slot, values) {
    for (const [name, value] of Object.entries(values)) this.of(name)[slot] = value;
  }

  of(name) {
    this.series[name] ??= new Series();
    return this.series[name].values;
  }
}

function ratesOf(before, after, seconds) {
  const isNew = COUNTERS.some((name) => after[name] < before[name]);
  const [connections, packets, bytes, replyPackets, replyBytes, retries] = COUNTERS.map(
    (name) => (after[name] - (isNew ? 0 : before[name])) / seconds,
  );
  return { connections, packets, bits: 8 * bytes, replyPackets, replyBits: 8 * replyBytes, retries };
}

export function sum(rates) {
  const all = { ...NONE };
  for (const each of rates) for (const name of Object.keys(all)) all[name] += each[name];
  return all;
}

function* reasonsOf(stats) {
  for (const group of ["drops", "passes", "answered", "noted"]) {
    for (const [name, packets] of Object.entries(stats[group])) yield [name, { group, packets }];
  }
}
